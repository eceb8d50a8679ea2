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
    results_json.add_rises(rows, [evaluations["test"]] * 2)
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


def test_shares_are_those_of_the_evaluations_with_more_samples():
    few = {name: e._replace(num_samples=20, with_half=None) for name, e in _evaluations().items()}
    row = results_json.checkpoint_row(7, few)
    for key in ("inference_gap", "gain", "gain_over_control", "gain_averaged"):
        assert row[key]["better"] is row[key]["median"] is row[key]["better_stderr"] is None
        assert "by_image" not in row[key] and row[key]["num_effective"] > 1
    many = {
        name: summarize(e.per_image[:15], 100, e.per_image[:15] + (0.3 if name == "test" else 0.0))
        for name, e in few.items()
    }
    row = results_json.checkpoint_row(7, few, of_images=many)
    difference = few["test"].per_image - few["self_consistent"].per_image
    assert row["gain"]["bpd"] == pytest.approx(difference.mean())  # of all images
    assert row["gain"]["median"] == pytest.approx(np.median(difference[:15]))
    by_image = row["gain"]["by_image"]
    assert (by_image["num_images"], by_image["num_samples"]) == (15, 100)
    assert by_image["median_bias"] == pytest.approx(0.3)
    low, high = by_image["better_interval"]
    assert 0 <= low < row["gain"]["better"] <= high <= 1


def test_the_rise_is_paired_with_the_lowest_checkpoint():
    rng = np.random.default_rng(0)
    image = rng.normal(size=50)  # common to all checkpoints, and far larger than their differences
    own = 0.01 * rng.normal(size=(3, 50)) + np.array([[0.2], [0.0], [0.1]])
    tested = [summarize(image + shift, 20) for shift in own]
    rows = [{"epoch": epoch} for epoch in (1, 2, 3)]
    results_json.add_rises(rows, tested)
    for row, shift in zip(rows, own, strict=True):
        assert row["rise"]["bpd"] == pytest.approx((shift - own[1]).mean())
        assert row["rise"]["stderr"] == pytest.approx((shift - own[1]).std(ddof=1) / 50**0.5)
    assert rows[2]["rise"]["stderr"] < 0.05 * tested[2].stderr


@pytest.mark.parametrize(
    ("share", "p_value", "bias", "contradicts"),
    [
        (0.4, 0.01, 0.0, True),
        (0.4, 0.2, 0.0, False),  # by chance
        (0.6, 0.01, 0.0, False),  # agrees
        (0.4, 0.01, -0.2, False),  # the noise may have done it
    ],
)
def test_a_sign_test_against_the_mean(share, p_value, bias, contradicts):
    by_image = {"sign_test": p_value, "better_bias": bias}
    gain = {"bpd": 0.1, "better": share, "better_stderr": 1e-9, "by_image": by_image}
    assert sign_test_contradicts_mean(gain) == contradicts
    other = {**gain, "bpd": -0.1, "better": 1 - share, "by_image": {**by_image}}
    other["by_image"]["better_bias"] *= -1
    assert sign_test_contradicts_mean(other) == contradicts
    del gain["by_image"]
    assert not sign_test_contradicts_mean(gain)


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
