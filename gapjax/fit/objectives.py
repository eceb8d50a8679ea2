"""Objectives beside the ELBO, for `train` and `refit_encoder`.

An objective is a function `objective(vae, params, rng_key, x)` of one example that returns nats to
maximise. Those with settings are frozen dataclasses: equal ones share compiled programs. One that
takes no gradient through samples of q says so by an attribute `needs_rsample = False`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gapjax.examples import dtypes_of
from gapjax.infer import newton
from gapjax.model.bounds import divergence, divergences, elbo, importance_weighted_bound, log_joint
from gapjax.model.distributions import sample_beside
from gapjax.vae import VAE, Params, VAEParams, log_prob, prior_of, sample

_Objective = Callable[[VAE, VAEParams, jax.Array, jax.Array], jax.Array]


def needs_rsample(objective: _Objective) -> bool:
    """Whether a gradient is taken through samples of q; it is unless the objective says not."""
    while not hasattr(objective, "needs_rsample") and hasattr(objective, "func"):
        objective = getattr(objective, "func")  # noqa: B009 (of functools.partial)
    return getattr(objective, "needs_rsample", True)


def as_bound(objective: _Objective) -> Any:
    """An objective in the form of a bound, its mean over as many keys; a value, as it is."""
    return elbo if objective is elbo else jax.tree_util.Partial(_mean_over_keys, objective)


def _mean_over_keys(objective: _Objective, vae, params, rng_key, x, num_samples) -> jax.Array:
    keys = jax.random.split(rng_key, num_samples)
    return jax.vmap(lambda key: objective(vae, params, key, x))(keys).mean()


def sleep_phase(vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array) -> jax.Array:
    """The sleep phase: forward KL on samples of the model, whose z is known.

        log q(z' given x'),   z' ~ p(z), x' ~ p(x given z')

    Up to a constant its mean is -E_p(x) KL(p(z given x) || q(z given x)), so the encoder learns the
    posterior itself and no ELBO: it covers where the reverse KL of the ELBO picks. (z', x') is
    drawn here and x is not used, except for its dtype. No gradient reaches the decoder.

    References:
      Hinton et al., The wake-sleep algorithm for unsupervised neural networks, 1995.
    """
    latent_key, pixel_key = jax.random.split(rng_key)
    z = sample(prior_of(vae, params.decoder), latent_key)
    return _log_posterior(vae, params, pixel_key, z, dtypes_of(x))


sleep_phase.needs_rsample = False  # type: ignore[attr-defined]


def wake_sleep(vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array) -> jax.Array:
    """Wake-sleep from scratch, by `train`: both phases in each step.

        log p(x, z) + log q(z' given x'),   z ~ q(z given x), z' ~ p(z), x' ~ p(x given z')

    The first term (wake) trains the decoder alone, the second (`sleep_phase`) the encoder alone. It
    is no bound of log p(x).
    """
    wake_key, sleep_key = jax.random.split(rng_key)
    z = jax.lax.stop_gradient(sample(vae.encode(params.encoder, x), wake_key))
    return log_joint(vae, params.decoder, x, z) + sleep_phase(vae, params, sleep_key, x)


wake_sleep.needs_rsample = False  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class SeveralSamples:
    """The ELBO averaged over `num_samples` samples of z: its gradient has less noise."""

    num_samples: int
    bound: ClassVar[Any] = staticmethod(elbo)

    def __call__(self, vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array) -> jax.Array:
        return self.bound(vae, params, rng_key, x, self.num_samples)


class Iwae(SeveralSamples):
    """The importance-weighted bound of `num_samples` samples; see `importance_weighted_bound`.

        log (1/S) sum_s p(x, z_s) / q(z_s given x),   z_s ~ q(z given x)

    References:
      Burda, Grosse, Salakhutdinov, Importance Weighted Autoencoders, 2016.
    """

    bound = staticmethod(importance_weighted_bound)


@dataclasses.dataclass(frozen=True)
class BetaElbo:
    """The ELBO with a weight on its KL; a bound of log p(x) where `beta` is at least 1.

        E_q[log p(x given z)] - beta KL(q(z given x) || p(z))

    References:
      Higgins et al., beta-VAE, 2017.
    """

    beta: float

    def __call__(self, vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array) -> jax.Array:
        # By the same key, a KL that is estimated is so at the z of the ELBO.
        kl = divergence(vae.encode(params.encoder, x), prior_of(vae, params.decoder), rng_key)
        return elbo(vae, params, rng_key, x) - (self.beta - 1) * kl


@dataclasses.dataclass(frozen=True)
class FreeBits:
    """The ELBO where the first `nats` of each latent's KL are free, so that latents stay in use.

        E_q[log p(x given z)] - sum_j max(nats, KL(q(z_j given x) || p(z_j)))

    Latents are independent in q and in the prior, with a KL in closed form. The maximum is of every
    example; in the reference it is of a batch's mean.

    References:
      Kingma et al., Improved Variational Inference with Inverse Autoregressive Flow, 2016.
    """

    nats: float

    def __call__(self, vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array) -> jax.Array:
        kl = divergences(vae.encode(params.encoder, x), prior_of(vae, params.decoder))
        return elbo(vae, params, rng_key, x) - jax.nn.relu(self.nats - kl).sum()


@dataclasses.dataclass(frozen=True)
class WithSleep:
    """An objective on the source's x, plus `weight` times `sleep_phase` on the model's samples."""

    weight: float
    objective: _Objective = elbo
    needs_rsample = property(lambda self: needs_rsample(self.objective))

    def __call__(self, vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array) -> jax.Array:
        objective_key, sleep_key = jax.random.split(rng_key)
        dream = sleep_phase(vae, params, sleep_key, x)
        return self.objective(vae, params, objective_key, x) + self.weight * dream


@dataclasses.dataclass(frozen=True)
class DenoisingElbo:
    """Amortized inference regularization: q of a noisy x, the ELBO of the clean one.

        ELBO with q(z given x + e),   e ~ N(0, scale^2),   the scale in units of x (levels)

    It smooths the encoder. It serves refits and, as in the reference, training from scratch.

    References:
      Shu, Bui, Zhao, Kochenderfer, Ermon, Amortized Inference Regularization, 2018.
    """

    scale: float

    def __call__(self, vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array) -> jax.Array:
        noise_key, elbo_key = jax.random.split(rng_key)
        noisy = x.astype(jnp.float32) + self.scale * jax.random.normal(noise_key, x.shape)
        blurred = vae._replace(encode=lambda encoder, x: vae.encode(encoder, noisy))
        return elbo(blurred, params, elbo_key, x)


@dataclasses.dataclass(frozen=True)
class ConsistentCodes:
    """The ELBO, and a reward where the code of a reconstruction is that of its image.

        ELBO(x) + weight * log q(z given x'),   z ~ q(z given x), x' ~ p(x given z)

    This is `sleep_phase` at the codes of the source's x instead of those of the prior. It keeps the
    idea of the reference and not its transition kernel. z and x' pass no gradient.

    References:
      Cemgil, Ghaisas, Dvijotham, Gowal, Kohli, The Autoencoding Variational Autoencoder, 2020.
    """

    weight: float

    def __call__(self, vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array) -> jax.Array:
        elbo_key, latent_key, pixel_key = jax.random.split(rng_key, 3)
        z = sample(vae.encode(params.encoder, x), latent_key)
        again = _log_posterior(vae, params, pixel_key, z, dtypes_of(x))
        return elbo(vae, params, elbo_key, x) + self.weight * again


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Distils the posteriors of a per-image search into the encoder.

        -KL(q*(z given x) || q(z given x)),   or -KL(q || q*) with forward=False

    q* is `refine` of the encoder's own q, so the target is near from the start and every step
    brings it nearer; no gradient passes through it. Nothing is searched for in advance or stored,
    so any source will do, also model samples, which are new at every draw. A Newton step costs many
    passes through the decoder.

    Attributes:
      refiner: the search; of Newton's method one step is enough in a linear Gaussian model.
      forward: whether to take the KL from q* to q, which covers q* where q cannot be equal to it.
    """

    refiner: newton.Refiner = newton.Refiner(num_steps=1)  # noqa: RUF009 (frozen)
    forward: bool = True
    needs_rsample = property(lambda self: not self.forward)

    def __post_init__(self) -> None:
        newton.check(self.refiner)

    def __call__(self, vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array) -> jax.Array:
        search_key, kl_key = jax.random.split(rng_key)
        frozen = jax.lax.stop_gradient(params)
        target = newton.refine_one(vae, frozen, search_key, x, self.refiner).posteriors
        target = jax.lax.stop_gradient(target)
        return -_kl(target, vae.encode(params.encoder, x), kl_key, self.forward)


@dataclasses.dataclass(frozen=True, eq=False)
class EnsembleDistillation:
    """Distils several encoders into one, which costs at test time what one costs.

        -1/K sum_k KL(q(z given x) || q_k(z given x)),   or KL(q_k || q) with forward=True

    q_1 .. q_K are of the `encoders` of `teacher`, which are not trained. Over Gaussians the best q
    is their normalised geometric mean, or with forward=True the Gaussian with the moments of their
    mixture, which is wider where they disagree. Every one is an objective of its own, whose
    programs hold the encoders as constants.

    References:
      Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015.
    """

    teacher: VAE
    encoders: Sequence[Params]
    forward: bool = False
    needs_rsample = property(lambda self: not self.forward)

    def __post_init__(self) -> None:
        if not self.encoders:
            raise ValueError("the distillation of an ensemble needs at least one encoder")

    def __call__(self, vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array) -> jax.Array:
        posterior = vae.encode(params.encoder, x)

        def kl(encoder: Params, kl_key: jax.Array) -> jax.Array:
            return _kl(self.teacher.encode(encoder, x), posterior, kl_key, self.forward)

        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *self.encoders)  # a constant
        return -jax.vmap(kl)(stacked, jax.random.split(rng_key, len(self.encoders))).mean()


def _kl(target: Any, posterior: Any, rng_key: jax.Array, forward: bool) -> jax.Array:
    """KL from the target to the posterior if forward, else from the posterior to the target."""
    pair = (target, posterior) if forward else (posterior, target)
    return divergence(*pair, rng_key)


def _log_posterior(vae: VAE, params: VAEParams, rng_key: jax.Array, z, dtypes) -> jax.Array:
    """Log q(z given x') of one x' ~ p(x given z), in nats; a function of the encoder alone."""
    x = sample_beside(vae.decode(params.decoder, z), rng_key, dtypes)
    z, x = jax.lax.stop_gradient((z, x))
    return log_prob(vae.encode(params.encoder, x), z)
