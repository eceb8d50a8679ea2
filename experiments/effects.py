"""What the refits do to each kind of image: samples of the model, training images, test images.

A refit is judged on test images. What it did to the images that it was made of says how it came
by that: self-consistent training that wins on fresh samples of the model and loses on training
images has given up the one for the other.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

import gapjax
from experiments.run import Run, encoders
from experiments.show.formatting import at_epochs, measured, percent
from gapjax.fit.sources import draw_examples

COMPARED = ("control", "self_consistent")
_MOST_GRADIENTS = 1000
_draw = jax.jit(draw_examples)


def effects_like(run: Run) -> dict:
    """The shapes of what `measure` returns."""
    bpds = dict.fromkeys(("as_trained", *COMPARED), np.zeros(_num_images(run), np.float32))
    norms = np.zeros(min(_MOST_GRADIENTS, _num_images(run)), np.float32)
    return {kind: {"bpd": bpds, "gradient": norms} for kind in ("model", "train")}


def measure(run: Run, epoch: int, train_bpd: np.ndarray) -> dict:
    """BPD per image of fresh samples of the model and of training images, by each encoder.

    There are as many of either as there are test images (or training images, if those are fewer).
    The first of them are also given the norm of their gradient with respect to the encoder as
    trained, where the refits begin.

    Args:
      run: the run.
      epoch: of the checkpoint.
      train_bpd: BPD of every training image by the encoder as trained, which is not evaluated
        again.
    """
    trained, by_name = encoders(run, epoch, COMPARED)
    key, samples = run.key("evaluate"), run.config.num_eval_samples
    number = _num_images(run)
    model = gapjax.model_source(run.vae, trained.decoder, number)
    keys = jax.random.split(run.key("effects", epoch), number)
    drawn = _draw(model, None, keys, jnp.arange(number)).astype(run.dataset.train.dtype)
    x_train = jnp.asarray(run.dataset.train[:number])

    def bpds(x: jax.Array, known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        evaluate = functools.partial(gapjax.evaluate, run.vae, num_samples=samples)
        return known | {
            name: evaluate(trained._replace(encoder=encoder), key, x).per_image
            for name, encoder in by_name.items()
            if name not in known
        }

    def gradient(x: jax.Array) -> np.ndarray:
        return gapjax.encoder_gradient_norms(run.vae, trained, key, x[:_MOST_GRADIENTS])

    on_train = {"as_trained": np.asarray(train_bpd[:number])}
    return {
        "model": {"bpd": bpds(drawn, {}), "gradient": gradient(drawn)},
        "train": {"bpd": bpds(x_train, on_train), "gradient": gradient(x_train)},
    }


def notes(rows: list[dict]) -> list[str]:
    """Where self-consistent training loses to its control: what it did to the other images."""
    lost = [row for row in rows if _loses(row["gain_over_control"])]
    if not lost:
        return []
    last = lost[-1]["effects"]
    words = []
    for name, title in (("model", "fresh samples of the model"), ("train", "training images")):
        own = last[name]["self_consistent"]
        won = measured(own["bpd"], own["stderr"], 4, plus=True)
        share = percent(own["better"], decimals=1)
        words.append(f"{won} BPD on {title} (on {share} of them it wins)")
    rests = "{num_effective:,.0f} of {num_examples:,}".format
    return [
        "Self-consistent training loses to its control at "
        f"{at_epochs([row['epoch'] for row in lost])}. What it wins at {lost[-1]['epoch']}, "
        f"against the encoder as trained: {' and '.join(words)}. There the squared "
        f"gradient of the encoder rests on {rests(**last['model']['gradient'])} samples of the "
        f"model, and on {rests(**last['train']['gradient'])} training images."
    ]


def _num_images(run: Run) -> int:
    return min(len(run.dataset.test), len(run.dataset.train))


def _loses(difference: Mapping[str, float]) -> bool:
    return difference["bpd"] < -2 * difference["stderr"]
