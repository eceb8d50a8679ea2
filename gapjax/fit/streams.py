"""A source of x whose examples stay on the host, for sets larger than the device.

Before each compiled call `train` and the refits load the examples of its steps: the order of an
epoch is made on the host, so a chunk of it is an array like any other.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gapjax.data.dataset import dense, narrow
from gapjax.examples import Examples, count, on_device, take
from gapjax.model.checks import check_positive

_FEW = 100


def stream_source(examples: Examples, shard_size: int | None = None) -> "StreamSource":
    """The empirical distribution of a set that stays on the host, for one larger than the device.

    Each example comes once per epoch, in a new order: that of the shards is random, and that in
    each of them. On the device is the part of the epoch that one compiled call sees, at most 512
    steps and 128 MiB, with up to twice as much for its batches; it is given up before the next is
    loaded. The order is a function of the key and the epoch, so a run that is resumed continues bit
    for bit.

    `train` and the refits take it, also in a mixture. `kernel` does not. Sets that are evaluated
    have to fit the device.

    Args:
      examples: [N, *event], or a list of such sets, one after another; in each an array, a memory
        map, a sparse matrix of SciPy, or what else has `shape`, `dtype` and slices, such as a
        dataset of h5py; or a dict or `Given` of these. A sparse matrix becomes dense chunk by
        chunk, in the smallest type that holds its values.
      shard_size: examples that are read and shuffled together. None: each set as a whole, which
        suits what has its rows at hand; give a number for a file that is slow to read in any order.

    Raises:
      TypeError: something has no leading axis, or the sets differ in more than their number.
      ValueError: there are no examples.
    """
    parts = [_held(part) for part in (examples if isinstance(examples, list) else [examples])]
    kinds = {str(jax.tree.map(lambda leaf: leaf.shape[1:], part)) for part in parts}
    sizes = {leaf.shape[:1] for part in parts for leaf in jax.tree.leaves(part)}
    per_part = [{leaf.shape[:1] for leaf in jax.tree.leaves(part)} for part in parts]
    if len(kinds) > 1 or () in sizes or any(len(found) > 1 for found in per_part):
        shapes = [[leaf.shape for leaf in jax.tree.leaves(part)] for part in parts]
        raise TypeError(f"examples have the shapes {shapes}; give sets [N, *event] of one event")
    if not parts or (0,) in sizes:
        raise ValueError("examples are empty; at least one example is needed in each set")
    check_positive(shard_size=1 if shard_size is None else shard_size)
    shards = Shards(parts, shard_size)
    return StreamSource(on_device(shards.rows((0,), 0, min(_FEW, shards.num_examples))), shards)


def _held(part: Examples) -> Examples:
    """A set whose sparse matrices have rows at hand, in their smallest type."""
    for leaf in jax.tree.leaves(part):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            kind = type(leaf).__name__
            raise TypeError(f"examples hold a {kind}; give arrays, or what has a shape and slices")
    return jax.tree.map(lambda leaf: narrow(leaf) if hasattr(leaf, "tocoo") else leaf, part)


class Shards:
    """Sets of examples on the host, cut into shards, of which the last that was read is kept."""

    def __init__(self, parts: Sequence[Examples], shard_size: int | None):
        self._shards: list[tuple[Examples, slice]] = []
        for part in parts:
            size = min(shard_size or count(part), count(part))
            starts = range(0, count(part), size)
            self._shards += [(part, slice(i, min(i + size, count(part)))) for i in starts]
        self._sizes = np.array([rows.stop - rows.start for _, rows in self._shards])
        leaves = [[leaf.dtype for leaf in jax.tree.leaves(part)] for part in parts]
        self._dtypes = [np.result_type(*each) for each in zip(*leaves, strict=True)]
        self.num_examples = int(self._sizes.sum())
        self._last: tuple[Any, Examples, np.ndarray] = (None, None, np.zeros(0))

    def rows(self, seed: tuple[int, ...], first: int, number: int) -> Examples:
        """The examples [number, ...] from position `first` on, in the order of a seed."""
        order = np.random.default_rng(seed).permutation(len(self._sizes))
        begins = np.cumsum(self._sizes[order]) - self._sizes[order]
        taken = []
        for shard, begin in zip(order.tolist(), begins.tolist(), strict=True):
            start, stop = max(first - begin, 0), min(first + number - begin, self._sizes[shard])
            if start < stop:
                taken.append(self._shard_rows(seed, shard, slice(start, stop)))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *taken)

    def _shard_rows(self, seed: tuple[int, ...], shard: int, positions: slice) -> Examples:
        """The examples at these positions of a shard, in its order."""
        if self._last[0] != (seed, shard):
            part, rows = self._shards[shard]
            order = np.random.default_rng((*seed, shard + 1)).permutation(self._sizes[shard])
            self._last = None, None, order  # not two shards at once
            self._last = (seed, shard), take(part, rows), order
        _, held, order = self._last
        leaves, treedef = jax.tree.flatten(take(held, order[positions]))
        pairs = zip(map(dense, leaves), self._dtypes, strict=True)
        return jax.tree.unflatten(treedef, [x.astype(dtype, copy=False) for x, dtype in pairs])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamSource:
    """See `stream_source`. On the device are a few examples, which say what the others are like."""

    few: Examples
    shards: Shards = dataclasses.field(metadata={"static": True})

    @property
    def num_examples(self) -> int:
        """N."""
        return self.shards.num_examples

    def begin_epoch(self, rng_key: jax.Array) -> None:
        """Nothing: the order is made on the host."""
        del rng_key

    def draw(self, plan: None, rng_key: jax.Array, position: jax.Array) -> Any:
        """One example, for its shape and type; those of an epoch have to be loaded."""
        del plan, rng_key, position
        return take(self.few, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoadedSource:
    """The examples of an epoch of a stream from position `first` on."""

    chunk: Examples
    first: jax.Array
    num_examples: int = dataclasses.field(metadata={"static": True})

    def begin_epoch(self, rng_key: jax.Array) -> None:
        """Nothing: they are in order."""
        del rng_key

    def draw(self, plan: None, rng_key: jax.Array, position: jax.Array) -> Any:
        """The example at `position` of the epoch."""
        del plan, rng_key
        return take(self.chunk, jnp.clip(position - self.first, 0, count(self.chunk) - 1))


def streams(source: Any) -> list[StreamSource]:
    """The streams in a source that are not loaded."""
    is_stream = lambda node: isinstance(node, StreamSource)
    return list(filter(is_stream, jax.tree.leaves(source, is_leaf=is_stream)))


def loaded(source: Any, plan_key: jax.Array, first: int, number: int) -> Any:
    """The source with the examples of its streams from position `first` of an epoch on."""
    seed = tuple(np.asarray(jax.random.key_data(plan_key)).ravel().tolist())

    def load(node: Any) -> Any:
        if not isinstance(node, StreamSource):
            return node
        rows = node.shards.rows(seed, first, number)
        return LoadedSource(on_device(rows), jnp.asarray(first, jnp.int32), node.num_examples)

    return jax.tree.map(load, source, is_leaf=lambda node: isinstance(node, StreamSource))
