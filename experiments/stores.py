"""What a run's folder keeps of its work: entries of checkpoints, refits and evaluations.

The record of every entry names its store and number, the settings and the data of the run that
computed it, and the checksums of the entries that it was computed from. An entry is verified when
it is read, so that one that was copied from another run, seed or epoch is found, and so is one
whose checkpoint has been replaced. `experiments.workdir` knows the folder; this module knows what
is in its stores.
"""

import functools
import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

import gapjax
from experiments.config import Config
from experiments.options import checkpoints_of
from experiments.results_json import REFITS, REFITTED
from experiments.run import Run, commit
from experiments.workdir import WorkdirError, differences
from gapjax import checkpoints, parallel
from gapjax.fit.step import TrainState, init_state

ORIGIN = "origin"  # the key under which a record says where its entry comes from
UNFINISHED = ("train_partial", "refit_partial")  # the stores whose entries are not of an epoch
_CURE = "give another --workdir, or remove that folder for it to be made again"

_TRAINING = (
    "seed", "validation", "batch_size", "learning_rate", "latent_dim", "hidden_sizes",
    "likelihood", "posterior", "uniform_weight",
)  # fmt: skip
_REFIT = ("refit_epochs", "refit_batch_size", "recipe")
_EVALUATION = (*_TRAINING, "num_eval_samples")
# The fields of `Config` that determine the entries of a store, beside the data and what they are
# computed from. The number of epochs is none of them: it decides how many entries there are.
_SETTINGS = {
    "train": _TRAINING,
    "train_partial": _TRAINING,
    "self_consistent": (*_TRAINING, *_REFIT, "alpha", "mixture"),
    "control": (*_TRAINING, *_REFIT),
    "optimal": (*_TRAINING, "optimal_epochs"),
    "refit_partial": (*_TRAINING, *_REFIT, "alpha", "mixture", "optimal_epochs"),
    "evaluation": _EVALUATION,
    "effects": _EVALUATION,
    "shares": _EVALUATION,
    "ledger": _TRAINING,
}
# The stores that those of one epoch are computed from, where a caller does not say.
_MADE_FROM = {
    **dict.fromkeys(REFITS, ("train",)),
    "evaluation": ("train", *REFITS),
    "effects": ("train", "control", "self_consistent"),
    "shares": ("train", *REFITS),
}


# ---- entries -----------------------------------------------------------------


def save(
    run: Run,
    store: str,
    number: int,
    tree: Any,
    clock: float,
    *,
    made_from: Iterable[tuple[str, int]] | None = None,
    **metadata: Any,
) -> None:
    """Adds an entry to one of the run's stores, or replaces the one of this number.

    Args:
      run: the run.
      store: its name.
      number: of the entry: its epoch, except in the stores of unfinished work.
      tree: a pytree of arrays.
      clock: the time at which the work on it began, by `time.monotonic`.
      made_from: store and number of what it was computed from; by default of the same epoch.
      **metadata: what else its record has.
    """
    run.workdir.check_place()
    if made_from is None:
        made_from = [(name, number) for name in _MADE_FROM.get(store, ())]
    record = entry_metadata(clock) | metadata
    record |= {} if store in UNFINISHED else {"epoch": number}
    record[ORIGIN] = {
        "store": store, "number": number, "settings": _settings(run.config, store),
        "data": run.dataset.provenance.get("sha256"),
        "event_shape": list(run.dataset.event_shape), "levels": run.dataset.levels,
        "made_from": {f"{name}/{at}": _checksum(run, name, at) for name, at in made_from},
    }  # fmt: skip
    checkpoints.save(run.workdir.checkpoints / store, number, tree, record)


def load(run: Run, store: str, number: int, like: object) -> tuple[Any, dict]:
    """An entry of one of the run's stores, and its record; WorkdirError if it is of another run."""
    path = run.workdir.checkpoints / store
    tree, record = checkpoints.restore(path, number, like)
    if problem := mismatch(run, store, number, record):
        raise WorkdirError(f"entry {number} in {path} {problem}; {_CURE}")
    return tree, record


def valid_entries(
    run: Run, store: str, like: object, instead: str = "it is made again"
) -> list[int]:
    """The entries of a store that are good and of this run; prints a line for each other one.

    A checkpoint of joint training that is of another run is a WorkdirError: it is not made again,
    because hours of work may be in it.
    """
    whole, damaged = checkpoints.valid_steps(run.workdir.checkpoints / store, like)
    for error in damaged:
        print(f"skipped: {error}; {instead}", flush=True)
    return [number for number in whole if is_of_run(run, store, number, instead)]


def is_of_run(run: Run, store: str, number: int, instead: str = "it is made again") -> bool:
    """Whether an entry is of this run, as for `valid_entries`."""
    path = run.workdir.checkpoints / store
    problem = mismatch(run, store, number, checkpoints.record(path, number))
    if problem and store == "train":
        raise WorkdirError(f"entry {number} in {path} {problem}; {_CURE}")
    if problem:
        print(f"skipped: entry {number} in {path} {problem}; {instead}", flush=True)
    return problem is None


def kept(run: Run, store: str, number: int) -> dict:
    """The record of an entry of this run; empty where there is none."""
    if number not in _saved(run, store) or not is_of_run(run, store, number):
        return {}
    return checkpoints.record(run.workdir.checkpoints / store, number)


def mismatch(run: Run, store: str, number: int, record: dict) -> str | None:
    """What makes an entry that was found here one that this run did not compute, or None."""
    found = record.get(ORIGIN)
    if found is None:
        return "does not say which run it is of"
    if (found["store"], found["number"]) != (store, number):
        return f"is a copy of {found['store']}/{found['number']}"
    settings, data = _settings(run.config, store), run.dataset.provenance.get("sha256")
    there = {name: found["settings"].get(name) for name in settings}
    if differing := differences(there, settings, found["data"], data):
        return f"is of another run ({'; '.join(differing)})"
    for name, checksum in found["made_from"].items():
        source, at = name.split("/")
        if _checksum(run, source, int(at)) != checksum:
            return f"was computed from another {name} than is here"
    return None


def entry_metadata(clock: float) -> dict:
    """What every record has: the cost of the entry since `clock`, and the code that made it."""
    return {"seconds": time.monotonic() - clock, "commit": commit()}


def _settings(config: Config, store: str) -> dict:
    """The fields that determine the entries of a store, as JSON gives them back."""
    return json.loads(json.dumps({name: getattr(config, name) for name in _SETTINGS[store]}))


def _checksum(run: Run, store: str, number: int) -> str | None:
    """That of an entry; None where it is missing or damaged, which is found when it is read."""
    try:
        return checkpoints.checksum(run.workdir.checkpoints / store, number)
    except checkpoints.CheckpointError:
        return None


# ---- checkpoints and refits --------------------------------------------------


def chosen_epochs(run: Run, given: Iterable[str] | None) -> list[int] | None:
    """The checkpoints that --checkpoints names; None, for all of the run, where it is not given."""
    if given is None:
        return None
    return checkpoints_of("checkpoints", given, _saved(run, "train"))


def trained_params(run: Run, epoch: int) -> gapjax.VAEParams:
    """The parameters of a checkpoint; WorkdirError if there is none."""
    return _made(run, "train", epoch, state_like(run)).params


def encoders(
    run: Run, epoch: int, kinds: Sequence[str], averaged: Sequence[str] = ()
) -> tuple[gapjax.VAEParams, dict[str, Any]]:
    """The parameters of a checkpoint, and by name all encoders; each entry is restored once.

    The names are "as_trained", the kinds of refits, and "control_averaged" and the like for those
    kinds whose encoder "averaged" over the refit is wanted too.
    """
    trained = trained_params(run, epoch)
    by_name = {"as_trained": trained.encoder}
    for kind in kinds:
        restored = _made(run, kind, epoch, refitted_like(run))
        by_name[kind] = restored["encoder"]
        if kind in averaged:
            by_name[f"{kind}_averaged"] = restored["averaged"]
    return trained, by_name


def drop_weights(run: Run) -> None:
    """Frees the weights that --keep_weights_every does not keep, of checkpoints and refits."""
    every = run.saving.weights_every
    surplus = [epoch for epoch in run.epochs[:-1] if every and epoch % every]
    for store in ("train", *REFITS):
        for epoch in set(surplus) & set(_saved(run, store)):
            checkpoints.drop_tree(run.workdir.checkpoints / store, epoch)


def _made(run: Run, store: str, epoch: int, like: object) -> Any:
    """A checkpoint or a refit of one; WorkdirError if there is none."""
    if epoch not in _saved(run, store):
        what, cure = f"{store} refit", "refit makes it"
        if store == "train":
            what, cure = "checkpoint", "train goes on with it"
        raise WorkdirError(
            f"--workdir={run.workdir.path} has no {what} of epoch {epoch}; "
            f"python -m experiments.{cure}"
        )
    return load(run, store, epoch, like)[0]


def _saved(run: Run, store: str) -> list[int]:
    return checkpoints.numbers(run.workdir.checkpoints / store)


def state_like(run: Run, optimizer: object = None) -> TrainState:
    """The shapes of a run's state, for restoring it."""
    optimizer = optimizer or gapjax.adam(run.config.learning_rate)
    values = {"vae": run.vae, "optimizer": optimizer, "key": run.key("train").dtype}
    return _state_like(parallel.Static(values))


@functools.lru_cache(64)  # tracing a model takes 25 to 50 ms, and every entry asks
def _state_like(static: parallel.Static) -> TrainState:
    vae, optimizer, key_type = static.values.values()
    make = lambda rng_key: init_state(vae.init(rng_key), rng_key, optimizer)
    return jax.eval_shape(make, jax.ShapeDtypeStruct((), key_type))


def refitted_like(run: Run) -> dict:
    """The shapes of what is kept of a refit."""
    return dict.fromkeys(("encoder", "averaged"), state_like(run).params.encoder)


def evaluated_like(run: Run) -> dict[str, np.ndarray]:
    """The shapes of an evaluated checkpoint: BPD per image, by the encoder or the set."""
    tested = dict.fromkeys(("test", *REFITTED), len(run.dataset.test))
    sizes = {"train": len(run.dataset.train), **tested}
    if run.validation is not None:
        sizes["validation"] = len(run.validation)
    return {name: np.zeros(size, np.float32) for name, size in sizes.items()}
