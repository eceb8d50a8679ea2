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
    number = min(number, len(run.dataset.test), len(run.dataset.train))
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
      out: the folder of the results.
    """
    store, params = out / "checkpoints" / f"amortization_{kind}", stores.trained_params(run, epoch)
    made_with = checkpoint_facts(run, epoch) | {"encoders": sorted(encoders), "images": number}
    names = ("as_trained", *encoders)
    images = images_of(run, kind, params, epoch, number)
    if not is_kept(store, run, made_with):
        clock = time.monotonic()
        found = gapjax.amortization_gaps(
            run.vae, params, run.key("ledger", epoch), images,
            {name: each.encoder for name, each in encoders.items()},
        )  # fmt: skip
        facts = stores.entry_metadata(clock) | made_with
        facts["converged"] = float(found.converged.mean())
        checkpoints.save(store, run.config.seed, found.per_image, facts)
    like = dict.fromkeys(names, np.zeros(len(images)))
    return checkpoints.restore(store, run.config.seed, like)[0]


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
