"""log p(x) of one example by importance sampling; weights are summed in log space."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gapjax.model.bounds import log_joint, sample_and_log_prob
from gapjax.vae import VAE, VAEParams


class LogLikelihood(NamedTuple):
    """Estimates of log p(x), of one example or of N."""

    # [N] nats; the mean of its exponential is p(x), so its own is at most log p(x)
    log_prob: ArrayLike
    ess: ArrayLike  # [N] effective number of samples (or chains) behind it, (sum w)^2 / sum w^2
    # [N] mean acceptance rate of the chains. Without chains it is None of one example, NaN of N
    acceptance: ArrayLike | None


def importance_sampling(
    vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array,
    num_samples: int = 5000, chunk_size: int = 250,
) -> LogLikelihood:  # fmt: skip
    """`gapjax.importance_weighted_bound` of one example with any number of samples.

    `chunk_size`, samples at once, bounds memory and, but for rounding, changes nothing else.
    """
    posterior = vae.encode(params.encoder, x)
    chunk_size = min(chunk_size, num_samples)

    def log_weight(sample_key: jax.Array, number: jax.Array) -> jax.Array:
        z, log_q = sample_and_log_prob(posterior, sample_key)
        value = log_joint(vae, params.decoder, x, z) - log_q
        return jnp.where(number < num_samples, value, -jnp.inf)

    def add(sums: tuple, xs: tuple) -> tuple[tuple, None]:
        log_weights = jax.vmap(log_weight)(*xs)
        return add_weights(sums, log_weights), None

    numbers = jnp.arange(-(-num_samples // chunk_size) * chunk_size)
    keys = jax.vmap(lambda number: jax.random.fold_in(rng_key, number))(numbers)
    chunks = keys.reshape(-1, chunk_size), numbers.reshape(-1, chunk_size)
    (log_sum, log_squares), _ = jax.lax.scan(add, (-jnp.inf, -jnp.inf), chunks)
    ess = jnp.exp(2 * log_sum - log_squares)
    return LogLikelihood(log_sum - math.log(num_samples), ess, None)


def add_weights(sums: tuple, log_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adds weights to running sums of them and of their squares, all in log space."""
    log_sum, log_squares = sums
    return (
        jnp.logaddexp(log_sum, jax.nn.logsumexp(log_weights)),
        jnp.logaddexp(log_squares, jax.nn.logsumexp(2 * log_weights)),
    )
