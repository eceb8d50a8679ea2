"""The user's own data: .npz files."""

import hashlib
import io
import pathlib

import numpy as np

from gapjax.data.dataset import MAX_LEVELS, DatasetError, Stored, check_levels, one_line, reason

_CURE = "save it again with numpy.savez(file, train=..., test=...)"


def read_npz(path: pathlib.Path, levels: int | None) -> Stored:
    """Reads an .npz file; `load_dataset` describes its contents.

    Args:
      path: The file.
      levels: Number of pixel levels. None: the file's `levels` if it has them; otherwise 2 if no
        pixel is above 1, else 256.

    Returns:
      The data as stored.

    Raises:
      DatasetError: if the file is missing, damaged, or holds something else.
    """
    content = _read_bytes(path)
    arrays, own_levels = _read_arrays(path, content)
    if own_levels is not None:
        own = check_levels(f"'levels' of {path.name!r}: levels", own_levels)
        if levels is not None and levels != own:
            raise DatasetError(
                f"levels={levels} does not fit {path.name!r}, which says levels={own}; leave it out"
            )
        levels = own
    train, test = (_as_uint8(x, part, path.name) for part, x in arrays.items())
    if levels is None:
        binary = all(x.max(initial=0) <= 1 for x in (train, test))
        levels = 2 if binary else MAX_LEVELS
    return Stored(
        name=path.name,
        train=train,
        test=test,
        levels=int(levels),
        source=f"the file {path.name}",
        files={path.name: hashlib.sha256(content).hexdigest()},
    )


def _read_bytes(path: pathlib.Path) -> bytes:
    if not path.exists():
        raise DatasetError(f"name_or_path={str(path)!r} does not exist; give an .npz file")
    if not path.is_file():
        raise DatasetError(f"name_or_path={str(path)!r} is a directory; give an .npz file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{str(path)!r} cannot be read ({reason(error)})") from error
    if content[:2] != b"PK":
        raise DatasetError(f"{str(path)!r} is not an .npz file, or truncated or corrupt; {_CURE}")
    return content


def _read_arrays(
    path: pathlib.Path, content: bytes
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The arrays "train" and "test" of an archive, and its `levels` if it has them."""
    arrays: dict[str, np.ndarray] = {}
    # A damaged archive raises errors of many types, from zipfile, zlib and NumPy's parser.
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            names = list(archive.files)
            for keys in (("train", "test"), ("x_train", "x_test")):
                if set(keys) <= set(names):
                    arrays = dict(zip(("train", "test"), (archive[k] for k in keys), strict=True))
                    break
            own_levels = archive["levels"] if "levels" in names else None
        for part, x in arrays.items():
            if not isinstance(x, np.ndarray):  # NumPy returns members in other formats as bytes
                raise ValueError(f"{part!r} is not an array")
    except Exception as error:
        raise DatasetError(
            f"{str(path)!r} is truncated, corrupt or holds Python objects ({reason(error)}); "
            f"{_CURE}"
        ) from error
    if not arrays:
        raise DatasetError(
            f"{str(path)!r} holds {one_line(sorted(names))}, not 'train' and 'test' (nor 'x_train'"
            f" and 'x_test'); {_CURE}"
        )
    return arrays, own_levels


def _as_uint8(x: np.ndarray, part: str, name: str) -> np.ndarray:
    """Converts to uint8 in C order.

    Raises:
      DatasetError: if the values are not integers from 0 to 255.
    """
    what = f"{part!r} of {name!r}"
    if x.dtype.kind not in "uib":
        nan = " and contains NaN" if x.dtype.kind in "fc" and np.isnan(x).any() else ""
        raise DatasetError(
            f"{what} has dtype {x.dtype}{nan}; give integers 0 to levels - 1, for x in [0, 1] "
            "for example numpy.round(255 * x).astype(numpy.uint8)"
        )
    if x.size and (x.min() < 0 or x.max() >= MAX_LEVELS):
        raise DatasetError(
            f"{what} has values from {x.min()} to {x.max()}; give integers 0 to levels - 1, "
            f"at most {MAX_LEVELS - 1}"
        )
    return np.array(x, dtype=np.uint8, order="C")
