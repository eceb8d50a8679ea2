"""What programs that refit the checkpoints of several runs share: opening, keeping, summing up."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import gapjax
from experiments.config import UsageError
from experiments.run import Run, prepare
from experiments.workdir import Workdir
from gapjax import checkpoints, parallel
from gapjax.measure.statistics import mean_and_stderr

_Item = TypeVar("_Item")


def open_runs(
    folders: Sequence[str], data_dir: str | None, *, validation: bool = True
) -> list[Run]:
    """Runs that differ in their seeds alone, for reading; their folders are not claimed.

    Args:
      folders: their workdirs.
      data_dir: where MNIST is.
      validation: whether they must hold out validation images.

    Raises:
      UsageError: no folders, different configurations, or no validation images.
    """
    if not folders:
        raise UsageError("--runs is not given; name the workdirs of trained runs")
    runs: list[Run] = []
    for folder in folders:
        workdir = Workdir(Path(folder))
        config, dataset, heldout, vae = prepare(workdir.config(), data_dir)
        if heldout is None and validation:
            raise UsageError(
                f"--runs: {folder} holds out no validation images to choose a recipe by; "
                "name those to compare with --recipes, or train it with --validation"
            )
        runs.append(Run(config, dataset, vae, workdir, data_dir, heldout))
        if config._replace(seed=0) != runs[0].config._replace(seed=0):
            raise UsageError(f"--runs: {folder} is of another configuration than {folders[0]}")
    runs.sort(key=lambda run: run.config.seed)
    if len({run.config.seed for run in runs}) < len(runs):
        raise UsageError("--runs: two are of the same seed")
    return runs


def checkpoint_facts(run: Run, epoch: int) -> dict:
    """What an entry records of the checkpoint that it was computed from."""
    store = run.workdir.checkpoints / "train"
    return {"epoch": epoch, "checkpoint": checkpoints.checksum(store, epoch)}


def is_kept(store: Path, run: Run, made_with: dict) -> bool:
    """Whether there is an entry of the run's seed that was made with this."""
    if run.config.seed not in checkpoints.numbers(store):
        return False
    record = checkpoints.record(store, run.config.seed)
    if "recipe" in record:  # a setting that is younger than the entry had its default then
        record["recipe"] = plain_recipe(gapjax.Recipe(sources=())) | record["recipe"]
    return all(record.get(key) == value for key, value in made_with.items())


def companies(missing: Sequence[_Item]) -> list[list[_Item]]:
    """Those that are refitted in one program: on GPUs and TPUs all, on CPUs each by itself."""
    if parallel.is_accelerated(parallel.all_devices()):
        return [list(missing)] if missing else []
    return [[each] for each in missing]


def over_seeds(values: Any) -> dict:
    """Mean of a number by seed and its standard error; of one seed there is none."""
    values = np.asarray(values, np.float64)
    mean, stderr = mean_and_stderr(values)
    alone = len(values) == 1
    return {"mean": mean, "stderr": None if alone else stderr, "values": values.tolist()}


def over_seeds_and_images(per_image: np.ndarray) -> dict:
    """`over_seeds` of the means of [R, N] numbers, and the standard error over the N images."""
    over_images = mean_and_stderr(per_image.mean(0, dtype=np.float64))[1]
    return over_seeds(per_image.mean(1, dtype=np.float64)) | {"stderr_over_images": over_images}


def plain_recipe(recipe: gapjax.Recipe) -> dict:
    """A recipe as JSON gives it back."""
    listed = lambda value: [listed(each) for each in value] if isinstance(value, tuple) else value
    return {name: listed(value) for name, value in recipe._asdict().items() if name != "evidence"}
