"""The type `Dataset`, its error, and the checks that every reader's arrays pass."""

import hashlib
import operator
import os
from typing import Any, NamedTuple

import numpy as np

MAX_LEVELS = 256
"""The most levels that a pixel can have, as pixels are uint8."""


class DatasetError(ValueError):
    """Data that cannot be found or used.

    The message is one line. It names the argument or file, its value, and what would work.
    """


class Dataset(NamedTuple):
    """A data set with a training part and a test part.

    Attributes:
      name: The name of the data set, or of its file. Aliases are resolved: `grey_mnist` is named
        `mnist`.
      train: Training images, uint8 [N_train, *event].
      test: Test images, uint8 [N_test, *event].
      levels: Number of pixel levels; pixels take the values 0 .. levels - 1.
      provenance: Where the arrays come from and how they were processed, as values that JSON can
        hold: `source` (a sentence), `num_train`, `num_test`, `binarization`, `sha256` (a checksum
        of the shapes and values of both parts), `files` (the SHA-256 of each file that was read,
        by name; absent if there is none) and `note` (a remark; absent if there is none). The same
        data can come from different files, so compare `sha256` alone to find out whether two runs
        used the same data.
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


class Stored(NamedTuple):
    """The data as a reader returns them, before any binarization.

    Attributes:
      name: The name of the data set, or of its file.
      train: uint8 [N_train, *event].
      test: uint8 [N_test, *event].
      levels: Number of pixel levels.
      source: Where the data come from, in a sentence without local paths.
      binarization: How the stored data were binarized; "none" if they were not.
      files: The SHA-256 of each file that was read, by name.
      note: A remark for the provenance.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    levels: int
    source: str
    binarization: str = "none"
    files: dict[str, str] | None = None
    note: str = ""


def as_dataset(
    stored: Stored, train: np.ndarray, test: np.ndarray, levels: int, binarization: str
) -> Dataset:
    """Adds the provenance to the arrays.

    Args:
      stored: What the reader returned.
      train: Training images after binarization, uint8 [N_train, *event].
      test: Test images after binarization, uint8 [N_test, *event].
      levels: Number of pixel levels of these arrays.
      binarization: What was done to them, for the provenance.

    Returns:
      The data set.
    """
    provenance: dict[str, Any] = {
        "source": stored.source,
        "num_train": len(train),
        "num_test": len(test),
        "binarization": binarization,
        "sha256": _arrays_sha256(train, test),
    }
    if stored.files:
        provenance["files"] = dict(sorted(stored.files.items()))
    if stored.note:
        provenance["note"] = stored.note
    return Dataset(stored.name, train, test, levels, provenance)


def check_arrays(stored: Stored) -> None:
    """Checks the shapes and values of what a reader returned.

    Raises:
      DatasetError: if a part is empty or has no event axis, if the parts differ in event shape, or
        if a value exceeds the number of levels.
    """
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


def check_levels(argument: str, value: object) -> int:
    """Returns a number of pixel levels as an `int`.

    Args:
      argument: The name of the argument, for the error message.
      value: Its value.

    Raises:
      DatasetError: if the value is not an integer from 2 to `MAX_LEVELS`.
    """
    number = as_integer(value)
    if number is None or not 2 <= number <= MAX_LEVELS:
        raise DatasetError(
            f"{argument}={one_line(repr(value))} is not a number of pixel levels; "
            f"give an integer from 2 to {MAX_LEVELS}"
        )
    return number


def as_integer(value: object) -> int | None:
    """The value of an integer, including NumPy scalars and 0-d arrays; otherwise None."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)  # type: ignore[call-overload,arg-type]
    except TypeError:
        return None


def path_text(argument: str, value: object) -> str:
    """Returns a name or path as text, with ~ expanded.

    Args:
      argument: The name of the argument, for the error message.
      value: Its value.

    Raises:
      DatasetError: if the value is not a name or path.
    """
    try:
        text = os.fspath(value)  # type: ignore[call-overload,arg-type]
    except TypeError:
        text = ""
    if not isinstance(text, str) or not text or "\0" in text:
        raise DatasetError(f"{argument}={one_line(repr(value))} is not a name or path")
    return os.path.expanduser(text)


def one_line(value: object, limit: int = 200) -> str:
    """The text of a value or error on one line, cut after `limit` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def reason(error: BaseException) -> str:
    """The type and message of an error on one line."""
    return one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _arrays_sha256(train: np.ndarray, test: np.ndarray) -> str:
    digest = hashlib.sha256()
    for part, x in (("train", train), ("test", test)):
        digest.update(f"{part} {x.dtype.name} {list(x.shape)}\n".encode())
        digest.update(np.ascontiguousarray(x).data)
    return digest.hexdigest()
