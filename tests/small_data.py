"""Small data sets that the tests of gapjax.data make, and what they share."""

import gzip
import hashlib
import io
import pathlib
import struct

import numpy as np
import pytest

from gapjax.data import DatasetError, load_dataset, mnist, tfds

TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"


@pytest.fixture
def no_default_directory(monkeypatch, tmp_path):
    """Keeps the machine's own TFDS directory and TensorFlow out of the tests."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds_default"))
    monkeypatch.setattr(tfds, "has_tensorflow", lambda: False)


def load_error(*args, **kwargs) -> str:
    """The message of the error that loading raises; it must be one line."""
    with pytest.raises(DatasetError) as caught:
        load_dataset(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def random_images(count: int, seed: int = 0, shape=(28, 28), levels: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, levels, (count, *shape), dtype=np.uint8)


def idx_bytes(images: np.ndarray, magic: int = 0x803) -> bytes:
    return struct.pack(">4I", magic, *images.shape) + images.tobytes()


def pixels_sha256(images: np.ndarray) -> str:
    return hashlib.sha256(images.tobytes()).hexdigest()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A folder of four small files that count as the published ones, and their images."""
    folder = tmp_path / "idx"
    folder.mkdir()
    train, test = random_images(40, 1), random_images(20, 2)
    contents = {
        TRAIN: idx_bytes(train),
        TEST: idx_bytes(test),
        "train-labels-idx1-ubyte": b"labels",
        "t10k-labels-idx1-ubyte": b"labels",
    }
    for name, content in contents.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
    sums = {"train": pixels_sha256(train), "test": pixels_sha256(test)}
    monkeypatch.setitem(mnist._PIXELS_SHA256, "mnist/3.0.1", sums)
    return folder, train, test


def prepare_small(folder: pathlib.Path, dataset: str, splits: dict[str, np.ndarray]) -> None:
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
        VERSION = tfds.core.Version("1.0.0" if dataset == "binarized_mnist" else "3.0.1")

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
