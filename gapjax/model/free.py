"""The free parameters of a distribution: its parameters as unconstrained real arrays, and back."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Distribution, ExpandedDistribution, biject_to, constraints

from gapjax.vae import Frozen


def to_free(distribution: Any) -> list[jax.Array]:
    """The parameters of a distribution as unconstrained real arrays, which an optimizer may move.

    A parameter that NumPyro knows a constraint of (a scale is positive) is mapped to the reals by
    the bijection of that constraint; every other float leaf is taken as it is. All are first
    `written_out`; they are in the order of their paths and have one type, float32 at least. What is
    in a `Frozen` is not among them.
    """
    distribution = written_out(distribution)
    leaves, treedef = jax.tree.flatten(distribution)
    places = _places(distribution, treedef, leaves)
    dtype = jnp.result_type(jnp.float32, *(jnp.result_type(leaves[i]) for i, _ in places))
    return [biject_to(constraint).inv(jnp.asarray(leaves[i], dtype)) for i, constraint in places]


def from_free(like: Any, free: list[jax.Array]) -> Any:
    """The distribution of the form of `like` with these free parameters; inverts `to_free`."""
    like = written_out(like)
    leaves, treedef = jax.tree.flatten(like)
    for (i, constraint), value in zip(_places(like, treedef, leaves), free, strict=True):
        leaves[i] = biject_to(constraint)(value)
    return jax.tree.unflatten(treedef, leaves)


def written_out(distribution: Any) -> Any:
    """The same distribution; of NumPyro's, however expanded, every parameter has its full shape."""
    is_known = isinstance(distribution, Distribution)
    return _spread(distribution, distribution.batch_shape) if is_known else distribution


def of_images(posteriors: Any, images: Any) -> Any:
    """Posteriors of N images, whose batch axis [N] if any is forgotten as `jax.vmap` forgets it."""
    batch_shape = posteriors.batch_shape if isinstance(posteriors, Distribution) else ()
    if not batch_shape or batch_shape[:1] != getattr(images, "shape", ())[:1]:
        return posteriors
    return _spread(posteriors, batch_shape, dropped=1)


def _spread(given: Any, batch_shape: tuple[int, ...], dropped: int = 0) -> Any:
    """`given` broadcast to a batch shape, of which it then forgets the first axes."""
    if isinstance(given, ExpandedDistribution):
        return _spread(given.base_dist, batch_shape, dropped)
    made, ndim = copy.copy(given), len(given.batch_shape)
    for name in given.gather_pytree_data_fields():
        value = given.__dict__.get(name)
        if isinstance(value, Distribution):  # its batch may have axes that are events out here
            made.__dict__[name] = _spread(value, batch_shape + value.batch_shape[ndim:], dropped)
        elif name in given.arg_constraints and value is not None:
            with contextlib.suppress(NotImplementedError):  # its shape may be any
                event_dim = given.arg_constraints[name].event_dim
                shape = batch_shape + jnp.shape(value)[jnp.ndim(value) - event_dim :]
                if jnp.shape(value) != shape and jnp.ndim(value) <= len(shape):
                    made.__dict__[name] = jnp.broadcast_to(value, shape)
    made._batch_shape = batch_shape[dropped:]
    return made


def _places(distribution: Any, treedef: Any, leaves: list) -> list[tuple[int, Any]]:
    """(leaf number, constraint) of every float leaf, in the order of names and not of hashes."""
    name = type(distribution).__name__
    if not getattr(distribution, "has_rsample", True):
        raise TypeError(f"{name} cannot be optimised: no gradient passes through its samples")
    if not all(isinstance(leaf, jax.Array | np.ndarray | float | int) for leaf in leaves):
        raise TypeError(
            f"{name} cannot be optimised: it is no pytree of arrays; return a NumPyro "
            "distribution from encode, or register yours with jax.tree_util.register_dataclass"
        )
    numbered = jax.tree.unflatten(treedef, list(range(len(leaves))))
    places = [
        (i, constraint)
        for i, constraint in _constraints_of(numbered, constraints.real)
        if jnp.issubdtype(jnp.result_type(leaves[i]), jnp.floating)
    ]
    if not places:
        raise TypeError(f"{name} cannot be optimised: it has no parameter of a float type")
    return places


def _constraints_of(node: Any, constraint: Any) -> Iterator[tuple[int, Any]]:
    """Yields (leaf number, constraint) under a node of a pytree whose leaves are their numbers."""
    if isinstance(node, int):
        yield node, constraint
    elif isinstance(node, Frozen):  # weights that all examples share are no example's own
        return
    elif isinstance(node, Distribution):
        for name in sorted(node.gather_pytree_data_fields()):
            known = node.arg_constraints.get(name, constraints.real)
            try:
                biject_to(known)
            except NotImplementedError:
                known = constraints.real
            yield from _constraints_of(node.__dict__.get(name), known)
    elif node is not None:
        children = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda leaf: leaf is not node)
        for _, child in sorted(children, key=lambda pair: jax.tree_util.keystr(pair[0])):
            yield from _constraints_of(child, constraints.real)
