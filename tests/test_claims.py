"""The paper's claims: judged by the numbers of a run, whichever way they turn out."""

from experiments.claims import claims


def _row(epoch, train, test, optimal, self_consistent, control):
    values = {
        "train": train, "test": test, "optimal": optimal, "self_consistent": self_consistent,
        "control": control, "inference_gap": test - optimal, "gain": test - self_consistent,
        "gain_over_control": control - self_consistent, "rise": 0.0,
    }  # fmt: skip
    return {"epoch": epoch, **{key: {"bpd": v, "stderr": 0.001} for key, v in values.items()}}


def _good():
    return [_row(1, 0.5, 0.42, 0.41, 0.415, 0.419), _row(2, 0.4, 0.45, 0.415, 0.43, 0.449)]


def test_claims_judge_the_numbers():
    good = _good()
    assert all(claim["holds"] for claim in claims(good, 0.5))
    assert len(claims(good, 0.5)) == 7
    worse = [good[0], _row(2, 0.6, 0.45, 0.44, 0.46, 0.45)]
    verdicts = [claim["holds"] for claim in claims(worse, 0.5)]
    assert verdicts == [False, True, False, True, False, False, True]
    assert len(claims(good[:1], 0.5)) == 4
    assert len(claims(good, 0.0)) == 4


def test_the_rise_is_paired_over_the_images_of_both_ends():
    """0.03 is two and a half of its own errors, and three of ten of those of the last BPD."""
    rows = _good()
    verdict = lambda: next(c for c in claims(rows, 0.5) if "then rises" in c["claim"])
    for row in rows:
        row["test"]["stderr"] = 0.1
    rows[1]["rise"] = {"bpd": 0.03, "stderr": 0.012}
    assert verdict()["holds"] is True and verdict()["threshold"] == 0.024
    rows[1]["rise"]["stderr"] = 0.016
    assert verdict()["holds"] is False and "this paired difference" in verdict()["detail"]


def test_a_claim_at_every_checkpoint_needs_each_of_them():
    rows = _good()
    verdict = lambda: next(c for c in claims(rows, 0.5) if "at every checkpoint" in c["claim"])
    assert verdict()["holds"] is True
    rows[1]["gain"]["stderr"] = 0.0  # no spread: nothing to divide by
    assert verdict()["holds"] is None and "epoch 2" in verdict()["detail"]
