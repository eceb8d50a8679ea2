"""Test-time inference: an encoder's posterior of each image, improved by a few steps of its own.

Between the encoder, which costs one pass, and `optimal_posteriors`, which costs hundreds. All is
deterministic: equal arguments give equal bits. The mathematics is written for one example;
`_refine_shard` is where images are vmapped and divided among the devices.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gapjax import parallel
from gapjax.fit.optimizers import adam
from gapjax.measure.per_image import Images
from gapjax.model.bounds import bound_at, elbo, log_joint
from gapjax.model.checks import check_inputs, check_reparameterized
from gapjax.model.distributions import from_free, to_free
from gapjax.model.families import diagonal_normal, information
from gapjax.model.vae import VAE, Params, VAEParams, local_inference

METHODS = ("newton", "adam")
_STEP_SIZES = (1.0, 0.5, 0.2)
_MAX_PROGRAMS = 64  # see `executor`


class Refiner(NamedTuple):
    """How a posterior is improved.

    Attributes:
      method: "newton", damped Gauss-Newton steps with a line search, or "adam", the steps of the
        extended paper.
      num_steps: K; with 0 the posterior is the encoder's.
      num_samples: of Adam, samples in each gradient; of Newton's method, pairs of points +-u at
        which the decoder's Jacobian is taken.
      num_judged: pairs of points +-u at which Newton's method takes gradients and its line search
        judges, at most Z; half the samples of `Refined.bound` with Adam.
      learning_rate: of Adam, on the free parameters of q (see `distributions.to_free`).
    """

    method: str = "newton"
    num_steps: int = 2
    num_samples: int = 1
    num_judged: int = 6
    learning_rate: float = 5e-3


class Refined(NamedTuple):
    """The improved posteriors of N images.

    Attributes:
      posteriors: a pytree as `encode` returns it, every leaf with a leading axis [N].
      start: [N] float32, ELBO of the encoder's posterior at the points of the judgement, nats.
      bound: [N] float32, ELBO of the improved one at the same points. With Newton's method it is
        never below `start`.
    """

    posteriors: Any
    start: np.ndarray | jax.Array
    bound: np.ndarray | jax.Array


def refine(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    images: Images,
    refiner: Refiner = Refiner(),  # noqa: B008 (an immutable tuple)
    *,
    batch_size: int = 50,
    devices: parallel.Devices | None = None,
) -> Refined:
    """Improves the encoder's q(z given x) for each image by itself, with the decoder frozen.

    Newton's method takes q = N(m, diag(s^2)) and a prior N(m0, diag(s0^2)). With J(z) the
    decoder's Jacobian and F(z) the likelihood's Fisher information, a step computes

        H = E_q[J' F J] + diag(s0^-2),   g = E_q[grad_z log p(x given z)] - (m - m0) / s0^2,
        m' = m + H^-1 g,   s'_i = H_ii^(-1/2),

    which is the optimum where log p(x, z) is quadratic in z: in a linear Gaussian model one step
    gives the best diagonal q, which is the exact posterior if that is diagonal. The new (m, log s)
    is the best of m + t (m' - m), log s + t (log s' - log s) with t of 1, 1/2, 1/5 and 0, judged
    by the ELBO. Expectations are taken at points m + s u. The u come in pairs +-u on a sphere of
    radius sqrt(Z), in orthogonal directions that `rng_key` rotates. Z pairs are exact for
    polynomials of degree 3. The Jacobian, which costs most, is taken at the first of them alone.
    Every step and every image has the same u. So no step makes the ELBO worse at these points,
    and on fresh noise it is worse by no more than their error.

    "adam" takes K gradient steps on fresh samples, without a judgement, as the extended paper
    does. It takes every q and every likelihood.

    Args:
      vae: the model.
      params: its parameters; they are not changed.
      rng_key: of the points, and of Adam's samples, which depend on the step and not on the image.
      images: [N, *event].
      refiner: which steps, and how many.
      batch_size: images at once; bounds memory.
      devices: among which the images are divided; all by default.

    Returns:
      `Refined`.

    Raises:
      ValueError: an unknown method, a size that is not positive, or as of `evaluate`.
      TypeError: a posterior, a prior or a likelihood that Newton's method does not take, or as of
        `evaluate`.

    References:
      Zhang, Hayes, Barber, Generalization Gap in Amortized Inference, NeurIPS 2022 (section 5);
      Khan, Lin, Conjugate-Computation Variational Inference, 2017; Arasaratnam, Haykin, Cubature
      Kalman Filters, 2009.
    """
    model = check_inputs("refine", vae, params, rng_key, images)
    if model is not None and refiner.method == "adam":
        check_reparameterized(model)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be positive")
    check(refiner)
    devices = parallel.all_devices(devices)
    program = _program(vae, refiner, min(batch_size, len(images)), devices)
    arrays = parallel.replicate((params, rng_key, jnp.asarray(images)), devices, commit=False)
    refined = parallel.unreplicate(program(None, *arrays))
    return Refined(refined.posteriors, np.asarray(refined.start), np.asarray(refined.bound))


def check(refiner: Refiner) -> None:
    """Raises ValueError for settings that cannot be used."""
    if refiner.method not in METHODS:
        raise ValueError(f"method is {refiner.method!r}; it must be one of {', '.join(METHODS)}")
    sizes = (refiner.num_samples, refiner.num_judged, refiner.learning_rate)
    if refiner.num_steps < 0 or not all(size > 0 for size in sizes):
        raise ValueError(f"{refiner}; num_steps must be at least 0 and the others positive")


def refine_one(
    vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array, refiner: Refiner
) -> Refined:
    """See `refine`; of one example [*event], pure."""
    posterior = vae.encode(params.encoder, x)
    free = to_free(posterior)
    if refiner.method == "adam":
        elbo_of = lambda free: _elbo(
            vae, params.decoder, jax.random.fold_in(rng_key, 0), x, from_free(posterior, free),
            2 * refiner.num_judged,
        )  # fmt: skip
        moved = _adam(vae, params.decoder, rng_key, x, posterior, free, refiner)
        return Refined(from_free(posterior, moved), elbo_of(free), elbo_of(moved))
    points = _points(rng_key, vae.prior.event_shape[0], refiner.num_judged)

    def judge(free: list[jax.Array]) -> jax.Array:
        q = from_free(posterior, free)
        loc, scale = diagonal_normal(q, "the posterior")
        latents = jax.vmap(lambda u: loc + scale * u)(points)
        return bound_at(vae, params.decoder, x, q, latents)

    start = judge(free)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        free, value = carry
        q = from_free(posterior, free)
        target = _newton(vae, params.decoder, x, q, points, refiner.num_samples)
        sizes = jnp.asarray(_STEP_SIZES)
        move = lambda size: jax.tree.map(lambda old, new: old + size * (new - old), free, target)
        candidates = jax.vmap(move)(sizes)
        values = jax.vmap(judge)(candidates)
        values = jnp.where(jnp.isfinite(values), values, -jnp.inf)
        best = jnp.argmax(values)
        better = values[best] > value
        pick = lambda old, new: jnp.where(better, new[best], old)
        return (jax.tree.map(pick, free, candidates), jnp.where(better, values[best], value)), None

    (free, bound), _ = jax.lax.scan(step, (free, start), None, length=refiner.num_steps)
    return Refined(from_free(posterior, free), start, bound)


def _newton(
    vae: VAE, decoder: Params, x: jax.Array, posterior: Any, points: jax.Array, num_pairs: int
) -> list[jax.Array]:
    """The free parameters that a full step leads to; see `refine`."""
    loc, scale = diagonal_normal(posterior, "the posterior")
    _, prior_scale = diagonal_normal(vae.prior, "the prior")

    def curvature_at(z: jax.Array) -> jax.Array:
        def outputs(z: jax.Array) -> tuple[jax.Array, jax.Array]:
            known = information(vae.decode(decoder, z))
            return known.parameters, known.fisher

        jacobian, fisher = jax.jacfwd(outputs, has_aux=True)(z)
        size = len(fisher)
        jacobian = jacobian.reshape(size, -1, len(z))
        weighted = jnp.einsum("pqd,qdz->pdz", fisher.reshape(size, size, -1), jacobian)
        return jnp.einsum("pdy,pdz->yz", jacobian, weighted)

    latents = jax.vmap(lambda u: loc + scale * u)(points)
    slope = jax.vmap(jax.grad(lambda z: log_joint(vae, decoder, x, z)))(latents).mean(0)
    curvature = jax.vmap(curvature_at)(latents[: 2 * num_pairs]).mean(0)
    curvature = curvature + jnp.diag(prior_scale**-2)
    new_loc = loc + jax.scipy.linalg.solve(curvature, slope, assume_a="pos")
    return [new_loc, -0.5 * jnp.log(jnp.diag(curvature))]


def _adam(
    vae: VAE,
    decoder: Params,
    rng_key: jax.Array,
    x: jax.Array,
    like: Any,
    free: list[jax.Array],
    refiner: Refiner,
) -> list[jax.Array]:
    """The free parameters after K steps of Adam, each on S fresh samples."""
    optimizer = adam(refiner.learning_rate)

    def step(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
        free, opt_state = carry
        key = jax.random.fold_in(rng_key, number)
        loss = lambda free: -_elbo(vae, decoder, key, x, from_free(like, free), refiner.num_samples)
        updates, opt_state = optimizer.update(jax.grad(loss)(free), opt_state, free)
        return (jax.tree.map(jnp.add, free, updates), opt_state), None

    numbers = jnp.arange(1, refiner.num_steps + 1)  # the judgement has the number 0
    (free, _), _ = jax.lax.scan(step, (free, optimizer.init(free)), numbers)
    return free


def _elbo(
    vae: VAE, decoder: Params, rng_key: jax.Array, x: jax.Array, posterior: Any, num_samples: int
) -> jax.Array:
    """The ELBO of one example with its own q on the samples of this key, nats."""
    return elbo(local_inference(vae), VAEParams(posterior, decoder), rng_key, x, num_samples)


def _points(rng_key: jax.Array, size: int, num_pairs: int) -> jax.Array:
    """Points [2 P, Z], u and -u in turn, P the lesser of `num_pairs` and Z; see `refine`."""
    directions = jnp.linalg.qr(jax.random.normal(rng_key, (size, size)))[0][:num_pairs]
    return math.sqrt(size) * jnp.stack([directions, -directions], 1).reshape(-1, size)


# Bounded, because the programs hold the models for which they were compiled.
@functools.lru_cache(_MAX_PROGRAMS)
def _program(vae, refiner, batch_size, devices):
    """The compiled `_refine_shard` of these constants."""
    function = functools.partial(_refine_shard, vae=vae, refiner=refiner, batch_size=batch_size)
    return parallel.data_parallel(function, devices)


def _refine_shard(shard, donated, params, rng_key, images, *, vae, refiner, batch_size) -> Refined:
    """`refine_one` of every image."""
    del donated
    one = lambda x: refine_one(vae, params, rng_key, x, refiner)
    refined = jax.lax.map(one, shard.split(images), batch_size=-(-batch_size // shard.count))
    return shard.merge(refined, len(images))
