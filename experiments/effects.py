"""The effects of the refits on each kind of image: model samples, training and test images.

A refit is judged by test images. Its effects on the kinds of images that it was fitted to help to
explain the result: self-consistent training can, for example, gain on new samples of the model
and lose on training images.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

import gapjax
from experiments.run import Run
from experiments.show.formatting import at_epochs, measured, percent
from gapjax.fit.sources import draw_examples
from gapjax.measure.bounds import encoder_gradient_norms

COMPARED = ("control", "self_consistent")
_MOST_GRADIENTS = 1000
_draw = jax.jit(draw_examples)


def effects_like(run: Run) -> dict:
    """A pytree with the structure, shapes and dtypes of what `measure` returns."""
    bpds = dict.fromkeys(("as_trained", *COMPARED), np.zeros(num_images(run), np.float32))
    norms = np.zeros(min(_MOST_GRADIENTS, num_images(run)), np.float32)
    return {kind: {"bpd": bpds, "gradient": norms} for kind in ("model", "train")}


def measure(
    run: Run, epoch: int, trained: gapjax.VAEParams, encoders: Mapping, train_bpd: np.ndarray
) -> dict:
    """Evaluates each encoder on new samples of the model and on training images.

    There are as many of either as there are test images, or training images if these are fewer.
    "bpd" has the BPD of each image [N] by each encoder; that of the trained one on training images
    is known, `train_bpd`. "gradient" is the norm [min(N, 1000)] of the gradient of each image's
    ELBO with respect to the encoder as trained, from which the refits start.
    """
    by_name = {"as_trained": trained.encoder, **{name: encoders[name] for name in COMPARED}}
    key, samples = run.key("evaluate"), run.config.num_eval_samples
    drawn, x_train = images_by_kind(run, epoch, trained).values()

    def bpds(x: jax.Array, known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        evaluate = functools.partial(gapjax.evaluate, run.vae, num_samples=samples)
        return known | {
            name: evaluate(trained._replace(encoder=encoder), key, x).per_image
            for name, encoder in by_name.items()
            if name not in known
        }

    def gradient(x: jax.Array) -> np.ndarray:
        return encoder_gradient_norms(run.vae, trained, key, x[:_MOST_GRADIENTS])

    on_train = {"as_trained": np.asarray(train_bpd[: len(x_train)])}
    return {
        "model": {"bpd": bpds(drawn, {}), "gradient": gradient(drawn)},
        "train": {"bpd": bpds(x_train, on_train), "gradient": gradient(x_train)},
    }


def images_by_kind(run: Run, epoch: int, trained: gapjax.VAEParams) -> dict[str, jax.Array]:
    """New samples of the model and training images [N, *event], by kind; N is `num_images`."""
    number = num_images(run)
    model = gapjax.model_source(run.vae, trained.decoder, number)
    keys = jax.random.split(run.key("effects", epoch), number)
    drawn = _draw(model, None, keys, jnp.arange(number)).astype(run.dataset.train.dtype)
    return {"model": drawn, "train": jnp.asarray(run.dataset.train[:number])}


def notes(rows: list[dict]) -> list[str]:
    """Says why self-consistent training is worse than its control at the last such checkpoint.

    Worse means by more than two standard errors of test BPD. Without such a checkpoint it is [].
    """
    loses = lambda difference: difference["bpd"] < -2 * difference["stderr"]
    lost = [row for row in rows if loses(row["gain_over_control"])]
    if not lost:
        return []
    last = lost[-1]["effects"]
    words = []
    for name, title in (("model", "fresh samples of the model"), ("train", "training images")):
        effect, share = last[name]["self_consistent"], ""
        if "by_image" in effect:
            number, lower = effect["by_image"]["num_images"], percent(effect["better"], decimals=1)
            share = f" (on {lower} of {number:,} the BPD is lower)"
        gain = measured(effect["bpd"], effect["stderr"], 4, plus=True)
        words.append(f"{gain} BPD on {title}{share}")
    effective = "{num_effective:,.0f} of {num_examples:,}".format
    return [
        "Self-consistent training has a higher test BPD than its control at "
        f"{at_epochs([row['epoch'] for row in lost])}. What it gains at {lost[-1]['epoch']}, "
        f"against the encoder as trained: {' and '.join(words)}. At this checkpoint the squared "
        f"gradient of the encoder rests on {effective(**last['model']['gradient'])} samples of "
        f"the model, and on {effective(**last['train']['gradient'])} training images."
    ]


def num_images(run: Run) -> int:
    """As many of every kind: as there are in either set."""
    return min(len(run.dataset.test), len(run.dataset.train))
