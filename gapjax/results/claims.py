"""The paper's claims, computed from the numbers of one run. A claim may fail."""

from collections.abc import Mapping
from typing import Any


def claims(checkpoints: list[dict], alpha: float) -> list[dict]:
    """Judges a run.

    Args:
      checkpoints: those of results.json, ascending in epoch.
      alpha: share of model samples in self-consistent training.

    Returns:
      {"claim", "value", "threshold", "holds", "detail"} for each; a claim that needs several
      checkpoints, or model samples, is left out where there are none.
    """
    first, last = checkpoints[0], checkpoints[-1]
    verdicts = []

    def judge(claim: str, value: float, relation: str, threshold: float, detail: str) -> None:
        holds = value > threshold if relation == ">" else value <= threshold
        verdicts.append(
            {
                "claim": claim, "value": float(value), "threshold": float(threshold),
                "holds": bool(holds), "detail": f"{detail} Holds if {relation} {threshold:.4g}.",
            }
        )  # fmt: skip

    if len(checkpoints) > 1:
        best = min(checkpoints, key=lambda c: c["test"]["bpd"])
        lowest_optimal = min(c["optimal"]["bpd"] for c in checkpoints)
        judge(
            "Train BPD falls",
            first["train"]["bpd"] - last["train"]["bpd"], ">", 0.0,
            f"Train BPD of epoch {first['epoch']} minus that of epoch {last['epoch']}.",
        )  # fmt: skip
        rise = last["test"]["bpd"] - best["test"]["bpd"]
        judge(
            "Test BPD falls, then rises: the VAE over-fits (figure 1a)",
            rise, ">", 2 * last["test"]["stderr"],
            f"Test BPD of the last checkpoint minus the lowest, at epoch {best['epoch']}; the "
            "threshold is twice the standard error of the last.",
        )  # fmt: skip
        if rise > 0:
            judge(
                "After optimal inference test BPD stays flat: the encoder over-fits (figure 1b)",
                last["optimal"]["bpd"] - lowest_optimal, "<=", rise / 2,
                "Optimal-inference BPD of the last checkpoint minus its lowest (fitted on the test "
                "set); the threshold is half of the rise without it.",
            )  # fmt: skip
    z = last["inference_gap"]["bpd"] / last["inference_gap"]["stderr"]
    judge(
        "There is an inference generalization gap",
        z, ">", 3.0,
        f"The gap at epoch {last['epoch']} (paired) in its standard errors.",
    )  # fmt: skip
    if alpha > 0:
        worst = min(checkpoints, key=lambda c: c["gain"]["bpd"] / c["gain"]["stderr"])
        judge(
            "Self-consistent training beats the encoder as trained, at every checkpoint (figure 2)",
            worst["gain"]["bpd"] / worst["gain"]["stderr"], ">", 0.0,
            f"The least gain (paired) in its standard errors, at epoch {worst['epoch']}.",
        )  # fmt: skip
        judge(
            "Its gain is the model samples' doing: it beats the α = 0 control",
            last["gain_over_control"]["bpd"] / last["gain_over_control"]["stderr"], ">", 2.0,
            f"The gain over the control at epoch {last['epoch']} (paired) in its standard errors.",
        )  # fmt: skip
        closest = min(checkpoints, key=lambda c: c["self_consistent"]["bpd"] - c["optimal"]["bpd"])
        judge(
            "Self-consistent training stays above optimal inference (figure 2)",
            closest["self_consistent"]["bpd"] - closest["optimal"]["bpd"], ">", 0.0,
            f"Its least distance to optimal inference, BPD, at epoch {closest['epoch']}.",
        )  # fmt: skip
    return verdicts


def sign_test_contradicts_mean(difference: Mapping[str, Any]) -> bool:
    """Whether most images contradict a mean: by the sign test, at two standard errors.

    Args:
      difference: a `gapjax.Difference` as results.json has it; of an older version, which did
        not look at the images one by one, nothing can be said.
    """
    if difference.get("better") is None or difference.get("bpd") is None:
        return False
    most = difference["better"] - 0.5
    return abs(most) > 2 * difference["better_stderr"] and most * difference["bpd"] < 0
