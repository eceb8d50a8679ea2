"""`Config`, what a run computes: its fields, their checks, and its form in config.json."""

from collections.abc import Iterable
from typing import NamedTuple, get_args, get_origin, get_type_hints

from gapjax.data import DATASETS, FILES, closest_name, names_data
from gapjax.model.distributions import MIN_UNIFORM_WEIGHT
from gapjax.results.estimates import MIN_SAMPLES

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
    """Posterior samples of each image, an even number, for shares and medians over images."""
    return 2 * -(-max(MIN_SAMPLES, config.num_eval_samples) // 2)


def share_images(config: Config) -> int:
    """The most images of each kind for them, so many that a quick look stays quick."""
    return min(1000, 50 * config.num_eval_samples)


def check(config: Config) -> None:
    """Raises UsageError for a value that cannot be used; flags say it by their name."""
    if not names_data(config.dataset):
        known("dataset", config.dataset, DATASETS, f"or {FILES}")
    c, least = config, MIN_UNIFORM_WEIGHT
    counts = (
        "num_epochs", "checkpoint_every", "refit_epochs", "optimal_epochs", "batch_size",
        "latent_dim", "num_eval_samples", "refit_batch_size",
    )  # fmt: skip
    is_count = lambda name: getattr(c, name) is None or getattr(c, name) >= 1
    for name, is_good, words in (
        ("alpha", 0 <= c.alpha <= 1, "it must be in [0, 1]"),
        ("threshold", 0 < c.threshold <= 1, "it must be in (0, 1]"),
        ("learning_rate", 0 < c.learning_rate < float("inf"), "it must be positive"),
        *((name, is_count(name), "it must be at least 1") for name in counts),
        ("uniform_weight", not c.uniform_weight or least <= c.uniform_weight <= 1,
         f"it must be 0, or in [{least:g}, 1]"),
        ("validation", c.validation >= 0, "it must be at least 0"),
        ("hidden_sizes", min(c.hidden_sizes, default=1) >= 1, "each must be at least 1"),
        ("seed", 0 <= c.seed < 2**32, "it must be in [0, 2^32)"),
        ("binarization_seed", 0 <= c.binarization_seed < 2**32, "it must be in [0, 2^32)"),
    ):  # fmt: skip
        if not is_good:
            raise UsageError(f"--{name} is {getattr(config, name)}; {words}")
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
