"""Sources that change the images of another: small shifts and affine maps, noise in the pixels.

They widen the training data to images near it, without test data. A refit on them needs no label:
the decoder is frozen, and says which z belongs to an image that it was never trained on.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jax.typing import ArrayLike

from gapjax.fit.sources import DerivedSource, Plan, Source

_STATIC = {"static": True}


def augmented_source(
    source: Source,
    *,
    max_shift: int = 1,
    max_rotation: ArrayLike = 0.0,
    max_scale: ArrayLike = 0.0,
    max_shear: ArrayLike = 0.0,
) -> "AugmentedSource":
    """Images of another source, each moved by a random small affine map.

    Every image is rotated, scaled and sheared about its centre, and shifted by whole pixels, each
    uniformly within its limits. Pixels in between are interpolated linearly; what comes in from
    outside is 0. Integer levels are rounded, so binary images stay binary. With the shift alone
    no pixel is interpolated.

    Args:
      source: of images [H, W] or [H, W, C].
      max_shift: most pixels in either direction.
      max_rotation: most radians in either direction.
      max_scale: largest |log| of the scale of either axis.
      max_shear: largest shear in either direction.

    Returns:
      A source with the number of examples and the dtype of `source`.

    Raises:
      ValueError: `max_shift` is negative.
    """
    if max_shift < 0:
        raise ValueError(f"max_shift is {max_shift}; it must be at least 0")
    rotation, scale, shear = (
        jnp.asarray(limit, jnp.float32) for limit in (max_rotation, max_scale, max_shear)
    )
    return AugmentedSource(source, rotation, scale, shear, max_shift=max_shift)


def noisy_source(source: Source, rate: ArrayLike) -> "NoisySource":
    """Images of another source, some of whose pixels are those of another of its images.

    Each pixel is replaced with probability `rate` by the pixel at the same place of a second image,
    drawn anew. So every pixel keeps its distribution, and only what holds between pixels is
    disturbed. On binary images it flips pixels, the more often the more they differ between
    images.

    Args:
      source: of images.
      rate: probability for each pixel, in [0, 1]; it may be traced.

    Returns:
      A source with the number of examples and the dtype of `source`.
    """
    return NoisySource(source, jnp.asarray(rate, jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AugmentedSource(DerivedSource):
    """See `augmented_source`. The plan is that of the source."""

    source: Source
    max_rotation: jax.Array
    max_scale: jax.Array
    max_shear: jax.Array
    max_shift: int = dataclasses.field(metadata=_STATIC)

    def draw(self, plan: Plan, rng_key: jax.Array, position: jax.Array) -> jax.Array:
        """One image of the source, moved."""
        source_key, shift_key, map_key = jax.random.split(rng_key, 3)
        x = self.source.draw(plan, source_key, position)
        most = self.max_shift
        shift = jax.random.randint(shift_key, (2,), -most, most + 1).astype(jnp.float32)
        return affine(x, _random_matrix(self, map_key), shift)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoisySource(DerivedSource):
    """See `noisy_source`. The plan is that of the source."""

    source: Source
    rate: jax.Array

    def draw(self, plan: Plan, rng_key: jax.Array, position: jax.Array) -> jax.Array:
        """One image of the source, with pixels of another."""
        first_key, second_key, other_key, mask_key = jax.random.split(rng_key, 4)
        x = self.source.draw(plan, first_key, position)
        other = jax.random.randint(other_key, (), 0, self.num_examples)
        replaced = jax.random.bernoulli(mask_key, self.rate, x.shape)
        return jnp.where(replaced, self.source.draw(plan, second_key, other), x)


def affine(x: jax.Array, matrix: jax.Array, shift: jax.Array) -> jax.Array:
    """One image, mapped about its centre: output pixel u is the input's at A (u - c - s) + c.

    Args:
      x: [H, W] or [H, W, C].
      matrix: A [2, 2].
      shift: s [2], in pixels: rows, columns.

    Returns:
      The image in its shape and dtype, interpolated linearly; 0 where the input ends.

    Raises:
      ValueError: x is no image.
    """
    if x.ndim not in (2, 3):
        raise ValueError(f"an image is [H, W] or [H, W, C], not {x.shape}")
    height, width = x.shape[:2]
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    places = jnp.stack(jnp.mgrid[:height, :width]).astype(jnp.float32)
    places = jnp.einsum("ij,jhw->ihw", matrix, places - centre - shift[:, None, None]) + centre

    def moved(channel: jax.Array) -> jax.Array:
        return map_coordinates(channel.astype(jnp.float32), list(places), order=1)

    out = moved(x) if x.ndim == 2 else jax.vmap(moved, in_axes=-1, out_axes=-1)(x)
    return (out if jnp.issubdtype(x.dtype, jnp.floating) else jnp.round(out)).astype(x.dtype)


def _random_matrix(limits: AugmentedSource, rng_key: jax.Array) -> jax.Array:
    """A rotation times a scaling times a shear [2, 2], each uniform within its limits."""
    angle, shear, *logs = jax.random.uniform(rng_key, (4,), minval=-1.0, maxval=1.0)
    angle, shear = limits.max_rotation * angle, limits.max_shear * shear
    turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    scale = jnp.exp(limits.max_scale * jnp.stack(logs))
    return turn @ jnp.diag(scale) @ jnp.array([[1.0, 0.0], [0.0, 1.0]]).at[0, 1].set(shear)
