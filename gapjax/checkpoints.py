"""Save, restore and verify pytrees, each with a record of what it is.

A store is a folder; an entry is a subfolder named by its number (an epoch) that holds a pytree
and a JSON record. An entry is written beside its place and renamed when it is whole, so an entry
that can be seen was finished; its SHA-256, kept in the record, is checked when it is restored.
An entry of the same number stays until the new one is whole. Threads may share a store.

The leaves are one file of bytes, in order; their names, types and shapes are in the record. So no
name, type or path means anything to what writes them. Orbax makes the folder and completes it.
"""

import contextlib
import dataclasses
import hashlib
import json
import operator
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import count, zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp

_TREE, _SHAPES, _RECORD = "tree_sha256", "shapes", "record_sha256"
_TREE_FILE, _RECORD_FILE, _DROPPED_FILE = "tree.bin", "record.json", "tree.dropped"
_NEW, _OLD = ".new", ".old"  # endings of an entry that waits for its place, and of one that left it
_SCALARS = (bool, int, float, complex)
Store: TypeAlias = str | os.PathLike[str]
_NUMBER = re.compile(r"0|[1-9][0-9]*")  # the name of an entry; a stray folder may be named 007
_LEFTOVER = re.compile(r"\d+(\.new)?\.orbax-checkpoint-tmp.*|\d+\.old")
_waits = count()  # a barrier's name is used once
_lock = threading.RLock()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Serializes calls from several threads: neither Orbax nor `remove_incomplete` allows them."""
    with _lock:
        yield


class CheckpointError(RuntimeError):
    """An entry is missing, cannot be written or does not fit; one line says which."""


class CorruptCheckpointError(CheckpointError):
    """An entry differs from what was saved and must be computed again."""


class _Handler(ocp.CheckpointHandler):
    """Writes the files of an entry, in the folder that Orbax gives it; `_read` reads them."""

    def save(self, directory: Path, args: "_Files") -> None:
        if jax.process_index() == 0:
            for name, pieces in args.contents.items():
                with open(directory / name, "wb") as file:
                    file.writelines(pieces)
                    file.flush()
                    os.fsync(file.fileno())

    def restore(self, directory: Path, args: "_Files") -> None:
        raise NotImplementedError


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Files(ocp.args.CheckpointArgs):
    """The files of an entry: what each holds, in pieces, by its name."""

    contents: dict[str, Iterable[bytes]]


@_alone()
def save(store: Store, number: int, tree: Any, record: dict) -> None:
    """Writes an entry; it is there whole when this returns, or not at all.

    Args:
      store: a folder, made if it is not there; ~ is the home folder.
      number: of the entry, e.g. the epoch; an entry of this number is replaced.
      tree: a pytree of arrays, typed random keys and Python's numbers.
      record: text, numbers, booleans, None, lists, and dicts whose keys are text; a tuple comes
        back as a list.

    Raises:
      CheckpointError: it could not be written, or would not come back as it is; what the store
        held is as it was.
    """
    path, where = _path(store, number, _NEW), f"entry {number} in {store}"
    shapes = _shapes(tree, where)
    if not _comes_back(record):
        raise CheckpointError(
            f"{where}: the record would come back from JSON as another; give text, numbers, "
            "booleans, None, lists, and dicts whose keys are text"
        )
    leaves = [_to_plain(leaf) for leaf in jax.tree.leaves(tree)]
    record = {"facts": record, _TREE: _checksum(shapes, leaves), _SHAPES: shapes}
    record[_RECORD] = _record_checksum(record)
    pieces = (leaf.tobytes() for leaf in leaves)
    files = _Files({_TREE_FILE: pieces, _RECORD_FILE: [json.dumps(record).encode()]})
    try:
        ocp.Checkpointer(_Handler()).save(path, files, force=True)
        if jax.process_index() == 0:
            _put_in_place(path.with_suffix(""))
        _wait(path)
    except Exception as error:  # OSError, and what Orbax raises of its own
        if jax.process_index() == 0:
            remove_incomplete(store)
        raise CheckpointError(
            f"{where} cannot be written ({_reason(error)}); the others are "
            "as they were: make room or mend that, and start again"
        ) from error


def restore(store: Store, number: int, like: Any) -> tuple[Any, dict]:
    """Reads an entry of a store and verifies it: the pytree, on the default device, and the record.

    `like` is a pytree of the same structure, of arrays, `jax.ShapeDtypeStruct`s and Python's
    numbers. What JAX cannot hold as it is, such as 64 bits where it is set to 32, comes back as a
    NumPy array.

    Raises:
      CorruptCheckpointError: it is not what was saved.
      CheckpointError: it is missing, or does not fit `like`.
    """
    where, record = f"entry {number} in {store}", _record(store, number)
    shapes = _shapes(like, where)
    if is_dropped(store, number):
        raise CheckpointError(f"{where} has its record alone; its arrays were dropped")
    for saved, asked in zip_longest(record[_SHAPES], shapes, fillvalue="nothing"):
        if saved != asked:
            raise CheckpointError(f"{where} does not fit: it has {saved}, not {asked}")
    content, leaves, end = _read(store, number, _TREE_FILE), [], 0
    for leaf in map(_abstract_plain, jax.tree.leaves(like)):
        if end + leaf.nbytes > len(content):
            raise CorruptCheckpointError(f"{where} is damaged (too short)")
        leaves.append(np.ndarray(leaf.shape, leaf.dtype, content, end).copy())
        end += leaf.nbytes
    if end != len(content) or record[_TREE] != _checksum(shapes, leaves):
        raise CorruptCheckpointError(f"{where} is damaged (wrong checksum)")
    tree = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return jax.tree.map(_from_plain, like, tree), record["facts"]


def valid_steps(store: Store, like: Any) -> tuple[list[int], list[CorruptCheckpointError]]:
    """Restores every entry of a store: the numbers of the good ones, an error for each other one.

    Of one whose pytree was dropped it is the record that must be good.

    Raises:
      CheckpointError: an entry does not fit `like`: it may be good, but is another's.
    """
    good, damaged = [], []
    for number in numbers(store):
        try:
            _record(store, number) if is_dropped(store, number) else restore(store, number, like)
            good.append(number)
        except CorruptCheckpointError as error:
            damaged.append(error)
    return good, damaged


def record(store: Store, number: int) -> dict:
    """The record of an entry alone, verified as by `restore`."""
    return _record(store, number)["facts"]


def checksum(store: Store, number: int) -> str:
    """The SHA-256 of an entry's pytree, as kept in its record, which is verified."""
    return _record(store, number)[_TREE]


def numbers(store: Store) -> list[int]:
    """The numbers of the entries in a store, ascending; empty where there is no such folder."""
    names = [path.name for path in _folder(store).glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if _NUMBER.fullmatch(name))


@_alone()
def drop_tree(store: Store, number: int) -> None:
    """Frees the room of an entry's pytree; its record and its checksum stay."""
    if jax.process_index() == 0:
        path = _path(store, number)
        (path / _DROPPED_FILE).touch()  # first, so that the missing file is never taken for damage
        (path / _TREE_FILE).unlink(missing_ok=True)
    _wait(_path(store, number))


def is_dropped(store: Store, number: int) -> bool:
    """Whether the pytree of an entry was dropped."""
    return (_path(store, number) / _DROPPED_FILE).exists()


@_alone()
def prune(store: Store, surplus: Callable[[list[int]], list[int]]) -> None:
    """Removes the entries that `surplus` picks of the numbers that are there.

    Each is there whole or not at all at every moment. Of several processes the first looks and
    removes, and the others wait for it.
    """
    if jax.process_index() == 0:
        for number in surplus(numbers(store)):
            _path(store, number).rename(_path(store, number, _OLD))
        remove_incomplete(store)
    _wait(_folder(store))


@_alone()
def remove_incomplete(store: Store) -> None:
    """Removes what a killed program left half-written in a store that no program writes to.

    An entry that was whole and not yet in its place is put there.
    """
    for path in sorted(_folder(store).glob(f"*{_NEW}")):
        if _NUMBER.fullmatch(path.stem):
            _put_in_place(path.with_suffix(""))
    for path in sorted(_folder(store).glob("*")):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _put_in_place(path: Path) -> None:
    """Moves a whole new entry to its place, and removes the one that was there."""
    new, old = (path.with_name(path.name + ending) for ending in (_NEW, _OLD))
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _record(store: Store, number: int) -> dict:
    """The record as saved, if its own checksum says so."""
    with contextlib.suppress(ValueError):  # of JSON, or of its text
        record = json.loads(_read(store, number, _RECORD_FILE))
        whole = isinstance(record, dict) and {"facts", _TREE, _SHAPES, _RECORD} <= set(record)
        if whole and record[_RECORD] == _record_checksum(record):
            return record
    raise CorruptCheckpointError(f"entry {number} in {store} is damaged (wrong record)")


@_alone()
def _read(store: Store, number: int, name: str) -> bytes:
    path, problem = _path(store, number), f"no entry {number} in {store}"
    if (path / "record").is_dir():
        problem = f"entry {number} in {store} is of an earlier version of gapjax"
    if not path.is_dir() or (path / "record").is_dir():
        raise CheckpointError(problem)
    try:
        return (path / name).read_bytes()  # by Orbax it takes 1 ms, 18 times as long
    except OSError as error:
        raise CorruptCheckpointError(
            f"entry {number} in {store} cannot be read ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """Why a file could not be read or written, short."""
    code = getattr(error, "errno", None)
    return os.strerror(code) if code else " ".join(str(error).split())[:200] or type(error).__name__


def _shapes(tree: Any, where: str) -> list[str]:
    """Path, type and shape of every leaf; CheckpointError for one that no array of bytes holds."""
    result = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, kind = jax.tree_util.keystr(path), type(leaf).__name__
        is_array = isinstance(leaf, np.ndarray | np.generic | jax.Array | jax.ShapeDtypeStruct)
        if not (is_array or type(leaf) in _SCALARS) or _abstract_plain(leaf).dtype.hasobject:
            raise CheckpointError(f"{where}: the leaf {name} is {kind}; give an array")
        result.append(f"{name} {leaf.dtype}{list(leaf.shape)}" if is_array else f"{name} {kind}")
    return result


def _wait(path: Path) -> None:
    """Returns when all processes of the run have come here."""
    ocp.multihost.sync_global_processes(f"gapjax:{path}:{next(_waits)}")


def _folder(store: Store) -> Path:
    return Path(os.path.expanduser(store)).absolute()


def _path(store: Store, number: int, ending: str = "") -> Path:
    """The folder of an entry; CheckpointError for a number that is none."""
    if isinstance(number, bool) or not hasattr(number, "__index__") or operator.index(number) < 0:
        raise CheckpointError(f"number={number!r} is not that of an entry; give 0, 1, 2, ...")
    return _folder(store) / f"{operator.index(number)}{ending}"


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)


def _to_plain(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _abstract_plain(leaf: Any) -> np.ndarray:
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return np.asarray(leaf) if type(leaf) in _SCALARS else np.empty(leaf.shape, leaf.dtype)


def _from_plain(like: Any, leaf: np.ndarray) -> Any:
    if type(like) in _SCALARS:
        return leaf.item()
    if _is_key(like):
        return jax.random.wrap_key_data(jax.numpy.asarray(leaf), impl=like.dtype._impl)
    try:
        array = jax.numpy.asarray(leaf)
    except TypeError:  # text and the like
        return leaf
    return array if array.dtype == leaf.dtype else leaf


def _comes_back(record: dict) -> bool:
    """Whether JSON gives back all of a record under its names; it would make text of numbers."""
    names = lambda held: [jax.tree_util.keystr(at) for at, _ in jax.tree.leaves_with_path(held)]
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        return names(json.loads(json.dumps(record))) == names(record)
    return False


def _record_checksum(record: dict) -> str:
    signed = {key: value for key, value in record.items() if key != _RECORD}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


def _checksum(shapes: list[str], leaves: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for shape, leaf in zip(shapes, leaves, strict=True):
        digest.update(f"{shape}\n".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()
