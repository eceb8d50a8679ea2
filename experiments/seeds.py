"""Summarizes the runs of several seeds: means and deviations, figures with bands, a table.

python -m experiments.seeds --runs=runs/digits_seed0,runs/digits_seed1 --out=runs/digits

Reads the results.json of every run. Writes seeds.json, the overview, the paper's three figures and
the figure of the effects. The standard errors of one run do not include the randomness of training
and of the refits; the deviation across seeds does, and not the choice of the test images, which all
seeds share.
"""

from collections.abc import Callable, Mapping, Sequence
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
# Shares of the gap that are closed. results.json has only those of self-consistent training.
_SHARES: Mapping[str, Callable[[dict], float | None]] = {
    "gap_closed": lambda row: row["gap_closed"],
    "gap_closed_control": lambda row: _share(row, "control"),
    "gap_closed_averaged": lambda row: row["gap_closed_averaged"],
    "gap_closed_control_averaged": lambda row: _share(row, "control_averaged"),
}
_MAY_DIFFER = ("seed", "workdir", "data_dir")  # flags that need not be the same in all runs


def summary(runs: Sequence[dict]) -> dict:
    """Means over seeds and standard deviations across them, for each checkpoint."""
    seeds = [run["config"]["seed"] for run in runs]
    rows = []
    for together in zip(*(run["checkpoints"] for run in runs), strict=True):
        row = {"epoch": together[0]["epoch"]}
        row |= {name: _over_seeds([one[name]["bpd"] for one in together]) for name in _BPD}
        row |= {
            name: _over_seeds([find(one) for one in together]) for name, find in _SHARES.items()
        }
        row["effects"] = {
            kind: {
                refit: _over_seeds([one["effects"][kind][refit]["bpd"] for one in together])
                for refit in COMPARED
            }
            for kind in together[0]["effects"]
        }
        rows.append(row)
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
            {
                "claim": claim,
                "judged_for_seeds": list(holds),
                "holds_for_seeds": [seed for seed in holds if holds[seed]],
            }
            for claim, holds in verdicts.items()
        ],
        "notes": [OPTIMAL_NOTE],
    }  # fmt: skip


def table(results: dict) -> str:
    """The summary as plain text: mean ± standard deviation, one line per checkpoint."""
    heads = {
        "train": "train", "test": "test", "control": "control",
        "self_consistent": "self-consistent", "optimal": "optimal*",
        "gain_over_control": "gain over control",
    }  # fmt: skip
    rows = []
    for row in results["checkpoints"]:
        cells = [f"{row[name]['mean']:.4f} ± {row[name]['sd']:.4f}" for name in heads]
        closed = row["gap_closed"]
        known = closed["mean"] is not None
        cells.append(f"{closed['mean']:.0%} ± {closed['sd']:.0%}" if known else "-")
        rows.append((str(row["epoch"]), *cells))
    return text_table(("epoch", *heads.values(), "gap closed"), rows, 5, 18)


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
    for folder, run in zip(folders, runs, strict=True):
        first, other = _identity(runs[0]), _identity(run)
        differing = [name for name in first if first[name] != other.get(name)]
        if differing or len(first) != len(other):
            raise UsageError(
                f"--runs: {folder} is of another configuration than {folders[0]} "
                f"({', '.join(differing) or 'more flags'})"
            )
    return sorted(runs, key=lambda run: run["config"]["seed"])


def _identity(run: dict) -> dict:
    """The parts of the results that must be the same in all runs."""
    config = {name: value for name, value in run["config"].items() if name not in _MAY_DIFFER}
    epochs = [row["epoch"] for row in run["checkpoints"]]
    return {**config, "data": run["data"].get("sha256"), "checkpoints": epochs}


def _share(row: dict, name: str) -> float | None:
    gap = row["inference_gap"]["bpd"]
    return (row["test"]["bpd"] - row[name]["bpd"]) / gap if gap else None


def _over_seeds(values: Sequence[float | None]) -> dict:
    """Mean and deviation of numbers; of what is not known for every seed they are unknown too."""
    if any(value is None for value in values):
        return {"mean": None, "sd": None, "stderr": None, "values": list(values)}
    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    return {"mean": mean, "sd": sd, "stderr": sd / len(values) ** 0.5, "values": list(values)}


def seeds(values: flags.FlagValues) -> None:
    """Writes seeds.json and the figures, and prints the table and the claims."""
    if not values.runs or values.out is None:
        raise UsageError("--runs and --out are both needed; see --help")
    runs, out = read(values.runs), Path(values.out)
    results = summary(runs)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("overview", "figure1a", "figure1b", "figure2", "effects"):
        figure = getattr(figures, name)(runs)
        if figure is not None:
            figures.save(figure, out / name)
    write_json(out / "seeds.json", results)
    print(table(results))
    print(
        "mean ± standard deviation across seeds, of the same test images; * fitted on the test set"
    )
    for claim in results["claims"]:
        held, judged = claim["holds_for_seeds"], claim["judged_for_seeds"]
        print(f"holds for {len(held)} of {len(judged)} seeds: {claim['claim']}")
    print(f"figures: {out / 'overview.png'}")


if __name__ == "__main__":
    options.define_paths("runs", "Workdirs of the runs, one for each seed: a,b,c.")
    options.define_path("out", None, "Folder for seeds.json and the figures; made if needed.")
    program.run_without_workdir(seeds)
