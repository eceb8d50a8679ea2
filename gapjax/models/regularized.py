"""An encoder whose weights are bounded, whatever its architecture."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gapjax.vae import VAE, Distribution, Params


def with_weight_norm(vae: VAE, max_norm: float) -> VAE:
    """The same model, whose encoder's weights have bounded norms: a smoother encoder.

        w' = w min(1, c / ||w||)   for the weights w into each unit

    That is every slice of an array of two axes or more along its last axis, so the matrices and
    kernels of Flax; biases are as they are. It serves training and every refit. In the reference
    the norms are fixed by weight normalisation instead of bounded.

    Args:
      max_norm: c. The weights of `mlp_vae` start with norms of about 0.6.

    References:
      Shu, Bui, Zhao, Kochenderfer, Ermon, Amortized Inference Regularization, 2018.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; it must be positive")
    return vae._replace(encode=_Encode(vae.encode, float(max_norm)))


@dataclasses.dataclass(frozen=True)
class _Encode:
    encode: Any
    max_norm: float

    def __call__(self, params: Params, x: Any, *context: Any) -> Distribution:
        return self.encode(jax.tree.map(self._bounded, params), x, *context)

    def _bounded(self, weights: jax.Array) -> jax.Array:
        if jnp.ndim(weights) < 2:
            return weights
        axes = tuple(range(weights.ndim - 1))
        squares = jnp.square(weights).sum(axes, keepdims=True)
        # of the square, whose gradient at 0 is finite
        return weights * jnp.sqrt(self.max_norm**2 / jnp.maximum(squares, self.max_norm**2))
