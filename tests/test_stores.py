"""Entries that are not of this run, its seed or their epoch, and folders that are no run's."""

import json
import shutil

import jax
import numpy as np
import pytest
from small_runs import STEPS, TINY, checksums, logged, run_phases, start_run

from experiments import evaluate, ledger, options, refit, results_json, stores, train, workdir
from experiments import run as experiment
from experiments.config import config_from_json
from gapjax import checkpoints

_OTHERS = {  # what makes the other run another one, and how its entries are named
    "seed": ({"seed": 1}, "--seed is 1 there and 0 here"),
    "data": ({"threshold": 0.4}, "the data have changed: their checksum is"),
    "setting": ({"learning_rate": 2e-3}, "--learning_rate is 0.002 there and 0.001 here"),
}
_ALL = (
    *stores.UNFINISHED, "train", *results_json.REFITS, "evaluation", "effects", "shares",
    "ledger",
)  # fmt: skip


def _whole_run(path, config=TINY):
    """A run with an entry in every store."""
    run_phases(path, config=config, every=1)
    run = start_run(path, config=config)
    measured = ledger._like(run, ledger.Settings(num_images=4), list(results_json.REFITS))
    for epoch in run.epochs:
        made_from = [(name, epoch) for name in ("train", *results_json.REFITS)]
        stores.save(run, "ledger", epoch, measured, 0.0, made_from=made_from, settings={})
        number = refit._number("control", [epoch])
        made_from = [("train", epoch)]
        stores.save(run, "refit_partial", number, {"a": np.zeros(1)}, 0.0, made_from=made_from)
        step = STEPS * (epoch - 1)
        state, _ = stores.load(run, "train", epoch, stores.state_like(run))
        stores.save(run, "train_partial", step, state, 0.0, step=step, epoch_nats=0.0)
    run.workdir.close()
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return _whole_run(tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.fixture(scope="module", params=_OTHERS)
def other(request, tmp_path_factory):
    """Another run with the same stores and shapes, and how its entries are named."""
    change, words = _OTHERS[request.param]
    path = tmp_path_factory.mktemp("other") / "run"
    return _whole_run(path, TINY._replace(**change)), words


@pytest.fixture
def copy(undisturbed, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(undisturbed, path)
    return path


def _entries(path, store):
    return checkpoints.numbers(path / "checkpoints" / store)


def _put(source, target):
    """Copies an entry in place of another."""
    shutil.rmtree(target)
    shutil.copytree(source, target)


def _problem(path, store, number):
    """What is wrong with an entry, as the programs find it."""
    run = start_run(path)
    try:
        record = checkpoints.record(path / "checkpoints" / store, number)
        return stores.mismatch(run, store, number, record)
    finally:
        run.workdir.close()


def test_every_entry_of_another_run_is_named(copy, other):
    """Of every store; also where its checkpoint, of which only the number is the same, came too."""
    path, words = other
    entries = [(store, number) for store in _ALL for number in _entries(path, store)]
    assert {_problem(copy, *entry) for entry in entries} == {None}
    for store, number in entries:
        name = f"checkpoints/{store}/{number}"
        _put(path / name, copy / name)
        assert words in _problem(copy, store, number), name


def test_entries_whose_epochs_are_exchanged_are_named(copy):
    for store in _ALL:
        first, second = (copy / "checkpoints" / store / str(n) for n in _entries(copy, store)[-2:])
        first.rename(copy / "aside")
        second.rename(first)
        (copy / "aside").rename(second)
        for here, there in ((first, second), (second, first)):
            problem = _problem(copy, store, int(here.name))
            assert problem == f"is a copy of {store}/{there.name}", store


def test_every_field_of_the_configuration_is_a_part_of_some_origin():
    """Or determines the data, whose checksum is; or only how many entries there are."""
    named = {name for names in stores._SETTINGS.values() for name in names}
    of_the_data = {"dataset", "binarization", "threshold", "binarization_seed", "levels"}
    assert named | of_the_data | {"preset", "num_epochs", "checkpoint_every"} == {
        *options.Config._fields
    }


def test_an_entry_of_another_kind_is_named(copy):
    folder = copy / "checkpoints"
    _put(folder / "control" / "4", folder / "self_consistent" / "4")
    assert _problem(copy, "self_consistent", 4) == "is a copy of control/4"


def test_refits_and_evaluations_of_others_are_made_again(copy, undisturbed, other, capsys):
    path, words = other
    for entry in ("self_consistent/2", "optimal/4", "evaluation/2", "effects/4"):
        _put(path / "checkpoints" / entry, copy / "checkpoints" / entry)
    capsys.readouterr()
    run_phases(copy)
    lines = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(lines) == 4
    assert all(words in line and line.endswith("it is made again") for line in lines)
    assert checksums(copy) == checksums(undisturbed)
    assert sorted(set(logged(copy))) == sorted(set(logged(undisturbed)))


def test_a_checkpoint_of_another_run_is_refused_and_stays(copy, other):
    """Hours of work may be in it."""
    path, _ = other
    _put(path / "checkpoints" / "train" / "4", copy / "checkpoints" / "train" / "4")
    before = checksums(copy)
    for phase in (train.train_phase, refit.refit_phase, evaluate.evaluate_phase):
        shutil.rmtree(copy / "checkpoints" / "control" / "4", ignore_errors=True)
        shutil.rmtree(copy / "checkpoints" / "evaluation" / "4", ignore_errors=True)
        with pytest.raises(workdir.WorkdirError, match=r"entry 4 in .*/train is of another"):
            run_phases(copy, [phase])
    del before["control", 4], before["evaluation", 4]
    assert checksums(copy) == before


def test_what_was_computed_from_another_entry_is_made_again(copy, undisturbed, capsys):
    """A refit of the same settings but of another checkpoint; an evaluation of another refit."""
    run = start_run(copy)
    like = stores.refitted_like(run)
    tree, _ = stores.load(run, "control", 4, like)
    stores.save(run, "control", 4, {**tree, "encoder": tree["averaged"]}, 0.0)
    run.workdir.close()
    assert _problem(copy, "evaluation", 4) == "was computed from another control/4 than is here"
    assert _problem(copy, "effects", 4) == "was computed from another control/4 than is here"
    assert _problem(copy, "evaluation", 2) is None
    for entry in ("control/4", "refit_partial"):
        shutil.rmtree(copy / "checkpoints" / entry)
    capsys.readouterr()
    run_phases(copy)
    assert checksums(copy) == checksums(undisturbed)
    assert "skipped" not in capsys.readouterr().out  # the refit came back to the same bits


@pytest.mark.parametrize(
    "change", [{"seed": 3}, {"alpha": 0.25}, {"num_eval_samples": 3}, {"hidden_sizes": [8]}]
)
def test_a_configuration_changed_by_hand_is_refused_with_nothing_written(copy, change):
    path = copy / "config.json"
    stored = json.loads(path.read_text())
    stored["config"].update(change)
    path.write_text(json.dumps(stored))
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
    config = config_from_json(stored["config"])
    for ask in (lambda: workdir.Workdir(copy).config(), lambda: start_run(copy, config=config)):
        with pytest.raises(workdir.WorkdirError, match="was changed after the run began"):
            ask()
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()} == before


def test_an_entry_without_an_origin_is_of_no_run_that_records_them(copy):
    folder = copy / "checkpoints" / "control"
    run = start_run(copy)
    tree, record = checkpoints.restore(folder, 4, stores.refitted_like(run))
    run.workdir.close()
    del record[stores.ORIGIN]
    checkpoints.save(folder, 4, tree, record)
    assert _problem(copy, "control", 4) == "does not say which run it is of"


def test_a_folder_with_files_that_is_no_run_is_refused(tmp_path):
    mine = tmp_path / "results.json"
    mine.write_text("mine")
    with pytest.raises(workdir.WorkdirError, match=r"holds results\.json but no config\.json"):
        start_run(tmp_path)
    assert mine.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["results.json"]
    mine.rename(tmp_path / ".hidden")
    start_run(tmp_path).workdir.close()


def test_a_folder_that_was_moved_is_not_begun_again_in_its_old_place(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    run = start_run(old)
    old.rename(new)
    state = stores.state_like(run)
    for write in (
        lambda: stores.save(run, "train", 2, state, 0.0),
        lambda: run.workdir.log("train", 1, {"loss_bpd": 1.0}),
    ):
        with pytest.raises(workdir.WorkdirError, match="was moved or removed"):
            write()
        assert not old.exists()
    old.mkdir()
    (old / ".lock").write_text("")  # another's
    with pytest.raises(workdir.WorkdirError, match="was moved or removed"):
        run.workdir.log("train", 1, {"loss_bpd": 1.0})
    run.workdir.close()


def test_the_key_of_a_purpose_stays_what_it_is():
    """Every committed number rests on these; a new purpose takes a new number."""
    numbers = {
        "train": 0, "refit": 1, "optimal": 2, "evaluate": 3, "monitor": 4, "pictures": 5,
        "ledger": 6, "simulated": 7, "effects": 8,
    }  # fmt: skip
    assert experiment._PURPOSES.items() >= numbers.items()
    assert len(set(experiment._PURPOSES.values())) == len(experiment._PURPOSES)
    run = experiment.Run(TINY._replace(seed=5), None, None, None)
    assert run.key("effects", 3) == jax.random.fold_in(
        jax.random.fold_in(jax.random.key(5), numbers["effects"]), 3
    )
