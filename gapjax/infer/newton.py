"""Test-time inference: an encoder's posterior of each image, improved by a few steps of its own.

Between the encoder, which costs one pass, and `best_posteriors`, which costs hundreds. Images are
vmapped and divided among the devices in `_refine_all`.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from gapjax import parallel
from gapjax.examples import count, on_device, own, take, with_shared
from gapjax.measure.bounds import Images, check_finite
from gapjax.model.bounds import bound_at, elbo, log_joint
from gapjax.model.checks import check_inputs, check_positive
from gapjax.model.distributions import DiscretizedLogistic, innermost, type_name
from gapjax.model.free import from_free, to_free, written_out
from gapjax.optimizers import adam
from gapjax.vae import VAE, Params, VAEParams, bind, local_inference, prior_of

METHODS = ("newton", "adam")
_STEP_SIZES = (1.0, 0.5, 0.2)
# Folded into an image's key: for Adam's choice and for what is reported. Its steps lie between.
_CHOICE, _REPORT = 0, 2**32 - 1
_NUM_CELLS = 12
_INSTEAD = "Newton steps take no other, method='adam' takes every family"


@dataclasses.dataclass(frozen=True)
class Refiner:
    """How a posterior is improved.

    Attributes:
      method: "newton", damped Gauss-Newton steps with a line search, or "adam", the steps of the
        extended paper.
      num_steps: K; with 0 the posterior is the encoder's.
      num_samples: of Adam, samples in each gradient; of Newton's method, pairs of points +-u at
        which the decoder's Jacobian is taken.
      num_judged: pairs of points +-u at which Newton's method takes gradients and its line search
        judges, at most Z; half the samples of Adam's choice and of the bounds that are reported.
      learning_rate: of Adam, on the free parameters of q (see `model.free`).
    """

    method: str = "newton"
    num_steps: int = 2
    num_samples: int = 1
    num_judged: int = 6
    learning_rate: float = 5e-3


class Refined(NamedTuple):
    """The improved posteriors of N images."""

    # a pytree as `encode` returns it, every leaf with a leading axis [N] but what is `Frozen`
    posteriors: Any
    # [N] nats, the ELBO of the encoder's posterior and of the improved one on the same samples,
    # which no step and no choice has seen
    start: np.ndarray | jax.Array
    bound: np.ndarray | jax.Array


def refine(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    images: Images,
    refiner: Refiner = Refiner(),
    *,
    batch_size: int = 50,
    devices: parallel.Devices | None = None,
) -> Refined:
    """Improves the encoder's q(z given x) for each image by itself, with the decoder frozen.

    Newton's method takes q = N(m, diag(s^2)) and a prior N(m0, diag(s0^2)). With J(z) the
    decoder's Jacobian and F(z) the likelihood's Fisher information, a step computes

        H = E_q[J' F J] + diag(s0^-2),   g = E_q[grad_z log p(x given z)] - (m - m0) / s0^2,
        m' = m + H^-1 g,   s'_i = H_ii^(-1/2),

    which is the best diagonal q where log p(x, z) is quadratic in z. The new (m, log s) is the best
    of m + t (m' - m), log s + t (log s' - log s) with t of 1, 1/2, 1/5 and 0, judged by the ELBO.
    Expectations are taken at points m + s u. The u come in pairs +-u on a sphere of radius sqrt(Z),
    in orthogonal directions that `rng_key` rotates. Z pairs are exact for polynomials of degree 3.
    The Jacobian, which costs most, is taken at the first of them alone. Every step of an image has
    the same u, so none makes the ELBO worse there; on fresh noise some images may have lost.

    "adam" takes K gradient steps on fresh samples, as the extended paper does. It takes every q and
    every likelihood. An image keeps its start where the result is no better on a few other samples.

    Args:
      rng_key: of all noise; folded with each image's index, so an error over images covers it.

    Raises:
      FloatingPointError: the bound of an image is NaN or infinite, before or after.

    References:
      Zhang, Hayes, Barber, Generalization Gap in Amortized Inference, NeurIPS 2022 (section 5);
      Khan, Lin, Conjugate-Computation Variational Inference, 2017; Arasaratnam, Haykin, Cubature
      Kalman Filters, 2009.
    """
    check_inputs("refine", vae, params, rng_key, images, gradients=refiner.method == "adam")
    check_positive(batch_size=batch_size)
    check(refiner)
    refined = _refine_all(
        params, rng_key, on_device(images), devices=devices, vae=vae, refiner=refiner,
        batch_size=min(batch_size, count(images)),
    )  # fmt: skip
    refined = refined._replace(start=np.asarray(refined.start), bound=np.asarray(refined.bound))
    check_finite(vae, params, rng_key, images, refined.start)
    check_finite(vae, params, rng_key, images, refined.bound, posteriors=refined.posteriors)
    return refined


def check(refiner: Refiner) -> None:
    """Refuses settings that cannot be used."""
    if refiner.method not in METHODS:
        raise ValueError(f"method is {refiner.method!r}; it must be one of {', '.join(METHODS)}")
    sizes = (refiner.num_samples, refiner.num_judged, refiner.learning_rate)
    if refiner.num_steps < 0 or not all(size > 0 for size in sizes):
        raise ValueError(f"{refiner}; num_steps must be at least 0 and the others positive")


def refine_one(
    vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array, refiner: Refiner
) -> Refined:
    """See `refine`; of one example [*event] and its own key, pure."""
    posterior = vae.encode(params.encoder, x)

    def bound(q: Any, noise: int) -> jax.Array:
        key, own = jax.random.fold_in(rng_key, noise), VAEParams(q, params.decoder)
        return elbo(local_inference(vae), own, key, x, 2 * refiner.num_judged)

    if not refiner.num_steps:
        value = bound(posterior, _REPORT)
        return Refined(posterior, value, value)
    free = to_free(posterior)
    walk = _newton if refiner.method == "newton" else _adam
    moved = walk(vae, params.decoder, rng_key, x, posterior, free, refiner)
    if refiner.method == "adam":
        before, after = (bound(from_free(posterior, each), _CHOICE) for each in (free, moved))
        moved = jax.tree.map(lambda new, old: jnp.where(after > before, new, old), moved, free)
    start, refined = (from_free(posterior, each) for each in (free, moved))
    return Refined(refined, bound(start, _REPORT), bound(refined, _REPORT))


def _newton(
    vae: VAE, decoder: Params, rng_key: jax.Array, x: jax.Array, like: Any, free: list[jax.Array],
    refiner: Refiner,
) -> list[jax.Array]:  # fmt: skip
    """The free parameters after K steps, each judged at the points that it was computed from."""
    dtype = free[0].dtype
    size = len(diagonal_normal(like, "the posterior", _INSTEAD)[0])
    points = _points(rng_key, size, refiner.num_judged).astype(dtype)

    def judge(free: list[jax.Array]) -> jax.Array:
        q = from_free(like, free)
        loc, scale = diagonal_normal(q, "the posterior")
        latents = jax.vmap(lambda u: loc + scale * u)(points)
        return bound_at(vae, decoder, x, q, latents)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        free, value = carry
        q = from_free(like, free)
        target = _full_step(vae, decoder, x, q, points, refiner.num_samples)
        move = lambda size: jax.tree.map(lambda old, new: old + size * (new - old), free, target)
        candidates = jax.vmap(move)(jnp.asarray(_STEP_SIZES, dtype))
        values = jax.vmap(judge)(candidates)
        values = jnp.where(jnp.isfinite(values), values, -jnp.inf)
        best = jnp.argmax(values)
        better = values[best] > value
        pick = lambda old, new: jnp.where(better, new[best], old)
        return (jax.tree.map(pick, free, candidates), jnp.where(better, values[best], value)), None

    return jax.lax.scan(step, (free, judge(free)), None, length=refiner.num_steps)[0][0]


def _full_step(
    vae: VAE, decoder: Params, x: jax.Array, posterior: Any, points: jax.Array, num_pairs: int
) -> list[jax.Array]:
    """The free parameters that a full step leads to; see `refine`."""
    loc, scale = diagonal_normal(posterior, "the posterior")
    _, prior_scale = diagonal_normal(prior_of(vae, decoder), "the prior", _INSTEAD)

    def curvature_at(z: jax.Array) -> jax.Array:
        def known(z: jax.Array) -> Information:
            base = innermost(likelihood := vae.decode(decoder, z))
            return information(base.given(x) if hasattr(base, "given") else likelihood)

        jacobian, fisher = jax.jacfwd(known, has_aux=True)(z)
        size = len(fisher)
        jacobian = jacobian.reshape(size, -1, len(z))
        weighted = jnp.einsum("pqd,qdz->pdz", fisher.reshape(size, size, -1), jacobian)
        return jnp.einsum("pdy,pdz->yz", jacobian, weighted)

    latents = jax.vmap(lambda u: loc + scale * u)(points)
    slope = jax.vmap(jax.grad(lambda z: log_joint(vae, decoder, x, z)))(latents).mean(0)
    curvature = jax.vmap(curvature_at)(latents[: 2 * num_pairs]).mean(0)
    curvature = curvature + jnp.diag(prior_scale**-2)
    new_loc = loc + jax.scipy.linalg.solve(curvature, slope, assume_a="pos")
    return [new_loc.astype(loc.dtype), -0.5 * jnp.log(jnp.diag(curvature)).astype(loc.dtype)]


def _adam(
    vae: VAE, decoder: Params, rng_key: jax.Array, x: jax.Array, like: Any, free: list[jax.Array],
    refiner: Refiner,
) -> list[jax.Array]:  # fmt: skip
    """The free parameters after K steps of Adam, each on S fresh samples."""
    optimizer = adam(refiner.learning_rate)

    def step(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
        free, opt_state = carry
        key = jax.random.fold_in(rng_key, number)
        own = lambda free: VAEParams(from_free(like, free), decoder)
        loss = lambda free: -elbo(local_inference(vae), own(free), key, x, refiner.num_samples)
        updates, opt_state = optimizer.update(jax.grad(loss)(free), opt_state, free)
        return (jax.tree.map(jnp.add, free, updates), opt_state), None

    numbers = jnp.arange(1, refiner.num_steps + 1)  # after that of `_CHOICE`
    (free, _), _ = jax.lax.scan(step, (free, optimizer.init(free)), numbers)
    return free


def _points(rng_key: jax.Array, size: int, num_pairs: int) -> jax.Array:
    """Points [2 P, Z], u and -u in turn, P the lesser of `num_pairs` and Z; see `refine`."""
    directions = jnp.linalg.qr(jax.random.normal(rng_key, (size, size)))[0][:num_pairs]
    return math.sqrt(size) * jnp.stack([directions, -directions], 1).reshape(-1, size)


@parallel.program
def _refine_all(shard, params, rng_key, images, *, vae, refiner, batch_size) -> Refined:
    """`refine_one` of every image."""

    def one(xs: tuple) -> Refined:
        model, x = bind(vae, xs[1])
        return own(refine_one(model, params, jax.random.fold_in(rng_key, xs[0]), x, refiner))

    xs = shard.split((jnp.arange(count(images)), images))
    refined = jax.lax.map(one, xs, batch_size=-(-batch_size // shard.count))
    model, x = bind(vae, take(images, 0))
    shared = refined._replace(posteriors=model.encode(params.encoder, x))
    return with_shared(shard.merge(refined, count(images)), shared)


class Information(NamedTuple):
    """The parameters eta of a likelihood at one z, and the Fisher information of each entry of x.

    It is E[d log p(x)/d eta_i d log p(x)/d eta_j]; the entries are independent given eta.
    """

    parameters: jax.Array  # [P, *event]
    fisher: jax.Array  # [P, P, *event]


def diagonal_normal(
    distribution: Any, role: str, instead: str = "a hierarchy in its non-centred form has one"
) -> tuple[jax.Array, jax.Array]:
    """The mean and the scale, both [Z], of a diagonal Gaussian; the others are for the error."""
    base = innermost(written_out(distribution))
    event_shape = getattr(distribution, "event_shape", ())
    if not isinstance(base, dist.Normal) or len(event_shape) != 1:
        raise TypeError(
            f"{role} is {type_name(distribution)} with event shape {event_shape}; it must be a "
            f"diagonal Gaussian, numpyro.distributions.Normal(loc, scale).to_event(1); {instead}"
        )
    return jnp.asarray(base.loc), jnp.asarray(base.scale)


def information(likelihood: Any) -> Information:
    """Parameters and Fisher information of a likelihood p(x given z) at one z.

    With J = d eta/dz the positive semi-definite

        J' F J = E[grad_z log p(x given z) grad_z log p(x given z)'],   x ~ p(x given z),

    is the Gauss-Newton approximation of the negative Hessian of log p(x given z) by z.

    Of a discretized logistic with more than 12 levels it is the information of 12 cells of
    neighbouring levels: never more than that of the levels, and about a tenth less where the cells
    are half a scale wide.

    References:
      Martens, New Insights and Perspectives on the Natural Gradient Method, 2020.
    """
    base = innermost(written_out(likelihood))
    if isinstance(base, dist.BernoulliLogits):
        logits = jnp.asarray(base.logits)[None]
        mean = jax.nn.sigmoid(logits)
        return Information(logits, (mean * (1.0 - mean))[None])
    if isinstance(base, dist.BernoulliProbs):
        probs = jnp.asarray(base.probs)[None]
        variance = jnp.maximum(probs * (1.0 - probs), jnp.finfo(probs.dtype).tiny)
        return Information(probs, 1.0 / variance[None])
    if isinstance(base, dist.Normal):
        loc, scale = jnp.broadcast_arrays(jnp.asarray(base.loc), jnp.asarray(base.scale))
        precision = scale**-2
        return _by_loc_and_scale(loc, scale, precision, jnp.zeros_like(scale), 2.0 * precision)
    if isinstance(base, DiscretizedLogistic):
        return _logistic_information(base)
    if isinstance(base, dist.Poisson):
        rate = jnp.asarray(base.rate)[None]
        return Information(rate, 1.0 / rate[None])
    if isinstance(base, dist.GammaPoisson):  # the negative binomial, by its mean
        size, rate = (jnp.asarray(x)[None] for x in (base.concentration, base.rate))
        mean = size / rate
        return Information(mean, 1.0 / (mean * (1.0 + mean / size))[None])
    if isinstance(base, dist.MultinomialLogits):  # by log p, as if its counts were independent
        log_probs = jax.nn.log_softmax(jnp.asarray(base.logits))[None]
        return Information(log_probs, jnp.asarray(base.total_count) * jnp.exp(log_probs)[None])
    raise TypeError(
        f"the Fisher information of {type_name(likelihood)} is not known here; a Newton step takes "
        "Bernoulli, Normal, DiscretizedLogistic, Poisson, NegativeBinomial2 and "
        "MultinomialLogits; method='adam' takes every likelihood"
    )


def _logistic_information(likelihood: DiscretizedLogistic) -> Information:
    """See `information`: sum over cells c of P(c) grad log P(c) grad log P(c)'."""
    loc, scale = jnp.broadcast_arrays(*likelihood.in_bins())
    levels, number = likelihood.levels, min(_NUM_CELLS, likelihood.levels)
    width = jnp.clip(jnp.ceil(scale / 2), 1.0, -(-levels // number))
    lowest = jnp.clip(jnp.round(loc) - number / 2 * width, 0.0, levels - number * width)
    steps = jnp.arange(number + 1.0).reshape(-1, *(1,) * loc.ndim)
    edges = jnp.clip(jnp.floor(lowest[None] + steps * width[None]), 0, levels)
    edges = jax.lax.stop_gradient(edges.at[0].set(0).at[-1].set(levels))
    first, last = edges[:-1], jnp.maximum(edges[1:] - 1, edges[:-1])

    def log_prob(loc: jax.Array, scale: jax.Array) -> jax.Array:
        cells = DiscretizedLogistic(
            loc / bins, scale / bins, levels, uniform_weight=likelihood.uniform_weight
        )
        return cells.log_prob_between(first, last)

    bins = levels - 1
    zeros, ones = jnp.zeros_like(loc), jnp.ones_like(loc)
    log_probs, by_loc = jax.jvp(log_prob, (loc, scale), (ones, zeros))
    by_scale = jax.jvp(log_prob, (loc, scale), (zeros, ones))[1]
    probs = jnp.exp(log_probs)
    used = (edges[1:] > edges[:-1]) & (probs > 0)

    def mean(first: jax.Array, second: jax.Array) -> jax.Array:
        return jnp.where(used, probs * first * second, 0.0).sum(0)

    return _by_loc_and_scale(
        loc, scale, mean(by_loc, by_loc), mean(by_loc, by_scale), mean(by_scale, by_scale)
    )


def _by_loc_and_scale(loc, scale, by_loc, mixed, by_scale) -> Information:
    rows = [jnp.stack([by_loc, mixed]), jnp.stack([mixed, by_scale])]
    return Information(jnp.stack([loc, scale]), jnp.stack(rows))
