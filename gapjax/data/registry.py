"""The names of the data sets, and loading one by its name or from a file."""

import difflib
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

from gapjax.data.binarization import binarize, check_binarization
from gapjax.data.dataset import (
    Dataset,
    DatasetError,
    Stored,
    as_dataset,
    check_arrays,
    check_levels,
    one_line,
    path_text,
)
from gapjax.data.digits import DIGITS_LEVELS, read_digits
from gapjax.data.files import read_npz
from gapjax.data.mnist import read_binarized_mnist, read_mnist


class _Entry(NamedTuple):
    """A named data set."""

    read: Callable[[str, pathlib.Path | None], Stored]
    levels: int  # as stored
    binarization: str  # the default
    grey_name: str = ""  # for a name that promises binary data: the name of its grey levels


_ENTRIES: dict[str, _Entry] = {
    "digits": _Entry(read_digits, DIGITS_LEVELS, "threshold"),
    "grey_digits": _Entry(read_digits, DIGITS_LEVELS, "none"),
    "mnist": _Entry(read_mnist, 256, "none"),
    "grey_mnist": _Entry(read_mnist, 256, "none"),
    "binary_mnist": _Entry(read_mnist, 256, "threshold", grey_name="mnist"),
    "binarized_mnist": _Entry(read_binarized_mnist, 2, "none"),
}
DATASETS: tuple[str, ...] = tuple(_ENTRIES)


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

    | name            | event    | levels | contents                                               |
    |-----------------|----------|--------|--------------------------------------------------------|
    | digits          | (8, 8)   | 2      | scikit-learn's 1,797 handwritten digits, rounded [1]   |
    | grey_digits     | (8, 8)   | 17     | the same with all their levels                         |
    | mnist           | (28, 28) | 256    | 60,000 and 10,000 handwritten digits [2]               |
    | grey_mnist      | (28, 28) | 256    | an alias of mnist                                      |
    | binary_mnist    | (28, 28) | 2      | mnist, pixel / 255 >= 0.5                              |
    | binarized_mnist | (28, 28) | 2      | a published random binarization, 50,000 and 10,000 [3] |

    The digits are split into 1,437 and 360, stratified by label. No split depends on a seed.

    MNIST is looked for in this order:

    1. in `data_dir`, prepared by TensorFlow Datasets (TFDS): a folder `mnist/3.0.1`. TensorFlow is
       not needed;
    2. in `data_dir`, as the published IDX files, gzipped or not, with checksums verified. If
       TensorFlow is installed and all four files are there, TFDS prepares them with `data_dir` as
       its `manual_dir` (once, into its default directory, in some 20 seconds) and the result is
       read. Otherwise, or if that fails, the files are read directly;
    3. without a `data_dir`, prepared in TFDS's default directory (`TFDS_DATA_DIR`, by default
       `~/tensorflow_datasets`). If it is not there, TFDS downloads and prepares it, which needs
       TensorFlow and a network.

    TFDS shuffles what it prepares. The published order is restored and verified, so that every way
    gives the same arrays. `binarized_mnist` is looked for in the same way, except that its files
    are not read directly.

    An `.npz` file holds integer arrays `train` and `test` (or, with Keras's names, `x_train` and
    `x_test`), [N, *event], and may hold a scalar `levels`.

    Args:
      name_or_path: One of `DATASETS`, or the path of an `.npz` file.
      data_dir: The folder to find MNIST in, as above. The digits and `.npz` files do not need it.
      binarization: "threshold": pixel / (levels - 1) >= threshold. "stochastic": a pixel is 1 with
        probability pixel / (levels - 1), drawn once and independently for each part. "none": as
        stored. None: what the name stands for; "none" for a file.
      threshold: In (0, 1]; for "threshold" alone.
      binarization_seed: A non-negative integer; for "stochastic" alone.
      levels: Number of pixel levels as stored (before any binarization), 2 to 256. None: what the
        name stands for; for a file, its own `levels` if it has them, otherwise 2 if no pixel is
        above 1, else 256.

    Returns:
      The data set.

    Raises:
      DatasetError: if an argument is wrong, or the data are missing or not usable. The message is
        one line.

    References:
      [1] E. Alpaydin, C. Kaynak. Optical Recognition of Handwritten Digits. UCI Machine Learning
        Repository, 1998.
      [2] Y. LeCun, C. Cortes, C. Burges. The MNIST database of handwritten digits. 1998.
      [3] H. Larochelle, I. Murray. The Neural Autoregressive Distribution Estimator. AISTATS 2011;
        the binarization of R. Salakhutdinov, I. Murray. On the Quantitative Analysis of Deep Belief
        Networks. ICML 2008.
    """
    check_binarization(binarization, threshold, binarization_seed)
    if levels is not None:
        check_levels("levels", levels)
    name = path_text("name_or_path", name_or_path)
    folder = None if data_dir is None else pathlib.Path(path_text("data_dir", data_dir))
    if name in _ENTRIES:
        stored, method = _read_named(name, folder, binarization, levels)
    elif name.lower().endswith(".npz"):
        stored, method = read_npz(pathlib.Path(name), levels), binarization or "none"
    else:
        raise _unknown_name(name)
    check_arrays(stored)
    arrays = binarize(stored, method, threshold=threshold, seed=binarization_seed)
    return as_dataset(stored, *arrays)


def named_levels(name: str, binarization: str | None) -> int | None:
    """The number of pixel levels of a named data set, which need not be there; None for a file."""
    entry = _ENTRIES.get(name)
    if entry is None:
        return None
    return entry.levels if (binarization or entry.binarization) == "none" else 2


def closest_name(name: str, names: Iterable[str]) -> str | None:
    """The known name that is most like an unknown one, to suggest in an error message.

    Capitals and hyphens make no difference: "Binary-MNIST" is like "binary_mnist".

    Args:
      name: The unknown name.
      names: The known names, in lower case with underscores.

    Returns:
      The closest of the known names; None if none is close.
    """
    wanted = name.lower().replace("-", "_")
    return next(iter(difflib.get_close_matches(wanted, list(names), n=1, cutoff=0.5)), None)


def _unknown_name(name: str) -> DatasetError:
    known = f"give one of {', '.join(DATASETS)}, or the path of an .npz file"
    if os.path.isdir(name):
        return DatasetError(f"name_or_path={name!r} is a directory; {known}")
    if os.path.exists(name):
        return DatasetError(f"name_or_path={name!r} is not an .npz file; {known}")
    close = closest_name(name, DATASETS)
    hint = f" (did you mean {close!r}?)" if close else ""
    return DatasetError(f"unknown data set {one_line(repr(name))}{hint}; {known}")


def _read_named(
    name: str, folder: pathlib.Path | None, binarization: str | None, levels: int | None
) -> tuple[Stored, str]:
    """Reads a named data set.

    Returns:
      The data as stored, and the binarization to apply.

    Raises:
      DatasetError: if an argument contradicts the name, or the data cannot be read.
    """
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
