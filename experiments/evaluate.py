"""Evaluates every checkpoint of a workdir and its refits; writes results.json, figures, report.

python -m experiments.evaluate --workdir=runs/digits
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

import gapjax
from experiments import effects, options, program, results_json, shares, stores
from experiments.claims import claims, sign_test_contradicts_mean
from experiments.draw import draw_phase
from experiments.effects import effects_like
from experiments.files import write_json
from experiments.results_json import AVERAGED, REFITS
from experiments.run import OPTIMAL_NOTE, Run, environment, progress_bar
from experiments.show.formatting import at_epochs, percent, signed
from experiments.stores import ORIGIN, chosen_epochs, encoders, evaluated_like, valid_entries
from gapjax import checkpoints
from gapjax.results.estimates import Evaluation, summarize

_MADE = ("train", *REFITS)  # the stores of what is evaluated
# The stores of what is computed of it, each with the shapes of an entry.
_LIKE = {"evaluation": evaluated_like, "effects": effects_like, "shares": shares.shares_like}


def evaluate_phase(run: Run, epochs: Sequence[int] | None = None) -> results_json.Results:
    """Evaluates checkpoints and their refits; writes results.json."""
    epochs = list(epochs or run.epochs)
    rows, tested, seconds = [], [], dict.fromkeys((*_MADE, "evaluate"), 0.0)
    commits = {phase: set() for phase in seconds}
    done = {name: valid_entries(run, name, like(run)) for name, like in _LIKE.items()}
    with progress_bar(run, "evaluate", len(epochs), unit="checkpoints") as bar:
        for index, epoch in enumerate(epochs):
            row, evaluated, records = _row(run, epoch, done)
            for phase, record in records:
                seconds[phase] += record["seconds"]
                commits[phase].add(record.get("commit"))
            rows.append(row)
            tested.append(evaluated)
            bar(index + 1, row["test"]["bpd"])
    results_json.add_rises(rows, tested)
    results: results_json.Results = {
        "schema": results_json.VERSION, "preset": run.config.preset, "dataset": run.dataset.name,
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
        "data": run.dataset.provenance, "num_eval_samples": run.config.num_eval_samples,
        "checkpoints": rows, "best": results_json.best(rows),
        "claims": claims(rows, run.config.alpha),
        "seconds": {**seconds, "total": sum(seconds.values())},
        "notes": [*_notes(rows), *effects.notes(rows)],
    }  # fmt: skip
    if run.workdir.writes:
        write_json(run.workdir.path / "results.json", results)
    return results


def _row(
    run: Run, epoch: int, done: Mapping[str, list[int]]
) -> tuple[results_json.Checkpoint, Evaluation, list[tuple[str, dict]]]:
    """The row of a checkpoint, its test set as trained, and by phase the records that it is of."""
    # Restored only if something is missing, and once for all.
    restored = functools.cache(lambda: encoders(run, epoch, REFITS, AVERAGED))

    def load_or_compute(name: str, compute: Callable[[], Any]) -> tuple[Any, dict]:
        if run.interrupted():  # what was computed has been saved
            raise KeyboardInterrupt
        if epoch not in done[name]:
            clock = time.monotonic()
            stores.save(run, name, epoch, compute(), clock)
        return stores.load(run, name, epoch, _LIKE[name](run))

    bpds, evaluated = load_or_compute("evaluation", lambda: _evaluate(run, *restored()))
    measured, compared = load_or_compute(
        "effects", lambda: effects.measure(run, epoch, *restored(), bpds["train"])
    )
    by_image, shared = load_or_compute("shares", lambda: shares.measure(run, epoch, *restored()))
    of_images = shares.evaluations(run, by_image)
    made = {kind: checkpoints.record(run.workdir.checkpoints / kind, epoch) for kind in _MADE}
    samples = run.config.num_eval_samples
    evaluations = {name: summarize(np.asarray(bpds[name]), samples) for name in evaluated_like(run)}
    left_out = ("seconds", "commit", ORIGIN)
    refits = {
        kind: {key: value for key, value in made[kind].items() if key not in left_out}
        for kind in REFITS
    }
    row = results_json.checkpoint_row(epoch, evaluations, refits, of_images["test"])
    row["effects"] = results_json.effects(measured, evaluations, of_images)
    evaluating = [("evaluate", record) for record in (evaluated, compared, shared)]
    return row, evaluations["test"], [*made.items(), *evaluating]


def _evaluate(
    run: Run, trained: gapjax.VAEParams, by_name: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """BPD per image, of the train set and by every encoder of the test set, on common noise."""
    evaluate = functools.partial(gapjax.evaluate, run.vae, num_samples=run.config.num_eval_samples)
    key, test = run.key("evaluate"), jnp.asarray(run.dataset.test)
    bpds = {"train": evaluate(trained, key, jnp.asarray(run.dataset.train)).per_image}
    for name, encoder in by_name.items():
        params = trained._replace(encoder=encoder)
        bpds["test" if name == "as_trained" else name] = evaluate(params, key, test).per_image
    if run.validation is not None:
        bpds["validation"] = evaluate(trained, key, jnp.asarray(run.validation)).per_image
    return bpds


def _best_note(rows: list[dict]) -> str:
    chosen = results_json.best(rows)
    words = "It was chosen on images held out of training"
    if chosen["chosen_on"] == "test":
        words = (
            "It was chosen on the test set, so its BPD is optimistic; with --validation it is "
            "chosen on training images that are held out"
        )
    return (
        f"Best checkpoint: epoch {chosen['epoch']}, with the lowest {chosen['chosen_on']} BPD, "
        f"{chosen['bpd']:.4f}. {words}."
    )


def _notes(rows: list[dict]) -> list[str]:
    notes = [_best_note(rows), OPTIMAL_NOTE]
    unconverged = [row["epoch"] for row in rows if not row["refits"]["optimal"]["converged"]]
    if unconverged:
        notes.append(
            "Optimal inference reached --optimal_epochs before it converged at "
            f"{at_epochs(unconverged)}. The gap there is larger than shown."
        )
    for name, other in (("gain", "the encoder as trained"), ("gain_over_control", "its control")):
        against = [row for row in rows if sign_test_contradicts_mean(row[name])]
        if against:
            notes.append(_contradicted(other, [row["epoch"] for row in against], against[-1][name]))
    return notes


def _contradicted(other: str, epochs: list[int], last: dict) -> str:
    """Names the checkpoints at which most images contradict the mean, with the last's numbers."""
    share = percent(last["better"], decimals=1)
    mean, median = (signed(last[name], 4, plus=True) for name in ("bpd", "median"))
    return (
        f"Self-consistent training against {other}: most images contradict the mean at "
        f"{at_epochs(epochs)}. At {epochs[-1]} it wins {mean} BPD in the mean and {median} in the "
        f"median, and is better on {share} of {last['by_image']['num_images']:,} images. The "
        f"standard error of the mean rests on {last['num_effective']:.0f} images."
    )


def evaluate(run: Run) -> None:
    """Evaluation and drawing alone."""
    epochs = chosen_epochs(run, flags.FLAGS.checkpoints)
    print(f"report: {draw_phase(run, evaluate_phase(run, epochs))}")


if __name__ == "__main__":
    options.define_place()
    flags.DEFINE_list("checkpoints", None, "Which to evaluate, e.g. 100,500; all by default.")
    program.run_program(evaluate, new_runs=False)
