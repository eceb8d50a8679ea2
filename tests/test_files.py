"""Files and folders of the user's: archives, pairs of arrays, folders of images."""

import contextlib
import pathlib
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import scipy.io
from small_data import load_error, random_images

from gapjax.data import DatasetError, load_dataset, names_data

TRAIN, TEST = random_images(40, shape=(6, 5)), random_images(30, 1, shape=(6, 5))


def _keras(folder):
    np.savez(folder / "mnist.npz", x_train=TRAIN, y_train=np.ones(40), x_test=TEST, y_test=[1])
    return "mnist.npz"


def _pair(folder):
    np.save(folder / "x_train.npy", TRAIN)
    np.save(folder / "x_test.npy", TEST)
    return "x_test.npy"


def _amat(folder):
    for name, x in (("train", TRAIN), ("test", TEST)):
        np.savetxt(folder / f"mine_{name}.amat", x.reshape(len(x), -1), fmt="%.6e")
    return "mine_train.amat"


def _mat(folder):
    arrays = {"train_data": TRAIN.astype(float), "test_data": TEST.astype(float), "levels": 256.0}
    scipy.io.savemat(folder / "mine.mat", arrays)
    return "mine.mat"


def _sparse_mat(folder):
    arrays = {"train": TRAIN.reshape(40, -1).astype(float), "test": TEST.reshape(30, -1) * 1.0}
    arrays = {name: scipy.sparse.csc_matrix(x) for name, x in arrays.items()}
    scipy.io.savemat(folder / "mine.mat", arrays)
    return "mine.mat"


def _sparse_npz(folder):
    for name, x in (("train", TRAIN), ("test", TEST)):
        scipy.sparse.save_npz(folder / f"{name}.npz", scipy.sparse.csr_array(x.reshape(len(x), -1)))
    return "test.npz"


def _images(folder):
    image = pytest.importorskip("PIL.Image")
    for part, images in (("train", TRAIN), ("test", TEST)):
        for number, x in enumerate(images):  # in a folder for each class, as many have them
            path = folder / "pictures" / part / f"{number // 20}" / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.fromarray(x).save(path)
        (folder / "pictures" / part / "labels.csv").write_text("0,1")
    return "pictures"


@pytest.mark.parametrize("make", [_keras, _pair, _amat, _mat, _sparse_mat, _sparse_npz, _images])
def test_every_form_gives_the_same_arrays(tmp_path, make):
    path = tmp_path / "in [brackets]" / make(_made(tmp_path / "in [brackets]"))
    assert names_data(str(path))
    dataset = load_dataset(path)
    for stored, expected in ((dataset.train, TRAIN), (dataset.test, TEST)):
        assert stored.dtype == np.uint8
        np.testing.assert_array_equal(stored.reshape(expected.shape), expected)
    assert dataset.levels == (None if make == _sparse_npz else 256) and dataset.name == path.name
    assert str(tmp_path) not in str(dataset.provenance)
    assert set(dataset.provenance.get("files", {})) <= {each.name for each in path.parent.iterdir()}


def _made(folder):
    folder.mkdir()
    return folder


def test_sparse_counts_take_the_memory_of_what_they_become(tmp_path):
    """The largest array that is made is the result; MATLAB's 8 bytes an entry are never dense."""
    rng, shape = np.random.default_rng(0), (2000, 1000)
    matrix = scipy.sparse.random(*shape, 0.01, rng=rng, data_rvs=lambda n: rng.integers(1, 300, n))
    for part in ("train", "test"):
        scipy.sparse.save_npz(tmp_path / f"{part}.npz", matrix)
        scipy.io.savemat(tmp_path / "x.mat", {"train": matrix * 1.0, "test": matrix * 1.0})
    for name in ("train.npz", "x.mat"):
        tracemalloc.start()
        dataset = load_dataset(tmp_path / name)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert dataset.train.dtype == np.uint16 and dataset.levels is None
        np.testing.assert_array_equal(dataset.test, matrix.toarray())
        assert peak < 1.6 * (dataset.train.nbytes + dataset.test.nbytes)


def test_a_sparse_matrix_that_does_not_fit_is_named(tmp_path):
    scipy.sparse.save_npz(tmp_path / "train.npz", scipy.sparse.csr_array([[1, 0]]))
    assert "test.npz' does not exist" in load_error(tmp_path / "train.npz")
    np.savez(tmp_path / "test.npz", test=TEST)
    assert "dtype object" in load_error(tmp_path / "train.npz")
    scipy.sparse.save_npz(tmp_path / "test.npz", scipy.sparse.csr_array([[-1, 0]]))
    assert "-1" in load_error(tmp_path / "train.npz")
    (tmp_path / "train.npz").rename(tmp_path / "cells.npz")
    assert "x_train.npz" in load_error(tmp_path / "cells.npz")


def test_either_of_a_pair_names_both(tmp_path):
    _pair(tmp_path)
    first, second = (load_dataset(tmp_path / f"x_{part}.npy") for part in ("train", "test"))
    assert first.provenance == second.provenance
    (tmp_path / "x_train.npy").unlink()
    assert "x_train.npy' does not exist" in load_error(tmp_path / "x_test.npy")
    np.save(tmp_path / "x.npy", TRAIN)
    np.save(tmp_path / "training_train.npy", TRAIN)
    np.save(tmp_path / "training_test.npy", TEST)
    assert len(load_dataset(tmp_path / "training_test.npy").test) == 30
    message = load_error(tmp_path / "x.npy")
    assert "x_train.npy" in message and "x_test.npy" in message


def test_a_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _pair(tmp_path)
    assert len(load_dataset("~/x_train.npy").train) == 40
    assert len(load_dataset(pathlib.Path("~/x_train.npy")).train) == 40


def test_text_and_matlab_keep_what_is_no_integer(tmp_path):
    np.savetxt(tmp_path / "x_train.amat", TRAIN.reshape(40, -1) / 7)
    np.savetxt(tmp_path / "x_test.amat", TEST.reshape(30, -1))
    dataset = load_dataset(tmp_path / "x_test.amat")  # of which one part has integers alone
    assert dataset.levels is None and dataset.train.dtype == dataset.test.dtype == np.float32
    np.testing.assert_array_equal(dataset.test, TEST.reshape(30, -1))
    scipy.io.savemat(tmp_path / "x.mat", {"train": TRAIN / 7, "test": TEST / 7})
    dataset = load_dataset(tmp_path / "x.mat")
    assert dataset.levels is None and dataset.train.dtype == np.float32


@pytest.mark.parametrize(
    ("mode", "levels", "shape"), [("1", 2, (6, 5)), ("I;16", None, (6, 5)), ("RGB", 256, (6, 5, 3))]
)
def test_images_keep_their_depth_and_colours(tmp_path, mode, levels, shape):
    image = pytest.importorskip("PIL.Image")
    x = random_images(1, shape=(6, 5, 3) if mode == "RGB" else (6, 5))[0]
    x = {"1": x > 99, "I;16": x.astype(np.uint16) * 200, "RGB": x}[mode]
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        for number in range(5):
            image.fromarray(x).save(tmp_path / part / f"{number}.png")
    dataset = load_dataset(tmp_path)
    assert dataset.levels == levels and dataset.event_shape == shape
    np.testing.assert_array_equal(dataset.test[3], x)


def test_images_that_do_not_fit_are_named(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    assert "holds no images" in load_error(tmp_path)
    for part in ("train", "test"):
        image.fromarray(TRAIN[0]).save(tmp_path / part / "a.png")
    for other, words in (
        (image.fromarray(TRAIN[0, :3]), "unlike the first image"),
        (image.fromarray(TRAIN[0]).convert("RGBA"), "mode RGBA"),
        (image.fromarray(TRAIN[0]).convert("P"), "mode P"),
    ):
        other.save(tmp_path / "test" / "b.png")
        message = load_error(tmp_path)
        assert words in message and "b.png" in message
    (tmp_path / "test" / "b.png").write_bytes(b"no image")
    assert "cannot be read" in load_error(tmp_path)


@pytest.mark.parametrize(
    ("x", "levels", "used"),
    [
        (np.where(TRAIN > 99, 255, 0), 256, 2),
        (TRAIN // 16, 256, 16),
        (TRAIN // 255, 2, 1),
        (TRAIN * 0, 2, 1),
        (TRAIN, 256, None),
        (TRAIN // 128, 2, None),
        (TRAIN[:1, :2], 256, None),  # too few pixels to tell
    ],
)
def test_a_guess_that_leaves_most_levels_unused_warns(tmp_path, x, levels, used):
    path = tmp_path / "mine.npz"
    np.savez(path, train=x.astype(np.uint8), test=x.astype(np.uint8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_dataset(path).levels == levels
    assert len(caught) == (used is not None)
    if used is not None:
        message = str(caught[0].message)
        assert caught[0].filename == __file__ and "\n" not in message
        assert f"taken to have {levels} levels" in message and f"have {used} of them" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dataset(path, levels=256)  # no guess


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
    assert "not a .npz" in load_error(path)
    with path.open("wb") as file:
        np.save(file, random_images(3))
    assert "not a .npz" in load_error(path)
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
