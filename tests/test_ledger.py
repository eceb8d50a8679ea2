"""The ledger's program: what it writes, that it resumes, and what it refuses."""

import json

import jax
import numpy as np
import pytest
from absl import flags
from small_runs import parsed

from experiments import ledger, options, stores, workdir
from experiments import run as experiment
from gapjax.measure.log_likelihood import Sandwich
from gapjax.results import measurements


def _parse(given):
    return parsed(given, ledger.define_flags)


@pytest.fixture
def run(tmp_path):
    """A claimed workdir whose checkpoints are of random parameters, with no refit but one."""
    tiny = ["--num_epochs=6", "--checkpoint_every=2", "--hidden_sizes=4", "--latent_dim=2"]
    config = options.config_from_flags(_parse(tiny))
    run = experiment.start(experiment.prepare(config, None), workdir.Workdir(tmp_path / "run"))
    rng = np.random.default_rng(0)
    like = stores.state_like(run)
    params = [
        rng.normal(size=leaf.shape).astype(leaf.dtype) for leaf in jax.tree.leaves(like.params)
    ]
    state = like._replace(params=jax.tree.unflatten(jax.tree.structure(like.params), params))
    for epoch in run.epochs:
        stores.save(run, "train", epoch, _filled(state), 0.0, commit="of training")
    encoder = state.params.encoder
    refit = {"encoder": encoder, "averaged": encoder}
    stores.save(run, "optimal", 6, refit, 0.0, commit="of the refit")
    yield run
    run.workdir.close()


def _filled(state):
    """The shapes that are left are filled with zeros; keys stay keys."""

    def fill(leaf):
        if isinstance(leaf, np.ndarray):
            return leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return np.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(fill, state)


@pytest.fixture
def measured(monkeypatch):
    """Random numbers in the place of measurements; says which were asked for."""
    asked = []

    def measure(vae, params, rng_key, images, encoders, *, num_samples, batch_size, on_progress):
        asked.append((len(images), tuple(encoders), num_samples))
        rng = np.random.default_rng(len(asked))
        draw = lambda: rng.normal(size=len(images)).astype(np.float32)
        on_progress("posteriors", len(images))
        flag = rng.random(len(images)) < 0.5
        return measurements.Measured(
            {name: draw() for name in encoders}, draw(), draw(), draw() ** 2, draw(), flag, ~flag,
            rng.integers(0, 9, len(images)).astype(np.int32),
        )  # fmt: skip

    monkeypatch.setattr(measurements, "measure", measure)
    return asked


def test_it_writes_the_ledger_and_goes_on_where_it_was(run, measured):
    settings = ledger.Settings(epochs=(2, 6), num_images=30)
    results = ledger.ledger_phase(run, settings)
    assert measured == [
        (30, ("as_trained",), 50), (30, ("as_trained",), 50),
        (30, ("as_trained", "optimal"), 50), (30, ("as_trained", "optimal"), 50),
    ]  # fmt: skip
    path = run.workdir.path
    assert json.loads((path / "ledger.json").read_text()) == json.loads(json.dumps(results))
    assert (path / "ledger.png").stat().st_size > 1000
    first, last = results["checkpoints"]
    assert first["test"]["encoders"]["as_trained"]["inference_gap_by_refit"] is None
    account = last["test"]["encoders"]["as_trained"]
    assert account["inference_gap_by_posteriors"] == account["amortization_gap"]
    gap = last["test"]["encoders"]["as_trained"]["inference_gap_by_refit"]
    assert gap["fitted_on_test"] and np.isfinite(gap["nats"])
    assert (last["train"]["num_images"], last["train"]["num_available"]) == (30, 1437)
    assert results["subset_seed"] == 0
    ours = results["environment"]["commit"]
    assert last["commits"] == {
            "train": "of training", "optimal": "of the refit", "ledger": ours,
        }  # fmt: skip
    lines = ledger.table(results).splitlines()
    assert len(lines) == 3 and f"{last['model_gap']['nats']:.3f}" in lines[2]
    # The same again measures nothing; neither does another batch size; other samples do.
    again = ledger.ledger_phase(run, settings._replace(batch_size=7))
    assert again["checkpoints"] == results["checkpoints"] and len(measured) == 4
    ledger.ledger_phase(run, settings._replace(epochs=(6,), num_samples=3))
    assert measured[4:] == [(30, ("as_trained", "optimal"), 3)] * 2


def test_simulated_images_say_how_well_log_p_is_estimated(run, measured, monkeypatch):
    """Where the encoder is the self-consistent one if there is one, else that of the checkpoint."""
    asked = []

    def sandwich(vae, params, rng_key, num_images, *, batch_size, on_progress):
        asked.append((params.encoder, num_images))
        on_progress(num_images)
        sides = np.arange(num_images, dtype=np.float32)
        return Sandwich(None, sides, sides + 0.25, 0.25, 0.01, sides, sides)

    monkeypatch.setattr(ledger, "sandwich", sandwich)
    settings = ledger.Settings(epochs=(6,), num_images=30, num_simulated=3)
    results = ledger.ledger_phase(run, settings)
    (row,) = results["checkpoints"]
    assert (row["sandwich"]["gap"], row["sandwich"]["upper"]) == (0.25, 1.25)
    (note,) = [note for note in results["notes"] if "simulated" in note]
    assert "epoch 6: on 3 images" in note and "0.250 ± 0.010 nats" in note
    trained = stores.trained_params(run, 6).encoder
    other = jax.tree.map(np.zeros_like, trained)
    refit = {"encoder": other, "averaged": other}
    stores.save(run, "self_consistent", 6, refit, 0.0)
    ledger.ledger_phase(run, settings)
    assert [number for _, number in asked] == [3, 3]
    for (encoder, _), expected in zip(asked, (trained, other), strict=True):
        assert all(map(np.array_equal, jax.tree.leaves(encoder), jax.tree.leaves(expected)))


def test_one_image_has_no_standard_error(run, measured, monkeypatch):
    """It is null in the file, and left out where numbers are told."""
    for name in ("train", "test"):
        images = getattr(run.dataset, name)[:1]
        run = run._replace(dataset=run.dataset._replace(**{name: images}))
    sides = np.zeros(1, np.float32)
    between = Sandwich(None, sides, sides + 0.25, 0.25, float("nan"), sides, sides)
    monkeypatch.setattr(ledger, "sandwich", lambda *arguments, **options: between)
    settings = ledger.Settings(epochs=(6,), num_images=30, num_simulated=1)
    results = ledger.ledger_phase(run, settings)

    def refuse(literal):
        raise AssertionError(f"{literal} is no JSON")

    text = (run.workdir.path / "ledger.json").read_text()
    (row,) = json.loads(text, parse_constant=refuse)["checkpoints"]
    assert row["test"]["log_prob"]["stderr"] is row["sandwich"]["gap_stderr"] is None
    assert "nan" not in ledger.table(results) + "".join(results["notes"])


def test_a_search_that_found_little_is_told_of():
    row = lambda kept: {"epoch": 6, "sandwich": None, "test": {"quality": {"kept_start": kept}}}
    (note,) = ledger._own_notes([row(0.2), row(None), row(0.75)])
    assert "75% of the test images" in note and "epoch 6" in note


def test_the_first_the_middle_and_the_last_checkpoint_by_default(run, measured):
    results = ledger.ledger_phase(run, ledger.Settings(num_images=10))
    assert [row["epoch"] for row in results["checkpoints"]] == [2, 4, 6]


def test_an_epoch_without_a_checkpoint_is_named(run, measured):
    with pytest.raises(options.UsageError, match=r"epoch 5.*there are 2, 4, 6"):
        ledger.ledger_phase(run, ledger.Settings(epochs=(2, 5)))
    assert not measured


def test_flags_become_settings_or_are_refused():
    settings = ledger.settings_from_flags(_parse(["--ledger_epochs=6,2", "--ledger_images=9"]))
    assert settings == ledger.Settings(epochs=(2, 6), num_images=9)
    assert ledger.settings_from_flags(_parse([])) == ledger.Settings()
    with pytest.raises(options.UsageError, match="--ledger_epochs is 'last'"):
        ledger.settings_from_flags(_parse(["--ledger_epochs=last"]))
    for given in ("--ledger_images=1", "--ledger_samples=0", "--ledger_simulated=-1"):
        with pytest.raises(flags.IllegalFlagValueError, match=given):
            _parse([given])
