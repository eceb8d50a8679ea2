"""Sources that are made from another: decoded codes of its images, moved images, noisy ones.

None sees test data, and none needs a label: the decoder is frozen, and says which z belongs to an
image that it was never trained on. The encoder and decoder that they are given stay as they are
during a refit, so a source is the same from its first epoch to its last.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jax.typing import ArrayLike

from gapjax import parallel
from gapjax.fit.sources import OfModel, Plan, Source, as_source
from gapjax.measure.bounds import Images
from gapjax.model.distributions import sample_beside
from gapjax.vae import VAE, VAEParams, sample

_STATIC = {"static": True}
PARTNERS = ("data", "prior")


def reconstruction_source(
    vae: VAE, params: VAEParams, images: Images | Source
) -> "ReconstructionSource":
    """Reconstructions: z ~ q(z given x_0), x ~ p(x given z), with x_0 a training image.

    A step from the training data towards the model's own samples: with the exact posterior in
    place of q it would leave p(x) as it is.

    Args:
      params: encoder and decoder that make the reconstructions.
      images: training images [N, *event], or a source of them, whose number they have.
    """
    return ReconstructionSource(params, as_source(images), parallel.Static({"vae": vae}))


def interpolation_source(
    vae: VAE,
    params: VAEParams,
    images: Images | Source,
    *,
    partner: str = "data",
    max_angle: ArrayLike = math.pi / 4,
) -> "InterpolationSource":
    """Decoded codes between a training image's and another code.

        z = cos(t) z_1 + sin(t) z_2,   t ~ U(0, max_angle),   x ~ p(x given z)

    z_1 ~ q(z given x) of a training image. z_2 is the code of another training image, or a sample
    of the prior. At t = 0 this is a reconstruction. With a standard Gaussian prior and the
    partner "prior" it is a widened posterior for small t and a sample of the model at
    t = pi / 2; where the codes of the data follow the prior, so does z for every t.

    Args:
      params: encoder and decoder that make the images; z is a vector.
      images: training images [N, *event], or a source of them, whose number they have.
      partner: what z_2 is, "data" or "prior".
      max_angle: largest t, in radians; a number, or an array that may be traced.
    """
    if partner not in PARTNERS:
        raise ValueError(f"partner is {partner!r}; it must be one of {', '.join(PARTNERS)}")
    angle = jnp.asarray(max_angle, jnp.float32)
    static = parallel.Static({"vae": vae})
    return InterpolationSource(params, as_source(images), angle, static, partner)


def augmented_source(
    source: Source,
    *,
    max_shift: int = 1,
    max_rotation: ArrayLike = 0.0,
    max_scale: ArrayLike = 0.0,
    max_shear: ArrayLike = 0.0,
) -> "AugmentedSource":
    """Images [H, W] or [H, W, C] of another source, each moved by a random small affine map.

    Every image is rotated by at most so many radians, scaled by at most e^max_scale along either
    axis, sheared, and shifted by whole pixels, each uniformly within its limits. Pixels in between
    are interpolated linearly; what comes in from outside is 0. Integer levels are rounded, so
    binary images stay binary. With the shift alone no pixel is interpolated.
    """
    if max_shift < 0:
        raise ValueError(f"max_shift is {max_shift}; it must be at least 0")
    rotation, scale, shear = (
        jnp.asarray(limit, jnp.float32) for limit in (max_rotation, max_scale, max_shear)
    )
    return AugmentedSource(source, rotation, scale, shear, max_shift=max_shift)


def noisy_source(source: Source, rate: ArrayLike) -> "NoisySource":
    """Images of another source, some of whose pixels are those of another of its images.

    Each pixel is replaced with probability `rate`, which may be traced, by the pixel at the same
    place of a second image, drawn anew. So every pixel keeps its distribution, and only what holds
    between pixels is disturbed. On binary images it flips pixels, the more often the more they
    differ between images.
    """
    return NoisySource(source, jnp.asarray(rate, jnp.float32))


class DerivedSource:
    """What sources made from another one share: its number of examples, and its plan."""

    source: Source

    @property
    def num_examples(self) -> int:
        """Those of the other source."""
        return self.source.num_examples

    def begin_epoch(self, rng_key: jax.Array) -> Plan:
        """The plan of the other source."""
        return self.source.begin_epoch(rng_key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReconstructionSource(DerivedSource, OfModel):
    """See `reconstruction_source`. The plan is that of the source of images."""

    params: VAEParams
    source: Source
    static: parallel.Static = dataclasses.field(metadata=_STATIC)

    def draw(self, plan: Plan, rng_key: jax.Array, position: jax.Array) -> jax.Array:
        """An image, encoded and decoded."""
        source_key, chain_key = jax.random.split(rng_key)
        x = self.source.draw(plan, source_key, position)
        latent_key, pixel_key = jax.random.split(jax.random.split(chain_key, 1)[0])
        z = sample(self.vae.encode(self.params.encoder, x), latent_key)
        return sample_beside(self.vae.decode(self.params.decoder, z), pixel_key, x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InterpolationSource(DerivedSource, OfModel):
    """See `interpolation_source`. The plan is that of the source of images."""

    params: VAEParams
    source: Source
    max_angle: jax.Array
    static: parallel.Static = dataclasses.field(metadata=_STATIC)
    partner: str = dataclasses.field(metadata=_STATIC)

    def draw(self, plan: Plan, rng_key: jax.Array, position: jax.Array) -> jax.Array:
        """A decoded code between two."""
        first_key, second_key, angle_key, pixel_key = jax.random.split(rng_key, 4)
        z_1, dtype = self._code(plan, first_key, position)
        if self.partner == "prior":
            z_2 = sample(self.vae.prior, second_key)
        else:
            other_key, second_key = jax.random.split(second_key)
            other = jax.random.randint(other_key, (), 0, self.num_examples)
            z_2, _ = self._code(plan, second_key, other)
        angle = self.max_angle * jax.random.uniform(angle_key)
        z = jnp.cos(angle) * z_1 + jnp.sin(angle) * z_2
        return sample_beside(self.vae.decode(self.params.decoder, z), pixel_key, dtype)

    def _code(
        self, plan: Plan, rng_key: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, jnp.dtype]:
        """A code z ~ q(z given x) of the image at a position, and the dtype of images."""
        source_key, latent_key = jax.random.split(rng_key)
        x = self.source.draw(plan, source_key, position)
        return sample(self.vae.encode(self.params.encoder, x), latent_key), x.dtype


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
    """One image [H, W] or [H, W, C], mapped about its centre c by A [2, 2] and moved by s [2].

    Output pixel u is the input's at A (u - c - s) + c, interpolated linearly; 0 where it ends.
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
