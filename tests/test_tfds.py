"""Data sets prepared by TensorFlow Datasets (TFDS).

TFDS itself prepares small directories like the real ones. It needs TensorFlow to encode an image
or to unpack a file, but not for images that are encoded already.
"""

import json
import struct
import sys

import numpy as np
import pytest
from small_data import TRAIN, load_error, prepare_small, random_images

from gapjax.data import DatasetError, load_dataset, tfds

pytestmark = pytest.mark.usefixtures("no_default_directory")


def test_prepared_directory_is_read_in_the_published_order(small_mnist, tmp_path, capfd):
    folder, train, test = small_mnist
    straight = load_dataset("mnist", data_dir=folder)
    prepare_small(tmp_path / "tfds", "mnist", {"train": train, "test": test})
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


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_other_images_in_a_prepared_directory_are_not_called_published(tmp_path, name):
    train, test = random_images(15, 5), random_images(10, 6)
    prepare_small(tmp_path, name, {"train": train, "test": test})
    dataset = load_dataset(name, data_dir=tmp_path)
    assert sorted(map(bytes, dataset.train)) == sorted(map(bytes, train))
    assert not np.array_equal(dataset.train, train)  # as stored: TFDS shuffles
    assert "not the published" in dataset.provenance["note"]


def test_prepared_tfrecords_are_read_without_tensorflow(small_mnist, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    _, train, test = small_mnist
    prepare_small(tmp_path, "mnist", {"train": train, "test": test})
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
    assert "truncated" in load_error("mnist", data_dir=tmp_path)
    (directory / "mnist-test.tfrecord-00000-of-00001").write_bytes(content[: len(content) // 20])
    assert "cannot be read" in load_error("mnist", data_dir=tmp_path)


def test_damaged_prepared_directories(small_mnist, tmp_path):
    _, train, test = small_mnist
    prepare_small(tmp_path, "mnist", {"train": train, "test": test})
    directory = tmp_path / "mnist" / "3.0.1"
    shard = directory / "mnist-test.array_record-00000-of-00001"
    content = shard.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\0" * len(content)):
        shard.write_bytes(damaged)
        message = load_error("mnist", data_dir=tmp_path)
        assert "mnist/3.0.1" in message
        assert "prepare it again" in message
    shard.unlink()
    assert "prepare it again" in load_error("mnist", data_dir=tmp_path)
    (directory / "dataset_info.json").write_text("{")
    assert "prepare it again" in load_error("mnist", data_dir=tmp_path)


def test_binarized_mnist_is_read_as_published(tmp_path):
    splits = {
        part: random_images(10, i, levels=2) for i, part in enumerate(("train", "validation"))
    }
    splits["test"] = random_images(8, 7, levels=2)
    prepare_small(tmp_path, "binarized_mnist", splits)
    dataset = load_dataset("binarized_mnist", data_dir=tmp_path)
    assert sorted(map(bytes, dataset.train)) == sorted(map(bytes, splits["train"]))
    assert sorted(map(bytes, dataset.test)) == sorted(map(bytes, splits["test"]))
    assert dataset.levels == 2
    assert dataset.provenance["binarization"] == "as published (Larochelle and Murray)"


def test_published_files_are_read_straight_whatever_lies_prepared(
    small_mnist, tmp_path, monkeypatch
):
    folder, train, _ = small_mnist
    monkeypatch.setattr(tfds, "has_tensorflow", lambda: True)
    monkeypatch.setattr(tfds, "prepare", lambda *_: pytest.fail("prepared"))
    prepare_small(
        tmp_path / "tfds_default", "mnist", {"train": random_images(3), "test": random_images(3)}
    )
    dataset = load_dataset("mnist", data_dir=folder)
    np.testing.assert_array_equal(dataset.train, train)
    assert "read straight" in dataset.provenance["source"] and "note" not in dataset.provenance
    (folder / f"{TRAIN}.gz").write_bytes(b"")
    assert "not the published" in load_error("mnist", data_dir=folder)


def test_preparing_has_a_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, "_PREPARE_PROGRAM", "import time; time.sleep(60)")
    with pytest.raises(DatasetError, match=r"within 0\.2 seconds"):
        tfds.prepare("mnist/3.0.1", tmp_path, None, 0.2)
    monkeypatch.setattr(tfds, "_PREPARE_PROGRAM", "raise SystemExit('a\\nlast line')")
    with pytest.raises(DatasetError, match=r"\(last line\)$"):
        tfds.prepare("mnist/3.0.1", tmp_path, None, 60.0)
    monkeypatch.setattr(tfds, "_PREPARE_PROGRAM", "")
    with pytest.raises(DatasetError, match="exit code 0"):
        tfds.prepare("mnist/3.0.1", tmp_path, None, 60.0)
