"""A VAE as pure functions of one example, and what is drawn from it.

Letters: x [*event] one example, z [Z] one latent, c the context of an example. x, z and c may be
any pytrees of arrays. Nothing here knows of batches: `jax.vmap` is applied where batches are made,
in `fit`, `infer` and `measure`, and `bind` there gives a model the context of each example.
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
    def event_shape(self) -> Any:
        """Shape of one sample; of a pytree, those of its arrays."""
        ...

    def sample(self, rng_key: jax.Array, /) -> Any:
        """One sample [*event]."""
        ...

    def log_prob(self, value: Any, /) -> ArrayLike:
        """Log-density or log-probability of one sample in nats."""
        ...


class VAEParams(NamedTuple):
    """Two pytrees: phi of the encoder, which a refit trains, and theta of the decoder."""

    encoder: Params
    decoder: Params


class Frozen(NamedTuple):
    """Parameters within an encoder's that a refit leaves as they are; see `encoder_only`."""

    params: Params


class Given(NamedTuple):
    """An example with what it is conditioned on: labels, a batch, a library size.

    A set of N of them has a leading axis [N] in every array of both. Bits per dimension count `x`
    alone.
    """

    x: Any
    context: Any


class VAE(NamedTuple):
    """A latent variable model and its inference model: three pure functions and a prior.

    Any pure functions will do; `mlp_vae` makes the paper's. Models whose functions are equal share
    compiled programs, so make them once, or as frozen dataclasses. See `Distribution`.

    Attributes:
      init: `init(rng_key) -> VAEParams`.
      encode: `encode(encoder_params, x) -> q(z given x)`, x [*event] as stored.
      decode: `decode(decoder_params, z) -> p(x given z)`, a distribution over x as stored.
      prior: p(z), or a function `prior(decoder_params) -> p(z)` of a learned one, which `train`
        trains with the decoder and a refit freezes with it.

    A conditional model has functions `encode(params, x, context)`, `decode(params, z, context)`
    and, if the prior is a function, `prior(params, context)`. Its examples are `Given`.
    """

    init: Callable[[jax.Array], VAEParams]
    encode: Callable[..., Distribution]
    decode: Callable[..., Distribution]
    prior: Any  # Distribution | Callable[..., Distribution]

    def at(self, context: Any) -> "VAE":
        """The model of x alone, given this context. Its functions hold the context's arrays."""
        bound = lambda function: lambda params, value: function(params, value, context)
        prior = self.prior
        if not is_distribution(prior):
            prior = lambda params: self.prior(params, context)
        return VAE(self.init, bound(self.encode), bound(self.decode), prior)


def bind(vae: VAE, example: Any) -> tuple[VAE, Any]:
    """The model and the x of one example; that of a `Given` is the model `at` its context."""
    return (vae.at(example.context), example.x) if isinstance(example, Given) else (vae, example)


def prior_of(vae: VAE, decoder_params: Params) -> Distribution:
    """The prior p(z), with the parameters of the decoder where it is learned."""
    return vae.prior if is_distribution(vae.prior) else vae.prior(decoder_params)


def latent_size(vae: VAE) -> int:
    """Z of a model whose latent is one vector; TypeError for another."""
    draw = lambda key: sample(prior_of(vae, vae.init(key).decoder), key)
    z = jax.eval_shape(draw, jax.random.key(0))
    if getattr(z, "ndim", None) != 1:
        raise TypeError(
            "the latent of this model is not one vector [Z], which a new encoder and learned "
            "refinement need; that of a hierarchy in its non-centred form is one"
        )
    return z.shape[0]


def is_distribution(value: Any) -> bool:
    """Whether this has a `log_prob`; a function that makes a distribution has none."""
    return callable(getattr(value, "log_prob", None))


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


def _given(posterior: Any, *example: Any) -> Any:
    del example
    return posterior


def sample_model(vae: VAE, decoder_params: Params, rng_key: jax.Array) -> Any:
    """Ancestral sampling of one x [*event]: z ~ p(z), then x ~ p(x given z)."""
    latent_key, pixel_key = jax.random.split(rng_key)
    z = sample(prior_of(vae, decoder_params), latent_key)
    return sample(vae.decode(decoder_params, z), pixel_key)


def reconstruct(vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array) -> jax.Array:
    """The `mean` of p(x given z) [*event] at one z ~ q(z given x), in the units of x."""
    z = sample(vae.encode(params.encoder, x), rng_key)
    with library_promotion():
        return cast(Any, vae.decode(params.decoder, z)).mean


def sample(distribution: Distribution, rng_key: jax.Array) -> Any:
    """One sample of a distribution."""
    with library_promotion():
        return distribution.sample(rng_key)


def log_prob(distribution: Distribution, value: Any) -> jax.Array:
    """Log-probability of one value, in nats."""
    with library_promotion():
        return cast(jax.Array, distribution.log_prob(value))


def library_promotion() -> AbstractContextManager:
    """JAX's default promotion, as NumPyro mixes dtypes; `parallel.program` sets it by itself."""
    return jax.numpy_dtype_promotion("standard")


def observed(x: Any) -> Any:
    """Integer levels as float32, which every likelihood takes; floats as they are."""
    as_float = lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    return jax.tree.map(as_float, x)
