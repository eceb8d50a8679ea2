"""Where an entry of a run's folder comes from, and whether that is this run.

The record of every entry names its store and number, the settings and the data of the run that
computed it, and the checksums of the entries that it was computed from. An entry that was copied
from another run, another seed or another epoch is therefore found, and so is one whose checkpoint
has been replaced.
"""

import json
from collections.abc import Iterable
from typing import NamedTuple

from experiments.config import Config
from experiments.results_json import REFITS
from experiments.run import Run
from gapjax import checkpoints

ORIGIN = "origin"  # the key under which a record has it
UNFINISHED = ("train_partial", "refit_partial")  # the stores whose entries are not of an epoch

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
    "ledger": _TRAINING,
    "compression": _EVALUATION,
}


class Source(NamedTuple):
    """An entry that another one is computed from.

    Attributes:
      store: its store.
      number: its number in the store.
    """

    store: str
    number: int

    def __str__(self) -> str:
        return f"{self.store}/{self.number}"


def sources_of(store: str, epoch: int) -> tuple[Source, ...]:
    """The entries that one of these stores is computed from, at a checkpoint."""
    stores = {"evaluation": ("train", *REFITS), "effects": ("train", "control", "self_consistent")}
    stores |= dict.fromkeys(REFITS, ("train",))
    return tuple(Source(name, epoch) for name in stores.get(store, ()))


def origin(run: Run, store: str, number: int, sources: Iterable[Source]) -> dict:
    """What the record of a new entry says of its origin."""
    return {
        "store": store,
        "number": number,
        "settings": _settings(run.config, store),
        "data": run.dataset.provenance.get("sha256"),
        "made_from": {str(source): _checksum(run, source) for source in sources},
    }


def mismatch(run: Run, store: str, number: int, record: dict) -> str | None:
    """What makes an entry one that this run did not compute, or None.

    An entry of before there were origins is accepted in a folder that was begun before them.

    Args:
      run: the run.
      store: where the entry was found.
      number: under which it was found.
      record: of the entry.
    """
    found = record.get(ORIGIN)
    if found is None:
        return "does not say which run it is of" if run.workdir.records_origins else None
    if (found["store"], found["number"]) != (store, number):
        return f"is a copy of {found['store']}/{found['number']}"
    # A flag that is younger than the entry had its older default when the entry was computed.
    settings = {**Config._field_defaults, **found["settings"]}
    differing = [
        f"--{name} is {settings.get(name)} there and {value} here"
        for name, value in _settings(run.config, store).items()
        if json.loads(json.dumps(settings.get(name))) != value
    ]
    if found["data"] != run.dataset.provenance.get("sha256"):
        differing.append("the data's checksum is another")
    if differing:
        return f"is of another run ({'; '.join(differing)})"
    for name, checksum in found["made_from"].items():
        source = Source(name.split("/")[0], int(name.split("/")[1]))
        if _checksum(run, source) != checksum:
            return f"was computed from another {name} than is here"
    return None


def _settings(config: Config, store: str) -> dict:
    """The fields that determine the entries of a store, as JSON gives them back."""
    return json.loads(json.dumps({name: getattr(config, name) for name in _SETTINGS[store]}))


def _checksum(run: Run, source: Source) -> str | None:
    """That of an entry; None where it is missing or damaged, which is found when it is read."""
    try:
        return checkpoints.checksum(run.workdir.checkpoints / source.store, source.number)
    except checkpoints.CheckpointError:
        return None
