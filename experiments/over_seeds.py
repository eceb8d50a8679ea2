"""Rows of atlas.json: means of what several seeds gave, with errors over seeds and examples."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.rows import spread
from experiments.show.atlas_rows import CHECKPOINTS, CURES
from gapjax.measure.statistics import mean_and_stderr, ratio_of_means
from gapjax.results.estimates import MIN_SAMPLES

Nats = Mapping[str, np.ndarray]  # of one seed, by name, of every example [N]


def over_seeds(values: Any) -> dict:
    """Mean of a number by seed and its standard error; of one seed there is none."""
    values = np.asarray(values, np.float64)
    mean, stderr = mean_and_stderr(values)
    alone = len(values) == 1
    return {"mean": mean, "stderr": None if alone else stderr, "values": values.tolist()}


def mean_of(per_example: Sequence[np.ndarray]) -> dict:
    """Mean of [N] numbers of each seed, with either standard error."""
    summed = over_seeds([np.mean(each, dtype=np.float64) for each in per_example])
    examples = mean_and_stderr(np.mean(per_example, 0, dtype=np.float64))[1]
    return _with_stderr(summed, examples)


def share_of(gains: Sequence[np.ndarray], gaps: Sequence[np.ndarray]) -> dict:
    """As `mean_of`, of the ratios of two means."""
    ratios = [ratio_of_means(*pair)[0] for pair in zip(gains, gaps, strict=True)]
    return _with_stderr(over_seeds(ratios), ratio_of_means(np.mean(gains, 0), np.mean(gaps, 0))[1])


def _with_stderr(summed: dict, over_examples: float) -> dict:
    """Of one seed `stderr` is the one over examples."""
    stderr = over_examples if summed["stderr"] is None else summed["stderr"]
    return summed | {"stderr": stderr, "stderr_over_examples": over_examples}


def row_of(seeds: Sequence[Mapping[str, Mapping]], num_samples: int) -> dict:
    """The part of a row that is measured, from what `atlas.measured` gives of each seed.

    `num_samples` is how many samples of the posterior every ELBO has.
    """
    at = {name: _at_checkpoint([seed[name] for seed in seeds], num_samples) for name in CHECKPOINTS}
    late = at["late"]
    return {
        "seeds": len(seeds), "unit": "nats an example",
        "epochs": [float(np.mean([seed[name]["epoch"] for seed in seeds])) for name in CHECKPOINTS],
        "early_epochs": [seed["early"]["epoch"] for seed in seeds],
        "gap": late.get("gap"), "closed": late.get("closed"), **at,
        "seconds": _costs([seed["late"]["seconds"] for seed in seeds if "seconds" in seed["late"]]),
        "commits": sorted({str(seed[name]["commit"]) for seed in seeds for name in CHECKPOINTS}),
    }  # fmt: skip


def _at_checkpoint(seeds: Sequence[Mapping], num_samples: int) -> dict:
    """What the seeds of a row give at one checkpoint."""
    nats, first = [each["nats"] for each in seeds], seeds[0]["nats"]
    recipes = seeds[0]["validation_by_recipe"]
    minus = functools.partial(_minus, nats)
    names = [name for name in dict.fromkeys((*CURES, *recipes)) if name in first]
    gains = {name: minus(name, "trained") for name in names if name != "newton"}
    over_control = minus("paper", "control")
    result: dict[str, Any] = {
        "validation": over_seeds([each["validation"] for each in seeds]),
        "test": mean_of([each["trained"] for each in nats]),
        "best": [each["best"] for each in seeds],
        "validation_by_recipe": {
            name: over_seeds([each["validation_by_recipe"][name] for each in seeds])
            for name in recipes
        },
        "gain": {name: mean_of(gain) for name, gain in gains.items()},  # of all test examples
        "gain_over_control": mean_of(over_control),
        "refused": seeds[0]["refused"],
    }
    if num_samples >= MIN_SAMPLES:  # below that the noise of each example's own ELBO biases them
        result["examples_that_gain"] = {
            name: {
                "share": mean_of([(1 + np.sign(each)) / 2 for each in gain]),  # ties count half
                "median": over_seeds([np.median(each) for each in gain]),
            }
            for name, gain in {**gains, "paper_over_control": over_control}.items()
        }
    to = next((name for name in ("q_star", "optimal") if name in first), None)
    if to is None:
        return result
    number = len(first[to])
    gap = minus(to, "trained", number)
    result |= {"gap": mean_of(gap), "gap_to": to, "gap_examples": number}
    won = {name: minus(name, "trained", number) for name in names}
    result["closed"] = {
        name: share_of(each, gap) | {"nats": mean_of(each)} for name, each in won.items()
    }
    if "optimal" in first:
        result["gap_to_refit"] = mean_of(gains["optimal"])
    return result | (_by_kind(nats, minus) if "train_q_star" in first else {})


def _minus(nats: Sequence[Nats], name: str, other: str, number: int = 0) -> list[np.ndarray]:
    """By seed the difference of every example [N], or of so many that are evenly spread."""

    def at_places(values: np.ndarray) -> np.ndarray:
        return values if number in (0, len(values)) else values[spread(len(values), number)]

    return [at_places(each[name]) - at_places(each[other]) for each in nats]


def _by_kind(nats: Sequence[Nats], minus: Callable[..., list[np.ndarray]]) -> dict:
    """How far encoders are from q* on each kind of examples, and what over-fits."""
    first, number = nats[0], len(nats[0]["q_star"])
    kinds = {"test": "", "train": "train_", "samples": "samples_"}
    from_q_star = {
        kind: {
            name: mean_of(minus(f"{start}q_star", f"{start}{name}", number))
            for name in ("trained", "paper", "best")
            if f"{start}{name}" in first
        }
        for kind, start in kinds.items()
    }
    test, train = from_q_star["test"]["trained"], from_q_star["train"]["trained"]
    optimal = [mean_of([each[name] for each in nats]) for name in ("train_q_star", "q_star")]

    def difference(one: Mapping, other: Mapping) -> dict:
        """Of two numbers of other examples, by seed."""
        errors = (each["stderr_over_examples"] for each in (one, other))
        values = np.subtract(one["values"], other["values"])
        return _with_stderr(over_seeds(values), math.hypot(*errors))

    return {
        "train": mean_of([each["train_trained"] for each in nats]), "train_gap": train,
        "nats_from_q_star": {kind: each for kind, each in from_q_star.items() if each},
        "over_fitting": {"decoder": difference(*optimal), "encoder": difference(test, train)},
    }  # fmt: skip


def _costs(seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict:
    """Means over seeds of what `atlas.seconds` gives."""
    return {
        kind: {name: float(np.mean([one[kind][name] for one in seeds])) for name in seeds[0][kind]}
        for kind in ("fit", "example")
        if seeds
    }
