"""The paper's claims, tested with the numbers of one run. A claim may fail."""

import math
from collections.abc import Mapping
from typing import Any

from experiments.show.formatting import finite

_UNKNOWN = (
    "This cannot be judged: the value or the threshold is not a number. A standard error needs at "
    "least two images."
)


def claims(checkpoints: list[dict], alpha: float) -> list[dict]:
    """Tests the paper's claims on the checkpoints of results.json, ascending in epoch.

    Gives {"claim", "value", "threshold", "holds", "detail"} for each. Claims about the course of
    training need several checkpoints, and those about self-consistent training need alpha > 0. A
    number that is not known is None, and so is "holds" where the claim cannot be judged.
    """
    last = checkpoints[-1]
    verdicts = _of_training(checkpoints) if len(checkpoints) > 1 else []
    verdicts.append(
        _judge(
            "There is an inference generalization gap",
            _ratio(last["inference_gap"]), ">", 3.0,
            f"The gap (paired) at epoch {last['epoch']}, divided by its standard error.",
        )
    )  # fmt: skip
    return verdicts + (_of_self_consistent_training(checkpoints) if alpha > 0 else [])


def _of_training(checkpoints: list[dict]) -> list[dict]:
    """The claims about the course of joint training."""
    first, last = checkpoints[0], checkpoints[-1]
    best = min(checkpoints, key=lambda c: c["test"]["bpd"])
    lowest_optimal = min(c["optimal"]["bpd"] for c in checkpoints)
    rise = last["test"]["bpd"] - best["test"]["bpd"]
    error = _number(last["rise"]["stderr"])
    verdicts = [
        _judge(
            "Train BPD falls",
            first["train"]["bpd"] - last["train"]["bpd"], ">", 0.0,
            f"Train BPD at epoch {first['epoch']} minus train BPD at epoch {last['epoch']}.",
        ),
        _judge(
            "Test BPD falls, then rises: the VAE over-fits (figure 1a)",
            rise, ">", 2 * error,
            f"Test BPD at the last checkpoint minus the lowest test BPD, at epoch {best['epoch']}. "
            "The threshold is twice the standard error of this paired difference; the lowest was "
            "chosen on these images.",
        ),
    ]  # fmt: skip
    if rise > 0:
        verdicts.append(_judge(
            "After optimal inference test BPD stays flat: the encoder over-fits (figure 1b)",
            last["optimal"]["bpd"] - lowest_optimal, "<=", rise / 2,
            "BPD after optimal inference (fitted on the test set) at the last checkpoint minus "
            "its lowest value. The threshold is half of the rise of test BPD as trained.",
        ))  # fmt: skip
    return verdicts


def _of_self_consistent_training(checkpoints: list[dict]) -> list[dict]:
    """The claims about self-consistent training and its control."""
    last = checkpoints[-1]
    unknown = [c for c in checkpoints if math.isnan(_ratio(c["gain"]))]
    worst = min(unknown or checkpoints, key=lambda c: _ratio(c["gain"]))
    closest = min(checkpoints, key=lambda c: c["self_consistent"]["bpd"] - c["optimal"]["bpd"])
    return [
        _judge(
            "Self-consistent training beats the encoder as trained, at every checkpoint (figure 2)",
            _ratio(worst["gain"]), ">", 0.0,
            "The smallest ratio of the gain (paired) to its standard error, at epoch "
            f"{worst['epoch']}.",
        ),
        _judge(
            "Its gain is the model samples' doing: it beats the α = 0 control",
            _ratio(last["gain_over_control"]), ">", 2.0,
            f"The gain over the control (paired) at epoch {last['epoch']}, divided by its standard "
            "error.",
        ),
        _judge(
            "Self-consistent training stays above optimal inference (figure 2)",
            closest["self_consistent"]["bpd"] - closest["optimal"]["bpd"], ">", 0.0,
            "The smallest difference of BPD, self-consistent minus optimal inference, at epoch "
            f"{closest['epoch']}.",
        ),
    ]  # fmt: skip


def _judge(claim: str, value: float, relation: str, threshold: float, detail: str) -> dict:
    """Whether a claim holds, which says that the value is `relation` (> or <=) the threshold."""
    is_known = math.isfinite(value) and math.isfinite(threshold)
    holds = value > threshold if relation == ">" else value <= threshold
    verdict = f"The claim holds if the value is {relation} {threshold:.4g}."
    return {
        "claim": claim, "value": finite(value), "threshold": finite(threshold),
        "holds": bool(holds) if is_known else None,
        "detail": f"{detail} {verdict if is_known else _UNKNOWN}",
    }  # fmt: skip


def _ratio(difference: Mapping[str, Any]) -> float:
    """A difference divided by its standard error; NaN where that is not known, or zero."""
    stderr = _number(difference["stderr"])
    return _number(difference["bpd"]) / stderr if stderr > 0 else math.nan


def _number(value: float | None) -> float:
    """What a file has as null, as NaN."""
    return math.nan if value is None else float(value)


def sign_test_contradicts_mean(difference: Mapping[str, Any]) -> bool:
    """Whether the sign of a mean difference is contradicted by a sign test over images.

    It is if as many improved as worsened images are rejected at 5 %, the share of the improved is
    on the other side, and what is left of its bias does not change that. Without enough posterior
    samples (`by_image` is missing) nothing is claimed.
    """
    known = difference.get("by_image")
    if not known or difference["bpd"] is None:
        return False
    excess = difference["better"] - 0.5
    sides = (excess, excess - known["better_bias"])
    return known["sign_test"] < 0.05 and all(side * difference["bpd"] < 0 for side in sides)
