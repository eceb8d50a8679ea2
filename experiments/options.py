"""Flags to a `Config`: the one place where the programs' flags are defined and checked."""

import difflib
from typing import NamedTuple

from absl import flags

from experiments.presets import PRESETS
from gapjax import DATASETS


class UsageError(ValueError):
    """A flag that cannot be used; one line names it, its value, and what would do."""


class Config(NamedTuple):
    """What a run computes: two runs of equal configurations give equal numbers."""

    preset: str
    dataset: str
    binarization: str | None
    threshold: float
    binarization_seed: int
    levels: int | None
    seed: int
    num_epochs: int
    checkpoint_every: int
    refit_epochs: int
    optimal_epochs: int
    alpha: float
    batch_size: int
    learning_rate: float
    latent_dim: int
    hidden_sizes: tuple[int, ...]
    likelihood: str | None
    num_eval_samples: int


def define_place() -> None:
    """Defines the flags that say where a run lives; they are no part of what it computes."""
    flags.DEFINE_string(
        "workdir", None, "Folder of the run; the same command on it resumes. "
        "Default: runs/PRESET_seedSEED under the current folder.",
    )  # fmt: skip
    flags.DEFINE_string(
        "data_dir", None,
        "Where MNIST is: a TensorFlow Datasets folder, or one with the four IDX files.",
    )  # fmt: skip


def define_run() -> None:
    """Defines the flags of `Config`. Those without a default here take the preset's."""
    flags.DEFINE_string("preset", "digits", f"Sets the defaults below: {', '.join(PRESETS)}.")
    flags.DEFINE_integer("seed", 0, "Seed of everything random in the run, but not of the data.")
    flags.DEFINE_string("dataset", None, f"{', '.join(DATASETS)}, or the path of an .npz file.")
    flags.DEFINE_enum(
        "binarization", None, ["none", "threshold", "stochastic"],
        "How grey levels become binary; default: what the data set's name says.",
    )  # fmt: skip
    flags.DEFINE_float("threshold", None, "Share of full brightness from which a pixel is 1.")
    flags.DEFINE_integer("binarization_seed", None, "Seed of stochastic binarization.")
    flags.DEFINE_integer("levels", None, "Number of pixel levels of an .npz file.")
    flags.DEFINE_integer("num_epochs", None, "Epochs of joint training.")
    flags.DEFINE_integer("checkpoint_every", None, "Epochs between checkpoints; each is refitted.")
    flags.DEFINE_integer(
        "refit_epochs", None, "Epochs of self-consistent training, and of its control."
    )
    flags.DEFINE_integer(
        "optimal_epochs", None, "Most epochs of optimal inference, which ends when converged."
    )
    flags.DEFINE_float("alpha", None, "Share of model samples in self-consistent training, 0 to 1.")
    flags.DEFINE_integer("batch_size", None, "Examples in an optimizer step.")
    flags.DEFINE_float("learning_rate", None, "Learning rate of Adam, in training and refits.")
    flags.DEFINE_integer("latent_dim", None, "Dimension of the latent space.")
    flags.DEFINE_list("hidden_sizes", None, "Widths of the hidden layers, e.g. 500,500.")
    flags.DEFINE_enum(
        "likelihood", None, ["bernoulli", "discretized_logistic"],
        "p(x given z); default: bernoulli for binary data, discretized_logistic for grey.",
    )  # fmt: skip
    flags.DEFINE_integer(
        "num_eval_samples", None, "Posterior samples for each image when BPD is evaluated."
    )


def config_from_flags(values: flags.FlagValues) -> Config:
    """The preset's defaults, overridden by the flags given, checked.

    Raises:
      UsageError: an unknown preset or a value that cannot be used.
    """
    preset = _known("preset", values.preset, PRESETS)
    given = {name: values[name].value for name in Config._fields}
    defaults = PRESETS[preset]
    merged = {
        name: value if value is not None else defaults.get(name) for name, value in given.items()
    }
    merged["hidden_sizes"] = tuple(_integers("hidden_sizes", merged["hidden_sizes"]))
    config = Config(**merged)
    _check(config)
    return config


def _check(config: Config) -> None:
    if not config.dataset.endswith(".npz"):
        _known("dataset", config.dataset, DATASETS, "or the path of an .npz file")
    if not 0 <= config.alpha <= 1:
        raise UsageError(f"--alpha is {config.alpha}; it must be in [0, 1]")
    if not 0 < config.threshold <= 1:
        raise UsageError(f"--threshold is {config.threshold}; it must be in (0, 1]")
    if not (config.learning_rate > 0 and config.learning_rate < float("inf")):
        raise UsageError(f"--learning_rate is {config.learning_rate}; it must be positive")
    for name in (
        "num_epochs", "checkpoint_every", "refit_epochs", "optimal_epochs", "batch_size",
        "latent_dim", "num_eval_samples",
    ):  # fmt: skip
        if getattr(config, name) < 1:
            raise UsageError(f"--{name} is {getattr(config, name)}; it must be at least 1")
    if any(size < 1 for size in config.hidden_sizes):
        raise UsageError(f"--hidden_sizes is {config.hidden_sizes}; each must be at least 1")
    for name in ("seed", "binarization_seed"):
        if not 0 <= getattr(config, name) < 2**32:
            raise UsageError(f"--{name} is {getattr(config, name)}; it must be in [0, 2^32)")
    if config.num_epochs % config.checkpoint_every:
        raise UsageError(
            f"--checkpoint_every is {config.checkpoint_every}, which does not divide "
            f"--num_epochs={config.num_epochs}"
        )


def _known(flag: str, value: str, names, other: str = "") -> str:
    if value in names:
        return value
    close = difflib.get_close_matches(value, names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    others = ", ".join(names) + (f", {other}" if other else "")
    raise UsageError(f"--{flag} is {value!r}, which is not known{hint}; it can be {others}")


def _integers(flag: str, values) -> list[int]:
    try:
        return [int(value) for value in values]
    except ValueError:
        given = ",".join(map(str, values))
        raise UsageError(f"--{flag} is {given!r}; it must be integers, e.g. 500,500") from None
