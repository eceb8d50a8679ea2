"""Sources of decoded codes, against the moments that a linear Gaussian model gives them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gapjax
from gapjax.fit.sources import draw_examples

N = 20_000
SIGMA = 0.5  # of the pixels, in `linear`


@jax.jit
def _epoch(source, rng_key):
    keys = jax.random.split(rng_key, N)
    return draw_examples(source, source.begin_epoch(rng_key), keys, jnp.arange(N))


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


@pytest.mark.parametrize("num_steps", [1, 3])
def test_reconstructions_have_the_moments_of_the_chain(linear, image, num_steps):
    matrix, offset, variance = _code(linear)
    source = gapjax.reconstruction_source(linear.vae, linear.wrong, image, num_steps)
    mean, covariance = linear.images[0].astype(np.float64), np.zeros((6, 6))
    for _ in range(num_steps):
        code = matrix @ mean + offset
        second = matrix @ covariance @ matrix.T + np.diag(variance) + np.outer(code, code)
        mean, covariance = _pixels(linear, code, second)
    _assert_moments(_epoch(source, jax.random.key(0)), mean, covariance)


def test_with_the_exact_posterior_the_chain_keeps_the_model(linear):
    model = gapjax.model_source(linear.vae, linear.exact.decoder, N)
    source = gapjax.reconstruction_source(linear.vae, linear.exact, model)
    bias = np.asarray(linear.exact.decoder["bias"], np.float64)
    draws = _epoch(source, jax.random.key(1))
    _assert_moments(draws, *_pixels(linear, np.zeros(2), np.eye(2)))
    assert np.all(np.asarray(draws).std(0) > 0.4) and bias.shape == (6,)


@pytest.mark.parametrize("partner", ["data", "prior"])
@pytest.mark.parametrize("angle", [0.0, 1.2])
def test_interpolations_have_the_moments_of_their_codes(linear, image, partner, angle):
    matrix, offset, variance = _code(linear)
    source = gapjax.interpolation_source(
        linear.vae, linear.wrong, image, partner=partner, max_angle=angle
    )
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
    source = gapjax.interpolation_source(linear.vae, linear.exact, images, max_angle=np.pi / 2)
    draws = np.asarray(_epoch(source, jax.random.key(3)))
    gain = np.asarray(linear.exact.encoder["weight"] @ np.full(6, 40.0))
    along = draws @ np.linalg.pinv(np.asarray(linear.exact.decoder["weight"])).T @ gain
    far = np.unique(np.round(along / (gain @ gain), 1))
    # Between two images that are far from 0, cos + sin rises to 1.41; with one of them it is <= 1.
    assert far.max() > 1.3 and far.min() < 0.1
    alone = np.mean(along / (gain @ gain) > 1.1)
    assert 0.1 < alone < 0.25  # a quarter of the pairs are both far, most of their t beyond 1.1


@pytest.mark.parametrize("make", [
    gapjax.reconstruction_source,
    gapjax.interpolation_source,
    functools.partial(gapjax.interpolation_source, partner="prior"),
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


def test_what_cannot_be_made_is_refused(small):
    with pytest.raises(ValueError, match="num_steps is 0"):
        gapjax.reconstruction_source(small.vae, small.params, small.train_images, 0)
    with pytest.raises(ValueError, match="partner is 'model'; it must be one of data, prior"):
        gapjax.interpolation_source(small.vae, small.params, small.train_images, partner="model")
    with pytest.raises(ValueError, match="images is empty"):
        gapjax.reconstruction_source(small.vae, small.params, small.train_images[:0])
