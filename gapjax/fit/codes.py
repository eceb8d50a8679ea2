"""Sources of x between the training data and the model: decoded codes of training images.

    x ~ p(x given z),   z near the codes of training images

All use the encoder and the decoder that they are given, which a refit does not change: a source
is the same from its first epoch to its last. None sees test data.
"""

import dataclasses
import math
from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gapjax.fit.sources import DerivedSource, Plan, Source, data_source
from gapjax.measure.per_image import Images
from gapjax.model.vae import VAE, VAEParams, sample

_STATIC = {"static": True}
PARTNERS = ("data", "prior")


def reconstruction_source(
    vae: VAE, params: VAEParams, images: Images | Source, num_steps: int = 1
) -> "ReconstructionSource":
    """Reconstructions: z ~ q(z given x_0), x ~ p(x given z), with x_0 a training image.

    With more steps the reconstruction is encoded and decoded again. The chain moves from the
    training data towards the model's own samples: with the exact posterior in place of q, every
    step would leave p(x) as it is.

    Args:
      vae: the model.
      params: encoder and decoder that make the reconstructions.
      images: training images [N, *event], or a source of them.
      num_steps: times that x is encoded and decoded.

    Returns:
      A source with as many examples per epoch as there are images, in their dtype.

    Raises:
      ValueError: no images, or `num_steps` is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a reconstruction needs at least 1")
    return ReconstructionSource(params, _as_source(images), vae, num_steps)


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
      vae: the model; z is a vector.
      params: encoder and decoder that make the images.
      images: training images [N, *event], or a source of them.
      partner: what z_2 is, "data" or "prior".
      max_angle: largest t, in radians; a number, or an array that may be traced.

    Returns:
      A source with as many examples per epoch as there are images, in their dtype.

    Raises:
      ValueError: no images, or an unknown partner.
    """
    if partner not in PARTNERS:
        raise ValueError(f"partner is {partner!r}; it must be one of {', '.join(PARTNERS)}")
    angle = jnp.asarray(max_angle, jnp.float32)
    return InterpolationSource(params, _as_source(images), angle, vae, partner)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReconstructionSource(DerivedSource):
    """See `reconstruction_source`. The plan is that of the source of images."""

    params: VAEParams
    source: Source
    vae: VAE = dataclasses.field(metadata=_STATIC)
    num_steps: int = dataclasses.field(default=1, metadata=_STATIC)

    def draw(self, plan: Plan, rng_key: jax.Array, position: jax.Array) -> jax.Array:
        """The end of a chain that starts at one image."""
        source_key, chain_key = jax.random.split(rng_key)
        first = self.source.draw(plan, source_key, position)

        def step(x: jax.Array, step_key: jax.Array) -> tuple[jax.Array, None]:
            latent_key, pixel_key = jax.random.split(step_key)
            z = sample(self.vae.encode(self.params.encoder, x), latent_key)
            return _decoded(self.vae, self.params, z, pixel_key, x.dtype), None

        return jax.lax.scan(step, first, jax.random.split(chain_key, self.num_steps))[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InterpolationSource(DerivedSource):
    """See `interpolation_source`. The plan is that of the source of images."""

    params: VAEParams
    source: Source
    max_angle: jax.Array
    vae: VAE = dataclasses.field(metadata=_STATIC)
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
        return _decoded(self.vae, self.params, z, pixel_key, dtype)

    def _code(
        self, plan: Plan, rng_key: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, jnp.dtype]:
        """A code z ~ q(z given x) of the image at a position, and the dtype of images."""
        source_key, latent_key = jax.random.split(rng_key)
        x = self.source.draw(plan, source_key, position)
        return sample(self.vae.encode(self.params.encoder, x), latent_key), x.dtype


def _decoded(
    vae: VAE, params: VAEParams, z: jax.Array, rng_key: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """A sample x ~ p(x given z), in the dtype of the images."""
    return sample(vae.decode(params.decoder, z), rng_key).astype(dtype)


def _as_source(images: Images | Source) -> Source:
    if hasattr(images, "begin_epoch"):
        return cast(Source, images)
    return data_source(cast(Images, images))
