"""What refinement and the codec ask of NumPyro's distributions, by their families.

Each function refuses a family that it does not know, by name.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from gapjax.model.distributions import DiscretizedLogistic

_NUM_CELLS = 12


class Information(NamedTuple):
    """The parameters of a likelihood at one z, and the Fisher information of x about them.

    Attributes:
      parameters: eta [P, *event]; the entries of x are independent given eta.
      fisher: [P, P, *event], E[d log p(x)/d eta_i d log p(x)/d eta_j] of each entry of x.
    """

    parameters: jax.Array
    fisher: jax.Array


def diagonal_normal(distribution: Any, role: str) -> tuple[jax.Array, jax.Array]:
    """The mean and the scale, both [Z], of a diagonal Gaussian over one vector.

    Args:
      distribution: `numpyro.distributions.Normal(loc, scale).to_event(1)`.
      role: what it is in the model, for the error.

    Raises:
      TypeError: it is anything else.
    """
    base = _base(distribution)
    event_shape = tuple(getattr(distribution, "event_shape", ()))
    if not isinstance(base, dist.Normal) or len(event_shape) != 1:
        raise TypeError(
            f"{role} is {_name(distribution)} with event shape {event_shape}; it must be a "
            "diagonal Gaussian, numpyro.distributions.Normal(loc, scale).to_event(1)"
        )
    loc, scale = (jnp.broadcast_to(jnp.asarray(x), event_shape) for x in (base.loc, base.scale))
    return loc, scale


def information(likelihood: Any) -> Information:
    """Parameters and Fisher information of a likelihood p(x given z) at one z.

    Known are NumPyro's Bernoulli, by logits or by probabilities, its Normal, and
    `DiscretizedLogistic`, each by itself or in `Independent`. The information does not depend on
    x, and with J = d eta/dz

        J' F J = E[grad_z log p(x given z) grad_z log p(x given z)'],   x ~ p(x given z),

    is the Gauss-Newton approximation of the negative Hessian of log p(x given z) by z. It is
    positive semi-definite.

    Of a discretized logistic with more than 12 levels it is the information of 12 cells of
    neighbouring levels: never more than that of the levels, and about a tenth less where the cells
    are half a scale wide.

    Raises:
      TypeError: another family.

    References:
      Martens, New Insights and Perspectives on the Natural Gradient Method, 2020.
    """
    base = _base(likelihood)
    if isinstance(base, dist.BernoulliLogits):
        logits = jnp.asarray(base.logits)
        mean = jax.nn.sigmoid(logits)
        return _scalar(logits, mean * (1.0 - mean))
    if isinstance(base, dist.BernoulliProbs):
        probs = jnp.asarray(base.probs)
        variance = jnp.maximum(probs * (1.0 - probs), jnp.finfo(probs.dtype).tiny)
        return _scalar(probs, 1.0 / variance)
    if isinstance(base, dist.Normal):
        loc, scale = jnp.broadcast_arrays(jnp.asarray(base.loc), jnp.asarray(base.scale))
        zeros, precision = jnp.zeros_like(scale), scale**-2
        rows = [[precision, zeros], [zeros, 2.0 * precision]]
        return Information(jnp.stack([loc, scale]), jnp.stack([jnp.stack(row) for row in rows]))
    if isinstance(base, DiscretizedLogistic):
        return _logistic_information(base)
    raise TypeError(
        f"the Fisher information of {_name(likelihood)} is not known here; a Newton step takes "
        "Bernoulli, Normal and DiscretizedLogistic; method='adam' takes every likelihood"
    )


def num_levels(likelihood: Any) -> int:
    """The number of levels that an entry of x can have: 2 of a Bernoulli.

    Raises:
      TypeError: the likelihood is neither a Bernoulli nor a `DiscretizedLogistic`.
    """
    base = _base(likelihood)
    if isinstance(base, dist.BernoulliLogits | dist.BernoulliProbs):
        return 2
    if isinstance(base, DiscretizedLogistic):
        return base.levels
    raise TypeError(
        f"{_name(likelihood)} has no table of levels to code with; the codec takes Bernoulli and "
        "DiscretizedLogistic"
    )


def block_size(levels: int) -> int:
    """How many neighbouring levels make a block: about the root of their number; 1 for two."""
    return 1 if levels == 2 else math.isqrt(levels - 1) + 1


def block_probs(likelihood: Any) -> jax.Array:
    """P(the level of x is in block b), [*event, number of blocks].

    Block b holds the levels b B .. (b + 1) B - 1 with B = `block_size`; the last may hold fewer.

    Raises:
      TypeError: see `num_levels`.
    """
    base, levels = _base(likelihood), num_levels(likelihood)
    size = block_size(levels)
    first = jnp.arange(0, levels, size, dtype=jnp.float32)
    if not isinstance(base, DiscretizedLogistic):
        log_prob = lambda level: base.log_prob(jnp.full(base.batch_shape, level))
        return jnp.exp(jax.vmap(log_prob, out_axes=-1)(first))
    # On a CPU, XLA takes ten times as long with levels that are constants of the program.
    first = jax.vmap(lambda level: level + 0.0 * base.in_bins()[0], out_axes=-1)(first)

    def log_prob_of_block(first: jax.Array) -> jax.Array:
        return base.log_prob_between(first, jnp.minimum(first + size - 1, levels - 1))

    return jnp.exp(jax.vmap(log_prob_of_block, in_axes=-1, out_axes=-1)(first))


def level_probs(likelihood: Any, blocks: jax.Array) -> jax.Array:
    """P(the level of x is the i-th of its block, given the block), [*event, B].

    Args:
      likelihood: p(x given z) at one z.
      blocks: the block of each entry of x, int [*event].

    Returns:
      Probabilities; those beyond the last level are zero.

    Raises:
      TypeError: see `num_levels`.
    """
    levels = num_levels(likelihood)
    size = block_size(levels)

    def one(i: jax.Array) -> jax.Array:
        level = blocks * size + i
        inside = jnp.minimum(level, levels - 1).astype(jnp.float32)
        return jnp.where(level < levels, _base(likelihood).log_prob(inside), -jnp.inf)

    log_probs = jax.vmap(one, out_axes=-1)(jnp.arange(size))
    return jax.nn.softmax(log_probs, axis=-1)


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

    mixed = mean(by_loc, by_scale)
    rows = [[mean(by_loc, by_loc), mixed], [mixed, mean(by_scale, by_scale)]]
    return Information(jnp.stack([loc, scale]), jnp.stack([jnp.stack(row) for row in rows]))


def _scalar(parameter: jax.Array, fisher: jax.Array) -> Information:
    return Information(parameter[None], fisher[None, None])


def _base(distribution: Any) -> Any:
    """The distribution inside `Independent`, or itself."""
    while isinstance(distribution, dist.Independent):
        distribution = distribution.base_dist
    return distribution


def _name(distribution: Any) -> str:
    return type(_base(distribution)).__name__
