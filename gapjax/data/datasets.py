"""Names and paths to arrays of pixels: uint8, in two parts, with a record of where they are from.

    dataset = load_dataset("digits")
    dataset.train      # uint8 [1437, 8, 8]
    dataset.levels     # 2: pixels are 0 or 1

Every named set has one fixed training and one fixed test part. They depend on no seed but
`binarization_seed`, and not on which of several copies of the data was read: MNIST from a directory
that TensorFlow Datasets (TFDS) prepared and MNIST from the original IDX files are the same arrays
in the same order, with the same `provenance["sha256"]`.

TFDS and scikit-learn are imported where they are needed, so that importing this module is quick.
Reading never imports TensorFlow; preparing MNIST with TFDS needs it and happens in a process of
its own, which cannot disturb JAX and has a time limit.
"""

import difflib
import gzip
import hashlib
import importlib.util
import io
import operator
import os
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

BINARIZATIONS: tuple[str, ...] = ("threshold", "stochastic", "none")

_MAX_LEVELS = 256
_DIGITS_LEVELS = 17
_DIGITS_TEST_FRACTION = 0.2
_DIGITS_SPLIT_SEED = 0  # Part of what "digits" means; no user's seed ever replaces it.

_MNIST_VERSION = "mnist/3.0.1"
_BINARIZED_MNIST_VERSION = "binarized_mnist/1.0.0"
_MNIST_IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
# The SHA-256 of the published files, as TFDS registers them for its builder mnist 3.0.1.
_MNIST_FILES_SHA256 = {
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
# The SHA-256 of the published pixels alone, [N, 28, 28] uint8 in C order, without the IDX header.
_MNIST_PIXELS_SHA256 = {
    "train": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "test": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
}
_BINARIZED_MNIST_FILES = tuple(f"binarized_mnist_{s}.amat" for s in ("train", "valid", "test"))
_DOWNLOAD_URLS = {
    _MNIST_VERSION: "https://storage.googleapis.com/cvdf-datasets/mnist/train-images-idx3-ubyte.gz",
    _BINARIZED_MNIST_VERSION: "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
    "binarized_mnist_test.amat",
}
_NETWORK_TIMEOUT = 10.0  # seconds until a host that does not answer counts as unreachable
_PREPARE_TIMEOUT = 300.0  # seconds; preparing from files takes 10 to 30
_DOWNLOAD_TIMEOUT = 900.0  # seconds; binarized MNIST is 110 MB of text

_IDX_UINT8_RANK3_MAGIC = 0x00000803
_TFRECORD_HEADER = struct.Struct("<QI")  # length of the record, checksum of the length
_TFRECORD_FOOTER_SIZE = 4  # checksum of the record
_CHUNK = 8192  # images that are decoded or binarized at a time

# Runs in a process of its own: TensorFlow stays out of the process that runs JAX, what TFDS prints
# is caught, and a download that hangs can be ended.
_PREPARE_PROGRAM = """
import sys
version, directory, scratch, manual_dir = sys.argv[1:]
try:
    import tensorflow_datasets as tfds
    config = tfds.download.DownloadConfig(extract_dir=scratch, manual_dir=manual_dir or None)
    name = version.replace("/", ":")
    builder = tfds.builder(name, data_dir=directory, file_format="array_record")
    builder.download_and_prepare(download_dir=scratch, download_config=config)
except Exception as error:
    sys.exit(type(error).__name__ + ": " + " ".join(str(error).split()))
"""


class DatasetError(ValueError):
    """Data that cannot be had or used; one line: the argument or file, its value, what would do."""


class Dataset(NamedTuple):
    """A data set in two parts.

    Attributes:
      name: What it is called: the name given (`grey_mnist` is called `mnist`), or the file's name.
      train: Training images, uint8 [N_train, *event].
      test: Test images, uint8 [N_test, *event].
      levels: Pixels take the values 0 .. levels - 1.
      provenance: Where the arrays are from and what was done to them, as JSON-able values: `source`
        (a sentence), `num_train`, `num_test`, `binarization`, `sha256` (of both arrays, shapes and
        values: equal exactly when the data are), and, where files were read, `files`, a checksum
        for each file's name. `note` stands where there is something to say. Equal data may come
        from different files: to tell whether two runs saw the same data, compare `sha256` alone.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    levels: int
    provenance: dict[str, Any]

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return tuple(self.train.shape[1:])


class _Stored(NamedTuple):
    """What a reader returns: the data as they are stored, before any binarization."""

    name: str
    train: np.ndarray  # uint8 [N_train, *event]
    test: np.ndarray  # uint8 [N_test, *event]
    levels: int
    source: str
    binarization: str = "none"  # of the data as stored
    files: dict[str, str] | None = None  # file name to SHA-256
    note: str = ""


class _Entry(NamedTuple):
    """What a name stands for."""

    read: Callable[[str, pathlib.Path | None], _Stored]
    levels: int  # as stored
    binarization: str  # unless the caller says otherwise
    grey_name: str = ""  # where the name promises binary data: the name without the promise


def load_dataset(
    name_or_path: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    binarization: str | None = None,
    threshold: float = 0.5,
    binarization_seed: int = 0,
    levels: int | None = None,
) -> Dataset:
    """Loads a data set by its name, or from a file.

    | name            | event    | levels | is                                                     |
    |-----------------|----------|--------|--------------------------------------------------------|
    | digits          | (8, 8)   | 2      | scikit-learn's 1,797 handwritten digits, rounded [1]   |
    | grey_digits     | (8, 8)   | 17     | the same with all their levels                         |
    | mnist           | (28, 28) | 256    | 60,000 and 10,000 handwritten digits [2]               |
    | grey_mnist      | (28, 28) | 256    | another name for mnist                                 |
    | binary_mnist    | (28, 28) | 2      | mnist, pixel / 255 >= 0.5                              |
    | binarized_mnist | (28, 28) | 2      | a published random binarization, 50,000 and 10,000 [3] |

    The digits are split once and for all, 1,437 and 360, stratified by label.

    MNIST is looked for, in this order:

    1. in `data_dir`, prepared by TFDS: a folder `mnist/3.0.1`. TensorFlow is not needed;
    2. in `data_dir`, as the published IDX files, gzipped or not, with checksums verified. Where
       TensorFlow is installed and all four files are there, TFDS prepares them with `data_dir` as
       its `manual_dir` (once, into its default directory, in some 20 seconds) and the result is
       read. Where it is not, or that fails, the files are read straight;
    3. without a `data_dir`, prepared in TFDS's default directory (`TFDS_DATA_DIR`, otherwise
       `~/tensorflow_datasets`), where TFDS first prepares it if TensorFlow and a network are there.

    TFDS shuffles what it prepares; here the published order is restored and verified, so all ways
    give the same arrays. `binarized_mnist` goes the same ways, but for reading files straight.

    An `.npz` file holds integer arrays `train` and `test` (or, as Keras names them, `x_train` and
    `x_test`), [N, *event], and may hold a scalar `levels`.

    Args:
      name_or_path: One of `DATASETS`, or the path of an `.npz` file.
      data_dir: Folder to find MNIST in, see above. The digits and `.npz` files do not need it.
      binarization: "threshold": pixel / (levels - 1) >= threshold. "stochastic": pixel is 1 with
        probability pixel / (levels - 1), drawn once and independently for either part. "none": as
        stored. None: what the name stands for; "none" for a file.
      threshold: In (0, 1]; for "threshold" alone.
      binarization_seed: Non-negative; for "stochastic" alone.
      levels: Number of levels of the pixels as stored (before any binarization), 2 to 256. None:
        what the name stands for; for a file, its own `levels`, otherwise 2 if no pixel is above 1
        and 256 if one is.

    Returns:
      The data set.

    Raises:
      DatasetError: if an argument is wrong, or the data are not there or not usable. The message is
        one line.

    References:
      [1] E. Alpaydin, C. Kaynak. Optical Recognition of Handwritten Digits. UCI Machine Learning
        Repository, 1998.
      [2] Y. LeCun, C. Cortes, C. Burges. The MNIST database of handwritten digits. 1998.
      [3] H. Larochelle, I. Murray. The Neural Autoregressive Distribution Estimator. AISTATS 2011;
        the binarization of R. Salakhutdinov, I. Murray. On the Quantitative Analysis of Deep Belief
        Networks. ICML 2008.
    """
    _check_options(binarization, threshold, binarization_seed, levels)
    name = _path_text("name_or_path", name_or_path)
    folder = None if data_dir is None else pathlib.Path(_path_text("data_dir", data_dir))
    if name in _ENTRIES:
        stored, method = _read_named(name, folder, binarization, levels)
    elif name.lower().endswith(".npz"):
        stored, method = _read_npz(pathlib.Path(name), levels), binarization or "none"
    else:
        raise _unknown_name(name)
    _check_arrays(stored)

    if method != "none" and stored.levels == 2:
        raise DatasetError(
            f"binarization={method!r} does not fit {stored.name!r}, which is binary already; "
            "use binarization='none' or leave it out"
        )
    train, test, applied = stored.train, stored.test, stored.binarization
    if method == "threshold":
        train, test = (_threshold(x, stored.levels, threshold) for x in (train, test))
        applied = f"threshold {float(threshold):g}"
    elif method == "stochastic":
        train, test = (
            _stochastic(x, stored.levels, np.random.default_rng([binarization_seed, part]))
            for part, x in enumerate((train, test))
        )
        applied = f"stochastic, seed {int(binarization_seed)}"
    provenance: dict[str, Any] = {
        "source": stored.source,
        "num_train": len(train),
        "num_test": len(test),
        "binarization": applied,
        "sha256": _arrays_sha256(train, test),
    }
    if stored.files:
        provenance["files"] = dict(sorted(stored.files.items()))
    if stored.note:
        provenance["note"] = stored.note
    return Dataset(
        name=stored.name,
        train=train,
        test=test,
        levels=stored.levels if method == "none" else 2,
        provenance=provenance,
    )


# ---- arguments


def _one_line(value: object, limit: int = 200) -> str:
    """The text of a value or an error, on one line and not too long."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _reason(error: BaseException) -> str:
    return _one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _path_text(argument: str, value: object) -> str:
    """The text of a name or path, with ~ expanded."""
    try:
        text = os.fspath(value)  # type: ignore[arg-type]
    except TypeError:
        text = ""
    if not isinstance(text, str) or not text or "\0" in text:
        raise DatasetError(f"{argument}={_one_line(repr(value))} is not a name or path")
    return os.path.expanduser(text)


def _as_integer(value: object) -> int | None:
    """The value of an integer, NumPy's and 0-d arrays included; None for anything else."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _check_levels(argument: str, value: object) -> int:
    number = _as_integer(value)
    if number is None or not 2 <= number <= _MAX_LEVELS:
        raise DatasetError(
            f"{argument}={_one_line(repr(value))} is not a number of pixel levels; "
            f"give an integer from 2 to {_MAX_LEVELS}"
        )
    return number


def _check_options(
    binarization: str | None, threshold: float, binarization_seed: int, levels: int | None
) -> None:
    if binarization is not None and binarization not in BINARIZATIONS:
        raise DatasetError(
            f"binarization={_one_line(repr(binarization))} is unknown; "
            f"give one of {', '.join(BINARIZATIONS)}"
        )
    try:
        usable = 0.0 < float(threshold) <= 1.0  # False for NaN.
    except (TypeError, ValueError):
        usable = False
    if not usable:
        raise DatasetError(
            f"threshold={_one_line(repr(threshold))} is not usable; give a number above 0 and at "
            "most 1"
        )
    seed = _as_integer(binarization_seed)
    if seed is None or seed < 0:
        raise DatasetError(
            f"binarization_seed={_one_line(repr(binarization_seed))} is not usable; "
            "give a non-negative integer"
        )
    if levels is not None:
        _check_levels("levels", levels)


def _unknown_name(name: str) -> DatasetError:
    known = f"give one of {', '.join(DATASETS)}, or the path of an .npz file"
    if os.path.isdir(name):
        return DatasetError(f"name_or_path={name!r} is a directory; {known}")
    if os.path.exists(name):
        return DatasetError(f"name_or_path={name!r} is not an .npz file; {known}")
    close = difflib.get_close_matches(name.lower().replace("-", "_"), DATASETS, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return DatasetError(f"unknown data set {_one_line(repr(name))}{hint}; {known}")


def _read_named(
    name: str, folder: pathlib.Path | None, binarization: str | None, levels: int | None
) -> tuple[_Stored, str]:
    """Reads a named set; returns it as stored, and the binarization to apply."""
    entry = _ENTRIES[name]
    if levels is not None and levels != entry.levels:
        raise DatasetError(
            f"levels={levels} does not fit {name!r}, which is stored with {entry.levels}; "
            "leave it out"
        )
    if binarization == "none" and entry.grey_name:
        raise DatasetError(
            f"binarization='none' contradicts {name!r}; for its grey levels use {entry.grey_name!r}"
        )
    if binarization not in (None, "none") and entry.levels == 2:
        raise DatasetError(
            f"binarization={binarization!r} does not fit {name!r}, which is binary already; "
            "to binarize anew use 'binary_mnist'"
        )
    return entry.read(name, folder), binarization or entry.binarization


# ---- arrays


def _check_arrays(stored: _Stored) -> None:
    """Refuses parts that are empty, have no event, differ in event shape or exceed the levels."""
    for part, x in (("train", stored.train), ("test", stored.test)):
        what = f"{part!r} of {stored.name!r}"
        if x.ndim < 2:
            raise DatasetError(f"{what} has shape {x.shape}; give at least two axes, [N, *event]")
        if x.size == 0:
            raise DatasetError(f"{what} has shape {x.shape} and is empty; give one image or more")
        highest = int(x.max())
        if highest >= stored.levels:
            raise DatasetError(
                f"{what} has the value {highest}, which does not fit levels={stored.levels}; "
                f"values must be 0 to {stored.levels - 1}"
            )
    if stored.train.shape[1:] != stored.test.shape[1:]:
        raise DatasetError(
            f"'train' and 'test' of {stored.name!r} have images of different shapes, "
            f"{stored.train.shape[1:]} and {stored.test.shape[1:]}; give both the same"
        )


def _threshold(x: np.ndarray, levels: int, threshold: float) -> np.ndarray:
    """Rounds x / (levels - 1) to 1 from the threshold up, and to 0 below."""
    lowest = np.argmax(np.arange(levels) / (levels - 1) >= threshold)
    return (x >= lowest).astype(np.uint8)


def _stochastic(x: np.ndarray, levels: int, generator: np.random.Generator) -> np.ndarray:
    """Draws a Bernoulli(x / (levels - 1)) for every pixel; the ends 0 and 1 are exact."""
    probability = np.arange(levels) / (levels - 1)
    result = np.empty(x.shape, np.uint8)
    for start in range(0, len(x), _CHUNK):
        part = x[start : start + _CHUNK]
        result[start : start + _CHUNK] = generator.random(part.shape) < probability[part]
    return result


def _arrays_sha256(train: np.ndarray, test: np.ndarray) -> str:
    digest = hashlib.sha256()
    for part, x in (("train", train), ("test", test)):
        digest.update(f"{part} {x.dtype.name} {list(x.shape)}\n".encode())
        digest.update(np.ascontiguousarray(x))
    return digest.hexdigest()


# ---- the digits


def _read_digits(name: str, folder: pathlib.Path | None) -> _Stored:
    del folder  # They come with scikit-learn.
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DatasetError(
            f"data set {name!r} needs scikit-learn ({_reason(error)}); pip install scikit-learn"
        ) from error

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.uint8)
    train, test = train_test_split(
        images, test_size=_DIGITS_TEST_FRACTION, random_state=_DIGITS_SPLIT_SEED, stratify=labels
    )
    return _Stored(
        name=name,
        train=train,
        test=test,
        levels=_DIGITS_LEVELS,
        source="scikit-learn load_digits, fixed stratified split with 20 % for the test",
    )


# ---- MNIST


def _read_mnist(name: str, folder: pathlib.Path | None) -> _Stored:
    if name == "grey_mnist":
        name = "mnist"
    if folder is None:
        return _read_tfds_default(name, _MNIST_VERSION)
    if _is_prepared(folder, _MNIST_VERSION):
        return _read_prepared(name, folder, _MNIST_VERSION)
    return _read_mnist_files(name, folder)


def _read_binarized_mnist(name: str, folder: pathlib.Path | None) -> _Stored:
    if folder is None:
        return _read_tfds_default(name, _BINARIZED_MNIST_VERSION)
    if _is_prepared(folder, _BINARIZED_MNIST_VERSION):
        return _read_prepared(name, folder, _BINARIZED_MNIST_VERSION)
    _check_folder(folder)
    missing = [f for f in _BINARIZED_MNIST_FILES if not (folder / f).is_file()]
    if missing:
        raise DatasetError(
            f"data_dir={str(folder)!r} holds neither a prepared {_BINARIZED_MNIST_VERSION} nor "
            f"{', '.join(missing)}; give a folder with either, leave data_dir out to download, or "
            "use 'binary_mnist'"
        )
    target = _tfds_default_dir()
    if not _is_prepared(target, _BINARIZED_MNIST_VERSION):
        if not _has_tensorflow():
            raise DatasetError(
                f"preparing {name!r} from data_dir={str(folder)!r} needs TensorFlow; "
                "pip install tensorflow-cpu, or use 'binary_mnist'"
            )
        _prepare(_BINARIZED_MNIST_VERSION, target, folder, _PREPARE_TIMEOUT)
    return _read_prepared(name, target, _BINARIZED_MNIST_VERSION)


def _check_folder(folder: pathlib.Path) -> None:
    if not folder.is_dir():
        state = "is not a directory" if folder.exists() else "does not exist"
        raise DatasetError(
            f"data_dir={str(folder)!r} {state}; give a folder that TFDS prepared or one with the "
            "files of the data set"
        )


def _read_mnist_files(name: str, folder: pathlib.Path) -> _Stored:
    """Reads the published files in a folder, through TFDS where TensorFlow is installed."""
    _check_folder(folder)
    paths = {}
    for part, base in _MNIST_IMAGES.items():
        candidates = [folder / f"{base}.gz", folder / base]
        found = [path for path in candidates if path.exists()]
        if not found:
            raise DatasetError(
                f"data_dir={str(folder)!r} holds neither a prepared {_MNIST_VERSION} nor "
                f"{base}.gz; put the four MNIST files ({', '.join(_MNIST_FILES_SHA256)}) there, "
                "or give the folder that has them"
            )
        paths[part] = found[0]
    files: dict[str, str] = {}
    train, test = (_read_idx_images(paths[part], part, files) for part in ("train", "test"))
    straight = _Stored(
        name=name,
        train=train,
        test=test,
        levels=256,
        source="MNIST, the published IDX files, read straight",
        files=files,
    )
    # The files are good: whatever goes wrong from here on, they are what is read.
    if not _has_tensorflow() or not all((folder / f).is_file() for f in _MNIST_FILES_SHA256):
        return straight
    target = _tfds_default_dir()
    try:
        if not _is_prepared(target, _MNIST_VERSION):
            _prepare(_MNIST_VERSION, target, folder, _PREPARE_TIMEOUT)
        prepared = _read_prepared(name, target, _MNIST_VERSION)
    except DatasetError as error:
        # Where things lie on this machine is no part of where the data are from.
        reason = re.sub(r"(?<!\w)/[^\s'\"]*/", "", _one_line(error, 400))
        return straight._replace(note=f"not through TFDS: {reason}")
    if not (np.array_equal(prepared.train, train) and np.array_equal(prepared.test, test)):
        return straight._replace(note="not through TFDS: what it prepared is not these files")
    return prepared._replace(
        source=f"TFDS {_MNIST_VERSION}, prepared from the published IDX files",
        files=files | (prepared.files or {}),
    )


def _read_idx_images(path: pathlib.Path, part: str, files: dict[str, str]) -> np.ndarray:
    """Reads an IDX file of images, gzipped if its name ends in .gz, and verifies its checksum.

    Args:
      path: The file.
      part: "train" or "test".
      files: Gets the file's checksum under its name.

    Returns:
      uint8 [N, rows, columns].
    """
    cure = "replace it by the published file"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{str(path)!r} cannot be read ({_reason(error)}); {cure}") from error
    files[path.name] = hashlib.sha256(content).hexdigest()
    if path.suffix == ".gz":
        if content[:2] != b"\x1f\x8b":
            raise DatasetError(f"{str(path)!r} is not a gzip file; {cure}")
        try:
            data = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DatasetError(
                f"{str(path)!r} is truncated or corrupt ({_reason(error)}); {cure}"
            ) from error
    else:
        data = content
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
        actual, expected = files[path.name], _MNIST_FILES_SHA256[path.name]
    else:
        actual, expected = hashlib.sha256(data[16:]).hexdigest(), _MNIST_PIXELS_SHA256[part]
    if actual != expected:
        raise DatasetError(
            f"{str(path)!r} is not the published MNIST: SHA-256 {actual}, not {expected}; {cure}, "
            "or save other data as an .npz file and give its path"
        )
    return np.frombuffer(data, np.uint8, offset=16).reshape(count, rows, columns).copy()


# ---- TensorFlow Datasets


def _tfds_default_dir() -> pathlib.Path:
    """Where TFDS prepares data unless told otherwise."""
    default = os.path.join("~", "tensorflow_datasets")
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or default).expanduser()


def _is_prepared(folder: pathlib.Path, version: str) -> bool:
    return (folder / version / "dataset_info.json").is_file()


def _has_tensorflow() -> bool:
    try:
        return importlib.util.find_spec("tensorflow") is not None
    except (ImportError, ValueError):  # A stand-in, or one that was forbidden.
        return False


def _read_tfds_default(name: str, version: str) -> _Stored:
    """Reads from TFDS's default directory, where TFDS first downloads and prepares the data."""
    target = _tfds_default_dir()
    if not _is_prepared(target, version):
        if version == _MNIST_VERSION:
            cure = f"put the files {', '.join(_MNIST_FILES_SHA256)} in a FOLDER and pass "
            cure += "--data_dir=FOLDER"
        else:
            cure = f"put the files {', '.join(_BINARIZED_MNIST_FILES)} in a FOLDER and pass "
            cure += "--data_dir=FOLDER (needs TensorFlow), or use 'binary_mnist'"
        where = f"data set {name!r} is not in {str(target)!r} and cannot be downloaded"
        if not _has_tensorflow():
            raise DatasetError(
                f"{where} without TensorFlow; {cure}, or pip install tensorflow-cpu where there is "
                "a network"
            )
        try:
            _check_network(_DOWNLOAD_URLS[version])
            _prepare(version, target, None, _DOWNLOAD_TIMEOUT)
        except (DatasetError, OSError) as error:
            reason = _one_line(error) if isinstance(error, DatasetError) else _reason(error)
            raise DatasetError(f"{where} ({reason}); {cure}") from error
    return _read_prepared(name, target, version)


def _check_network(url: str) -> None:
    """Raises an OSError, and soon, where a download could not even start."""
    request = urllib.request.Request(url, method="HEAD")
    with urllib.request.urlopen(request, timeout=_NETWORK_TIMEOUT):
        pass


def _prepare(
    version: str, folder: pathlib.Path, manual_dir: pathlib.Path | None, timeout: float
) -> None:
    """Has TFDS prepare a data set, in another process.

    Args:
      version: The builder's name and version, as in "mnist/3.0.1".
      folder: Where to prepare it.
      manual_dir: Where the files are; None to download them.
      timeout: Seconds until that process is ended.

    Raises:
      DatasetError: if it fails.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    what = f"TFDS could not prepare {version} in {str(folder)!r}"
    with tempfile.TemporaryDirectory(prefix="gapjax-") as scratch:
        manual = "" if manual_dir is None else str(manual_dir.resolve())
        arguments = [version, str(folder.resolve()), scratch, manual]
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", _PREPARE_PROGRAM, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise DatasetError(f"{what} within {timeout:g} seconds") from error
        except OSError as error:
            raise DatasetError(f"{what} ({_reason(error)})") from error
    if done.returncode != 0 or not _is_prepared(folder, version):
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else f"exit code {done.returncode}"
        raise DatasetError(f"{what} ({_one_line(last)})")


def _read_prepared(name: str, folder: pathlib.Path, version: str) -> _Stored:
    """Reads what TFDS has prepared, without TensorFlow."""
    directory = folder / version
    try:
        import tensorflow_datasets as tfds
        from PIL import Image
    except ImportError as error:
        raise DatasetError(
            f"reading {str(directory)!r} needs packages that are not installed ({_reason(error)}); "
            "pip install tensorflow-datasets pillow importlib_resources"
        ) from error

    files: dict[str, str] = {}
    parts = {}
    # Whatever TFDS, array_record and Pillow raise here means that this directory is of no use.
    try:
        builder = tfds.builder_from_directory(directory)
        for part in ("train", "test"):
            split = builder.info.splits[part]
            paths = [pathlib.Path(path) for path in split.filepaths]
            images = np.stack(
                [
                    np.asarray(Image.open(io.BytesIO(png)))
                    for png in _prepared_pngs(tfds, builder, part, paths)
                ]
            )
            if len(images) != split.num_examples:
                raise ValueError(f"{len(images)} of {split.num_examples} records in {part!r}")
            if images.dtype != np.uint8 or images.ndim != 3:
                shape = images.shape[1:]
                raise ValueError(f"{part!r} holds {images.dtype} {shape}, not grey uint8")
            parts[part] = images
            files |= {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    except Exception as error:
        raise DatasetError(
            f"{str(directory)!r} cannot be read ({_reason(error)}); delete it and prepare it again"
        ) from error

    if version == _BINARIZED_MNIST_VERSION:
        return _Stored(
            name=name,
            # TFDS writes the bits 0 and 1 as they are.
            train=parts["train"],
            test=parts["test"],
            levels=2,
            source=f"TFDS {version}, prepared; the validation split is not used",
            binarization="as published (Larochelle and Murray)",
            files=files,
            note="images in the order that TFDS stores",
        )
    restored = {part: _published_order(images, part) for part, images in parts.items()}
    published = all(
        hashlib.sha256(images).hexdigest() == _MNIST_PIXELS_SHA256[part]
        for part, images in restored.items()
    )
    return _Stored(
        name=name,
        **(restored if published else parts),
        levels=256,
        source=f"TFDS {version}, prepared",
        files=files,
        note="" if published else "not the published 70,000 images; in the order that TFDS stores",
    )


def _prepared_pngs(
    tfds: Any, builder: Any, part: str, paths: list[pathlib.Path]
) -> Iterator[bytes]:
    """Yields the encoded images of a prepared split, in stored order."""
    decoders = {"image": tfds.decode.SkipDecoding()}
    if builder.info.file_format.value == "tfrecord":
        features = builder.info.features
        for record in _tfrecords(paths):
            yield features.deserialize_example_np(record, decoders=decoders)["image"]
        return
    source = builder.as_data_source(part, decoders=decoders)
    for start in range(0, len(source), _CHUNK):
        indices = range(start, min(start + _CHUNK, len(source)))
        for example in source.__getitems__(list(indices)):  # Many at once is much faster.
            yield example["image"]


def _tfrecords(paths: list[pathlib.Path]) -> Iterator[bytes]:
    """Yields the records of TFRecord files, TFDS's default format, which it reads by TensorFlow."""
    for path in paths:
        data = path.read_bytes()
        position = 0
        while position < len(data):
            length, _ = _TFRECORD_HEADER.unpack_from(data, position)
            position += _TFRECORD_HEADER.size
            if position + length + _TFRECORD_FOOTER_SIZE > len(data):
                raise ValueError(f"{path.name!r} is truncated")
            yield data[position : position + length]
            position += length + _TFRECORD_FOOTER_SIZE


def _published_order(images: np.ndarray, part: str) -> np.ndarray:
    """Undoes the shuffle of TFDS, which stores example i by the MD5 of its split's name and i.

    Args:
      images: uint8 [N, *event], as stored.
      part: The split's name.

    Returns:
      uint8 [N, *event]; example i is image i of the published file.
    """
    digests = [
        hashlib.md5(f"{part}{index}".encode(), usedforsecurity=False).digest()
        for index in range(len(images))
    ]
    result = np.empty_like(images)
    result[sorted(range(len(images)), key=digests.__getitem__)] = images
    return result


# ---- files of the user's


def _read_npz(path: pathlib.Path, levels: int | None) -> _Stored:
    """Reads an .npz file; see `load_dataset` for what it holds."""
    if not path.exists():
        raise DatasetError(f"name_or_path={str(path)!r} does not exist; give an .npz file")
    if not path.is_file():
        raise DatasetError(f"name_or_path={str(path)!r} is a directory; give an .npz file")
    cure = "save it again with numpy.savez(file, train=..., test=...)"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{str(path)!r} cannot be read ({_reason(error)})") from error
    if content[:2] != b"PK":
        raise DatasetError(f"{str(path)!r} is not an .npz file, or truncated or corrupt; {cure}")
    arrays = {}
    # A damaged archive raises errors of many types, from zipfile, zlib and NumPy's own parser.
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            names = list(archive.files)
            for keys in (("train", "test"), ("x_train", "x_test")):
                if set(keys) <= set(names):
                    arrays = dict(zip(("train", "test"), (archive[k] for k in keys), strict=True))
                    break
            own_levels = archive["levels"] if "levels" in names else None
        for part, x in arrays.items():
            if not isinstance(x, np.ndarray):  # What NumPy makes of a member that is not an array.
                raise ValueError(f"{part!r} is not an array")
    except Exception as error:
        raise DatasetError(
            f"{str(path)!r} is truncated, corrupt or holds Python objects ({_reason(error)}); "
            f"{cure}"
        ) from error
    if not arrays:
        raise DatasetError(
            f"{str(path)!r} holds {_one_line(sorted(names))}, not 'train' and 'test' (nor 'x_train'"
            f" and 'x_test'); {cure}"
        )
    if own_levels is not None:
        own = _check_levels(f"'levels' of {path.name!r}: levels", own_levels)
        if levels is not None and levels != own:
            raise DatasetError(
                f"levels={levels} does not fit {path.name!r}, which says levels={own}; leave it out"
            )
        levels = own
    train, test = (_as_uint8(x, part, path.name) for part, x in arrays.items())
    if levels is None:
        binary = all(x.max(initial=0) <= 1 for x in (train, test))
        levels = 2 if binary else _MAX_LEVELS
    return _Stored(
        name=path.name,
        train=train,
        test=test,
        levels=int(levels),
        source=f"the file {path.name}",
        files={path.name: hashlib.sha256(content).hexdigest()},
    )


def _as_uint8(x: np.ndarray, part: str, name: str) -> np.ndarray:
    """The same values as uint8 in C order; refuses what is not a whole number from 0 to 255."""
    what = f"{part!r} of {name!r}"
    if x.dtype.kind not in "uib":
        nan = " and contains NaN" if x.dtype.kind in "fc" and np.isnan(x).any() else ""
        raise DatasetError(
            f"{what} has dtype {x.dtype}{nan}; give integers 0 to levels - 1, for x in [0, 1] "
            "for example numpy.round(255 * x).astype(numpy.uint8)"
        )
    if x.size and (x.min() < 0 or x.max() >= _MAX_LEVELS):
        raise DatasetError(
            f"{what} has values from {x.min()} to {x.max()}; give integers 0 to levels - 1, "
            f"at most {_MAX_LEVELS - 1}"
        )
    return np.array(x, dtype=np.uint8, order="C")


_ENTRIES: dict[str, _Entry] = {
    "digits": _Entry(_read_digits, _DIGITS_LEVELS, "threshold"),
    "grey_digits": _Entry(_read_digits, _DIGITS_LEVELS, "none"),
    "mnist": _Entry(_read_mnist, 256, "none"),
    "grey_mnist": _Entry(_read_mnist, 256, "none"),
    "binary_mnist": _Entry(_read_mnist, 256, "threshold", grey_name="mnist"),
    "binarized_mnist": _Entry(_read_binarized_mnist, 2, "none"),
}
DATASETS: tuple[str, ...] = tuple(_ENTRIES)
