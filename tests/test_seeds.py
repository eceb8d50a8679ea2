"""Several seeds of one configuration: the numbers, the refusals, the files."""

import copy
import json
import types

import numpy as np
import pytest

from experiments import options, results_json, seeds
from experiments.claims import claims
from gapjax.results.estimates import summarize

_WORSE = {
    "train": -0.1, "test": 0.06, "control": 0.05, "self_consistent": 0.03, "optimal": 0.0,
    "control_averaged": 0.04, "self_consistent_averaged": 0.02,
}  # fmt: skip
_SEEN_BY = {"as_trained": "test", "control": "control", "self_consistent": "self_consistent"}


def _run(seed):
    """What the main program writes, of made-up BPDs of 50 images."""
    rng = np.random.default_rng(seed)
    rows, tested, base = [], [], 0.4 + 0.1 * rng.random(50)
    for epoch in (50, 100):
        wider = 1 + 1e-3 * (seed + epoch)
        bpds = {name: summarize(base + wider * worse) for name, worse in _WORSE.items()}
        tested.append(bpds["test"])
        rows.append(results_json.checkpoint_row(epoch, bpds, {"optimal": {"converged": True}}))
        own = {
            "bpd": {name: bpds[key].per_image for name, key in _SEEN_BY.items()},
            "gradient": np.ones(3),
        }  # fmt: skip
        seen = {name: bpds[key] for name, key in _SEEN_BY.items()}
        rows[-1]["effects"] = results_json.effects(
            {"model": own, "train": own}, bpds, {"model": seen, "train": seen, "test": bpds}
        )
    results_json.add_rises(rows, tested)
    results = {
        "schema": results_json.VERSION, "event_shape": [8, 8], "seconds": {},
        "num_eval_samples": 20, "best": results_json.best(rows), "notes": [],
        "preset": "digits", "dataset": "digits",
        "environment": {"commits": {"train": [f"c{seed % 2}"]}},
        "config": {"seed": seed, "workdir": f"runs/{seed}", "data_dir": None, "alpha": 0.5},
        "data": {"sha256": "abc", "num_test": 50}, "checkpoints": rows, "claims": claims(rows, 0.5),
    }  # fmt: skip
    return results_json.loads(results_json.dumps(results))


def _write(folder, run):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(run))
    return str(folder)


def test_what_a_seed_does_not_know_is_not_averaged():
    runs = [_run(seed) for seed in (3, 5)]
    name = runs[0]["claims"][0]["claim"]
    runs[0]["claims"][0]["holds"] = None
    runs[1]["checkpoints"][0]["gap_closed"] = None
    results = seeds.summary(runs)
    (claim,) = [claim for claim in results["claims"] if claim["claim"] == name]
    assert claim["judged_for_seeds"] == [5]
    closed = results["checkpoints"][0]["gap_closed"]
    assert closed["mean"] is closed["sd"] is None and closed["values"][1] is None
    assert seeds.table(results).splitlines()[1].endswith(" -")


def test_means_and_deviations_over_seeds():
    runs = [_run(seed) for seed in (3, 5, 9)]
    lost, absent = runs[0]["claims"][3]["claim"], runs[0]["claims"][1]["claim"]
    runs[1]["claims"][3]["holds"] = False
    runs[1]["environment"]["commits"] = {"train": ["c0"], "evaluate": ["c1", "c2"]}
    del runs[2]["claims"][1]
    results = seeds.summary(runs)
    assert results["seeds"] == [3, 5, 9] and results["commits"] == ["c0", "c1", "c2"]
    assert [row["epoch"] for row in results["checkpoints"]] == [50, 100]
    for index, row in enumerate(results["checkpoints"]):
        for name in ("test", "optimal", "gain_over_control", "gain_averaged"):
            values = [run["checkpoints"][index][name]["bpd"] for run in runs]
            assert row[name]["values"] == values
            assert row[name]["mean"] == pytest.approx(sum(values) / 3)
            assert row[name]["sd"] == pytest.approx(np.std(values) * (3 / 2) ** 0.5)
            assert row[name]["stderr"] == pytest.approx(row[name]["sd"] / 3**0.5)
        # Made so that every encoder's loss over optimal inference keeps its proportion to others.
        for name, share in (
            ("gap_closed", 3 / 6), ("gap_closed_control", 1 / 6), ("gap_closed_averaged", 4 / 6),
            ("gap_closed_control_averaged", 2 / 6),
        ):  # fmt: skip
            assert row[name]["mean"] == pytest.approx(share, abs=1e-6), name
        assert row["effects"]["model"]["self_consistent"] == row["gain"]
        won = [run["checkpoints"][index]["effects"]["train"]["control"]["bpd"] for run in runs]
        assert row["effects"]["train"]["control"]["values"] == won
    verdicts = {claim["claim"]: claim for claim in results["claims"]}
    assert verdicts[lost]["judged_for_seeds"] == [3, 5, 9]
    assert verdicts[lost]["holds_for_seeds"] == [3, 9]
    assert verdicts[absent]["judged_for_seeds"] == [3, 5]
    lines = seeds.table(results).splitlines()
    assert len(lines) == 3 and "50% ± 0%" in lines[1] and "optimal*" in lines[0]


def test_runs_are_read_by_seed_and_the_figures_are_drawn(tmp_path, capsys):
    folders = [_write(tmp_path / str(seed), _run(seed)) for seed in (8, 2)]
    out = tmp_path / "new" / "out"
    seeds.seeds(types.SimpleNamespace(runs=folders, out=str(out)))
    results = json.loads((out / "seeds.json").read_text())
    assert results["seeds"] == [2, 8]
    for name in ("overview", "figure1a", "figure1b", "figure2", "effects"):
        assert (out / f"{name}.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "fitted on the test set" in printed and "holds for 2 of 2 seeds" in printed


def _other_rate(run):
    run["config"]["alpha"] = 0.25


def _other_data(run):
    run["data"]["sha256"] = "abd"


def _fewer_checkpoints(run):
    del run["checkpoints"][0]


def _same_seed(run):
    run["config"]["seed"] = 0


def _no_rows(run):
    del run["checkpoints"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other_rate, r"another configuration .*\(alpha\)"),
        (_other_data, r"another configuration .*\(data\)"),
        (_fewer_checkpoints, r"another configuration .*\(checkpoints\)"),
        (_same_seed, r"seeds \[0, 0\]"),
        (_no_rows, "damaged"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(tmp_path, change, words):
    second = copy.deepcopy(_run(1))
    change(second)
    folders = [_write(tmp_path / "a", _run(0)), _write(tmp_path / "b", second)]
    with pytest.raises(options.UsageError, match=words):
        seeds.read(folders)


def test_a_run_without_results_is_named(tmp_path):
    first = _write(tmp_path / "a", _run(0))
    with pytest.raises(options.UsageError, match=r"experiments\.evaluate --workdir=.*b makes it"):
        seeds.read([first, str(tmp_path / "b")])
    with pytest.raises(options.UsageError, match="at least 2"):
        seeds.read([first])
