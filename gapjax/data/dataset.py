"""The type `Dataset`, and what turns any reader's arrays into one."""

import hashlib
import numbers
import operator
from typing import Any, NamedTuple

import numpy as np

MAX_LEVELS = 2**16
BINARIZATIONS: tuple[str, ...] = ("threshold", "stochastic", "none")


class DatasetError(ValueError):
    """Data that cannot be found or used; one line names the argument or file and a cure."""


class Dataset(NamedTuple):
    """A data set with a training part and a test part.

    Attributes:
      name: The name of the data set, or of its file; that of `grey_mnist` is `mnist`.
      train: Training images, [N_train, *event]: uint8, or the smallest of uint16 and int32 that
        holds the integers; float32 for floats. With contexts, a `Given` of these and of the
        contexts: an array [N_train, ...], or a dict of such.
      test: Test images, [N_test, *event], of the same types.
      levels: Number of pixel levels; pixels take the values 0 .. levels - 1. None for floats, and
        for counts above 255.
      provenance: Where the arrays come from and how they were processed, as values that JSON can
        hold: `source` (a sentence), `num_train`, `num_test`, `binarization`, `sha256` (of the
        shapes and values of both parts: compare it to find out whether two runs used the same
        data), and where there are any `contexts` (the shape and type of each, by name), `batches`
        (their names, in the order of the numbers in a context "batch"), `files` (the SHA-256 of
        each that was read, by name) and `note` (a remark).
    """

    name: str
    train: Any
    test: Any
    levels: int | None
    provenance: dict[str, Any]

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return tuple(getattr(self.train, "x", self.train).shape[1:])


class Stored(NamedTuple):
    """What a reader returns: the arrays as stored, and what the provenance says of them."""

    name: str
    train: np.ndarray
    test: np.ndarray
    levels: int | None
    source: str  # a sentence without local paths
    binarization: str = "none"
    files: dict[str, str] | None = None  # the SHA-256 of each file that was read, by name
    note: str = ""
    contexts: dict[str, np.ndarray] | None = None  # as "train_context" or "train_context_NAME"
    batches: list[str] | None = None  # the names of those that a context "batch" numbers


def as_dataset(stored: Stored, binarization: str, threshold: float, seed: int) -> Dataset:
    """Binarizes what a reader returned, and adds the provenance."""
    stored = _binarized(stored, binarization, threshold, seed)
    provenance: dict[str, Any] = {
        "source": stored.source,
        "num_train": len(stored.train),
        "num_test": len(stored.test),
        "binarization": stored.binarization,
        "sha256": _arrays_sha256(
            {"train": stored.train, "test": stored.test, **(stored.contexts or {})}
        ),
    }
    if stored.contexts:
        provenance["contexts"] = {
            name.removeprefix("train_"): f"{x.dtype.name} {list(x.shape[1:])}"
            for name, x in stored.contexts.items()
            if name.startswith("train_")
        }
    if stored.batches:
        provenance["batches"] = stored.batches
    if stored.files:
        provenance["files"] = dict(sorted(stored.files.items()))
    if stored.note:
        provenance["note"] = stored.note
    train, test = (_with_context(stored, part) for part in ("train", "test"))
    return Dataset(stored.name, train, test, stored.levels, provenance)


def _with_context(stored: Stored, part: str) -> Any:
    """One part of the data, with its contexts if there are any."""
    x, own = getattr(stored, part), f"{part}_context"
    if not stored.contexts:
        return x
    from gapjax.vae import Given  # which imports JAX

    several = {
        name.removeprefix(f"{own}_"): context
        for name, context in stored.contexts.items()
        if name.startswith(f"{own}_")
    }
    return Given(x, several or stored.contexts[own])


def check_levels(argument: str, value: object) -> int:
    """A number of pixel levels as an `int`."""
    number = _as_integer(value)
    if number is None or not 2 <= number <= MAX_LEVELS:
        problem = f"is not a number of pixel levels; give an integer from 2 to {MAX_LEVELS}"
        raise unusable(argument, value, problem)
    return number


def check_binarization(binarization: str | None, threshold: float, binarization_seed: int) -> None:
    """Checks the arguments of `load_dataset` that concern binarization."""
    if binarization is not None and binarization not in BINARIZATIONS:
        known = ", ".join(BINARIZATIONS)
        raise unusable("binarization", binarization, f"is unknown; give one of {known}")
    if not isinstance(threshold, numbers.Real) or not 0 < threshold <= 1:
        problem = "is not usable; give a number above 0 and at most 1"
        raise unusable("threshold", threshold, problem)
    seed = _as_integer(binarization_seed)
    if seed is None or seed < 0:
        problem = "is not usable; give a non-negative integer"
        raise unusable("binarization_seed", binarization_seed, problem)


def dense(x: Any) -> np.ndarray:
    """An array as it is, or of a sparse matrix in the smallest type; no wider one is made of it."""
    return narrow(x).toarray() if hasattr(x, "toarray") else np.asarray(x)


def narrow(x: Any) -> Any:
    """A sparse matrix by rows, in the smallest type that holds its values."""
    matrix = x.tocoo().tocsr()  # a copy, with the sum of what stands twice
    matrix.data = whole(matrix.data)
    if matrix.data.dtype.kind in "ui" and matrix.data.min(initial=0) >= 0:
        matrix.data = matrix.data.astype(smallest(matrix.data.max(initial=0)))
    return matrix


def whole(x: np.ndarray) -> np.ndarray:
    """Integers where all values are: text, MATLAB and anndata write them as floats."""
    if x.dtype.kind != "f" or not (np.abs(x) < 2**31).all():
        return x
    integers = x.astype(np.int64)
    return integers if (integers == x).all() else x


def smallest(highest: int) -> type[np.integer]:
    """The type of images and counts up to this."""
    if highest >= 2**31:  # which is refused
        return np.int64
    return np.uint8 if highest < 2**8 else np.uint16 if highest < 2**16 else np.int32


def unusable(argument: str, value: object, problem: str) -> DatasetError:
    """The error for an argument, which starts with its name and value."""
    return DatasetError(f"{argument}={one_line(repr(value))} {problem}")


def one_line(value: object, limit: int = 200) -> str:
    """The text of a value or error on one line, cut after `limit` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def reason(error: BaseException) -> str:
    """The type and message of an error on one line."""
    return one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _binarized(stored: Stored, method: str, threshold: float, seed: int) -> Stored:
    """Applies one of `BINARIZATIONS` to both parts, each drawn on its own where it is random."""
    levels = stored.levels
    if method == "none":
        return stored
    if levels in (2, None):
        problem = "is binary already" if levels else "has no levels"
        raise DatasetError(
            f"binarization={method!r} does not fit {stored.name!r}, which {problem}; "
            "use binarization='none' or leave it out"
        )
    if method == "threshold":
        lowest = np.argmax(np.arange(levels) / (levels - 1) >= threshold)
        train, test = ((x >= lowest).astype(np.uint8) for x in (stored.train, stored.test))
        description = f"threshold {float(threshold):g}"
    else:
        parts = enumerate((stored.train, stored.test))
        train, test = (_stochastic(x, levels, np.random.default_rng([seed, i])) for i, x in parts)
        description = f"stochastic, seed {int(seed)}"
    return stored._replace(train=train, test=test, levels=2, binarization=description)


def _stochastic(x: np.ndarray, levels: int, generator: np.random.Generator) -> np.ndarray:
    """Draws Bernoulli(x / (levels - 1)) for every pixel; 0 and levels - 1 are deterministic."""
    probability = np.arange(levels) / (levels - 1)
    # Image by image, as the random numbers take eight times the memory of the images.
    drawn = [generator.random(image.shape) < probability[image] for image in x]
    return np.array(drawn, np.uint8)


def _as_integer(value: object) -> int | None:
    """The value of an integer, including NumPy scalars and 0-d arrays; otherwise None."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)  # type: ignore[call-overload,arg-type]
    except TypeError:
        return None


def _arrays_sha256(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, x in arrays.items():
        digest.update(f"{name} {x.dtype.name} {list(x.shape)}\n".encode())
        digest.update(np.ascontiguousarray(x).data)
    return digest.hexdigest()
