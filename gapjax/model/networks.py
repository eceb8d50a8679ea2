"""Linen modules of one example, as pure functions: feed-forward networks, refinement, a flow."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gapjax.vae import Params, VAEParams

# U(-1/sqrt(in), 1/sqrt(in)): PyTorch's default, and so the authors'. It is not a detail: from
# Linen's wider default the test BPD turns upwards about a hundred epochs earlier on digits.
_KERNEL_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class MLP(nn.Module):
    """ReLU layers of `hidden_sizes`, then one linear layer of `out_size`: [in] -> [out_size]."""

    hidden_sizes: Sequence[int]
    out_size: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        hidden = inputs
        for size in self.hidden_sizes:
            hidden = nn.relu(nn.Dense(size, kernel_init=_KERNEL_INIT)(hidden))
        return nn.Dense(self.out_size, kernel_init=_KERNEL_INIT)(hidden)


class MLPEncoder(nn.Module):
    """x [*event] in [0, 1] -> (loc [Z], scale [Z], rest [num_more]) of q(z given x).

    The scale is softplus of a linear output, as in the authors' code, plus 1e-6, so that its
    logarithm has finite gradients for every float32 output. The rest is for a richer family.
    """

    hidden_sizes: Sequence[int]
    latent_dim: int
    num_more: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        size = self.latent_dim
        out = MLP(self.hidden_sizes, 2 * size + self.num_more)(x.reshape(-1))
        loc, raw_scale, rest = jnp.split(out, (size, 2 * size))
        return loc, nn.softplus(raw_scale) + 1e-6, rest


class Refinement(nn.Module):
    """inputs [I] -> (shift [Z], growth [Z]): a step of learned refinement.

    ReLU layers, then a linear layer that sees the last of them and the inputs. It starts at zero.
    """

    hidden_sizes: Sequence[int]
    latent_dim: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = inputs
        for size in self.hidden_sizes:
            hidden = nn.relu(nn.Dense(size, kernel_init=_KERNEL_INIT)(hidden))
        last = nn.Dense(2 * self.latent_dim, kernel_init=nn.initializers.zeros)
        shift, growth = jnp.split(last(jnp.concatenate([inputs, hidden])), 2)
        return shift, growth


class Autoregressive(nn.Module):
    """z [Z], context [H] -> (shift [Z], log_scale [Z]), entry i of which sees z_j for j < i alone.

    One hidden layer of H units; both outputs start at zero, and so the flow as the identity.
    """

    hidden_size: int

    @nn.compact
    def __call__(self, z: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        latent_dim = z.shape[-1]
        places = jnp.arange(1, latent_dim + 1)
        degrees = jnp.arange(self.hidden_size) % max(1, latent_dim - 1) + 1
        seen = places[:, None] <= degrees[None, :]
        before = degrees[:, None] < jnp.tile(places, 2)[None, :]
        inner = self.param("inner", _KERNEL_INIT, seen.shape)
        outer = self.param("outer", nn.initializers.zeros, before.shape)
        bias = self.param("bias", nn.initializers.zeros, (2 * latent_dim,))
        hidden = nn.relu(z @ jnp.where(seen, inner, 0.0) + context)
        shift, log_scale = jnp.split(hidden @ jnp.where(before, outer, 0.0) + bias, 2)
        return shift, log_scale


class MLPDecoder(nn.Module):
    """z [Z] -> outputs [num_outputs, *event], one slice for each parameter of the likelihood."""

    hidden_sizes: Sequence[int]
    event_shape: Sequence[int]
    num_outputs: int

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        out = MLP(self.hidden_sizes, self.num_outputs * math.prod(self.event_shape))(z)
        return out.reshape(self.num_outputs, *self.event_shape)


def init_module(module: nn.Module, rng_key: jax.Array, *inputs: jax.Array) -> Params:
    """Linen's `init`, the parameters alone."""
    return module.init(rng_key, *inputs)["params"]


def apply_module(module: nn.Module, params: Params, *inputs: jax.Array) -> Any:
    """Linen's `apply` as a function of the parameters alone."""
    return module.apply({"params": params}, *inputs)


@dataclasses.dataclass(frozen=True)
class InitBoth:
    """The `init` of a model whose encoder and decoder have one each."""

    encoder: Any
    decoder: Any

    def __call__(self, rng_key: jax.Array) -> VAEParams:
        encoder_key, decoder_key = jax.random.split(rng_key)
        return VAEParams(self.encoder.init(encoder_key), self.decoder.init(decoder_key))
