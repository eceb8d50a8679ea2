"""Arguments that training and refits share: options of a run, and the members of a sweep."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import optax

from gapjax import parallel
from gapjax.fit.loop import Monitor, Progress
from gapjax.fit.plateau import Convergence
from gapjax.fit.steps import Objective, TrainState

OnEpoch = Callable[[int, float], None]
OnChunk = Callable[[Progress], None] | Callable[[list[Progress]], None]


class RunOptions(TypedDict, total=False):
    """Options of every run; see `train`."""

    batch_size: int
    optimizer: optax.GradientTransformation | None
    objective: Objective
    resume: Progress | Sequence[Progress] | None
    on_epoch: OnEpoch | None
    on_chunk: OnChunk | None
    devices: parallel.Devices | None
    sweep: str


class TrainOptions(RunOptions, total=False):
    """Options of `train`."""

    state: TrainState | Sequence[TrainState] | None


class RefitOptions(RunOptions, total=False):
    """Options of `refit_encoder`."""

    monitor: Monitor | Sequence[Monitor] | None
    monitor_every: int
    until: Convergence | None


def is_sweep(rng_key: Any) -> bool:
    """Whether this is several keys: a list or tuple of them, or an array [R]."""
    if rng_key is None or not hasattr(rng_key, "dtype"):
        return is_several(rng_key)
    is_typed = jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key)
    return rng_key.ndim > (0 if is_typed else 1)  # a key of the old kind is itself an array [2]


def is_several(value: Any) -> bool:
    """Whether an argument has an entry for each member: a list or tuple, but no NamedTuple."""
    return isinstance(value, list | tuple) and not hasattr(value, "_fields")


def members(rng_key: Any, **others: Any) -> list[list]:
    """The keys and the other arguments, each as a list with an entry for every member.

    One run is a sweep of one. An argument that is no list is shared by all members.

    Args:
      rng_key: one key, several (see `is_sweep`), or None.
      **others: by name, for the messages.

    Returns:
      A list of lists of equal length: the keys first, then the others in their order.

    Raises:
      ValueError: no keys, or an argument with another number of entries than there are keys.
    """
    if not is_sweep(rng_key):
        for name, value in others.items():
            if is_several(value):
                raise ValueError(
                    f"{name} is a list of {len(value)}, but rng_key is not a list; for a sweep "
                    f"give a list of {len(value)} keys"
                )
        return [[rng_key], *([value] for value in others.values())]
    keys = list(rng_key)
    if not keys:
        raise ValueError("rng_key is an empty list; a sweep needs at least one key")
    lists = [keys]
    for name, value in others.items():
        if is_several(value) and len(value) != len(keys):
            raise ValueError(
                f"{name} is a list of {len(value)} beside {len(keys)} keys; a sweep needs one for "
                "each"
            )
        lists.append(list(value) if is_several(value) else [value] * len(keys))
    return lists
