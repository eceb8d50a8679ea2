"""Checkpoints: what comes back is what was saved, or an error that says which entry is bad."""

import errno
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


def test_an_entry_without_its_tree_keeps_its_record_and_is_not_taken_for_damaged(
    store, state, tmp_path
):
    copy = shutil.copytree(store, tmp_path / "store")
    checkpoints.drop_tree(copy, 30)
    assert checkpoints.is_dropped(copy, 30) and not checkpoints.is_dropped(store, 30)
    assert checkpoints.record(copy, 30) == RECORD
    assert checkpoints.checksum(copy, 30) == checkpoints.checksum(store, 30)
    assert checkpoints.valid_steps(copy, state) == ([30], [])
    with pytest.raises(CheckpointError, match="its arrays were dropped") as caught:
        checkpoints.restore(copy, 30, state)
    assert not isinstance(caught.value, CorruptCheckpointError)
    checkpoints.save(copy, 30, state, RECORD)
    assert not checkpoints.is_dropped(copy, 30)


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
    with pytest.raises(CheckpointError, match="no entry 31"):
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


UNCHANGED = {
    "64 bits": {"count": np.int64(2**40), "mean": np.array([1 + 1e-12]), "z": np.ones(2, complex)},
    "other byte order": {"x": np.arange(3, dtype=">f4"), "ids": np.arange(3, dtype=">u2")},
    "text and fields": {"names": np.array(["a", "bc"]), "rows": np.zeros(2, "i4,f8")},
    "numbers of Python": {"step": 100, "rate": 1e-3, "done": True, "z": 1j, "w": np.ones(2, "f4")},
    "names with dots": {"a.b": np.zeros(3, "f4"), "a": {"b": np.ones(3, "f4")}, "a/b": np.zeros(1)},
    "names and numbers": {1: np.zeros(3, "f4"), 2: [np.ones(3, "f4"), None]},
    "empty": {"none": np.zeros((0, 3), "f4"), "nothing": {}},
}


@pytest.mark.parametrize("kind", UNCHANGED)
def test_what_was_saved_comes_back_with_its_types_and_values(tmp_path, kind):
    tree = UNCHANGED[kind]
    checkpoints.save(tmp_path, 1, tree, {})
    restored, _ = checkpoints.restore(tmp_path, 1, tree)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for got, saved in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
        assert type(got) is type(saved) or isinstance(saved, np.ndarray | np.generic)
        assert np.asarray(got).dtype == np.asarray(saved).dtype
        assert np.asarray(got).tobytes() == np.asarray(saved).tobytes()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_every_implementation_come_back_as_such(tmp_path, impl):
    key = jax.random.key(3, impl=impl)
    checkpoints.save(tmp_path, 1, key, {})
    for like in (key, jax.eval_shape(lambda: key)):
        restored, _ = checkpoints.restore(tmp_path, 1, like)
        assert restored.dtype == key.dtype
        assert_same_bits(restored, key)
    other = "rbg" if impl == "unsafe_rbg" else "unsafe_rbg"  # whose data have the same shape
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoints.restore(tmp_path, 1, jax.random.key(3, impl=other))


class Foreign:
    """As an array of another library has them."""

    dtype, shape = np.dtype(np.float32), ()


@pytest.mark.parametrize("leaf", [object(), "text", np.array([{}]), Foreign(), 2**70])
def test_a_leaf_that_could_not_come_back_is_refused(tmp_path, leaf):
    with pytest.raises(CheckpointError, match=r"entry 1 in .*: the leaf \['x'\] ") as error:
        checkpoints.save(tmp_path, 1, {"x": leaf}, {})
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "record",
    [{1: "a"}, {"a": {True: 0}}, {"a": Pair({}, 1)}, {"a": np.ones(2)}, {"a": {1}}, {(): 0}],
)
def test_a_record_that_json_would_change_is_refused(tmp_path, record):
    with pytest.raises(CheckpointError, match="would come back from JSON as another"):
        checkpoints.save(tmp_path, 1, _tree(0), record)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [True, -1, 1.5, "3", None, np.float32(2)])
def test_a_number_that_is_none_of_an_entry_is_refused(tmp_path, number):
    for call in (
        lambda: checkpoints.save(tmp_path, number, _tree(0), {}),
        lambda: checkpoints.restore(tmp_path, number, _tree(0)),
        lambda: checkpoints.record(tmp_path, number),
    ):
        with pytest.raises(CheckpointError, match="is not that of an entry"):
            call()
    checkpoints.save(tmp_path, np.int32(7), _tree(0), {})
    assert checkpoints.numbers(tmp_path) == [7]


@pytest.mark.parametrize(
    "name",
    ["run[1]", "back\\slash", "a*b?", "new\nline", " sp ace ", "50%25", "{a,b}", "~", "#é@|:"],
)
def test_paths_are_taken_as_they_are(tmp_path, name):
    store = tmp_path / name / "store"
    for number in (1, 2, 2):
        checkpoints.save(store, number, _tree(number), {"at": number})
    assert checkpoints.valid_steps(str(store), _tree(0)) == ([1, 2], [])
    assert checkpoints.restore(store, 2, _tree(0))[1] == {"at": 2}
    checkpoints.prune(store, lambda numbers: numbers[:1])
    assert checkpoints.numbers(store) == [2]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    checkpoints.save("~/store", 1, _tree(1), {})
    assert checkpoints.numbers("~/store") == checkpoints.numbers(tmp_path / "store") == [1]
    checkpoints.restore(Path("~/store"), 1, _tree(0))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_an_entry_has_few_files_however_many_leaves(tmp_path):
    checkpoints.save(tmp_path, 1, {str(i): np.zeros(i) for i in range(300)}, {})
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) <= 4


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
        (OSError(errno.ENOSPC, "no room"), "No space left on device"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_failure_is_never_told_as_a_success(error, words):
    assert words in checkpoints._reason(error)


def test_a_missing_number_is_named(store, state):
    with pytest.raises(CheckpointError, match=r"no entry 31 in .*store"):
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
    with pytest.raises(CheckpointError, match=rf"entry .*{re.escape(str(store))}") as raised:
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
            assert f"entry 30 in {copy} " in str(error) and "\n" not in str(error)
            good, damaged = checkpoints.valid_steps(copy, state)
            assert good == [] and [str(e)[:40] for e in damaged] == [str(error)[:40]]
        else:
            assert_same_bits(restored, state)
            assert record == RECORD, f"{file}: the record is another one"
        checkpoints.save(copy, 30, state, RECORD)  # over whatever is left of it
        assert checkpoints.valid_steps(copy, state) == ([30], [])
        shutil.rmtree(copy)
    assert errors > 0


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


def test_an_entry_of_an_earlier_version_is_not_taken_for_damaged(state, tmp_path):
    (tmp_path / "30" / "record").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="earlier version") as error:
        checkpoints.valid_steps(tmp_path, state)
    assert not isinstance(error.value, CorruptCheckpointError)


def test_an_empty_entry_is_an_error(state, tmp_path):
    (tmp_path / "30").mkdir()
    with pytest.raises(CheckpointError):
        checkpoints.restore(tmp_path, 30, state)


def test_a_tree_that_is_whole_but_another_is_noticed(two):
    """As a copy that was interrupted may leave it: every file is good, and one is of entry 1."""
    shutil.copy(two / "1" / "tree.bin", two / "2" / "tree.bin")
    with pytest.raises(CorruptCheckpointError, match="wrong checksum"):
        checkpoints.restore(two, 2, _tree(0))


def test_good_numbers_tells_the_good_from_the_damaged(store, state, tmp_path):
    assert checkpoints.valid_steps(tmp_path / "nowhere", state) == ([], [])
    for number in ("1", "2", "10", "30"):
        shutil.copytree(store / "30", tmp_path / number)
    (tmp_path / "2" / "record.json").unlink()
    shutil.rmtree(tmp_path / "10")
    (tmp_path / "10").mkdir()
    good, damaged = checkpoints.valid_steps(tmp_path, state)
    assert good == [1, 30]
    assert [str(error).split(" cannot")[0] for error in damaged] == [
        f"entry {number} in {tmp_path}" for number in (2, 10)
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
            assert f"entry {number} in {two} cannot be written" in str(error.value)
            assert "make room" in str(error.value) and "\n" not in str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in two.rglob("*") if path.is_file()} == before
    checkpoints.save(two, 2, noise, {})
    np.testing.assert_array_equal(checkpoints.restore(two, 2, noise)[0]["x"], noise["x"])


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
