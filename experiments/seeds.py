"""Summarizes the runs of several seeds: means and deviations, figures with bands, a table.

python -m experiments.seeds --runs=runs/digits_seed0,runs/digits_seed1 --out=runs/digits

Reads the results.json of every run. Writes seeds.json, the overview, the paper's three figures and
the figure of the effects. The standard errors of one run do not include the randomness of training
and of the refits; the deviation across seeds does, and not the choice of the test images, which all
seeds share.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from experiments import options, program, results_json
from experiments.config import UsageError
from experiments.effects import COMPARED
from experiments.files import write_json
from experiments.run import OPTIMAL_NOTE, environment
from experiments.show import figures
from experiments.show.formatting import text_table

_BPD = (
    "train", "test", "control", "self_consistent", "optimal", "control_averaged",
    "self_consistent_averaged", "inference_gap", "gain", "gain_over_control", "gain_averaged",
    "gain_over_control_averaged",
)  # fmt: skip
_MAY_DIFFER = ("seed", "workdir", "data_dir")  # flags that need not be the same in all runs


def summary(runs: Sequence[dict]) -> dict:
    """Means over seeds and standard deviations across them, for each checkpoint."""
    seeds = [run["config"]["seed"] for run in runs]
    rows = [
        {"epoch": together[0]["epoch"], **_over_seeds(list(map(_numbers, together)))}
        for together in zip(*(run["checkpoints"] for run in runs), strict=True)
    ]
    made_by = [made for run in runs for made in run["environment"]["commits"].values()]
    verdicts: dict[str, dict[int, bool]] = {}
    for seed, run in zip(seeds, runs, strict=True):
        for claim in run["claims"]:
            if claim["holds"] is not None:
                verdicts.setdefault(claim["claim"], {})[seed] = claim["holds"]
    return {
        "schema": 1, "preset": runs[0]["preset"], "dataset": runs[0]["dataset"], "seeds": seeds,
        "commits": sorted({commit for made in made_by for commit in made}),
        "environment": environment(), "checkpoints": rows,
        "claims": [
            {"claim": claim, "judged_for_seeds": list(holds),
             "holds_for_seeds": [seed for seed in holds if holds[seed]]}
            for claim, holds in verdicts.items()
        ],
        "notes": [OPTIMAL_NOTE],
    }  # fmt: skip


def table(results: dict) -> str:
    """The summary as plain text: mean ± standard deviation, one line per checkpoint."""
    heads = {
        "train": "train", "test": "test", "control": "control",
        "self_consistent": "self-consistent", "optimal": "optimal*",
        "gain_over_control": "gain over control", "gap_closed": "gap closed",
    }  # fmt: skip
    rows = []
    for row in results["checkpoints"]:
        forms = {name: "{mean:.4f} ± {sd:.4f}" for name in heads}
        forms["gap_closed"] = "-" if row["gap_closed"]["mean"] is None else "{mean:.0%} ± {sd:.0%}"
        cells = [form.format(**row[name]) for name, form in forms.items()]
        rows.append((str(row["epoch"]), *cells))
    return text_table(("epoch", *heads.values()), rows, 5, 18)


def read(folders: Sequence[str]) -> list[dict]:
    """Reads the results of runs that differ only in their seeds."""
    if len(folders) < 2:
        raise UsageError(
            f"--runs names {len(folders)} folders; a standard deviation needs at least 2 seeds"
        )
    runs = []
    for folder in map(Path, folders):
        path = folder / "results.json"
        if not path.is_file():
            raise UsageError(
                f"--runs: {folder} has no results.json; python -m experiments.evaluate "
                f"--workdir={folder} makes it"
            )
        try:
            runs.append(results_json.loads(path.read_text()))
            _identity(runs[-1])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--runs: {path} is damaged ({error!r})") from error
    seeds = [run["config"]["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--runs are of the seeds {seeds}; each must be of another")
    first = _identity(runs[0])
    for folder, run in zip(folders, runs, strict=True):
        own = _identity(run)
        differing = [name for name in first | own if first.get(name) != own.get(name)]
        if differing:
            which = f"another configuration than {folders[0]} ({', '.join(differing)})"
            raise UsageError(f"--runs: {folder} is of {which}")
    return sorted(runs, key=lambda run: run["config"]["seed"])


def _identity(run: dict) -> dict:
    """The parts of the results that must be the same in all runs."""
    config = {name: value for name, value in run["config"].items() if name not in _MAY_DIFFER}
    epochs = [row["epoch"] for row in run["checkpoints"]]
    return {**config, "data": run["data"].get("sha256"), "checkpoints": epochs}


def _numbers(row: dict) -> dict:
    """What is averaged of a checkpoint; results.json has no shares that the control closes."""
    test, gap = row["test"]["bpd"], row["inference_gap"]["bpd"]
    share = lambda name: (test - row[name]["bpd"]) / gap if gap else None
    return {
        **{name: row[name]["bpd"] for name in _BPD},
        "gap_closed": row["gap_closed"], "gap_closed_control": share("control"),
        "gap_closed_averaged": row["gap_closed_averaged"],
        "gap_closed_control_averaged": share("control_averaged"),
        "effects": {
            kind: {refit: won[refit]["bpd"] for refit in COMPARED}
            for kind, won in row["effects"].items()
        },
    }  # fmt: skip


def _over_seeds(values: list) -> dict:
    """Mean and deviation of numbers; of what is not known for every seed they are unknown too."""
    if isinstance(values[0], dict):
        return {name: _over_seeds([each[name] for each in values]) for name in values[0]}
    mean = sd = stderr = None
    if None not in values:
        mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
        stderr = sd / len(values) ** 0.5
    return {"mean": mean, "sd": sd, "stderr": stderr, "values": values}


def seeds(values: flags.FlagValues) -> None:
    """Writes seeds.json and the figures, and prints the table and the claims."""
    if not values.runs or values.out is None:
        raise UsageError("--runs and --out are both needed; see --help")
    runs, out = read(values.runs), Path(values.out)
    results = summary(runs)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("overview", "figure1a", "figure1b", "figure2", "effects"):
        figures.save(getattr(figures, name)(runs), out / name)
    write_json(out / "seeds.json", results)
    print(table(results))
    of_what = "across seeds, of the same test images; * fitted on the test set"
    print(f"mean ± standard deviation {of_what}")
    for claim in results["claims"]:
        held, judged = claim["holds_for_seeds"], claim["judged_for_seeds"]
        print(f"holds for {len(held)} of {len(judged)} seeds: {claim['claim']}")
    print(f"figures: {out / 'overview.png'}")


if __name__ == "__main__":
    options.define_paths("runs", "Workdirs of the runs, one for each seed: a,b,c.")
    options.define_path("out", None, "Folder for seeds.json and the figures; made if needed.")
    program.run_without_workdir(seeds)
