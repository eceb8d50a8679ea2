"""The programs: options, workdirs, phases, the command line."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags as absl_flags
from forked import Forked
from small_runs import STORES, TINY, parsed, run_phases

import gapjax
from experiments import (
    compress,
    cost,
    draw,
    evaluate,
    files,
    options,
    program,
    refit,
    reproduce,
    results_json,
    stores,
    train,
    workdir,
)
from experiments import run as experiment
from experiments.config import UsageError
from experiments.presets import PRESETS
from experiments.show import figures
from gapjax import checkpoints, jobs
from gapjax.fit.recipes import RECIPES
from gapjax.model.mlp import POSTERIORS

_ROOT = Path(__file__).parent.parent
_TINY = (
    "--num_epochs=4", "--checkpoint_every=2", "--refit_epochs=2", "--optimal_epochs=20",
    "--hidden_sizes=16", "--latent_dim=2", "--num_eval_samples=2", "--batch_size=200",
)  # fmt: skip
_ESTIMATES = (
    "train", "test", "optimal", "self_consistent", "control", "inference_gap", "gain",
    "gain_over_control",
)  # fmt: skip


def _start(*flags, code=("-m", "experiments.reproduce"), cwd=None, **variables):
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu", **variables}
    return subprocess.Popen(
        [sys.executable, "-P", *code, *flags],
        cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


_NOT_DRAWN = """
import runpy
from experiments import draw
draw.draw_phase = lambda run, results: run.workdir.path
runpy.run_module("experiments.reproduce", run_name="__main__", alter_sys=True)
"""


def _run_alone(*flags, **how):
    """In a process that a shell would start; it imports all libraries."""
    process = _start(*flags, **how)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def _run(*flags, program="reproduce", **how):
    return Forked(f"experiments.{program}", *flags, **how).end()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workdir that the main program has finished, and what it printed."""
    path = tmp_path_factory.mktemp("finished") / "a run [1] of 50% \\ {a,b}"
    code, out, err = _run_alone(*_TINY, f"--workdir={path}")
    assert code == 0, err
    return path, out


def _numbers(path):
    """What must be equal in two runs of one configuration."""
    results = json.loads((path / "results.json").read_text())
    return results["checkpoints"], results["claims"]


def _trees_equal(first, second):
    for store in STORES:
        assert checkpoints.numbers(first / "checkpoints" / store) == [2, 4]
        for epoch in (2, 4):
            ours, theirs = (
                checkpoints.checksum(path / "checkpoints" / store, epoch)
                for path in (first, second)
            )
            assert ours == theirs, (store, epoch)


def test_it_writes_every_file(finished):
    path, out = finished
    for name in (
        "figure1a", "figure1b", "figure2", "effects", "samples", "reconstructions", "costliest",
    ):  # fmt: skip
        assert (path / f"{name}.png").stat().st_size > 1000
        assert (path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert str(path / "report.html") in out
    first = out.splitlines()[0]
    assert first.startswith(f"reproduce in {path}; digits, 4 epochs, 2 checkpoints; a whole run")
    assert list((path / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    trained = [line["epoch"] for line in lines if line["phase"] == "train"]
    assert trained == [1, 2, 3, 4]
    assert {line["phase"] for line in lines} == {"train", "self_consistent", "control", "optimal"}


def test_results_follow_the_schema(finished):
    path, _ = finished
    results = json.loads((path / "results.json").read_text())
    assert results["schema"] == 1
    assert results["preset"] == "digits"
    assert results["event_shape"] == [8, 8]
    assert {*options.Config._fields, "workdir", "data_dir"} == set(results["config"])
    assert results["config"]["hidden_sizes"] == [16]
    assert set(results["environment"]) == {
        "gapjax", "commit", "python", "jax", "jaxlib", "backend", "device_kind", "device_count",
        "commits",
    }  # fmt: skip
    assert [row["epoch"] for row in results["checkpoints"]] == [2, 4]
    for row in results["checkpoints"]:
        for name in _ESTIMATES:
            assert np.isfinite(row[name]["bpd"]) and row[name]["stderr"] > 0, name
        assert row["inference_gap"]["bpd"] == pytest.approx(
            row["test"]["bpd"] - row["optimal"]["bpd"], abs=1e-6
        )
        assert row["gain"]["bpd"] == pytest.approx(
            row["test"]["bpd"] - row["self_consistent"]["bpd"], abs=1e-6
        )
        assert row["gain_over_control"]["bpd"] == pytest.approx(
            row["control"]["bpd"] - row["self_consistent"]["bpd"], abs=1e-6
        )
        assert row["gap_closed"] == pytest.approx(row["gain"]["bpd"] / row["inference_gap"]["bpd"])
        assert row["effects"]["test"]["self_consistent"] == row["gain"]
        assert row["effects"]["train"]["gradient"]["num_examples"] == 360
    for claim in results["claims"]:
        assert isinstance(claim["holds"], bool)
    assert {"train", "optimal", "self_consistent", "evaluate", "total"} <= set(results["seconds"])
    assert results["data"]["num_train"] == 1437 and results["data"]["num_test"] == 360
    assert "threshold" in results["data"]["binarization"] and results["data"]["sha256"]


def test_a_finished_workdir_only_redraws_also_without_weights_that_are_not_kept(
    finished, tmp_path, monkeypatch, capsys
):
    path, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(path, copy)
    run = types.SimpleNamespace(
        epochs=[2, 4], saving=options.Saving(weights_every=3), workdir=workdir.Workdir(copy)
    )
    stores.drop_weights(run)
    for store in ("train", "self_consistent", "control", "optimal"):
        dropped = [checkpoints.is_dropped(copy / "checkpoints" / store, epoch) for epoch in (2, 4)]
        assert dropped == [True, False]
    (copy / "report.html").unlink()
    (copy / "figure2.png").unlink()

    def save(figure, stem):
        figure.savefig(stem.with_name(f"{stem.name}.png"), dpi=10.0)
        return stem.with_name(f"{stem.name}.png"), None

    monkeypatch.setattr(figures, "save", save)
    monkeypatch.setattr(reproduce.flags, "FLAGS", types.SimpleNamespace(ledger=False))
    config = workdir.Workdir(copy).config()
    run_phases(copy, [reproduce.reproduce], config=config)
    out = capsys.readouterr().out
    assert f"report: {copy}" in out
    assert (copy / "report.html").exists() and (copy / "figure2.png").exists()
    assert not any(line.startswith(("train ", "optimal ", "control ")) for line in out.splitlines())
    assert _numbers(copy) == _numbers(path)
    assert (copy / "metrics.jsonl").read_text() == (path / "metrics.jsonl").read_text()


def test_single_phases_go_on_with_a_run_that_is_killed_again_and_again(finished, tmp_path):
    """Kill -9 as each of these is being written or was just written; tests/kill_trials.py has more.

    It saves states between checkpoints, and the single phases refit one after another. The run that
    it is compared with did neither.
    """
    path, _ = finished
    other = tmp_path / "run"
    flags = (*_TINY, "--save_every=1", f"--workdir={other}")
    own = {"train": flags, "refit": [f"--workdir={other}"], "evaluate": [f"--workdir={other}"]}
    signs = ("train_partial/24*", "self_consistent/4*", "evaluation/2*")
    for (name, given), sign in zip(own.items(), signs, strict=True):
        process = Forked("experiments.reproduce", *flags, drawn=False)
        process.signal_when(lambda _, sign=sign: list((other / "checkpoints").glob(sign)))
        assert process.end()[0] == -signal.SIGKILL
        assert not (other / "results.json").exists()
        code, out, err = _run(*given, "--sweep=off", program=name, drawn=False)
        assert code == 0 and "skipped" not in out, err
        if name == "train":
            code, _, err = _run(f"--workdir={other}", program="evaluate")
            assert code != 0 and "experiments.refit" in err and len(err.strip().splitlines()) == 1
    assert _numbers(other) == _numbers(path)
    _trees_equal(other, path)
    ours, theirs = ((p / "metrics.jsonl").read_text().splitlines() for p in (other, path))
    assert sorted(ours) == sorted(theirs)
    left = [p.name for p in (other / "checkpoints").glob("*/*") if not p.name.isdigit()]
    assert not left and not list(other.glob(".*.tmp"))


def test_the_environment_does_not_change_the_numbers(finished, tmp_path):
    """Neither JAX's precision and random generator nor a terminal that knows no ±."""
    path, _ = finished
    other = tmp_path / "run"
    variables = {
        "JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict", "PYTHONIOENCODING": "ascii",
    }  # fmt: skip
    ledger = ("--ledger", "--ledger_epochs=4", "--ledger_images=2", "--ledger_samples=1")
    code, out, err = _run_alone(
        *_TINY, *ledger, f"--workdir={other}", code=("-c", _NOT_DRAWN), **variables
    )
    assert code == 0, err
    (line,) = (line for line in out.splitlines() if line.startswith("set for this program"))
    for name in ("jax_enable_x64=False", "threefry2x32", "partitionable=True", "standard"):
        assert name in line
    assert _numbers(other) == _numbers(path)
    _trees_equal(other, path)
    for file in (*other.glob("*.json"), *path.glob("*.json")):
        json.loads(file.read_text(), parse_constant=pytest.fail)


def test_a_closed_pipe_of_standard_output_is_one_line(tmp_path):
    process = _start(*_TINY, "--dry_run", f"--workdir={tmp_path / 'run'}")
    process.stdout.close()
    with process.stderr:
        err = process.stderr.read()
    assert process.wait(timeout=300) == 1
    assert err == (
        "reproduce: standard output was closed; what was done is saved, and the same command goes "
        "on\n"
    )


def test_an_interruption_while_the_program_is_imported_is_one_line(tmp_path):
    """The first library that is imported stands for them all: the signal comes from within it."""
    (tmp_path / "jax.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    code, _, err = _run_alone("--help", cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{_ROOT}")
    assert (code, err) == (130, "interrupted before any work was begun\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_says_how_to_go_on(tmp_path, number):
    process = Forked("experiments.reproduce", *_TINY, f"--workdir={tmp_path / 'run'}")
    process.signal_when(lambda out: "\ntrain" in out, number)
    code, _, err = process.end()
    assert code == 130
    assert err.strip().splitlines() == [
        "reproduce: interrupted; what was done is saved, and the same command goes on"
    ]


def test_training_goes_on_from_the_last_checkpoint(finished, tmp_path):
    """The later checkpoint, and all that hangs on it, is lost: it comes back bit for bit."""
    path, _ = finished
    other = tmp_path / "run"
    shutil.copytree(path, other)
    for store in ("train", "self_consistent", "control", "optimal", "evaluation"):
        shutil.rmtree(other / "checkpoints" / store / "4")
    run_phases(other, config=workdir.Workdir(other).config())
    _trees_equal(other, path)
    assert _numbers(other) == _numbers(path)
    ours, theirs = ((p / "metrics.jsonl").read_text().splitlines() for p in (other, path))
    assert sorted(ours) == sorted(theirs)


def test_a_damaged_checkpoint_is_one_line_for_a_person(finished, tmp_path):
    """The program that can make it again does and says so; the other one names that program."""
    path, _ = finished
    other = tmp_path / "run"
    shutil.copytree(path, other)
    shutil.rmtree(other / "checkpoints" / "evaluation" / "4")
    (other / "checkpoints" / "optimal" / "4" / "tree.bin").write_bytes(b"")
    code, _, err = _run(f"--workdir={other}", program="evaluate")
    assert code == 1 and len(err.strip().splitlines()) == 1, err
    assert f"entry 4 in {other}/checkpoints/optimal" in err and "experiments.refit" in err
    code, out, err = _run(f"--workdir={other}", program="refit")
    assert (code, err) == (0, "")
    (line,) = (line for line in out.splitlines() if line.startswith("skipped"))
    assert f"entry 4 in {other}/checkpoints/optimal" in line
    ours, theirs = (checkpoints.checksum(p / "checkpoints" / "optimal", 4) for p in (other, path))
    assert ours == theirs


def test_refits_of_some_checkpoints_or_a_line_that_says_which_there_are(finished):
    path, _ = finished
    code, out, err = _run(f"--workdir={path}", "--checkpoints=2,3", program="refit")
    assert code == 1 and len(out.splitlines()) == 1  # the line that a log begins with
    assert err == "refit: --checkpoints: no checkpoint of epoch 3; there are 2, 4\n"


def test_test_images_reach_nothing_but_their_own_numbers(finished, tmp_path):
    """Poison the test set: training, self-consistent training and control do not change."""
    path, _ = finished
    config = workdir.Workdir(path).config()
    runs = []
    for name, poison in (("clean", False), ("poisoned", True)):
        prepared = experiment.prepare(config, None)
        run = experiment.start(prepared, workdir.Workdir(tmp_path / name))
        if poison:
            rng = np.random.default_rng(0)
            noise = rng.integers(0, 2, run.dataset.test.shape, dtype=np.uint8)
            run = run._replace(dataset=run.dataset._replace(test=noise))
        train.train_phase(run)
        refit.refit_phase(run, [4], ["optimal", "control"])
        made = [checkpoints.numbers(run.workdir.checkpoints / kind) for kind in results_json.REFITS]
        assert made == [[], [4], [4]]
        refit.refit_phase(run)
        runs.append(run)
        run.workdir.close()
    for store in ("train", "self_consistent", "control"):
        for epoch in (2, 4):
            first, second = (
                checkpoints.checksum(run.workdir.checkpoints / store, epoch) for run in runs
            )
            assert first == second, (store, epoch)
    first, second = (checkpoints.checksum(r.workdir.checkpoints / "optimal", 4) for r in runs)
    assert first != second  # the poison was there


def test_the_keys_of_all_purposes_and_epochs_differ(finished, tmp_path):
    path, _ = finished
    run = experiment.Run(workdir.Workdir(path).config(), None, None, None)
    purposes = (
        "train", "refit", "optimal", "evaluate", "monitor", "pictures", "ledger", "simulated",
        "effects",
    )  # fmt: skip
    keys = {
        tuple(jax.random.key_data(run.key(purpose, epoch)).tolist())
        for purpose in purposes
        for epoch in (0, 2, 4)
    }
    assert len(keys) == 3 * len(purposes)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preset=digit"], ["--preset", "'digit'", "digits"]),
        (["--dataset=mnits"], ["--dataset", "'mnits'", "mnist"]),
        (["--alpha=1.5"], ["--alpha", "1.5", "[0, 1]"]),
        (["--alpha=nan"], ["--alpha", "nan", "[0, 1]"]),
        (["--num_epochs=0"], ["--num_epochs", "0", "at least 1"]),
        (["--refit_epochs=-3"], ["--refit_epochs", "-3", "at least 1"]),
        (["--batch_size=0"], ["--batch_size", "0", "at least 1"]),
        (["--latent_dim=0"], ["--latent_dim", "0", "at least 1"]),
        (["--hidden_sizes=50,x"], ["--hidden_sizes", "50,x", "integers"]),
        (["--hidden_sizes=50,-1"], ["--hidden_sizes", "-1", "at least 1"]),
        (["--learning_rate=-1"], ["--learning_rate", "-1", "positive"]),
        (["--learning_rate=nan"], ["--learning_rate", "nan", "positive"]),
        (["--seed=-1"], ["--seed", "-1"]),
        (["--checkpoint_every=30"], ["--checkpoint_every", "30", "500"]),
        (["--threshold=2"], ["--threshold", "2"]),
        (["--validation=-1"], ["--validation", "-1", "at least 0"]),
        (["--uniform_weight=2"], ["--uniform_weight", "2", "[1e-30, 1]"]),
        (["--uniform_weight=nan"], ["--uniform_weight", "nan", "[1e-30, 1]"]),
        (["--refit_batch_size=0"], ["--refit_batch_size", "0", "at least 1"]),
        (
            ["--num_epochs=100000000000000000000", "--checkpoint_every=1"],
            ["--num_epochs", "10,000"],
        ),
    ],
)
def test_bad_flags_are_named(flags, words):
    values = parsed(flags)
    with pytest.raises(options.UsageError) as error:
        options.config_from_flags(values)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_flags_of_saving_and_of_the_ledger_are_checked_before_there_is_any_work(tmp_path):
    for given, words, fails in (
        ("--ledger_images=1", "flag --ledger_images=1: 1 is not", 2),
        ("--save_every=-1", "flag --save_every=-1: -1 is not", 2),
        ("--keep=0", "flag --keep=0: 0 is not", 2),
        ("--ledger_epochs=2,3", "--ledger_epochs: no checkpoint of epoch 3; there are 2, 4", 1),
        ("--ledger_epochs=x", "--ledger_epochs is 'x'", 1),
    ):
        code, out, err = _run(*_TINY, "--ledger", given, f"--workdir={tmp_path / 'run'}")
        assert (code, out) == (fails, "") and words in err and len(err.splitlines()) == 1
        assert not (tmp_path / "run").exists()


def test_data_without_a_likelihood_of_the_programs_are_refused_in_one_line(tmp_path):
    whole = np.arange(300).reshape(30, 2, 5)
    for x, words in ((whole / 300, "float32"), (whole, "uint16"), (whole % 280, "300 levels")):
        path = _npz(tmp_path, train=x, test=x, **({"levels": 300} if "levels" in words else {}))
        with pytest.raises(options.UsageError, match=f"holds {words}, .*of your own") as error:
            experiment.prepare(options.config_from_flags(parsed([f"--dataset={path}"])), None)
        assert "\n" not in str(error.value)
    bits, labels = whole % 2, {"train_context": whole[:, 0, 0], "test_context": whole[:, 0, 0]}
    path = _npz(tmp_path, train=bits, test=bits, **labels)
    with pytest.raises(options.UsageError, match=r"has contexts \(context\), .* no model; leave"):
        experiment.prepare(options.config_from_flags(parsed([f"--dataset={path}"])), None)


def test_a_data_file_may_be_named_in_capitals(tmp_path):
    images = np.random.default_rng(0).integers(0, 2, (30, 4, 4), dtype=np.uint8)
    path = _npz(tmp_path, "X.npz", train=images, test=images).rename(tmp_path / "X.NPZ")
    config = options.config_from_flags(parsed([f"--dataset={path}", "--batch_size=5"]))
    assert len(experiment.prepare(config, None).dataset.train) == 30


def test_flags_override_a_preset():
    config = options.config_from_flags(parsed(["--preset=grey_mnist", "--hidden_sizes=7,8"]))
    assert config.dataset == PRESETS["grey_mnist"]["dataset"]
    assert config.hidden_sizes == (7, 8)
    assert config.num_epochs == PRESETS["grey_mnist"]["num_epochs"] == 1000
    assert (config.refit_batch_size, config.mixture) == (200, "stratified")
    as_before = options.config_from_flags(parsed(["--preset=grey_mnist", "--refit_batch_size=100"]))
    assert as_before.refit_batch_size is None  # as it is where the flag is not given
    assert options.config_from_flags(parsed(["--alpha=0"])).alpha == 0.0


def test_a_recipe_brings_its_epochs_and_batches():
    config_of = lambda *flags: options.config_from_flags(parsed(flags))
    paper = config_of()
    assert (paper.recipe, paper.refit_epochs, paper.refit_batch_size) == ("paper", 100, None)
    assert config_of("--recipe=paper", "--alpha=0.25").alpha == 0.25
    best = config_of("--recipe=best")
    recipe = RECIPES["best"]
    assert best.refit_epochs == recipe.num_epochs
    assert (best.refit_batch_size or best.batch_size) == recipe.batch_size
    assert config_of("--recipe=best", "--refit_epochs=7").refit_epochs == 7
    assert config_of("--recipe=best", "--preset=grey_mnist").mixture == "random"  # of no use
    for flag in ("--alpha=0.5", "--mixture=stratified"):
        with pytest.raises(options.UsageError, match="--recipe=paper"):
            config_of("--recipe=best", flag)


def _npz(tmp_path, name="data.npz", **arrays):
    path = tmp_path / name
    np.savez(path, **arrays)
    return path


def test_bad_data_and_workdirs_are_refused_with_nothing_written(finished, tmp_path):
    """Each in its own folder, by the functions that the programs call."""
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 4), dtype=np.uint8)
    grey = _npz(tmp_path, train=images, test=images[:20])
    cases = {
        "batch larger than data": [f"--dataset={grey}", "--batch_size=25"],
        "grey likelihood on binary data": ["--likelihood=discretized_logistic"],
        "binary likelihood on grey data": ["--dataset=grey_digits", "--likelihood=bernoulli"],
        "binary on grey npz": [f"--dataset={grey}", "--likelihood=bernoulli", "--batch_size=5"],
        "floats": [f"--dataset={_npz(tmp_path, 'f.npz', train=images / 255, test=images / 255)}"],
        "missing file": [f"--dataset={tmp_path / 'none.npz'}"],
        "levels": [f"--dataset={grey}", "--levels=16", "--batch_size=5"],
        "refit batch larger than data": ["--refit_batch_size=2000"],
        "uniform on binary data": ["--uniform_weight=0.01"],
        "more steps than int32": ["--num_epochs=1000000000", "--checkpoint_every=500000000"],
        "more steps of a refit": ["--refit_epochs=1000000000"],
        "no mnist here": ["--dataset=mnist", f"--data_dir={tmp_path}"],
    }
    for name, flags in cases.items():
        place = tmp_path / "place"
        with pytest.raises((options.UsageError, ValueError)) as error:
            config = options.config_from_flags(parsed(flags))
            values = parsed(flags)
            prepared = experiment.prepare(config, values.data_dir)
            experiment.start(prepared, workdir.Workdir(place))
        assert "\n" not in str(error.value), name
        assert not place.exists(), name


def test_a_workdir_of_another_configuration_is_refused(finished):
    path, _ = finished
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}
    code, _, err = _run(*_TINY, f"--workdir={path}", "--alpha=0.25", "--seed=3")
    assert code == 1
    assert len(err.strip().splitlines()) == 1
    assert "--alpha is 0.5 there and 0.25 here" in err and "--seed is 0 there and 3 here" in err
    assert "--latent_dim" not in err
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()} == before


def test_a_workdir_must_be_a_folder_that_is_free(finished, tmp_path):
    path, _ = finished
    config = workdir.Workdir(path).config()
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(workdir.WorkdirError, match="is a file"):
        workdir.Workdir(file).claim(config, {})
    assert file.read_text() == "mine"
    with pytest.raises(workdir.WorkdirError, match="cannot be written"):
        workdir.Workdir(Path("/proc/gapjax")).claim(config, {})
    first, second = (workdir.Workdir(tmp_path / "shared") for _ in range(2))
    first.claim(config, {})
    with pytest.raises(workdir.WorkdirError, match="in use"):
        second.claim(config, {})
    first.close()
    second.claim(config, {})
    second.close()
    other = {"sha256": "of other data"}
    grey = config._replace(uniform_weight=0.1)  # as it follows from other data
    for refuse in (
        lambda place: place.claim(config, other),
        lambda place: place.claim(grey, other),
        lambda place: place.check_data(config._replace(batch_size=3, uniform_weight=None), other),
    ):
        with pytest.raises(workdir.WorkdirError, match=r"the data have changed: .*check") as error:
            refuse(workdir.Workdir(tmp_path / "shared"))
        assert "--" not in str(error.value).removeprefix("--workdir").partition(". Give")[0]
    # Where a flag chose the data, it is the flag.
    chosen = grey._replace(dataset="grey_digits")
    workdir.Workdir(tmp_path / "shared").check_data(chosen, other)
    with pytest.raises(workdir.WorkdirError, match="--dataset is digits there and grey") as error:
        workdir.Workdir(tmp_path / "shared").claim(chosen, other)
    assert "changed" not in str(error.value) and "uniform" not in str(error.value)
    with pytest.raises(workdir.WorkdirError, match=r"--uniform_weight is 0\.0 there and 0\.1 here"):
        workdir.Workdir(tmp_path / "shared").claim(grey, {})
    (tmp_path / "shared" / "config.json").write_text("{")
    with pytest.raises(workdir.WorkdirError, match="damaged"):
        workdir.Workdir(tmp_path / "shared").claim(config, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda stored: stored.clear(), "does not hold a configuration"),
        (lambda stored: stored.update(data=[]), "does not hold a configuration"),
        (lambda stored: stored.update(config=3), "config is 3"),
        (lambda stored: stored["config"].pop("seed"), "lacks seed"),
        (lambda stored: stored["config"].update(sede=1), "does not know sede"),
        (lambda stored: stored["config"].update(seed="0"), "seed is '0'"),
        (lambda stored: stored["config"].update(seed=True), "seed is True"),
        (lambda stored: stored["config"].update(alpha=None), "alpha is None"),
        (lambda stored: stored["config"].update(hidden_sizes=[16, "x"]), "hidden_sizes is"),
        (lambda stored: stored["config"].update(hidden_sizes=16), "hidden_sizes is 16"),
    ],
)
def test_a_damaged_configuration_is_one_line_that_says_where(finished, tmp_path, change, words):
    path, _ = finished
    stored = json.loads((path / "config.json").read_text())
    change(stored)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(workdir.WorkdirError, match=words) as error:
        workdir.Workdir(tmp_path).config()
    assert "\n" not in str(error.value) and "config.json is damaged" in str(error.value)
    if isinstance(stored.get("data"), dict):  # as a program that has other flags would write it
        del stored["sha256"]
        stored["sha256"] = workdir._sign(stored)
        (tmp_path / "config.json").write_text(json.dumps(stored))
        with pytest.raises(workdir.WorkdirError, match=f"another version of gapjax .*{words}"):
            workdir.Workdir(tmp_path).config()


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path):
    code, out, err = _run(*_TINY, "--dry_run", f"--workdir={tmp_path / 'run'}")
    assert code == 0, err
    assert "--num_epochs=4" in out and "--uniform_weight=0.0" in out
    # 64 * 16 + 16 + 16 * 4 + 4 and 2 * 16 + 16 + 16 * 64 + 64 weights and biases
    assert "parameters: 1,108 of the encoder, 1,136 of the decoder" in out
    assert "memory: about" in out and "self_consistent" in out
    assert not (tmp_path / "run").exists()


def test_sizes_that_no_memory_holds_are_one_line(tmp_path):
    code, _, err = _run("--latent_dim=1000000000", f"--workdir={tmp_path / 'run'}")
    assert code == 1 and len(err.strip().splitlines()) == 1, err
    assert "--latent_dim=1000000000" in err and "GiB" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_memory_is_that_of_all_parameters(monkeypatch, posterior):
    """Those of a covariance are a square of the latents, those of a flow its own."""
    config = TINY._replace(posterior=posterior, latent_dim=30)
    data = gapjax.load_dataset("digits")
    vae = gapjax.mlp_vae((8, 8), latent_dim=30, hidden_sizes=(16,), posterior=posterior)
    shapes = jax.tree.leaves(jax.eval_shape(vae.init, jax.random.key(0)))
    needed = cost._training_memory(sum(leaf.size for leaf in shapes), data)
    monkeypatch.setattr(cost, "_memory", lambda: needed)
    cost.check_memory(config, data)
    monkeypatch.setattr(cost, "_memory", lambda: needed - 1)
    with pytest.raises(UsageError, match="parameters, which take"):
        cost.check_memory(config, data)


def test_a_path_that_is_not_utf8_is_one_line(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.npz")
    images = np.zeros((400, 2, 2), np.uint8)
    os.replace(_npz(tmp_path, train=images, test=images), name)
    for flag in ("workdir", "dataset", "data_dir"):
        code, _, err = _run(*_TINY, f"--{flag}={name}", cwd=tmp_path)
        assert code == 2 and len(err.strip().splitlines()) == 1, err
        assert f"--{flag}" in err and "not UTF-8" in err


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = parsed(["--workdir=~/a[1]", "--dataset=~/d.npz", "--data_dir=~", "--coordinator=~"])
    assert (given.workdir, given.dataset) == (f"{tmp_path}/a[1]", f"{tmp_path}/d.npz")
    assert (given.data_dir, given.coordinator) == (str(tmp_path), "~")
    given = absl_flags.FlagValues()
    compress.define_flags(given)
    given(["program", "--checkpoint=~/run:5", "--input=~/x.npz", "--output=./~/y"])
    home = str(tmp_path)
    assert [given.checkpoint, given.input] == [f"{home}/run:5", f"{home}/x.npz"]
    assert given.output == "./~/y"
    assert options._PathsParser().parse("~/a,b") == [f"{home}/a", "b"]
    # Every flag of text is one of these, or no path.
    texts = {"preset", "coordinator"}
    for path in Path(options.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("DEFINE_string"):
                assert node.args[0].value in texts, path
    for define, name, *_ in (*options._PLACE_FLAGS, *options._RUN_FLAGS):
        assert define is not absl_flags.DEFINE_string or name in texts


@pytest.mark.parametrize("error", [RuntimeError("no such backend"), AssertionError()])
def test_a_device_that_is_not_there_is_one_line(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(program.jax, "devices", fail)
    with pytest.raises(options.UsageError, match=r"JAX_PLATFORMS=.* cannot be had \(.+\); unset"):
        program._cores("off")


def test_of_several_processes_all_or_none_take_the_workdir(finished, tmp_path, monkeypatch):
    path, _ = finished
    config, theirs = workdir.Workdir(path).config(), []
    monkeypatch.setattr(jobs, "any_process", lambda flag: theirs.append(flag) or True)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(workdir.WorkdirError, match="is a file"):
        workdir.Workdir(file).claim(config, {})
    with pytest.raises(workdir.WorkdirError, match="another process"):
        workdir.Workdir(tmp_path / "free").claim(config, {})
    assert theirs == [True, False]


def test_the_command_line_ends_with_one_line_and_no_traceback(tmp_path):
    for flags, words in (
        (["--alpha=2"], "--alpha"),
        (["digits"], "not a flag"),
        (["--num_epochs=many"], "--num_epochs=many"),
        (["--sed=1"], "--sed is not a flag; did you mean --seed?"),
        (["--epochs=1"], "did you mean --num_epochs?"),
        (["--dataset=mnist", f"--data_dir={tmp_path}/none"], "data_dir"),
    ):
        code, _, err = _run(*flags, cwd=tmp_path)
        assert code != 0
        assert words in err and "Traceback" not in err
        assert len(err.strip().splitlines()) == 1, err
        assert not list(tmp_path.iterdir())


def test_help_explains_every_flag():
    code, out, _ = _run("--help")
    assert code in (0, 1)  # absl's --help ends with 1
    for name in (
        *options.Config._fields,
        "workdir",
        "data_dir",
        "save_every",
        "keep",
        "keep_weights_every",
    ):
        assert f"--{name}" in out.replace("--[no]", "--"), name


def test_a_note_says_where_most_images_contradict_a_mean():
    def row(epoch, bpd, better):
        gain = {
            "bpd": bpd, "stderr": 0.001, "median": -0.002, "better": better,
            "better_stderr": 0.005, "num_effective": 7.3,
            "by_image": {
                "sign_test": 0.5 if better == 0.495 else 0.01, "better_bias": 0.0,
                "num_images": 360,
            },
        }  # fmt: skip
        test, refits = {"bpd": 0.4}, {"optimal": {"converged": True}}
        over_control = {**gain, "better": 0.6 if bpd > 0 else 0.4}
        return {"epoch": epoch, "test": test, "refits": refits, "gain": gain,
                "gain_over_control": over_control}  # fmt: skip

    rows = [row(1, 0.01, 0.4), row(2, 0.01, 0.495), row(3, -0.01, 0.4), row(4, -0.01, 0.6)]
    *_, last = notes = evaluate._notes(rows)
    assert "against the encoder as trained" in last and "its control" not in " ".join(notes)
    assert "at epochs 1, 4. At 4 it wins −0.0100 BPD in the mean and −0.0020 in the median" in last
    assert "better on 60.0\xa0% of 360 images" in last and "rests on 7 images" in last
    for each in rows:  # as files of older versions have it
        del each["gain"]["by_image"]
    assert not [note for note in evaluate._notes(rows) if "contradict" in note]


def test_the_costs_of_pixels_are_those_of_their_image(small):
    key, x = jax.random.key(0), small.test_images
    nats = draw._pixel_nats(small.vae, small.params, key, x[:3], 2)
    assert nats.shape == (3, 5, 5)
    for image, costs in zip(x, nats, strict=False):
        posterior = small.vae.encode(small.params.encoder, image)
        latents = [posterior.sample(each) for each in jax.random.split(key, 2)]
        whole = [small.vae.decode(small.params.decoder, z).log_prob(1.0 * image) for z in latents]
        assert costs.sum() == pytest.approx(-np.mean(whole), rel=1e-5)
    assert draw._num_pixels(np.array([1.0, 7.0, 2.0]), 0.7) == 1
    assert draw._num_pixels(np.array([1.0, 7.0, 2.0]), 0.71) == 2
    assert draw._num_pixels(np.ones(10), 0.95) == 10


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_json(path, {"a": 1})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_log_has_a_line_a_minute_with_speed_and_time_left(tmp_path, monkeypatch, capsys):
    """The tests' standard error is no terminal. Epochs of 25 s, resumed after 10 of 100."""
    now = 0.0
    monkeypatch.setattr(experiment.time, "monotonic", lambda: now)
    run = types.SimpleNamespace(workdir=workdir.Workdir(tmp_path))
    with experiment.progress_bar(run, "train", 100, 10, images=1000) as show:
        for epoch in range(11, 17):
            now += 25.0
            show(epoch, epoch / 100)
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    lines = [[word.strip() for word in line if word] for line in lines]
    assert lines == [
        ["train", "13 of 100 epochs", "0.1300 BPD", "40 images/s", "36 min 15 s left"],
        ["train", "16 of 100 epochs", "0.1600 BPD", "40 images/s", "35 min 0 s left"],
        ["train", "0.1600 BPD", "150.0 s"],
    ]


def test_a_bar_without_images_says_nothing_of_their_speed(tmp_path, monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(experiment.time, "monotonic", lambda: now)
    run = types.SimpleNamespace(workdir=workdir.Workdir(tmp_path))
    with experiment.progress_bar(run, "evaluate", 4, unit="checkpoints") as show:
        for done in (1, 2, 3, 4):
            now += 61.0
            show(done)
    assert capsys.readouterr().out.splitlines() == [
        f"{'evaluate':24} {done} of 4 checkpoints  {left} left"
        for done, left in ((1, "3 min 3 s"), (2, "2 min 2 s"), (3, "1 min 1 s"))
    ]
