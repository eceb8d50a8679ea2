"""The shares of images that refits improve: which images and encoders, with how many samples."""

import jax
import jax.numpy as jnp
import numpy as np

import gapjax
from experiments import config, effects, shares
from experiments import run as experiment
from experiments.results_json import AVERAGED, REFITS


def test_every_kind_of_image_is_measured_with_enough_samples(small, monkeypatch):
    rng = np.random.default_rng(0)
    nudge = lambda leaf: leaf + 0.05 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    names = (*REFITS, *(f"{kind}_averaged" for kind in AVERAGED))
    encoders = {name: jax.tree.map(nudge, small.params.encoder) for name in names}
    encoders["as_trained"] = small.params.encoder
    fields = dict.fromkeys(experiment.Config._fields) | {"seed": 3, "num_eval_samples": 2}
    dataset = gapjax.Dataset(
        **dict.fromkeys(gapjax.Dataset._fields)
        | {"train": small.train_images, "test": small.test_images}
    )
    run = experiment.Run(experiment.Config(**fields), dataset, small.vae, None)
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
        alone = gapjax.evaluate(
            small.vae, params, run.key("evaluate"), images[kind], num_samples=100
        )
        assert alone.num_samples == of_images[kind][name].num_samples == 100
        np.testing.assert_allclose(of_images[kind][name].per_image, alone.per_image, rtol=1e-5)
        np.testing.assert_allclose(of_images[kind][name].with_half, alone.with_half, rtol=1e-5)
        compared = gapjax.paired_difference(of_images[kind][trained], of_images[kind][name])
        assert 0 <= compared.fraction_improved <= 1 and compared.num_images == 40
    monkeypatch.setattr(shares, "SHARE_IMAGES", 11)  # the first of each kind
    for kind, by_encoder in shares.measure(run, 7, small.params, encoders).items():
        for name, found in by_encoder.items():
            np.testing.assert_allclose(
                found["whole"], measured[kind][name]["whole"][:11], rtol=1e-5
            )
    assert config.share_samples(run.config._replace(num_eval_samples=300)) == 300
