"""The form of results.json: every committed file has it, and JSON is strict."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import results_json
from experiments.claims import claims, sign_test_contradicts_mean
from gapjax.results.estimates import summarize

_COMMITTED = sorted(
    (Path(__file__).parent.parent / "experiments" / "results").glob("*/results.json")
)


def _evaluations(num_images=20):
    rng = np.random.default_rng(0)
    base = rng.random(num_images)
    shifts = {"test": 0.4, "optimal": 0.0, "self_consistent": 0.3, "control": 0.35}
    shifts |= {"self_consistent_averaged": 0.1, "control_averaged": 0.2, "train": -0.5}
    noise = 0.05 * rng.normal(size=(len(shifts), num_images))
    return {
        name: summarize(base + shift + own)
        for (name, shift), own in zip(shifts.items(), noise, strict=True)
    }


def _results(rows):
    return {
        "schema": 1, "preset": "digits", "dataset": "digits", "event_shape": [8, 8],
        "config": {"seed": 0}, "environment": {"commit": "c"}, "checkpoints": rows, "claims": [],
        "seconds": {"total": 1.0}, "data": {}, "num_eval_samples": 1, "notes": [],
        "best": {"epoch": 7, "bpd": 1.0, "stderr": None, "chosen_on": "test"},
    }  # fmt: skip


@pytest.mark.parametrize("path", _COMMITTED, ids=lambda path: path.parent.name)
def test_committed_results_have_the_form(path):
    results = results_json.loads(path.read_text())
    assert set(results) <= set(results_json.Results.__annotations__)
    for row in results["checkpoints"]:
        assert set(row) <= set(results_json.Checkpoint.__annotations__)
        assert set(row["gain"]) <= set(results_json.Difference.__annotations__)


def test_a_row_compares_image_by_image():
    evaluations = _evaluations()
    row = results_json.checkpoint_row(7, evaluations)
    per_image = {name: evaluation.per_image for name, evaluation in evaluations.items()}
    for key, first, second in (
        ("inference_gap", "test", "optimal"),
        ("gain", "test", "self_consistent"),
        ("gain_over_control", "control", "self_consistent"),
        ("gain_averaged", "test", "self_consistent_averaged"),
        ("gain_over_control_averaged", "control_averaged", "self_consistent_averaged"),
    ):
        difference = per_image[first] - per_image[second]
        assert row[key]["bpd"] == pytest.approx(difference.mean())
        assert row[key]["stderr"] == pytest.approx(difference.std(ddof=1) / np.sqrt(20))
        assert row[key]["better"] == (difference > 0).mean()
    assert row["gap_closed"] == pytest.approx(row["gain"]["bpd"] / row["inference_gap"]["bpd"])
    assert row["gap_closed_averaged"] == pytest.approx(
        row["gain_averaged"]["bpd"] / row["inference_gap"]["bpd"]
    )
    assert "inference_gap_averaged" not in row
    assert set(row) <= set(results_json.Checkpoint.__annotations__)


def test_a_row_without_averaged_encoders_is_a_row():
    evaluations = {k: v for k, v in _evaluations().items() if "averaged" not in k}
    row = results_json.checkpoint_row(7, evaluations)
    assert not [key for key in row if "averaged" in key]
    assert results_json.Checkpoint.__required_keys__ <= set(row)


def test_what_is_written_is_strict_json_and_read_back():
    row = results_json.checkpoint_row(7, _evaluations())
    row["train"]["stderr"] = float("nan")
    text = results_json.dumps(_results([row]))

    def refuse(literal):
        raise AssertionError(f"{literal} is no JSON")

    json.loads(text, parse_constant=refuse)
    back = results_json.loads(text)
    assert back["checkpoints"][0]["train"]["stderr"] is None
    assert back["checkpoints"][0]["gain"] == row["gain"]


def test_what_one_image_cannot_say_is_null():
    """And so is a claim that would need it; the others are judged."""
    evaluations = _evaluations(num_images=1)
    rows = [results_json.checkpoint_row(epoch, evaluations) for epoch in (1, 2)]
    results = _results(rows) | {"claims": claims(rows, 0.5)}

    def refuse(literal):
        raise AssertionError(f"{literal} is no JSON")

    json.loads(results_json.dumps(results), parse_constant=refuse)
    back = results_json.loads(results_json.dumps(results))
    (row, _) = back["checkpoints"]
    unknown = [row[key]["stderr"] for key in ("train", "test", "gain", "inference_gap")]
    unknown += [row["gain"]["better_stderr"], row["gap_closed_stderr"]]
    assert unknown == [None] * 6 and row["gap_closed"] is not None
    judged = {claim["claim"].split(":")[0]: claim for claim in back["claims"]}
    assert judged["Train BPD falls"]["holds"] is False
    for name in ("There is an inference generalization gap", "Test BPD falls, then rises"):
        claim = judged[name]
        assert claim["holds"] is None and "cannot be judged" in claim["detail"]
        assert "holds if" not in claim["detail"] and "nan" not in claim["detail"]
    # What was read back is judged alike.
    assert claims(back["checkpoints"], 0.5) == back["claims"]
    assert not sign_test_contradicts_mean(row["gain"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda results: results.update(schema=2), "its schema is 2"),
        (lambda results: results.pop("claims"), "lacks claims"),
        (lambda results: results.update(checkpoints=[]), "lacks checkpoints"),
        (lambda results: results["checkpoints"][0].pop("gain"), "lacks gain"),
    ],
)
def test_what_is_no_results_is_refused(change, words):
    results = _results([results_json.checkpoint_row(7, _evaluations())])
    change(results)
    with pytest.raises(ValueError, match=words):
        results_json.loads(results_json.dumps(results))
    with pytest.raises(ValueError, match="its schema is list"):
        results_json.loads("[]")


def test_the_best_checkpoint_is_chosen_on_validation_images_where_there_are_any():
    rows = [
        {"epoch": epoch, "test": {"bpd": test, "stderr": 0.1}}
        for epoch, test in ((1, 3.0), (2, 2.0))
    ]
    assert results_json.best(rows) == {"epoch": 2, "bpd": 2.0, "stderr": 0.1, "chosen_on": "test"}
    for row, bpd in zip(rows, (1.0, 1.5), strict=True):
        row["validation"] = {"bpd": bpd, "stderr": 0.2}
    best = {"epoch": 1, "bpd": 1.0, "stderr": 0.2, "chosen_on": "validation"}
    assert results_json.best(rows) == best
