"""Augmentation: shifts and affine maps against NumPy's, shares of each, and noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gapjax
from gapjax.fit.augmentation import affine
from gapjax.fit.sources import draw_examples

N = 4500
RNG = np.random.default_rng(0)


@jax.jit
def _epoch(source, rng_key):
    number = source.num_examples
    keys = jax.random.split(rng_key, number)
    return draw_examples(source, source.begin_epoch(rng_key), keys, jnp.arange(number))


def _shifted(image, rows, columns):
    """By NumPy: zeros come in."""
    padded = np.pad(image, 2)
    height, width = image.shape
    return padded[2 - rows : 2 - rows + height, 2 - columns : 2 - columns + width]


def test_every_shift_comes_as_often_as_the_others():
    image = RNG.integers(1, 200, (4, 5)).astype(np.uint8)
    source = gapjax.augmented_source(gapjax.data_source(np.broadcast_to(image, (N, 4, 5))))
    draws = np.asarray(_epoch(source, jax.random.key(0)))
    assert draws.dtype == np.uint8
    shifts = [_shifted(image, i, j).tobytes() for i in (-1, 0, 1) for j in (-1, 0, 1)]
    counts = [sum(draw.tobytes() == shift for draw in draws) for shift in shifts]
    assert sum(counts) == N
    assert np.all(abs(np.array(counts) - N / 9) < 5 * np.sqrt(N / 9))


def test_without_limits_nothing_is_changed():
    images = RNG.integers(0, 256, (20, 3, 6, 2)).astype(np.uint8)
    source = gapjax.augmented_source(gapjax.data_source(images), max_shift=0)
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
    source = gapjax.augmented_source(
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
    images = (RNG.random((N, 30)) < np.linspace(0.05, 0.95, 30)).astype(np.uint8)
    clean = gapjax.data_source(images)
    draws = {rate: np.asarray(_epoch(gapjax.noisy_source(clean, rate), jax.random.key(3)))
             for rate in (0.0, 0.3, 1.0)}  # fmt: skip
    assert draws[0.3].dtype == np.uint8
    order = lambda x: sorted(row.tobytes() for row in x)
    assert order(draws[0.0]) == order(images)
    share = images.mean(0)
    for rate, drawn in draws.items():
        np.testing.assert_allclose(drawn.mean(0), share, atol=5 * 0.5 * np.sqrt(2 / N))
        changed = (drawn != draws[0.0]).mean(0)
        expected = rate * 2 * share * (1 - share)
        np.testing.assert_allclose(changed, expected, atol=5 * 0.5 / np.sqrt(N))


def test_what_is_no_image_is_refused():
    vectors = gapjax.data_source(np.zeros((4, 7), np.uint8))
    with pytest.raises(ValueError, match=r"an image is \[H, W\] or \[H, W, C\], not \(7,\)"):
        _epoch(gapjax.augmented_source(vectors), jax.random.key(0))
    with pytest.raises(ValueError, match="max_shift is -1"):
        gapjax.augmented_source(vectors, max_shift=-1)
