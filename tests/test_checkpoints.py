"""Checkpoints: what comes back is what was saved, or an error that says which entry is bad."""

import errno
import gc
import re
import resource
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same_bits, random_params

import gapjax
from gapjax import checkpoints
from gapjax.checkpoints import CheckpointError, CorruptCheckpointError
from gapjax.fit.step import TrainState, init_state

RECORD = {"epoch": 30, "config": {"alpha": 0.5, "name": "digits", "sizes": [3, 4]}}


class Pair(NamedTuple):
    first: dict
    second: tuple


@pytest.fixture(scope="module")
def state():
    """A whole `TrainState` of an encoder refit: typed key, NamedTuples, partitioned optax state."""
    vae = gapjax.mlp_vae((3,), latent_dim=2, hidden_sizes=(4,))
    optimizer = gapjax.encoder_only(gapjax.adam(1e-3))
    return init_state(random_params(vae), jax.random.key(7), optimizer)


@pytest.fixture(scope="module")
def store(state, tmp_path_factory):
    """A store with one good entry, number 30; tests copy it."""
    path = tmp_path_factory.mktemp("store")
    checkpoints.save(path, 30, state, RECORD)
    return path


def test_a_train_state_comes_back_bit_for_bit(store, state):
    restored, record = checkpoints.restore(store, 30, state)
    assert_same_bits(restored, state)
    assert type(restored) is TrainState and type(restored.params) is gapjax.VAEParams
    assert record == RECORD
    # The key goes on as the key did, and so does the optimizer.
    assert jax.random.key_impl(restored.rng_key) == jax.random.key_impl(state.rng_key)
    assert jax.random.bits(restored.rng_key) == jax.random.bits(state.rng_key)
    optimizer = gapjax.encoder_only(gapjax.adam(1e-3))
    gradients = jax.tree.map(jnp.ones_like, state.params)
    assert_same_bits(
        optimizer.update(gradients, restored.opt_state, restored.params),
        optimizer.update(gradients, state.opt_state, state.params),
    )


def test_the_record_can_be_read_alone(store):
    assert checkpoints.record(store, 30) == RECORD
    with pytest.raises(CheckpointError, match="no checkpoint 31"):
        checkpoints.record(store, 31)


def test_shapes_alone_will_do_to_restore(store, state):
    like = jax.eval_shape(lambda: state)
    restored, _ = checkpoints.restore(store, 30, like)
    assert_same_bits(restored, state)


def test_odd_values_types_and_shapes_come_back(tmp_path):
    tree = Pair(
        first={
            "nan": np.array([np.nan, -np.inf, -0.0, 1e-45], np.float32),
            "bytes": np.arange(256, dtype=np.uint8),
            "flags": np.array([[True], [False]]),
        },
        second=(jnp.int32(-5), jnp.ones((2, 3), jnp.bfloat16), jax.random.split(jax.random.key(0))),
    )
    checkpoints.save(tmp_path, 0, tree, {})
    restored, record = checkpoints.restore(tmp_path, 0, tree)
    assert_same_bits(restored, tree)
    assert record == {}


def test_an_entry_is_replaced_and_the_others_stay(tmp_path):
    entry = lambda value: {"x": np.full(3, value, np.float32)}
    for number, value in ((1, 1.0), (10, 10.0), (2, 2.0), (1, 5.0)):
        checkpoints.save(tmp_path / "new" / "store", number, entry(value), {"value": value})
    store = tmp_path / "new" / "store"
    assert checkpoints.numbers(store) == [1, 2, 10]
    for number, value in ((1, 5.0), (2, 2.0), (10, 10.0)):
        restored, record = checkpoints.restore(store, number, entry(0.0))
        assert_same_bits(restored, entry(value))
        assert record == {"value": value}


def test_numbers_sees_finished_entries_only(tmp_path):
    assert checkpoints.numbers(tmp_path / "nowhere") == []
    for name in ("3", "20", "5.orbax-checkpoint-tmp-1700000000", "tmp", "7-old", ".9", "-1", "007"):
        (tmp_path / name).mkdir()
    (tmp_path / "4").write_text("a file, not an entry")
    assert checkpoints.numbers(tmp_path) == [3, 20]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("no reason given"), "no reason given"),
        (ValueError("tensorstore: os_error_code='0'"), "os_error_code"),
        (ValueError("tensorstore: os_error_code='28'"), "No space left on device"),
    ],
)
def test_a_failure_is_never_told_as_a_success(error, words):
    assert words in checkpoints._reason(error)


def test_a_missing_number_is_named(store, state):
    with pytest.raises(CheckpointError, match=r"no checkpoint 31 in .*store"):
        checkpoints.restore(store, 31, state)


def _wrong_likes(state):
    params = state.params
    return {
        "other structure": {"x": jnp.zeros(3)},
        "a leaf missing": state._replace(params=params._replace(decoder={})),
        "a leaf too many": state._replace(
            params=params._replace(decoder={**params.decoder, "more": jnp.zeros(1)})
        ),
        "other shapes": state._replace(
            params=jax.tree.map(lambda p: jnp.zeros((*p.shape, 2)), params)
        ),
        "other sizes": state._replace(
            params=jax.tree.map(lambda p: jnp.zeros([n + 1 for n in p.shape]), params)
        ),
        "other types": state._replace(
            params=jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        ),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "other structure",
        "a leaf missing",
        "a leaf too many",
        "other shapes",
        "other sizes",
        "other types",
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(store, state, kind):
    with pytest.raises(CheckpointError, match=rf"checkpoint .*{re.escape(str(store))}") as raised:
        checkpoints.restore(store, 30, _wrong_likes(state)[kind])
    assert "\n" not in str(raised.value)
    # It may be good: it must not be taken for damaged and made anew.
    assert not isinstance(raised.value, CorruptCheckpointError)
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoints.valid_steps(store, _wrong_likes(state)[kind])


def _flip(position):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return damage


DAMAGES = {
    "first byte": _flip(0.0),
    "a third in": _flip(0.33),
    "middle byte": _flip(0.5),
    "late byte": _flip(0.8),
    "last byte": _flip(1.0),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


# Orbax leaves a task of the failed read behind, which then finds its event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_an_error_or_does_no_harm(store, state, tmp_path, damage):
    """Whichever file of the entry is hit: never another tree or record than was saved."""
    files = sorted(p.relative_to(store) for p in store.rglob("*") if p.is_file())
    assert files
    errors = 0
    for file in files:
        copy = tmp_path / "copy"
        shutil.copytree(store, copy)
        if (copy / file).stat().st_size or damage == "deleted":
            DAMAGES[damage](copy / file)
        try:
            restored, record = checkpoints.restore(copy, 30, state)
        except CorruptCheckpointError as error:
            errors += 1
            assert f"checkpoint 30 in {copy} " in str(error) and "\n" not in str(error)
            good, damaged = checkpoints.valid_steps(copy, state)
            assert good == [] and [str(e)[:40] for e in damaged] == [str(error)[:40]]
        else:
            assert_same_bits(restored, state)
            assert record == RECORD, f"{file}: the record is another one"
        checkpoints.save(copy, 30, state, RECORD)  # over whatever is left of it
        assert checkpoints.valid_steps(copy, state) == ([30], [])
        shutil.rmtree(copy)
    assert errors > 0
    gc.collect()  # the tasks left behind, which would else be collected in some other test


def test_a_damaged_record_is_noticed(store, state, tmp_path):
    """A record that is still good JSON but says something else, or is no record at all."""
    copies = tmp_path / "copies"
    for text in ('"epoch": 31', '"name": "digitz"', "replace all"):
        shutil.copytree(store, copies)
        (path,) = (p for p in copies.rglob("*") if p.is_file() and b'"digits"' in p.read_bytes())
        content = path.read_text()
        if text == "replace all":
            content = "[1, 2]"
        else:
            key = text.split(":")[0]
            content, changed = re.subn(key + r': *("\w+"|\d+)', text, content)
            assert changed == 1
        path.write_text(content)
        with pytest.raises(CheckpointError):
            checkpoints.restore(copies, 30, state)
        with pytest.raises(CheckpointError):
            checkpoints.record(copies, 30)
        shutil.rmtree(copies)


def test_a_missing_part_of_an_entry_is_an_error(store, state, tmp_path):
    for part in sorted(p.name for p in (store / "30").iterdir() if p.is_dir()):
        copy = tmp_path / part
        shutil.copytree(store, copy)
        shutil.rmtree(copy / "30" / part)
        with pytest.raises(CheckpointError):
            checkpoints.restore(copy, 30, state)
    (tmp_path / "30").mkdir()
    with pytest.raises(CheckpointError):
        checkpoints.restore(tmp_path, 30, state)


def test_a_tree_that_is_whole_but_another_is_noticed(two):
    """As a copy that was interrupted may leave it: every file is good, and one is of entry 1."""
    shutil.rmtree(two / "2" / "tree")
    shutil.copytree(two / "1" / "tree", two / "2" / "tree")
    with pytest.raises(CorruptCheckpointError, match="wrong checksum"):
        checkpoints.restore(two, 2, _tree(0))


def test_good_numbers_tells_the_good_from_the_damaged(store, state, tmp_path):
    assert checkpoints.valid_steps(tmp_path / "nowhere", state) == ([], [])
    for number in ("1", "2", "10", "30"):
        shutil.copytree(store / "30", tmp_path / number)
    shutil.rmtree(tmp_path / "2" / "record")
    shutil.rmtree(tmp_path / "10")
    (tmp_path / "10").mkdir()
    good, damaged = checkpoints.valid_steps(tmp_path, state)
    assert good == [1, 30]
    assert [str(error).split(" cannot")[0] for error in damaged] == [
        f"checkpoint {number} in {tmp_path}" for number in (2, 10)
    ]


def _tree(value):
    return {"x": np.full(1000, value, np.float32)}


@pytest.fixture
def two(tmp_path):
    """A store of entries 1 and 2."""
    for number in (1, 2):
        checkpoints.save(tmp_path / "store", number, _tree(number), {"value": number})
    return tmp_path / "store"


def test_without_room_an_error_says_so_and_the_store_is_as_it_was(two):
    before = {path: path.read_bytes() for path in two.rglob("*") if path.is_file()}
    noise = {"x": np.random.default_rng(0).normal(size=100_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        for number in (2, 3):  # one that is there already, and one that is new
            with pytest.raises(CheckpointError, match="File too large") as error:
                checkpoints.save(two, number, noise, {})
            assert f"checkpoint {number} in {two} cannot be written" in str(error.value)
            assert "make room" in str(error.value) and "\n" not in str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in two.rglob("*") if path.is_file()} == before
    checkpoints.save(two, 2, noise, {})
    assert_same_bits(checkpoints.restore(two, 2, noise)[0], jax.tree.map(jnp.asarray, noise))
    gc.collect()


def test_what_a_failed_save_still_writes_after_its_error_is_removed(two, monkeypatch):
    """Tensorstore's threads do, and make the folders again in which they write."""
    late = two / "3.new.orbax-checkpoint-tmp" / "d" / "part"
    pauses = []

    class Failing:
        def save(self, *arguments, **options):
            raise OSError(errno.ENOSPC, "no room")

    def write_late(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            late.parent.mkdir(parents=True)
            late.write_text("x")

    monkeypatch.setattr(checkpoints, "_checkpointer", Failing)
    monkeypatch.setattr(checkpoints.time, "sleep", write_late)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.save(two, 3, _tree(3), {})
    assert sum(pauses) >= 0.5 and sorted(path.name for path in two.iterdir()) == ["1", "2"]


class Killed(BaseException):
    """Stands for kill -9: nothing that was to follow happens."""


@pytest.mark.parametrize("after", range(5))
def test_a_save_that_is_killed_leaves_the_old_entry_or_the_new_one(two, monkeypatch, after):
    """Killed before each of the steps that change the store, and after the last."""
    steps = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal steps
            if steps == after:
                raise Killed
            steps += 1
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", counted(shutil.rmtree))
        patch.setattr(Path, "rename", counted(Path.rename))
        try:
            checkpoints.save(two, 2, _tree(5), {"value": 5})
        except Killed:
            assert after < 4
        else:
            assert after == 4 == steps
    checkpoints.remove_incomplete(two)
    assert sorted(path.name for path in two.iterdir()) == ["1", "2"]
    for number, values in ((1, [1]), (2, [5])):
        restored, record = checkpoints.restore(two, number, _tree(0))
        assert record["value"] in values
        assert_same_bits(restored, jax.tree.map(jnp.asarray, _tree(record["value"])))


def test_an_entry_is_there_whole_at_every_moment_of_its_removal(two, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: None)
        checkpoints.prune(two, lambda saved: saved[:1])
    assert checkpoints.numbers(two) == [2] and (two / "1.old").exists()
    checkpoints.remove_incomplete(two)
    assert [path.name for path in two.iterdir()] == ["2"]


def test_tidy_removes_what_is_half_written_and_nothing_else(two, tmp_path):
    checkpoints.remove_incomplete(tmp_path / "nowhere")
    half = ("3.new.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-17", "2.old")
    mine = ("notes", "x.old", "5.new.txt", ".orbax-checkpoint-tmp", "v1.new")
    for name in (*half, *mine):
        (two / name).mkdir()
        (two / name / "file").write_text("x")
    checkpoints.remove_incomplete(two)
    assert {path.name for path in two.iterdir()} == {"1", "2", *mine}
