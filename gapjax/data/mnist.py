"""MNIST, Fashion-MNIST and binarized MNIST, as published or by TensorFlow Datasets (TFDS).

Every source gives the same arrays: the shuffle of TFDS is undone. The pixels are verified, and not
the files that they came in.
"""

import functools
import gzip
import hashlib
import io
import pathlib
import zlib

import numpy as np

from gapjax.data import tfds
from gapjax.data.dataset import DatasetError, Stored, one_line, reason

_MNIST, _FASHION_MNIST = "mnist/3.0.1", "fashion_mnist/3.0.1"
_BINARIZED_MNIST = "binarized_mnist/1.0.0"
_IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
_TITLES = {_MNIST: "MNIST", _FASHION_MNIST: "Fashion-MNIST"}  # whose files have the same names
# SHA-256 of the published pixels, [N, 28, 28] uint8 in C order, without the IDX header.
_PIXELS_SHA256 = {
    _MNIST: {
        "train": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
        "test": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    },
    _FASHION_MNIST: {
        "train": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
        "test": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
    },
}
_BINARIZED_FILES = tuple(f"binarized_mnist_{s}.amat" for s in ("train", "valid", "test"))
_DOWNLOAD_URLS = {
    _MNIST: "https://storage.googleapis.com/cvdf-datasets/mnist/train-images-idx3-ubyte.gz",
    _FASHION_MNIST: "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    "train-images-idx3-ubyte.gz",
    _BINARIZED_MNIST: "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
    "binarized_mnist_test.amat",
}
_HEADER = 16  # bytes of an IDX file before its pixels
_MOST_BYTES = 48_000_000  # unpacked into memory; the largest file has 16 + 60,000 * 28 * 28


def read_mnist(name: str, folder: pathlib.Path | None, version: str = _MNIST) -> Stored:
    """60,000 and 10,000 images in the published order; `load_dataset` says where it looks."""
    name = "mnist" if name == "grey_mnist" else name
    if folder is None:
        files, ending = tuple(f"{base}.gz" for base in _IMAGES.values()), ""
        if version == _BINARIZED_MNIST:
            files, ending = _BINARIZED_FILES, " (needs TensorFlow), or use 'binary_mnist'"
        cure = f"put the files {', '.join(files)} in a FOLDER and pass --data_dir=FOLDER{ending}"
        return _read_default(name, version, None, cure)
    if tfds.is_prepared(folder, version):
        return _read_prepared(name, folder, version)
    if not folder.is_dir():
        state = "is not a directory" if folder.exists() else "does not exist"
        raise DatasetError(
            f"data_dir={str(folder)!r} {state}; give a folder that TFDS prepared or one with the "
            "files of the data set"
        )
    if version in _TITLES:
        return _read_files(name, folder, version)
    missing = [file for file in _BINARIZED_FILES if not (folder / file).is_file()]
    if missing:
        raise DatasetError(
            f"data_dir={str(folder)!r} holds neither a prepared {version} nor "
            f"{', '.join(missing)}; give a folder with either, leave data_dir out to download, or "
            "use 'binary_mnist'"
        )
    return _read_default(name, version, folder, "use 'binary_mnist'")


read_fashion_mnist = functools.partial(read_mnist, version=_FASHION_MNIST)
# The published binarization: 50,000 and 10,000 images in the order that TFDS stores.
read_binarized_mnist = functools.partial(read_mnist, version=_BINARIZED_MNIST)


def _read_default(name: str, version: str, files: pathlib.Path | None, cure: str) -> Stored:
    """Reads from TFDS's default directory, where TFDS first prepares what is missing.

    It takes the published files from a folder, or downloads them.
    """
    target = tfds.default_dir()
    if not tfds.is_prepared(target, version):
        where = f"data set {name!r} is not in {str(target)!r} and cannot be prepared"
        if not tfds.has_tensorflow():
            raise DatasetError(f"{where} without TensorFlow; {cure}, or pip install tensorflow-cpu")
        try:
            if files is None:
                tfds.check_network(_DOWNLOAD_URLS[version])
            tfds.prepare(version, target, files)
        except (DatasetError, OSError) as error:
            why = one_line(error) if isinstance(error, DatasetError) else reason(error)
            raise DatasetError(f"{where} ({why}); {cure}") from error
    return _read_prepared(name, target, version)


def _read_prepared(name: str, folder: pathlib.Path, version: str) -> Stored:
    """Reads what TFDS prepared; the images of MNIST are put in the published order."""
    train, test, files = tfds.read_prepared(folder, version)
    source = f"TFDS {version}, prepared"
    if version == _BINARIZED_MNIST:
        source += "; the validation split is not used"
        method = "as published (Larochelle and Murray)"
        note = "images in the order that TFDS stores"
        return Stored(name, train, test, 2, source, method, files, note)  # stored as 0 and 1
    stored = Stored(name, train, test, 256, source, files=files)
    train, test = tfds.published_order(train, "train"), tfds.published_order(test, "test")
    if {"train": _sha256(train.data), "test": _sha256(test.data)} == _PIXELS_SHA256[version]:
        return stored._replace(train=train, test=test)
    return stored._replace(note="not the published 70,000 images; in the order that TFDS stores")


def _read_files(name: str, folder: pathlib.Path, version: str) -> Stored:
    """Reads the published files in a folder."""
    files: dict[str, str] = {}
    paths = {part: _find_images(folder, base, version) for part, base in _IMAGES.items()}
    train, test = (_read_idx_images(paths[part], part, version, files) for part in paths)
    source = f"{_TITLES[version]}, the published IDX files, read straight"
    return Stored(name, train, test, 256, source, files=files)


def _find_images(folder: pathlib.Path, base: str, version: str) -> pathlib.Path:
    for name in (base, base.replace("-idx3", ".idx3")):  # as unpacked by some
        for path in (folder / f"{name}.gz", folder / name):
            if path.exists():
                return path
    raise DatasetError(
        f"data_dir={str(folder)!r} holds neither a prepared {version} nor {base}.gz; put the "
        f"images of {_TITLES[version]} ({', '.join(_IMAGES.values())}, gzipped or not) there, or "
        "give their folder"
    )


def _read_idx_images(
    path: pathlib.Path, part: str, version: str, files: dict[str, str]
) -> np.ndarray:
    """The images uint8 [N, 28, 28] of an IDX file, verified; adds its SHA-256 to `files`."""
    try:
        content = data = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(content)) as file:
                data = file.read(_MOST_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(
            f"{str(path)!r} cannot be read, is truncated or corrupt ({reason(error)}); replace it "
            "by the published file"
        ) from error
    pixels, files[path.name] = data[_HEADER:], _sha256(content)
    found, title = _sha256(pixels), _TITLES[version]
    for other, sums in _PIXELS_SHA256.items():
        if found == sums[part] and other != version:
            raise DatasetError(
                f"{str(path)!r} is {_TITLES[other]}, not {title}; use "
                f"{other.partition('/')[0]!r}, or give the folder of {title}"
            )
    if found != (expected := _PIXELS_SHA256[version][part]):
        raise DatasetError(
            f"{str(path)!r} is not the published {title}: {len(data)} bytes, whose pixels have the "
            f"SHA-256 {found}, not {expected}; replace it by the published file, or save other "
            "data as an .npz file and give its path"
        )
    return np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28).copy()


def _sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
