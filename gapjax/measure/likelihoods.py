"""log p(x) from below and, on data simulated from the model, from above.

The mathematics is that of one example; `log_likelihood` and `sandwich` are where images are
vmapped. Weights are kept in log space, and memory is that of one chunk of samples (and the
keys of all) or one set of chains for `batch_size` images, whatever the number of images.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gapjax import parallel
from gapjax.measure.per_image import Images
from gapjax.measure.statistics import mean_and_stderr
from gapjax.model.arguments import check_concrete, check_key
from gapjax.model.bounds import log_joint, sample_and_log_prob
from gapjax.model.checks import check_local, check_model
from gapjax.model.vae import (
    VAE,
    VAEParams,
    library_promotion,
    local_inference,
    log_prob,
    sample_model,
)
from gapjax.model.vae import sample as vae_sample

_MAX_PROGRAMS = 64  # that are kept; they hold the models for which they were compiled


class Annealing(NamedTuple):
    """The path from q(z given x) to p(z given x), and how it is walked.

        f_b(z) = q(z given x)^(1 - b) p(x, z)^b,   0 = b_0 < b_1 < ... < b_T = 1

    Attributes:
      num_temperatures: T.
      num_chains: C, independent chains for each image.
      num_leapfrog: steps of each Hamiltonian trajectory.
      step_size: of the first one, in standard deviations of q; a pilot run of half the chains
        adapts it along the path to `acceptance`, and all chains use what the pilot found.
      acceptance: the acceptance rate that the pilot aims at.
    """

    num_temperatures: int = 70
    num_chains: int = 8
    num_leapfrog: int = 4
    step_size: float = 0.5
    acceptance: float = 0.75


class LogLikelihood(NamedTuple):
    """Estimates of log p(x), of one example or of N.

    Attributes:
      log_prob: [N] nats; the mean of its exponential is p(x), so its own mean is not above
        log p(x).
      ess: [N] effective number of samples (or chains) behind it, (sum w)^2 / sum w^2.
      acceptance: [N] mean acceptance rate of the chains; NaN where there are none.
    """

    log_prob: ArrayLike
    ess: ArrayLike
    acceptance: ArrayLike


class Sandwich(NamedTuple):
    """Bounds of log p(x) from both sides on data simulated from the model.

    Attributes:
      images: [N, *event], the simulated images.
      lower: [N] nats, by annealed importance sampling; on average not above log p(x).
      upper: [N] nats, by the reverse chain from the exact posterior; on average not below it.
      gap: mean of upper minus lower, nats: no estimate is further from the truth, on average.
      gap_stderr: standard error of `gap` over the images.
      ess: [N] effective number of chains of the lower bound.
      acceptance: [N] mean acceptance rate of its chains.
    """

    images: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    gap: float
    gap_stderr: float
    ess: np.ndarray
    acceptance: np.ndarray


def importance_sampling(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    x: jax.Array,
    num_samples: int = 5000,
    chunk_size: int = 250,
) -> LogLikelihood:
    """The importance-weighted bound of one example with any number of samples.

        log (1/S) sum_s p(x, z_s) / q(z_s given x),   z_s ~ q(z given x)

    Args:
      vae: the model.
      params: its parameters.
      rng_key: folded with each sample's number.
      x: one example [*event], as stored.
      num_samples: S.
      chunk_size: samples at once; bounds memory and, but for rounding, changes nothing else.

    Returns:
      A `LogLikelihood` of scalars; `log_prob` is what `importance_weighted_bound` estimates.

    References:
      Burda, Grosse, Salakhutdinov, Importance Weighted Autoencoders, 2016.
    """
    posterior = vae.encode(params.encoder, x)
    chunk_size = min(chunk_size, num_samples)

    def log_weight(sample_key: jax.Array, number: jax.Array) -> jax.Array:
        z, log_q = sample_and_log_prob(posterior, sample_key)
        value = log_joint(vae, params.decoder, x, z) - log_q
        return jnp.where(number < num_samples, value, -jnp.inf)

    def add(sums: tuple, xs: tuple) -> tuple[tuple, None]:
        log_weights = jax.vmap(log_weight)(*xs)
        return _add_weights(sums, log_weights), None

    numbers = jnp.arange(-(-num_samples // chunk_size) * chunk_size)
    keys = jax.vmap(lambda number: jax.random.fold_in(rng_key, number))(numbers)
    chunks = keys.reshape(-1, chunk_size), numbers.reshape(-1, chunk_size)
    (log_sum, log_squares), _ = jax.lax.scan(add, (-jnp.inf, -jnp.inf), chunks)
    ess = jnp.exp(2 * log_sum - log_squares)
    return LogLikelihood(log_sum - math.log(num_samples), ess, jnp.full((), jnp.nan))


def annealed_importance_sampling(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    x: jax.Array,
    annealing: Annealing = Annealing(),  # noqa: B008 (an immutable tuple)
) -> LogLikelihood:
    """Annealed importance sampling of one example, from q(z given x) to p(z given x).

    Hamiltonian transitions leave each f_b of the path invariant (see `Annealing`), and a chain
    z_0, ..., z_(T-1) has the weight

        log w = sum_t log f_(b_t)(z_(t-1)) - log f_(b_(t-1))(z_(t-1)),   E[w] = p(x).

    The step sizes are adapted on a pilot run with noise of its own, so E[w] = p(x) is exact.

    Args:
      vae: the model; its latents may be of any shape but must be unconstrained reals.
      params: its parameters.
      rng_key: of the pilot run and the chains.
      x: one example [*event], as stored.
      annealing: the path.

    Returns:
      A `LogLikelihood` of scalars: log of the mean weight of the chains.

    References:
      Neal, Annealed Importance Sampling, 2001; Wu et al., On the Quantitative Analysis of
      Decoder-Based Generative Models, 2017.
    """
    path = _path(vae, params, rng_key, x, annealing)
    log_weights, acceptance = _forward(path, jax.random.fold_in(rng_key, 1), annealing.num_chains)
    log_sum, log_squares = _add_weights((-jnp.inf, -jnp.inf), log_weights)
    log_prob = log_sum - math.log(annealing.num_chains)
    return LogLikelihood(log_prob, jnp.exp(2 * log_sum - log_squares), acceptance)


def reverse_annealing(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    x: jax.Array,
    z: jax.Array,
    annealing: Annealing = Annealing(),  # noqa: B008 (an immutable tuple)
) -> jax.Array:
    """The path of `annealed_importance_sampling` walked back from an exact posterior sample.

    The chains all start at `z`. Their weights have the mean 1 / p(x) where z ~ p(z given x), so
    minus the log of their mean is, on average, not below log p(x).

    Args:
      vae: the model.
      params: its parameters.
      rng_key: as given to `annealed_importance_sampling`, whose step sizes are then used here.
      x: one example [*event]; simulated from the model together with `z`.
      z: its latent: exact posterior samples are known for simulated data alone.
      annealing: the path.

    Returns:
      A scalar, nats.

    References:
      Grosse, Ancha, Roy, Measuring the Reliability of MCMC Inference with Bidirectional Monte
      Carlo, 2016.
    """
    path = _path(vae, params, rng_key, x, annealing)
    log_weights = _backward(path, jax.random.fold_in(rng_key, 2), z, annealing.num_chains)
    return math.log(annealing.num_chains) - jax.nn.logsumexp(log_weights)


def log_likelihood(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    images: Images,
    *,
    posteriors: Any = None,
    method: str | Annealing = "importance",
    num_samples: int = 5000,
    chunk_size: int = 250,
    batch_size: int = 20,
    devices: parallel.Devices | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> LogLikelihood:
    """Estimates of log p(x) for every image of a set.

    Args:
      vae: the model.
      params: its parameters.
      rng_key: folded with each image's index.
      images: [N, *event].
      posteriors: a q for every image, as `optimal_posteriors` finds them, a pytree with a leading
        axis [N]; what the encoder gives by default. A better q makes a tighter bound.
      method: "importance", or an `Annealing`.
      num_samples: S of importance sampling.
      chunk_size: samples at once for an image.
      batch_size: images at once; with `chunk_size` it bounds memory and changes nothing else.
      devices: among which the images of a batch are divided; all by default.
      on_progress: called with the number of images that are done.

    Returns:
      A `LogLikelihood` of NumPy arrays [N].

    Raises:
      ValueError: a size that is not positive, an unknown method, or as of `evaluate`.
      TypeError: as of `evaluate`.
    """
    annealing = method if isinstance(method, Annealing) else None
    if annealing is None and method != "importance":
        raise ValueError(f"method is {method!r}; it must be 'importance' or an Annealing")
    check_local("log_likelihood", vae, params, rng_key, images, posteriors)
    if min(num_samples, chunk_size, batch_size, *(annealing or ())) <= 0:
        raise ValueError(
            f"num_samples {num_samples}, chunk_size {chunk_size}, batch_size {batch_size} and "
            f"{method} must be positive"
        )
    devices = parallel.all_devices(devices)
    inference = params.encoder if posteriors is None else posteriors
    arrays = parallel.replicate(
        (inference, params.decoder, rng_key, jnp.asarray(images)), devices, commit=False
    )
    program = _log_likelihood_program(
        vae, annealing, posteriors is not None, num_samples, chunk_size, devices
    )
    batch_size = min(batch_size, len(images))
    parts = []
    for start in range(0, len(images), batch_size):
        batch = np.minimum(np.arange(start, start + batch_size), len(images) - 1)
        part = program(None, *arrays, parallel.replicate(batch, devices, commit=False))
        parts.append(parallel.unreplicate(part))
        if on_progress is not None:
            jax.block_until_ready(parts[-1])
            on_progress(min(start + batch_size, len(images)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(images)], *parts)


def sandwich(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    num_images: int,
    *,
    annealing: Annealing = Annealing(),  # noqa: B008 (an immutable tuple)
    batch_size: int = 20,
    devices: parallel.Devices | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Sandwich:
    """Bidirectional Monte Carlo: log p(x) of simulated images from both sides.

    How well annealing with these settings works on this model: the truth lies between the two.

    Args:
      vae: the model.
      params: its parameters.
      rng_key: folded with each image's index.
      num_images: N, how many to simulate: z ~ p(z), x ~ p(x given z).
      annealing: the path.
      batch_size: images at once; bounds memory and changes nothing else.
      devices: among which the images of a batch are divided; all by default.
      on_progress: called with the number of images that are done.

    Returns:
      A `Sandwich`.

    Raises:
      ValueError: a size that is not positive.

    References:
      Grosse, Ghahramani, Adams, Sandwiching the Marginal Likelihood Using Bidirectional Monte
      Carlo, 2015.
    """
    if min(num_images, batch_size, *annealing) <= 0:
        raise ValueError(
            f"num_images {num_images}, batch_size {batch_size} and {annealing} must be positive"
        )
    check_concrete("sandwich", "there use reverse_annealing", params=params, rng_key=rng_key)
    check_key(rng_key)
    check_model(
        vae, params, jax.eval_shape(functools.partial(sample_model, vae), params.decoder, rng_key)
    )
    devices = parallel.all_devices(devices)
    arrays = parallel.replicate((params, rng_key), devices, commit=False)
    program = _sandwich_program(vae, annealing, devices)
    batch_size = min(batch_size, num_images)
    parts = []
    for start in range(0, num_images, batch_size):
        batch = start + np.arange(batch_size)
        part = program(None, *arrays, parallel.replicate(batch, devices, commit=False))
        parts.append(parallel.unreplicate(part))
        if on_progress is not None:
            jax.block_until_ready(parts[-1])
            on_progress(min(start + batch_size, num_images))
    images, upper, lower = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num_images], *parts)
    gap, gap_stderr = mean_and_stderr(np.asarray(upper, np.float64) - lower.log_prob)
    return Sandwich(
        images=images,
        lower=lower.log_prob,
        upper=upper,
        gap=gap,
        gap_stderr=gap_stderr,
        ess=lower.ess,
        acceptance=lower.acceptance,
    )


@functools.lru_cache(_MAX_PROGRAMS)
def _log_likelihood_program(vae, annealing, local, num_samples, chunk_size, devices):
    """The compiled `_log_likelihoods` of these constants."""
    function = functools.partial(
        _log_likelihoods, vae=vae, annealing=annealing, local=local, num_samples=num_samples,
        chunk_size=chunk_size,
    )  # fmt: skip
    return parallel.data_parallel(function, devices)


@functools.lru_cache(_MAX_PROGRAMS)
def _sandwich_program(vae, annealing, devices):
    """The compiled `_sandwiches` of these constants."""
    function = functools.partial(_sandwiches, vae=vae, annealing=annealing)
    return parallel.data_parallel(function, devices)


def _log_likelihoods(
    shard, donated, inference, decoder, rng_key, images, batch,
    *, vae, annealing, local, num_samples, chunk_size,
) -> LogLikelihood:  # fmt: skip
    """Estimates for the images of `batch`; `inference` is an encoder or a q for each image."""
    del donated

    def one(index: jax.Array) -> LogLikelihood:
        own = jax.tree.map(lambda leaf: leaf[index], inference) if local else inference
        model, params = local_inference(vae) if local else vae, VAEParams(own, decoder)
        image_key = jax.random.fold_in(rng_key, index)
        if annealing is None:
            return importance_sampling(
                model, params, image_key, images[index], num_samples, chunk_size
            )
        return annealed_importance_sampling(model, params, image_key, images[index], annealing)

    return _vmap_shares(shard, one, batch)


def _sandwiches(shard, donated, params, rng_key, batch, *, vae, annealing) -> tuple:
    """The simulated images of these indices, their upper and their lower estimates."""
    del donated

    def one(index: jax.Array) -> tuple[jax.Array, jax.Array, LogLikelihood]:
        latent_key, pixel_key, chain_key = jax.random.split(jax.random.fold_in(rng_key, index), 3)
        z = vae_sample(vae.prior, latent_key)
        x = vae_sample(vae.decode(params.decoder, z), pixel_key)
        upper = reverse_annealing(vae, params, chain_key, x, z, annealing)
        return x, upper, annealed_importance_sampling(vae, params, chain_key, x, annealing)

    return _vmap_shares(shard, one, batch)


def _vmap_shares(shard: parallel.Shard, one: Callable, batch: jax.Array) -> Any:
    """`one` of every index of a batch [B], divided among the devices."""
    return shard.merge(jax.vmap(one)(shard.split(batch)), len(batch))


class _Path(NamedTuple):
    """A path of densities of z as a flat vector, with the transitions that go along it.

    Attributes:
      start: `start(rng_key) -> z [D]`, from f_0 = q.
      difference: z [D] -> log f_1(z) - log f_0(z).
      transition: `transition(rng_key, z, temperature, step_size) -> z, acceptance`.
      temperatures: [T + 1].
      step_sizes: [T], of the transition at temperatures[1:].
    """

    start: Callable
    difference: Callable
    transition: Callable
    temperatures: jax.Array
    step_sizes: jax.Array


def _path(
    vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array, annealing: Annealing
) -> _Path:
    """The path of one example; a pilot run finds its step sizes. A function of its arguments."""
    import blackjax  # here and not above: it takes a second to load

    posterior = vae.encode(params.encoder, x)
    spread_key, pilot_key = jax.random.split(jax.random.fold_in(rng_key, 0))
    draw = functools.partial(vae_sample, posterior)
    shape = jax.eval_shape(draw, rng_key).shape
    sample = lambda sample_key: draw(sample_key).ravel()
    draws = jax.vmap(sample)(jax.random.split(spread_key, 100))
    kernel = blackjax.hmc.build_kernel()

    def difference(z: jax.Array) -> jax.Array:
        z = z.reshape(shape)
        return log_joint(vae, params.decoder, x, z) - log_prob(posterior, z)

    def transition(step_key, z, temperature, step_size) -> tuple[jax.Array, jax.Array]:
        def log_density(z: jax.Array) -> jax.Array:
            z = z.reshape(shape)
            log_p = log_joint(vae, params.decoder, x, z)
            return temperature * log_p + (1 - temperature) * log_prob(posterior, z)

        with library_promotion():
            state = blackjax.hmc.init(z, log_density)
            state, info = kernel(
                step_key, state, log_density, step_size, draws.var(0), annealing.num_leapfrog
            )
        return state.position, info.acceptance_rate

    path = _Path(
        start=sample,
        difference=difference,
        transition=transition,
        temperatures=jnp.linspace(0.0, 1.0, annealing.num_temperatures + 1),
        step_sizes=jnp.full(annealing.num_temperatures, annealing.step_size),
    )
    return path._replace(step_sizes=_pilot(path, pilot_key, annealing))


def _pilot(path: _Path, rng_key: jax.Array, annealing: Annealing) -> jax.Array:
    """Step sizes [T] for the path, from a run that steers towards the acceptance wanted."""
    start_key, chain_key = jax.random.split(rng_key)
    num_chains = -(-annealing.num_chains // 2)
    z = jax.vmap(path.start)(jax.random.split(start_key, num_chains))

    def step(carry: tuple, xs: tuple) -> tuple[tuple, jax.Array]:
        z, step_size = carry
        temperature, number = xs
        keys = jax.random.split(jax.random.fold_in(chain_key, number), num_chains)
        move = jax.vmap(path.transition, (0, 0, None, None))
        z, acceptance = move(keys, z, temperature, step_size)
        mean = jnp.nan_to_num(acceptance.mean())
        following = step_size * jnp.exp(0.5 * (mean - annealing.acceptance))
        return (z, following), step_size

    numbers = jnp.arange(annealing.num_temperatures)
    _, step_sizes = jax.lax.scan(step, (z, path.step_sizes[0]), (path.temperatures[1:], numbers))
    return step_sizes


def _forward(path: _Path, rng_key: jax.Array, num_chains: int) -> tuple[jax.Array, jax.Array]:
    """Log weights [C] of chains from q to the posterior, and their mean acceptance rate."""
    start_key, chain_key = jax.random.split(rng_key)
    z = jax.vmap(path.start)(jax.random.split(start_key, num_chains))

    def step(carry: tuple, xs: tuple) -> tuple[tuple, jax.Array]:
        z, log_weights = carry
        previous, temperature, step_size, number = xs
        log_weights += (temperature - previous) * jax.vmap(path.difference)(z)
        keys = jax.random.split(jax.random.fold_in(chain_key, number), num_chains)
        move = jax.vmap(path.transition, (0, 0, None, None))
        z, acceptance = move(keys, z, temperature, step_size)
        return (z, log_weights), acceptance.mean()

    (_, log_weights), acceptance = jax.lax.scan(step, (z, jnp.zeros(num_chains)), _steps(path))
    return log_weights, acceptance.mean()


def _backward(path: _Path, rng_key: jax.Array, z: jax.Array, num_chains: int) -> jax.Array:
    """Log weights [C] of chains from one exact posterior sample back to q."""
    z = jnp.broadcast_to(z.ravel()[None], (num_chains, z.size))

    def step(carry: tuple, xs: tuple) -> tuple[tuple, None]:
        z, log_weights = carry
        previous, temperature, step_size, number = xs
        keys = jax.random.split(jax.random.fold_in(rng_key, number), num_chains)
        move = jax.vmap(path.transition, (0, 0, None, None))
        z, _ = move(keys, z, temperature, step_size)
        log_weights += (previous - temperature) * jax.vmap(path.difference)(z)
        return (z, log_weights), None

    start = z, jnp.zeros(num_chains)
    (_, log_weights), _ = jax.lax.scan(step, start, _steps(path), reverse=True)
    return log_weights


def _steps(path: _Path) -> tuple[jax.Array, ...]:
    """For every transition: the temperature before, its own, its step size and its number."""
    temperatures, step_sizes = path.temperatures, path.step_sizes
    return temperatures[:-1], temperatures[1:], step_sizes, jnp.arange(len(step_sizes))


def _add_weights(sums: tuple, log_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adds weights to running sums of them and of their squares, all in log space."""
    log_sum, log_squares = sums
    return (
        jnp.logaddexp(log_sum, jax.nn.logsumexp(log_weights)),
        jnp.logaddexp(log_squares, jax.nn.logsumexp(2 * log_weights)),
    )
