"""Save, restore and verify pytrees, each with a record of what it is.

A store is a folder; an entry is a subfolder named by its number (an epoch) that holds a pytree
and a JSON record. An entry is written beside its place and renamed when it is whole, so an entry
that can be seen was finished; its SHA-256, kept in the record, is checked when it is restored.
An entry of the same number stays until the new one is whole. Threads may share a store.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

_TREE, _SHAPES, _RECORD = "tree_sha256", "shapes", "record_sha256"
_NEW, _OLD = ".new", ".old"  # endings of an entry that waits for its place, and of one that left it
_LOOKS, _PAUSE = 10, 0.1  # at the store after a failed save; seconds before each
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


@_alone()
def save(store: Path, number: int, tree: Any, record: dict) -> None:
    """Writes an entry; it is there whole when this returns, or not at all.

    The store is a folder, made if it is not there. An entry of this number, e.g. the epoch, is
    replaced. Typed random keys in the tree are kept as such; the record is JSON-able.

    Raises:
      CheckpointError: it could not be written; what the store held is as it was.
    """
    tree = jax.tree.map(_to_plain, tree)
    record = {"facts": record, _TREE: _checksum(tree), _SHAPES: _shapes(tree)}
    record[_RECORD] = _record_checksum(record)
    items = {"tree": ocp.args.StandardSave(tree), "record": ocp.args.JsonSave(record)}
    try:
        _checkpointer().save(_path(store, number, _NEW), ocp.args.Composite(**items), force=True)
        if jax.process_index() == 0:
            _put_in_place(_path(store, number))
        _wait(_path(store, number))
    except Exception as error:  # Orbax and tensorstore each raise their own
        if jax.process_index() == 0:
            for _ in range(_LOOKS):  # tensorstore's threads write on for a moment after the error
                time.sleep(_PAUSE)
                remove_incomplete(store)
        raise CheckpointError(
            f"checkpoint {number} in {store} cannot be written ({_reason(error)}); the others are "
            "as they were: make room or mend that, and start again"
        ) from error


def restore(store: Path, number: int, like: Any) -> tuple[Any, dict]:
    """Reads an entry of a store and verifies it: the pytree, on the default device, and the record.

    `like` is a pytree of the same structure, of arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      CorruptCheckpointError: it is not what was saved.
      CheckpointError: it is missing, or does not fit `like`.
    """
    abstract = jax.tree.map(_abstract_plain, like)
    record = _record(store, number)
    for saved, asked in zip_longest(record[_SHAPES], _shapes(abstract), fillvalue="nothing"):
        if saved != asked:
            misfit = f"it has {saved}, not {asked}"
            raise CheckpointError(f"checkpoint {number} in {store} does not fit: {misfit}")
    tree = _read(store, number, tree=ocp.args.StandardRestore(abstract)).tree
    if record[_TREE] != _checksum(tree):
        raise CorruptCheckpointError(f"checkpoint {number} in {store} is damaged (wrong checksum)")
    return jax.tree.map(_from_plain, like, tree), record["facts"]


def valid_steps(store: Path, like: Any) -> tuple[list[int], list[CorruptCheckpointError]]:
    """Restores every entry of a store: the numbers of the good ones, an error for each other one.

    Raises:
      CheckpointError: an entry does not fit `like`: it may be good, but is another's.
    """
    good, damaged = [], []
    for number in numbers(store):
        try:
            restore(store, number, like)
            good.append(number)
        except CorruptCheckpointError as error:
            damaged.append(error)
    return good, damaged


def record(store: Path, number: int) -> dict:
    """The record of an entry alone, verified as by `restore`."""
    return _record(store, number)["facts"]


def checksum(store: Path, number: int) -> str:
    """The SHA-256 of an entry's pytree, as kept in its record, which is verified."""
    return _record(store, number)[_TREE]


def numbers(store: Path) -> list[int]:
    """The numbers of the entries in a store, ascending; empty where there is no such folder."""
    names = [path.name for path in Path(store).glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if _NUMBER.fullmatch(name))


@_alone()
def prune(store: Path, surplus: Callable[[list[int]], list[int]]) -> None:
    """Removes the entries that `surplus` picks of the numbers that are there.

    Each is there whole or not at all at every moment. Of several processes the first looks and
    removes, and the others wait for it.
    """
    if jax.process_index() == 0:
        for number in surplus(numbers(store)):
            _path(store, number).rename(_path(store, number, _OLD))
        remove_incomplete(store)
    _wait(Path(store))


@_alone()
def remove_incomplete(store: Path) -> None:
    """Removes what a killed program left half-written in a store that no program writes to.

    An entry that was whole and not yet in its place is put there.
    """
    for path in sorted(Path(store).absolute().glob(f"*{_NEW}")):
        if _NUMBER.fullmatch(path.stem):
            _put_in_place(path.with_suffix(""))
    for path in sorted(Path(store).absolute().glob("*")):
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


def _record(store: Path, number: int) -> dict:
    """The record as saved, if its own checksum says so."""
    record = _read(store, number, record=ocp.args.JsonRestore()).record
    whole = isinstance(record, dict) and {"facts", _TREE, _SHAPES, _RECORD} <= set(record)
    if not whole or record[_RECORD] != _record_checksum(record):
        raise CorruptCheckpointError(f"checkpoint {number} in {store} is damaged (wrong record)")
    return record


@_alone()
def _read(store: Path, number: int, **items: Any) -> Any:
    if not _path(store, number).is_dir():
        raise CheckpointError(f"no checkpoint {number} in {store}")
    try:
        return _checkpointer().restore(_path(store, number), ocp.args.Composite(**items))
    except Exception as error:  # Orbax, tensorstore and JSON each raise their own
        raise CorruptCheckpointError(
            f"checkpoint {number} in {store} cannot be read ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """Why a file could not be read or written, short."""
    text = " ".join(str(error).split())
    number = re.search(r"os_error_code='(\d+)'", text)  # tensorstore's form
    code = int(number[1]) if number else getattr(error, "errno", None)
    return os.strerror(code) if code else text[:200] or type(error).__name__


def _shapes(tree: Any) -> list[str]:
    """Path, type and shape of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [f"{jax.tree_util.keystr(path)} {x.dtype}{list(x.shape)}" for path, x in leaves]


def _wait(path: Path) -> None:
    """Returns when all processes of the run have come here."""
    ocp.multihost.sync_global_processes(f"gapjax:{path}:{next(_waits)}")


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _path(store: Path, number: int, ending: str = "") -> Path:
    return Path(store).absolute() / f"{number}{ending}"


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_plain(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _abstract_plain(leaf: Any) -> np.ndarray:
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return np.empty(leaf.shape, leaf.dtype)


def _from_plain(like: Any, leaf: np.ndarray) -> jax.Array:
    array = jax.numpy.asarray(leaf)
    return jax.random.wrap_key_data(array) if _is_key(like) else array


def _record_checksum(record: dict) -> str:
    signed = {key: value for key, value in record.items() if key != _RECORD}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


def _checksum(tree: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
