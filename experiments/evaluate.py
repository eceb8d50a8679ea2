"""Evaluates every checkpoint of a workdir and its refits; writes results.json, figures, report.

python -m experiments.evaluate --workdir=runs/digits
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import gapjax
from experiments import effects, options, program
from experiments.draw import draw_phase
from experiments.files import write_json
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
from experiments.show.formatting import at_epochs, percent, signed
from gapjax import checkpoints
from gapjax.results.claims import claims, sign_test_contradicts_mean
from gapjax.results.estimates import Evaluation, summarize


def evaluate_phase(run: Run) -> dict:
    """Evaluates every checkpoint and its refits; writes results.json.

    Raises:
      WorkdirError: a checkpoint or a refit is missing.
    """
    rows, seconds = [], dict.fromkeys(("train", *REFITS, "evaluate"), 0.0)
    commits = {phase: set() for phase in seconds}
    evaluated = evaluated_like(run)
    stores = {
        "evaluation": (evaluated, functools.partial(_evaluate, run)),
        "effects": (effects.effects_like(run), functools.partial(effects.measure, run)),
    }
    done = {name: good_entries(run, name, like) for name, (like, _) in stores.items()}
    with progress_bar(run, "evaluate", len(run.epochs)) as bar:
        for index, epoch in enumerate(run.epochs):
            found = {}
            for name, (like, make) in stores.items():
                found[name], record = _kept(run, name, epoch, like, make, done[name])
                seconds["evaluate"] += record["seconds"]
                commits["evaluate"].add(record.get("commit"))
            refits = {}
            for kind in ("train", *REFITS):
                entry = checkpoints.record(run.workdir.checkpoints / kind, epoch)
                seconds[kind] += entry.pop("seconds")
                commits[kind].add(entry.pop("commit", None))
                if kind != "train":
                    refits[kind] = entry
            bpds = found["evaluation"]
            evaluations = {name: summarize(np.asarray(bpds[name])) for name in evaluated}
            rows.append(_row(epoch, evaluations, refits))
            rows[-1]["effects"] = effects.summary(found["effects"], evaluations)
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
        "notes": [*_notes(rows), *effects.notes(rows)],
    }
    if run.workdir.writes:
        write_json(run.workdir.path / "results.json", results)
    return results


def _kept(
    run: Run, name: str, epoch: int, like: Any, make: Callable[[int], Any], done: list[int]
) -> tuple[Any, dict]:
    """The entry of a checkpoint in one of the run's stores, made where there is none; its record.

    Raises:
      KeyboardInterrupt: the run is interrupted; what was made has been saved.
    """
    if run.interrupted():
        raise KeyboardInterrupt
    store = run.workdir.checkpoints / name
    if epoch not in done:
        clock = time.monotonic()
        checkpoints.save(store, epoch, make(epoch), entry_facts(epoch, clock))
    return checkpoints.restore(store, epoch, like)


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
            "Optimal inference had not converged when --optimal_epochs ended it at "
            f"{at_epochs(unconverged)}: there the gap is larger than shown."
        )
    for name, other in (("gain", "the encoder as trained"), ("gain_over_control", "its control")):
        against = [
            (row["epoch"], row[name]) for row in rows if sign_test_contradicts_mean(row[name])
        ]
        if against:
            notes.append(_contradicted(other, against))
    return notes


def _contradicted(other: str, against: list[tuple[int, dict]]) -> str:
    """Of checkpoints at which a mean and most images disagree; with the numbers of the last."""
    epochs = at_epochs([epoch for epoch, _ in against])
    epoch, difference = against[-1]
    share = percent(difference["better"], decimals=1)
    mean, median = (signed(difference[name], 4, plus=True) for name in ("bpd", "median"))
    return (
        f"Self-consistent training against {other}: most images contradict the mean at {epochs}. "
        f"At {epoch} it wins {mean} BPD in the mean and {median} in the median, and is the better "
        f"on {share} of the images; the standard error of the mean rests on "
        f"{difference['num_effective']:.0f} of them."
    )


def evaluate(run: Run) -> None:
    """Evaluation and drawing alone."""
    print(f"report: {draw_phase(run, evaluate_phase(run))}")


if __name__ == "__main__":
    options.define_place()
    program.run_program(evaluate, new_runs=False)
