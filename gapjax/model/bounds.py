"""Bounds of the log-likelihood of one example, in nats; and their unit.

Letters: x [*event] one example, z [Z] one latent, S posterior samples.
"""

import math
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions.kl import kl_divergence

from gapjax.model.chain import Chain, is_alike
from gapjax.model.checks import check_positive, check_scalar, one_log_prob
from gapjax.model.distributions import innermost, type_name
from gapjax.vae import (
    VAE,
    Distribution,
    Params,
    VAEParams,
    library_promotion,
    log_prob,
    observed,
    prior_of,
    sample,
)

Nats = TypeVar("Nats", float, jax.Array, np.ndarray)


def elbo(
    vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array, num_samples: int = 1
) -> jax.Array:
    """Evidence lower bound of one example (eq. 4), in nats; higher is better.

        ELBO(x, theta, phi) = E_q[log p(x given z)] - KL(q(z given x) || p(z))

    KL is analytic where NumPyro has it for this pair, and estimated on the same samples of z
    where it has not. Of two `Chain` with links of the same names it is the sum of the KL of each
    link given the samples of those before it, analytic where NumPyro has that.

    It is estimated without bias as the mean over `num_samples` S of z.
    """
    posterior, prior = vae.encode(params.encoder, x), prior_of(vae, params.decoder)
    kl = _analytic_kl(posterior, prior)

    def bound(sample_key: jax.Array) -> jax.Array:
        if kl is not None:
            return _log_likelihood(vae, params.decoder, x, sample(posterior, sample_key))
        if is_alike(posterior, prior):
            z = sample(posterior, sample_key)
            return _log_likelihood(vae, params.decoder, x, z) - _kl_by_link(posterior, prior, z)
        z, log_q = sample_and_log_prob(posterior, sample_key)
        return log_joint(vae, params.decoder, x, z) - log_q

    if num_samples == 1:  # no axis of one: a CPU would transpose for it in the gradient
        mean = bound(rng_key)
    else:
        mean = jax.vmap(bound)(_sample_keys(rng_key, num_samples)).mean()
    return mean - (0.0 if kl is None else kl)


def bound_at(
    vae: VAE, decoder_params: Params, x: jax.Array, posterior: Distribution, latents: jax.Array
) -> jax.Array:
    """The ELBO of one example [*event] with its expectation taken over given latents [S, Z]."""
    mean = lambda function: jax.vmap(function)(latents).mean()
    prior = prior_of(vae, decoder_params)
    kl = _analytic_kl(posterior, prior)
    if kl is None:
        kl = mean(lambda z: log_prob(posterior, z) - log_prob(prior, z))
    return mean(lambda z: _log_likelihood(vae, decoder_params, x, z)) - kl


def importance_weighted_bound(
    vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array, num_samples: int
) -> jax.Array:
    """Importance-weighted bound of one example, in nats; rises to log p(x) with `num_samples`.

        log (1/S) sum_s p(x, z_s) / q(z_s given x),   z_s ~ q(z given x)

    With S = 1 its mean is the ELBO.

    References:
      Burda, Grosse, Salakhutdinov, Importance Weighted Autoencoders, 2016.
    """
    posterior = vae.encode(params.encoder, x)

    def log_weight(sample_key: jax.Array) -> jax.Array:
        z, log_q = sample_and_log_prob(posterior, sample_key)
        return log_joint(vae, params.decoder, x, z) - log_q

    log_weights = jax.vmap(log_weight)(_sample_keys(rng_key, num_samples))
    return jax.nn.logsumexp(log_weights) - math.log(num_samples)


def log_joint(vae: VAE, decoder_params: Params, x: jax.Array, z: Any) -> jax.Array:
    """Log p(x, z) = log p(x given z) + log p(z) of one example and one latent, in nats."""
    prior = prior_of(vae, decoder_params)
    return _log_likelihood(vae, decoder_params, x, z) + one_log_prob("prior", prior, z)


def divergence(first: Distribution, second: Distribution, rng_key: jax.Array) -> jax.Array:
    """KL(first || second) in nats: analytic where NumPyro has it, else at one sample of `first`."""
    kl = _analytic_kl(first, second)
    if kl is not None:
        return kl
    if is_alike(first, second):
        return _kl_by_link(first, second, sample(first, rng_key))
    z, log_first = sample_and_log_prob(first, rng_key)
    return log_first - one_log_prob("posterior", second, z)


def divergences(first: Distribution, second: Distribution) -> jax.Array:
    """KL(first || second) of each latent [Z] in nats, where they are independent in both."""
    kl = _analytic_kl(innermost(first), innermost(second), are_whole=False)
    if kl is None or innermost(first).event_shape:
        raise ValueError(
            f"{type_name(first)} and {type_name(second)} have no KL of each latent, as two "
            "diagonal Gaussians have"
        )
    return jnp.broadcast_to(kl, second.event_shape)


def sample_and_log_prob(posterior: Distribution, rng_key: jax.Array) -> tuple[Any, jax.Array]:
    """One z ~ q and log q(z); a flow gives both in one pass, so that it need not be inverted."""
    if isinstance(posterior, Chain):
        return posterior.sample_and_log_prob(rng_key)
    if isinstance(posterior, dist.TransformedDistribution):
        with library_promotion():
            z, intermediates = posterior.sample_with_intermediates(rng_key)
            log_q = posterior.log_prob(z, intermediates)
        check_scalar("posterior", posterior, jnp.shape(log_q))
        return z, cast(jax.Array, log_q)
    z = sample(posterior, rng_key)
    return z, one_log_prob("posterior", posterior, z)


def bits_per_dim(nats: Nats, event_shape: tuple[int, ...]) -> Nats:
    """BPD = -nats / (log 2 * number of dimensions) of bounds on log p(x); lower is better.

    `event_shape` is the shape of one x. See note 3 of the paper.
    """
    return -nats / (math.log(2.0) * math.prod(event_shape))


def _sample_keys(rng_key: jax.Array, num_samples: int) -> jax.Array:
    """Keys [S]; one sample takes the key itself, which spares every training step a hash."""
    check_positive(num_samples=num_samples)
    return rng_key[None] if num_samples == 1 else jax.random.split(rng_key, num_samples)


def _log_likelihood(vae: VAE, decoder_params: Params, x: jax.Array, z: Any) -> jax.Array:
    """Log p(x given z), checked to be a scalar."""
    return one_log_prob("likelihood", vae.decode(decoder_params, z), observed(x))


def _kl_by_link(posterior: Any, prior: Any, z: dict[str, Any]) -> jax.Array:
    """KL(q || p) of chains with the same links, unbiased at one z ~ q."""
    total = jnp.zeros(())
    for name, q in posterior.links_at(z).items():
        p = prior.link_at(name, z)
        kl = _analytic_kl(q, p)
        total += log_prob(q, z[name]) - log_prob(p, z[name]) if kl is None else kl
    return total


def _analytic_kl(
    posterior: Distribution, prior: Distribution, are_whole: bool = True
) -> jax.Array | None:
    """KL(q || p) where NumPyro has it in closed form for this pair; checked to be a scalar."""
    try:
        with library_promotion():
            kl = cast(jax.Array, kl_divergence(cast(Any, posterior), cast(Any, prior)))
    except NotImplementedError:
        return None
    if are_whole and jnp.shape(kl) != ():
        for role, distribution in (("posterior", posterior), ("prior", prior)):
            value = log_prob(distribution, sample(distribution, jax.random.key(0)))
            check_scalar(role, distribution, jnp.shape(value))
    return kl
