"""The free parameters of a distribution: its parameters as unconstrained real arrays, and back."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Distribution, biject_to, constraints


def to_free(distribution: Any) -> list[jax.Array]:
    """The parameters of a distribution as unconstrained real arrays, which an optimizer may move.

    A parameter that NumPyro knows a constraint of (a scale is positive) is mapped to the reals by
    the bijection of that constraint; every other float leaf of the pytree is taken as it is. The
    order is that of the leaves' paths, which is the same in every process.
    """
    leaves, treedef = jax.tree.flatten(distribution)
    return [
        biject_to(constraint).inv(jnp.asarray(leaves[i], jnp.result_type(leaves[i])))
        for i, constraint in _places(distribution, treedef, leaves)
    ]


def from_free(like: Any, free: list[jax.Array]) -> Any:
    """The distribution of the form of `like` with these free parameters; inverts `to_free`."""
    leaves, treedef = jax.tree.flatten(like)
    for (i, constraint), value in zip(_places(like, treedef, leaves), free, strict=True):
        leaves[i] = biject_to(constraint)(value)
    return jax.tree.unflatten(treedef, leaves)


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
