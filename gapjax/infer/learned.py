"""Encoders with learned refinement: networks that improve q by the gradient of log p(x, z).

To all else such an encoder is one like any other: a refit trains it, and `evaluate` measures it.
"""

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from gapjax.infer.newton import diagonal_normal
from gapjax.model import networks
from gapjax.model.bounds import log_joint
from gapjax.model.checks import check_positive
from gapjax.model.free import from_free
from gapjax.vae import VAE, Distribution, Frozen, Params, VAEParams, latent_size

# Without these bounds a step that goes too far can make the next one overflow the scale of q, and
# training on grey MNIST failed. At the encoder's own q slopes are below 50 there, most below 3.
_LARGE_SLOPE = 10.0  # up to about here a slope is taken as it is
_MAX_GROWTH = 2.0  # of the log scale in one step


class RefinementParams(NamedTuple):
    """The parameters of an encoder with learned refinement."""

    base: Params  # of the encoder whose q is refined
    networks: list[Params]  # of the network of each step
    decoder: Frozen  # a copy of the decoder's, whose gradient every step takes; no refit changes it


def with_refinement(
    vae: VAE,
    num_steps: int = 1,
    hidden_sizes: tuple[int, ...] = (128,),
    latent_dim: int | None = None,
) -> VAE:
    """The same model, whose encoder ends with `num_steps` steps of learned refinement.

    From q = N(m, diag(s^2)) of the encoder each step computes, by a network f of its own with
    hidden layers of `hidden_sizes`,

        g = s * grad_z log p(x, z) at z = m,   (d, e) = f(10 asinh(g / 10), m, log s),
        m' = m + s * d,   log s' = log s + 2 tanh(e / 2).

    g is the slope in units of the posterior's scale. asinh compresses what is large, and no step
    changes the scale by more than a factor of e^2, so that the slope after a step that went too far
    neither dominates f nor overflows. f is zero at first, so that training starts at the encoder's
    own q. No gradient passes through g. A step costs a pass through the decoder and one back, at
    test time too.

    The encoder's parameters are `RefinementParams`; `refinement_params` says where a refit starts.
    Do not `train` from scratch with it: the steps would use the decoder as it was at the start.

    Args:
      latent_dim: Z; needed where the prior is a function of a context.

    References:
      Marino, Yue, Mandt, Iterative Amortized Inference, 2018; Kim et al., Semi-Amortized
      Variational Autoencoders, 2018.
    """
    check_positive(num_steps=num_steps, hidden_sizes=hidden_sizes)
    latent_dim = latent_dim or latent_size(vae)
    network = networks.Refinement(tuple(hidden_sizes), latent_dim)
    return vae._replace(init=_Init(vae, num_steps, network), encode=_Encode(vae, network))


def refinement_params(vae: VAE, params: VAEParams, rng_key: jax.Array) -> VAEParams:
    """Where the refit of a model of `with_refinement` starts: at the encoder of `params`.

    Example:
      >>> refined = with_refinement(vae, num_steps=2)
      >>> start = refinement_params(refined, params, jax.random.key(0))
      >>> refit = refit_encoder(refined, start, source, jax.random.key(1), num_epochs=100)
    """
    fresh = vae.init(rng_key).encoder
    encoder = fresh._replace(base=params.encoder, decoder=Frozen(params.decoder))
    return VAEParams(encoder, params.decoder)


@dataclasses.dataclass(frozen=True)
class _Init:
    """The parameters of a model of `with_refinement`."""

    vae: VAE
    num_steps: int
    network: networks.Refinement

    def __call__(self, rng_key: jax.Array) -> VAEParams:
        model_key, *step_keys = jax.random.split(rng_key, 1 + self.num_steps)
        base, decoder = self.vae.init(model_key)
        nothing = jnp.zeros(3 * self.network.latent_dim)
        steps = [networks.init_module(self.network, key, nothing) for key in step_keys]
        return VAEParams(RefinementParams(base, steps, Frozen(decoder)), decoder)


@dataclasses.dataclass(frozen=True)
class _Encode:
    """The encoder of a model of `with_refinement`."""

    vae: VAE
    network: networks.Refinement

    def __call__(self, params: RefinementParams, x: Any, *context: Any) -> Distribution:
        vae = self.vae.at(*context) if context else self.vae
        posterior = vae.encode(params.base, x)
        decoder = jax.lax.stop_gradient(params.decoder.params)
        slope_at = jax.grad(lambda z: log_joint(vae, decoder, x, z))
        loc, scale = diagonal_normal(posterior, "the posterior")
        log_scale = jnp.log(scale)
        for weights in params.networks:
            scale = jnp.exp(log_scale)
            slope = jax.lax.stop_gradient(scale * slope_at(loc))
            slope = _LARGE_SLOPE * jnp.arcsinh(slope / _LARGE_SLOPE)
            inputs = jnp.concatenate([slope, loc, log_scale])
            moved = networks.apply_module(self.network, weights, inputs)
            shift, growth = cast(tuple[jax.Array, jax.Array], moved)
            growth = _MAX_GROWTH * jnp.tanh(growth / _MAX_GROWTH)
            loc, log_scale = loc + scale * shift, log_scale + growth
        return from_free(posterior, [loc, log_scale])
