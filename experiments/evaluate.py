"""Evaluates every checkpoint of a workdir and its refits; writes results.json, figures, report.

python -m experiments.evaluate --workdir=runs/digits
"""

import functools
import time

import jax.numpy as jnp
import numpy as np

import gapjax
from experiments import options, program
from experiments.claims import against_most, claims
from experiments.draw import draw_phase
from experiments.run import (
    AVERAGED,
    OPTIMAL_NOTE,
    REFITS,
    Run,
    entry_facts,
    environment,
    evaluated_like,
    good_entries,
    progress_bar,
    refitted_params,
    trained_params,
)
from experiments.workdir import write_json
from gapjax import checkpoints
from gapjax.evaluation import Evaluation, summarize


def evaluate_phase(run: Run) -> dict:
    """Evaluates every checkpoint and its refits; writes results.json.

    Raises:
      WorkdirError: a checkpoint or a refit is missing.
    """
    store = run.workdir.checkpoints / "evaluation"
    like = evaluated_like(run)
    rows, seconds = [], dict.fromkeys(("train", *REFITS, "evaluate"), 0.0)
    commits = {phase: set() for phase in seconds}
    done = good_entries(run, "evaluation", like)
    with progress_bar(run, "evaluate", len(run.epochs)) as bar:
        for index, epoch in enumerate(run.epochs):
            if run.interrupted():
                raise KeyboardInterrupt
            if epoch not in done:
                clock = time.monotonic()
                bpds = _evaluate(run, epoch)
                checkpoints.save(store, epoch, bpds, entry_facts(epoch, clock))
            bpds, record = checkpoints.restore(store, epoch, like)
            evaluations = {name: summarize(np.asarray(bpds[name])) for name in like}
            seconds["evaluate"] += record["seconds"]
            commits["evaluate"].add(record.get("commit"))
            refits = {}
            for kind in ("train", *REFITS):
                entry = checkpoints.record(run.workdir.checkpoints / kind, epoch)
                seconds[kind] += entry.pop("seconds")
                commits[kind].add(entry.pop("commit", None))
                if kind != "train":
                    refits[kind] = entry
            rows.append(_row(epoch, evaluations, refits))
            bar(index + 1, rows[-1]["test"]["bpd"])
    results = {
        "schema": 1,
        "preset": run.config.preset,
        "dataset": run.dataset.name,
        "event_shape": list(run.dataset.event_shape),
        "config": {
            **run.config._asdict(),
            "hidden_sizes": list(run.config.hidden_sizes),
            "workdir": str(run.workdir.path),
            "data_dir": run.data_dir,
        },
        "environment": {
            **environment(),
            "commits": {phase: sorted(filter(None, made)) for phase, made in commits.items()},
        },
        "data": run.dataset.provenance,
        "num_eval_samples": run.config.num_eval_samples,
        "checkpoints": rows,
        "best": best(rows),
        "claims": claims(rows, run.config.alpha),
        "seconds": {**seconds, "total": sum(seconds.values())},
        "notes": _notes(rows),
    }
    if run.workdir.writes:
        write_json(run.workdir.path / "results.json", results)
    return results


def _evaluate(run: Run, epoch: int) -> dict[str, np.ndarray]:
    """BPD per image, of the train set and by every encoder of the test set, on common noise."""
    trained = trained_params(run, epoch)
    evaluate = functools.partial(gapjax.evaluate, run.vae, num_samples=run.config.num_eval_samples)
    key = run.key("evaluate")
    train, test = jnp.asarray(run.dataset.train), jnp.asarray(run.dataset.test)
    bpds = {
        "train": evaluate(trained, key, train).per_image,
        "test": evaluate(trained, key, test).per_image,
    }
    for kind in REFITS:
        bpds[kind] = evaluate(refitted_params(run, kind, epoch, trained), key, test).per_image
    for kind in AVERAGED:
        averaged = refitted_params(run, kind, epoch, trained, "averaged")
        bpds[f"{kind}_averaged"] = evaluate(averaged, key, test).per_image
    if run.validation is not None:
        bpds["validation"] = evaluate(trained, key, jnp.asarray(run.validation)).per_image
    return bpds


def _row(epoch: int, evaluations: dict[str, Evaluation], refits: dict) -> dict:
    means = {
        name: {"bpd": evaluation.bpd, "stderr": evaluation.stderr}
        for name, evaluation in evaluations.items()
    }
    four = {name: evaluations[name] for name in ("test", *REFITS)}
    averaged = {**four, **{kind: evaluations[f"{kind}_averaged"] for kind in AVERAGED}}
    won = _gaps(averaged)
    del won["inference_gap"]
    return {
        "epoch": epoch, **means, **_gaps(four),
        **{f"{name}_averaged": value for name, value in won.items()}, "refits": refits,
    }  # fmt: skip


def _gaps(evaluations: dict[str, Evaluation]) -> dict:
    gaps = gapjax.inference_gaps(**evaluations)
    pairs = ("inference_gap", "gain", "gain_over_control")
    return {
        **{name: getattr(gaps, name)._asdict() for name in pairs},
        "gap_closed": gaps.gap_closed,
        "gap_closed_stderr": gaps.gap_closed_stderr,
    }


def best(rows: list[dict]) -> dict:
    """The checkpoint of the lowest held-out BPD as trained, and what it was chosen on.

    Args:
      rows: those of results.json's "checkpoints".
    """
    chosen_on = "validation" if "validation" in rows[0] else "test"
    row = min(rows, key=lambda row: row[chosen_on]["bpd"])
    return {"epoch": row["epoch"], **row[chosen_on], "chosen_on": chosen_on}


def _best_note(rows: list[dict]) -> str:
    chosen = best(rows)
    if chosen["chosen_on"] == "validation":
        words = "it was chosen on images held out of training"
    else:
        words = (
            "it was chosen on the test set, so its BPD is optimistic (--validation holds images "
            "out to choose by)"
        )
    return (
        f"Best checkpoint: epoch {chosen['epoch']}, with the lowest {chosen['chosen_on']} BPD, "
        f"{chosen['bpd']:.4f}; {words}."
    )


def _notes(rows: list[dict]) -> list[str]:
    notes = [_best_note(rows), OPTIMAL_NOTE]
    unconverged = [row["epoch"] for row in rows if not row["refits"]["optimal"]["converged"]]
    if unconverged:
        notes.append(
            "Optimal inference had not converged when --optimal_epochs ended it at epochs "
            f"{', '.join(map(str, unconverged))}: there the gap is larger than shown."
        )
    for name, other in (("gain", "the encoder as trained"), ("gain_over_control", "its control")):
        against = [(row["epoch"], row[name]) for row in rows if against_most(row[name])]
        if against:
            notes.append(_contradicted(other, against))
    return notes


def _contradicted(other: str, against: list[tuple[int, dict]]) -> str:
    """Of checkpoints at which a mean and most images disagree; with the numbers of the last."""
    epochs = ", ".join(str(epoch) for epoch, _ in against)
    epoch, difference = against[-1]
    mean, median = (f"{difference[name]:+.4f}".replace("-", "−") for name in ("bpd", "median"))
    return (
        f"Self-consistent training against {other}: most images contradict the mean at epochs "
        f"{epochs}. At {epoch} it wins {mean} BPD in the mean and {median} in the median, and is "
        f"the better on {difference['better']:.1%} of the images; the standard error of the mean "
        f"rests on {difference['num_effective']:.0f} of them."
    )


def evaluate(run: Run) -> None:
    """Evaluation and drawing alone."""
    print(f"report: {draw_phase(run, evaluate_phase(run))}")


if __name__ == "__main__":
    options.define_place()
    program.run_program(evaluate, new_runs=False)
