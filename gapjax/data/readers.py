"""Loading a data set by its name, or from files of the user's."""

import difflib
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from gapjax.data import cells, files
from gapjax.data.dataset import (
    Dataset,
    DatasetError,
    Stored,
    as_dataset,
    check_binarization,
    check_levels,
    one_line,
    reason,
    unusable,
)
from gapjax.data.mnist import read_binarized_mnist, read_fashion_mnist, read_mnist

_DIGITS_LEVELS = 17


def _read_digits(name: str, _: pathlib.Path | None) -> Stored:
    """Reads scikit-learn's digits, split 1,437 to 360 and stratified by label."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DatasetError(
            f"data set {name!r} needs scikit-learn ({reason(error)}); pip install scikit-learn, "
            "or install gapjax with its extra 'experiments'"
        ) from error
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.uint8)
    # The split is part of the data set and depends on no seed of the user's.
    train, test = train_test_split(images, test_size=0.2, random_state=0, stratify=labels)
    source = "scikit-learn load_digits, fixed stratified split with 20 % for the test"
    return Stored(name, np.asarray(train), np.asarray(test), _DIGITS_LEVELS, source)


class _Entry(NamedTuple):
    """A named data set."""

    read: Callable[[str, pathlib.Path | None], Stored]
    levels: int  # as stored
    binarization: str  # the default
    grey_name: str = ""  # for a name that promises binary data: the name of its grey levels


_ENTRIES: dict[str, _Entry] = {
    "digits": _Entry(_read_digits, _DIGITS_LEVELS, "threshold"),
    "grey_digits": _Entry(_read_digits, _DIGITS_LEVELS, "none"),
    "mnist": _Entry(read_mnist, 256, "none"),
    "grey_mnist": _Entry(read_mnist, 256, "none"),
    "binary_mnist": _Entry(read_mnist, 256, "threshold", grey_name="mnist"),
    "fashion_mnist": _Entry(read_fashion_mnist, 256, "none"),
    "binarized_mnist": _Entry(read_binarized_mnist, 2, "none"),
}
DATASETS: tuple[str, ...] = tuple(_ENTRIES)
_FORMS = (*files.FORMS, cells.FORM)
FILES = f"the path of a file ({', '.join(_FORMS)}) or of a folder with train/ and test/"


def load_dataset(
    name_or_path: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    binarization: str | None = None,
    threshold: float = 0.5,
    binarization_seed: int = 0,
    levels: int | None = None,
    batch_key: str | None = None,
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
    | fashion_mnist   | (28, 28) | 256    | 60,000 and 10,000 articles of clothing [4]             |

    The digits are split into 1,437 and 360, stratified by label. No split depends on a seed.

    MNIST is looked for in `data_dir`, prepared by TensorFlow Datasets (TFDS: a folder
    `mnist/3.0.1`) or as the published IDX files of images, gzipped or not; without a `data_dir`, in
    TFDS's default directory (`TFDS_DATA_DIR`, by default `~/tensorflow_datasets`), where TFDS
    prepares it if it is not there; that alone needs TensorFlow. The images come in the published
    order and are verified either way. `fashion_mnist` is looked for in the same way; its files have
    the names of MNIST's, and their pixels tell which they are. So is `binarized_mnist`, except that
    TFDS has to prepare its files.

    Files hold [N, *event] in one of these forms:

    - `.npz`, `.mat`: arrays `train` and `test`, `x_train` and `x_test` as Keras has them, or
      `train_data` and `test_data`; and, if you like, a number `levels`. What a conditional model
      is given goes beside them: `train_context` and `test_context` [N, ...], or several, such as
      `train_context_batch`. `train` and `test` are then a `Given(x, context)`, whose context is the
      array, or a dict of several, here with the key "batch".
    - `.npy`, `.amat` (text), or an `.npz` of `scipy.sparse.save_npz`, which holds counts: two files
      in one folder whose names differ in `train` and `test` alone, such as `x_train.npy` and
      `x_test.npy`; give either.
    - A folder of images: `train/` and `test/`, with images of one size and kind, grey or RGB,
      which may be in subfolders.

    - `.h5ad` (anndata): raw counts [cells, genes] in `layers["counts"]`, `raw.X` or `X`, the first
      that there is. They are read piece by piece, never dense in a wider type than the result's.
      Cells are split by a column `split` of `obs` ("train" and "test"); without one a fifth is for
      the test, chosen by the names of the cells alone. The contexts are those of
      `models.count_vae`: "library", the sum of a cell's counts, and with `batch_key` "batch".

    Integers above 255 are counts: they have no `levels`, unless you give them. Neither have floats,
    which need a likelihood of your own.

    Args:
      name_or_path: One of `DATASETS`, or the path of a file or folder.
      data_dir: The folder to find MNIST in, as above; nothing else needs it.
      binarization: "threshold": pixel / (levels - 1) >= threshold. "stochastic": a pixel is 1 with
        probability pixel / (levels - 1), drawn once and independently for each part. "none": as
        stored. None: what the name stands for; "none" for a file.
      threshold: In (0, 1]; for "threshold" alone.
      binarization_seed: A non-negative integer; for "stochastic" alone.
      levels: Number of pixel levels as stored (before any binarization), 2 to 65,536. None: what
        the name stands for; for a file, its own `levels` if it has them, otherwise a guess: 2 if
        no pixel is above 1, 256 if none is above 255. A guess that leaves most levels unused
        warns.
      batch_key: The column of `obs` of an `.h5ad` file that names the batch of each cell; the
        batches are numbered from 0, and `provenance["batches"]` has their names.

    Raises:
      DatasetError: if an argument is wrong, or the data are missing or not usable.

    References:
      [1] Alpaydin, Kaynak. Optical Recognition of Handwritten Digits. UCI repository, 1998.
      [2] LeCun, Cortes, Burges. The MNIST database of handwritten digits. 1998.
      [3] Larochelle, Murray. The Neural Autoregressive Distribution Estimator. AISTATS 2011; with
        the binarization of Salakhutdinov, Murray. ICML 2008.
      [4] Xiao, Rasul, Vollgraf. Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
        Learning Algorithms. 2017.
    """
    check_binarization(binarization, threshold, binarization_seed)
    if levels is not None:
        check_levels("levels", levels)
    name = _path_text("name_or_path", name_or_path)
    path = pathlib.Path(name)
    is_cells = name not in _ENTRIES and path.suffix.lower() == cells.FORM
    if is_cells and levels is not None:
        raise unusable("levels", levels, f"does not fit {name!r}, whose counts have none")
    if not is_cells and batch_key is not None:
        raise unusable("batch_key", batch_key, f"does not fit {one_line(name)!r}: no {cells.FORM}")
    folder = None if data_dir is None else pathlib.Path(_path_text("data_dir", data_dir))
    if name in _ENTRIES:
        _check_named(name, binarization, levels)
        stored = _ENTRIES[name].read(name, folder)
        method = binarization or _ENTRIES[name].binarization
    elif is_cells:
        stored, method = cells.read(path, batch_key), binarization or "none"
    elif names_data(name):
        stored, method = files.read(path, levels), binarization or "none"
    else:
        raise _unknown_name(name)
    return as_dataset(stored, method, threshold, binarization_seed)


def names_data(name: str) -> bool:
    """Whether `load_dataset` knows the name, or the form of the file or folder; none need exist."""
    has_form = pathlib.Path(name).suffix.lower() in _FORMS
    has_parts = all(os.path.isdir(os.path.join(name, part)) for part in files.PARTS)
    return name in _ENTRIES or has_form or has_parts


def closest_name(name: str, names: Iterable[str]) -> str | None:
    """The known name that is most like an unknown one; capitals and hyphens do not count."""
    wanted = name.lower().replace("-", "_")
    return next(iter(difflib.get_close_matches(wanted, list(names), n=1, cutoff=0.5)), None)


def _path_text(argument: str, value: object) -> str:
    """A name or path as text, with ~ expanded; `argument` is its name in the error message."""
    try:
        text = os.fspath(value)  # type: ignore[call-overload,arg-type]
    except TypeError:
        text = ""
    if not isinstance(text, str) or not text or "\0" in text:
        raise unusable(argument, value, "is not a name or path")
    return os.path.expanduser(text)


def _unknown_name(name: str) -> DatasetError:
    problem = f"name_or_path={name!r} has no train/ and test/ in it"
    if not os.path.isdir(name):
        problem = f"name_or_path={name!r} is none of these files"
    if not os.path.exists(name):
        close = closest_name(name, DATASETS)
        hint = f" (did you mean {close!r}?)" if close else ""
        problem = f"unknown data set {one_line(repr(name))}{hint}"
    return DatasetError(f"{problem}; give one of {', '.join(DATASETS)}, or {FILES}")


def _check_named(name: str, binarization: str | None, levels: int | None) -> None:
    """Raises where an argument contradicts the name; known without the data."""
    entry = _ENTRIES[name]
    if levels is not None and levels != entry.levels:
        stored = f"which is stored with {entry.levels}"
        raise DatasetError(f"levels={levels} does not fit {name!r}, {stored}; leave it out")
    if binarization == "none" and entry.grey_name:
        raise DatasetError(
            f"binarization='none' contradicts {name!r}; for its grey levels use {entry.grey_name!r}"
        )
    if binarization not in (None, "none") and entry.levels == 2:
        raise DatasetError(
            f"binarization={binarization!r} does not fit {name!r}, which is binary already; "
            "to binarize anew use 'binary_mnist'"
        )
