"""The phases of a run, each resumable: train, refit, evaluate, draw.

A phase looks at what the workdir's stores already hold and does the rest. Every random key is a
function of the seed and of what it is for, so a phase's numbers do not depend on how often the
run was interrupted.
"""

import functools
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

import gapjax
from experiments.claims import claims
from experiments.options import Config, Saving, UsageError
from experiments.report import write_report
from experiments.workdir import Workdir, WorkdirError, write_json
from gapjax import checkpoints, devices, plots, training
from gapjax.evaluation import Evaluation, summarize

REFITS = ("self_consistent", "control", "optimal")
_AVERAGED = ("self_consistent", "control")  # refits at a constant rate: their mean is shown too
_BETWEEN = "train_partial"  # the store of states between checkpoints, by optimizer step
_UNFINISHED = "refit_partial"  # the store of refits that are under way, by optimizer step
_PURPOSES = ("train", "refit", "optimal", "evaluate", "monitor", "pictures", "ledger")
_MONITOR_EVERY = 10  # epochs between two points of a refit's curve
_MONITOR_SAMPLES = 4


class Run(NamedTuple):
    """Everything a phase needs.

    Attributes:
      config: what to compute.
      dataset: the data, uint8.
      vae: the model.
      workdir: the claimed folder.
      data_dir: where the data was looked for, as given; no part of what is computed.
      validation: [V, *event] uint8, taken off the training set; None without --validation.
      saving: what is saved between checkpoints; no part of what is computed.
      sweep: how refits are computed: "off", or as in `gapjax.refit_encoder`.
    """

    config: Config
    dataset: gapjax.Dataset
    vae: gapjax.VAE
    workdir: Workdir
    data_dir: str | None = None
    validation: np.ndarray | None = None
    saving: Saving = Saving()
    sweep: str = "auto"

    def key(self, purpose: str, epoch: int = 0) -> jax.Array:
        """The key of a purpose, for the checkpoint of an epoch."""
        number = _PURPOSES.index(purpose)
        purpose_key = jax.random.fold_in(jax.random.key(self.config.seed), number)
        return jax.random.fold_in(purpose_key, epoch)

    @property
    def epochs(self) -> list[int]:
        """The epochs of the checkpoints."""
        every = self.config.checkpoint_every
        return list(range(every, self.config.num_epochs + 1, every))

    def interrupted(self) -> bool:
        """Whether a signal has asked any process of the run to end it."""
        return devices.any_process(self.workdir.interrupted)

    def sweeps(self) -> bool:
        """Whether the refits of all checkpoints are one program."""
        if self.sweep == "auto":
            everywhere, alone = devices.all_devices(), devices.process()[1] == 1
            return alone and (devices.is_accelerated(everywhere) or len(everywhere) > 1)
        return self.sweep != "off"

    @property
    def evaluated(self) -> dict[str, int]:
        """What is evaluated at a checkpoint, and of how many images."""
        num_test = len(self.dataset.test)
        averaged = [f"{kind}_averaged" for kind in _AVERAGED]
        tested = dict.fromkeys(("test", *REFITS, *averaged), num_test)
        sizes = {"train": len(self.dataset.train), **tested}
        return sizes if self.validation is None else {**sizes, "validation": len(self.validation)}


def start(
    config: Config,
    workdir: Workdir,
    data_dir: str | None,
    saving: Saving = Saving(),  # noqa: B008 (an immutable tuple)
    sweep: str = "auto",
) -> Run:
    """Loads the data, checks that the configuration fits it, and claims the workdir.

    Raises:
      UsageError: a flag that does not fit the data.
      DatasetError: data that cannot be used.
      WorkdirError: a workdir that cannot be used.
    """
    dataset = gapjax.load_dataset(
        config.dataset, data_dir=data_dir, binarization=config.binarization,
        threshold=config.threshold, binarization_seed=config.binarization_seed,
        levels=config.levels,
    )  # fmt: skip
    dataset, validation = _hold_out(dataset, config.validation)
    for name, images in (("training", dataset.train), ("test", dataset.test)):
        if config.batch_size > len(images):
            raise UsageError(
                f"--batch_size is {config.batch_size}, more than the {len(images)} {name} images"
            )
    binary = dataset.levels == 2
    likelihood = config.likelihood or ("bernoulli" if binary else "discretized_logistic")
    if binary != (likelihood == "bernoulli"):
        raise UsageError(
            f"--likelihood is {likelihood}, but --dataset={config.dataset} has {dataset.levels} "
            "levels; use bernoulli for binary data and discretized_logistic for grey"
        )
    vae = gapjax.mlp_vae(
        dataset.event_shape, likelihood, latent_dim=config.latent_dim,
        hidden_sizes=config.hidden_sizes, levels=dataset.levels, posterior=config.posterior,
    )  # fmt: skip
    workdir.claim(config, dataset.provenance)
    _commit()  # of the code that is loaded, not of what the checkout holds hours later
    return Run(config, dataset, vae, workdir, data_dir, validation, saving, sweep)


def _hold_out(dataset: gapjax.Dataset, number: int) -> tuple[gapjax.Dataset, np.ndarray | None]:
    """Takes images off the training set: the last of an order that is the same for every seed."""
    if number == 0:
        return dataset, None
    num_train = len(dataset.train) - number
    if num_train < 1:
        raise UsageError(
            f"--validation is {number}; it must be less than the {len(dataset.train)} training "
            "images"
        )
    order = np.random.default_rng(0).permutation(len(dataset.train))
    provenance = {**dataset.provenance, "num_train": num_train, "num_validation": number}
    rest = dataset._replace(train=dataset.train[np.sort(order[:num_train])], provenance=provenance)
    return rest, dataset.train[np.sort(order[num_train:])]


def train_phase(run: Run) -> None:
    """Joint training, with a checkpoint of the whole state at every interval.

    A checkpoint that is missing or damaged is made from the newest good state before it.
    """
    config, store = run.config, run.workdir.checkpoints / "train"
    like = _state_like(run)
    good = _good(run, "train", like)
    missing = [epoch for epoch in run.epochs if epoch not in good]
    if not missing:
        return
    source = gapjax.data_source(run.dataset.train)
    steps = training.steps_per_epoch(source, config.batch_size)
    optimizer = gapjax.adam(config.learning_rate)
    saved = {epoch * steps: ("train", epoch) for epoch in good}
    saved |= {step: (_BETWEEN, step) for step in _good(run, _BETWEEN, like) if step not in saved}
    newest = max((step for step in saved if step < missing[0] * steps), default=0)

    def log(epoch: int, bpd: float) -> None:
        bar(epoch, bpd)
        run.workdir.log("train", epoch, {"loss_bpd": bpd})

    def stop_if_interrupted(progress: training.Progress) -> None:
        if run.interrupted():
            save_between(run, progress.state, _between(progress, clock))
            raise KeyboardInterrupt

    with _progress(run, "train", config.num_epochs, newest // steps) as bar:
        progress, done = None, 0
        for epoch in missing:
            clock = time.monotonic()
            newest = max((step for step in saved if step < epoch * steps), default=0)
            if newest > done:
                where, number = saved[newest]
                state, facts = checkpoints.restore(run.workdir.checkpoints / where, number, like)
                clock -= facts["seconds"] if where == _BETWEEN else 0
                progress, done = _resumed(state, facts.get("epoch_nats", 0.0)), newest
            first = done // steps + 1
            run.workdir.forget(
                lambda entry, first=first, last=epoch: (
                    entry["phase"] == "train" and first <= entry["epoch"] <= last
                )
            )
            for stop in _stops(run, first, epoch):
                state, _ = training.train(
                    run.vae, source, run.key("train"), num_epochs=stop,
                    batch_size=config.batch_size, optimizer=optimizer, resume=progress,
                    on_epoch=log, on_chunk=stop_if_interrupted,
                )  # fmt: skip
                progress = _resumed(state)
                if stop < epoch:
                    save_between(run, state, _between(progress, clock))
            checkpoints.save(store, epoch, state, entry_facts(epoch, clock))
            done = epoch * steps


def _resumed(state: training.TrainState, epoch_nats: float = 0.0) -> training.Progress:
    return training.Progress(state, None, training.Curve([], [], [], []), epoch_nats, 0)


def _between(progress: training.Progress, clock: float) -> dict:
    """Record of a state between checkpoints."""
    facts = entry_facts(int(progress.state.step), clock)
    return {"step": facts.pop("epoch"), "epoch_nats": progress.epoch_nats, **facts}


def _stops(run: Run, first: int, last: int) -> list[int]:
    """The epochs after which the state is saved on the way through these; ends with the last."""
    every = run.saving.every
    return [epoch for epoch in range(first, last) if every and epoch % every == 0] + [last]


def save_between(run: Run, state: training.TrainState, facts: dict) -> None:
    """Saves a state of joint training that is no checkpoint; the newest --keep of these stay.

    Args:
      run: the run.
      state: after any optimizer step; `train_phase` goes on from it.
      facts: record of the entry; "seconds" are those since the checkpoint before.
    """
    store, step = run.workdir.checkpoints / _BETWEEN, int(state.step)
    checkpoints.save(store, step, state, facts)
    keep = run.saving.keep
    checkpoints.prune(store, lambda saved: [number for number in saved if number <= step][:-keep])


def _good(run: Run, name: str, like: object) -> list[int]:
    """The good entries of one of the run's stores; tells of the damaged ones."""
    good, damaged = checkpoints.good_numbers(run.workdir.checkpoints / name, like)
    instead = "an older one is used" if name == _BETWEEN else "it is made again"
    for error in damaged:
        print(f"skipped: {error}; {instead}", flush=True)
    return good


def refit_phase(run: Run, epochs: Sequence[int] | None = None) -> None:
    """Refits the encoder of these checkpoints: self-consistent, its control, and optimal.

    Args:
      run: the run.
      epochs: of the checkpoints; None takes all of them.
    """
    epochs, like = list(epochs or run.epochs), _refitted_like(run)
    good = {kind: _good(run, kind, like) for kind in REFITS}
    missing = [(epoch, kind) for epoch in epochs for kind in REFITS if epoch not in good[kind]]
    run.workdir.forget(lambda entry: (entry.get("checkpoint"), entry["phase"]) in missing)
    if run.sweeps():
        # All members even where some are there: in another company their last bits would differ.
        for kind in REFITS:
            absent = [epoch for epoch, other in missing if other == kind]
            if absent:
                _refit(run, kind, epochs, absent)
    else:
        for epoch, kind in missing:
            _refit(run, kind, [epoch], [epoch])


def _refit(run: Run, kind: str, epochs: list[int], missing: list[int]) -> None:
    """Refits the checkpoints of `epochs` in one way and one program, and saves what is missing."""
    config, clock = run.config, time.monotonic()
    most = config.optimal_epochs if kind == "optimal" else config.refit_epochs
    all_params = [_trained(run, epoch) for epoch in epochs]
    resume, seconds = _unfinished(run, kind, epochs)
    clock -= seconds
    images = run.dataset.test if kind == "optimal" else run.dataset.train
    steps = training.steps_per_epoch(gapjax.data_source(images), config.batch_size)
    every = run.saving.every * steps

    def keep(progress: list[training.Progress] | training.Progress) -> None:
        several = progress if isinstance(progress, list) else [progress]
        step = max(int(member.state.step) for member in several)
        interrupted = run.interrupted()
        if interrupted or (every and step % every == 0 and step < most * steps):
            _save_unfinished(run, kind, epochs, several, clock)
        if interrupted:
            raise KeyboardInterrupt

    name = f"{kind} {epochs[0]}" + (f" to {epochs[-1]}" if len(epochs) > 1 else "")
    done = resume[0].curve.epoch[-1] if resume and resume[0].curve.epoch else 0
    common = {
        "batch_size": config.batch_size, "optimizer": gapjax.adam(config.learning_rate),
        "resume": resume, "on_chunk": keep,
        "sweep": "auto" if run.sweep == "off" else run.sweep,
    }  # fmt: skip
    with _progress(run, name, most, done) as bar:
        if kind == "optimal":
            refits = gapjax.optimal_inference(
                run.vae, all_params, run.dataset.test,
                [run.key("optimal", epoch) for epoch in epochs], num_epochs=most,
                num_samples=_MONITOR_SAMPLES, on_epoch=bar, **common,
            )  # fmt: skip
        else:
            # One key for both, so that they see the training data in one order with one noise.
            refits = gapjax.self_consistent(
                run.vae, all_params, run.dataset.train,
                [run.key("refit", epoch) for epoch in epochs],
                alpha=config.alpha if kind == "self_consistent" else 0, num_epochs=most,
                monitor=_monitor(run), monitor_every=_MONITOR_EVERY, on_epoch=bar, **common,
            )  # fmt: skip
    for epoch, refit in zip(epochs, refits, strict=True):
        if epoch not in missing:
            continue
        curve = refit.curve
        # Before the entry: what is logged without it is forgotten, what is saved is not done again.
        for done_epoch, bpd in zip(curve.monitor_epoch, curve.monitor_bpd, strict=True):
            run.workdir.log(kind, done_epoch, {"test_bpd": bpd}, checkpoint=epoch)
        facts = entry_facts(epoch, clock)
        facts["seconds"] /= len(epochs)
        tree = {"encoder": refit.params.encoder, "averaged": refit.averaged_params.encoder}
        checkpoints.save(
            run.workdir.checkpoints / kind, epoch, tree, {**facts, **_record(kind, refit)}
        )
    checkpoints.prune(run.workdir.checkpoints / _UNFINISHED, lambda saved: saved)


def _monitor(run: Run) -> training.Monitor:
    """Test BPD with few samples, for the curve of a refit."""
    test = jnp.asarray(run.dataset.test)

    def monitor(candidate: gapjax.VAEParams) -> float:
        return gapjax.evaluate(
            run.vae, candidate, run.key("monitor"), test, num_samples=_MONITOR_SAMPLES
        ).bpd

    return monitor


def _save_unfinished(run: Run, kind: str, epochs: list[int], several: list, clock: float) -> None:
    """Saves refits that are under way; the newest such entry stays."""
    store = run.workdir.checkpoints / _UNFINISHED
    tree = [{"state": member.state, "encoders": member.encoders} for member in several]
    facts = {
        "kind": kind, "epochs": epochs, "seconds": time.monotonic() - clock,
        "members": [
            {"curve": list(m.curve), "epoch_nats": m.epoch_nats, "plateaus": m.plateaus}
            for m in several
        ],
    }  # fmt: skip
    number = max(int(member.state.step) for member in several)
    checkpoints.save(store, number, tree, facts)
    checkpoints.prune(store, lambda saved: [other for other in saved if other != number])


def _unfinished(run: Run, kind: str, epochs: list[int]) -> tuple[list | None, float]:
    """Where these refits were when they were saved last, and their seconds until then."""
    store = run.workdir.checkpoints / _UNFINISHED
    optimizer = gapjax.encoder_only(gapjax.adam(run.config.learning_rate))
    state = _state_like(run, optimizer)
    encoder = state.params.encoder
    one = {"state": state, "encoders": {"best": encoder, "averaged": encoder}}
    for number in reversed(checkpoints.numbers(store)):
        try:
            facts = checkpoints.record(store, number)
            if (facts["kind"], facts["epochs"]) != (kind, epochs):
                continue
            tree, _ = checkpoints.restore(store, number, [one] * len(epochs))
        except checkpoints.DamagedError as error:
            print(f"skipped: {error}; the refit begins anew", flush=True)
            continue
        members = [
            training.Progress(
                arrays["state"], arrays["encoders"], training.Curve(*member["curve"]),
                member["epoch_nats"], member["plateaus"],
            )
            for arrays, member in zip(tree, facts["members"], strict=True)
        ]  # fmt: skip
        return members, facts["seconds"]
    return None, 0.0


def evaluate_phase(run: Run) -> dict:
    """Evaluates every checkpoint and its refits; writes results.json.

    Raises:
      WorkdirError: a checkpoint or a refit is missing.
    """
    store = run.workdir.checkpoints / "evaluation"
    like = {name: np.zeros(size, np.float32) for name, size in run.evaluated.items()}
    rows, seconds = [], dict.fromkeys(("train", *REFITS, "evaluate"), 0.0)
    commits = {phase: set() for phase in seconds}
    done = _good(run, "evaluation", like)
    with _progress(run, "evaluate", len(run.epochs)) as bar:
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


def draw_phase(run: Run, results: dict) -> Path:
    """Draws the figures, samples and reconstructions; writes report.html and returns its path."""
    report = run.workdir.path / "report.html"
    path = run.workdir.path / "ledger.json"
    ledger = json.loads(path.read_text()) if path.is_file() else None
    figures = {
        "overview": plots.overview(results),
        "figure1a": plots.figure1a(results),
        "figure1b": plots.figure1b(results),
        "figure2": plots.figure2(results),
        "refit_curves": plots.refit_curves(results),
        "ledger": plots.ledger(ledger) if ledger else None,
        "samples": _samples(run),
        "reconstructions": _reconstructions(run),
    }
    if not run.workdir.writes:  # but it has restored what the others restore with it
        return report
    paths = {
        name: plots.save(figure, run.workdir.path / name)[0]
        for name, figure in figures.items()
        if figure is not None
    }
    write_report(report, results, paths, ledger)
    return report


def environment() -> dict:
    """What the numbers were computed with."""
    device = jax.devices()[0]
    return {
        "gapjax": gapjax.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "backend": jax.default_backend(),
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
    }


def entry_facts(epoch: int, clock: float) -> dict:
    """What every entry of a store records: its epoch, its cost, and the code that made it."""
    return {"epoch": epoch, "seconds": time.monotonic() - clock, "commit": _commit()}


@functools.cache
def _commit() -> str | None:
    """The commit of the source tree, marked where it has changes; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "gapjax", "experiments"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} with changes" if changed else commit


def _state_like(run: Run, optimizer: object = None) -> training.TrainState:
    """The shapes of a run's state, for restoring it."""
    optimizer = optimizer or gapjax.adam(run.config.learning_rate)
    rng_key = run.key("train")
    return jax.eval_shape(lambda: training.init_state(run.vae.init(rng_key), rng_key, optimizer))


def _trained(run: Run, epoch: int) -> gapjax.VAEParams:
    store = run.workdir.checkpoints / "train"
    if epoch not in checkpoints.numbers(store):
        raise WorkdirError(
            f"--workdir={run.workdir.path} has no checkpoint of epoch {epoch}; "
            "python -m experiments.train goes on with it"
        )
    return checkpoints.restore(store, epoch, _state_like(run))[0].params


def _refitted_like(run: Run) -> dict:
    """The shapes of what is kept of a refit."""
    return dict.fromkeys(("encoder", "averaged"), _state_like(run).params.encoder)


def _refitted(
    run: Run, kind: str, epoch: int, trained: gapjax.VAEParams, which: str = "encoder"
) -> gapjax.VAEParams:
    store = run.workdir.checkpoints / kind
    if epoch not in checkpoints.numbers(store):
        raise WorkdirError(
            f"--workdir={run.workdir.path} has no {kind} refit of epoch {epoch}; "
            "python -m experiments.refit makes it"
        )
    encoders, _ = checkpoints.restore(store, epoch, _refitted_like(run))
    return trained._replace(encoder=encoders[which])


def encoders(run: Run, epoch: int, kinds: Sequence[str]) -> tuple[gapjax.VAEParams, dict[str, Any]]:
    """The trained parameters of a checkpoint, and by name the encoders that go with its decoder."""
    trained = _trained(run, epoch)
    refits = {kind: _refitted(run, kind, epoch, trained).encoder for kind in kinds}
    return trained, {"as_trained": trained.encoder, **refits}


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


def _evaluate(run: Run, epoch: int) -> dict[str, np.ndarray]:
    """BPD per image, of the train set and by every encoder of the test set, on common noise."""
    trained = _trained(run, epoch)
    evaluate = functools.partial(gapjax.evaluate, run.vae, num_samples=run.config.num_eval_samples)
    key = run.key("evaluate")
    train, test = jnp.asarray(run.dataset.train), jnp.asarray(run.dataset.test)
    bpds = {
        "train": evaluate(trained, key, train).per_image,
        "test": evaluate(trained, key, test).per_image,
    }
    for kind in REFITS:
        bpds[kind] = evaluate(_refitted(run, kind, epoch, trained), key, test).per_image
    for kind in _AVERAGED:
        averaged = _refitted(run, kind, epoch, trained, "averaged")
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
    averaged = {**four, **{kind: evaluations[f"{kind}_averaged"] for kind in _AVERAGED}}
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
    notes = [
        _best_note(rows),
        "The BPD after optimal inference is fitted on the test set: it measures, no more.",
    ]
    unconverged = [row["epoch"] for row in rows if not row["refits"]["optimal"]["converged"]]
    if unconverged:
        notes.append(
            "Optimal inference had not converged when --optimal_epochs ended it at epochs "
            f"{', '.join(map(str, unconverged))}: there the gap is larger than shown."
        )
    return notes


def _samples(run: Run):
    params = _trained(run, run.epochs[-1])
    keys = jax.random.split(run.key("pictures"), 64)
    sample = jax.vmap(functools.partial(gapjax.sample_model, run.vae, params.decoder))
    return plots.image_grid(_pictures(run, sample(keys)), run.dataset.levels, columns=16)


def _reconstructions(run: Run):
    """Rows of test images and of their reconstructions by each encoder."""
    epoch = run.epochs[-1]
    trained = _trained(run, epoch)
    encoders = {
        "as trained": trained,
        "self-consistent": _refitted(run, "self_consistent", epoch, trained),
        "optimal inference\n(fitted on the test set)": _refitted(run, "optimal", epoch, trained),
    }
    x = jnp.asarray(run.dataset.test[:16])
    keys = jax.random.split(run.key("pictures"), len(x))
    rows = [_pictures(run, x)]
    for params in encoders.values():
        means = jax.vmap(functools.partial(gapjax.reconstruct, run.vae, params))(keys, x)
        rows.append(_pictures(run, means))
    return plots.image_grid(
        np.concatenate(rows), run.dataset.levels, columns=len(x),
        row_labels=["test images", *encoders],
    )  # fmt: skip


def _pictures(run: Run, x: jax.Array) -> np.ndarray:
    """X [N, *event] as pictures [N, H, W] or [N, H, W, C]; vectors become rows of pixels."""
    x = np.asarray(x, np.float32)
    shape = run.dataset.event_shape
    if len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3)):
        return x
    return x.reshape(len(x), shape[0], -1)


@contextmanager
def _progress(
    run: Run, name: str, total: int, initial: int = 0
) -> Iterator[Callable[[int, float], None]]:
    """A bar with the BPD so far; one line at the end where there is no terminal."""
    bar = tqdm.tqdm(
        desc=f"{name:24}", total=total, initial=initial, unit="ep", dynamic_ncols=True,
        disable=None if run.workdir.writes else True,
    )  # fmt: skip
    no_terminal = bar.disable  # closing a bar sets it
    clock, last = time.monotonic(), None

    def show(epoch: int, bpd: float) -> None:
        nonlocal last
        last = bpd
        bar.set_postfix_str(f"{bpd:.4f} BPD", refresh=False)
        bar.update(epoch - bar.n)

    with bar:
        yield show
    if no_terminal and last is not None:
        seconds = time.monotonic() - clock
        print(f"{name:24} {last:.4f} BPD  {seconds:6.1f} s", flush=True)
