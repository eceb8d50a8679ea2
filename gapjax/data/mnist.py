"""MNIST and binarized MNIST, from the published files or from TensorFlow Datasets (TFDS).

Every source gives the same arrays in the same order: the published order is restored from the
shuffled order of TFDS, and checksums are verified.
"""

import gzip
import hashlib
import io
import pathlib
import re
import struct
import zlib

import numpy as np

from gapjax.data import tfds
from gapjax.data.dataset import DatasetError, Stored, one_line, reason

_MNIST = "mnist/3.0.1"
_BINARIZED_MNIST = "binarized_mnist/1.0.0"
_IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
# SHA-256 of the published files, as TFDS registers them for its builder mnist 3.0.1.
_FILES_SHA256 = {
    "train-images-idx3-ubyte.gz": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    "train-labels-idx1-ubyte.gz": (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
}
# SHA-256 of the published pixels, [N, 28, 28] uint8 in C order, without the IDX header.
_PIXELS_SHA256 = {
    "train": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "test": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
}
_BINARIZED_FILES = tuple(f"binarized_mnist_{s}.amat" for s in ("train", "valid", "test"))
_DOWNLOAD_URLS = {
    _MNIST: "https://storage.googleapis.com/cvdf-datasets/mnist/train-images-idx3-ubyte.gz",
    _BINARIZED_MNIST: "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
    "binarized_mnist_test.amat",
}
# A little more than the largest file unpacked has, 16 + 60,000 * 28 * 28: what is longer is not
# the published file, and is not unpacked into memory.
_MOST_BYTES = 48_000_000
_IDX_UINT8_RANK3_MAGIC = 0x00000803


def read_mnist(name: str, folder: pathlib.Path | None) -> Stored:
    """Reads MNIST.

    Args:
      name: What to call the data set; `grey_mnist` is called `mnist`.
      folder: A folder that TFDS prepared or one with the IDX files. None: TFDS's default folder,
        where TFDS downloads and prepares the data if they are missing.

    Returns:
      60,000 and 10,000 images with 256 levels, in the published order.

    Raises:
      DatasetError: if the data are missing or damaged.
    """
    if name == "grey_mnist":
        name = "mnist"
    if folder is None:
        return _read_default(name, _MNIST)
    if tfds.is_prepared(folder, _MNIST):
        return _read_prepared(name, folder, _MNIST)
    return _read_files(name, folder)


def read_binarized_mnist(name: str, folder: pathlib.Path | None) -> Stored:
    """Reads the published binarization of MNIST.

    Args:
      name: What to call the data set.
      folder: A folder that TFDS prepared or one with the three published files, which TFDS then
        prepares. None: TFDS's default folder, as in `read_mnist`.

    Returns:
      50,000 and 10,000 images with 2 levels, in the order that TFDS stores.

    Raises:
      DatasetError: if the data are missing or damaged.
    """
    if folder is None:
        return _read_default(name, _BINARIZED_MNIST)
    if tfds.is_prepared(folder, _BINARIZED_MNIST):
        return _read_prepared(name, folder, _BINARIZED_MNIST)
    _check_folder(folder)
    missing = [f for f in _BINARIZED_FILES if not (folder / f).is_file()]
    if missing:
        raise DatasetError(
            f"data_dir={str(folder)!r} holds neither a prepared {_BINARIZED_MNIST} nor "
            f"{', '.join(missing)}; give a folder with either, leave data_dir out to download, or "
            "use 'binary_mnist'"
        )
    target = tfds.default_dir()
    if not tfds.is_prepared(target, _BINARIZED_MNIST):
        if not tfds.has_tensorflow():
            raise DatasetError(
                f"preparing {name!r} from data_dir={str(folder)!r} needs TensorFlow; "
                "pip install tensorflow-cpu, or use 'binary_mnist'"
            )
        tfds.prepare(_BINARIZED_MNIST, target, folder, tfds.PREPARE_TIMEOUT)
    return _read_prepared(name, target, _BINARIZED_MNIST)


def _check_folder(folder: pathlib.Path) -> None:
    if not folder.is_dir():
        state = "is not a directory" if folder.exists() else "does not exist"
        raise DatasetError(
            f"data_dir={str(folder)!r} {state}; give a folder that TFDS prepared or one with the "
            "files of the data set"
        )


def _read_default(name: str, version: str) -> Stored:
    """Reads from TFDS's default directory; TFDS first prepares the data if they are missing."""
    target = tfds.default_dir()
    if not tfds.is_prepared(target, version):
        if version == _MNIST:
            cure = f"put the files {', '.join(_FILES_SHA256)} in a FOLDER and pass "
            cure += "--data_dir=FOLDER"
        else:
            cure = f"put the files {', '.join(_BINARIZED_FILES)} in a FOLDER and pass "
            cure += "--data_dir=FOLDER (needs TensorFlow), or use 'binary_mnist'"
        where = f"data set {name!r} is not in {str(target)!r} and cannot be downloaded"
        if not tfds.has_tensorflow():
            raise DatasetError(
                f"{where} without TensorFlow; {cure}, or pip install tensorflow-cpu where there is "
                "a network"
            )
        try:
            tfds.check_network(_DOWNLOAD_URLS[version])
            tfds.prepare(version, target, None, tfds.DOWNLOAD_TIMEOUT)
        except (DatasetError, OSError) as error:
            why = one_line(error) if isinstance(error, DatasetError) else reason(error)
            raise DatasetError(f"{where} ({why}); {cure}") from error
    return _read_prepared(name, target, version)


def _read_prepared(name: str, folder: pathlib.Path, version: str) -> Stored:
    """Reads what TFDS prepared; the images of MNIST are put in the published order."""
    parts, files = tfds.read_prepared(folder, version)
    if version == _BINARIZED_MNIST:
        return Stored(
            name=name,
            train=parts["train"],  # TFDS stores the bits as 0 and 1
            test=parts["test"],
            levels=2,
            source=f"TFDS {version}, prepared; the validation split is not used",
            binarization="as published (Larochelle and Murray)",
            files=files,
            note="images in the order that TFDS stores",
        )
    restored = {part: tfds.published_order(images, part) for part, images in parts.items()}
    published = all(
        hashlib.sha256(images.data).hexdigest() == _PIXELS_SHA256[part]
        for part, images in restored.items()
    )
    chosen = restored if published else parts
    return Stored(
        name=name,
        train=chosen["train"],
        test=chosen["test"],
        levels=256,
        source=f"TFDS {version}, prepared",
        files=files,
        note="" if published else "not the published 70,000 images; in the order that TFDS stores",
    )


def _read_files(name: str, folder: pathlib.Path) -> Stored:
    """Reads the published files in a folder, through TFDS if TensorFlow is installed."""
    _check_folder(folder)
    files: dict[str, str] = {}
    paths = {part: _find_images(folder, base) for part, base in _IMAGES.items()}
    train, test = (_read_idx_images(paths[part], part, files) for part in ("train", "test"))
    direct = Stored(
        name=name,
        train=train,
        test=test,
        levels=256,
        source="MNIST, the published IDX files, read straight",
        files=files,
    )
    # The files are verified. If anything fails from here on, they are used as they are.
    if not tfds.has_tensorflow() or not all((folder / f).is_file() for f in _FILES_SHA256):
        return direct
    target = tfds.default_dir()
    try:
        if not tfds.is_prepared(target, _MNIST):
            tfds.prepare(_MNIST, target, folder, tfds.PREPARE_TIMEOUT)
        prepared = _read_prepared(name, target, _MNIST)
    except DatasetError as error:
        # The provenance holds no local paths.
        why = re.sub(r"(?<!\w)/[^\s'\"]*/", "", one_line(error, 400))
        return direct._replace(note=f"not through TFDS: {why}")
    if not (np.array_equal(prepared.train, train) and np.array_equal(prepared.test, test)):
        return direct._replace(note="not through TFDS: what it prepared is not these files")
    return prepared._replace(
        source=f"TFDS {_MNIST}, prepared from the published IDX files",
        files=files | (prepared.files or {}),
    )


def _find_images(folder: pathlib.Path, base: str) -> pathlib.Path:
    for path in (folder / f"{base}.gz", folder / base):
        if path.exists():
            return path
    raise DatasetError(
        f"data_dir={str(folder)!r} holds neither a prepared {_MNIST} nor {base}.gz; put the four "
        f"MNIST files ({', '.join(_FILES_SHA256)}) there, or give the folder that has them"
    )


def _read_idx_images(path: pathlib.Path, part: str, files: dict[str, str]) -> np.ndarray:
    """Reads an IDX file of images, gzipped if its name ends in .gz, and verifies its checksum.

    Args:
      path: The file.
      part: "train" or "test".
      files: Receives the file's checksum under its name.

    Returns:
      uint8 [N, rows, columns].

    Raises:
      DatasetError: if the file is not the published one.
    """
    cure = "replace it by the published file"
    data, checksum = _read_bytes(path, cure)
    files[path.name] = checksum
    if len(data) < 16:
        raise DatasetError(
            f"{str(path)!r} is truncated: {len(data)} bytes, an IDX header has 16; {cure}"
        )
    magic, count, rows, columns = struct.unpack(">4I", data[:16])
    if magic != _IDX_UINT8_RANK3_MAGIC:
        raise DatasetError(
            f"{str(path)!r} is not an IDX file of uint8 images: magic number 0x{magic:08x}, "
            f"not 0x{_IDX_UINT8_RANK3_MAGIC:08x}; {cure}"
        )
    if len(data) != 16 + count * rows * columns:
        raise DatasetError(
            f"{str(path)!r} is truncated or corrupt: {len(data) - 16} bytes of pixels, its header "
            f"says {count} x {rows} x {columns}; {cure}"
        )
    if path.suffix == ".gz":
        actual, expected = checksum, _FILES_SHA256[path.name]
    else:
        actual, expected = hashlib.sha256(data[16:]).hexdigest(), _PIXELS_SHA256[part]
    if actual != expected:
        raise DatasetError(
            f"{str(path)!r} is not the published MNIST: SHA-256 {actual}, not {expected}; {cure}, "
            "or save other data as an .npz file and give its path"
        )
    return np.frombuffer(data, np.uint8, offset=16).reshape(count, rows, columns).copy()


def _read_bytes(path: pathlib.Path, cure: str) -> tuple[bytes, str]:
    """The contents of a file, unpacked if it is gzipped, and the SHA-256 of the file itself."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{str(path)!r} cannot be read ({reason(error)}); {cure}") from error
    checksum = hashlib.sha256(content).hexdigest()
    if path.suffix != ".gz":
        return content, checksum
    if content[:2] != b"\x1f\x8b":
        raise DatasetError(f"{str(path)!r} is not a gzip file; {cure}")
    try:
        with gzip.open(io.BytesIO(content)) as file:
            return file.read(_MOST_BYTES), checksum
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(
            f"{str(path)!r} is truncated or corrupt ({reason(error)}); {cure}"
        ) from error
