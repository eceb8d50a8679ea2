"""Why a bound of one example is not finite. It is asked only where one is not."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gapjax.model.checks import type_name
from gapjax.model.vae import VAE, VAEParams, log_prob, observed, sample


def explain(
    vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array, num_samples: int = 1
) -> str | None:
    """Why a bound of one example is not finite, in words.

    Args:
      vae: the model.
      params: its parameters.
      rng_key: with which the bound was computed.
      x: the example [*event].
      num_samples: S, posterior samples of the bound.

    Returns:
      The first of its parts that is not finite; None if all are.
    """
    for name in ("encoder", "decoder"):
        if not _no_nan(getattr(params, name)):
            return f"params.{name} has a NaN"
    if jnp.issubdtype(x.dtype, jnp.floating) and not bool(jnp.isfinite(x).all()):
        return "x has a value that is not finite"
    # NumPyro raises ValueError for the parameters that it takes for invalid, such as a NaN.
    try:
        posterior = vae.encode(params.encoder, x)
    except ValueError as error:
        return f"encode raises: {error}"
    if not _no_nan(posterior):
        return f"encode returns a {type_name(posterior)} whose parameters are NaN"
    # One sample takes the key itself, see `bounds`.
    keys = [rng_key] if num_samples == 1 else jax.random.split(rng_key, num_samples)
    for key in keys:
        z = sample(posterior, key)
        if not bool(jnp.isfinite(z).all()):
            return f"encode returns a {type_name(posterior)} whose samples are not finite"
        try:
            likelihood = vae.decode(params.decoder, z)
        except ValueError as error:
            return f"decode raises: {error}"
        if not _no_nan(likelihood):
            return f"decode returns a {type_name(likelihood)} whose parameters are NaN"
        if not bool(jnp.isfinite(log_prob(likelihood, observed(x)))):
            return _explain_likelihood(likelihood, observed(x))
        for role, distribution in (("prior", vae.prior), ("posterior", posterior)):
            value = log_prob(distribution, z)
            if not bool(jnp.isfinite(value)):
                return f"log_prob of the {role}, a {type_name(distribution)}, is {float(value)}"
    return None


def _no_nan(tree: Any) -> bool:
    """Whether no float array of a tree has a NaN. Infinite parameters may be meant."""
    return not any(bool(jnp.isnan(leaf).any()) for leaf in _floats(tree))


def _floats(tree: Any) -> Iterator[jax.Array]:
    for leaf in jax.tree.leaves(tree):
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating):
            yield leaf


def _explain_likelihood(likelihood: Any, x: jax.Array) -> str:
    """Names the first pixel whose log-probability is not finite, where there is one for each."""
    single = likelihood
    while type(single).__name__ == "Independent":
        single = single.base_dist
    values = np.asarray(log_prob(single, x))
    if single is likelihood or values.shape != x.shape:
        return f"log p(x given z) is {float(log_prob(likelihood, x))}: {type_name(likelihood)}"
    place = np.unravel_index(int(np.argmin(np.isfinite(values))), x.shape)
    where = tuple(map(int, place))
    return (
        f"log p(x given z) is {values[place]} at {where}, where x is {np.asarray(x)[place]}: "
        f"{type_name(likelihood)} has no finite density there"
    )
