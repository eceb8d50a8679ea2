"""The paper's model: feed-forward networks, and the families of its posterior."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from gapjax.model import networks
from gapjax.model.checks import check_positive
from gapjax.model.distributions import AutoregressiveFlow, DiscretizedLogistic
from gapjax.vae import VAE, Encoder, Params

PIXELS = ("bernoulli", "discretized_logistic")  # likelihoods of integer levels
LIKELIHOODS = (*PIXELS, "normal")
_FLOW_LAYERS, _FLOW_HIDDEN = 2, 64
_FLOW_LAYER = networks.Autoregressive(_FLOW_HIDDEN)

# The least log scale of a pixel with 256 levels in [0, 1], 0.23 of a bin, as in the authors' code
# (PixelCNN++ has half of it). Without it the pixels at the border, 0 in all but a handful of
# training images, get narrower and narrower, and one test image that is not 0 there cost 1e8 nats:
# after 100 epochs of grey MNIST the mean test BPD was 23, its median 1.56.
_MIN_LOG_SCALE = -7.0

# The least scale of a real entry: no density exceeds 4, however sharp a decoder would be.
_MIN_SCALE = 0.1

# The weight of the uniform over the levels in a grey pixel's likelihood. The authors' code has
# log(p + 1e-7); with 256 levels this is the normalised distribution with that floor.
UNIFORM_WEIGHT = 256e-7


def mlp_vae(
    event_shape: tuple[int, ...],
    likelihood: str = "bernoulli",
    *,
    latent_dim: int = 10,
    hidden_sizes: tuple[int, ...] = (500, 500),
    levels: int | None = 256,
    uniform_weight: float = UNIFORM_WEIGHT,
    posterior: str = "diagonal",
) -> VAE:
    """The paper's model: two feed-forward networks, N(0, I) prior, diagonal Gaussian posterior.

    Args:
      event_shape: shape of one x, whose entries are integer levels, or real numbers.
      likelihood: "bernoulli" (levels 0 and 1); "discretized_logistic", whose mean and log
        scale the decoder gives for every pixel, the scale at least 0.23 of a bin; or "normal", of
        real numbers, whose mean and log scale it gives likewise. Those should be standardized, as
        the scale is at least 0.1.
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

    References:
      Zhang, Hayes, Barber, Generalization Gap in Amortized Inference, sections 2.2 and 3; Kingma
      et al., Improved Variational Inference with Inverse Autoregressive Flow, 2016; Salimans et
      al., PixelCNN++, 2017.
    """
    decode = pixel_decoder(
        event_shape, likelihood, latent_dim, hidden_sizes, levels, uniform_weight
    )
    encode: Any = mlp_encoder(
        event_shape, latent_dim=latent_dim, hidden_sizes=hidden_sizes, levels=decode.levels,
        posterior=posterior,
    ).encode  # fmt: skip
    prior = StandardMultivariateNormal if posterior == "full_covariance" else StandardNormal
    return VAE(networks.InitBoth(encode, decode), encode, decode, prior(latent_dim))


def pixel_decoder(
    event_shape: tuple[int, ...], likelihood: str, latent_dim: int, hidden_sizes: tuple[int, ...],
    levels: int | None, uniform_weight: float,
) -> "Decode":  # fmt: skip
    """The decoder of `mlp_vae` by itself."""
    if likelihood not in LIKELIHOODS:
        raise ValueError(
            f"likelihood is {likelihood!r}; it must be one of {', '.join(LIKELIHOODS)}"
        )
    if likelihood != "discretized_logistic":
        levels, uniform_weight = 2, 0.0  # level/(levels-1) is x itself
    elif levels is None:
        raise ValueError("levels is None; floats need likelihood='normal', and counts count_vae")
    else:
        DiscretizedLogistic(0.0, 1.0, levels, uniform_weight=uniform_weight)  # checks the weight
    check_positive(latent_dim=latent_dim, hidden_sizes=hidden_sizes, event_shape=event_shape)
    sizes = tuple(event_shape), latent_dim, tuple(hidden_sizes), levels
    return Decode(*sizes, likelihood, uniform_weight)


def mlp_encoder(
    event_shape: tuple[int, ...],
    *,
    latent_dim: int = 10,
    hidden_sizes: tuple[int, ...] = (500, 500),
    levels: int = 2,
    posterior: str = "diagonal",
) -> Encoder:
    """The encoder of `mlp_vae` by itself, of any size: for another encoder of the same decoder.

    The arguments are those of `mlp_vae`; see `with_encoder`.
    """
    if posterior not in POSTERIORS:
        raise ValueError(f"posterior is {posterior!r}; it must be one of {', '.join(POSTERIORS)}")
    check_positive(latent_dim=latent_dim, hidden_sizes=hidden_sizes, event_shape=event_shape)
    if levels < 2:
        raise ValueError(f"levels is {levels}; pixels need at least 2")
    encode = _ENCODERS[posterior](tuple(event_shape), latent_dim, tuple(hidden_sizes), levels)
    return Encoder(_InitEncoder(encode), encode)


def min_log_scale(levels: int) -> float:
    """The least log scale that `mlp_vae` gives a discretized logistic of so many levels."""
    return _MIN_LOG_SCALE + math.log(255 / (levels - 1))


@dataclasses.dataclass(frozen=True)
class _Network:
    """The sizes of an encoder or a decoder; models of equal ones share compiled programs."""

    event_shape: tuple[int, ...]
    latent_dim: int
    hidden_sizes: tuple[int, ...]
    levels: int


class _Diagonal(_Network):
    """A diagonal Gaussian q(z given x)."""

    def init(self, rng_key: jax.Array) -> Params:
        return networks.init_module(self._module(), rng_key, jnp.zeros(self.event_shape))

    def __call__(self, params: Params, x: jax.Array) -> dist.Distribution:
        loc, scale, _ = self._outputs(params, x)
        return dist.Normal(loc, scale).to_event(1)

    def _outputs(self, params: Params, x: jax.Array) -> Any:
        inputs = x.astype(jnp.float32) / (self.levels - 1)
        return networks.apply_module(self._module(), params, inputs)

    def _module(self) -> networks.MLPEncoder:
        return networks.MLPEncoder(self.hidden_sizes, self.latent_dim)


class _FullCovariance(_Diagonal):
    """A Gaussian q(z given x); the scale is the diagonal of its Cholesky factor."""

    def __call__(self, params: Params, x: jax.Array) -> dist.Distribution:
        loc, scale, below = self._outputs(params, x)
        scale_tril = jnp.diag(scale).at[jnp.tril_indices(self.latent_dim, -1)].set(below)
        return dist.MultivariateNormal(loc, scale_tril=scale_tril)

    def _module(self) -> networks.MLPEncoder:
        num_below = self.latent_dim * (self.latent_dim - 1) // 2
        return networks.MLPEncoder(self.hidden_sizes, self.latent_dim, num_below)


class _Flow(_Diagonal):
    """A diagonal Gaussian through inverse autoregressive layers."""

    def init(self, rng_key: jax.Array) -> Params:
        start_key, *layer_keys = jax.random.split(rng_key, 1 + _FLOW_LAYERS)
        z, context = jnp.zeros(self.latent_dim), jnp.zeros(_FLOW_HIDDEN)
        layers = [networks.init_module(_FLOW_LAYER, key, z, context) for key in layer_keys]
        return {"start": super().init(start_key), "layers": layers}

    def __call__(self, params: Params, x: jax.Array) -> dist.Distribution:
        loc, scale, context = self._outputs(params["start"], x)
        reverse = dist.transforms.PermuteTransform(jnp.arange(self.latent_dim)[::-1])
        transforms = []
        for weights in params["layers"]:
            network = jax.tree_util.Partial(_apply_layer, weights, context)
            transforms += [AutoregressiveFlow(network), reverse]
        return dist.TransformedDistribution(dist.Normal(loc, scale).to_event(1), transforms)

    def _module(self) -> networks.MLPEncoder:
        return networks.MLPEncoder(self.hidden_sizes, self.latent_dim, _FLOW_HIDDEN)


_ENCODERS = {"diagonal": _Diagonal, "full_covariance": _FullCovariance, "flow": _Flow}
POSTERIORS = tuple(_ENCODERS)


@dataclasses.dataclass(frozen=True)
class Decode(_Network):
    """p(x given z); the hidden layers of the encoder in reverse."""

    likelihood: str
    uniform_weight: float

    def init(self, rng_key: jax.Array) -> Params:
        """New parameters."""
        return networks.init_module(self._module(), rng_key, jnp.zeros(self.latent_dim))

    def __call__(self, params: Params, z: jax.Array) -> dist.Distribution:
        """The likelihood."""
        out = networks.apply_module(self._module(), params, z)
        if self.likelihood == "bernoulli":
            pixels = dist.Bernoulli(logits=out[0])
        elif self.likelihood == "normal":
            pixels = dist.Normal(out[0], jnp.maximum(jnp.exp(out[1]), _MIN_SCALE))
        else:
            scale = jnp.exp(jnp.maximum(out[1], min_log_scale(self.levels)))
            pixels = DiscretizedLogistic(  # data are checked once, before a run
                out[0], scale, self.levels, uniform_weight=self.uniform_weight, validate_args=False
            )
        return pixels.to_event(len(self.event_shape))

    def _module(self) -> Any:
        num_outputs = 1 if self.likelihood == "bernoulli" else 2
        return networks.MLPDecoder(self.hidden_sizes[::-1], self.event_shape, num_outputs)


@dataclasses.dataclass(frozen=True)
class _InitEncoder:
    """The parameters of an encoder."""

    encode: _Diagonal

    def __call__(self, rng_key: jax.Array) -> Params:
        return self.encode.init(rng_key)


class _Value:
    """A distribution that is equal to another of the same parameters."""

    def __eq__(self, other: object) -> bool:
        same = zip(jax.tree.leaves(self), jax.tree.leaves(other), strict=False)
        return type(self) is type(other) and all(np.array_equal(a, b) for a, b in same)

    def __hash__(self) -> int:
        return hash((type(self), *map(np.shape, jax.tree.leaves(self))))


class StandardNormal(_Value, dist.Independent):
    """N(0, I) [Z]."""

    def __init__(self, size: int):
        super().__init__(dist.Normal(jnp.zeros(size), jnp.ones(size)), 1)


class StandardMultivariateNormal(_Value, dist.MultivariateNormal):  # messages name it
    """N(0, I) [Z] in the form that has a KL with a Gaussian of full covariance."""

    def __init__(self, size: int):
        super().__init__(jnp.zeros(size), scale_tril=jnp.eye(size))


def _apply_layer(weights: Params, context: jax.Array, z: jax.Array) -> Any:
    """One layer of a flow, as a function of its parameters."""
    return networks.apply_module(_FLOW_LAYER, weights, z, context)
