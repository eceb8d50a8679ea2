"""Learned priors: parameters of the decoder, which training moves and a refit leaves alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from gapjax.model import networks
from gapjax.model.distributions import AutoregressiveFlow
from gapjax.model.mlp import StandardNormal
from gapjax.model.networks import apply_module, init_module
from gapjax.vae import VAE, Distribution, Params, VAEParams


def with_prior(vae: VAE, prior: Any) -> VAE:
    """The same model with a learned prior over its latent vector.

    The decoder's parameters become {"decoder": those of `vae`, "prior": those of the prior}.

    Args:
      prior: a `MixturePrior`, `VampPrior` or `FlowPrior`, or any value with `init(rng_key)`, which
        makes parameters, and `__call__(params)`, which makes a distribution over z.

    Example:
      >>> vae = with_prior(mlp_vae((8, 8)), MixturePrior(latent_dim=10, num_components=20))
    """
    return VAE(_Init(vae.init, prior), vae.encode, _Decode(vae.decode), _Prior(prior))


@dataclasses.dataclass(frozen=True)
class MixturePrior:
    """A mixture of K diagonal Gaussians.

    p(z) = sum_k w_k N(z; m_k, diag(s_k^2))
    """

    latent_dim: int
    num_components: int = 20

    def init(self, rng_key: jax.Array) -> Params:
        """Components with means drawn from N(0, I), scales of 1 and equal weights."""
        shape = self.num_components, self.latent_dim
        loc = jax.random.normal(rng_key, shape)
        return {"logits": jnp.zeros(shape[:1]), "loc": loc, "log_scale": jnp.zeros(shape)}

    def __call__(self, params: Params) -> Distribution:
        """The mixture."""
        return _mixture(params["logits"], params["loc"], jnp.exp(params["log_scale"]))


@dataclasses.dataclass(frozen=True)
class VampPrior:
    """A mixture of the posteriors of K learned pseudo-inputs u_k.

        p(z) = sum_k w_k r(z given u_k)

    In the reference r is the encoder. Here it is a network of the same kind with parameters of its
    own, because a refit moves the encoder and must not move the prior. The u_k are in [0, 1].

    References:
      Tomczak, Welling, VAE with a VampPrior, 2018.
    """

    event_shape: tuple[int, ...]
    latent_dim: int
    num_components: int = 50
    hidden_sizes: tuple[int, ...] = (300,)

    def init(self, rng_key: jax.Array) -> Params:
        """Pseudo-inputs about 1/2, a new network and equal weights."""
        input_key, network_key = jax.random.split(rng_key)
        shape = self.num_components, *self.event_shape
        network = init_module(self._module(), network_key, jnp.zeros(self.event_shape))
        inputs = 0.1 * jax.random.normal(input_key, shape)
        return {"logits": jnp.zeros(shape[:1]), "inputs": inputs, "network": network}

    def __call__(self, params: Params) -> Distribution:
        """The mixture."""
        inputs = jax.nn.sigmoid(params["inputs"])
        module = self._module()
        outputs = jax.vmap(lambda u: apply_module(module, params["network"], u)[:2])(inputs)
        return _mixture(params["logits"], *outputs)

    def _module(self) -> networks.MLPEncoder:
        return networks.MLPEncoder(self.hidden_sizes, self.latent_dim)


@dataclasses.dataclass(frozen=True)
class FlowPrior:
    """A standard Gaussian through autoregressive layers, whose density is computed in one pass.

    References:
      Papamakarios, Pavlakou, Murray, Masked Autoregressive Flow for Density Estimation, 2017;
      Chen et al., Variational Lossy Autoencoder, 2017.
    """

    latent_dim: int
    num_layers: int = 2
    hidden_size: int = 64

    def init(self, rng_key: jax.Array) -> Params:
        """Layers that start as the identity."""
        inputs = jnp.zeros(self.latent_dim), jnp.zeros(self.hidden_size)
        keys = jax.random.split(rng_key, self.num_layers)
        return [init_module(self._module(), key, *inputs) for key in keys]

    def __call__(self, params: Params) -> Distribution:
        """The transformed Gaussian."""
        reverse = dist.transforms.PermuteTransform(jnp.arange(self.latent_dim)[::-1])
        transforms = []
        for weights in params:
            network = jax.tree_util.Partial(_layer, self, weights)
            transforms += [AutoregressiveFlow(network).inv, reverse]
        return dist.TransformedDistribution(StandardNormal(self.latent_dim), transforms)

    def _module(self) -> networks.Autoregressive:
        return networks.Autoregressive(self.hidden_size)


def _layer(prior: FlowPrior, weights: Params, z: jax.Array) -> tuple:
    """One layer of a flow that sees nothing but z."""
    return apply_module(prior._module(), weights, z, jnp.zeros(prior.hidden_size))


def _mixture(logits: jax.Array, loc: jax.Array, scale: jax.Array) -> Distribution:
    weights = dist.CategoricalLogits(logits)
    return dist.MixtureSameFamily(weights, dist.Normal(loc, scale).to_event(1))


@dataclasses.dataclass(frozen=True)
class _Init:
    init: Any
    prior: Any

    def __call__(self, rng_key: jax.Array) -> VAEParams:
        model_key, prior_key = jax.random.split(rng_key)
        params = self.init(model_key)
        decoder = {"decoder": params.decoder, "prior": self.prior.init(prior_key)}
        return VAEParams(params.encoder, decoder)


@dataclasses.dataclass(frozen=True)
class _Decode:
    decode: Any

    def __call__(self, params: Params, z: Any, *context: Any) -> Distribution:
        return self.decode(params["decoder"], z, *context)


@dataclasses.dataclass(frozen=True)
class _Prior:
    prior: Any

    def __call__(self, params: Params, *context: Any) -> Distribution:
        del context
        return self.prior(params["prior"])
