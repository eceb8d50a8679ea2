"""Checks of single arguments, which name the argument and its value."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def check_array(name: str, images: Any) -> None:
    """Raises TypeError unless this is an array [N, *event], and ValueError if N is 0."""
    if not (hasattr(images, "shape") and hasattr(images, "dtype")):
        fields = [field for field in ("test", "images") if hasattr(images, field)]
        hint = "".join(f"; its .{field} is one" for field in fields[:1])
        raise TypeError(
            f"{name} is of type {type(images).__name__}, not an array [N, *event]{hint}"
        )
    if images.ndim == 0:
        raise TypeError(f"{name} is a scalar, not an array [N, *event]")
    if images.shape[0] == 0:
        raise ValueError(f"{name} is empty; at least one image is needed")


def check_concrete(function: str, instead: str, **arguments: Any) -> None:
    """Raises TypeError where an argument is traced by jax.jit, jax.grad or jax.vmap.

    Args:
      function: that needs the values of its arguments.
      instead: what to use inside a transformation.
      **arguments: pytrees, by name.
    """
    for name, tree in arguments.items():
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
            raise TypeError(
                f"{name} is traced: {function} compiles and runs its programs itself and cannot be "
                f"called inside jax.jit, jax.grad or jax.vmap; {instead}"
            )


def check_key(rng_key: Any, name: str = "rng_key") -> None:
    """Raises TypeError unless this is one key, and ValueError where it is an array of keys."""
    if not hasattr(rng_key, "dtype"):
        raise TypeError(
            f"{name} is of type {type(rng_key).__name__}, not a key; see jax.random.key"
        )
    if jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key):
        number = rng_key.shape
    elif rng_key.dtype == jnp.uint32 and rng_key.ndim:  # of the old kind, an array [2]
        number = rng_key.shape[:-1]
    else:
        raise TypeError(f"{name} is an array of {rng_key.dtype}, not a key; see jax.random.key")
    if number:
        raise ValueError(f"{name} holds keys of the shape {number}; one key is needed")


def check_integer(name: str, value: Any) -> None:
    """Raises ValueError unless this is an integer, NumPy's among them."""
    try:
        operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; it must be an integer") from None
