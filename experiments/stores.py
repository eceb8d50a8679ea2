"""What a run's folder keeps of its work: entries of checkpoints, refits and evaluations.

Every entry is verified when it is read: that it is what was saved, and that it is of this run.
`experiments.workdir` knows the folder; this module knows what is in its stores.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

import gapjax
from experiments.options import checkpoints_of
from experiments.origins import ORIGIN, UNFINISHED, Source, mismatch, origin, sources_of
from experiments.results_json import AVERAGED, REFITS
from experiments.run import Run, commit
from experiments.workdir import WorkdirError
from gapjax import checkpoints
from gapjax.fit.steps import TrainState, init_state

_CURE = "give another --workdir, or remove that folder for it to be made again"


def save(
    run: Run,
    store: str,
    number: int,
    tree: Any,
    clock: float,
    *,
    sources: Iterable[Source] | None = None,
    **metadata: Any,
) -> None:
    """Adds an entry to one of the run's stores, or replaces the one of this number.

    Args:
      run: the run.
      store: its name.
      number: of the entry: its epoch, except in the stores of unfinished work.
      tree: a pytree of arrays.
      clock: the time at which the work on it began, by `time.monotonic`.
      sources: the entries that it was computed from; by default those of the same epoch.
      **metadata: what else its record has.

    Raises:
      CheckpointError: it cannot be written.
      WorkdirError: the folder is no longer in its place.
    """
    run.workdir.check_place()
    sources = sources_of(store, number) if sources is None else sources
    record = {**entry_metadata(clock), **metadata}
    if store not in UNFINISHED:
        record["epoch"] = number
    record[ORIGIN] = origin(run, store, number, sources)
    checkpoints.save(run.workdir.checkpoints / store, number, tree, record)


def load(run: Run, store: str, number: int, like: object) -> tuple[Any, dict]:
    """An entry of one of the run's stores, and its record.

    Raises:
      CheckpointError: it is missing or damaged.
      WorkdirError: it is of another run.
    """
    path = run.workdir.checkpoints / store
    tree, record = checkpoints.restore(path, number, like)
    problem = mismatch(run, store, number, record)
    if problem:
        raise WorkdirError(f"checkpoint {number} in {path} {problem}; {_CURE}")
    return tree, record


def valid_entries(
    run: Run, store: str, like: object, instead: str = "it is made again"
) -> list[int]:
    """The entries of a store that are good and of this run; prints a line for each other one.

    Args:
      run: the run.
      store: its name.
      like: a pytree with the structure, shapes and dtypes of an entry.
      instead: what is done about an entry that is not good.

    Raises:
      WorkdirError: a checkpoint of joint training is of another run. It is not made again, because
        hours of work may be in it.
    """
    path = run.workdir.checkpoints / store
    whole, damaged = checkpoints.valid_steps(path, like)
    for error in damaged:
        print(f"skipped: {error}; {instead}", flush=True)
    return [number for number in whole if is_of_run(run, store, number, instead)]


def is_of_run(run: Run, store: str, number: int, instead: str = "it is made again") -> bool:
    """Whether an entry is of this run; prints a line where it is not.

    Raises:
      CheckpointError: it is missing or damaged.
      WorkdirError: a checkpoint of joint training that is not; see `valid_entries`.
    """
    path = run.workdir.checkpoints / store
    problem = mismatch(run, store, number, checkpoints.record(path, number))
    if problem and store == "train":
        raise WorkdirError(f"checkpoint {number} in {path} {problem}; {_CURE}")
    if problem:
        print(f"skipped: checkpoint {number} in {path} {problem}; {instead}", flush=True)
    return problem is None


def chosen_epochs(run: Run, given: Iterable[str] | None) -> list[int] | None:
    """The checkpoints that --checkpoints names; None, for all of the run, where it is not given.

    Raises:
      UsageError: one that is not saved.
    """
    if given is None:
        return None
    saved = checkpoints.numbers(run.workdir.checkpoints / "train")
    return checkpoints_of("checkpoints", given, saved)


def trained_params(run: Run, epoch: int) -> gapjax.VAEParams:
    """The parameters of a checkpoint.

    Raises:
      WorkdirError: there is none.
    """
    if epoch not in checkpoints.numbers(run.workdir.checkpoints / "train"):
        raise WorkdirError(
            f"--workdir={run.workdir.path} has no checkpoint of epoch {epoch}; "
            "python -m experiments.train goes on with it"
        )
    return load(run, "train", epoch, state_like(run))[0].params


def refitted_params(
    run: Run, kind: str, epoch: int, trained: gapjax.VAEParams, which: str = "encoder"
) -> gapjax.VAEParams:
    """The parameters of a checkpoint with a refitted encoder.

    Args:
      run: the run.
      kind: of the refit, one of `REFITS`.
      epoch: of the checkpoint.
      trained: its parameters.
      which: "encoder", or the one "averaged" over the refit.

    Raises:
      WorkdirError: there is no such refit.
    """
    return trained._replace(encoder=_refitted(run, kind, epoch)[which])


def encoders(
    run: Run, epoch: int, kinds: Sequence[str], averaged: Sequence[str] = ()
) -> tuple[gapjax.VAEParams, dict[str, Any]]:
    """The parameters of a checkpoint and of its refits; each entry is restored once.

    Args:
      run: the run.
      epoch: of the checkpoint.
      kinds: of the refits.
      averaged: those of them whose encoder "averaged" over the refit is wanted too.

    Returns:
      The trained parameters, and by name the encoders that go with its decoder: "as_trained", the
      kinds, and for example "control_averaged".

    Raises:
      WorkdirError: there is no such checkpoint or refit.
    """
    trained = trained_params(run, epoch)
    by_name = {"as_trained": trained.encoder}
    for kind in kinds:
        restored = _refitted(run, kind, epoch)
        by_name[kind] = restored["encoder"]
        if kind in averaged:
            by_name[f"{kind}_averaged"] = restored["averaged"]
    return trained, by_name


def _refitted(run: Run, kind: str, epoch: int) -> dict[str, Any]:
    """What is kept of a refit: its "encoder", and the one "averaged" over it."""
    if epoch not in checkpoints.numbers(run.workdir.checkpoints / kind):
        raise WorkdirError(
            f"--workdir={run.workdir.path} has no {kind} refit of epoch {epoch}; "
            "python -m experiments.refit makes it"
        )
    return load(run, kind, epoch, refitted_like(run))[0]


def state_like(run: Run, optimizer: object = None) -> TrainState:
    """The shapes of a run's state, for restoring it."""
    optimizer = optimizer or gapjax.adam(run.config.learning_rate)
    rng_key = run.key("train")
    return jax.eval_shape(lambda: init_state(run.vae.init(rng_key), rng_key, optimizer))


def refitted_like(run: Run) -> dict:
    """The shapes of what is kept of a refit."""
    return dict.fromkeys(("encoder", "averaged"), state_like(run).params.encoder)


def evaluated_like(run: Run) -> dict[str, np.ndarray]:
    """The shapes of an evaluated checkpoint: BPD per image, by the encoder or the set."""
    num_test = len(run.dataset.test)
    averaged = [f"{kind}_averaged" for kind in AVERAGED]
    tested = dict.fromkeys(("test", *REFITS, *averaged), num_test)
    sizes = {"train": len(run.dataset.train), **tested}
    if run.validation is not None:
        sizes["validation"] = len(run.validation)
    return {name: np.zeros(size, np.float32) for name, size in sizes.items()}


def entry_metadata(clock: float) -> dict:
    """What every record has: the cost of the entry since `clock`, and the code that made it."""
    return {"seconds": time.monotonic() - clock, "commit": commit()}
