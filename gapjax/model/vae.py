"""A VAE as pure functions of one example, and what is drawn from it.

Letters: x [*event] one example, z [Z] one latent. Nothing here knows of batches: `jax.vmap` is
applied where batches are made, in `fit` and `measure`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpyro.distributions as dist

Params = Any


class VAEParams(NamedTuple):
    """The two sets of parameters that the paper keeps apart.

    Attributes:
      encoder: phi, a pytree; what a refit trains.
      decoder: theta, a pytree; what a refit leaves as it is.
    """

    encoder: Params
    decoder: Params


class VAE(NamedTuple):
    """A latent variable model and its inference model: three pure functions and a prior.

    Any pure functions will do; `mlp_vae` makes the paper's. Distributions are anything with
    `log_prob`, `sample(rng_key)` and an event shape.

    Attributes:
      init: `init(rng_key) -> VAEParams`.
      encode: `encode(encoder_params, x) -> q(z given x)`, x [*event] as stored.
      decode: `decode(decoder_params, z) -> p(x given z)`, a distribution over x as stored.
      prior: p(z), event shape [Z].
    """

    init: Callable[[jax.Array], VAEParams]
    encode: Callable[[Params, jax.Array], dist.Distribution]
    decode: Callable[[Params, jax.Array], dist.Distribution]
    prior: dist.Distribution

    # A VAE is a static argument of compiled programs and a key of their caches. A prior that is
    # a dataclass of arrays has no hash, and an encoder may be a callable object without one.
    # Such fields are compared by identity.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, VAE):
            return NotImplemented
        return all(map(_same_field, self, other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(tuple(hash(field) if _has_hash(field) else id(field) for field in self))


def _has_hash(field: object) -> bool:
    try:
        hash(field)
    except TypeError:
        return False
    return True


def _same_field(first: object, second: object) -> bool:
    if first is second:
        return True
    return _has_hash(first) and _has_hash(second) and bool(first == second)


def local_inference(vae: VAE) -> VAE:
    """The same model where every image has a posterior of its own, given in place of an encoder.

    Its `encode(posterior, x)` returns `posterior`. So each bound of one example serves for a q
    that no encoder gave: `elbo(local_inference(vae), VAEParams(q, decoder), rng_key, x)`.
    """
    return vae._replace(encode=_itself)


def _itself(posterior: Any, x: jax.Array) -> Any:
    del x
    return posterior


def sample_model(vae: VAE, decoder_params: Params, rng_key: jax.Array) -> jax.Array:
    """Ancestral sampling of one x [*event]: z ~ p(z), then x ~ p(x given z)."""
    latent_key, pixel_key = jax.random.split(rng_key)
    z = vae.prior.sample(latent_key)
    return vae.decode(decoder_params, z).sample(pixel_key)


def reconstruct(vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array) -> jax.Array:
    """Mean of p(x given z) [*event] at one z ~ q(z given x), in the units of x."""
    z = vae.encode(params.encoder, x).sample(rng_key)
    return vae.decode(params.decoder, z).mean
