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
from experiments.options import Config, UsageError
from experiments.report import write_report
from experiments.workdir import Workdir, WorkdirError, write_json
from gapjax import checkpoints, plots, training
from gapjax.evaluation import Evaluation, summarize

REFITS = ("self_consistent", "control", "optimal")
_EVALUATED = ("train", "test", *REFITS)
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
    """

    config: Config
    dataset: gapjax.Dataset
    vae: gapjax.VAE
    workdir: Workdir
    data_dir: str | None = None

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


def start(config: Config, workdir: Workdir, data_dir: str | None) -> Run:
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
    return Run(config, dataset, vae, workdir, data_dir)


def train_phase(run: Run) -> None:
    """Joint training, with a checkpoint of the whole state at every interval."""
    config, store = run.config, run.workdir.checkpoints / "train"
    optimizer = gapjax.adam(config.learning_rate)
    done = [epoch for epoch in checkpoints.numbers(store) if epoch in run.epochs]
    last = done[-1] if done else 0
    if last == config.num_epochs:
        return
    run.workdir.forget(lambda entry: entry["phase"] == "train" and entry["epoch"] > last)
    state, _ = checkpoints.restore(store, last, _state_like(run)) if done else (None, {})
    source = gapjax.data_source(run.dataset.train)

    def log(epoch: int, bpd: float) -> None:
        bar(epoch, bpd)
        run.workdir.log("train", epoch, {"loss_bpd": bpd})

    with _progress(run, "train", config.num_epochs, last) as bar:
        for epoch in run.epochs[len(done) :]:
            clock = time.monotonic()
            state, _ = training.train(
                run.vae, source, run.key("train"), num_epochs=epoch, batch_size=config.batch_size,
                optimizer=optimizer, state=state, on_epoch=log,
            )  # fmt: skip
            checkpoints.save(store, epoch, state, _facts(epoch, clock))


def refit_phase(run: Run) -> None:
    """Refits the encoder of every checkpoint: self-consistent, its control, and optimal."""
    missing = [
        (epoch, kind)
        for epoch in run.epochs
        for kind in REFITS
        if epoch not in checkpoints.numbers(run.workdir.checkpoints / kind)
    ]
    run.workdir.forget(lambda entry: (entry.get("checkpoint"), entry["phase"]) in missing)
    params, restored = None, None
    for epoch, kind in missing:
        if restored != epoch:
            params, restored = _trained(run, epoch), epoch
        clock = time.monotonic()
        most = run.config.optimal_epochs if kind == "optimal" else run.config.refit_epochs
        with _progress(run, f"{kind} {epoch}", most) as bar:
            refit = _refit(run, kind, epoch, params, bar)
        record = {**_facts(epoch, clock), **_record(kind, refit)}
        checkpoints.save(run.workdir.checkpoints / kind, epoch, refit.params.encoder, record)
        curve = refit.curve
        for done_epoch, bpd in zip(curve.monitor_epoch, curve.monitor_bpd, strict=True):
            run.workdir.log(kind, done_epoch, {"test_bpd": bpd}, checkpoint=epoch)


def _refit(run: Run, kind: str, epoch: int, params: gapjax.VAEParams, bar: Callable):
    config = run.config
    common = {
        "batch_size": config.batch_size,
        "optimizer": gapjax.adam(config.learning_rate),
        "on_epoch": bar,
    }
    if kind == "optimal":
        return gapjax.optimal_inference(
            run.vae, params, run.dataset.test, run.key("optimal", epoch),
            num_epochs=config.optimal_epochs, num_samples=_MONITOR_SAMPLES, **common,
        )  # fmt: skip
    test = jnp.asarray(run.dataset.test)

    def monitor(candidate: gapjax.VAEParams) -> float:
        return gapjax.evaluate(
            run.vae, candidate, run.key("monitor"), test, num_samples=_MONITOR_SAMPLES
        ).bpd

    # One key for both, so that they see the training data in one order with one noise.
    return gapjax.self_consistent(
        run.vae, params, run.dataset.train, run.key("refit", epoch),
        alpha=config.alpha if kind == "self_consistent" else 0,
        num_epochs=config.refit_epochs, monitor=monitor, monitor_every=_MONITOR_EVERY, **common,
    )  # fmt: skip


def evaluate_phase(run: Run) -> dict:
    """Evaluates every checkpoint and its refits; writes results.json.

    Raises:
      WorkdirError: a checkpoint or a refit is missing.
    """
    store = run.workdir.checkpoints / "evaluation"
    like = {
        name: np.zeros(len(run.dataset.train if name == "train" else run.dataset.test), np.float32)
        for name in _EVALUATED
    }
    rows, seconds = [], dict.fromkeys(("train", *REFITS, "evaluate"), 0.0)
    commits = {phase: set() for phase in seconds}
    done = checkpoints.numbers(store)
    with _progress(run, "evaluate", len(run.epochs)) as bar:
        for index, epoch in enumerate(run.epochs):
            if epoch not in done:
                clock = time.monotonic()
                bpds = _evaluate(run, epoch)
                checkpoints.save(store, epoch, bpds, _facts(epoch, clock))
            bpds, record = checkpoints.restore(store, epoch, like)
            evaluations = {name: summarize(np.asarray(bpds[name])) for name in _EVALUATED}
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
        "claims": claims(rows, run.config.alpha),
        "seconds": {**seconds, "total": sum(seconds.values())},
        "notes": _notes(rows),
    }
    write_json(run.workdir.path / "results.json", results)
    return results


def draw_phase(run: Run, results: dict) -> Path:
    """Draws the figures, samples and reconstructions; writes report.html and returns its path."""
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
    paths = {
        name: plots.save(figure, run.workdir.path / name)[0]
        for name, figure in figures.items()
        if figure is not None
    }
    report = run.workdir.path / "report.html"
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


def _facts(epoch: int, clock: float) -> dict:
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


def _state_like(run: Run) -> training.TrainState:
    """The shapes of a run's state, for restoring it."""
    optimizer = gapjax.adam(run.config.learning_rate)
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


def _refitted(run: Run, kind: str, epoch: int, trained: gapjax.VAEParams) -> gapjax.VAEParams:
    store = run.workdir.checkpoints / kind
    if epoch not in checkpoints.numbers(store):
        raise WorkdirError(
            f"--workdir={run.workdir.path} has no {kind} refit of epoch {epoch}; "
            "python -m experiments.refit makes it"
        )
    encoder, _ = checkpoints.restore(store, epoch, trained.encoder)
    return trained._replace(encoder=encoder)


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
    return bpds


def _row(epoch: int, evaluations: dict[str, Evaluation], refits: dict) -> dict:
    gaps = gapjax.inference_gaps(**{kind: evaluations[kind] for kind in ("test", *REFITS)})
    means = {
        name: {"bpd": evaluation.bpd, "stderr": evaluation.stderr}
        for name, evaluation in evaluations.items()
    }
    pairs = {
        name: getattr(gaps, name)._asdict()
        for name in ("inference_gap", "gain", "gain_over_control")
    }
    shares = {"gap_closed": gaps.gap_closed, "gap_closed_stderr": gaps.gap_closed_stderr}
    return {"epoch": epoch, **means, **pairs, **shares, "refits": refits}


def _notes(rows: list[dict]) -> list[str]:
    notes = ["The BPD after optimal inference is fitted on the test set: it measures, no more."]
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
        desc=f"{name:24}", total=total, initial=initial, disable=None, unit="ep",
        dynamic_ncols=True,
    )  # fmt: skip
    no_terminal = bar.disable  # closing a bar sets it
    clock, last = time.monotonic(), None

    def show(epoch: int, bpd: float) -> None:
        nonlocal last
        last = bpd
        bar.set_postfix_str(f"{bpd:.4f} BPD", refresh=False)
        bar.update(epoch - bar.n)
        if run.workdir.interrupted:
            raise KeyboardInterrupt

    with bar:
        yield show
    if no_terminal and last is not None:
        seconds = time.monotonic() - clock
        print(f"{name:24} {last:.4f} BPD  {seconds:6.1f} s", flush=True)
