"""The form of results.json: its types, how a row is made from evaluations, reading and writing.

Every program that writes results.json and every one that reads it takes the form from here. Keys
may be added, not renamed; those marked `NotRequired` are of some runs or refits. A number that is
not known, such as the standard error of a mean over one image, is NaN in memory, null in the file.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np

from experiments.show.formatting import finite
from gapjax.measure.statistics import effective_number
from gapjax.results import estimates
from gapjax.results.estimates import Evaluation, inference_gaps, paired_difference, summarize

VERSION = 1
REFITS = ("self_consistent", "control", "optimal")
# The refits that are also shown with their weights averaged over the epochs of the refit.
AVERAGED = ("self_consistent", "control")
REFITTED = (*REFITS, *(f"{kind}_averaged" for kind in AVERAGED))  # all encoders of refits


class Mean(TypedDict):
    """A mean over images, bits per dimension, and its standard error (null of one image)."""

    bpd: float
    stderr: float | None


class ByImage(TypedDict):
    """What `median` and `better` of a difference were measured with; see `gapjax.Difference`."""

    num_images: int  # the first of the set
    num_samples: int | None  # posterior samples of each; null where the numbers are exact
    better_interval: list[float | None]  # 95 %
    better_bias: float  # what half of the samples give, minus `better`
    median_bias: float
    sign_test: float  # its p-value


class Difference(Mean):
    """A paired difference over images; see `gapjax.Difference`.

    Files of older versions lack `by_image`: their `median` and `better` are of too few posterior
    samples and are not to be shown.
    """

    median: float | None
    better: float | None  # fraction_improved
    better_stderr: float | None
    num_effective: float
    by_image: NotRequired[ByImage]


class Curve(TypedDict):
    """A refit's measurements: epochs done, and the test BPD after them ("bpd" of the optimal)."""

    epoch: list[int]
    test_bpd: NotRequired[list[float]]
    bpd: NotRequired[list[float]]


class RefitRecord(TypedDict):
    """What one refit did."""

    steps: int
    curve: Curve
    train_objective_bpd: list[float]
    converged: NotRequired[bool]
    last_improvement: NotRequired[float]


class GradientRecord(TypedDict):
    """How many examples the squared gradient of the encoder rests on, of how many measured."""

    num_examples: int
    num_effective: float


class Effect(TypedDict):
    """What the refits gain on one kind of image."""

    as_trained: Mean
    control: Difference
    self_consistent: Difference
    gradient: NotRequired[GradientRecord]


class Effects(TypedDict):
    """By kind of image: fresh samples of the model, training images, test images."""

    model: Effect
    train: Effect
    test: Effect


class Checkpoint(TypedDict):
    """A row: one checkpoint and its refits. The test set, where no other is named."""

    epoch: int
    train: Mean
    test: Mean
    optimal: Mean
    self_consistent: Mean
    control: Mean
    inference_gap: Difference
    gain: Difference
    gain_over_control: Difference
    gap_closed: float | None
    gap_closed_stderr: float | None
    self_consistent_averaged: NotRequired[Mean]
    control_averaged: NotRequired[Mean]
    gain_averaged: NotRequired[Difference]
    gain_over_control_averaged: NotRequired[Difference]
    gap_closed_averaged: NotRequired[float | None]
    gap_closed_stderr_averaged: NotRequired[float | None]
    validation: NotRequired[Mean]
    rise: NotRequired[Mean]  # of test BPD since its lowest checkpoint, paired
    refits: NotRequired[dict[str, RefitRecord]]
    effects: NotRequired[Effects]


class Claim(TypedDict):
    """A claim of the paper, judged by the numbers of the run; null where it cannot be."""

    claim: str
    value: float | None
    threshold: float | None
    holds: bool | None
    detail: str


class Best(Mean):
    """The checkpoint of the lowest held-out BPD as trained, and the set it was chosen on."""

    epoch: int
    chosen_on: str  # "validation" or "test"


class Results(TypedDict):
    """The whole file."""

    schema: int
    preset: str
    dataset: str
    event_shape: list[int]
    config: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    num_eval_samples: int
    checkpoints: list[Checkpoint]
    best: Best
    claims: list[Claim]
    seconds: dict[str, float]
    notes: list[str]


def checkpoint_row(
    epoch: int,
    evaluations: Mapping[str, Evaluation],
    refits: Mapping[str, RefitRecord] | None = None,
    of_images: Mapping[str, Evaluation] | None = None,
) -> Checkpoint:
    """A row of results.json, with paired differences.

    Args:
      epoch: of the checkpoint.
      evaluations: "train" (of the training set), "test", "optimal", "self_consistent" and
        "control" (of the test set, by encoder), on common noise. Where there are
        "self_consistent_averaged" and "control_averaged", they are compared as well; every other
        set is given with its mean.
      refits: what the refits did.
      of_images: those of the test set with more posterior samples, of as many of its images as are
        wanted, for shares and medians; by default `evaluations`.
    """
    of_images = of_images or evaluations
    row: dict[str, Any] = {
        "epoch": epoch,
        **{name: _mean(evaluation) for name, evaluation in evaluations.items()},
        **_gaps(evaluations, of_images),
    }
    if all(f"{kind}_averaged" in evaluations for kind in AVERAGED):
        averaged = lambda of: {**of, **{kind: of[f"{kind}_averaged"] for kind in AVERAGED}}
        gaps = _gaps(averaged(evaluations), averaged(of_images))
        del gaps["inference_gap"]  # that of the row: no refit it compares is averaged
        row |= {f"{name}_averaged": value for name, value in gaps.items()}
    return row if refits is None else row | {"refits": dict(refits)}


def add_rises(rows: Sequence[Checkpoint], tested: Sequence[Evaluation]) -> None:
    """Adds to each row how far test BPD as trained, `tested`, has risen since its lowest."""
    lowest = min(tested, key=lambda evaluation: evaluation.bpd)
    for row, evaluation in zip(rows, tested, strict=True):
        row["rise"] = _mean(paired_difference(evaluation, lowest))


def effects(
    measured: Mapping[str, Mapping[str, Any]],
    tested: Mapping[str, Evaluation],
    of_images: Mapping[str, Mapping[str, Evaluation]],
) -> Effects:
    """What self-consistent training and its control gain on each kind of image.

    Args:
      measured: what `experiments.effects.measure` gives, for "model" and "train".
      tested: the evaluations of the test set: "test" (as trained) and those of the refits.
      of_images: by kind of image, those for shares and medians, as of `checkpoint_row`.
    """
    entry = {}
    for name, of_kind in measured.items():
        bpds = of_kind["bpd"].items()
        by_encoder = {encoder: summarize(np.asarray(bpd), math.nan) for encoder, bpd in bpds}
        entry[name] = _effect("as_trained", by_encoder, of_images[name])
        squares = np.asarray(of_kind["gradient"], np.float64) ** 2
        number = effective_number(squares)
        entry[name]["gradient"] = {"num_examples": len(squares), "num_effective": number}
    return {**entry, "test": _effect("test", tested, of_images["test"])}


def best(rows: Sequence[Checkpoint]) -> Best:
    """The checkpoint of the lowest held-out BPD as trained, and what it was chosen on."""
    chosen_on = "validation" if "validation" in rows[0] else "test"
    row = min(rows, key=lambda row: row[chosen_on]["bpd"])
    return {"epoch": row["epoch"], **row[chosen_on], "chosen_on": chosen_on}


def dumps(results: Mapping[str, Any]) -> str:
    """Results as JSON, indented. What is no finite number becomes null, which JSON has."""
    return json.dumps(plain(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """The value as JSON has it: NamedTuples as objects, and null for every non-finite number."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def loads(text: str) -> Results:
    """Reads results.json; ValueError if it is not JSON, or not of this form."""
    results = json.loads(text)
    schema = results.get("schema") if isinstance(results, dict) else type(results).__name__
    if schema != VERSION:
        raise ValueError(f"this is no results.json of schema {VERSION}: its schema is {schema}")
    missing = Results.__required_keys__ - set(results)
    rows = results.get("checkpoints")
    if not isinstance(rows, list) or not rows:
        missing |= {"checkpoints"}
    else:
        missing = missing.union(*(Checkpoint.__required_keys__ - set(row) for row in rows))
    if missing:
        raise ValueError(f"results.json lacks {', '.join(sorted(missing))}")
    return results


def difference(compared: estimates.Difference, shares: estimates.Difference) -> Difference:
    """A paired difference under the names that files have; the share and the median of `shares`."""
    known = finite(shares.fraction_improved)
    entry: Difference = {
        "bpd": compared.bpd, "stderr": compared.stderr, "median": finite(shares.median),
        "better": known, "better_stderr": finite(shares.fraction_improved_stderr),
        "num_effective": compared.num_effective,
    }  # fmt: skip
    if known is not None:
        entry["by_image"] = {
            "num_images": shares.num_images,
            "num_samples": int(shares.num_samples) if math.isfinite(shares.num_samples) else None,
            "better_interval": [finite(end) for end in shares.fraction_improved_interval],
            "better_bias": shares.fraction_improved_bias, "median_bias": shares.median_bias,
            "sign_test": shares.sign_test,
        }  # fmt: skip
    return entry


def _mean(evaluation: Evaluation | estimates.Difference) -> Mean:
    return {"bpd": evaluation.bpd, "stderr": evaluation.stderr}


def _gaps(
    evaluations: Mapping[str, Evaluation], of_images: Mapping[str, Evaluation]
) -> dict[str, Any]:
    order = ("test", "optimal", "self_consistent", "control")
    gaps, shares = (
        inference_gaps(*(of[name] for name in order)) for of in (evaluations, of_images)
    )
    compared = {
        key: difference(getattr(gaps, key), getattr(shares, key))
        for key in ("inference_gap", "gain", "gain_over_control")
    }
    return compared | {key: getattr(gaps, key) for key in ("gap_closed", "gap_closed_stderr")}


def _effect(
    trained: str, tested: Mapping[str, Evaluation], of_images: Mapping[str, Evaluation]
) -> dict[str, Any]:
    gain = lambda of, kind: paired_difference(of[trained], of[kind])
    gains = {
        kind: difference(gain(tested, kind), gain(of_images, kind))
        for kind in ("control", "self_consistent")
    }
    return {"as_trained": _mean(tested[trained]), **gains}
