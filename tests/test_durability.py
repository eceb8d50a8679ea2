"""No lost work: damaged entries, states between checkpoints, half-written files, no room."""

import collections
import contextlib
import functools
import json
import resource
import shutil
import subprocess
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forked import Forked
from small_runs import STEPS, STORES, TINY, checksums, logged, parsed, run_phases, start_run

import gapjax
from experiments import evaluate, options, program, refit, results_json, stores, train, workdir
from experiments import run as experiment
from gapjax import checkpoints, parallel
from gapjax.fit import loop as executor

_FLAGS = (
    "--num_epochs=4", "--checkpoint_every=2", "--refit_epochs=1", "--optimal_epochs=20",
    "--hidden_sizes=16", "--latent_dim=2", "--num_eval_samples=2", "--batch_size=200",
    "--validation=37",
)  # fmt: skip
TWO = tuple(jax.devices()[:2])


def _vae():
    return gapjax.mlp_vae((8, 8), "bernoulli", latent_dim=2, hidden_sizes=(16,))


@pytest.fixture(scope="module")
def counted_run(tmp_path_factory):
    """A run that nothing interrupts, and how often its phases restored each entry."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    counts = collections.Counter()

    def counted(phase):
        def restore(store, number, like, _restore=checkpoints.restore):
            counts[phase.__name__, store.name, number] += 1
            return _restore(store, number, like)

        def do(run):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(checkpoints, "restore", restore)
                return phase(run)

        return do

    phases = train.train_phase, refit.refit_phase, evaluate.evaluate_phase
    run_phases(path, map(counted, phases))
    return path, counts


@pytest.fixture(scope="module")
def undisturbed(counted_run):
    return counted_run[0]


def test_a_phase_restores_an_entry_once(counted_run):
    """Six refits, and two evaluations of five encoders; a checkpoint has Adam's moments too."""
    _, counts = counted_run
    refitted = {("refit_phase", "train", epoch): 1 for epoch in (2, 4)}
    evaluated = {("evaluate_phase", store, epoch): 1 for store in STORES for epoch in (2, 4)}
    assert counts == refitted | evaluated


@pytest.fixture
def copy(undisturbed, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(undisturbed, path)
    return path


def _assert_same_run(path, expected):
    assert checksums(path) == checksums(expected)
    assert logged(path) == logged(expected)
    ours, theirs = (
        json.loads((folder / "results.json").read_text())["checkpoints"]
        for folder in (path, expected)
    )
    assert ours == theirs


def _damage(entry):
    """Flips a bit in the largest file of an entry: its array data."""
    file = max((p for p in entry.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@contextlib.contextmanager
def _in_chunks(num_devices):
    """Several compiled calls to an epoch of 7 steps."""
    with pytest.MonkeyPatch.context() as patch, parallel.use_devices(jax.devices()[:num_devices]):
        patch.setattr(executor, "_CHUNK_STEPS", 5)
        yield


@pytest.fixture(scope="module", params=[1, 3], ids=["one device", "a sweep on three devices"])
def chunked_run(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("chunked") / "run"
    with _in_chunks(request.param):
        run_phases(path)
    return path, request.param


@pytest.fixture
def chunked(chunked_run):
    """The undisturbed run, where others are made as it was."""
    path, num_devices = chunked_run
    with _in_chunks(num_devices):
        yield path


@pytest.mark.parametrize("asked", [2, 5, 7, 11])
def test_a_run_ends_after_the_chunk_at_hand_and_goes_on_from_there(
    chunked, tmp_path, monkeypatch, asked
):
    """In the midst of an epoch of training, and of refits, alone or of all checkpoints in one."""
    calls, path = [], tmp_path / "run"

    def interrupted(run):
        calls.append(1)
        return len(calls) == asked

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment.Run, "interrupted", interrupted)
        run_phases(path)
    assert len(calls) == asked
    partial = [name for name in ("train_partial", "refit_partial") if checksums(path, [name])]
    assert len(partial) == 1
    run_phases(path)
    _assert_same_run(path, chunked)
    assert not checksums(path, ["refit_partial"])


def test_refits_side_by_side_are_those_alone_bit_for_bit(undisturbed, tmp_path):
    path = tmp_path / "run"
    run_phases(path, [train.train_phase])
    run_phases(path, sweep="cores", cores=TWO)
    _assert_same_run(path, undisturbed)


def test_refits_side_by_side_are_all_saved_where_they_are_interrupted(
    undisturbed, tmp_path, monkeypatch
):
    path, store = tmp_path / "run", tmp_path / "run" / "checkpoints" / "refit_partial"
    both, own = threading.Barrier(2, timeout=100), threading.local()

    def interrupted(run):
        """After the first chunk of two refits that are under way at once."""
        own.calls = getattr(own, "calls", 0) + 1
        if own.calls == 2:
            both.wait()
        return own.calls > 1

    run_phases(path, [train.train_phase])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment.Run, "interrupted", interrupted)
        run_phases(path, [refit.refit_phase], sweep="cores", cores=TWO)
    assert len(checkpoints.numbers(store)) == 2
    run_phases(path, sweep="cores", cores=TWO)
    _assert_same_run(path, undisturbed)
    assert not checkpoints.numbers(store)


def test_refits_interrupted_in_turn_are_all_gone_on_with(chunked, tmp_path, monkeypatch):
    """What is under way of one refit stays where another is begun, and interrupted too."""
    path, store = tmp_path / "run", tmp_path / "run" / "checkpoints" / "refit_partial"
    run_phases(path, [train.train_phase])
    for number, kind in enumerate(("control", "optimal"), 1):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            asked = iter((False, True))  # before it begins, and after its first chunk
            patch.setattr(experiment.Run, "interrupted", lambda run, asked=asked: next(asked))
            run_phases(path, [functools.partial(refit.refit_phase, kinds=[kind])])
        assert len(checkpoints.numbers(store)) == number
    taken = []
    load = refit._unfinished

    def noted(run, kind, epochs):
        members, seconds = load(run, kind, epochs)
        taken.append((kind, int(members[0].state.step) if members else None))
        return members, seconds

    monkeypatch.setattr(refit, "_unfinished", noted)
    run_phases(path)
    assert {step for kind, step in taken if kind == "self_consistent"} == {None}
    for kind in ("control", "optimal"):
        assert next(step for name, step in taken if name == kind) > 0
    _assert_same_run(path, chunked)
    assert not checkpoints.numbers(store)


def test_one_lost_member_of_a_sweep_is_made_again_bit_for_bit(chunked, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(chunked, path)
    for entry in ("self_consistent/4", "optimal/2", "evaluation/4"):
        _damage(path / "checkpoints" / entry)
    run_phases(path)
    _assert_same_run(path, chunked)


@pytest.mark.parametrize(
    "entries",
    [
        ["train/2"],
        ["train/4"],
        ["train/2", "train/4"],
        ["optimal/2", "control/4", "evaluation/4", "effects/2"],
        ["train/4", "self_consistent/4", "evaluation/2"],
    ],
    ids=lambda entries: "+".join(entries),
)
def test_a_damaged_entry_is_named_and_made_again(undisturbed, copy, capsys, entries):
    for entry in entries:
        _damage(copy / "checkpoints" / entry)
    capsys.readouterr()
    run_phases(copy)
    out = capsys.readouterr().out
    for entry in entries:
        store, number = entry.split("/")
        start = f"skipped: entry {number} in {copy / 'checkpoints' / store} "
        (line,) = (line for line in out.splitlines() if line.startswith(start))
        assert line.endswith("; it is made again")
    assert out.count("skipped") == len(entries)
    assert ("train  " in out) == any(entry.startswith("train") for entry in entries)
    _assert_same_run(copy, undisturbed)
    run_phases(copy)
    assert "skipped" not in capsys.readouterr().out


def test_a_damaged_entry_stays_until_its_replacement_is_whole(copy, monkeypatch):
    _damage(copy / "checkpoints" / "train" / "4")
    before = {p: p.read_bytes() for p in (copy / "checkpoints").rglob("*") if p.is_file()}

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run_phases(copy)
    assert {p: p.read_bytes() for p in (copy / "checkpoints").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("saved", [False, True])
def test_a_refit_killed_as_it_is_saved_is_logged_once(undisturbed, copy, monkeypatch, saved):
    for kind in results_json.REFITS:
        shutil.rmtree(copy / "checkpoints" / kind / "4")
    save = checkpoints.save

    def killed(*arguments):
        if saved:
            save(*arguments)
        raise KeyboardInterrupt

    for _ in results_json.REFITS:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoints, "save", killed)
            run_phases(copy, [refit.refit_phase])
    run_phases(copy)
    _assert_same_run(copy, undisturbed)


def _train_until(path, monkeypatch, epoch, **saving):
    """Trains, and is killed at the end of an epoch, before that is saved."""
    log = workdir.Workdir.log

    def killed(self, phase, at, *rest, **where):
        log(self, phase, at, *rest, **where)
        if at == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workdir.Workdir, "log", killed)
        run_phases(path, [train.train_phase], **saving)


def _epochs_trained(path, monkeypatch, **saving):
    """Trains to the end; the epochs that this took."""
    log, epochs = workdir.Workdir.log, []

    def noted(self, phase, at, *rest, **where):
        log(self, phase, at, *rest, **where)
        epochs.append(at)

    with monkeypatch.context() as patch:
        patch.setattr(workdir.Workdir, "log", noted)
        run_phases(path, [train.train_phase], **saving)
    return epochs


@pytest.mark.parametrize(
    ("every", "killed_at", "damaged", "trained"),
    [
        (0, 4, [], [3, 4]),  # from checkpoint 2
        (1, 4, [], [4]),  # from the state between, after 3
        (1, 2, [], [2, 3, 4]),  # from the state before the first checkpoint
        (1, 4, [f"train_partial/{3 * STEPS}"], [3, 4]),
        (1, 4, ["train/2"], [1, 2, 4]),  # the checkpoint is made again, the state after 3 used
        (1, 4, [f"train_partial/{3 * STEPS}", "train/2"], [1, 2, 3, 4]),
    ],
)
def test_training_goes_on_from_the_newest_good_state(
    undisturbed, tmp_path, monkeypatch, capsys, every, killed_at, damaged, trained
):
    path = tmp_path / "run"
    _train_until(path, monkeypatch, killed_at, every=every)
    for entry in damaged:
        _damage(path / "checkpoints" / entry)
    capsys.readouterr()
    assert _epochs_trained(path, monkeypatch, every=every) == trained
    assert capsys.readouterr().out.count("skipped: entry") == len(damaged)
    assert checksums(path, ["train"]) == checksums(undisturbed, ["train"])
    assert [line for line in logged(undisturbed) if '"train"' in line] == logged(path)


def test_states_between_checkpoints_change_nothing_and_the_newest_are_kept(undisturbed, tmp_path):
    config = TINY._replace(num_epochs=8, checkpoint_every=4)
    for name, every, keep, left in (
        ("none", 0, 1, []),
        ("one", 1, 1, [7]),
        ("three", 1, 3, [5, 6, 7]),  # of these, 4 is a checkpoint
        ("other", 3, 2, [3, 6]),
    ):
        run_phases(tmp_path / name, [train.train_phase], config=config, every=every, keep=keep)
        folder = tmp_path / name / "checkpoints"
        assert checkpoints.numbers(folder / "train_partial") == [STEPS * n for n in left], name
        assert checkpoints.numbers(folder / "train") == [4, 8]
        assert checksums(tmp_path / name, ["train"]) == checksums(tmp_path / "none", ["train"])
        assert logged(tmp_path / name) == logged(tmp_path / "none")
    first = checksums(undisturbed, ["train"])["train", 4]
    assert checksums(tmp_path / "none", ["train"])["train", 4] == first


def test_seconds_of_an_interrupted_interval_are_all_counted(tmp_path, monkeypatch):
    log, now = workdir.Workdir.log, 0.0

    def an_epoch_of_100_seconds(*arguments, **where):
        nonlocal now
        now += 100
        log(*arguments, **where)

    monkeypatch.setattr(workdir.Workdir, "log", an_epoch_of_100_seconds)
    monkeypatch.setattr(train.time, "monotonic", lambda: now)
    path = tmp_path / "run"
    _train_until(path, monkeypatch, 4, every=1)
    _epochs_trained(path, monkeypatch, every=1)
    assert checkpoints.record(path / "checkpoints" / "train", 4)["seconds"] == 200


def test_half_written_files_are_removed_and_others_are_not(undisturbed, copy):
    half = [
        copy / ".results.json.k3j4.tmp", copy / ".figure1a.png.123.tmp",
        copy / ".report.html.77.tmp",
        copy / "checkpoints" / "train" / "9.new.orbax-checkpoint-tmp",
        copy / "checkpoints" / "optimal" / "4.old",
    ]  # fmt: skip
    mine = [copy / ".notes.tmp", copy / "notes.txt", copy / "checkpoints" / "train" / "notes"]
    for path in (*half, *mine):
        path.mkdir() if "checkpoints" in path.parts else path.write_text("x")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "train", "ep')
    run_phases(copy)
    assert not [path for path in half if path.exists()]
    assert all(path.exists() for path in mine)
    _assert_same_run(copy, undisturbed)


def test_a_line_of_the_log_without_its_end_is_dropped(tmp_path):
    """Even where it is whole JSON by chance: the number may have had more digits."""
    whole, half = b'{"phase": "train", "epoch": 1}\n', b'{"phase": "train", "epoch": 2}'
    (tmp_path / "metrics.jsonl").write_bytes(whole + b"\xff\x00{\n" + half)
    workdir.Workdir(tmp_path).forget(lambda entry: False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


@pytest.fixture
def no_room():
    """Sets the size that a file may have, in bytes; needs no root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size=None):
        size = before[0] if size is None else size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    limit()


def test_without_room_a_run_stops_and_then_goes_on(undisturbed, tmp_path, no_room, monkeypatch):
    path = tmp_path / "run"
    _train_until(path, monkeypatch, 3)
    before = checksums(path, ["train"])
    no_room(4000)
    with pytest.raises(checkpoints.CheckpointError) as error:
        run_phases(path)
    no_room()
    message = str(error.value)
    assert f"entry 4 in {path}/checkpoints/train cannot be written (File too large)" in message
    assert "make room" in message and "\n" not in message
    assert [*before] == [("train", 2)] and checksums(path, ["train"]) == before
    assert [p.name for p in (path / "checkpoints" / "train").iterdir()] == ["2"]
    run_phases(path)
    _assert_same_run(path, undisturbed)


def test_without_room_results_stay_as_they_were(copy, no_room):
    """The files that are not checkpoints: the older ones are whole, and nothing is left beside."""
    before = {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()}
    no_room(500)
    with pytest.raises(OSError, match="File too large") as error:
        run_phases(copy, [evaluate.evaluate_phase])
    no_room()
    line = program._os_error_line(error.value, workdir.Workdir(copy))
    assert "make room" in line and str(copy) in line and "\n" not in line
    assert {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()} == before


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(undisturbed, tmp_path):
    """The program as a person meets it, on a small file system; where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    try:
        subprocess.run([*mount, "size=200k", "none", disk], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root can mount a small file system")
    command = "experiments.train", *_FLAGS, f"--workdir={disk}/run"
    try:
        (disk / "ballast").write_bytes(bytes(130_000))
        code, _, err = Forked(*command).end()
        assert code == 1
        assert len(err.strip().splitlines()) == 1, err
        assert "No space left on device" in err and "make room" in err
        before = checksums(disk / "run", ["train"])
        assert [*before] == [("train", 2)]
        subprocess.run([*mount, "remount,size=20m", "none", disk], check=True)
        code, _, err = Forked(*command).end()
        assert (code, err) == (0, "")
        run = start_run(undisturbed)
        run.workdir.close()
        ours, theirs = (
            checkpoints.restore(path / "checkpoints" / "train", 4, stores.state_like(run))[0]
            for path in (disk / "run", undisturbed)
        )
        # Equal, but another number of devices in a program changes the last bits.
        for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_best_checkpoint_is_named_with_what_it_was_chosen_on():
    rows = [{"epoch": e, "test": {"bpd": test, "stderr": 0.1}} for e, test in ((1, 3.0), (2, 2.0))]
    assert "optimistic" in evaluate._best_note(rows)
    for row, bpd in zip(rows, (1.0, 4.0), strict=True):
        row["validation"] = {"bpd": bpd, "stderr": 0.2}
    assert "held out of training" in evaluate._best_note(rows)
    assert "optimistic" not in evaluate._best_note(rows)


def test_validation_images_are_held_out_of_training(undisturbed):
    whole = gapjax.load_dataset("digits")
    rest, held = experiment._hold_out(whole, 37)
    assert rest.train.shape == (1400, 8, 8) and held.shape == (37, 8, 8)
    both = np.concatenate([rest.train, held]).reshape(1437, -1)
    order = lambda images: images[np.lexsort(images.T)]
    np.testing.assert_array_equal(order(both), order(whole.train.reshape(1437, -1)))
    assert not np.array_equal(held, whole.train[-37:])  # the order of a file may mean something
    np.testing.assert_array_equal(rest.test, whole.test)
    results = json.loads((undisturbed / "results.json").read_text())
    assert results["best"] == results_json.best(results["checkpoints"])
    assert results["best"]["chosen_on"] == "validation"
    assert all(row["validation"]["stderr"] > 0 for row in results["checkpoints"])
    assert results["data"]["num_train"] == 1400 and results["data"]["num_validation"] == 37
    run = experiment.Run(TINY, rest, _vae(), workdir.Workdir(undisturbed), validation=held)
    expected = gapjax.evaluate(
        run.vae, stores.trained_params(run, 4), run.key("evaluate"), held, num_samples=2
    )
    assert results["checkpoints"][1]["validation"]["bpd"] == pytest.approx(expected.bpd, abs=1e-6)


def test_more_validation_images_than_there_are_is_refused(tmp_path):
    for number in (1437, 1300):  # none left; fewer than a batch
        with pytest.raises(options.UsageError, match=r"--(validation|batch_size)"):
            start_run(tmp_path / "bad", config=TINY._replace(validation=number))
    assert not (tmp_path / "bad").exists()


def test_the_batches_of_a_refit_are_as_the_flags_say(undisturbed, tmp_path, monkeypatch):
    """Those of self-consistent training and of its control; not those of optimal inference."""
    mixed = []

    def source(*given):
        mixed.append(given[-1])
        return self_consistent_source(*given)

    self_consistent_source = refit.self_consistent_source
    monkeypatch.setattr(refit, "self_consistent_source", source)
    shutil.copytree(undisturbed / "checkpoints" / "train", tmp_path / "train")
    config = TINY._replace(refit_batch_size=400, mixture="stratified")
    run = start_run(tmp_path / "run", config=config)
    shutil.move(tmp_path / "train", run.workdir.checkpoints / "train")
    refit.refit_phase(run, [2])
    run.workdir.close()
    steps = {
        kind: checkpoints.record(run.workdir.checkpoints / kind, 2)["steps"]
        for kind in results_json.REFITS
    }
    assert (steps["self_consistent"], steps["control"]) == (4, 4)  # 1,400 images by 400
    as_before = checkpoints.record(undisturbed / "checkpoints" / "optimal", 2)["steps"]
    assert steps["optimal"] == as_before
    assert mixed == [True, True]


def test_lines_of_the_log_that_others_wrote_stay(tmp_path):
    """And do not end a run that drops lines of its own."""
    folder = start_run(tmp_path, config=TINY._replace(validation=0)).workdir
    folder.log("train", 1, {"loss_bpd": 1.0})
    path = tmp_path / "metrics.jsonl"
    others = ['{"mine": 1}\n', "[1, 2]\n", '{"phase": 3, "epoch": "x"}\n', "null\n"]
    with path.open("a") as file:
        file.writelines(others)
    folder.forget(lambda entry: entry["phase"] == "train" and entry["epoch"] >= 1)
    folder.close()
    assert path.read_text() == "".join(others)


def test_a_grey_run_has_the_floor_of_the_authors_and_a_flag_can_take_it_away(tmp_path):
    def run_of(*given):
        values = parsed(["--preset=grey_digits", "--num_epochs=4", "--checkpoint_every=2", *given])
        run = start_run(tmp_path, config=options.config_from_flags(values))
        run.workdir.close()
        return run

    run = run_of()
    assert run.config.uniform_weight == 256e-7
    assert _floor(run) == pytest.approx(np.log(256e-7 / 17), abs=1e-3)
    with pytest.raises(workdir.WorkdirError, match=r"2\.56e-05 there and 0\.0 here"):
        run_of("--uniform_weight=0")
    tmp_path /= "without"
    assert _floor(run_of("--uniform_weight=0")) < -100


def _floor(run):
    """The least log-probability of a pixel by the run's likelihood, where the decoder is sure."""
    params = run.vae.init(run.key("train"))
    sure = jax.tree.map(lambda leaf: jnp.full_like(leaf, -1e3), params.decoder)
    pixels = run.vae.decode(sure, jnp.zeros(run.config.latent_dim)).base_dist
    return float(pixels.log_prob(16.0).min())
