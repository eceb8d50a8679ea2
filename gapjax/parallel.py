"""Where programs are compiled and kept, and the devices that they run on.

There are three ways to use several devices:

    program(f)                   one computation: every device does its share, see `Shard`
    program(f, over="members")   many runs in one program: every device computes some of them
    jobs.run_concurrently        independent jobs, such as refits, each on a device of its own

A CPU is one device by default, and its cores share every matrix product. Independent small jobs
finish sooner on one core each, so `expose_cpu_cores` makes every core a device.

`jax.pmap` is used here only. JAX recommends `jax.shard_map`, of which pmap has become a layer: by
either a step takes the same time and one collective, and gives the same bits (docs/speed.md). pmap
stays because each process of a pod gives it the arrays of its own devices, where `shard_map` needs
global ones. On one device programs are jitted, without a mapped axis.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:  # jax.Device, which type checkers take for a variable
    from jaxlib._jax import Device
else:
    Device = jax.Device

Devices = Sequence[Device]
_AXIS = "shards"
# The programs that are kept hold the models and optimizers for which they were compiled. An
# experiment needs a few dozen for each device that it uses.
_MAX_PROGRAMS = 256
_MOST_CORES = 4  # each core compiles its own programs and holds its own data, about 0.7 GB
_default: ContextVar[tuple[Device, ...] | None] = ContextVar("devices", default=None)


class Shard(NamedTuple):
    """The share of a computation that one device does; `WHOLE` on a single device."""

    index: jax.Array | int  # type: ignore[assignment]
    count: int  # type: ignore[assignment]
    axis_name: str | None  # of the mapped axis; None on a single device

    def sum(self, tree: Any) -> Any:
        """The sum of a tree of floats over all shares, by one all-reduce."""
        if self.axis_name is None:
            return tree
        flat, unravel = ravel_pytree(tree)
        return unravel(jax.lax.psum(flat, self.axis_name))

    def split(self, tree: Any) -> Any:
        """This share's part [N / count rounded up, ...] of arrays; padded with the last entry."""
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
    """A pure function of arrays and static keyword arguments, to be compiled.

    It compiles when it is first called, once for equal static arguments and devices. Inside, dtypes
    are promoted as JAX does by default, whatever the user's setting: the distributions and
    optimizers of other libraries mix them.

    Args:
      function: with over="shards" `function(shard, *arrays, **static)`, whose results are the same
        on every device, which is what `Shard.sum` and `Shard.merge` are for. With over="members"
        `function(donated, split, shared, **static)`, where the first two and the results have a
        leading axis of members, see `split_members`. With over="one" `function(*arrays, **static)`
        on the default device.
      over: what is divided among the devices.
      donate: whether the buffers of the first array are donated.
      commit: whether arrays are committed to a single device, see `replicate`.
    """

    function: Callable[..., Any]
    _: dataclasses.KW_ONLY
    over: str = "shards"
    donate: bool = False
    commit: bool = False

    def __call__(self, *arrays: Any, devices: Devices | None = None, **static: Any) -> Any:
        """Places the arrays on the devices, runs, and returns the results on one of them."""
        devices = all_devices(devices)
        arrays = replicate(arrays, devices, commit=self.commit)
        return unreplicate(self.on(devices, **static)(*arrays))

    def on(self, devices: Devices | None = None, **static: Any) -> Compiled:
        """The compiled function of arrays that are in the layout of the devices already.

        Equal static arguments share a program: pytrees are compared leaf by leaf, arrays by their
        content, and what has no hash by identity.
        """
        return _compiled(self, all_devices(devices), Static(static))


class Compiled(NamedTuple):
    """What JAX compiles."""

    program: Any  # of jax.jit or jax.pmap
    arrange: Callable[..., tuple] = lambda *arrays: arrays  # to the arguments of `program`

    def __call__(self, *arrays: Any) -> Any:
        """Runs the program."""
        return self.program(*self.arrange(*arrays))

    def lower(self, *arrays: Any) -> Any:
        """Traces and lowers it, see `jax.stages.Lowered`."""
        return self.program.lower(*self.arrange(*arrays))


program = Program  # as a decorator
on_one_device = functools.partial(Program, over="one")
donating = functools.partial(Program, donate=True)
donating_members = functools.partial(Program, over="members", donate=True)


class Static:
    """Static arguments, compared as `Program.on` says."""

    def __init__(self, values: dict[str, Any]):
        leaves, treedef = jax.tree.flatten(values)
        self.values = values
        self._key = treedef, tuple(map(_comparable, leaves))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._key == other._key


def _comparable(leaf: Any) -> Any:
    """What a leaf of static arguments is compared by."""
    if isinstance(leaf, np.ndarray | jax.Array):
        return leaf.shape, leaf.dtype, np.asarray(leaf).tobytes()
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)  # it lives as long as the program, which holds it
    return leaf


@functools.lru_cache(_MAX_PROGRAMS)
def _compiled(program: Program, devices: tuple[Device, ...], static: Static) -> Compiled:
    """The one cache of programs; compiling takes seconds."""
    function, donated = program.function, (0,) if program.donate else ()
    mapped = functools.partial(jax.pmap, axis_name=_AXIS, devices=devices)

    def promoted(*arguments: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*arguments, **static.values)

    def whole(*arrays: Any) -> Any:
        return promoted(WHOLE, *arrays)

    def share(index: jax.Array, first: Any, others: tuple) -> Any:
        return promoted(Shard(index, len(devices), _AXIS), first, *others)

    for wrapper in (promoted, whole, share):
        wrapper.__name__ = function.__name__  # for profiles and logs
    if program.over == "one" or len(devices) == 1:
        on_one = whole if program.over == "shards" else promoted
        return Compiled(jax.jit(on_one, donate_argnums=donated))
    if program.over == "members":
        return Compiled(mapped(promoted, in_axes=(0, 0, None), donate_argnums=donated))
    local = local_devices(devices)
    indices = jnp.asarray([i for i, device in enumerate(devices) if device in local], jnp.int32)
    after = tuple(place + 1 for place in donated)  # the indices
    shares = mapped(share, in_axes=(0, None, None), out_axes=None, donate_argnums=after)
    return Compiled(shares, lambda first, *others: (indices, first, others))


def replicate(tree: Any, devices: Devices, *, commit: bool = True) -> Any:
    """Copies the tree to each of `devices` that belongs to this process.

    Args:
      commit: on a single device, commit the arrays to it, as `jax.device_put` does. Otherwise
        arrays are left as they are where JAX would compute on this device anyway. XLA compiles
        the two to different programs, whose last bits may differ.
    """
    local = local_devices(devices)
    if len(devices) == 1 and not commit:
        return jax.tree.map(lambda leaf: _move(leaf, local[0]), tree)
    if len(devices) == 1:
        return jax.device_put(tree, local[0])
    return jax.device_put(tree, NamedSharding(Mesh(np.asarray(local), (_AXIS,)), PartitionSpec()))


def put(tree: Any) -> Any:
    """The same as arrays of JAX, of which NumPy's are copies; `jnp.asarray` compiles each shape."""

    def one(leaf: Any) -> Any:
        return jax.device_put(leaf.copy()) if isinstance(leaf, np.ndarray) else jnp.asarray(leaf)

    return jax.tree.map(one, tree)


def copy(tree: Any) -> Any:
    """Copies of arrays, each on its device; `jnp.copy` compiles each shape."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
            return jnp.copy(leaf)
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # its place would be lost
        return jnp.copy(leaf) if is_key else jax.device_put(leaf, may_alias=False)

    return jax.tree.map(one, tree)


def unreplicate(tree: Any) -> Any:
    """A replicated tree as arrays on one device of this process."""

    def one(leaf: jax.Array) -> jax.Array:
        is_replicated = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
        return leaf.addressable_data(0) if is_replicated else leaf

    return jax.tree.map(one, tree)


@on_one_device  # as the next three: of the leaves by themselves each shape would be compiled
def stack(*trees: Any) -> Any:
    """One tree of alike members, every leaf with a leading axis [R]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@on_one_device
def unstack(tree: Any) -> tuple:
    """The inverse of `stack`."""
    number = len(jax.tree.leaves(tree)[0])
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(number))


def split_members(tree: Any, devices: Devices) -> Any:
    """Divides stacked members [R, ...] among devices: [D, R/D rounded up, ...].

    They are padded with copies of the first, which `join_members` drops. On one device the shapes
    do not change.
    """
    if len(devices) == 1:
        return jax.device_put(tree, devices[0])
    sharding = NamedSharding(Mesh(np.asarray(devices), (_AXIS,)), PartitionSpec(_AXIS))
    return jax.device_put(_divide.on(count=len(devices))(tree), sharding)


@on_one_device
def _divide(tree: Any, *, count: int) -> Any:
    """See `split_members`."""

    def one(leaf: jax.Array) -> jax.Array:
        missing = -len(leaf) % count
        padded = jnp.concatenate([leaf, jnp.stack([leaf[0]] * missing)]) if missing else leaf
        return padded.reshape(count, len(padded) // count, *leaf.shape[1:])

    return jax.tree.map(one, tree)


def join_members(tree: Any, num_members: int, devices: Devices) -> Any:
    """The inverse of `split_members`: [R, ...], on the default device."""
    if len(devices) == 1:
        return tree

    return _join.on(number=num_members)(jax.device_put(tree, devices[0]))


@on_one_device
def _join(tree: Any, *, number: int) -> Any:
    """See `join_members`."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:number], tree)


def _move(leaf: Any, device: Device) -> Any:
    """A leaf on this device, or as it is where JAX would place it there."""
    if isinstance(leaf, jax.Array) and leaf.committed:
        is_there = leaf.devices() == {device}
    else:
        default = jax.config.jax_default_device  # type: ignore[attr-defined]
        is_there = device == (default or jax.local_devices()[0])
    return leaf if is_there else jax.device_put(leaf, device)


def all_devices(devices: Devices | None = None) -> tuple[Device, ...]:
    """The devices given, else those of `use_devices`, else all, including other processes'."""
    if devices is None:
        devices = _default.get() or jax.devices()
    devices = (devices,) if isinstance(devices, jax.Device) else tuple(devices)
    if not devices or not all(isinstance(device, jax.Device) for device in devices):
        raise ValueError(f"devices is {devices}; give at least one of jax.devices(), or None")
    return devices


@contextlib.contextmanager
def use_devices(devices: Devices) -> Iterator[None]:
    """Sets this thread's default devices; an empty sequence changes nothing."""
    if not devices:
        yield
        return
    devices = all_devices(devices)
    token = _default.set(devices)
    try:
        with jax.default_device(devices[0]):
            yield
    finally:
        _default.reset(token)


def expose_cpu_cores() -> tuple[Device, ...]:
    """Makes every core of the CPU, up to 4, a JAX device. Call it before JAX is initialized.

    A program on one of these devices still uses all cores that are idle. The result is empty if
    there is an accelerator or a single core, if this is one of several processes, or if the number
    of CPU devices is configured already.
    """
    configured: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    in_flags = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    number = min(_num_cores(), _MOST_CORES)
    if in_flags or configured > 0 or number == 1 or jax.distributed.is_initialized():
        return ()
    jax.config.update("jax_num_cpu_devices", number)
    everything = all_devices()
    return () if is_accelerated(everything) else everything


def local_devices(devices: Devices) -> tuple[Device, ...]:
    """The devices that belong to this process."""
    here = jax.process_index()
    return tuple(device for device in devices if device.process_index == here)


def is_accelerated(devices: Devices) -> bool:
    """Whether these are GPUs or TPUs, where many small runs are faster in one vmapped program."""
    return devices[0].platform != "cpu"


def _num_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
