"""Reading files and folders of the user's: archives, pairs of arrays, folders of images."""

import hashlib
import io
import pathlib
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gapjax.data.dataset import (
    DatasetError,
    Stored,
    check_levels,
    dense,
    one_line,
    reason,
    smallest,
    whole,
)

PARTS = ("train", "test")
_NAMES = (("train", "test"), ("x_train", "x_test"), ("train_data", "test_data"))
_MATRIX = "a sparse matrix"
_CONTEXT = re.compile("(train|test)_context(_.+)?")
_MODES = ("1", "L", "I;16", "I", "F", "RGB")  # of pillow, whose arrays are the pixels themselves
_RARE = 0.02  # a level is in use if it has this share of the pixels that it would have on average


def read(path: pathlib.Path, levels: int | None) -> Stored:
    """Reads a file, or the folder or pair that it is of; `load_dataset` describes them."""
    sums: dict[str, str] = {}
    held: dict[str, Any] = {}
    form = path.suffix.lower()
    if path.is_dir() and form not in FORMS:
        held = {part: _read_images(path / part) for part in PARTS}
    elif form in _ARCHIVES:
        held = _opened(path, sums, _ARCHIVES[form])
    is_sparse = _MATRIX in held
    if form in _ARRAYS or is_sparse:
        matrix: Callable[[bytes], Any] = lambda content: _read_npz(content).get(_MATRIX)
        parse = _ARRAYS.get(form, matrix)
        each = (_opened(file, sums, parse) for file in _pair(path))
        held = dict(zip(PARTS, each, strict=True))
    names = next((names for names in _NAMES if held.keys() >= set(names)), None)
    if names is None:
        raise DatasetError(
            f"{str(path)!r} holds {one_line(sorted(held))}; name the arrays 'train' and 'test', "
            "or 'x_train' and 'x_test'"
        )
    if "levels" in held:
        stored = np.asarray(held["levels"]).squeeze()[()]  # .mat files hold [[levels]]
        own = check_levels(f"'levels' of {path.name!r}: levels", stored)
        if levels not in (None, own):
            raise DatasetError(
                f"levels={levels} does not fit {path.name!r}, which says levels={own}; leave it out"
            )
        levels = own
    source = f"the folder {path.name} of images"
    if sums:
        source = f"the file{'s' * (len(sums) > 1)} {' and '.join(sorted(sums))}"
    train, test = _numbers([dense(held[name]) for name in names], path.name, levels)
    contexts = _contexts(held, (len(train), len(test)), path.name)
    if levels is None and train.dtype == np.uint8 and not is_sparse:
        levels = _guess(train, test, path.name)
    return Stored(path.name, train, test, levels, source, files=sums, contexts=contexts)


def _read_npz(content: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        if {"format", "shape", "data"} <= set(archive.files):
            from scipy.sparse import load_npz

            return {_MATRIX: load_npz(io.BytesIO(content))}
        names = {name for pair in _NAMES for name in pair} | {"levels"}
        wanted = lambda name: name in names or _CONTEXT.fullmatch(name)
        return {name: archive[name] if wanted(name) else None for name in archive.files}


def _read_mat(content: bytes) -> dict[str, Any]:
    from scipy.io import loadmat

    return {
        name: x if hasattr(x, "toarray") else whole(x)  # sparse matrices have it
        for name, x in loadmat(io.BytesIO(content)).items()
        if hasattr(x, "dtype")
    }


def _read_npy(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)


def _read_text(content: bytes) -> np.ndarray:
    return whole(np.loadtxt(io.BytesIO(content), ndmin=2))


_ARCHIVES: dict[str, Callable[[bytes], dict[str, Any]]] = {".npz": _read_npz, ".mat": _read_mat}
_ARRAYS: dict[str, Callable[[bytes], np.ndarray]] = {".npy": _read_npy, ".amat": _read_text}
FORMS = (*_ARCHIVES, *_ARRAYS)


def _opened(path: pathlib.Path, sums: dict[str, str], parse: Callable[[bytes], Any]) -> Any:
    """What a file holds; adds its SHA-256 to `sums`."""
    if not path.is_file():
        problem = "is a directory" if path.is_dir() else "does not exist"
        raise DatasetError(f"{str(path)!r} {problem}; give a {path.suffix} file")
    # A damaged file raises errors of many types, from zipfile, zlib, SciPy and NumPy's parser.
    try:
        content = path.read_bytes()
        result = parse(content)
    except Exception as error:
        raise DatasetError(
            f"{str(path)!r} cannot be read: not a {path.suffix} file, truncated, corrupt or with "
            f"Python objects ({reason(error)})"
        ) from error
    sums[path.name] = hashlib.sha256(content).hexdigest()
    return result


def _pair(path: pathlib.Path) -> list[pathlib.Path]:
    """The training and the test file, of which one is given."""
    if found := re.fullmatch(r"(?s)(.*)(?:train|test)(.*)", path.name):
        return [path.with_name(f"{found[1]}{part}{found[2]}") for part in PARTS]
    raise DatasetError(
        f"{path.name!r} holds one part; name two files like x_train{path.suffix} and "
        f"x_test{path.suffix}, in one folder, and give either"
    )


def _read_images(folder: pathlib.Path) -> np.ndarray:
    """The images in a folder and its subfolders, [N, *event], in the order of their paths."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DatasetError(f"a folder of images needs pillow ({error}); pip install it") from error
    known = Image.registered_extensions()
    images: list[np.ndarray] = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in known):
        try:
            with Image.open(path) as image:
                mode, x = image.mode, np.asarray(image)
        except Exception as error:  # pillow raises errors of many types
            raise DatasetError(f"{str(path)!r} cannot be read ({reason(error)})") from error
        if mode not in _MODES:
            raise DatasetError(f"{str(path)!r} has colours of mode {mode}; save it as grey or RGB")
        if images and (x.shape, x.dtype) != (images[0].shape, images[0].dtype):
            raise DatasetError(
                f"{str(path)!r} is {x.dtype} {x.shape}, unlike the first image, {images[0].dtype} "
                f"{images[0].shape}; give all the same size and kind"
            )
        images.append(x)
    if not images:
        raise DatasetError(f"{str(folder)!r} holds no images; give files that pillow reads")
    return np.stack(images)


def _numbers(parts: list[np.ndarray], name: str, levels: int | None) -> list[np.ndarray]:
    """Both parts as the smallest of uint8, uint16 and int32 that holds them, or as float32."""
    most = (levels or 2**31) - 1  # JAX holds int32
    usable = f"integers from 0 to {most}" + (f" for levels={levels}" if levels else ", or floats")
    for part, x in zip(PARTS, parts, strict=True):
        what = f"{part!r} of {name!r} has"
        if x.dtype.kind not in "uibf":
            raise DatasetError(f"{what} dtype {x.dtype}; give {usable}")
        if x.ndim < 2 or not x.size:
            raise DatasetError(f"{what} shape {x.shape}; give one image or more, [N, *event]")
        if x.shape[1:] != (event := parts[0].shape[1:]):
            raise DatasetError(f"{what} images of shape {x.shape[1:]}, not {event}; give the same")
        low, high = x.min(), x.max()
        if x.dtype.kind == "f":  # NaN is not below anything
            fits = levels is None and max(-low, high) <= np.finfo(np.float32).max
        else:
            fits = 0 <= low and high <= most
        if not fits:
            raise DatasetError(f"{what} {x.dtype} values from {low} to {high}; give {usable}")
    if any(x.dtype.kind == "f" for x in parts):
        dtype: type = np.float32
    else:
        dtype = smallest(max((levels or 0) - 1, *(int(x.max()) for x in parts)))
    return [np.asarray(x, dtype, order="C") for x in parts]


def _contexts(held: dict[str, Any], sizes: Sequence[int], file: str) -> dict[str, np.ndarray]:
    """The contexts by their names in the file; those of 64 bits, which JAX has not, as of 32."""
    kinds = {name.partition("_")[2] for name in held if _CONTEXT.fullmatch(name)}
    contexts: dict[str, np.ndarray] = {}
    for kind in sorted(kinds):
        names = [f"{part}_{kind}" for part in PARTS]
        if (kind == "context" and len(kinds) > 1) or not held.keys() >= set(names):
            raise DatasetError(
                f"{file!r} holds {one_line(sorted(held))}; give train_context and test_context, or "
                "several train_context_NAME and test_context_NAME"
            )
        pair = [np.asarray(held[name]) for name in names]
        shapes, dtype = [x.shape for x in pair], np.result_type(*pair)
        what = f"{names[0]} and {names[1]} of {file!r} have"
        if dtype.kind not in "uibf":
            cure = "numbers, of names the second of numpy.unique(names, return_inverse=True)"
            raise DatasetError(f"{what} dtype {dtype}; give {cure}")
        if [shape[:1] for shape in shapes] != [(size,) for size in sizes] or (
            shapes[0][1:] != shapes[1][1:]
        ):
            one = f"one entry for each of the {sizes[0]} and {sizes[1]} examples, of one shape"
            raise DatasetError(f"{what} shapes {shapes[0]} and {shapes[1]}; give {one}")
        most = np.finfo(np.float32).max if dtype.kind == "f" else 2**31 - 1
        low, high = min(x.min() for x in pair), max(x.max() for x in pair)
        if not max(-low, high) <= most:  # NaN is not
            raise DatasetError(f"{what} values from {low} to {high}; give what 32 bits hold")
        if dtype.itemsize == 8:
            dtype = np.dtype(np.float32 if dtype.kind == "f" else np.int32)
        contexts |= {name: x.astype(dtype) for name, x in zip(names, pair, strict=True)}
    return contexts


def _guess(train: np.ndarray, test: np.ndarray, name: str) -> int:
    """The number of levels of uint8 images; warns where few of them are in use."""
    counts = np.zeros(256, np.int64)
    for piece in (p for x in (train, test) for p in np.array_split(x, len(x) // 1000 + 1)):
        counts += np.bincount(piece.ravel(), minlength=256)  # takes eight times their memory
    levels = 256 if counts[2:].any() else 2
    used = int((counts > _RARE * counts.sum() / levels).sum())
    if used <= levels / 2 and counts.sum() >= 4 * levels:
        warnings.warn(
            f"{name} is taken to have {levels} levels, but nearly all pixels have {used} of them: "
            "for 0 to n - 1 give levels=n, for 0 and 255 take x // 255, and for two levels of many "
            "take x >= 128, not x // 255",
            stacklevel=4,
        )
    return levels
