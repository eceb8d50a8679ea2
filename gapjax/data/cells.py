"""Counts of single cells from `.h5ad` files, the form of anndata."""

import hashlib
import pathlib
from typing import Any

import numpy as np

from gapjax.data.dataset import DatasetError, Stored, dense, one_line, reason, whole

FORM = ".h5ad"
_PLACES = ("layers/counts", "raw/X", "X")
_PIECE = 2**22  # counts that are dense at once, in the type that they are stored in


def read(path: pathlib.Path, batch_key: str | None) -> Stored:
    """Counts [N, G] with their library sizes and batches; `load_dataset` describes the file."""
    try:
        import h5py
        from anndata.io import read_elem, sparse_dataset
    except ImportError as error:
        raise DatasetError(
            f"{path.name!r} needs anndata ({reason(error)}); pip install anndata, or install "
            "gapjax with its extra 'cells'"
        ) from error
    if not path.is_file():
        problem = "is a directory" if path.is_dir() else "does not exist"
        raise DatasetError(f"{str(path)!r} {problem}; give a {FORM} file")
    try:  # HDF5 and anndata raise errors of many types
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        with h5py.File(path) as opened:
            file: Any = opened  # each place is a group or an array
            place = next((place for place in _PLACES if place in file), _PLACES[-1])
            held: Any = file[place]
            counts: Any = sparse_dataset(held) if isinstance(held, h5py.Group) else held
            if getattr(counts, "format", "") == "csc":  # whose rows lie apart
                counts = counts.to_memory().tocsr()
            described: Any = file["obs"]
            obs = read_elem(described)
            is_test, how = _split(obs, path.name)
            order = np.argsort(is_test, kind="stable")
            x = _in_order(counts, order, f"{place} of {path.name!r}")
    except DatasetError:
        raise
    except Exception as error:
        raise DatasetError(
            f"{str(path)!r} cannot be read: not a {FORM} file, truncated, corrupt or without "
            f"counts in layers['counts'], raw.X or X ({reason(error)})"
        ) from error
    context, batches = {"library": x.sum(1, dtype=np.int32)}, None
    if batch_key is not None:
        codes, batches = _batches(obs, batch_key, path.name)
        context["batch"] = codes[order]
    number = len(x) - int(is_test.sum())
    contexts = {}
    for name, each in context.items():
        contexts[f"train_context_{name}"] = each[:number]
        contexts[f"test_context_{name}"] = each[number:]
    return Stored(
        path.name, x[:number], x[number:], None, f"{place} of the file {path.name}, {how}",
        files={path.name: digest}, contexts=contexts, batches=batches,
    )  # fmt: skip


def _split(obs: Any, file: str) -> tuple[np.ndarray, str]:
    """Which cells are of the test set: by the column "split", else a fifth, by their names."""
    if "split" in obs:
        parts = obs["split"].astype(str).to_numpy()
        if set(parts) != {"train", "test"}:
            held = one_line(sorted(set(parts)))
            raise DatasetError(f"obs['split'] of {file!r} holds {held}; give 'train' and 'test'")
        return parts == "test", "split by obs['split']"
    if len(obs) < 2:
        raise DatasetError(f"{file!r} holds {len(obs)} cells; give two or more")
    digests = [hashlib.sha256(str(name).encode()).hexdigest() for name in obs.index]
    is_test = np.zeros(len(obs), bool)
    is_test[np.argsort(digests, kind="stable")[: max(1, len(obs) // 5)]] = True
    return is_test, "a fifth of the cells, by the SHA-256 of their names, for the test"


def _in_order(counts: Any, order: np.ndarray, what: str) -> np.ndarray:
    """The rows in this order, in the smallest type that holds them; read piece by piece."""
    place = np.argsort(order)  # of every row in the result
    x = np.zeros(counts.shape, np.uint8)
    rows = max(1, _PIECE // max(1, counts.shape[1]))
    for start in range(0, len(x), rows):
        piece = whole(dense(counts[start : start + rows]))
        if piece.dtype.kind not in "ui" or piece.min() < 0 or piece.max() >= 2**31:
            bad = piece[(piece < 0) | (piece != np.floor(piece)) | (piece >= 2**31)]
            raise DatasetError(
                f"{what} holds {bad.flat[0]}, which is no count; put raw counts into "
                "layers['counts'], raw.X or X, which are looked at in this order"
            )
        x = x.astype(np.promote_types(x.dtype, np.min_scalar_type(piece.max())), copy=False)
        x[place[start : start + rows]] = piece
    return x if x.dtype.itemsize < 4 else x.astype(np.int32)


def _batches(obs: Any, key: str, file: str) -> tuple[np.ndarray, list[str]]:
    """The number of each cell's batch, and the names of the batches."""
    if key not in obs:
        raise DatasetError(
            f"batch_key={key!r} is no column of obs of {file!r}; give one of {one_line(list(obs))}"
        )
    column = obs[key].astype("category").cat.remove_unused_categories()
    if column.isna().any():
        raise DatasetError(f"batch_key={key!r}: {file!r} has cells without a batch; leave them out")
    return column.cat.codes.to_numpy(np.int32), list(map(str, column.cat.categories))
