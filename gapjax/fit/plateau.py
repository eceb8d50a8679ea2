"""The plateau rule: when to lower a learning rate, and when to stop.

Used by refits, on the measured BPD (`Convergence`), and by the search for the best posterior of
each image, on its ELBO (`PosteriorSearch`). The functions are elementwise. They take Python
floats, which stay float64, and JAX arrays, also traced ones.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Value = float | jax.Array | np.ndarray


class Rule(Protocol):
    """The numbers of a plateau rule; `Convergence` and `PosteriorSearch` have them."""

    @property
    def tolerance(self) -> float:
        """Smallest improvement on the best value that is not a plateau."""
        ...

    @property
    def decay(self) -> float:
        """Factor on the learning rate at a plateau."""
        ...

    @property
    def num_decays(self) -> int:
        """Number of plateaus after which the rate is lowered; one more ends the search."""
        ...


class Convergence(NamedTuple):
    """When a refit has converged, judged by its monitored BPD.

    The BPD is measured every `monitor_every` epochs on fixed noise, and the best parameters so
    far are kept. A measurement that does not improve on the best by `tolerance` is a plateau.
    The learning rate is multiplied by `decay` at each plateau, and the refit ends at the
    (`num_decays` + 1)th. It returns the best parameters, so the result is never worse than its
    start.

    Attributes:
      tolerance: smallest improvement that counts, bits per dimension.
      decay: factor on the learning rate at a plateau.
      num_decays: how many times the learning rate is lowered before the refit ends.
    """

    tolerance: float = 2e-4
    decay: float = 0.3
    num_decays: int = 3


class PlateauState(NamedTuple):
    """What the rule remembers.

    Attributes:
      best: largest value so far; higher is better.
      num_plateaus: number of values that were a plateau.
    """

    best: Value
    num_plateaus: Value


class Judgement(NamedTuple):
    """What the rule says of a value.

    Attributes:
      improvement: the value minus the best before it.
      is_best: whether it is larger than the best before it; never where it is NaN.
      factor: on the learning rate: `decay` at a plateau, otherwise 1.
    """

    improvement: Value
    is_best: Value
    factor: Value


def judge(rule: Rule, state: PlateauState, value: Value) -> tuple[PlateauState, Judgement]:
    """Judges a value by the best before it. A NaN is a plateau.

    Args:
      rule: the numbers of the rule.
      state: what it remembers.
      value: the new value; higher is better.

    Returns:
      The next state, and the judgement.
    """
    xp = jnp if isinstance(value, jax.Array) else np
    improvement = value - state.best
    is_best = value > state.best
    is_plateau = xp.logical_not(improvement >= rule.tolerance)
    best = xp.where(is_best, value, state.best)
    factor = xp.where(is_plateau, rule.decay, 1.0)
    return (
        PlateauState(best, state.num_plateaus + xp.where(is_plateau, 1, 0)),
        Judgement(improvement, is_best, factor),
    )


def is_finished(rule: Rule, num_plateaus: Value) -> bool | jax.Array | np.ndarray:
    """Whether the search is over: the rate was lowered `num_decays` times and it did not help."""
    return num_plateaus > rule.num_decays
