"""Optimizers of the whole VAE or of its encoder alone, and the rule that ends a search."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from gapjax.vae import Frozen, VAEParams

Value = float | jax.Array | np.ndarray
# Plain numbers take the precision of any parameters; these are what 0.9 and so on are in float32.
_ADAM: Any = {name: float(np.float32(x)) for name, x in (("b1", 0.9), ("b2", 0.999), ("eps", 1e-8))}
_Arguments = ParamSpec("_Arguments")


@dataclasses.dataclass(frozen=True)
class _Half:
    """`init` or `update` of the transformation that `make` gives, as a value."""

    name: str
    make: Callable[..., optax.GradientTransformation]
    arguments: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any, **options: Any) -> Any:
        made = optax.with_extra_args_support(self.make(**dict(self.arguments)))
        return getattr(made, self.name)(*args, **options)


def _as_value(
    make: Callable[_Arguments, optax.GradientTransformation],
) -> Callable[_Arguments, optax.GradientTransformation]:
    """Makes transformations of equal arguments equal, so that they share compiled programs."""

    @functools.wraps(make)
    def made(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Any:
        bound = inspect.signature(make).bind(*args, **kwargs)
        bound.apply_defaults()
        halves = (_Half(name, make, tuple(bound.arguments.items())) for name in ("init", "update"))
        return optax.GradientTransformationExtraArgs(*halves)

    return made


@_as_value
def adam(learning_rate: float) -> optax.GradientTransformation:
    """Adam as in the paper, with the learning rate in its state, so that it can be lowered."""
    at_rate = lambda learning_rate: optax.adam(learning_rate, **_ADAM)
    return optax.inject_hyperparams(at_rate)(learning_rate=learning_rate)


@_as_value
def cosine_adam(
    learning_rate: float, num_steps: int, *, warmup: float = 0.0
) -> optax.GradientTransformation:
    """Adam whose learning rate falls to 0 as half a cosine, so that no noise is left at the end.

    Args:
      learning_rate: the highest.
      num_steps: number of steps in all; see `fit.step.steps_per_epoch`.
      warmup: share of the steps in which the rate rises from 0 to `learning_rate`.
    """
    rising = int(warmup * num_steps)
    start = 0.0 if rising else learning_rate
    return optax.adam(optax.warmup_cosine_decay_schedule(start, learning_rate, rising, num_steps))


@_as_value
def encoder_only(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Restricts `optimizer` to the encoder of `VAEParams`; the decoder is frozen.

    The decoder, and what is `Frozen` in the encoder, get updates of zero and no optimizer state.
    (`optax.masked` would not do: it passes raw gradients through where the mask is false.) The
    gradient of the decoder is then unused, and the compiler removes it. Steps give an optimizer
    gradients, state and parameters, so `optax.lbfgs` needs linesearch=None.
    """
    is_frozen = lambda node: isinstance(node, Frozen)

    def labels(params: VAEParams) -> VAEParams:
        label = lambda node: "freeze" if is_frozen(node) else "train"
        return VAEParams(jax.tree.map(label, params.encoder, is_leaf=is_frozen), "freeze")

    return optax.partition({"train": optimizer, "freeze": optax.set_to_zero()}, labels)


def scale_learning_rate(opt_state: optax.OptState, factor: ArrayLike) -> optax.OptState:
    """Multiplies the learning rate held in `opt_state`; see `adam` and `check_learning_rate`."""
    learning_rate = optax.tree.get(opt_state, "learning_rate")
    return optax.tree.set(opt_state, learning_rate=learning_rate * factor)


def check_learning_rate(optimizer: optax.GradientTransformation, params: VAEParams) -> None:
    """Raises ValueError unless the optimizer's state holds one learning rate, see `adam`."""
    opt_state = jax.eval_shape(optimizer.init, params)
    found = optax.tree.get_all_with_path(opt_state, "learning_rate")
    if len(found) != 1:
        raise ValueError(
            f"until lowers the learning rate, but the optimizer's state holds {len(found)} entries "
            "named learning_rate; use gapjax.adam(...) or optax.inject_hyperparams, or until=None"
        )


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
    """What the rule remembers: the largest value so far, and how many values were a plateau."""

    best: Value
    num_plateaus: Value


class Judgement(NamedTuple):
    """What the rule says of a value."""

    is_best: Value  # larger than the best before it; never where it is NaN
    factor: Value  # on the learning rate: `decay` at a plateau, otherwise 1


def judge(rule: Convergence, state: PlateauState, value: Value) -> tuple[PlateauState, Judgement]:
    """Judges values elementwise by the best before them; larger is better, NaN is a plateau.

    Python floats stay float64; JAX arrays may be traced.
    """
    xp = jnp if isinstance(value, jax.Array) else np
    is_best = value > state.best
    is_plateau = xp.logical_not(value - state.best >= rule.tolerance)
    number = state.num_plateaus + xp.where(is_plateau, 1, 0)
    factor = xp.where(is_plateau, rule.decay, 1.0)
    return PlateauState(xp.where(is_best, value, state.best), number), Judgement(is_best, factor)


def is_finished(rule: Convergence, num_plateaus: Value) -> bool | jax.Array | np.ndarray:
    """Whether the search is over: the rate was lowered `num_decays` times and it did not help."""
    return num_plateaus > rule.num_decays
