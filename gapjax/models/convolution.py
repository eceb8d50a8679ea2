"""A convolutional VAE of images, with no state beside its parameters."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from gapjax.model.distributions import DiscretizedLogistic
from gapjax.model.mlp import UNIFORM_WEIGHT, StandardNormal, min_log_scale
from gapjax.model.networks import InitBoth, apply_module, init_module
from gapjax.models.colour import ColourLogistic
from gapjax.vae import VAE, Distribution, Params

LIKELIHOODS = ("bernoulli", "discretized_logistic", "colour")
_GROUPS = 8  # of channels, normalised together over one image


def conv_vae(
    event_shape: tuple[int, ...],
    likelihood: str = "bernoulli",
    *,
    latent_dim: int = 32,
    num_channels: tuple[int, ...] = (32, 64),
    levels: int = 256,
    uniform_weight: float = UNIFORM_WEIGHT,
) -> VAE:
    """Convolutions of stride 2 down to a vector and back, normalised over groups of channels.

    Group normalisation sees one image alone, so that the functions stay pure and an image's q does
    not depend on the batch that it is in.

    Args:
      event_shape: [H, W] or [H, W, C], of sides that 2^len(num_channels) divides.
      likelihood: "bernoulli", "discretized_logistic" of every entry, or "colour", where a channel
        sees those before it; see `ColourLogistic`.
      latent_dim: Z, of a prior N(0, I) and a diagonal Gaussian posterior.
      num_channels: of each convolution of the encoder, multiples of 8; the decoder has them in
        reverse.
      levels: see `mlp_vae`.
      uniform_weight: see `mlp_vae`.

    References:
      Wu, He, Group Normalization, 2018.
    """
    if likelihood not in LIKELIHOODS:
        raise ValueError(
            f"likelihood is {likelihood!r}; it must be one of {', '.join(LIKELIHOODS)}"
        )
    factor = 2 ** len(num_channels)
    if len(event_shape) not in (2, 3) or any(side % factor for side in event_shape[:2]):
        raise ValueError(
            f"event_shape is {event_shape}; [H, W] or [H, W, C] with sides divisible by {factor} "
            "is needed"
        )
    if any(size < 1 or size % _GROUPS for size in num_channels) or latent_dim < 1:
        raise ValueError(
            f"latent_dim is {latent_dim} and num_channels {num_channels}; the channels must be "
            f"multiples of {_GROUPS}, and all positive"
        )
    if likelihood == "colour" and len(event_shape) != 3:
        raise ValueError(f"event_shape is {event_shape}; colour needs [H, W, C]")
    levels = 2 if likelihood == "bernoulli" else levels
    sizes = tuple(event_shape), latent_dim, tuple(num_channels), levels
    encode, decode = _Encode(*sizes), _Decode(*sizes, likelihood, uniform_weight)
    return VAE(InitBoth(encode, decode), encode, decode, StandardNormal(latent_dim))


class _Down(nn.Module):
    """x [H, W, C] in [0, 1] -> (loc [Z], scale [Z])."""

    num_channels: tuple[int, ...]
    latent_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = 2 * x[None] - 1
        for size in self.num_channels:
            hidden = nn.Conv(size, (4, 4), (2, 2))(hidden)
            hidden = nn.silu(nn.GroupNorm(_GROUPS)(hidden))
        loc, raw_scale = jnp.split(nn.Dense(2 * self.latent_dim)(hidden.ravel()), 2)
        return loc, nn.softplus(raw_scale) + 1e-6


class _Up(nn.Module):
    """z [Z] -> [H, W, outputs]."""

    num_channels: tuple[int, ...]
    smallest: tuple[int, int]
    num_outputs: int

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        sizes = *self.num_channels[-2::-1], self.num_channels[0]
        shape = 1, *self.smallest, self.num_channels[-1]
        hidden = nn.silu(nn.Dense(math.prod(shape))(z)).reshape(shape)
        for size in sizes:
            hidden = nn.ConvTranspose(size, (4, 4), (2, 2))(hidden)
            hidden = nn.silu(nn.GroupNorm(_GROUPS)(hidden))
        return nn.Conv(self.num_outputs, (3, 3))(hidden)[0]


@dataclasses.dataclass(frozen=True)
class _Sizes:
    event_shape: tuple[int, ...]
    latent_dim: int
    num_channels: tuple[int, ...]
    levels: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[H, W, C], C of 1 where an image has no channels."""
        height, width, *channels = self.event_shape
        return height, width, channels[0] if channels else 1


class _Encode(_Sizes):
    """q(z given x)."""

    def init(self, rng_key: jax.Array) -> Params:
        return init_module(self._module(), rng_key, jnp.zeros(self.image_shape))

    def __call__(self, params: Params, x: jax.Array) -> Distribution:
        x = x.reshape(self.image_shape).astype(jnp.float32) / (self.levels - 1)
        return dist.Normal(*apply_module(self._module(), params, x)).to_event(1)

    def _module(self) -> _Down:
        return _Down(self.num_channels, self.latent_dim)


@dataclasses.dataclass(frozen=True)
class _Decode(_Sizes):
    """p(x given z)."""

    likelihood: str
    uniform_weight: float

    def init(self, rng_key: jax.Array) -> Params:
        return init_module(self._module(), rng_key, jnp.zeros(self.latent_dim))

    def __call__(self, params: Params, z: jax.Array) -> Any:
        channels = self.image_shape[-1]
        out = apply_module(self._module(), params, z)
        shape = self.event_shape
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=out.reshape(shape)).to_event(len(shape))
        loc, log_scale, coefficients = jnp.split(out, (channels, 2 * channels), -1)
        scale = jnp.exp(jnp.maximum(log_scale - 2.0, min_log_scale(self.levels)))
        loc += 0.5
        options: Any = {"uniform_weight": self.uniform_weight}
        if self.likelihood == "colour":
            pixels = ColourLogistic(loc, scale, coefficients, self.levels, **options)
            return pixels.to_event(2)
        loc, scale = loc.reshape(shape), scale.reshape(shape)
        return DiscretizedLogistic(loc, scale, self.levels, **options).to_event(len(shape))

    def _module(self) -> _Up:
        height, width, channels = self.image_shape
        factor = 2 ** len(self.num_channels)
        number = {"bernoulli": 1, "discretized_logistic": 2}.get(self.likelihood)
        outputs = number * channels if number else 2 * channels + channels * (channels - 1) // 2
        return _Up(self.num_channels, (height // factor, width // factor), outputs)
