"""Flags to a `Config`: the one place where the programs' flags are defined and checked."""

import functools
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from absl import flags

from experiments.config import Config, UsageError, check, known
from experiments.presets import PRESETS
from experiments.show.formatting import listed
from gapjax.data import BINARIZATIONS, DATASETS, FILES
from gapjax.fit.loop import SWEEPS
from gapjax.fit.recipes import RECIPES
from gapjax.model.mlp import PIXELS, POSTERIORS, UNIFORM_WEIGHT

MIXTURES = ("random", "stratified")
# Those whose encoder is of the trained one's form; the control is made beside each.
_RECIPES = [
    name
    for name, recipe in RECIPES.items()
    if not (recipe.hidden_sizes or recipe.refinement_steps) and name != "control"
]


class _PathParser(flags.ArgumentParser):
    """A path as text that JSON can hold, with ~ expanded; every flag that is a path is one."""

    syntactic_help = "a path; ~ is the home folder"

    def parse(self, argument: str) -> str:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("it is not UTF-8; rename it") from None
        return os.path.expanduser(argument)


class _PathsParser(flags.ListParser):
    """Paths between commas."""

    def parse(self, argument: str | list[str] | None) -> list[str]:
        return [_PathParser().parse(each) for each in super().parse(argument)]


flags.disclaim_key_flags()  # --help shows them as the program's own


def define_path(
    name: str, default: str | None, help: str, flag_values: flags.FlagValues = flags.FLAGS
) -> None:
    """Defines a flag that is a path."""
    flags.DEFINE(_PathParser(), name, default, help, flag_values, flags.ArgumentSerializer())


def define_paths(name: str, help: str) -> None:
    """Defines a flag that is a list of paths."""
    flags.DEFINE(_PathsParser(), name, None, help, serializer=flags.ListSerializer(","))


class Saving(NamedTuple):
    """What is saved of joint training between the checkpoints; it changes nothing computed."""

    every: int = 25  # epochs between two such states; 0 saves none
    keep: int = 1  # how many of them are kept, the newest
    # epochs between the checkpoints whose weights stay when all is done; 0 keeps all
    weights_every: int = 0


_one_of = lambda names: functools.partial(flags.DEFINE_enum, enum_values=names)
_at_least = lambda number: functools.partial(flags.DEFINE_integer, lower_bound=number)
_bool, _int = flags.DEFINE_bool, flags.DEFINE_integer
_float, _str = flags.DEFINE_float, flags.DEFINE_string
_PLACE_FLAGS = (
    (define_path, "workdir", None, "Folder of the run; the same command on it resumes. "
     "Default: runs/PRESET_seedSEED under the current folder."),
    (define_path, "data_dir", None,
     "Where MNIST is: a TensorFlow Datasets folder, or one with the four IDX files."),
    (_one_of(("off", "cores", *SWEEPS)), "sweep", "auto",
     "How the refits of all checkpoints are computed. In one program, spread over the devices: "
     "vmap, side by side; map, one after another. Each on its own: off, one after another; cores, "
     "side by side, each on a core of the CPU, to the same bits. auto: vmap on GPUs and TPUs; on "
     "CPUs cores, or map where JAX was told of several. Several processes: off."),
    (_str, "coordinator", None, "host:port of process 0, where several processes make up a run and "
     "no cluster tells JAX."),
    (_int, "num_processes", None, "How many processes; see --coordinator."),
    (_int, "process_id", None, "Which process this is, from 0."),
    (_bool, "detect_processes", False, "Let JAX look for the other processes: on a TPU pod, where "
     "this same command runs on every worker. Under SLURM, Open MPI and GKE it looks anyway."),
)  # fmt: skip
_SAVING_FLAGS = (
    (_at_least(0), "save_every", Saving().every, "Epochs after which training is saved between "
     "checkpoints, so that an interruption loses no more than these; 0: at checkpoints alone."),
    (_at_least(1), "keep", Saving().keep,
     "How many of the states of --save_every are kept, the newest; checkpoints all are."),
    (_at_least(0), "keep_weights_every", Saving().weights_every, "When all is done, keep the "
     "weights of the last checkpoint and of those at every so many epochs, and of the others the "
     "results alone; 0 keeps all."),
)  # fmt: skip
_RUN_FLAGS = (
    (_str, "preset", "digits", f"Sets the defaults of the others: {', '.join(PRESETS)}."),
    (_int, "seed", 0, "Seed of everything random in the run, but not of the data."),
    (define_path, "dataset", None, f"{', '.join(DATASETS)}, or {FILES}."),
    (_one_of(BINARIZATIONS), "binarization", None,
     "How grey levels become binary; default: what the data set's name says."),
    (_float, "threshold", None, "Share of full brightness from which a pixel is 1."),
    (_int, "binarization_seed", None, "Seed of stochastic binarization."),
    (_int, "levels", None, "Number of pixel levels of a file."),
    (_int, "num_epochs", None, "Epochs of joint training."),
    (_int, "checkpoint_every", None, "Epochs between checkpoints; each is refitted."),
    (_int, "refit_epochs", None, "Epochs of self-consistent training, and of its control."),
    (_int, "optimal_epochs", None, "Most epochs of optimal inference, which ends by convergence."),
    (_float, "alpha", None, "Share of model samples in self-consistent training, 0 to 1."),
    (_int, "batch_size", None, "Examples in an optimizer step."),
    (_int, "refit_batch_size", None, "Examples in a step of self-consistent training and of its "
     "control; default: --batch_size."),
    (_one_of(MIXTURES), "mixture", None, "How self-consistent training mixes: random, each example "
     "is a sample of the model with probability --alpha; stratified, this share of every batch."),
    (_one_of(_RECIPES), "recipe", None, "How self-consistent training refits: paper, by --alpha "
     "and the flags above; or another recipe of gapjax, with its own sources and optimizer. Its "
     "epochs and batch size are the defaults of --refit_epochs and --refit_batch_size. Its control "
     "is the same refit on training images alone."),
    (_float, "learning_rate", None, "Learning rate of Adam, in training and refits."),
    (_int, "latent_dim", None, "Dimension of the latent space."),
    (flags.DEFINE_list, "hidden_sizes", None, "Widths of the hidden layers, e.g. 500,500."),
    (_one_of(PIXELS), "likelihood", None,
     "p(x given z); default: bernoulli for binary data, discretized_logistic for grey."),
    (_float, "uniform_weight", None, "Weight of a uniform over the pixel levels that the "
     "discretized logistic is mixed with, 0 to 1; "
     f"default: {UNIFORM_WEIGHT:g}, the floor of the authors' code."),
    (_int, "num_eval_samples", None, "Posterior samples for each image when BPD is evaluated."),
    (_int, "validation", 0, "Training images to hold out of training, to name the best checkpoint "
     "by; 0: by the test set, which is optimistic."),
    (_one_of(POSTERIORS), "posterior", "diagonal", "Family of q(z given x)."),
    (_bool, "dry_run", False, "Print the resolved configuration, the folder, and an estimate of "
     "memory and time; write nothing."),
)  # fmt: skip


def define_place(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags that say where a run lives; they are no part of what it computes."""
    _define(_PLACE_FLAGS, values)


def define_run(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of `Saving` and `Config`. Those without a default take the preset's."""
    _define(_SAVING_FLAGS + _RUN_FLAGS, values)


def _define(table: tuple, values: flags.FlagValues) -> None:
    for define, name, default, text in table:
        define(name=name, default=default, help=text, flag_values=values)


def config_from_flags(values: flags.FlagValues) -> Config:
    """The preset's defaults, overridden by the flags given, checked."""
    preset = known("preset", values.preset, PRESETS)
    given = {name: values[name].value for name in Config._fields}
    defaults = {**PRESETS[preset], **_recipe_defaults(given)}
    merged = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    merged["mixture"] = merged["mixture"] or "random"
    merged["recipe"] = merged["recipe"] or "paper"
    if merged["refit_batch_size"] == merged["batch_size"]:  # one way to say so
        merged["refit_batch_size"] = None
    merged["hidden_sizes"] = tuple(integers("hidden_sizes", merged["hidden_sizes"]))
    config = Config(**merged)
    check(config)
    return config


def _recipe_defaults(given: dict) -> dict:
    """The defaults that --recipe brings; none where it is the paper's."""
    name = given["recipe"] or "paper"
    if name == "paper":
        return {}
    for flag in ("alpha", "mixture"):
        if given[flag] is not None:
            raise UsageError(f"--{flag} is of --recipe=paper; leave it out with --recipe={name}")
    recipe = RECIPES[name]
    size = recipe.batch_size
    return {"refit_epochs": recipe.num_epochs, "refit_batch_size": size, "mixture": None}


def integers(flag: str, values: Iterable[str | int]) -> list[int]:
    """The values of a list flag."""
    values = list(values)
    try:
        return [int(value) for value in values]
    except ValueError:
        given = ",".join(map(str, values))
        raise UsageError(f"--{flag} is {given!r}; it must be integers, e.g. 100,500") from None


def checkpoints_of(flag: str, given: Iterable[str] | None, saved: Sequence[int]) -> list[int]:
    """The saved checkpoints that a list flag names, in order; all where it is not given."""
    wanted = list(saved) if given is None else sorted(set(integers(flag, given)))
    missing = [epoch for epoch in wanted if epoch not in saved]
    if missing or not wanted:
        which = f"epoch {missing[0]}" if missing else "any epoch"
        raise UsageError(f"--{flag}: no checkpoint of {which}; there are {listed(saved)}")
    return wanted
