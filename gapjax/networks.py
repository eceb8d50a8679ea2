"""Linen modules of the paper's model: feed-forward encoder and decoder, one example each."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

# U(-1/sqrt(in), 1/sqrt(in)): PyTorch's default, and so the authors'. It is not a detail: from
# Linen's wider default the test BPD turns upwards about a hundred epochs earlier on digits.
_KERNEL_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class MLP(nn.Module):
    """ReLU layers of `hidden_sizes`, then one linear layer of `out_size`: [in] -> [out_size]."""

    hidden_sizes: Sequence[int]
    out_size: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps inputs [in] to outputs [out_size]."""
        hidden = inputs
        for size in self.hidden_sizes:
            hidden = nn.relu(nn.Dense(size, kernel_init=_KERNEL_INIT)(hidden))
        return nn.Dense(self.out_size, kernel_init=_KERNEL_INIT)(hidden)


class MLPEncoder(nn.Module):
    """x [*event] in [0, 1] -> (loc [Z], scale [Z]) of a diagonal Gaussian q(z given x).

    The scale is softplus of a linear output, as in the authors' code, plus 1e-6, so that its
    logarithm and the gradient of it are finite for every float32 output.
    """

    hidden_sizes: Sequence[int]
    latent_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps x [*event] to (loc [Z], scale [Z])."""
        out = MLP(self.hidden_sizes, 2 * self.latent_dim)(x.reshape(-1))
        loc, raw_scale = jnp.split(out, 2)
        return loc, nn.softplus(raw_scale) + 1e-6


class MLPDecoder(nn.Module):
    """z [Z] -> outputs [num_outputs, *event], one slice for each parameter of the likelihood."""

    hidden_sizes: Sequence[int]
    event_shape: Sequence[int]
    num_outputs: int

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Maps z [Z] to outputs [num_outputs, *event]."""
        out = MLP(self.hidden_sizes, self.num_outputs * math.prod(self.event_shape))(z)
        return out.reshape(self.num_outputs, *self.event_shape)
