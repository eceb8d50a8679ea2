"""What refits do to each kind of image: which images, which encoders, and what is said of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gapjax
from experiments import effects, results_json
from experiments import run as experiment
from gapjax.results.estimates import summarize
from gapjax.vae import sample_model


@pytest.fixture
def run(small):
    """The small model in a run of which no file is read; its refits are the encoder, nudged."""
    rng = np.random.default_rng(0)
    nudge = lambda leaf: leaf + 0.05 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    refits = {
        kind: jax.tree.map(nudge, small.params.encoder) for kind in ("control", "self_consistent")
    }
    by_name = {"as_trained": small.params.encoder, **refits}
    config = experiment.Config(
        **dict.fromkeys(experiment.Config._fields) | {"seed": 3, "num_eval_samples": 2}
    )
    dataset = gapjax.Dataset(
        **dict.fromkeys(gapjax.Dataset._fields)
        | {"train": small.train_images, "test": small.test_images}
    )
    run = experiment.Run(config, dataset, small.vae, None)
    params = {name: small.params._replace(encoder=own) for name, own in by_name.items()}
    return run, params, by_name


def test_every_kind_of_image_is_measured_by_every_encoder(small, run):
    run, encoders, by_name = run
    train_bpd = np.arange(90, dtype=np.float32)  # of all training images; the first are taken
    measured = effects.measure(run, 7, small.params, by_name, train_bpd)
    like = effects.effects_like(run)
    assert jax.tree.structure(like) == jax.tree.structure(measured)
    for expected, leaf in zip(jax.tree.leaves(like), jax.tree.leaves(measured), strict=True):
        assert (expected.shape, expected.dtype) == (leaf.shape, leaf.dtype)
    np.testing.assert_array_equal(measured["train"]["bpd"].pop("as_trained"), train_bpd[:40])
    for name in ("control", "self_consistent"):
        params = encoders[name]
        alone = gapjax.evaluate(
            small.vae, params, run.key("evaluate"), small.train_images[:40], num_samples=2
        )
        np.testing.assert_allclose(measured["train"]["bpd"][name], alone.per_image, rtol=1e-5)


def test_the_samples_are_of_the_model_and_fresh_at_every_checkpoint(small, run):
    run, _, by_name = run
    keys = jax.random.split(jax.random.key(11), 2000)
    draw = lambda key: sample_model(small.vae, small.params.decoder, key)
    others = gapjax.evaluate(
        small.vae, small.params, jax.random.key(12), jax.jit(jax.vmap(draw))(keys), num_samples=2
    )
    of_train = gapjax.evaluate(
        small.vae, small.params, run.key("evaluate"), small.train_images, num_samples=2
    ).per_image
    bpds = [
        effects.measure(run, epoch, small.params, by_name, of_train)["model"]["bpd"]["as_trained"]
        for epoch in range(5)
    ]
    ours = summarize(np.concatenate(bpds))
    assert abs(ours.bpd - others.bpd) < 4 * np.hypot(ours.stderr, others.stderr)
    of_data = summarize(of_train[:40])
    assert abs(of_data.bpd - others.bpd) > 4 * np.hypot(of_data.stderr, others.stderr)
    assert len(np.unique(np.round(ours.per_image, 5))) > 150


def _summary():
    rng = np.random.default_rng(0)
    bpds = rng.normal(size=(2, 3, 8)).astype(np.float32)
    names = ("as_trained", "control", "self_consistent")
    gradients = {"model": [1, 3, 0, 0], "train": [2, 2, 2, 2]}
    measured = {
        kind: {"bpd": dict(zip(names, own, strict=True)), "gradient": np.array(gradients[kind])}
        for kind, own in zip(("model", "train"), bpds, strict=True)
    }
    tested = {name: summarize(rng.normal(size=8)) for name in ("test", *names[1:])}
    of_images = {
        kind: {name: summarize(bpd) for name, bpd in own["bpd"].items()}
        for kind, own in measured.items()
    }
    return measured, tested, results_json.effects(measured, tested, {**of_images, "test": tested})


def test_what_is_won_is_as_trained_minus_the_refit():
    measured, tested, entry = _summary()
    assert list(entry) == ["model", "train", "test"]
    for kind in ("model", "train"):
        own = measured[kind]["bpd"]
        assert entry[kind]["as_trained"]["bpd"] == pytest.approx(own["as_trained"].mean())
        for refit in ("control", "self_consistent"):
            won = (own["as_trained"] - own[refit]).astype(np.float64)
            assert entry[kind][refit]["bpd"] == pytest.approx(won.mean(), abs=1e-6)
            assert entry[kind][refit]["better"] == (won > 0).mean()
    won = tested["test"].per_image - tested["control"].per_image
    assert entry["test"]["control"]["bpd"] == pytest.approx(won.mean())
    assert entry["model"]["gradient"] == pytest.approx(
        {"num_examples": 4, "num_effective": 100 / 82}
    )
    assert entry["train"]["gradient"] == {"num_examples": 4, "num_effective": 4.0}
    assert "gradient" not in entry["test"]


def test_a_loss_to_the_control_is_explained_by_the_other_images():
    entry = _summary()[-1]
    entry["model"]["self_consistent"].update(bpd=0.6, stderr=0.02, better=0.52)
    entry["train"]["self_consistent"].update(bpd=-0.17, stderr=0.01, better=0.006)
    row = lambda epoch, bpd: {
        "epoch": epoch, "effects": entry, "gain_over_control": {"bpd": bpd, "stderr": 0.01},
    }  # fmt: skip
    assert effects.notes([row(1, 0.1), row(2, -0.019)]) == []
    assert "at epoch 2. What" in effects.notes([row(1, 0.1), row(2, -0.03)])[0]
    (note,) = effects.notes([row(1, -0.1), row(2, 0.1), row(3, -0.021)])
    note = note.replace("\xa0", " ")
    assert "at epochs 1, 3." in note and "at 3, against the encoder as trained" in note
    assert (
        "+0.6000 ± 0.0200 BPD on fresh samples of the model (on 52.0 % of 8 the BPD is lower)"
        in note
    )
    assert "−0.1700 ± 0.0100 BPD on training images (on 0.6 % of 8 the BPD is lower)" in note
    assert "rests on 1 of 4 samples of the model, and on 4 of 4 training images" in note
    del entry["train"]["self_consistent"]["by_image"]  # as in files of older versions
    (note,) = effects.notes([row(1, -0.1)])
    assert "0.6\xa0%" not in note and "BPD on training images." in note
