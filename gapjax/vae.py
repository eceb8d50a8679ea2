"""A VAE as pure functions of one example, and what is drawn from it.

Letters: x [*event] one example, z [Z] one latent. Nothing here knows of batches: `jax.vmap` is
applied where batches are made, in `fit`, `infer` and `measure`.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Params = Any


class Distribution(Protocol):
    """What is asked of a prior, a posterior or a likelihood; NumPyro's distributions have it.

    One distribution is over one whole example or latent: `log_prob` returns a scalar. With
    NumPyro, `.to_event(n)` declares the last n axes of the parameters as part of the event.
    """

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        ...

    def sample(self, key: jax.Array, /) -> ArrayLike:
        """One sample [*event]."""
        ...

    def log_prob(self, value: jax.Array, /) -> ArrayLike:
        """Log-density or log-probability of one sample in nats."""
        ...


class VAEParams(NamedTuple):
    """Two pytrees: phi of the encoder, which a refit trains, and theta of the decoder."""

    encoder: Params
    decoder: Params


class Frozen(NamedTuple):
    """Parameters within an encoder's that a refit leaves as they are; see `encoder_only`."""

    params: Params


class VAE(NamedTuple):
    """A latent variable model and its inference model: three pure functions and a prior.

    Any pure functions will do; `mlp_vae` makes the paper's. Models whose functions are equal share
    compiled programs, so make them once, or as frozen dataclasses. See `Distribution`.

    Attributes:
      init: `init(rng_key) -> VAEParams`.
      encode: `encode(encoder_params, x) -> q(z given x)`, x [*event] as stored.
      decode: `decode(decoder_params, z) -> p(x given z)`, a distribution over x as stored.
      prior: p(z), event shape [Z].
    """

    init: Callable[[jax.Array], VAEParams]
    encode: Callable[[Params, jax.Array], Distribution]
    decode: Callable[[Params, jax.Array], Distribution]
    prior: Distribution


class Encoder(NamedTuple):
    """An encoder by itself, to put into a `VAE` in place of its own; see `with_encoder`."""

    init: Callable[[jax.Array], Params]
    encode: Callable[[Params, jax.Array], Distribution]


def with_encoder(vae: VAE, encoder: Encoder) -> VAE:
    """The same generative model with another encoder: fresh, wider, deeper, of any architecture.

    A refit of it starts from `VAEParams(encoder.init(rng_key), params.decoder)`.
    """
    return vae._replace(init=_InitBoth(encoder.init, vae.init), encode=encoder.encode)


@dataclasses.dataclass(frozen=True)
class _InitBoth:
    """The parameters of one model's encoder beside those of another's decoder."""

    init_encoder: Callable[[jax.Array], Params]
    init_other: Callable[[jax.Array], VAEParams]

    def __call__(self, rng_key: jax.Array) -> VAEParams:
        encoder_key, other_key = jax.random.split(rng_key)
        return VAEParams(self.init_encoder(encoder_key), self.init_other(other_key).decoder)


def local_inference(vae: VAE) -> VAE:
    """The same model with a posterior given for each image in place of an encoder.

    So each bound serves for any q: `elbo(local_inference(vae), VAEParams(q, decoder), rng_key, x)`.
    """
    return vae._replace(encode=_given)


def _given(posterior: Any, x: jax.Array) -> Any:
    del x
    return posterior


def sample_model(vae: VAE, decoder_params: Params, rng_key: jax.Array) -> jax.Array:
    """Ancestral sampling of one x [*event]: z ~ p(z), then x ~ p(x given z)."""
    latent_key, pixel_key = jax.random.split(rng_key)
    return sample(vae.decode(decoder_params, sample(vae.prior, latent_key)), pixel_key)


def reconstruct(vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array) -> jax.Array:
    """The `mean` of p(x given z) [*event] at one z ~ q(z given x), in the units of x."""
    z = sample(vae.encode(params.encoder, x), rng_key)
    with library_promotion():
        return cast(Any, vae.decode(params.decoder, z)).mean


def sample(distribution: Distribution, rng_key: jax.Array) -> jax.Array:
    """One sample of a distribution."""
    with library_promotion():
        return cast(jax.Array, distribution.sample(rng_key))


def log_prob(distribution: Distribution, value: jax.Array) -> jax.Array:
    """Log-probability of one value, in nats."""
    with library_promotion():
        return cast(jax.Array, distribution.log_prob(value))


def library_promotion() -> AbstractContextManager:
    """JAX's default promotion, as NumPyro mixes dtypes; `parallel.program` sets it by itself."""
    return jax.numpy_dtype_promotion("standard")


def observed(x: jax.Array) -> jax.Array:
    """Integer levels as float32, which every likelihood takes; floats as they are."""
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
