"""Files of the user's: .npz."""

import contextlib
import hashlib
import json
import zipfile

import numpy as np
import pytest
from small_data import load_error, random_images

from gapjax.data import DatasetError, load_dataset


def test_npz_file(tmp_path):
    train, test = random_images(12, shape=(3, 5)), random_images(7, 1, shape=(3, 5))
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, train=train, test=test)
    dataset = load_dataset(str(path))
    np.testing.assert_array_equal(dataset.train, train)
    np.testing.assert_array_equal(dataset.test, test)
    assert dataset.name == "mine.npz"
    assert dataset.levels == 256
    assert dataset.event_shape == (3, 5)
    provenance = dataset.provenance
    assert provenance["files"] == {"mine.npz": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert (provenance["num_train"], provenance["num_test"]) == (12, 7)
    assert str(tmp_path) not in json.dumps(provenance)


def test_checksum_is_of_values_and_shapes(tmp_path):
    train, test = random_images(12, shape=(4, 4)), random_images(8, 1, shape=(4, 4))

    def checksum(**arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        return load_dataset(tmp_path / "x.npz").provenance["sha256"]

    first = checksum(train=train, test=test)
    assert checksum(x_test=test.astype(np.int64), x_train=np.asfortranarray(train)) == first
    assert checksum(train=train.reshape(12, 2, 8), test=test.reshape(8, 2, 8)) != first
    assert checksum(train=test, test=train) != first
    # The same bytes, but the border between the parts elsewhere.
    whole = np.concatenate([train, test])
    assert checksum(train=whole[:8], test=whole[8:]) != first
    changed = test.copy()
    changed[-1, -1, -1] ^= 1
    assert checksum(train=train, test=changed) != first


def test_levels_of_an_npz_file(tmp_path):
    path = tmp_path / "x.npz"
    x = random_images(10, shape=(4,), levels=5)
    np.savez(path, train=x, test=x)
    assert load_dataset(path).levels == 256
    assert load_dataset(path, levels=5).levels == 5
    message = load_error(path, levels=4)
    assert "levels=4" in message
    assert "value 4" in message
    np.savez(path, train=x, test=x, levels=5)
    assert load_dataset(path).levels == 5
    assert load_dataset(path, levels=5).levels == 5
    assert "levels=5" in load_error(path, levels=6)
    np.savez(path, train=x > 2, test=x > 2)
    assert load_dataset(path).levels == 2
    for levels in (1, 300, 2.5, [2, 3], True):
        np.savez(path, train=x, test=x, levels=levels)
        assert "2 to 256" in load_error(path)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (np.zeros((4, 4), np.float32), ["'train'", "float32", "uint8"]),
        (np.full((4, 4), np.nan), ["float64", "NaN", "uint8"]),
        (np.zeros((4, 4), complex), ["complex128"]),
        (np.full((4, 4), "a"), ["<U1"]),
        (np.full((4, 4), -1), ["-1"]),
        (np.full((4, 4), 256), ["256", "255"]),
        (np.full((4, 4), 2**63, np.uint64), [str(2**63)]),
        (np.zeros((0, 4), np.uint8), ["(0, 4)", "empty"]),
        (np.zeros((4, 0), np.uint8), ["(4, 0)", "empty"]),
        (np.zeros(4, np.uint8), ["(4,)", "[N, *event]"]),
        (np.zeros((), np.uint8), ["()", "[N, *event]"]),
        (np.zeros((4, 5), np.uint8), ["(5,)", "(4,)", "same"]),
        (np.zeros((4, 2, 2), np.uint8), ["(2, 2)", "(4,)"]),
    ],
)
def test_unusable_arrays(tmp_path, train, words):
    np.savez(tmp_path / "x.npz", train=train, test=np.ones((3, 4), np.uint8))
    message = load_error(tmp_path / "x.npz")
    assert all(word in message for word in words), message


def test_unusable_test_arrays_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", train=np.ones((3, 4), np.uint8), test=np.ones((3, 4)))
    assert "'test'" in load_error(tmp_path / "x.npz")


def test_damaged_npz_files(tmp_path):
    good = tmp_path / "good.npz"
    np.savez_compressed(good, train=random_images(20), test=random_images(20))
    content = good.read_bytes()
    bad = tmp_path / "bad.npz"
    for length in (0, 1, 10, 100, len(content) // 2, len(content) - 1):
        bad.write_bytes(content[:length])
        message = load_error(bad)
        assert "bad.npz" in message
        assert "truncated" in message
    for position in range(0, len(content), len(content) // 40):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        bad.write_bytes(damaged)
        # Some bytes mean nothing; all that must not happen is another error, or other images.
        with contextlib.suppress(DatasetError):
            np.testing.assert_array_equal(load_dataset(bad).train, random_images(20))


def test_npz_files_that_are_something_else(tmp_path):
    path = tmp_path / "x.npz"
    assert "does not exist" in load_error(path)
    path.mkdir()
    assert "is a directory" in load_error(path)
    path = tmp_path / "y.npz"
    path.write_text("no archive")
    assert "not an .npz" in load_error(path)
    with path.open("wb") as file:
        np.save(file, random_images(3))
    assert "not an .npz" in load_error(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train.npy", "no array")
        archive.writestr("test.npy", "no array")
    assert "y.npz" in load_error(path)
    np.savez(path, training=random_images(3), test=random_images(3))
    message = load_error(path)
    assert "training" in message
    assert "x_train" in message


class _Trap:
    """Says so when it is unpickled."""

    sprung = False

    def __reduce__(self):
        return _spring, ()


def _spring():
    _Trap.sprung = True
    return 0


def test_npz_files_are_not_unpickled(tmp_path):
    objects = np.array([[_Trap()]], dtype=object)
    np.savez(tmp_path / "x.npz", train=objects, test=objects)
    assert "Python objects" in load_error(tmp_path / "x.npz")
    assert not _Trap.sprung
