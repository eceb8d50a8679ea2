"""The shares of images that refits improve: which images and encoders, with how many samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gapjax
from experiments import config, effects, shares
from experiments import run as experiment
from experiments.results_json import AVERAGED, REFITS


@pytest.fixture
def run(small):
    fields = dict.fromkeys(experiment.Config._fields) | {"seed": 3, "num_eval_samples": 1}
    dataset = gapjax.Dataset(
        **dict.fromkeys(gapjax.Dataset._fields)
        | {"train": small.train_images, "test": small.test_images}
    )
    return experiment.Run(experiment.Config(**fields), dataset, small.vae, None)


def test_every_kind_of_image_is_measured_with_enough_samples(small, run):
    rng = np.random.default_rng(0)
    nudge = lambda leaf: leaf + 0.05 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    names = (*REFITS, *(f"{kind}_averaged" for kind in AVERAGED))
    encoders = {name: jax.tree.map(nudge, small.params.encoder) for name in names}
    encoders["as_trained"] = small.params.encoder
    measured = shares.measure(run, 7, small.params, encoders)
    like = shares.shares_like(run)
    assert jax.tree.structure(like) == jax.tree.structure(measured)
    for expected, leaf in zip(jax.tree.leaves(like), jax.tree.leaves(measured), strict=True):
        assert (expected.shape, expected.dtype) == (leaf.shape, leaf.dtype)
    of_images = shares.evaluations(run, measured)
    images = {"test": small.test_images, **effects.images_by_kind(run, 7, small.params)}
    for kind, trained, name in (
        ("test", "test", "control_averaged"),
        ("model", "as_trained", "control"),
    ):
        params = small.params._replace(encoder=encoders[name])
        first, second = (
            gapjax.evaluate(small.vae, params, key, images[kind], num_samples=50).per_image
            for key in jax.random.split(run.key("evaluate"))
        )
        found = of_images[kind][name]
        np.testing.assert_allclose(found.with_half, first, rtol=1e-5)
        np.testing.assert_allclose(found.per_image, (first + second) / 2, rtol=1e-5)
        assert found.num_samples == 100 and np.abs(first - second).max() > 1e-3
        compared = gapjax.paired_difference(of_images[kind][trained], found)
        assert 0 <= compared.fraction_improved <= 1 and compared.num_images == 40


def test_how_many_images_and_samples(run):
    of = lambda number: run.config._replace(num_eval_samples=number)
    assert [config.share_samples(of(number)) for number in (1, 100, 301)] == [100, 100, 302]
    assert [config.share_images(of(number)) for number in (1, 10, 20, 100)] == [50, 500, 1000, 1000]
    few = run._replace(dataset=run.dataset._replace(test=np.zeros((70, 5, 5), np.uint8)))
    assert shares.shares_like(few)["test"]["optimal"].shape == (2, 50)
