"""Checkpoints: what comes back is what was saved, or an error that says which entry is bad."""

import re
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same_bits, random_params

import gapjax
from gapjax import checkpoints
from gapjax.checkpoints import CheckpointError
from gapjax.training import init_state

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
    assert type(restored) is gapjax.TrainState and type(restored.params) is gapjax.VAEParams
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
    for name in ("3", "20", "5.orbax-checkpoint-tmp-1700000000", "tmp", "7-old", ".9", "-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "4").write_text("a file, not an entry")
    assert checkpoints.numbers(tmp_path) == [3, 20]


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
        except CheckpointError:
            errors += 1
        else:
            assert_same_bits(restored, state)
            assert record == RECORD, f"{file}: the record is another one"
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
