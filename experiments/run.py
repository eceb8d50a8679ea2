"""A run of the experiments: its configuration, data, model and folder, and what the folder holds.

Every random key is a function of the seed and of what it is for, so numbers do not depend on how
often a run was interrupted.
"""

import functools
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

import gapjax
from experiments.config import Config, UsageError, epochs
from experiments.cost import check_memory
from experiments.options import Saving
from experiments.show.formatting import duration
from experiments.workdir import Workdir
from gapjax import jobs, parallel
from gapjax.fit.loop import SWEEPS
from gapjax.fit.step import steps_per_epoch
from gapjax.model.mlp import UNIFORM_WEIGHT

_MOST_LEVELS = 256  # of the likelihoods that flags name
_MOST_STEPS = 2**31 - 1  # a state counts them in int32
_LINE_SECONDS = 60  # between two lines of a bar in a log
OPTIMAL_NOTE = "Optimal inference is fitted on the test set. Its BPD is a diagnostic only."
# The number of each purpose is a part of its key: a new purpose takes a new number.
_PURPOSES = {
    "train": 0, "refit": 1, "optimal": 2, "evaluate": 3, "monitor": 4, "pictures": 5, "ledger": 6,
    "simulated": 7, "effects": 8,
}  # fmt: skip


class Run(NamedTuple):
    """Everything a phase needs."""

    config: Config
    dataset: gapjax.Dataset  # uint8
    vae: gapjax.VAE
    workdir: Workdir  # claimed by `start`
    # Where the data was looked for, as given; no part of what is computed.
    data_dir: str | None = None
    validation: np.ndarray | None = None  # [V, *event] uint8, taken off the training set
    saving: Saving = Saving()
    # How refits are computed: one by one where "off" or "cores", or in one program as in
    # `gapjax.refit_encoder`; see `sweeps` for "auto".
    sweep: str = "auto"
    cores: tuple[jax.Device, ...] = ()  # for refits that go side by side; none: one after another

    def key(self, purpose: str, epoch: int = 0) -> jax.Array:
        """The key of a purpose, for the checkpoint of an epoch."""
        purpose_key = jax.random.fold_in(jax.random.key(self.config.seed), _PURPOSES[purpose])
        return jax.random.fold_in(purpose_key, epoch)

    @property
    def epochs(self) -> list[int]:
        """The epochs of the checkpoints."""
        return list(epochs(self.config))

    def interrupted(self) -> bool:
        """Whether a signal has asked any process of the run to end it."""
        return jobs.any_process(self.workdir.interrupted)

    def sweeps(self) -> bool:
        """Whether the refits of all checkpoints are one program."""
        if self.sweep == "auto":
            everywhere, alone = parallel.all_devices(), jobs.process()[1] == 1
            return alone and (parallel.is_accelerated(everywhere) or len(everywhere) > 1)
        return self.sweep in SWEEPS

    def run_jobs(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Does what may be done in any order: at once, a thing on each of `cores`; else in turn.

        Worth it where a program leaves cores idle, as refits in small batches do; evaluations and
        ledgers do not.
        """

        def unless_interrupted(task: Callable[[], None]) -> None:
            if self.interrupted():
                raise KeyboardInterrupt
            task()

        stop = functools.partial(setattr, self.workdir, "interrupted", True)
        several = [functools.partial(unless_interrupted, task) for task in tasks]
        jobs.run_concurrently(several, self.cores, stop)


def prepare(config: Config, data_dir: str | None, workdir: Workdir | None = None) -> Run:
    """Loads the data, checks that the configuration fits it, and makes the model; see `start`.

    The run has every default resolved. Data that are not those of the workdir are refused first:
    they may not fit the flags either.
    """
    dataset = gapjax.load_dataset(
        config.dataset, data_dir=data_dir, binarization=config.binarization,
        threshold=config.threshold, binarization_seed=config.binarization_seed,
        levels=config.levels,
    )  # fmt: skip
    if workdir is not None:
        workdir.check_data(config, dataset.provenance)
    if contexts := dataset.provenance.get("contexts"):
        raise UsageError(
            f"--dataset={config.dataset} has contexts ({', '.join(contexts)}), for which the "
            "programs have no model; leave them out of the file, or use the library with a "
            "conditional model"
        )
    if dataset.levels is None or dataset.levels > _MOST_LEVELS:
        held = f"{dataset.levels} levels" if dataset.levels else f"{dataset.train.dtype}"
        raise UsageError(
            f"--dataset={config.dataset} holds {held}, for which the programs have no likelihood; "
            f"give integers below {_MOST_LEVELS}, for x in [0, 1] for example "
            "numpy.round(255 * x).astype(numpy.uint8), or use the library with a model of your own"
        )
    dataset, validation = _hold_out(dataset, config.validation)
    _check_sizes(config, dataset)
    binary = dataset.levels == 2
    likelihood = config.likelihood or ("bernoulli" if binary else "discretized_logistic")
    if binary != (likelihood == "bernoulli"):
        raise UsageError(
            f"--likelihood is {likelihood}, but --dataset={config.dataset} has {dataset.levels} "
            "levels; use bernoulli for binary data and discretized_logistic for grey"
        )
    if binary and config.uniform_weight:
        raise UsageError(
            f"--uniform_weight is {config.uniform_weight}, but --dataset={config.dataset} is "
            "binary; it is a part of the discretized logistic"
        )
    if config.uniform_weight is None:
        config = config._replace(uniform_weight=0.0 if binary else UNIFORM_WEIGHT)
    check_memory(config, dataset)
    vae = make_vae(config, dataset.event_shape, dataset.levels)
    return Run(config, dataset, vae, workdir, data_dir, validation)


def make_vae(config: Config, event_shape: tuple[int, ...], levels: int) -> gapjax.VAE:
    """The model of a configuration whose defaults are resolved, for images of this kind."""
    likelihood = config.likelihood or ("bernoulli" if levels == 2 else "discretized_logistic")
    return gapjax.mlp_vae(
        event_shape, likelihood, latent_dim=config.latent_dim, hidden_sizes=config.hidden_sizes,
        levels=levels, posterior=config.posterior, uniform_weight=config.uniform_weight or 0.0,
    )  # fmt: skip


def start(prepared: Run, workdir: Workdir, **how: Any) -> Run:
    """Claims the workdir for what was prepared; `how` gives other fields of the run."""
    run = prepared._replace(workdir=workdir, **how)
    workdir.claim(run.config, run.dataset.provenance)
    commit()  # of the code that is loaded, not of what the checkout holds hours later
    return run


def _check_sizes(config: Config, dataset: gapjax.Dataset) -> None:
    sizes = {"training": len(dataset.train), "test": len(dataset.test)}
    for phase, flag, name in (
        ("num_epochs", "batch_size", "training"), ("optimal_epochs", "batch_size", "test"),
        ("refit_epochs", "refit_batch_size", "training"),
    ):  # fmt: skip
        num_epochs, size = getattr(config, phase), getattr(config, flag) or config.batch_size
        if size > sizes[name]:
            raise UsageError(f"--{flag} is {size}, more than the {sizes[name]} {name} images")
        steps = num_epochs * steps_per_epoch(sizes[name], size)
        if steps > _MOST_STEPS:
            raise UsageError(
                f"--{phase} is {num_epochs}, which takes {steps:,} optimizer steps; at most "
                f"{_MOST_STEPS:,} can be counted"
            )


def _hold_out(dataset: gapjax.Dataset, number: int) -> tuple[gapjax.Dataset, np.ndarray | None]:
    """Takes images off the training set: the last of an order that is the same for every seed."""
    if number == 0:
        return dataset, None
    num_train = len(dataset.train) - number
    if num_train < 1:
        raise UsageError(
            f"--validation is {number}; it must be less than the {len(dataset.train)} training "
            "images"
        )
    order = np.random.default_rng(0).permutation(len(dataset.train))
    provenance = {**dataset.provenance, "num_train": num_train, "num_validation": number}
    rest = dataset._replace(train=dataset.train[np.sort(order[:num_train])], provenance=provenance)
    return rest, dataset.train[np.sort(order[num_train:])]


def environment() -> dict:
    """What the numbers were computed with."""
    device = jax.devices()[0]
    return {
        "gapjax": gapjax.__version__, "commit": commit(), "python": platform.python_version(),
        "jax": jax.__version__, "jaxlib": importlib.metadata.version("jaxlib"),
        "backend": jax.default_backend(), "device_kind": device.device_kind,
        "device_count": jax.device_count(),
    }  # fmt: skip


@functools.cache
def commit() -> str | None:
    """The commit of the source tree, marked where it has changes; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    said = {"capture_output": True, "text": True, "check": True}
    status = ["status", "--porcelain", "--", "gapjax", "experiments"]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **said).stdout.strip()
        changed = subprocess.run([*git, *status], **said).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} with changes" if changed else commit


@contextmanager
def progress_bar(
    run: Run, name: str, total: int, initial: int = 0, images: int = 0, unit: str = "epochs"
) -> Iterator[Callable[..., None]]:
    """A bar on the terminal; where there is none, a line a minute, and one at the end with the BPD.

    It gives a function of how many units are done and, where there is one, of the BPD so far.
    `images` is how many a unit has, for their number a second; 0 leaves that out.
    """
    name = f"{name:24}"
    hidden = None if run.workdir.writes else True  # None leaves it to tqdm to find a terminal
    bar = tqdm.tqdm(
        desc=name, total=total, initial=initial, unit=unit, dynamic_ncols=True, disable=hidden
    )
    in_log = bar.disable and run.workdir.writes
    begun = said = time.monotonic()
    told, last = initial, None

    def show(done: int, bpd: float | None = None) -> None:
        nonlocal said, told, last
        last, note = bpd, "" if bpd is None else f"{bpd:.4f} BPD"
        if not bar.disable:
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)
        now = time.monotonic()
        if not in_log or now - said < _LINE_SECONDS or done >= total:
            return
        speed = (done - told) / (now - said)
        said, told = now, done
        words = [f"{name} {done} of {total} {unit}", note]
        words += [f"{speed * images:,.0f} images/s"] if images else []
        words += [f"{duration((total - done) / speed)} left"] if speed > 0 else []
        print("  ".join(filter(None, words)), flush=True)

    try:
        yield show
    finally:
        bar.close()
    if in_log and last is not None:
        print(f"{name} {last:.4f} BPD  {time.monotonic() - begun:6.1f} s", flush=True)
