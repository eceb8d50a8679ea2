"""`Config`, what a run computes: its fields, their checks, and its form in config.json."""

from collections.abc import Iterable
from typing import NamedTuple, get_args, get_origin, get_type_hints

from gapjax.data import DATASETS, FILES, closest_name, names_data
from gapjax.model.distributions import MIN_UNIFORM_WEIGHT
from gapjax.results.estimates import MIN_SAMPLES

SHARE_IMAGES = 1000  # of each kind, the first: shares and medians over images are of these
_MOST_CHECKPOINTS = 10_000


class UsageError(ValueError):
    """A flag that cannot be used; one line names it, its value, and what would work."""


class Config(NamedTuple):
    """What a run computes: two runs of equal configurations give equal numbers.

    A field that is None takes the default that fits the data.
    """

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
    validation: int
    posterior: str
    uniform_weight: float | None
    refit_batch_size: int | None
    mixture: str
    recipe: str


def config_from_json(values: object) -> Config:
    """A configuration as config.json has it; ValueError names a field that is not as it must be."""
    if not isinstance(values, dict):
        raise ValueError(f"config is {values!r}, not an object")
    for kind, names in (
        ("lacks", set(Config._fields) - set(values)),
        ("does not know", set(values) - set(Config._fields)),
    ):
        if names:
            raise ValueError(f"this version {kind} {', '.join(sorted(names))}")
    hints = get_type_hints(Config)
    return Config(**{name: _typed(name, values[name], hints[name]) for name in Config._fields})


def epochs(config: Config) -> range:
    """The epochs of the checkpoints."""
    every = config.checkpoint_every
    return range(every, config.num_epochs + 1, every)


def share_samples(config: Config) -> int:
    """Posterior samples of each image for shares and medians over images."""
    return max(MIN_SAMPLES, config.num_eval_samples)


def check(config: Config) -> None:
    """Raises UsageError for a value that cannot be used; flags say it by their name."""
    if not names_data(config.dataset):
        known("dataset", config.dataset, DATASETS, f"or {FILES}")
    refuse = lambda name, words: UsageError(f"--{name} is {getattr(config, name)}; {words}")
    if not 0 <= config.alpha <= 1:
        raise refuse("alpha", "it must be in [0, 1]")
    if not 0 < config.threshold <= 1:
        raise refuse("threshold", "it must be in (0, 1]")
    if not (config.learning_rate > 0 and config.learning_rate < float("inf")):
        raise refuse("learning_rate", "it must be positive")
    for name in (
        "num_epochs", "checkpoint_every", "refit_epochs", "optimal_epochs", "batch_size",
        "latent_dim", "num_eval_samples", "refit_batch_size",
    ):  # fmt: skip
        value = getattr(config, name)
        if value is not None and value < 1:
            raise refuse(name, "it must be at least 1")
    weight, least = config.uniform_weight, MIN_UNIFORM_WEIGHT
    if weight and not least <= weight <= 1:
        raise refuse("uniform_weight", f"it must be 0, or in [{least:g}, 1]")
    if config.validation < 0:
        raise refuse("validation", "it must be at least 0")
    if any(size < 1 for size in config.hidden_sizes):
        raise refuse("hidden_sizes", "each must be at least 1")
    for name in ("seed", "binarization_seed"):
        if not 0 <= getattr(config, name) < 2**32:
            raise refuse(name, "it must be in [0, 2^32)")
    if config.num_epochs % config.checkpoint_every:
        raise UsageError(
            f"--checkpoint_every is {config.checkpoint_every}, which does not divide "
            f"--num_epochs={config.num_epochs}"
        )
    if config.num_epochs // config.checkpoint_every > _MOST_CHECKPOINTS:
        raise UsageError(
            f"--num_epochs is {config.num_epochs} and --checkpoint_every "
            f"{config.checkpoint_every}, which makes more than {_MOST_CHECKPOINTS:,} checkpoints"
        )


def known(flag: str, value: str, names: Iterable[str], other: str = "") -> str:
    """The value, which must be one of the names; UsageError suggests the closest of them."""
    if value in names:
        return value
    close = closest_name(value, names)
    hint = f" (did you mean {close}?)" if close else ""
    others = ", ".join(names) + (f", {other}" if other else "")
    raise UsageError(f"--{flag} is {value!r}, which is not known{hint}; it can be {others}")


def _typed(name: str, value: object, annotation: object) -> object:
    """The value, if JSON's type is that of the annotation; sequences become tuples."""
    if get_origin(annotation) is tuple:
        if isinstance(value, list | tuple) and all(type(each) is int for each in value):
            return tuple(value)
    else:
        types = get_args(annotation) or (annotation,)
        types = (*types, int) if float in types else types
        if type(value) in types:
            return value
    raise ValueError(f"{name} is {value!r}, which is of another type")
