"""What is kept of a row of the atlas with one seed, by what it depends on; and its random keys."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

import gapjax
from experiments import stores
from experiments.config import UsageError
from experiments.rows import Data, Row
from gapjax import checkpoints

_TRAINING = ("train", "training")  # the stores of joint training
# What it does not depend on: rows that differ in these alone share it.
_AFTER_TRAINING = ("refit_epochs", "recipes", "num_optimal", "note")


class Job(NamedTuple):
    """One row with one seed."""

    name: str
    row: Row
    seed: int
    data: Data
    vae: gapjax.VAE
    out: Path

    def key(self, stage: str, *numbers: int) -> jax.Array:
        """The key of a stage; numbers fold into it."""
        stages = ("train", "refit", "evaluate", "search", "newton")
        key = jax.random.fold_in(jax.random.key(self.seed), stages.index(stage))
        for number in numbers:
            key = jax.random.fold_in(key, number)
        return key

    def place(self, store: str) -> Path:
        """The folder of a store, with an entry for each seed."""
        name = self.name
        if store in _TRAINING:
            digest = hashlib.sha256(json.dumps(self.facts(store), sort_keys=True).encode())
            name = f"{Path(self.row.data).stem}_{self.row.model}_{digest.hexdigest()[:8]}"
        return self.out / "checkpoints" / name / store

    def has(self, store: str) -> bool:
        """Whether it is kept; UsageError: what is kept there was made with something else."""
        place = self.place(store)
        if self.seed not in checkpoints.numbers(place):
            return False
        if checkpoints.record(place, self.seed)["made_with"] != self.facts(store):
            raise UsageError(
                f"{place} is of another definition of the row or of other data; give another --out"
            )
        return True

    def kept(self, store: str, like: Any, compute: Callable[[], tuple[Any, dict]]) -> tuple:
        """The tree and the record of a store, computed where it is not there.

        `like` is as `checkpoints.restore` takes it, or a function of the record that gives it.
        """
        place = self.place(store)
        if not self.has(store):
            clock = time.monotonic()
            tree, facts = compute()
            facts = stores.entry_metadata(clock) | facts | {"made_with": self.facts(store)}
            checkpoints.save(place, self.seed, tree, facts)
            text = f"{self.name} seed {self.seed}, {store}"
            tqdm.write(f"{text:48} {facts.get('nats', float('nan')):10.3f} nats "
                       f"{facts['seconds']:7.1f} s")  # fmt: skip
        if callable(like):
            like = like(checkpoints.record(place, self.seed))
        return checkpoints.restore(place, self.seed, like)

    def facts(self, store: str) -> dict:
        """What all that is kept in a store depends on, as JSON gives it back."""
        row = self.row._asdict() | {"objective": objective_name(self.row), "note": ""}
        if row["early"] is None:  # as what was kept before a row could name it
            del row["early"]
        left_out = _AFTER_TRAINING if store in _TRAINING else ()
        row = {name: value for name, value in row.items() if name not in left_out}
        return json.loads(json.dumps({"row": row, "data": self.data.checksum}))


def objective_name(row: Row) -> str:
    """The objective of its training, as files have it."""
    return getattr(row.objective, "__name__", repr(row.objective))
