"""The figures, samples and reconstructions of a run, and its report."""

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

import gapjax
from experiments.run import Run
from experiments.show import figures
from experiments.show.report import write_report
from experiments.stores import encoders, evaluated_like, load
from gapjax.vae import reconstruct, sample_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_phase(run: Run, results: dict) -> Path:
    """Draws all figures of an evaluated run and writes report.html, whose path it gives."""
    report, path = (run.workdir.path / name for name in ("report.html", "ledger.json"))
    ledger = json.loads(path.read_text()) if path.is_file() else None
    epoch = results["checkpoints"][-1]["epoch"]
    by_encoder = _encoders(run, epoch)
    names = ("overview", "figure1a", "figure1b", "figure2", "refit_curves", "effects")
    drawn = {name: getattr(figures, name)(results) for name in names} | {
        "ledger": figures.ledger(ledger) if ledger else None, "samples": _samples(run, by_encoder),
        "reconstructions": _reconstructions(run, by_encoder),
        "costliest": _costliest(run, epoch, by_encoder),
    }  # fmt: skip
    if not run.workdir.writes:  # restoring checkpoints, above, needs every process
        return report
    paths = {
        name: figures.save(figure, run.workdir.path / name)[0]
        for name, figure in drawn.items()
        if figure is not None
    }
    write_report(report, results, paths, ledger)
    return report


def _samples(run: Run, by_encoder: dict[str, gapjax.VAEParams]) -> "Figure":
    """Samples of the model; the decoder is that of all encoders."""
    params = next(iter(by_encoder.values()))
    keys = jax.random.split(run.key("pictures"), 64)
    sample = jax.jit(jax.vmap(functools.partial(sample_model, run.vae), in_axes=(None, 0)))
    x = _pictures(run, sample(params.decoder, keys))
    return figures.image_grid(x, run.dataset.levels, columns=16)


def _reconstructions(run: Run, by_encoder: dict[str, gapjax.VAEParams]) -> "Figure":
    """A row of test images, and a row of reconstructions for each encoder."""
    x = jnp.asarray(run.dataset.test[:16])
    keys = jax.random.split(run.key("pictures"), len(x))
    several = jax.jit(jax.vmap(functools.partial(reconstruct, run.vae), in_axes=(None, 0, 0)))
    means = [several(params, keys, x) for params in by_encoder.values()]
    rows = [_pictures(run, each) for each in (x, *means)]
    return figures.image_grid(
        np.concatenate(rows), run.dataset.levels, columns=len(x),
        row_labels=["test images", *by_encoder],
    )  # fmt: skip


def _costliest(run: Run, epoch: int, by_encoder: dict[str, gapjax.VAEParams]) -> "Figure":
    """A row of the test images with the highest BPD, and a row of pixel costs for each encoder.

    Darker pixels cost more. The scale of an image is that of its costliest pixel as trained.
    """
    evaluated, _ = load(run, "evaluation", epoch, evaluated_like(run))
    bpds = np.asarray(evaluated["test"])
    worst = np.argsort(-bpds, kind="stable")[:12]
    x = jnp.asarray(run.dataset.test[worst])
    key, number = run.key("pictures"), run.config.num_eval_samples
    nats = [np.asarray(_pixel_nats(run.vae, p, key, x, number)) for p in by_encoder.values()]
    flat = nats[0].reshape(len(x), -1)
    labels = [f"{bpd:.3g}\n{_num_pixels(pixels, 0.9)} px"
              for bpd, pixels in zip(bpds[worst], flat, strict=True)]  # fmt: skip
    darkest = flat.max(axis=1).reshape(-1, *[1] * (x.ndim - 1)) / (run.dataset.levels - 1)
    rows = [_pictures(run, x), *(_pictures(run, costs / darkest) for costs in nats)]
    return figures.image_grid(
        np.concatenate(rows), run.dataset.levels, columns=len(x), column_labels=labels,
        row_labels=[
            "test images; above, their BPD and\nhow many pixels hold 90 % of the cost",
            *(f"pixels’ cost, {name}" for name in by_encoder),
        ],
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("vae", "num_samples"))
def _pixel_nats(
    vae: gapjax.VAE, params: gapjax.VAEParams, rng_key: jax.Array, x: jax.Array, num_samples: int
) -> jax.Array:
    """Nats [N, *event]: -log p(pixel given z), averaged over samples of z; one key for all x."""

    def one(sample_key: jax.Array, x: jax.Array) -> jax.Array:
        z = vae.encode(params.encoder, x).sample(sample_key)
        return -vae.decode(params.decoder, z).base_dist.log_prob(x.astype(jnp.float32))

    several = jax.vmap(jax.vmap(one, in_axes=(0, None)), in_axes=(None, 0))
    return several(jax.random.split(rng_key, num_samples), x).mean(axis=1)


def _num_pixels(costs: np.ndarray, share: float) -> int:
    """The smallest number of pixels that make up this share of an image's cost."""
    most_first = np.sort(costs)[::-1].cumsum()
    return int(np.searchsorted(most_first, share * most_first[-1])) + 1


def _encoders(run: Run, epoch: int) -> dict[str, gapjax.VAEParams]:
    """The parameters of a checkpoint with each encoder, by its label in the figures."""
    names = {
        "as_trained": "as trained",
        "self_consistent": "self-consistent",
        "optimal": "optimal inference\n(fitted on the test set)",
    }
    trained, by_name = encoders(run, epoch, ("self_consistent", "optimal"))
    return {names[name]: trained._replace(encoder=params) for name, params in by_name.items()}


def _pictures(run: Run, x: jax.Array) -> np.ndarray:
    """Reshapes x [N, *event] to images [N, H, W] or [N, H, W, C]; a vector becomes one column."""
    x = np.asarray(x, np.float32)
    shape = run.dataset.event_shape
    if len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3)):
        return x
    return x.reshape(len(x), shape[0], -1)
