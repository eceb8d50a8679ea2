"""MNIST from the published files.

Tests of the whole MNIST read the folder that GAPJAX_MNIST_DIR names, or ../shared/data/mnist if it
exists, and are skipped otherwise. No test needs TensorFlow or a network.
"""

import gzip
import json
import os
import pathlib

import numpy as np
import pytest
from small_data import TEST, TRAIN, idx_bytes, load_error, random_images

from gapjax.data import load_dataset, mnist, tfds

pytestmark = pytest.mark.usefixtures("no_default_directory")

_ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def mnist_dir() -> pathlib.Path:
    given = os.environ.get("GAPJAX_MNIST_DIR")
    folder = pathlib.Path(given) if given else _ROOT.parent / "shared" / "data" / "mnist"
    if not folder.is_dir():
        pytest.skip(
            f"needs the four MNIST files: {str(folder)!r} is not a folder; "
            "name theirs in GAPJAX_MNIST_DIR"
        )
    return folder


def test_idx_files_gzipped_or_not(small_mnist):
    folder, train, test = small_mnist
    dataset = load_dataset("mnist", data_dir=folder)
    np.testing.assert_array_equal(dataset.train, train)
    np.testing.assert_array_equal(dataset.test, test)
    assert dataset.levels == 256
    assert set(dataset.provenance["files"]) == {f"{TRAIN}.gz", f"{TEST}.gz"}
    assert str(folder) not in json.dumps(dataset.provenance)

    for name in (TRAIN, TEST):
        packed = folder / f"{name}.gz"
        (folder / name).write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    plain = load_dataset("grey_mnist", data_dir=str(folder))
    assert plain.name == "mnist"
    assert plain.provenance["sha256"] == dataset.provenance["sha256"]
    for name in (TRAIN, TEST):  # as some programs unpack them, and some rename them
        (folder / name).rename(folder / f"{name.replace('-idx3', '.idx3')}.gz")
    renamed = load_dataset("mnist", data_dir=folder)
    assert renamed.provenance["sha256"] == dataset.provenance["sha256"]
    (folder / TRAIN).write_bytes(idx_bytes(train ^ 1))
    assert "not the published" in load_error("mnist", data_dir=folder)


def test_pixels_are_verified_and_not_their_container(small_mnist):
    """Packed anew by another program, at another level, with another name and time in it."""
    folder, _, _ = small_mnist
    whole = load_dataset("mnist", data_dir=folder).provenance
    for name in (TRAIN, TEST):
        path = folder / f"{name}.gz"
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1, mtime=1e9))
    again = load_dataset("mnist", data_dir=folder).provenance
    assert again["sha256"] == whole["sha256"] and again["files"] != whole["files"]


def _damage_truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _damage_flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def _repack(change):
    return lambda content: gzip.compress(change(gzip.decompress(content)), mtime=0)


@pytest.mark.parametrize("name", [TRAIN, TEST])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: b"", ["not the published", " 0 bytes"]),
        (lambda content: content[:1], ["not the published", " 1 bytes"]),
        (lambda content: content[:5], ["truncated"]),
        (_damage_truncate, ["truncated"]),
        (lambda content: content[:-1], ["truncated"]),
        (_damage_flip, ["corrupt"]),
        (lambda content: content[:10] + b"\xff" + content[11:], ["corrupt"]),  # no such block
        (lambda content: b"<html>Not found</html>", ["not the published", " 22 bytes"]),
        (_repack(lambda data: b""), ["not the published", " 0 bytes"]),
        (_repack(lambda data: data[:15]), ["not the published", " 15 bytes"]),
        (_repack(lambda data: data[:-1]), ["SHA-256", ".npz"]),
        (_repack(lambda data: data + b"\0"), ["SHA-256", ".npz"]),
        (_repack(lambda data: data[:-1] + bytes([data[-1] ^ 1])), ["SHA-256", ".npz"]),
    ],
)
def test_damaged_idx_files(small_mnist, name, damage, words):
    folder, _, _ = small_mnist
    path = folder / f"{name}.gz"
    path.write_bytes(damage(path.read_bytes()))
    message = load_error("binary_mnist", data_dir=folder)
    assert all(word in message for word in [path.name, *words]), message


def test_no_more_is_unpacked_than_the_published_file_has(small_mnist, monkeypatch):
    """A small file can unpack to more than memory holds."""
    folder, _, _ = small_mnist
    monkeypatch.setattr(mnist, "_MOST_BYTES", 1000)
    assert " 1000 bytes" in load_error("mnist", data_dir=folder)


def test_incomplete_folders(small_mnist, tmp_path):
    folder, _, _ = small_mnist
    (folder / f"{TEST}.gz").unlink()
    message = load_error("mnist", data_dir=folder)
    assert f"nor {TEST}.gz" in message
    assert "does not exist" in load_error("mnist", data_dir=tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("")
    assert "not a directory" in load_error("mnist", data_dir=file)
    (folder / f"{TEST}.gz").mkdir()
    assert "cannot be read" in load_error("mnist", data_dir=folder)
    assert "binary_mnist" in load_error("binarized_mnist", data_dir=folder)


def test_without_files_tensorflow_or_network_one_line_says_what_to_do(monkeypatch, tmp_path):
    message = load_error("mnist")
    for word in ("tfds_default", "pip install tensorflow-cpu", f"{TRAIN}.gz", "--data_dir=FOLDER"):
        assert word in message
    assert "binary_mnist" in load_error("binarized_mnist")

    def unreachable(request, timeout):
        assert 0 < timeout <= 30
        raise OSError("Name or service not known")

    prepared = []
    monkeypatch.setattr(tfds, "has_tensorflow", lambda: True)
    monkeypatch.setattr(tfds.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(tfds, "prepare", lambda *args: prepared.append(args))
    for name in ("mnist", "binarized_mnist"):
        message = load_error(name)
        assert "not known" in message
        assert "--data_dir=FOLDER" in message
    assert not prepared


def test_published_mnist(mnist_dir):
    grey = load_dataset("mnist", data_dir=mnist_dir)
    assert grey.train.shape == (60000, 28, 28)
    assert grey.test.shape == (10000, 28, 28)
    # The mean of the training pixels, as everyone's normalisation has it.
    assert abs(grey.train.mean() / 255 - 0.1307) < 5e-5
    expected = "512880b4cede307e31b0407d3cbddd585204b591963f8c44dad4b9616ee3b73a"
    assert grey.provenance["sha256"] == expected
    rounded = load_dataset("binary_mnist", data_dir=mnist_dir)
    assert rounded.levels == 2
    np.testing.assert_array_equal(rounded.test, grey.test / 255 >= 0.5)


def test_files_of_fashion_mnist_are_told_from_those_of_mnist(small_mnist, monkeypatch):
    """They have the same names; the pixels say which they are."""
    folder, train, test = small_mnist
    as_mnist = load_dataset("mnist", data_dir=folder)
    message = load_error("fashion_mnist", data_dir=folder)
    assert "is MNIST, not Fashion-MNIST; use 'mnist'" in message
    sums = mnist._PIXELS_SHA256
    swapped = dict(zip(sums, reversed(sums.values()), strict=True))
    monkeypatch.setattr(mnist, "_PIXELS_SHA256", swapped)
    dataset = load_dataset("fashion_mnist", data_dir=folder)
    np.testing.assert_array_equal(dataset.train, train)
    np.testing.assert_array_equal(dataset.test, test)
    assert dataset.name == "fashion_mnist" and "Fashion-MNIST" in dataset.provenance["source"]
    assert dataset.levels == 256 and dataset.provenance["files"] == as_mnist.provenance["files"]
    assert "is Fashion-MNIST, not MNIST" in load_error("binary_mnist", data_dir=folder)
    (folder / f"{TEST}.gz").write_bytes(b"")
    assert "is not the published Fashion-MNIST" in load_error("fashion_mnist", data_dir=folder)
    (folder / f"{TEST}.gz").unlink()
    assert "images of Fashion-MNIST" in load_error("fashion_mnist", data_dir=folder)


def test_small_files_do_not_pass_for_the_published_ones(tmp_path):
    for name in (TRAIN, TEST):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(random_images(4))))
    assert "SHA-256" in load_error("mnist", data_dir=tmp_path)
