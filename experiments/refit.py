"""Refits the encoder of every checkpoint of a workdir: self-consistent, control and optimal.

python -m experiments.refit --workdir=runs/digits

Refits of one checkpoint take nothing from those of another, and may be made in copies of the
workdir on other machines: an entry is one folder of checkpoints/self_consistent, control or
optimal, and can be carried back.
"""

import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import optax
from absl import flags

import gapjax
from experiments import options, program, stores
from experiments.results_json import REFITS
from experiments.run import Run, progress_bar
from experiments.stores import chosen_epochs, trained_params, valid_entries
from gapjax import checkpoints
from gapjax.fit.executor import SWEEPS
from gapjax.fit.loop import Monitor, Progress
from gapjax.fit.recipes import recipe_optimizer
from gapjax.fit.steps import steps_per_epoch

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
            absent = [epoch for epoch, other in missing if other == kind]
            if absent:
                _refit(run, kind, epochs, absent, trained)
    else:
        run.run_jobs(
            [partial(_refit, run, kind, [epoch], [epoch], trained) for epoch, kind in missing]
        )


def _refit(
    run: Run,
    kind: str,
    epochs: list[int],
    missing: list[int],
    trained: Callable[[int], gapjax.VAEParams],
) -> None:
    """Refits the checkpoints of `epochs` in one way and one program, and saves what is missing."""
    config, clock = run.config, time.monotonic()
    most = config.optimal_epochs if kind == "optimal" else config.refit_epochs
    all_params = [trained(epoch) for epoch in epochs]
    resume, seconds = _unfinished(run, kind, epochs)
    clock -= seconds
    images = run.dataset.test if kind == "optimal" else run.dataset.train
    batch_size = (kind != "optimal" and config.refit_batch_size) or config.batch_size
    steps = steps_per_epoch(len(images), batch_size)
    every = run.saving.every * steps

    def keep(progress: list[Progress] | Progress) -> None:
        several = stores.as_list(progress)
        step = max(int(member.state.step) for member in several)
        interrupted = run.interrupted()
        if interrupted or (every and step % every == 0 and step < most * steps):
            _save_unfinished(run, kind, epochs, several, clock)
        if interrupted:
            raise KeyboardInterrupt

    name = f"{kind} {epochs[0]}" + (f" to {epochs[-1]}" if len(epochs) > 1 else "")
    done = resume[0].curve.epoch[-1] if resume and resume[0].curve.epoch else 0
    common = {
        "batch_size": batch_size, "optimizer": _optimizer(run, kind), "resume": resume,
        "on_chunk": keep, "sweep": run.sweep if run.sweep in SWEEPS else "auto",
    }  # fmt: skip
    with progress_bar(run, name, most, done) as bar:
        refits = _computed(run, kind, epochs, all_params, {"on_epoch": bar, **common})
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


def _computed(
    run: Run, kind: str, epochs: list[int], all_params: list[gapjax.VAEParams], options: dict
) -> list[gapjax.Refit]:
    """The refits of these checkpoints in one way; `options` are those of every way."""
    config, train_images = run.config, run.dataset.train
    if kind == "optimal":
        keys = [run.key("optimal", epoch) for epoch in epochs]
        return gapjax.optimal_inference(
            run.vae, all_params, run.dataset.test, keys, num_epochs=config.optimal_epochs,
            num_samples=_MONITOR_SAMPLES, **options,
        )  # fmt: skip
    # One key for self-consistent training and its control, so that both see the training data in
    # one order with one noise.
    keys = [run.key("refit", epoch) for epoch in epochs]
    options |= {"monitor": _monitor(run), "monitor_every": _MONITOR_EVERY}
    recipe = _recipe(run, kind)
    if recipe is not None:
        closed = gapjax.close_gap(run.vae, all_params, train_images, keys, recipe, **options)
        return [one.refit for one in closed]
    return gapjax.self_consistent(
        run.vae, all_params, train_images, keys,
        alpha=config.alpha if kind == "self_consistent" else 0,
        stratified=config.mixture == "stratified", num_epochs=config.refit_epochs, **options,
    )  # fmt: skip


def _recipe(run: Run, kind: str) -> gapjax.Recipe | None:
    """What --recipe says of a refit: the control's data alone. None where that is the paper's."""
    config = run.config
    if config.recipe == "paper" or kind == "optimal":
        return None
    recipe = gapjax.RECIPES[config.recipe]._replace(
        num_epochs=config.refit_epochs, batch_size=config.refit_batch_size or config.batch_size
    )
    return recipe if kind == "self_consistent" else recipe._replace(sources=(("data", 1.0),))


def _optimizer(run: Run, kind: str) -> optax.GradientTransformation:
    recipe = _recipe(run, kind)
    adam = lambda: gapjax.adam(run.config.learning_rate)
    return adam() if recipe is None else recipe_optimizer(recipe, len(run.dataset.train))


def _monitor(run: Run) -> Monitor:
    """Test BPD with few samples, for the curve of a refit."""
    test, few = jnp.asarray(run.dataset.test), {"num_samples": _MONITOR_SAMPLES}
    return lambda params: gapjax.evaluate(run.vae, params, run.key("monitor"), test, **few).bpd


def _save_unfinished(run: Run, kind: str, epochs: list[int], several: list, clock: float) -> None:
    """Saves refits that are under way, in the place of what was saved of them before."""
    tree, members = stores.packed(several)
    stores.save(
        run, _UNFINISHED, _number(kind, epochs), tree, clock, kind=kind, epochs=epochs,
        members=members, made_from=[("train", epoch) for epoch in epochs],
    )  # fmt: skip


def _number(kind: str, epochs: list[int]) -> int:
    """Under which these refits are saved while they are under way: no others' place."""
    return epochs[0] * len(REFITS) + REFITS.index(kind)


def _unfinished(run: Run, kind: str, epochs: list[int]) -> tuple[list | None, float]:
    """Where these refits were when they were saved last, and their seconds until then."""
    number = _number(kind, epochs)

    def is_wanted(record: dict) -> bool:  # otherwise it is of other checkpoints, or another run
        same = (record["kind"], record["epochs"]) == (kind, epochs)
        return same and stores.is_of_run(run, _UNFINISHED, number, "the refit begins anew")

    state = lambda: stores.state_like(run, gapjax.encoder_only(_optimizer(run, kind)))
    return stores.unfinished(run.workdir.checkpoints / _UNFINISHED, number, is_wanted, state)


def _record(kind: str, refit: gapjax.Refit) -> dict:
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
