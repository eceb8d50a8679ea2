"""Sources made from another: decoded codes, in a linear Gaussian model; moved and noisy images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gapjax
from gapjax import models
from gapjax.fit.derived_sources import (
    affine,
    augmented_source,
    interpolation_source,
    noisy_source,
    reconstruction_source,
    thinned_source,
)
from gapjax.fit.sources import draw_examples

N = 20_000
SIGMA = 0.5  # of the pixels, in `linear`
NUM_MOVED = 4500
RNG = np.random.default_rng(0)


@jax.jit
def _epoch(source, rng_key):
    number = source.num_examples
    keys = jax.random.split(rng_key, number)
    return draw_examples(source, source.begin_epoch(rng_key), keys, jnp.arange(number))


# --- decoded codes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(linear):
    """One image as a data set of N: what is drawn from it is one conditional distribution."""
    return np.broadcast_to(linear.images[0], (N, 6))


def _code(linear):
    """Matrix A and offset a of the wrong encoder's mean, and its variances."""
    encoder = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), linear.wrong.encoder)
    return encoder["weight"], encoder["bias"], np.log1p(np.exp(encoder["raw_scale"])) ** 2


def _pixels(linear, mean, second):
    """Mean and covariance of x from the mean and the second moment of z."""
    weight, bias = (np.asarray(linear.wrong.decoder[name]) for name in ("weight", "bias"))
    covariance = weight @ (second - np.outer(mean, mean)) @ weight.T + SIGMA**2 * np.eye(6)
    return weight @ mean + bias, covariance


def _assert_moments(draws, mean, covariance):
    """Within five standard errors, for a distribution near a Gaussian."""
    draws = np.asarray(draws, np.float64)
    deviation = np.sqrt(np.diag(covariance))
    np.testing.assert_array_less(abs(draws.mean(0) - mean), 5 * deviation / np.sqrt(N))
    error = abs(np.cov(draws.T) - covariance) / np.outer(deviation, deviation)
    np.testing.assert_array_less(error, 5 * np.sqrt(2 / N))


def test_reconstructions_have_the_moments_of_a_decoded_code(linear, image):
    matrix, offset, variance = _code(linear)
    source = reconstruction_source(linear.vae, linear.wrong, image)
    code = matrix @ linear.images[0].astype(np.float64) + offset
    expected = _pixels(linear, code, np.diag(variance) + np.outer(code, code))
    _assert_moments(_epoch(source, jax.random.key(0)), *expected)


def test_reconstructions_of_reconstructions_have_the_moments_of_the_chain(linear, image):
    matrix, offset, variance = _code(linear)
    source = image
    mean, covariance = linear.images[0].astype(np.float64), np.zeros((6, 6))
    for _ in range(3):
        source = reconstruction_source(linear.vae, linear.wrong, source)
        code = matrix @ mean + offset
        second = matrix @ covariance @ matrix.T + np.diag(variance) + np.outer(code, code)
        mean, covariance = _pixels(linear, code, second)
    _assert_moments(_epoch(source, jax.random.key(0)), mean, covariance)


def test_with_the_exact_posterior_reconstructions_keep_the_model(linear):
    model = gapjax.model_source(linear.vae, linear.exact.decoder, N)
    source = reconstruction_source(linear.vae, linear.exact, model)
    bias = np.asarray(linear.exact.decoder["bias"], np.float64)
    draws = _epoch(source, jax.random.key(1))
    _assert_moments(draws, *_pixels(linear, np.zeros(2), np.eye(2)))
    assert np.all(np.asarray(draws).std(0) > 0.4) and bias.shape == (6,)


@pytest.mark.parametrize("partner", ["data", "prior"])
@pytest.mark.parametrize("angle", [0.0, 1.2])
def test_interpolations_have_the_moments_of_their_codes(linear, image, partner, angle):
    matrix, offset, variance = _code(linear)
    source = interpolation_source(linear.vae, linear.wrong, image, partner=partner, max_angle=angle)
    code = matrix @ linear.images[0] + offset
    if angle == 0.0:
        cos, sin, cos_2, product = 1.0, 0.0, 1.0, 0.0
    else:  # means over t ~ U(0, angle)
        cos, sin = np.sin(angle) / angle, (1 - np.cos(angle)) / angle
        cos_2, product = 0.5 + np.sin(2 * angle) / (4 * angle), np.sin(angle) ** 2 / (2 * angle)
    own = np.diag(variance) + np.outer(code, code)
    if partner == "prior":
        mean, second = cos * code, cos_2 * own + (1 - cos_2) * np.eye(2)
    else:
        mean, second = (cos + sin) * code, own + 2 * product * np.outer(code, code)
    mean, covariance = _pixels(linear, mean, second)
    _assert_moments(_epoch(source, jax.random.key(2)), mean, covariance)


def test_the_partner_is_any_other_image(linear):
    """At the angle pi/2 alone, which is not drawn: the far end is the code of a random image."""
    images = np.concatenate([np.zeros((N // 2, 6)), np.full((N // 2, 6), 40.0)]).astype(np.float32)
    source = interpolation_source(linear.vae, linear.exact, images, max_angle=np.pi / 2)
    draws = np.asarray(_epoch(source, jax.random.key(3)))
    gain = np.asarray(linear.exact.encoder["weight"] @ np.full(6, 40.0))
    along = draws @ np.linalg.pinv(np.asarray(linear.exact.decoder["weight"])).T @ gain
    far = np.unique(np.round(along / (gain @ gain), 1))
    # Between two images that are far from 0, cos + sin rises to 1.41; with one of them it is <= 1.
    assert far.max() > 1.3 and far.min() < 0.1
    alone = np.mean(along / (gain @ gain) > 1.1)
    assert 0.1 < alone < 0.25  # a quarter of the pairs are both far, most of their t beyond 1.1


@pytest.mark.parametrize("make", [
    reconstruction_source,
    interpolation_source,
    functools.partial(interpolation_source, partner="prior"),
])  # fmt: skip
def test_they_draw_levels_in_the_type_of_the_images(small, make):
    source = make(small.vae, small.params, small.train_images)
    assert source.num_examples == len(small.train_images)
    again = make(small.vae, small.params, gapjax.data_source(small.train_images))
    draws = [
        jax.jit(draw_examples)(
            each, each.begin_epoch(key), jax.random.split(key, 30), jnp.arange(30)
        )
        for each in (source, again)
        for key in [jax.random.key(5)]
    ]
    assert draws[0].dtype == jnp.uint8 and set(np.unique(draws[0])) == {0, 1}
    np.testing.assert_array_equal(*draws)


@pytest.mark.parametrize("make", [reconstruction_source, interpolation_source])
def test_decoded_codes_are_not_cut_to_the_type_of_the_images(linear, make):
    """The model's x are reals, these images levels."""
    source = make(linear.vae, linear.exact, np.ones((4, 6), np.uint8))
    draws = np.asarray(_epoch(source, jax.random.key(0)))
    assert draws.dtype == np.float32 and np.all(draws != np.round(draws))


def test_what_cannot_be_made_is_refused(small):
    with pytest.raises(ValueError, match="partner is 'model'; it must be one of data, prior"):
        interpolation_source(small.vae, small.params, small.train_images, partner="model")
    with pytest.raises(ValueError, match="images is empty"):
        reconstruction_source(small.vae, small.params, small.train_images[:0])


# --- moved and noisy images ---------------------------------------------------------------------


def _shifted(image, rows, columns):
    """By NumPy: zeros come in."""
    padded = np.pad(image, 2)
    height, width = image.shape
    return padded[2 - rows : 2 - rows + height, 2 - columns : 2 - columns + width]


def test_every_shift_comes_as_often_as_the_others():
    image = RNG.integers(1, 200, (4, 5)).astype(np.uint8)
    source = augmented_source(gapjax.data_source(np.broadcast_to(image, (NUM_MOVED, 4, 5))))
    draws = np.asarray(_epoch(source, jax.random.key(0)))
    assert draws.dtype == np.uint8
    shifts = [_shifted(image, i, j).tobytes() for i in (-1, 0, 1) for j in (-1, 0, 1)]
    counts = [sum(draw.tobytes() == shift for draw in draws) for shift in shifts]
    assert sum(counts) == NUM_MOVED
    assert np.all(abs(np.array(counts) - NUM_MOVED / 9) < 5 * np.sqrt(NUM_MOVED / 9))


def test_without_limits_nothing_is_changed():
    images = RNG.integers(0, 256, (20, 3, 6, 2)).astype(np.uint8)
    source = augmented_source(gapjax.data_source(images), max_shift=0)
    draws = np.asarray(_epoch(source, jax.random.key(1)))
    assert sorted(x.tobytes() for x in draws) == sorted(x.tobytes() for x in images)


def test_known_maps():
    image = RNG.random((5, 5)).astype(np.float32)
    none = jnp.zeros(2)
    quarter = jnp.array([[0.0, -1.0], [1.0, 0.0]])
    turned = np.asarray(affine(image, quarter, none))
    np.testing.assert_allclose(turned, np.rot90(image, -1), atol=1e-5)
    np.testing.assert_allclose(
        affine(image, jnp.eye(2), jnp.array([1.0, -2.0])), _shifted(image, 1, -2), atol=1e-6
    )
    halved = np.asarray(affine(image, 2 * jnp.eye(2), none))  # every second pixel, about the centre
    np.testing.assert_allclose(halved[1:4, 1:4], image[::2, ::2], atol=1e-6)
    between = affine(image, jnp.eye(2), jnp.array([0.0, 0.5]))
    np.testing.assert_allclose(between[:, 1:], (image[:, 1:] + image[:, :-1]) / 2, atol=1e-6)


def test_affine_maps_differ_from_draw_to_draw_and_keep_levels():
    image = (RNG.random((8, 8)) < 0.4).astype(np.uint8)
    source = augmented_source(
        gapjax.data_source(np.broadcast_to(image, (200, 8, 8))), max_shift=0, max_rotation=0.3,
        max_scale=0.2, max_shear=0.2,
    )  # fmt: skip
    draws = np.asarray(_epoch(source, jax.random.key(2)))
    assert draws.dtype == np.uint8 and set(np.unique(draws)) == {0, 1}
    assert len({draw.tobytes() for draw in draws}) > 50
    assert abs(draws.astype(float) - image).mean() < 0.35  # they are near the image
    limits = jax.tree.leaves(source)[1:]
    np.testing.assert_allclose(limits, [0.3, 0.2, 0.2])  # arrays, so that a sweep is one program


def test_noise_takes_pixels_of_other_images_and_keeps_their_mean():
    images = (RNG.random((NUM_MOVED, 30)) < np.linspace(0.05, 0.95, 30)).astype(np.uint8)
    clean = gapjax.data_source(images)
    draws = {rate: np.asarray(_epoch(noisy_source(clean, rate), jax.random.key(3)))
             for rate in (0.0, 0.3, 1.0)}  # fmt: skip
    assert draws[0.3].dtype == np.uint8
    order = lambda x: sorted(row.tobytes() for row in x)
    assert order(draws[0.0]) == order(images)
    share = images.mean(0)
    for rate, drawn in draws.items():
        np.testing.assert_allclose(drawn.mean(0), share, atol=5 * 0.5 * np.sqrt(2 / NUM_MOVED))
        changed = (drawn != draws[0.0]).mean(0)
        expected = rate * 2 * share * (1 - share)
        np.testing.assert_allclose(changed, expected, atol=5 * 0.5 / np.sqrt(NUM_MOVED))


def test_thinned_counts_are_fewer_and_their_library_is_their_sum():
    counts = RNG.poisson(20.0, (NUM_MOVED, 6)).astype(np.uint16)
    cells = models.count_examples(counts, batch=np.arange(NUM_MOVED) % 2)
    thinned = _epoch(thinned_source(gapjax.data_source(cells), 0.4), jax.random.key(4))
    assert thinned.x.dtype == np.uint16
    np.testing.assert_array_equal(thinned.context["library"], thinned.x.sum(1))
    np.testing.assert_array_equal(np.bincount(thinned.context["batch"]), [NUM_MOVED / 2] * 2)
    # E[x'] = .8 E[x], and Var[x'] of a uniform rate adds to that of a Poisson of this mean
    error = np.sqrt((16 + (20 * 0.4) ** 2 / 12) / NUM_MOVED)
    np.testing.assert_allclose(thinned.x.mean(0), 16.0, atol=5 * error)


def test_what_is_no_image_is_refused():
    vectors = gapjax.data_source(np.zeros((4, 7), np.uint8))
    with pytest.raises(ValueError, match=r"an image is \[H, W\] or \[H, W, C\], not \(7,\)"):
        _epoch(augmented_source(vectors), jax.random.key(0))
    with pytest.raises(ValueError, match="max_shift is -1"):
        augmented_source(vectors, max_shift=-1)
