"""The share of images that a refit improves, and the median of what it wins, image by image.

The noise of an image's own BPD biases both, so they are not those of the evaluation but of one with
more posterior samples, on the first of the images of each kind.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

import gapjax
from experiments.config import SHARE_IMAGES, share_samples
from experiments.effects import COMPARED, images_by_kind, num_images
from experiments.results_json import AVERAGED, REFITS
from experiments.run import Run
from gapjax.results.estimates import Evaluation, summarize

_BATCH = 50  # images at once, each with so many samples; bounds memory
_OF_TEST = ("test", *REFITS, *(f"{kind}_averaged" for kind in AVERAGED))
_OF_OTHERS = ("as_trained", *COMPARED)


def shares_like(run: Run) -> dict:
    """A pytree with the structure, shapes and dtypes of what `measure` returns."""
    tested = np.zeros(min(SHARE_IMAGES, len(run.dataset.test)), np.float32)
    others = np.zeros(min(SHARE_IMAGES, num_images(run)), np.float32)
    return {
        "test": {name: {"whole": tested, "half": tested} for name in _OF_TEST},
        **{
            kind: {name: {"whole": others, "half": others} for name in _OF_OTHERS}
            for kind in ("model", "train")
        },
    }


def measure(
    run: Run, epoch: int, trained: gapjax.VAEParams, encoders: Mapping[str, Any]
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """By kind of images and encoder, the BPD of each image [N], and with half of the samples."""
    kinds = {"test": run.dataset.test, **images_by_kind(run, epoch, trained)}
    measured = {}
    for kind, images in kinds.items():
        measured[kind] = {}
        for name in _OF_TEST if kind == "test" else _OF_OTHERS:
            params = trained._replace(encoder=encoders["as_trained" if name == "test" else name])
            found = gapjax.evaluate(
                run.vae, params, run.key("evaluate"), images[:SHARE_IMAGES],
                num_samples=share_samples(run.config), batch_size=_BATCH,
            )  # fmt: skip
            measured[kind][name] = {"whole": found.per_image, "half": found.with_half}
    return measured


def evaluations(run: Run, measured: Mapping[str, Any]) -> dict[str, dict[str, Evaluation]]:
    """What was measured as evaluations, by kind of images and encoder."""
    of = lambda found: summarize(
        np.asarray(found["whole"]), share_samples(run.config), np.asarray(found["half"])
    )
    return {
        kind: {name: of(found) for name, found in by_encoder.items()}
        for kind, by_encoder in measured.items()
    }
