"""The paper's model: feed-forward networks, and the families of its posterior."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from gapjax.model import networks
from gapjax.model.distributions import AutoregressiveFlow, DiscretizedLogistic
from gapjax.model.vae import VAE, Encoder, Params, VAEParams

LIKELIHOODS = ("bernoulli", "discretized_logistic")


_FLOW_LAYERS, _FLOW_HIDDEN = 2, 64


# The least log scale of a pixel with 256 levels in [0, 1], 0.23 of a bin, as in the authors' code
# (PixelCNN++ has half of it). Without it the pixels at the border, 0 in all but a handful of
# training images, get narrower and narrower (1e-7 of a bin was seen), and one test image that is
# not 0 there cost 1e8 nats: after 100 epochs of grey MNIST the mean test BPD was 23, its median
# 1.56.
_MIN_LOG_SCALE = -7.0


# The weight of the uniform over the levels in a grey pixel's likelihood. The authors' code has
# log(p + 1e-7); with 256 levels this is the normalised distribution with that floor.
UNIFORM_WEIGHT = 256e-7


# How encoder parameters are made and used, and the prior.
_Family = tuple[Callable, Callable, dist.Distribution]


def mlp_vae(
    event_shape: tuple[int, ...],
    likelihood: str = "bernoulli",
    *,
    latent_dim: int = 10,
    hidden_sizes: tuple[int, ...] = (500, 500),
    levels: int = 256,
    uniform_weight: float = UNIFORM_WEIGHT,
    posterior: str = "diagonal",
) -> VAE:
    """The paper's model: two feed-forward networks, N(0, I) prior, diagonal Gaussian posterior.

    Richer posteriors are there to test the paper's claim that the gap is not reduced by a more
    flexible family.

    Equal arguments give the same object, so programs compiled for it are found again.

    Args:
      event_shape: shape of one x, whose entries are integer levels.
      likelihood: "bernoulli" (levels 0 and 1) or "discretized_logistic", whose mean and log
        scale the decoder gives for every pixel. The scale is at least 0.23 of a bin, with 256
        levels the e^-7 of the authors' code.
      latent_dim: Z.
      hidden_sizes: widths of the hidden layers; the decoder has them in reverse.
      levels: number of pixel levels, for the discretized logistic.
      uniform_weight: weight of the uniform over the levels that the discretized logistic is mixed
        with; 0 for none. By default no pixel costs more than 16 nats (with 256 levels). Without
        it a few pixels that a sharp decoder did not expect dominate the mean test BPD.
      posterior: family of q(z given x): "diagonal" Gaussian, "full_covariance" Gaussian, or
        "flow", a diagonal Gaussian through two inverse autoregressive layers of 64 hidden units,
        each of which sees the latents in the reverse order of the other.

    Returns:
      A `VAE`. Its `encode` takes levels (uint8 or float) and feeds the network level/(levels-1).

    Raises:
      ValueError: unknown likelihood or posterior, sizes that are not positive, or a
        `uniform_weight` outside [0, 1].

    References:
      Zhang, Hayes, Barber, Generalization Gap in Amortized Inference, sections 2.2 and 3; Kingma
      et al., Improved Variational Inference with Inverse Autoregressive Flow, 2016; Salimans et
      al., PixelCNN++, 2017.
    """
    if likelihood not in LIKELIHOODS:
        raise ValueError(
            f"likelihood is {likelihood!r}; it must be one of {', '.join(LIKELIHOODS)}"
        )
    _check_encoder(event_shape, latent_dim, hidden_sizes, levels, posterior)
    if likelihood == "bernoulli":
        levels, uniform_weight = 2, 0.0
    else:
        DiscretizedLogistic(0.0, 1.0, levels, uniform_weight=uniform_weight)  # checks the weight
    return _mlp_vae(
        tuple(event_shape), likelihood, latent_dim, tuple(hidden_sizes), levels, uniform_weight,
        posterior,
    )  # fmt: skip


@functools.cache
def _mlp_vae(
    event_shape: tuple[int, ...],
    likelihood: str,
    latent_dim: int,
    hidden_sizes: tuple[int, ...],
    levels: int,
    uniform_weight: float,
    posterior: str,
) -> VAE:
    """See `mlp_vae`; the arguments are checked and in one spelling."""
    bernoulli = likelihood == "bernoulli"
    encoder, prior = _mlp_encoder(event_shape, latent_dim, hidden_sizes, levels, posterior)
    decoder = networks.MLPDecoder(hidden_sizes[::-1], event_shape, 1 if bernoulli else 2)

    def init(rng_key: jax.Array) -> VAEParams:
        encoder_key, decoder_key = jax.random.split(rng_key)
        return VAEParams(
            encoder=encoder.init(encoder_key),
            decoder=_init_of(decoder)(decoder_key, jnp.zeros(latent_dim)),
        )

    def decode(decoder_params: Params, z: jax.Array) -> dist.Distribution:
        out = _apply(decoder, decoder_params, z)
        if bernoulli:
            pixels = dist.Bernoulli(logits=out[0])
        else:
            scale = jnp.exp(jnp.maximum(out[1], min_log_scale(levels)))
            pixels = DiscretizedLogistic(out[0], scale, levels, uniform_weight=uniform_weight)
        return pixels.to_event(len(event_shape))

    return VAE(init, encoder.encode, decode, prior)


def mlp_encoder(
    event_shape: tuple[int, ...],
    *,
    latent_dim: int = 10,
    hidden_sizes: tuple[int, ...] = (500, 500),
    levels: int = 2,
    posterior: str = "diagonal",
) -> Encoder:
    """The encoder of `mlp_vae` by itself, of any size: for another encoder of the same decoder.

    Equal arguments give the same object. See `with_encoder`.

    Args:
      event_shape: shape of one x, whose entries are integer levels.
      latent_dim: Z.
      hidden_sizes: widths of the hidden layers.
      levels: number of pixel levels; the network is fed level/(levels-1).
      posterior: family of q(z given x); see `mlp_vae`.

    Returns:
      An `Encoder`.

    Raises:
      ValueError: an unknown posterior, or sizes that are not positive.
    """
    _check_encoder(event_shape, latent_dim, hidden_sizes, levels, posterior)
    return _mlp_encoder(tuple(event_shape), latent_dim, tuple(hidden_sizes), levels, posterior)[0]


@functools.cache
def _mlp_encoder(
    event_shape: tuple[int, ...],
    latent_dim: int,
    hidden_sizes: tuple[int, ...],
    levels: int,
    posterior: str,
) -> tuple[Encoder, dist.Distribution]:
    """See `mlp_encoder`; also the prior that has a KL with this family."""
    init_encoder, infer, prior = _FAMILIES[posterior](hidden_sizes, latent_dim)

    def init(rng_key: jax.Array) -> Params:
        return init_encoder(rng_key, jnp.zeros(event_shape))

    def encode(encoder_params: Params, x: jax.Array) -> dist.Distribution:
        return infer(encoder_params, x.astype(jnp.float32) / (levels - 1))

    return Encoder(init, encode), prior


def _check_encoder(
    event_shape: tuple[int, ...],
    latent_dim: int,
    hidden_sizes: tuple[int, ...],
    levels: int,
    posterior: str,
) -> None:
    if posterior not in POSTERIORS:
        raise ValueError(f"posterior is {posterior!r}; it must be one of {', '.join(POSTERIORS)}")
    if latent_dim < 1 or any(size < 1 for size in (*hidden_sizes, *event_shape)):
        raise ValueError(
            f"latent_dim {latent_dim}, hidden_sizes {hidden_sizes} and event_shape {event_shape} "
            "must be positive"
        )
    if levels < 2:
        raise ValueError(f"levels is {levels}; pixels need at least 2")


def min_log_scale(levels: int) -> float:
    """The least log scale that `mlp_vae` gives a discretized logistic of so many levels."""
    return _MIN_LOG_SCALE + math.log(255 / (levels - 1))


def _diagonal(hidden_sizes: tuple[int, ...], latent_dim: int) -> _Family:
    encoder = networks.MLPEncoder(hidden_sizes, latent_dim)

    def infer(params: Params, x: jax.Array) -> dist.Distribution:
        return dist.Normal(*_apply(encoder, params, x)).to_event(1)

    return _init_of(encoder), infer, _standard_normal(latent_dim)


def _full_covariance(hidden_sizes: tuple[int, ...], latent_dim: int) -> _Family:
    encoder = networks.FullCovarianceEncoder(hidden_sizes, latent_dim)

    def infer(params: Params, x: jax.Array) -> dist.Distribution:
        loc, scale_tril = _apply(encoder, params, x)
        return dist.MultivariateNormal(loc, scale_tril=scale_tril)

    # N(0, I) in the form that has a KL with this posterior.
    prior = dist.MultivariateNormal(jnp.zeros(latent_dim), scale_tril=jnp.eye(latent_dim))
    return _init_of(encoder), infer, prior


def _flow(hidden_sizes: tuple[int, ...], latent_dim: int) -> _Family:
    encoder = networks.FlowEncoder(hidden_sizes, latent_dim, _FLOW_HIDDEN)
    layer = networks.Autoregressive(_FLOW_HIDDEN)

    def init(rng_key: jax.Array, x: jax.Array) -> Params:
        start_key, *layer_keys = jax.random.split(rng_key, 1 + _FLOW_LAYERS)
        nothing = jnp.zeros(latent_dim), jnp.zeros(_FLOW_HIDDEN)
        layers = [_init_of(layer)(layer_key, *nothing) for layer_key in layer_keys]
        return {"start": _init_of(encoder)(start_key, x), "layers": layers}

    def infer(params: Params, x: jax.Array) -> dist.Distribution:
        loc, scale, context = _apply(encoder, params["start"], x)
        transforms = []
        for weights in params["layers"]:
            network = jax.tree_util.Partial(_apply_layer, weights, context)
            transforms += [AutoregressiveFlow(network), _reversal(latent_dim)]
        return dist.TransformedDistribution(dist.Normal(loc, scale).to_event(1), transforms)

    return init, infer, _standard_normal(latent_dim)


_FAMILIES = {"diagonal": _diagonal, "full_covariance": _full_covariance, "flow": _flow}
POSTERIORS = tuple(_FAMILIES)


def _init_of(module: Any) -> Callable[..., Params]:
    """Linen's `init` as a function of a key and inputs that returns the parameters alone."""
    return lambda rng_key, *inputs: module.init(rng_key, *inputs)["params"]


def _apply(module: Any, params: Params, *inputs: jax.Array) -> Any:
    """Linen's `apply` as a function of the parameters alone."""
    return module.apply({"params": params}, *inputs)


def _standard_normal(size: int) -> dist.Distribution:
    return dist.Normal(jnp.zeros(size), jnp.ones(size)).to_event(1)


def _apply_layer(weights: Params, context: jax.Array, z: jax.Array) -> tuple:
    """One layer of a flow, as a function of its parameters."""
    return _apply(networks.Autoregressive(_FLOW_HIDDEN), weights, z, context)


def _reversal(size: int) -> dist.transforms.Transform:
    return dist.transforms.PermuteTransform(jnp.arange(size)[::-1])
