"""Examples, one or a set with a leading axis [N]: an array, a dict of arrays, or a `Given`."""

import math
from typing import Any

import jax
import numpy as np

from gapjax import parallel
from gapjax.vae import Frozen, Given

Examples = Any  # [N, *event] in every array


def count(examples: Examples) -> int:
    """N."""
    return np.shape(jax.tree.leaves(examples)[0])[0]


def take(examples: Examples, index: Any) -> Any:
    """The example at an index, or the set of those at several. What is `Frozen` stays as it is."""
    one = lambda leaf: leaf if _is_frozen(leaf) else leaf[index]
    return jax.tree.map(one, examples, is_leaf=_is_frozen)


def own(posteriors: Any) -> Any:
    """Posteriors of several examples, or one, without what all share: the content of a `Frozen`."""
    without = lambda leaf: Frozen(None) if _is_frozen(leaf) else leaf
    return jax.tree.map(without, posteriors, is_leaf=_is_frozen)


def with_shared(posteriors: Any, like: Any) -> Any:
    """The inverse of `own`: what `like` has in a `Frozen` is put back."""
    shared = filter(_is_frozen, jax.tree.leaves(like, is_leaf=_is_frozen))
    fill = lambda leaf: next(shared) if _is_frozen(leaf) else leaf
    return jax.tree.map(fill, posteriors, is_leaf=_is_frozen)


def _is_frozen(node: Any) -> bool:
    return isinstance(node, Frozen)


def on_device(examples: Examples) -> Examples:
    """The same with arrays of JAX."""
    return parallel.put(examples)


def shape_of_one(examples: Examples) -> Any:
    """Shape and dtype of one example."""
    one = lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf)[1:], leaf.dtype)
    return jax.tree.map(one, examples)


def x_of(example: Any) -> Any:
    """The x of an example, without its context."""
    return example.x if isinstance(example, Given) else example


def context_of(example: Any) -> Any:
    """The context of an example or of a set; None where there is none."""
    return example.context if isinstance(example, Given) else None


def with_x(example: Any, x: Any) -> Any:
    """The example with another x, in its context."""
    return example._replace(x=x) if isinstance(example, Given) else x


def event_shape(example: Any) -> tuple[int, ...]:
    """The shape of one x; of a pytree (D,), D the number of its entries. A context has none."""
    x = x_of(example)
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(x)]
    return shapes[0] if hasattr(x, "shape") else (sum(map(math.prod, shapes)),)


def num_bytes(example: Any) -> int:
    """Bytes of one example."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(example))


def dtypes_of(example: Any) -> Any:
    """The dtype of each array of an example."""
    return jax.tree.map(lambda leaf: leaf.dtype, example)
