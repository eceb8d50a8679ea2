"""The share of images that a refit improves, and the median of what it wins, image by image.

The noise of an image's own BPD biases both, so they are not those of the evaluation but of one with
more posterior samples, on the first of the images of each kind.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import gapjax
from experiments.config import share_images, share_samples
from experiments.effects import COMPARED, images_by_kind, num_images
from experiments.results_json import REFITTED
from experiments.run import Run
from gapjax.results.estimates import Evaluation, summarize

_BATCH = 50  # images at once, each with so many samples; bounds memory
_OF_TEST = ("test", *REFITTED)
_OF_OTHERS = ("as_trained", *COMPARED)


def shares_like(run: Run) -> dict:
    """A pytree with the structure, shapes and dtypes of what `measure` returns."""
    number = share_images(run.config)
    tested, others = (
        np.zeros((2, min(number, available)), np.float32)
        for available in (len(run.dataset.test), num_images(run))
    )
    of_others = dict.fromkeys(_OF_OTHERS, others)
    return {"test": dict.fromkeys(_OF_TEST, tested), "model": of_others, "train": of_others}


def measure(
    run: Run, epoch: int, trained: gapjax.VAEParams, encoders: Mapping[str, Any]
) -> dict[str, dict[str, np.ndarray]]:
    """BPD [2, N] by kind of images and encoder, by either half of the posterior samples."""
    kinds = {"test": run.dataset.test, **images_by_kind(run, epoch, trained)}
    keys, half = jax.random.split(run.key("evaluate")), share_samples(run.config) // 2

    def bpds(kind: str, name: str) -> np.ndarray:
        params = trained._replace(encoder=encoders["as_trained" if name == "test" else name])
        images = kinds[kind][: share_images(run.config)]
        both = [
            gapjax.evaluate(run.vae, params, key, images, num_samples=half, batch_size=_BATCH)
            for key in keys
        ]
        return np.stack([each.per_image for each in both])

    return {
        kind: {name: bpds(kind, name) for name in (_OF_TEST if kind == "test" else _OF_OTHERS)}
        for kind in kinds
    }


def evaluations(run: Run, measured: Mapping[str, Any]) -> dict[str, dict[str, Evaluation]]:
    """What was measured as evaluations with all samples, by kind of images and encoder."""
    samples = share_samples(run.config)
    return {
        kind: {
            name: summarize(np.mean(bpds, axis=0), samples, np.asarray(bpds[0]))
            for name, bpds in by_encoder.items()
        }
        for kind, by_encoder in measured.items()
    }
