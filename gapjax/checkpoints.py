"""Save, restore and verify pytrees, each with a record of what it is.

A store is a folder; an entry is a subfolder named by its number (an epoch) that holds a pytree
and a JSON record. Orbax writes an entry elsewhere and renames it when it is whole, so an entry
that can be seen was finished; its SHA-256, kept in the record, is checked when it is restored.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

_TREE, _RECORD = "tree_sha256", "record_sha256"


class CheckpointError(RuntimeError):
    """An entry is missing, damaged, or of another shape than asked for; one line says which."""


def save(store: Path, number: int, tree: Any, record: dict) -> None:
    """Writes an entry; it is there whole when this returns, or not at all.

    Args:
      store: folder of the store; made if it is not there.
      number: of the entry, e.g. the epoch. An entry of this number is replaced.
      tree: a pytree of arrays; typed random keys are kept as such.
      record: JSON-able facts about the entry.
    """
    tree = jax.tree.map(_to_plain, tree)
    record = {"facts": record, _TREE: _checksum(tree)}
    record[_RECORD] = _record_checksum(record)
    arguments = ocp.args.Composite(
        tree=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(record)
    )
    _checkpointer().save(_path(store, number), arguments, force=True)


def restore(store: Path, number: int, like: Any) -> tuple[Any, dict]:
    """Reads an entry and verifies it.

    Args:
      store: folder of the store.
      number: of the entry.
      like: a pytree of the same structure, of arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      The pytree, on the default device, and the record.

    Raises:
      CheckpointError: it is missing, damaged, or does not fit `like`.
    """
    abstract = jax.tree.map(_abstract_plain, like)
    entry = _read(
        store, number, tree=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore()
    )
    record = _verified(entry.record, store, number)
    misfits = [
        f"{jax.tree_util.keystr(path)} is {have.dtype}{list(have.shape)}, "
        f"not {want.dtype}{list(want.shape)}"
        for (path, want), have in zip(
            jax.tree_util.tree_flatten_with_path(abstract)[0],
            jax.tree.leaves(entry.tree),
            strict=True,
        )
        if (have.dtype, have.shape) != (want.dtype, want.shape)
    ]
    if misfits:
        raise CheckpointError(f"checkpoint {number} in {store} does not fit: {misfits[0]}")
    if record[_TREE] != _checksum(entry.tree):
        raise CheckpointError(f"checkpoint {number} in {store} is damaged: wrong checksum")
    return jax.tree.map(_from_plain, like, entry.tree), record["facts"]


def record(store: Path, number: int) -> dict:
    """The record of an entry alone, verified.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    entry = _read(store, number, record=ocp.args.JsonRestore())
    return _verified(entry.record, store, number)["facts"]


def checksum(store: Path, number: int) -> str:
    """The SHA-256 of an entry's pytree, as kept in its record.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    entry = _read(store, number, record=ocp.args.JsonRestore())
    return _verified(entry.record, store, number)[_TREE]


def numbers(store: Path) -> list[int]:
    """The numbers of the entries in a store, ascending; empty where there is no such folder."""
    if not Path(store).is_dir():
        return []
    return sorted(int(p.name) for p in Path(store).iterdir() if p.name.isdigit() and p.is_dir())


def _read(store: Path, number: int, **items: Any) -> Any:
    path = _path(store, number)
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint {number} in {store}")
    try:
        return _checkpointer().restore(path, ocp.args.Composite(**items))
    except Exception as error:  # Orbax, tensorstore and JSON each raise their own
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint {number} in {store} cannot be read: {reason}") from error


@functools.cache
def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _path(store: Path, number: int) -> Path:
    return Path(store).absolute() / str(number)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_plain(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _abstract_plain(leaf: Any) -> np.ndarray:
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return np.empty(leaf.shape, leaf.dtype)


def _from_plain(like: Any, leaf: np.ndarray) -> jax.Array:
    return jax.random.wrap_key_data(leaf) if _is_key(like) else jax.numpy.asarray(leaf)


def _verified(record: Any, store: Path, number: int) -> dict:
    """The record as saved, if its own checksum says so."""
    whole = isinstance(record, dict) and {"facts", _TREE, _RECORD} <= set(record)
    if not whole or record[_RECORD] != _record_checksum(record):
        raise CheckpointError(f"the record of checkpoint {number} in {store} is damaged")
    return record


def _record_checksum(record: dict) -> str:
    signed = {key: value for key, value in record.items() if key != _RECORD}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


def _checksum(tree: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        leaf = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
