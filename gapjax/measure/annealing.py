"""log p(x) of one example by annealing: from below, and on simulated data from above."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from gapjax.measure.importance import LogLikelihood, add_weights
from gapjax.model.bounds import log_joint
from gapjax.vae import VAE, VAEParams, log_prob
from gapjax.vae import sample as vae_sample


class Annealing(NamedTuple):
    """The path from q(z given x) to p(z given x), and how it is walked.

        f_b(z) = q(z given x)^(1 - b) p(x, z)^b,   0 = b_0 < b_1 < ... < b_T = 1

    Independent chains go along it by Hamiltonian trajectories.
    """

    num_temperatures: int = 70  # T
    num_chains: int = 8  # C, independent chains for each image
    num_leapfrog: int = 4  # steps of each Hamiltonian trajectory
    step_size: float = 0.5  # the first, in standard deviations of q
    acceptance: float = 0.75  # to which a pilot run of half the chains adapts it along the path


def annealed_importance_sampling(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    x: jax.Array,
    annealing: Annealing = Annealing(),  # noqa: B008 (an immutable tuple)
) -> LogLikelihood:
    """Annealed importance sampling of one example along the path of `Annealing`.

    Hamiltonian transitions leave each f_b invariant, and a chain z_0, ..., z_(T-1) has the weight

        log w = sum_t log f_(b_t)(z_(t-1)) - log f_(b_(t-1))(z_(t-1)),   E[w] = p(x).

    The pilot run has noise of its own, so E[w] = p(x) is exact. z is any pytree of
    unconstrained reals. `log_prob` is the log of the mean weight.

    References:
      Neal, Annealed Importance Sampling, 2001; Wu et al., On the Quantitative Analysis of
      Decoder-Based Generative Models, 2017.
    """
    path = _path(vae, params, rng_key, x, annealing)
    log_weights, acceptance = _forward(path, jax.random.fold_in(rng_key, 1), annealing.num_chains)
    log_sum, log_squares = add_weights((-jnp.inf, -jnp.inf), log_weights)
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
    """The path of `annealed_importance_sampling` walked back from an exact posterior sample z.

    The chains all start at `z`, which is known for simulated data alone. Their weights have the
    mean 1 / p(x) where z ~ p(z given x), so minus the log of their mean is, on average, not below
    log p(x). With the key of `annealed_importance_sampling` the step sizes are the same.

    References:
      Grosse, Ancha, Roy, Measuring the Reliability of MCMC Inference with Bidirectional Monte
      Carlo, 2016.
    """
    path = _path(vae, params, rng_key, x, annealing)
    log_weights = _backward(path, jax.random.fold_in(rng_key, 2), z, annealing.num_chains)
    return math.log(annealing.num_chains) - jax.nn.logsumexp(log_weights)


class _Path(NamedTuple):
    """A path of densities of z as a flat vector [D], with the transitions that go along it."""

    start: Callable  # samples f_0 = q
    difference: Callable  # log f_1 - log f_0
    transition: Callable
    temperatures: jax.Array  # [T + 1]
    step_sizes: jax.Array  # [T], of the transitions at temperatures[1:]


def _path(
    vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array, annealing: Annealing
) -> _Path:
    """The path of one example; a pilot run finds its step sizes."""
    import blackjax  # here and not above: it takes a second to load

    posterior = vae.encode(params.encoder, x)
    spread_key, pilot_key = jax.random.split(jax.random.fold_in(rng_key, 0))
    draw = functools.partial(vae_sample, posterior)
    like = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(draw, rng_key))
    unravel = ravel_pytree(like)[1]
    sample = lambda sample_key: ravel_pytree(draw(sample_key))[0]
    draws = jax.vmap(sample)(jax.random.split(spread_key, 100))
    kernel = blackjax.hmc.build_kernel()

    def difference(z: jax.Array) -> jax.Array:
        z = unravel(z)
        return log_joint(vae, params.decoder, x, z) - log_prob(posterior, z)

    def transition(step_key, z, temperature, step_size) -> tuple[jax.Array, jax.Array]:
        def log_density(z: jax.Array) -> jax.Array:
            z = unravel(z)
            log_p = log_joint(vae, params.decoder, x, z)
            return temperature * log_p + (1 - temperature) * log_prob(posterior, z)

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
    z = jnp.tile(ravel_pytree(z)[0], (num_chains, 1))

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
