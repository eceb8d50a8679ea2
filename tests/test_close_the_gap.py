"""The sweep over recipes: its choice does not depend on test images; what it writes and keeps."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_runs import TINY, on_accelerator, untrained_runs

import gapjax
from experiments import close_the_gap, options, refit, stores, studies
from experiments import run as experiment
from experiments.config import UsageError
from experiments.show import figures
from experiments.workdir import Workdir
from gapjax import checkpoints
from gapjax.fit import recipes
from gapjax.fit.step import init_state
from gapjax.results import measurements

NAMES = ("paper", "control", "samples", "refinement_1")
EPOCH = 2


def _config(seed):
    return TINY._replace(
        seed=seed, num_epochs=EPOCH, optimal_epochs=1, hidden_sizes=(8,), validation=1037
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return untrained_runs(tmp_path_factory.mktemp("runs"), EPOCH, _config(0))


@pytest.fixture
def short(monkeypatch):
    """Recipes of one epoch, few images, and a short search for q*."""
    quick = {"num_epochs": 1, "batch_size": 200, "num_samples": 1}
    short_recipes = {name: dataclasses.replace(recipes.RECIPES[name], **quick) for name in NAMES}
    for module in (close_the_gap, studies):
        monkeypatch.setattr(module, "RECIPES", short_recipes)
    search, found = gapjax.PosteriorSearch(2, 0.1, 2, 1, 2), gapjax.best_posteriors
    monkeypatch.setattr(
        gapjax, "best_posteriors", lambda *args, **more: found(*args, search=search, **more)
    )
    gaps = measurements.amortization_gaps
    monkeypatch.setattr(
        measurements, "amortization_gaps", lambda *args: gaps(*args, search=search, num_samples=2)
    )


def _poisoned(run):
    """The same run with other images in the place of the test set."""
    garbage = np.random.default_rng(0).integers(0, 2, (360, 8, 8)).astype(np.uint8)
    return run._replace(dataset=run.dataset._replace(test=garbage))


def _sweep(runs, out):
    for name in NAMES:
        studies.refit(runs, name, EPOCH, out)
    return close_the_gap.choose(runs, NAMES, EPOCH, out)


def test_the_sweep(trained, short, tmp_path, monkeypatch):
    runs = studies.open_runs(trained[::-1], None)
    assert [run.config.seed for run in runs] == [0, 1]
    choice = _sweep(runs, tmp_path / "a")
    # Nothing of the choice is changed by a test set of noise ...
    poisoned = list(map(_poisoned, runs))
    assert _sweep(poisoned, tmp_path / "b") == choice
    # ... which the scores are.
    results = close_the_gap.summary(runs, EPOCH, tmp_path / "a", choice)
    others = close_the_gap.summary(poisoned, EPOCH, tmp_path / "b", choice)
    for row, other in zip(results["recipes"], others["recipes"], strict=True):
        assert row["validation_bpd"] == other["validation_bpd"]
        assert row["test_bpd"]["mean"] != other["test_bpd"]["mean"]
    _check_results(results, choice)
    _check_nats_from_optimal(runs, tmp_path / "a", choice["best"])
    _check_one_seed(runs[:1], tmp_path / "a", choice)
    _check_without_validation(runs[:1], tmp_path / "a", results)
    _check_resumes(runs, tmp_path / "a", monkeypatch)
    text = close_the_gap.table(results)
    assert all(name in text for name in NAMES)
    json.loads(json.dumps(results, allow_nan=False))
    assert figures.save(figures.closing(results), tmp_path / "closing")[0].stat().st_size > 1000


def _check_results(results, choice):
    rows = {row["recipe"]: row for row in results["recipes"]}
    assert set(rows) == set(NAMES) and results["seeds"] == [0, 1]
    assert {name for name, row in rows.items() if row["larger_encoder"]} == {"refinement_1"}
    assert choice["best"] != "refinement_1"
    assert rows["paper"]["cost"] == 1 < rows["refinement_1"]["cost"]
    assert rows["refinement_1"]["encoder_parameters"] > rows["paper"]["encoder_parameters"]
    lowest = min(rows, key=lambda name: rows[name]["validation_bpd"]["mean"])
    assert choice["best_of_any_size"] == lowest == results["recipes"][0]["recipe"]
    assert rows[choice["best"]]["chosen"] and rows["control"]["seeds"] == 2
    as_trained = np.array(results["as_trained"]["test_bpd"]["values"])
    optimal = np.array(results["optimal_posteriors"]["test_bpd"]["values"])
    assert rows["control"]["gain_over_control"]["mean"] == 0
    for row in rows.values():
        test = np.array(row["test_bpd"]["values"])
        closed = (as_trained - test) / (as_trained - optimal)
        np.testing.assert_allclose(row["gap_closed"]["values"], closed, rtol=1e-6)
        assert row["gap_closed"]["mean"] == pytest.approx(closed.mean())
        assert row["gap_closed"]["stderr"] == pytest.approx(closed.std(ddof=1) / 2**0.5)


def _check_one_seed(runs, out, choice):
    """Its standard errors are over images, and its share is that of the images that have a q*."""
    results = close_the_gap.summary(runs, EPOCH, out, choice, 50)
    assert results["stderr_over"] == "images" and results["optimal_posteriors"]["num_images"] == 50
    images = runs[0].dataset.test
    trained, paper = (
        close_the_gap.score(runs[0], name, EPOCH, out, images) for name in (None, "paper")
    )
    optimal = close_the_gap.optimal_bpd(runs[0], EPOCH, out, choice["best"], 50)
    assert optimal.shape == (50,)
    row = next(row for row in results["recipes"] if row["recipe"] == "paper")
    gain, gap = (trained - paper)[:50], trained[:50] - optimal
    share = gain.mean() / gap.mean()
    assert row["gap_closed"]["mean"] == pytest.approx(share, rel=1e-4)
    stderr = (gain - share * gap).std(ddof=1) / 50**0.5 / gap.mean()
    assert row["gap_closed"]["stderr"] == pytest.approx(stderr, rel=1e-3)
    stderr = (trained - paper).std(ddof=1) / len(images) ** 0.5
    assert row["gain"]["stderr"] == pytest.approx(stderr, rel=1e-3)
    assert "±" in close_the_gap.table(results)


def _check_without_validation(runs, out, validated):
    """The first recipe named is the one reported; the scores are what they were."""
    assert validated["chosen_on"] == "validation"
    runs = [run._replace(validation=None) for run in runs]
    names = ("paper", "refinement_1", "samples", "control")
    choice = close_the_gap.choose(runs, names, EPOCH, out)
    assert (choice["best"], choice["best_of_any_size"]) == ("samples", "refinement_1")
    results = close_the_gap.summary(runs, EPOCH, out, choice)
    rows, others = results["recipes"], {row["recipe"]: row for row in validated["recipes"]}
    assert [row["recipe"] for row in rows] == ["refinement_1", "samples", "paper", "control"]
    for row in rows:
        test = others[row["recipe"]]["test_bpd"]["values"][0]
        assert row["validation_bpd"] is None and row["test_bpd"]["mean"] == test
    assert results["num_validation"] == 0 and results["as_trained"]["validation_bpd"] is None
    assert "named before" in results["notes"][-1] and "chosen" in validated["notes"][-1]
    assert "–" in close_the_gap.table(results)


def _check_nats_from_optimal(runs, out, best):
    """Each kind has images of its own; the second time nothing is searched for."""
    first = close_the_gap.nats_from_optimal(runs, EPOCH, out, best, 5)
    assert list(first) == list(studies.KINDS)
    means = [first[kind]["paper"]["mean"] for kind in first]
    assert len(set(means)) == len(means)
    assert set(first["test"]) == {"as_trained", "paper", best}
    params = stores.trained_params(runs[0], EPOCH)
    for kind, images in (("training", "train"), ("test", "test")):
        expected = getattr(runs[0].dataset, images)[:5]
        found = studies.images_of(runs[0], kind, params, EPOCH, 5)
        np.testing.assert_array_equal(found, expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurements, "amortization_gaps", None)
        assert close_the_gap.nats_from_optimal(runs, EPOCH, out, best, 5) == first
        # A recipe that was refitted anew is measured anew.
        kept = checkpoints.checksum
        refitted = lambda store, seed: "another" if store.name == "paper" else kept(store, seed)
        patch.setattr(checkpoints, "checksum", refitted)
        with pytest.raises(TypeError, match="NoneType"):
            close_the_gap.nats_from_optimal(runs, EPOCH, out, best, 5)


def _check_resumes(runs, out, monkeypatch):
    """What is there is not done again; a recipe that was changed is."""
    made = []
    monkeypatch.setattr(gapjax, "refit_members", lambda *args, **more: made.append(more) or [])
    studies.refit(runs, "samples", EPOCH, out)
    assert not made
    changed = dataclasses.replace(studies.RECIPES["samples"], learning_rate=0.5)
    monkeypatch.setitem(studies.RECIPES, "samples", changed)
    with pytest.raises(ValueError):  # the stand-in refits nothing
        studies.refit(runs, "samples", EPOCH, out)
    assert [options["optimizer"] for options in made] == [
        recipes.recipe_options(changed, len(runs[0].dataset.train))["optimizer"]
    ]


@pytest.mark.parametrize("name", ["samples", "refinement_1"])
def test_a_refit_that_was_killed_goes_on_to_the_same_bits(
    trained, short, tmp_path, monkeypatch, capsys, name
):
    run = studies.open_runs(trained, None)[0]
    longer = dataclasses.replace(studies.RECIPES[name], num_epochs=3)
    monkeypatch.setitem(studies.RECIPES, name, longer)
    monkeypatch.setattr(studies, "_SAVE_EVERY", 2)
    studies.refit([run], name, EPOCH, tmp_path / "whole")

    def killed(*args):
        keep(*args)
        if (tmp_path / f"half/checkpoints/{name}_partial/0").exists():
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        keep = studies._keep
        patch.setattr(studies, "_keep", killed)
        with pytest.raises(KeyboardInterrupt):
            studies.refit([run], name, EPOCH, tmp_path / "half")
    shutil.copytree(tmp_path / "half", tmp_path / "damaged")
    for path in (tmp_path / f"damaged/checkpoints/{name}_partial").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    resumed, refit_members = [], gapjax.refit_members

    def noted(vae, members, **options):
        resumed.append([one.resume and one.resume.curve.epoch[-1] for one in members])
        return refit_members(vae, members, **options)

    monkeypatch.setattr(gapjax, "refit_members", noted)
    checksum = lambda out: checkpoints.checksum(tmp_path / out / "checkpoints" / name, 0)
    for out in ("half", "damaged"):
        studies.refit([run], name, EPOCH, tmp_path / out)
        assert not checkpoints.numbers(tmp_path / f"{out}/checkpoints/{name}_partial")
        assert checksum(out) == checksum("whole")
    assert resumed == [[2], [None]]
    assert capsys.readouterr().out.count("the refit begins anew") == 1


def test_refits_without_scores_see_no_images_that_are_held_out(
    trained, short, tmp_path, monkeypatch
):
    monkeypatch.setattr(gapjax, "evaluate", lambda *args, **more: pytest.fail("evaluated"))
    flags = {"runs": trained[:1], "recipes": ["samples"], "epoch": None, "data_dir": None}
    values = SimpleNamespace(out=str(tmp_path), score=False, **flags)
    close_the_gap.close_the_gap(values)
    run = studies.open_runs(trained, None)[0]
    studies.refitted(run, "samples", tmp_path)  # it is there
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["samples"]


def test_on_an_accelerator_all_seeds_are_one_program(trained, short, tmp_path, monkeypatch):
    runs = studies.open_runs(trained, None)
    studies.refit(runs, "paper", EPOCH, tmp_path / "each")
    programs = on_accelerator(monkeypatch)
    studies.refit(runs, "paper", EPOCH, tmp_path / "together")
    assert programs == [2]
    for run in runs:
        each, together = (
            studies.refitted(run, "paper", tmp_path / out) for out in ("each", "together")
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), each, together)


def test_paper_s_row_is_the_refit_of_the_programs(trained, short, tmp_path):
    run = studies.open_runs(trained, None)[0]
    studies.refit([run], "paper", EPOCH, tmp_path)
    ours = studies.refitted(run, "paper", tmp_path)
    params = stores.trained_params(run, EPOCH)
    theirs = gapjax.self_consistent(
        run.vae, params, run.dataset.train, run.key("refit", EPOCH), num_epochs=1, batch_size=200
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs.params)


def test_a_refit_is_kept_for_the_checkpoint_that_it_was_made_from(trained, tmp_path):
    first, other = studies.open_runs(trained, None)
    facts = studies.checkpoint_facts(first, EPOCH)
    checkpoints.save(tmp_path, 0, {"encoder": np.zeros(1)}, facts)
    assert studies.is_kept(tmp_path, first, facts)
    made_with = facts | {"recipe": studies.plain_recipe(recipes.RECIPES["noisy"])}
    checkpoints.save(tmp_path, 0, {"encoder": np.zeros(1)}, made_with)
    assert studies.is_kept(tmp_path, first, made_with)
    made_with["recipe"]["refinement_steps"] = 1
    assert not studies.is_kept(tmp_path, first, made_with)
    another_run = first._replace(workdir=other.workdir)  # of the same seed and epoch
    needed = studies.checkpoint_facts(another_run, EPOCH)
    assert not studies.is_kept(tmp_path, another_run, needed)


def test_recipe_of_the_programs_is_that_of_the_library(tmp_path):
    """And its control sees training images alone, by the same optimizer."""
    config = _config(0)._replace(recipe="noisy", refit_epochs=2, refit_batch_size=100)
    run = experiment.start(experiment.prepare(config, None), Workdir(tmp_path / "run"), sweep="off")
    state = init_state(run.vae.init(run.key("train")), run.key("train"), gapjax.adam(1e-3))
    stores.save(run, "train", EPOCH, state, 0.0)
    refit.refit_phase(run, [EPOCH], ("self_consistent", "control"))
    run.workdir.close()
    for kind, source in (("self_consistent", "noisy"), ("control", "data")):
        recipe = dataclasses.replace(
            recipes.RECIPES["noisy"], num_epochs=2, sources=((source, 1.0),)
        )
        closed = gapjax.close_gap(
            run.vae, state.params, run.dataset.train, run.key("refit", EPOCH), recipe
        )
        _, by_name = stores.encoders(run, EPOCH, [kind])
        jax.tree.map(np.testing.assert_array_equal, by_name[kind], closed.params.encoder)


def test_a_standard_error_of_zero_is_one():
    """Of two seeds of one mean it is that over seeds all the same; of one, that over images."""
    per_image = np.array([[1.0, 2.0], [2.0, 1.0]])
    assert close_the_gap._summary(per_image)["stderr"] == 0
    assert close_the_gap._summary(per_image[:1])["stderr"] == pytest.approx(0.5)


def test_programs_know_the_recipes_that_keep_the_architecture():
    """Their stores have the shapes of the trained encoder."""
    unknown = set(recipes.RECIPES) - set(options._RECIPES)
    assert unknown == {"control", "larger", "refinement_1", "refinement_2", "refinement_mnist"}


def test_a_recipe_can_be_tried_with_other_numbers():
    changed = studies.named("samples:num_epochs=20:learning_rate=1e-4")
    expected = dataclasses.replace(recipes.RECIPES["samples"], num_epochs=20, learning_rate=1e-4)
    assert changed == expected
    for text, message in (
        ("simples", "'simples' is not known; there are paper"),
        ("samples:epochs=2", "changes 'epochs'; it can change num_epochs"),
        ("samples:num_epochs=2.5", "'2.5', which is no positive number"),
        ("samples:learning_rate=nan", "'nan', which is no positive number"),
    ):
        with pytest.raises(UsageError, match=message):
            studies.named(text)


def test_runs_that_cannot_be_compared_are_refused(trained, tmp_path):
    with pytest.raises(UsageError, match="--runs is not given"):
        studies.open_runs([], None)
    with pytest.raises(UsageError, match="same seed"):
        studies.open_runs([trained[0], trained[0]], None)
    for change, message in (
        ({"validation": 0}, "no validation images"),
        ({"learning_rate": 0.1}, "of another configuration"),
    ):
        path = tmp_path / next(iter(change))
        config = _config(2)._replace(**change)
        workdir = Workdir(path)
        workdir.claim(config, {})
        workdir.close()
        with pytest.raises(UsageError, match=message):
            studies.open_runs([trained[0], str(path)], None)
