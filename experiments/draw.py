"""The figures, samples and reconstructions of a run, and its report."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import gapjax
from experiments.report import write_report
from experiments.run import Run, refitted_params, trained_params
from gapjax import plots


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


def _samples(run: Run):
    params = trained_params(run, run.epochs[-1])
    keys = jax.random.split(run.key("pictures"), 64)
    sample = jax.vmap(functools.partial(gapjax.sample_model, run.vae, params.decoder))
    return plots.image_grid(_pictures(run, sample(keys)), run.dataset.levels, columns=16)


def _reconstructions(run: Run):
    """Rows of test images and of their reconstructions by each encoder."""
    epoch = run.epochs[-1]
    trained = trained_params(run, epoch)
    encoders = {
        "as trained": trained,
        "self-consistent": refitted_params(run, "self_consistent", epoch, trained),
        "optimal inference\n(fitted on the test set)": refitted_params(
            run, "optimal", epoch, trained
        ),
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
