"""Tests of gapjax.data.datasets.

Those of the whole MNIST read the folder that GAPJAX_MNIST_DIR names, or ../shared/data/mnist where
it exists, and are skipped, saying so, where neither does. No test needs TensorFlow or a network:
directories such as TFDS prepares are made in miniature by TFDS itself, which needs TensorFlow to
encode an image or to unpack a file, but not for images that are encoded already.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from gapjax.data import datasets
from gapjax.data.datasets import DATASETS, Dataset, DatasetError, load_dataset

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_TRAIN, _TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"


@pytest.fixture(autouse=True)
def _no_default_directory(monkeypatch, tmp_path):
    """Keeps the machine's own TFDS directory and TensorFlow out of the tests."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds_default"))
    monkeypatch.setattr(datasets, "_has_tensorflow", lambda: False)


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


def _error(*args, **kwargs) -> str:
    """The message of the error that loading raises; it must be one line."""
    with pytest.raises(DatasetError) as caught:
        load_dataset(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def _images(count: int, seed: int = 0, shape=(28, 28), levels: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, levels, (count, *shape), dtype=np.uint8)


def _idx(images: np.ndarray, magic: int = 0x803) -> bytes:
    return struct.pack(">4I", magic, *images.shape) + images.tobytes()


def _pixels_sha256(images: np.ndarray) -> str:
    return hashlib.sha256(images.tobytes()).hexdigest()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A folder of four small files that count as the published ones, and their images."""
    folder = tmp_path / "idx"
    folder.mkdir()
    train, test = _images(40, 1), _images(20, 2)
    contents = {
        _TRAIN: _idx(train),
        _TEST: _idx(test),
        "train-labels-idx1-ubyte": b"labels",
        "t10k-labels-idx1-ubyte": b"labels",
    }
    checksums = {}
    for name, content in contents.items():
        packed = gzip.compress(content, mtime=0)
        (folder / f"{name}.gz").write_bytes(packed)
        checksums[f"{name}.gz"] = hashlib.sha256(packed).hexdigest()
    monkeypatch.setattr(datasets, "_MNIST_FILES_SHA256", checksums)
    monkeypatch.setattr(
        datasets,
        "_MNIST_PIXELS_SHA256",
        {"train": _pixels_sha256(train), "test": _pixels_sha256(test)},
    )
    return folder, train, test


# ---- the digits


def test_digits_are_scikit_learns_rounded_and_split_once_and_for_all():
    dataset = load_dataset("digits")
    assert isinstance(dataset, Dataset)
    assert dataset.train.shape == (1437, 8, 8)
    assert dataset.test.shape == (360, 8, 8)
    assert dataset.event_shape == (8, 8)
    assert dataset.train.dtype == dataset.test.dtype == np.uint8
    assert dataset.levels == 2
    assert set(np.unique(dataset.train)) == {0, 1}
    assert dataset.provenance["binarization"] == "threshold 0.5"
    # The split is part of what "digits" means: no release of scikit-learn may change it unseen.
    expected = "01784d7e3e20808922ea7ded40efca639a70a0a7ace73a7289c06f8717103623"
    assert dataset.provenance["sha256"] == expected


def test_grey_digits_hold_every_digit_once_with_stratified_labels():
    from sklearn.datasets import load_digits

    grey = load_dataset("grey_digits")
    assert grey.levels == 17
    assert grey.provenance["binarization"] == "none"
    images, labels = load_digits(return_X_y=True)
    both = np.concatenate([grey.train, grey.test]).reshape(-1, 64)
    assert sorted(map(bytes, both)) == sorted(map(bytes, images.astype(np.uint8)))
    label_of = {bytes(x): y for x, y in zip(images.astype(np.uint8), labels, strict=True)}
    counts = np.bincount([label_of[bytes(x)] for x in grey.test.reshape(-1, 64)], minlength=10)
    assert np.all(np.abs(counts - 0.2 * np.bincount(labels)) < 1)

    rounded = load_dataset("digits")
    np.testing.assert_array_equal(rounded.train, grey.train >= 8)
    assert load_dataset("digits", binarization="none").levels == 17


def test_split_and_rounding_depend_on_no_seed():
    np.random.seed(1)  # noqa: NPY002
    first = load_dataset("digits", binarization_seed=1)
    np.random.seed(2)  # noqa: NPY002
    second = load_dataset("digits", binarization_seed=2)
    assert first.provenance == second.provenance


# ---- binarization


def test_stochastic_binarization_is_drawn_once_from_the_grey_levels():
    grey = load_dataset("grey_digits")
    dataset = load_dataset("digits", binarization="stochastic", binarization_seed=3)
    again = load_dataset("digits", binarization="stochastic", binarization_seed=3)
    other = load_dataset("digits", binarization="stochastic", binarization_seed=4)
    assert dataset.levels == 2
    assert dataset.provenance["binarization"] == "stochastic, seed 3"
    np.testing.assert_array_equal(dataset.train, again.train)
    np.testing.assert_array_equal(dataset.test, again.test)
    assert dataset.provenance["sha256"] != other.provenance["sha256"]
    for level in range(17):
        drawn = dataset.train[grey.train == level]
        if level in (0, 16):
            assert np.all(drawn == level // 16)
        else:
            error = np.sqrt(level / 16 * (1 - level / 16) / drawn.size)
            assert abs(drawn.mean() - level / 16) < 5 * error


def test_stochastic_binarization_draws_either_part_on_its_own(tmp_path):
    same = np.full((50, 16), 100, np.uint8)
    np.savez(tmp_path / "same.npz", train=same, test=same)
    dataset = load_dataset(tmp_path / "same.npz", binarization="stochastic")
    assert not np.array_equal(dataset.train, dataset.test)


def test_chunks_do_not_change_the_draws(monkeypatch):
    whole = load_dataset("digits", binarization="stochastic")
    monkeypatch.setattr(datasets, "_CHUNK", 100)
    assert load_dataset("digits", binarization="stochastic").provenance == whole.provenance


@pytest.mark.parametrize(
    ("threshold", "lowest"), [(0.5, 128), (1.0, 255), (100 / 255, 100), (1e-9, 1)]
)
def test_threshold_is_met_from_its_level_up(tmp_path, threshold, lowest):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.savez(tmp_path / "all.npz", train=levels, test=levels)
    dataset = load_dataset(tmp_path / "all.npz", binarization="threshold", threshold=threshold)
    np.testing.assert_array_equal(dataset.train, levels >= lowest)
    assert dataset.provenance["binarization"] == f"threshold {threshold:g}"


def test_what_is_binary_is_not_binarized_again(tmp_path):
    bits = _images(10, shape=(4,), levels=2)
    np.savez(tmp_path / "bits.npz", train=bits, test=bits)
    for method in ("threshold", "stochastic"):
        assert "binary already" in _error(tmp_path / "bits.npz", binarization=method)
        # Known without the data, so said without them.
        assert "binary already" in _error("binarized_mnist", binarization=method)
    assert "'mnist'" in _error("binary_mnist", binarization="none")


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"binarization": "round"}, ["binarization='round'", "threshold, stochastic, none"]),
        ({"threshold": 0.0}, ["threshold=0.0", "above 0"]),
        ({"threshold": 1.5}, ["threshold=1.5"]),
        ({"threshold": float("nan")}, ["threshold=nan"]),
        ({"threshold": "half"}, ["threshold='half'"]),
        ({"binarization_seed": -1}, ["binarization_seed=-1", "non-negative"]),
        ({"binarization_seed": 1.5}, ["binarization_seed=1.5"]),
        ({"binarization_seed": True}, ["binarization_seed=True"]),
        ({"levels": 1}, ["levels=1", "2 to 256"]),
        ({"levels": 257}, ["levels=257"]),
        ({"levels": 16.0}, ["levels=16.0"]),
        ({"levels": 16}, ["levels=16", "'digits'", "17"]),
    ],
)
def test_unusable_arguments(arguments, words):
    message = _error("digits", **arguments)
    assert all(word in message for word in words), message


def test_unknown_names_are_answered_by_the_known_ones(tmp_path):
    message = _error("binary-mnst")
    assert "did you mean 'binary_mnist'" in message
    assert all(name in message for name in DATASETS)
    assert "is a directory" in _error(tmp_path)
    text = tmp_path / "data.csv"
    text.write_text("1,2")
    assert "not an .npz" in _error(text)
    for nothing in ("", None, 3, "a\0b"):
        assert "name_or_path=" in _error(nothing)


def test_a_folder_of_the_same_name_does_not_hide_a_name(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("digits").test) == 360


# ---- .npz files


def test_npz_file(tmp_path):
    train, test = _images(12, shape=(3, 5)), _images(7, 1, shape=(3, 5))
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
    train, test = _images(12, shape=(4, 4)), _images(8, 1, shape=(4, 4))

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
    x = _images(10, shape=(4,), levels=5)
    np.savez(path, train=x, test=x)
    assert load_dataset(path).levels == 256
    assert load_dataset(path, levels=5).levels == 5
    message = _error(path, levels=4)
    assert "levels=4" in message
    assert "value 4" in message
    np.savez(path, train=x, test=x, levels=5)
    assert load_dataset(path).levels == 5
    assert load_dataset(path, levels=5).levels == 5
    assert "levels=5" in _error(path, levels=6)
    np.savez(path, train=x > 2, test=x > 2)
    assert load_dataset(path).levels == 2
    for levels in (1, 300, 2.5, [2, 3], True):
        np.savez(path, train=x, test=x, levels=levels)
        assert "2 to 256" in _error(path)


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
    message = _error(tmp_path / "x.npz")
    assert all(word in message for word in words), message


def test_unusable_test_arrays_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", train=np.ones((3, 4), np.uint8), test=np.ones((3, 4)))
    assert "'test'" in _error(tmp_path / "x.npz")


def test_damaged_npz_files(tmp_path):
    good = tmp_path / "good.npz"
    np.savez_compressed(good, train=_images(20), test=_images(20))
    content = good.read_bytes()
    bad = tmp_path / "bad.npz"
    for length in (0, 1, 10, 100, len(content) // 2, len(content) - 1):
        bad.write_bytes(content[:length])
        message = _error(bad)
        assert "bad.npz" in message
        assert "truncated" in message
    for position in range(0, len(content), len(content) // 40):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        bad.write_bytes(damaged)
        # Some bytes mean nothing; all that must not happen is another error, or other images.
        with contextlib.suppress(DatasetError):
            np.testing.assert_array_equal(load_dataset(bad).train, _images(20))


def test_npz_files_that_are_something_else(tmp_path):
    path = tmp_path / "x.npz"
    assert "does not exist" in _error(path)
    path.mkdir()
    assert "is a directory" in _error(path)
    path = tmp_path / "y.npz"
    path.write_text("no archive")
    assert "not an .npz" in _error(path)
    with path.open("wb") as file:
        np.save(file, _images(3))
    assert "not an .npz" in _error(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train.npy", "no array")
        archive.writestr("test.npy", "no array")
    assert "y.npz" in _error(path)
    np.savez(path, training=_images(3), test=_images(3))
    message = _error(path)
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
    assert "Python objects" in _error(tmp_path / "x.npz")
    assert not _Trap.sprung


# ---- MNIST from IDX files


def test_checksums_are_those_that_tfds_registers():
    tfds = pytest.importorskip("tensorflow_datasets")
    listed = pathlib.Path(tfds.__file__).parent / "url_checksums" / "mnist.txt"
    registered = {}
    for line in listed.read_text().splitlines():
        _, _, checksum, name = line.split("\t")
        registered[name] = checksum
    assert datasets._MNIST_FILES_SHA256 == registered


def test_idx_files_gzipped_or_not(small_mnist):
    folder, train, test = small_mnist
    dataset = load_dataset("mnist", data_dir=folder)
    np.testing.assert_array_equal(dataset.train, train)
    np.testing.assert_array_equal(dataset.test, test)
    assert dataset.levels == 256
    assert set(dataset.provenance["files"]) == {f"{_TRAIN}.gz", f"{_TEST}.gz"}
    assert str(folder) not in json.dumps(dataset.provenance)

    for name in (_TRAIN, _TEST):
        packed = folder / f"{name}.gz"
        (folder / name).write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    plain = load_dataset("grey_mnist", data_dir=str(folder))
    assert plain.name == "mnist"
    assert plain.provenance["sha256"] == dataset.provenance["sha256"]
    (folder / _TRAIN).write_bytes(_idx(train ^ 1))
    assert "not the published" in _error("mnist", data_dir=folder)


def _damage_truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _damage_flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def _repack(change):
    return lambda content: gzip.compress(change(gzip.decompress(content)), mtime=0)


@pytest.mark.parametrize("name", [_TRAIN, _TEST])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: b"", ["not a gzip"]),
        (lambda content: content[:1], ["not a gzip"]),
        (lambda content: content[:5], ["truncated"]),
        (_damage_truncate, ["truncated"]),
        (lambda content: content[:-1], ["truncated"]),
        (_damage_flip, ["corrupt"]),
        (lambda content: content[:10] + b"\xff" + content[11:], ["corrupt"]),  # no such block
        (gzip.decompress, ["not a gzip"]),
        (lambda content: b"<html>Not found</html>", ["not a gzip"]),
        (_repack(lambda data: b""), ["truncated", "0 bytes"]),
        (_repack(lambda data: data[:15]), ["truncated", "15 bytes"]),
        (_repack(lambda data: b"\0\0\x08\1" + data[4:]), ["0x00000801", "0x00000803"]),
        (_repack(lambda data: data[:-1]), ["header"]),
        (_repack(lambda data: data + b"\0"), ["header"]),
        (_repack(lambda data: data[:-1] + bytes([data[-1] ^ 1])), ["SHA-256", ".npz"]),
    ],
)
def test_damaged_idx_files(small_mnist, name, damage, words):
    folder, _, _ = small_mnist
    path = folder / f"{name}.gz"
    path.write_bytes(damage(path.read_bytes()))
    message = _error("binary_mnist", data_dir=folder)
    assert all(word in message for word in [path.name, *words]), message


def test_incomplete_folders(small_mnist, tmp_path):
    folder, _, _ = small_mnist
    (folder / f"{_TEST}.gz").unlink()
    message = _error("mnist", data_dir=folder)
    assert f"nor {_TEST}.gz" in message
    assert "does not exist" in _error("mnist", data_dir=tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("")
    assert "not a directory" in _error("mnist", data_dir=file)
    (folder / f"{_TEST}.gz").mkdir()
    assert "cannot be read" in _error("mnist", data_dir=folder)
    assert "binary_mnist" in _error("binarized_mnist", data_dir=folder)


def test_without_files_tensorflow_or_network_one_line_says_what_to_do(monkeypatch, tmp_path):
    message = _error("mnist")
    for word in ("tfds_default", "pip install tensorflow-cpu", f"{_TRAIN}.gz", "--data_dir=FOLDER"):
        assert word in message
    assert "binary_mnist" in _error("binarized_mnist")

    def unreachable(request, timeout):
        assert 0 < timeout <= 30
        raise OSError("Name or service not known")

    prepared = []
    monkeypatch.setattr(datasets, "_has_tensorflow", lambda: True)
    monkeypatch.setattr(datasets.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(datasets, "_prepare", lambda *args: prepared.append(args))
    for name in ("mnist", "binarized_mnist"):
        message = _error(name)
        assert "not known" in message
        assert "--data_dir=FOLDER" in message
    assert not prepared


# ---- MNIST by TensorFlow Datasets


def _prepare_small(folder: pathlib.Path, dataset: str, splits: dict[str, np.ndarray]) -> None:
    """Prepares a directory by a TFDS builder like the real one, but with these images."""
    tfds = pytest.importorskip("tensorflow_datasets")
    from PIL import Image

    def png(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        file.seek(0)
        return file

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset
        VERSION = tfds.core.Version({"mnist": "3.0.1", "binarized_mnist": "1.0.0"}[dataset])

        def _info(self):
            image = tfds.features.Image(shape=(28, 28, 1))
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"image": image})
            )

        def _split_generators(self, dl_manager):
            return {part: self._generate_examples(images) for part, images in splits.items()}

        def _generate_examples(self, images):
            for index, image in enumerate(images):
                yield index, {"image": png(image)}

    Builder(data_dir=folder, file_format="array_record").download_and_prepare()


def test_prepared_directory_is_read_in_the_published_order(small_mnist, tmp_path, capfd):
    folder, train, test = small_mnist
    straight = load_dataset("mnist", data_dir=folder)
    _prepare_small(tmp_path / "tfds", "mnist", {"train": train, "test": test})
    capfd.readouterr()
    dataset = load_dataset("mnist", data_dir=tmp_path / "tfds")
    assert capfd.readouterr() == ("", "")
    np.testing.assert_array_equal(dataset.train, train)
    np.testing.assert_array_equal(dataset.test, test)
    assert dataset.provenance["sha256"] == straight.provenance["sha256"]
    assert dataset.provenance["source"] == "TFDS mnist/3.0.1, prepared"
    assert "note" not in dataset.provenance
    shards = {path.name for path in (tmp_path / "tfds/mnist/3.0.1").glob("*.array_record*")}
    assert set(dataset.provenance["files"]) == shards
    assert len(shards) == 2
    assert str(tmp_path) not in json.dumps(dataset.provenance)
    assert "tensorflow" not in sys.modules

    rounded = load_dataset("binary_mnist", data_dir=tmp_path / "tfds")
    np.testing.assert_array_equal(rounded.train, train >= 128)

    # A directory goes before files beside it, and the default directory is used without a name.
    for file in folder.iterdir():
        (tmp_path / "tfds" / file.name).write_bytes(b"")
    assert load_dataset("mnist", data_dir=tmp_path / "tfds").provenance == dataset.provenance
    (tmp_path / "tfds").rename(tmp_path / "tfds_default")
    assert load_dataset("mnist").provenance == dataset.provenance


def test_other_images_in_a_prepared_directory_are_not_called_published(tmp_path):
    train, test = _images(15, 5), _images(10, 6)
    _prepare_small(tmp_path, "mnist", {"train": train, "test": test})
    dataset = load_dataset("mnist", data_dir=tmp_path)
    assert sorted(map(bytes, dataset.train)) == sorted(map(bytes, train))
    assert not np.array_equal(dataset.train, train)  # as stored: TFDS shuffles
    assert "not the published" in dataset.provenance["note"]


def test_prepared_tfrecords_are_read_without_tensorflow(small_mnist, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    _, train, test = small_mnist
    _prepare_small(tmp_path, "mnist", {"train": train, "test": test})
    directory = tmp_path / "mnist" / "3.0.1"
    builder = tfds.builder_from_directory(directory)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    for part in ("train", "test"):
        records = list(builder.as_data_source(part, deserialize_method=raw))
        content = b"".join(struct.pack("<QI", len(r), 0) + r + bytes(4) for r in records)
        (directory / f"mnist-{part}.tfrecord-00000-of-00001").write_bytes(content)
        (directory / f"mnist-{part}.array_record-00000-of-00001").unlink()
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    dataset = load_dataset("mnist", data_dir=tmp_path)
    np.testing.assert_array_equal(dataset.train, train)
    np.testing.assert_array_equal(dataset.test, test)
    (directory / "mnist-test.tfrecord-00000-of-00001").write_bytes(content[:-5])
    assert "truncated" in _error("mnist", data_dir=tmp_path)
    (directory / "mnist-test.tfrecord-00000-of-00001").write_bytes(content[: len(content) // 20])
    assert "cannot be read" in _error("mnist", data_dir=tmp_path)


def test_damaged_prepared_directories(small_mnist, tmp_path):
    _, train, test = small_mnist
    _prepare_small(tmp_path, "mnist", {"train": train, "test": test})
    directory = tmp_path / "mnist" / "3.0.1"
    shard = directory / "mnist-test.array_record-00000-of-00001"
    content = shard.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\0" * len(content)):
        shard.write_bytes(damaged)
        message = _error("mnist", data_dir=tmp_path)
        assert "mnist/3.0.1" in message
        assert "prepare it again" in message
    shard.unlink()
    assert "prepare it again" in _error("mnist", data_dir=tmp_path)
    (directory / "dataset_info.json").write_text("{")
    assert "prepare it again" in _error("mnist", data_dir=tmp_path)


def test_binarized_mnist_is_read_as_published(tmp_path):
    splits = {part: _images(10, i, levels=2) for i, part in enumerate(("train", "validation"))}
    splits["test"] = _images(8, 7, levels=2)
    _prepare_small(tmp_path, "binarized_mnist", splits)
    dataset = load_dataset("binarized_mnist", data_dir=tmp_path)
    assert sorted(map(bytes, dataset.train)) == sorted(map(bytes, splits["train"]))
    assert sorted(map(bytes, dataset.test)) == sorted(map(bytes, splits["test"]))
    assert dataset.levels == 2
    assert dataset.provenance["binarization"] == "as published (Larochelle and Murray)"


def test_tfds_prepares_from_the_folder_where_tensorflow_is(small_mnist, tmp_path, monkeypatch):
    folder, train, test = small_mnist
    calls = []

    def prepare(version, target, manual_dir, timeout):
        calls.append((version, manual_dir))
        assert timeout > 0
        _prepare_small(target, "mnist", {"train": train, "test": test})

    monkeypatch.setattr(datasets, "_has_tensorflow", lambda: True)
    monkeypatch.setattr(datasets, "_prepare", prepare)
    straight = load_dataset("mnist", data_dir=_without_labels(folder, tmp_path / "images"))
    assert calls == []
    for _ in range(2):
        dataset = load_dataset("mnist", data_dir=folder)
        assert dataset.provenance["source"].startswith("TFDS mnist/3.0.1, prepared from")
        assert dataset.provenance["sha256"] == straight.provenance["sha256"]
        assert {f"{_TRAIN}.gz", f"{_TEST}.gz"} < set(dataset.provenance["files"])
    assert calls == [("mnist/3.0.1", folder)]


def _without_labels(folder: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    target.mkdir()
    for name in (_TRAIN, _TEST):
        (target / f"{name}.gz").write_bytes((folder / f"{name}.gz").read_bytes())
    return target


def test_files_are_read_straight_where_tfds_fails(small_mnist, tmp_path, monkeypatch):
    folder, train, _ = small_mnist
    monkeypatch.setattr(datasets, "_has_tensorflow", lambda: True)
    # For real: another process, in which no TensorFlow and no such checksums can be found.
    dataset = load_dataset("mnist", data_dir=folder)
    np.testing.assert_array_equal(dataset.train, train)
    assert "read straight" in dataset.provenance["source"]
    assert "could not prepare" in dataset.provenance["note"]
    assert str(tmp_path) not in json.dumps(dataset.provenance)

    # What lies prepared is something else: the files that were named are what counts.
    _prepare_small(tmp_path / "tfds_default", "mnist", {"train": _images(3), "test": _images(3)})
    dataset = load_dataset("mnist", data_dir=folder)
    np.testing.assert_array_equal(dataset.train, train)
    assert "not these files" in dataset.provenance["note"]

    # And files that are no good are no good, whatever lies prepared.
    (folder / f"{_TRAIN}.gz").write_bytes(b"")
    assert "not a gzip" in _error("mnist", data_dir=folder)


def test_preparing_has_a_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_PREPARE_PROGRAM", "import time; time.sleep(60)")
    with pytest.raises(DatasetError, match=r"within 0\.2 seconds"):
        datasets._prepare("mnist/3.0.1", tmp_path, None, 0.2)
    monkeypatch.setattr(datasets, "_PREPARE_PROGRAM", "raise SystemExit('a\\nlast line')")
    with pytest.raises(DatasetError, match=r"\(last line\)$"):
        datasets._prepare("mnist/3.0.1", tmp_path, None, 60.0)
    monkeypatch.setattr(datasets, "_PREPARE_PROGRAM", "")
    with pytest.raises(DatasetError, match="exit code 0"):
        datasets._prepare("mnist/3.0.1", tmp_path, None, 60.0)


# ---- the whole MNIST


def test_published_mnist(mnist_dir):
    mnist = load_dataset("mnist", data_dir=mnist_dir)
    assert mnist.train.shape == (60000, 28, 28)
    assert mnist.test.shape == (10000, 28, 28)
    # The mean of the training pixels, as everyone's normalisation has it.
    assert abs(mnist.train.mean() / 255 - 0.1307) < 5e-5
    expected = "512880b4cede307e31b0407d3cbddd585204b591963f8c44dad4b9616ee3b73a"
    assert mnist.provenance["sha256"] == expected
    for name, checksum in mnist.provenance["files"].items():
        assert checksum == datasets._MNIST_FILES_SHA256[name]
    rounded = load_dataset("binary_mnist", data_dir=mnist_dir)
    assert rounded.levels == 2
    np.testing.assert_array_equal(rounded.test, mnist.test / 255 >= 0.5)


def test_small_files_do_not_pass_for_the_published_ones(tmp_path):
    for name in (_TRAIN, _TEST):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(_idx(_images(4))))
    assert "SHA-256" in _error("mnist", data_dir=tmp_path)


def test_importing_is_quick():
    program = (
        "import sys, importlib.util as u\n"
        "s = u.spec_from_file_location('d', sys.argv[1]); m = u.module_from_spec(s)\n"
        "sys.modules['d'] = m; s.loader.exec_module(m)\n"
        "print([x for x in ('sklearn', 'tensorflow_datasets', 'PIL', 'jax') if x in sys.modules])"
    )
    command = [sys.executable, "-c", program, datasets.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
