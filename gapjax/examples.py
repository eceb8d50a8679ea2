"""Examples, one or a set with a leading axis [N]: an array, a dict of arrays, or a `Given`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gapjax.vae import Given

Examples = Any  # [N, *event] in every array


def count(examples: Examples) -> int:
    """N."""
    return np.shape(jax.tree.leaves(examples)[0])[0]


def take(examples: Examples, index: Any) -> Any:
    """The example at an index, or the set of those at several."""
    return jax.tree.map(lambda leaf: leaf[index], examples)


def on_device(examples: Examples) -> Examples:
    """The same with arrays of JAX."""
    return jax.tree.map(jnp.asarray, examples)


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
