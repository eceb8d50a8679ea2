"""The atlas: rows resume, nothing is chosen by test examples, and its numbers are what they say."""

import dataclasses
import json

import draw_atlas
import jax
import numpy as np
import pytest
from absl import flags
from conftest import assert_same_bits
from draw_what_works import traced_alone

import gapjax
from experiments import atlas, baselines, compression, over_seeds, rows
from experiments.config import UsageError
from experiments.kept import Job
from experiments.rows import ROWS, Data, Row
from experiments.show import atlas_rows, figures
from gapjax import checkpoints, models
from gapjax.codec.coding import ENCODER
from gapjax.examples import take
from gapjax.model import mlp
from gapjax.models import counts

_TINY = {"epochs": 2, "refit_epochs": 1, "batch_size": 8, "num_samples": 2, "num_optimal": 4}
_SIZES = {"latent_dim": 2, "hidden_sizes": (4,)}
RNG = np.random.default_rng(0)


def _images(levels):
    return _parts(RNG.integers(0, levels, (24, 4, 4)).astype(np.uint8), levels)


def _parts(examples, levels):
    parts = (take(examples, slice(*ends)) for ends in ((0, 12), (12, 16), (16, 24)))
    return Data(*parts, levels, "made up")


def _job(row, data, out, seed=0):
    return Job("tiny", row, seed, data, rows.model(row, data), out)


MLP = Row("digits", "mlp", _SIZES, recipes=("alpha_0.3",), **_TINY)


def _of_likelihood(kind):
    """A small row and its data."""
    row, few = MLP._replace(recipes=()), {"latent_dim": 2}
    if kind in counts.LIKELIHOODS:
        cells = models.count_examples(RNG.poisson(4.0, (24, 5)).astype(np.uint8))
        options = _SIZES | {"likelihood": kind}
        return row._replace(model="counts", options=options), _parts(cells, None)
    if kind == "colour":
        x = RNG.integers(0, 4, (24, 2, 2, 3)).astype(np.uint8)
        options = few | {"num_channels": (8,)}
        return row._replace(model="convolution", options=options), _parts(x, 4)
    if kind == "normal":
        return row, _parts(RNG.normal(size=(24, 5)).astype(np.float32), None)
    return row, _images(2 if kind == "bernoulli" else 5)


@pytest.mark.parametrize("kind", [*mlp.LIKELIHOODS, *counts.LIKELIHOODS, "colour"])
def test_no_choice_sees_a_test_example(kind, tmp_path):
    """Training and the choice run where there are none; the model may know the largest library.

    Programs are traced alone here; another test runs a row.
    """
    row, data = _of_likelihood(kind)
    job = _job(row._replace(epochs=1), data, tmp_path)
    job = job._replace(data=data._replace(test=None))
    with traced_alone():
        params, facts = atlas.trained(job)["late"]
        choice = atlas.choose(job, "late", params)
    assert facts["epoch"] == 1
    assert choice.best == max(choice.validation, key=choice.validation.get)
    assert set(choice.models) == {"control", "paper"}


def test_a_row_is_measured_resumed_and_summarized(tmp_path, monkeypatch):
    data = _images(2)
    jobs = [_job(MLP, data, tmp_path, seed) for seed in (0, 1)]
    monkeypatch.setattr(atlas, "_costs_same", lambda recipe: recipe.sources[0] != ("model", 0.3))
    found = [atlas.measured(job) for job in jobs]
    nats = found[0]["late"]["nats"]
    assert nats["paper"].shape == (8,) and nats["q_star"].shape == (4,)
    assert found[0]["early"]["epoch"] <= found[0]["late"]["epoch"] == 2
    curve = found[0]["early"]["validation"]
    assert curve >= found[0]["late"]["validation"]
    # the noise is common: what is measured anew is bit for bit what was kept
    params = atlas.trained(jobs[0])["late"][0]
    again = gapjax.evaluate(
        jobs[0].vae, params, jobs[0].key("evaluate"), data.test, num_samples=MLP.num_samples
    )
    np.testing.assert_allclose(
        gapjax.bits_per_dim(nats["trained"], (4, 4)), again.per_image, rtol=1e-5
    )

    def refuse(*args, **options):
        raise AssertionError("computed again")

    for name in ("train", "close_gap", "optimal_inference", "best_posteriors"):
        monkeypatch.setattr(gapjax, name, refuse)
    kept = atlas.measured(jobs[0])
    assert kept["late"]["best"] == found[0]["late"]["best"]
    np.testing.assert_array_equal(kept["late"]["nats"]["optimal"], nats["optimal"])
    other = jobs[0]._replace(row=MLP._replace(learning_rate=0.1))
    with pytest.raises(UsageError, match="another definition of the row"):
        atlas.measured(other)
    changed = dataclasses.replace(atlas.RECIPES["paper"], learning_rate=0.1)
    with monkeypatch.context() as patch:
        patch.setitem(atlas.RECIPES, "paper", changed)
        with pytest.raises(UsageError, match="late_paper is of another definition of the recipe"):
            atlas.choose(jobs[0], "late", atlas.trained(jobs[0])["late"][0])

    summary = json.loads(json.dumps(atlas.row_summary("tiny", MLP, found, data)))
    gains = [each["late"]["nats"]["paper"] - each["late"]["nats"]["trained"] for each in found]
    gaps = [each["late"]["nats"]["q_star"] - each["late"]["nats"]["trained"][::2] for each in found]
    paper = summary["closed"]["paper"]
    shares = [gain[::2].mean() / gap.mean() for gain, gap in zip(gains, gaps, strict=True)]
    np.testing.assert_allclose(paper["values"], shares)
    np.testing.assert_allclose(paper["stderr"], np.std(shares, ddof=1) / np.sqrt(2))
    np.testing.assert_allclose(summary["gap"]["mean"], np.mean(gaps))
    late = summary["late"]
    # an encoder that costs more may be the best on validation examples, and is not chosen
    assert summary["larger_encoder"] == ["alpha_0.3"] and "alpha_0.3" not in late["best"]
    assert late["validation_by_recipe"].keys() == {"control", "paper", "alpha_0.3"}
    on_train = [each["late"]["nats"]["train_q_star"].mean() for each in found]
    on_test = [each["late"]["nats"]["q_star"].mean() for each in found]
    np.testing.assert_allclose(
        late["over_fitting"]["decoder"]["values"], np.subtract(on_train, on_test)
    )
    far = {kind: each["paper"]["mean"] for kind, each in late["nats_from_q_star"].items()}
    assert set(far) == {"test", "train", "samples"} and len(set(far.values())) == 3
    np.testing.assert_allclose(far["test"], late["gap"]["mean"] - paper["nats"]["mean"])
    assert "examples_that_gain" not in summary["late"]  # 2 samples are too few
    many = over_seeds.row_of(found, 100)
    gain = many["late"]["examples_that_gain"]["paper"]
    share = f"{gain['share']['mean']:.1%}"
    assert share in draw_atlas.shares({"rows": [{"row": "tiny", **many}]})
    np.testing.assert_allclose(gain["share"]["values"], [(each > 0).mean() for each in gains])
    np.testing.assert_allclose(gain["median"]["values"], [np.median(each) for each in gains])
    named_alpha = summary | {"row": "tiny_alpha"}
    assert [share for share, _ in atlas_rows.alphas({"rows": [named_alpha]})["tiny_alpha"]["late"]
            ] == [0.0, 0.3, 0.5]  # fmt: skip
    figure = figures.alpha({"rows": [named_alpha], "environment": {}})
    drawn = figure.axes[0].containers[1].lines[0].get_ydata()
    np.testing.assert_allclose(drawn[1], late["gain"]["alpha_0.3"]["mean"])
    figure = figures.recipes({"rows": [summary], "environment": {}}, "tiny")
    (bar,) = [bar for bar, name in zip(figure.axes[0].patches, figure.axes[0].get_yticklabels(),
              strict=True) if name.get_text().startswith("paper")]  # fmt: skip
    np.testing.assert_allclose(bar.get_width(), 100 * paper["mean"])
    results = {"rows": [summary]}
    assert "tiny" in atlas_rows.table(results)
    for show in (draw_atlas.gaps, draw_atlas.closed, draw_atlas.costs):
        assert "`tiny`" in show(results)


def test_a_training_that_is_interrupted_goes_on(tmp_path, monkeypatch):
    jobs = [_job(MLP, _images(2), tmp_path / name) for name in ("whole", "interrupted")]
    jobs[1] = jobs[1]._replace(data=jobs[0].data)
    whole, train, stops = atlas.trained(jobs[0]), gapjax.train, []

    def interrupted(*args, num_epochs, **options):
        stops.append(num_epochs)
        if stops == [1, 2]:
            raise KeyboardInterrupt
        return train(*args, num_epochs=num_epochs, **options)

    monkeypatch.setattr(gapjax, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atlas.trained(jobs[1])
    again = atlas.trained(jobs[1])
    assert stops == [1, 2, 2]
    monkeypatch.setattr(gapjax, "train", None)  # a row with other refits has the same training
    shared = atlas.trained(jobs[1]._replace(name="other", row=MLP._replace(refit_epochs=9)))
    assert_same_bits(shared["late"][0], whole["late"][0])
    monkeypatch.setattr(gapjax, "train", train)
    at_one = jobs[0]._replace(row=MLP._replace(early=1), out=tmp_path / "named")
    named = atlas.trained(at_one)
    assert named["early"][1]["epoch"] == 1 and named["late"][1] == whole["late"][1]
    for at in ("early", "late"):
        assert again[at][1] == whole[at][1]
        assert_same_bits(again[at][0], whole[at][0])
    assert not checkpoints.numbers(jobs[1].place("training"))


def test_a_row_may_be_of_a_file(tmp_path):
    path, images = tmp_path / "mine.npz", RNG.integers(0, 3, (40, 4, 4)).astype(np.uint8)
    np.savez(path, train=images[:30], test=images[30:], levels=3)
    data = rows.load(str(path), None)
    assert [len(part) for part in data[:3]] == [27, 3, 10] and data.levels == 3
    assert rows.shape_of(data) == (4, 4)
    assert rows.model(MLP, data).decode.likelihood == "discretized_logistic"
    with pytest.raises(ValueError, match="does not exist"):
        rows.load(str(tmp_path / "nothing.npz"), None)


def test_every_row_names_what_there_is():
    for name, row in ROWS.items():
        assert row.data in rows.DATA and atlas.candidates(row), name
    tried = atlas.candidates(ROWS["digits_alpha"])
    assert tried["alpha_0.3"].sources == (("model", 0.3), ("data", 0.7))
    tried = atlas.candidates(ROWS["digits_recipes"])
    dear = [name for name, recipe in tried.items() if not atlas._costs_same(recipe)]
    assert (
        dear == ["larger", "refinement_2"] and tried["best"].num_epochs > tried["paper"].num_epochs
    )
    digits = rows.load("digits", None)
    sizes = [len(part) for part in digits[:3]]
    assert sum(sizes) == 1797 and sizes[2] == 360
    together = np.concatenate([digits.train, digits.validation])
    assert len(np.unique(together, axis=0)) == len(np.unique(rows.DATA["digits"](None)[0], axis=0))
    for name in ("digits_hierarchy", "digits_norm_1.0"):
        vae = rows.model(ROWS[name], digits)
        assert vae == rows.model(ROWS[name], digits)
        jax.eval_shape(vae.init, jax.random.key(0))
    with pytest.raises(UsageError, match=r"docs/atlas\.md says where"):
        rows.load("starmap", "no_such_folder")


@pytest.mark.parametrize("page", draw_atlas.PAGES)
def test_a_page_has_the_numbers_of_the_results(page):
    results = json.loads(draw_atlas.RESULTS.read_text())
    text = (draw_atlas.RESULTS.parents[3] / f"docs/{page}.md").read_text(encoding="utf-8")
    assert text == draw_atlas.written(page, results), "run python tests/draw_atlas.py"
    assert {row["row"] for row in results["rows"]} <= set(ROWS)


def _bytes_job(tmp_path, **change):
    pytest.importorskip("constriction", reason="the extra 'codec' is not installed")
    images = RNG.integers(0, 2, (200, 4, 4)).astype(np.uint8)
    data = Data(images[:12], images[12:16], images[16:], 2, "made up")
    return _job(MLP._replace(recipes=(), **change), data, tmp_path)


def test_bytes_of_encoders_and_refinement_are_what_the_elbo_predicts(tmp_path):
    job = _bytes_job(tmp_path, num_samples=20)
    refiners = (ENCODER, gapjax.Refiner(num_steps=1))
    settings = compression.Settings("late", ("trained", "paper"), refiners, num_images=150)
    found = compression.measured(job, settings)
    files = found["files"]
    assert list(files) == [
        "bits_back", "bits_back newton 1", "paper bits_back", "paper bits_back newton 1"
    ]  # fmt: skip
    params = atlas.trained(job)["late"][0]
    images = job.data.test[:150]
    assert files["bits_back"]["bytes"] == len(gapjax.compress(job.vae, params, images))
    assert files["bits_back"]["elbo_bytes"] == pytest.approx(found["elbo_bytes"])
    for file in files.values():
        assert file["bpd"] == pytest.approx(8 * file["bytes"] / (150 * 16))
        assert 0 < file["bytes"] - file["stream_bytes"] < 80
        without_start = file["stream_bytes"] - file["initial_bits"] / 8
        assert abs(without_start / file["elbo_bytes"] - 1) < 0.05
    assert (files["paper bits_back newton 1"]["method"], found["epoch"]) == ("newton", 2)
    assert found["baselines"]["packed"] == 150 * 2
    drawn = figures.compression(found).axes[0].get_lines()
    assert {"trained newton", "paper newton"} <= {line.get_label() for line in drawn}
    with pytest.raises(UsageError, match="encoders is 'mixture', which is not known"):
        compression.measured(job, settings._replace(encoders=("mixture",)))


def test_bytes_of_a_hierarchy_are_of_every_order(tmp_path):
    options = {"latent_dims": (2, 2), "hidden_sizes": (4,), "form": "top_down"}
    job = _bytes_job(tmp_path, model="hierarchy", options=options)
    settings = compression.Settings(num_images=6)
    found = compression.measured(job, settings)
    every = compression.measured(job, settings._replace(every=True, num_images=300))
    assert every["images"] == sum(len(part) for part in job.data[:3]) and "training" in every["of"]
    assert found["images"] == 6 and found["entries"] == 96
    file = found["files"]["bits_back"]
    assert 0 < file["initial_bits"] <= 32 * 8  # of four latents
    assert file["one_image_bytes"] < file["bytes"] and file["stream_bytes"] < file["bytes"]
    assert "bit_swap" in found["files"]["bit_swap"]["refused"]
    assert "bits_back" in compression.table({"rows": [found]})


@pytest.mark.parametrize(
    "flag, words",
    [("--newton_steps=0", "--newton_steps has 0"), ("--adam_steps=x", "--adam_steps is 'x'")],
)
def test_flags_of_compression_are_checked(flag, words):
    values = flags.FlagValues()
    compression.define_flags(values)
    values(["", flag])
    with pytest.raises(UsageError, match=words):
        compression.settings_from_flags(values)


def test_a_picture_of_images_has_them_in_a_grid():
    with pytest.raises(ValueError, match=r"a picture needs \[N, H, W\] or RGB"):
        baselines.grid(np.zeros((2, 4, 4, 2), np.uint8))
    picture = baselines.grid(np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3))
    np.testing.assert_array_equal(picture[:, 4:], np.arange(48, 96).reshape(4, 4, 3))
