"""On which images an encoder is still far from q*: training, reconstructions, samples, test."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import gapjax
from experiments import stores
from experiments.run import Run
from experiments.sweeps import checkpoint_facts, is_kept, over_seeds_and_images
from gapjax import checkpoints
from gapjax.fit.sources import draw_examples

KINDS = ("training", "reconstructions", "samples", "test")
_draw = jax.jit(draw_examples)


def images_of(run: Run, kind: str, params: gapjax.VAEParams, epoch: int, number: int) -> np.ndarray:
    """At most so many images of a kind, as the trained model makes them or as they are.

    Reconstructions are x ~ p(x given z) with z ~ q(z given x) of training images.
    """
    number = _number_of(run, number)
    train = run.dataset.train[:number]
    if kind in ("training", "test"):
        return train if kind == "training" else run.dataset.test[:number]
    source = {
        "reconstructions": lambda: gapjax.reconstruction_source(run.vae, params, train),
        "samples": lambda: gapjax.model_source(run.vae, params.decoder, number),
    }[kind]()
    key = run.key("effects", epoch)
    plan = source.begin_epoch(key)
    drawn = _draw(source, plan, jax.random.split(key, number), jnp.arange(number))
    return np.asarray(drawn.astype(train.dtype))


def _number_of(run: Run, most: int) -> int:
    """As many images of every kind: at most so many, and as there are in either set."""
    return min(most, len(run.dataset.test), len(run.dataset.train))


def gaps(
    run: Run,
    epoch: int,
    kind: str,
    encoders: Mapping[str, gapjax.VAEParams],
    number: int,
    out: Path,
) -> dict[str, np.ndarray]:
    """Nats from q* [N] of the encoder as trained and of others, on one kind; kept once computed.

    Args:
      run: the run.
      epoch: of the checkpoint.
      kind: of images, one of `KINDS`.
      encoders: parameters after a recipe, by its name; of the trained encoder's architecture.
      number: most images.
      out: the folder of the results, which holds the refits too.
    """
    made, seed = out / "checkpoints", run.config.seed
    store, number = made / f"amortization_{kind}", _number_of(run, number)
    refits = {name: checkpoints.checksum(made / name, seed) for name in encoders}
    made_with = checkpoint_facts(run, epoch) | {"refits": refits, "images": number}
    if not is_kept(store, run, made_with):
        clock, params = time.monotonic(), stores.trained_params(run, epoch)
        images = images_of(run, kind, params, epoch, number)
        found = gapjax.amortization_gaps(
            run.vae, params, run.key("ledger", epoch), images,
            {name: each.encoder for name, each in encoders.items()},
        )  # fmt: skip
        facts = stores.entry_metadata(clock) | made_with
        facts["converged"] = float(found.converged.mean())
        checkpoints.save(store, seed, found.per_image, facts)
    like = dict.fromkeys(("as_trained", *encoders), np.zeros(number))
    return checkpoints.restore(store, seed, like)[0]


def summary(by_kind: Mapping[str, Sequence[Mapping[str, np.ndarray]]]) -> dict:
    """By kind and encoder the mean over seeds and images, with either standard error.

    Args:
      by_kind: from the kind to the gaps of every run.
    """
    return {
        kind: {
            name: over_seeds_and_images(np.stack([run[name] for run in runs])) for name in runs[0]
        }
        for kind, runs in by_kind.items()
    }


def table(results: Mapping[str, Mapping[str, Mapping]]) -> str:
    """The summary as plain text, a line for each kind."""
    names = list(next(iter(results.values())))
    lines = ["nats from q*" + " " * 8 + "".join(f"{name:>18}" for name in names)]
    for kind, row in results.items():
        cells = [f"{row[name]['mean']:.2f} ± {row[name]['stderr_over_images']:.2f}" for name in row]
        lines.append(f"{kind:20}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)
