"""Programs compiled for several devices, and the layouts of their arguments.

Callers do not treat one device specially: for one device programs are compiled with `jax.jit`,
without a mapped axis.

`jax.pmap` is used in this file only. JAX keeps it as a layer over `jax.shard_map`. A move to
`shard_map` would stay within this file:

  * One `Mesh((devices,), ("shards",))` takes the place of the `devices` argument, also for the
    layouts of `split_members` and `replicate`, which use such a mesh already.
  * `data_parallel` becomes `jax.jit(shard_map(share, mesh, in_specs=(P(), P()), out_specs=P()),
    donate_argnums=0)`. `Shard.index` becomes `jax.lax.axis_index`, so the argument that holds the
    indices is dropped. `psum` and `all_gather` stay as they are. Results of `all_gather` count as
    varying over the axis, so either `check_vma=False` or `all_gather_invariant` is needed.
  * `member_parallel` takes `P("shards")` for members. `shard_map` keeps the mapped axis: a member
    block is [R / D, ...] of a global [R, ...], so `split_members` only pads, and no reshape to
    [D, R / D, ...] is needed.
  * With several processes, arrays are global: `replicate` places them on the devices of all
    processes (`jax.make_array_from_process_local_data`), where today it uses the local ones.

The compiled programs would differ, so the last bits of results on several devices may change.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gapjax.parallel.devices import Device, Devices, local_devices

_AXIS = "shards"


class Shard(NamedTuple):
    """The share of a computation that one device does; `WHOLE` on a single device.

    Attributes:
      index: [] int32, number of this share.
      count: number of shares, static.
      axis_name: name of the mapped axis; None on a single device.
    """

    index: jax.Array | int  # type: ignore[assignment]
    count: int  # type: ignore[assignment]
    axis_name: str | None

    def sum(self, tree: Any) -> Any:
        """The sum of a tree of floats over all shares, by one all-reduce."""
        if self.axis_name is None:
            return tree
        flat, unravel = ravel_pytree(tree)
        return unravel(jax.lax.psum(flat, self.axis_name))

    def split(self, tree: Any) -> Any:
        """This share's part of arrays [N, ...]: [N / count rounded up, ...].

        Parts beyond the end are padded with the last entry; `merge` is the inverse.
        """
        if self.count == 1:
            return tree

        def part(leaf: jax.Array) -> jax.Array:
            size = -(-len(leaf) // self.count)
            return leaf[jnp.minimum(self.index * size + jnp.arange(size), len(leaf) - 1)]

        return jax.tree.map(part, tree)

    def merge(self, tree: Any, num_entries: int) -> Any:
        """Arrays [N, ...] from the parts of all shares; the inverse of `split`."""
        if self.count == 1:
            return tree
        return jax.tree.map(lambda part: self.concatenate(part)[:num_entries], tree)

    def concatenate(self, values: jax.Array) -> jax.Array:
        """The values [n, ...] of all shares in their order, [count n, ...]."""
        if self.axis_name is None:
            return values
        return jax.lax.all_gather(values, self.axis_name, tiled=True)


WHOLE = Shard(0, 1, None)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function of (donated, *kept) with `.lower`, like a jitted one.

    Attributes:
      arrange: (donated, *kept) to the arguments of `program`.
      program: what JAX compiled.
    """

    arrange: Callable[..., tuple]
    program: Any

    def __call__(self, donated: Any, *kept: Any) -> Any:
        """Runs the program."""
        return self.program(*self.arrange(donated, *kept))

    def lower(self, donated: Any, *kept: Any) -> Any:
        """Traces and lowers it, see `jax.stages.Lowered`."""
        return self.program.lower(*self.arrange(donated, *kept))


def data_parallel(function: Callable[..., Any], devices: Devices) -> Program:
    """Compiles `function(shard, donated, *kept)` for one computation on all `devices`.

    Args:
      function: pure. Its results must be the same on every device, which is what `Shard.sum` and
        `Shard.concatenate` are for.
      devices: on which it runs.

    Returns:
      A `Program` of (donated, *kept). Its arguments and results are replicated, see `replicate`.
      The buffers of `donated` are donated.
    """
    if len(devices) == 1:

        def whole(donated, kept):
            return function(WHOLE, donated, *kept)

        program = jax.jit(_named(whole, function), donate_argnums=0)
        return Program(lambda donated, *kept: (donated, kept), program)

    def share(index, donated, kept):
        return function(Shard(index, len(devices), _AXIS), donated, *kept)

    program = jax.pmap(
        _named(share, function), _AXIS, in_axes=(0, None, None), out_axes=None, donate_argnums=1,
        devices=devices,
    )  # fmt: skip
    here = [i for i, device in enumerate(devices) if device in local_devices(devices)]
    indices = jnp.asarray(here, jnp.int32)
    return Program(lambda donated, *kept: (indices, donated, kept), program)


def member_parallel(function: Callable[..., Any], devices: Devices) -> Callable[..., Any]:
    """Compiles `function(donated, split, shared)` of stacked members for `devices`.

    Args:
      function: pure; `donated` and `split` have a leading axis of members, its results too.
      devices: among which the members are divided; all of this process.

    Returns:
      A function of (donated, split, shared). The first two and the results are in the layout of
      `split_members`, the last is replicated. The buffers of `donated` are donated.
    """
    if len(devices) == 1:
        return jax.jit(function, donate_argnums=0)
    return jax.pmap(function, _AXIS, in_axes=(0, 0, None), donate_argnums=0, devices=devices)


def split_members(tree: Any, devices: Devices) -> Any:
    """Divides stacked members [R, ...] among devices: [D, R/D rounded up, ...].

    If R is not a multiple of D, the members are padded with copies of the first, which
    `join_members` drops. On one device the shapes do not change.
    """
    if len(devices) == 1:
        return jax.device_put(tree, devices[0])
    sharding = NamedSharding(Mesh(np.asarray(devices), (_AXIS,)), PartitionSpec(_AXIS))

    def split(leaf: jax.Array) -> jax.Array:
        missing = -len(leaf) % len(devices)
        padded = jnp.concatenate([leaf, jnp.stack([leaf[0]] * missing)]) if missing else leaf
        shape = (len(devices), len(padded) // len(devices), *leaf.shape[1:])
        return jax.device_put(padded.reshape(shape), sharding)

    return jax.tree.map(split, tree)


def join_members(tree: Any, num_members: int, devices: Devices) -> Any:
    """The inverse of `split_members`: [R, ...], on the default device."""
    if len(devices) == 1:
        return tree

    def join(leaf: jax.Array) -> jax.Array:
        leaf = jax.device_put(leaf, devices[0])
        return leaf.reshape(-1, *leaf.shape[2:])[:num_members]

    return jax.tree.map(join, tree)


def replicate(tree: Any, devices: Devices, *, commit: bool = True) -> Any:
    """Copies the tree to each of `devices` that belongs to this process.

    Args:
      tree: of arrays.
      devices: where to.
      commit: on a single device, commit the arrays to it, as `jax.device_put` does. Otherwise
        arrays are left as they are where JAX would compute on this device anyway. XLA compiles
        the two to different programs, whose last bits may differ.

    Returns:
      A tree of the same structure.
    """
    local = local_devices(devices)
    if len(devices) == 1 and not commit:
        return jax.tree.map(lambda leaf: _move(leaf, local[0]), tree)
    if len(devices) == 1:
        return jax.device_put(tree, local[0])
    return jax.device_put(tree, NamedSharding(Mesh(np.asarray(local), (_AXIS,)), PartitionSpec()))


def unreplicate(tree: Any) -> Any:
    """A replicated tree as arrays on one device of this process."""

    def one(leaf: jax.Array) -> jax.Array:
        is_replicated = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
        return leaf.addressable_data(0) if is_replicated else leaf

    return jax.tree.map(one, tree)


def _move(leaf: Any, device: Device) -> Any:
    """A leaf on this device, or as it is where JAX would place it there."""
    if isinstance(leaf, jax.Array) and leaf.committed:
        is_there = leaf.devices() == {device}
    else:
        default = jax.config.jax_default_device  # type: ignore[attr-defined]
        is_there = device == (default or jax.local_devices()[0])
    return leaf if is_there else jax.device_put(leaf, device)


def _named(wrapper: Callable, function: Callable) -> Callable:
    """Gives a wrapper the name of the wrapped function, for profiles and logs."""
    return functools.update_wrapper(wrapper, getattr(function, "func", function), ["__name__"], [])
