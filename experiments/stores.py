"""What a run's folder keeps of its work: entries of checkpoints, refits and evaluations.

Every entry is verified when it is read. `experiments.workdir` knows the folder, this room what is
in its stores.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

import gapjax
from experiments.options import checkpoints_of
from experiments.run import Run, commit
from experiments.workdir import WorkdirError
from gapjax import checkpoints
from gapjax.fit.steps import TrainState, init_state
from gapjax.results.schema import AVERAGED, REFITS


def valid_entries(
    run: Run, name: str, like: object, instead: str = "it is made again"
) -> list[int]:
    """The good entries of one of the run's stores; tells of the damaged ones.

    Args:
      run: the run.
      name: of the store.
      like: the shapes of an entry.
      instead: what is done where an entry is damaged.
    """
    good, damaged = checkpoints.valid_steps(run.workdir.checkpoints / name, like)
    for error in damaged:
        print(f"skipped: {error}; {instead}", flush=True)
    return good


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
    store = run.workdir.checkpoints / "train"
    if epoch not in checkpoints.numbers(store):
        raise WorkdirError(
            f"--workdir={run.workdir.path} has no checkpoint of epoch {epoch}; "
            "python -m experiments.train goes on with it"
        )
    return checkpoints.restore(store, epoch, state_like(run))[0].params


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
    store = run.workdir.checkpoints / kind
    if epoch not in checkpoints.numbers(store):
        raise WorkdirError(
            f"--workdir={run.workdir.path} has no {kind} refit of epoch {epoch}; "
            "python -m experiments.refit makes it"
        )
    encoders, _ = checkpoints.restore(store, epoch, refitted_like(run))
    return trained._replace(encoder=encoders[which])


def encoders(run: Run, epoch: int, kinds: Sequence[str]) -> tuple[gapjax.VAEParams, dict[str, Any]]:
    """The trained parameters of a checkpoint, and by name the encoders that go with its decoder."""
    trained = trained_params(run, epoch)
    refits = {kind: refitted_params(run, kind, epoch, trained).encoder for kind in kinds}
    return trained, {"as_trained": trained.encoder, **refits}


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


def entry_metadata(epoch: int, clock: float) -> dict:
    """What every entry of a store records: its epoch, its cost, and the code that made it."""
    return {"epoch": epoch, "seconds": time.monotonic() - clock, "commit": commit()}
