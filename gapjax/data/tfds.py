"""Preparing data sets by TensorFlow Datasets (TFDS), and reading what it prepared.

Reading does not import TensorFlow. Preparing needs it and happens in a process of its own, so that
TensorFlow cannot interfere with JAX and a download that hangs can be ended.
"""

import hashlib
import importlib.util
import io
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np

from gapjax.data.dataset import DatasetError, one_line, reason

_TIMEOUT = 900.0  # seconds; binarized MNIST is 110 MB of text to download
_NETWORK_TIMEOUT = 10.0  # seconds until a host that does not answer counts as unreachable

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


def default_dir() -> pathlib.Path:
    """The directory where TFDS prepares data by default."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def is_prepared(folder: pathlib.Path, version: str) -> bool:
    """Whether TFDS has prepared a version of a data set, such as "mnist/3.0.1", in a folder."""
    return (folder / version / "dataset_info.json").is_file()


def has_tensorflow() -> bool:
    """Whether TensorFlow is installed; it is not imported."""
    return importlib.util.find_spec("tensorflow") is not None


def check_network(url: str) -> None:
    """Raises OSError if the host of a URL cannot be reached, so that no download could start."""
    request = urllib.request.Request(url, method="HEAD")
    with urllib.request.urlopen(request, timeout=_NETWORK_TIMEOUT):
        pass


def prepare(
    version: str, folder: pathlib.Path, manual_dir: pathlib.Path | None, timeout: float = _TIMEOUT
) -> None:
    """Prepares a version in a folder by another process, from `manual_dir` or by a download."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    what = f"TFDS could not prepare {version} in {str(folder)!r}"
    with tempfile.TemporaryDirectory(prefix="gapjax-") as scratch:
        manual = "" if manual_dir is None else str(manual_dir.resolve())
        arguments = [version, str(folder.resolve()), scratch, manual]
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", _PREPARE_PROGRAM, *arguments],
                env=environment, stdin=subprocess.DEVNULL, capture_output=True,
                timeout=timeout, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise DatasetError(f"{what} within {timeout:g} seconds") from error
    if done.returncode != 0 or not is_prepared(folder, version):
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else f"exit code {done.returncode}"
        raise DatasetError(f"{what} ({one_line(last)})")


def read_prepared(
    folder: pathlib.Path, version: str
) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Training and test images uint8 [N, rows, columns] as stored, and the SHA-256 by file."""
    directory = folder / version
    try:
        import tensorflow_datasets as tfds
        from PIL import Image
    except ImportError as error:
        raise DatasetError(
            f"reading {str(directory)!r} needs packages that are not installed ({reason(error)}); "
            "pip install tensorflow-datasets pillow importlib_resources, or install gapjax with "
            "its extra 'experiments'"
        ) from error

    files: dict[str, str] = {}
    parts: dict[str, Any] = {}
    # TFDS, array_record and Pillow raise errors of many types for a damaged directory.
    try:
        builder = tfds.builder_from_directory(directory)
        for part in ("train", "test"):
            split = builder.info.splits[part]
            paths = [pathlib.Path(path) for path in split.filepaths]
            pngs = _prepared_pngs(tfds, builder, part, paths)
            images = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in pngs])
            if len(images) != split.num_examples:
                raise ValueError(f"{len(images)} of {split.num_examples} records in {part!r}")
            if images.dtype != np.uint8 or images.ndim != 3:
                held = f"{images.dtype} {images.shape[1:]}"
                raise ValueError(f"{part!r} holds {held}, not grey uint8")
            parts[part] = images
            files |= {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    except Exception as error:
        raise DatasetError(
            f"{str(directory)!r} cannot be read ({reason(error)}); delete it and prepare it again"
        ) from error
    return parts["train"], parts["test"], files


def published_order(images: np.ndarray, part: str) -> np.ndarray:
    """Undoes the shuffle of TFDS, which sorts examples by the MD5 of the split's name and index."""

    def digest(index: int) -> bytes:
        return hashlib.md5(f"{part}{index}".encode(), usedforsecurity=False).digest()

    result = np.empty_like(images)
    result[sorted(range(len(images)), key=digest)] = images
    return result


def _prepared_pngs(
    tfds: Any, builder: Any, part: str, paths: list[pathlib.Path]
) -> Iterator[bytes]:
    """Yields the encoded images of a prepared split in the order stored."""
    decoders = {"image": tfds.decode.SkipDecoding()}
    if builder.info.file_format.value == "tfrecord":
        features = builder.info.features
        for record in _tfrecords(paths):
            yield features.deserialize_example_np(record, decoders=decoders)["image"]
        return
    source = builder.as_data_source(part, decoders=decoders)
    for example in source.__getitems__(list(range(len(source)))):  # faster than one at a time
        yield example["image"]


def _tfrecords(paths: list[pathlib.Path]) -> Iterator[bytes]:
    """Yields the records of TFRecord files, which TFDS itself reads with TensorFlow alone."""
    for path in paths:
        data = path.read_bytes()
        end = 0
        while end < len(data):
            # A record is its length and a checksum of that, 12 bytes; its data; their checksum.
            length, _ = struct.unpack_from("<QI", data, end)
            start, end = end + 12, end + 12 + length + 4
            if end > len(data):
                raise ValueError(f"{path.name!r} is truncated")
            yield data[start : start + length]
