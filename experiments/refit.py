"""Refits the encoder of every checkpoint of a workdir: self-consistent, control and optimal.

python -m experiments.refit --workdir=runs/digits

Refits of one checkpoint take nothing from those of another, and may be made in copies of the
workdir on other machines: an entry is one folder of checkpoints/self_consistent, control or
optimal, and can be carried back.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from absl import flags

import gapjax
from experiments import options, program, stores
from experiments.results_json import REFITS
from experiments.run import Run, progress_bar
from experiments.stores import chosen_epochs, trained_params, valid_entries
from gapjax import checkpoints
from gapjax.fit.api import OPTIMAL_EVERY, Refit, optimal_member, self_consistent_source
from gapjax.fit.loop import SWEEPS, Curve, Monitor, Progress
from gapjax.fit.recipes import RECIPES, recipe_member, recipe_options
from gapjax.fit.step import steps_per_epoch

_UNFINISHED = "refit_partial"  # the store of refits that are under way; `_number` names an entry
_MONITOR_EVERY = 10  # epochs between two points of a refit's curve
_MONITOR_SAMPLES = 4


def refit_phase(
    run: Run, epochs: Sequence[int] | None = None, kinds: Sequence[str] = REFITS
) -> None:
    """Refits the encoder of these checkpoints: self-consistent, its control, and optimal."""
    epochs, like = list(epochs or run.epochs), stores.refitted_like(run)
    good = {kind: valid_entries(run, kind, like) for kind in kinds}
    missing = [(epoch, kind) for epoch in epochs for kind in kinds if epoch not in good[kind]]
    # The kinds of refit start from one copy; it is on the host, as each may run on another device.
    kept = len(epochs) if run.sweeps() else len(run.cores) + 1
    trained = lru_cache(kept)(lambda epoch: jax.device_get(trained_params(run, epoch)))
    run.workdir.forget(lambda entry: (entry.get("checkpoint"), entry["phase"]) in missing)
    if run.sweeps():
        # All members even if some are there: the last bits of each depend on the others.
        for kind in kinds:
            if absent := [epoch for epoch, other in missing if other == kind]:
                _refit(run, kind, epochs, absent, trained)
    else:
        run.run_jobs(
            [partial(_refit, run, kind, [epoch], [epoch], trained) for epoch, kind in missing]
        )


def _refit(run: Run, kind: str, epochs: list[int], missing: list[int], trained: Callable) -> None:
    """Refits the checkpoints of `epochs` in one way and one program, and saves what is missing."""
    clock, options = time.monotonic(), _options(run, kind)
    resume, seconds = _unfinished(run, kind, epochs)
    clock -= seconds
    members = _members(run, kind, [(epoch, trained(epoch)) for epoch in epochs])
    places = resume or [None] * len(epochs)
    members = [member._replace(resume=place) for member, place in zip(members, places, strict=True)]
    most = options["num_epochs"]
    steps = steps_per_epoch(members[0].source.num_examples, options["batch_size"])
    every = run.saving.every * steps

    def keep(progress: list[Progress]) -> None:
        step = max(int(member.state.step) for member in progress)
        interrupted = run.interrupted()
        if interrupted or (every and step % every == 0 and step < most * steps):
            _save_unfinished(run, kind, epochs, progress, clock)
        if interrupted:
            raise KeyboardInterrupt

    name = f"{kind} {epochs[0]}" + (f" to {epochs[-1]}" if len(epochs) > 1 else "")
    done = resume[0].curve.epoch[-1] if resume and resume[0].curve.epoch else 0
    sweep = run.sweep if run.sweep in SWEEPS else "auto"
    images = sum(member.source.num_examples for member in members)
    with progress_bar(run, name, most, done, images) as bar:
        refits = gapjax.refit_members(
            run.vae, members, on_epoch=bar, on_chunk=keep, sweep=sweep, **options
        )
    for epoch, refit in zip(epochs, refits, strict=True):
        if epoch not in missing:
            continue
        curve = refit.curve
        # Log before saving; on resume, log lines whose checkpoint is missing are dropped.
        for done_epoch, bpd in zip(curve.monitor_epoch, curve.monitor_bpd, strict=True):
            run.workdir.log(kind, done_epoch, {"test_bpd": bpd}, checkpoint=epoch)
        tree = {"encoder": refit.params.encoder, "averaged": refit.averaged_params.encoder}
        seconds = (time.monotonic() - clock) / len(epochs)
        stores.save(run, kind, epoch, tree, clock, **_record(kind, refit), seconds=seconds)
    store, own = run.workdir.checkpoints / _UNFINISHED, _number(kind, epochs)
    checkpoints.prune(store, lambda saved: [number for number in saved if number == own])


def _members(
    run: Run, kind: str, starts: list[tuple[int, gapjax.VAEParams]]
) -> list[gapjax.Member]:
    """The refits of the checkpoints of these epochs in one way."""
    config, recipe = run.config, _recipe(run, kind)
    train_images, test_images = jnp.asarray(run.dataset.train), run.dataset.test
    alpha = config.alpha if kind == "self_consistent" else 0
    # One key for self-consistent training and its control, so that both see the training data in
    # one order with one noise.
    purpose = "optimal" if kind == "optimal" else "refit"

    def member(epoch: int, params: gapjax.VAEParams) -> gapjax.Member:
        key = run.key(purpose, epoch)
        if kind == "optimal":
            return optimal_member(run.vae, params, test_images, key, num_samples=_MONITOR_SAMPLES)
        if recipe is not None:
            refitted = recipe_member(recipe, run.vae, params, train_images, key)
        else:
            stratified = config.mixture == "stratified"
            source = self_consistent_source(run.vae, params, train_images, alpha, stratified)
            refitted = gapjax.Member(params, source, key)
        return refitted._replace(monitor=_monitor(run))

    return [member(*start) for start in starts]


def _options(run: Run, kind: str) -> dict:
    """How these refits differ from others: by their kind, and by the recipe."""
    config, recipe = run.config, _recipe(run, kind)
    if kind == "optimal":
        most, size = config.optimal_epochs, config.batch_size
        own = {"until": gapjax.Convergence(), "monitor_every": OPTIMAL_EVERY}
    else:
        most, size = config.refit_epochs, config.refit_batch_size or config.batch_size
        own = {"monitor_every": _MONITOR_EVERY}
    if recipe is not None:
        return recipe_options(recipe, len(run.dataset.train)) | own
    optimizer = gapjax.adam(config.learning_rate)
    return {"num_epochs": most, "batch_size": size, "optimizer": optimizer, **own}


def _recipe(run: Run, kind: str) -> gapjax.recipes.Recipe | None:
    """What --recipe says of a refit: the control's data alone. None where that is the paper's."""
    config = run.config
    if config.recipe == "paper" or kind == "optimal":
        return None
    sources = {} if kind == "self_consistent" else {"sources": (("data", 1.0),)}
    size = config.refit_batch_size or config.batch_size
    own = {"num_epochs": config.refit_epochs, "batch_size": size, **sources}
    return dataclasses.replace(RECIPES[config.recipe], **own)


def _monitor(run: Run) -> Monitor:
    """Test BPD with few samples, for the curve of a refit."""
    test, few = jnp.asarray(run.dataset.test), {"num_samples": _MONITOR_SAMPLES}
    return lambda params: gapjax.evaluate(run.vae, params, run.key("monitor"), test, **few).bpd


def _save_unfinished(
    run: Run, kind: str, epochs: list[int], several: list[Progress], clock: float
) -> None:
    """Saves refits that are under way, in the place of what was saved of them before."""
    arrays, members = [], []  # the latter go into the entry's record
    for one in several:
        facts = one._asdict() | {"curve": list(one.curve)}
        arrays.append({name: facts.pop(name) for name in ("state", "encoders")})
        members.append(facts)
    stores.save(
        run, _UNFINISHED, _number(kind, epochs), arrays, clock, kind=kind, epochs=epochs,
        members=members, made_from=[("train", epoch) for epoch in epochs],
    )  # fmt: skip


def _number(kind: str, epochs: list[int]) -> int:
    """Under which these refits are saved while they are under way: no others' place."""
    return epochs[0] * len(REFITS) + REFITS.index(kind)


def _unfinished(run: Run, kind: str, epochs: list[int]) -> tuple[list[Progress], float]:
    """Where these refits were when they were saved last, and their seconds until then."""
    store, number = run.workdir.checkpoints / _UNFINISHED, _number(kind, epochs)
    anew = "the refit begins anew"
    try:
        record = checkpoints.record(store, number) if number in checkpoints.numbers(store) else {}
        is_own = (record.get("kind"), record.get("epochs")) == (kind, epochs)
        if not is_own or not stores.is_of_run(run, _UNFINISHED, number, anew):
            return [], 0.0
        state = stores.state_like(run, gapjax.encoder_only(_options(run, kind)["optimizer"]))
        encoder = state.params.encoder
        like = {"state": state, "encoders": {"best": encoder, "averaged": encoder}}
        arrays, _ = checkpoints.restore(store, number, [like] * len(record["members"]))
    except checkpoints.CorruptCheckpointError as error:
        print(f"skipped: {error}; {anew}", flush=True)
        return [], 0.0
    several = [
        Progress(**{**facts, "curve": Curve(*facts["curve"])}, **of_one)
        for of_one, facts in zip(arrays, record["members"], strict=True)
    ]
    return several, record["seconds"]


def _record(kind: str, refit: Refit) -> dict:
    curve = refit.curve
    name = "bpd" if kind == "optimal" else "test_bpd"
    record = {
        "steps": refit.num_steps,
        "curve": {"epoch": curve.monitor_epoch, name: curve.monitor_bpd},
        "train_objective_bpd": curve.loss_bpd[:: max(1, len(curve.loss_bpd) // 100)],
    }
    if kind == "optimal":
        record |= {"converged": refit.converged, "last_improvement": refit.last_improvement}
    return record


def refit(run: Run) -> None:
    """The refits alone."""
    epochs = chosen_epochs(run, flags.FLAGS.checkpoints)
    refit_phase(run, epochs, flags.FLAGS.kinds or REFITS)


if __name__ == "__main__":
    options.define_place()
    flags.DEFINE_list("checkpoints", None, "Which to refit, e.g. 100,500; all by default.")
    flags.DEFINE_multi_enum(
        "kinds", None, REFITS, "Which refits to make; may be given several times. All by default."
    )
    program.run_program(refit, new_runs=False)
