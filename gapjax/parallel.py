"""Where programs run: one device, several by pmap, those of several processes. Named here alone.

Two ways to use many devices:

    data_parallel    one run: every device computes its share of each batch, and the shares'
                     gradients are summed over the devices once a step
    member_parallel  many runs: every device computes runs of its own; nothing is communicated

and one for work in pieces that know nothing of each other, such as refits: `side_by_side`, each
on a device of its own. A CPU is one device, whose cores share every matrix product; pieces on a
core each are done sooner, so `divide_cpu` makes every core a device.

One device is not a special case for a caller: it gets a jitted program without any axis.
"""

import contextlib
import functools
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Devices = Sequence[jax.Device]
_AXIS = "shards"
_MOST_CORES = 4  # each compiles for itself and has its own data: some 0.7 GB
_default: ContextVar[tuple[jax.Device, ...] | None] = ContextVar("devices", default=None)


class Shard(NamedTuple):
    """The share of a computation that one device has; `WHOLE` where there is only one.

    Attributes:
      index: [] int32, which share this is.
      count: how many there are, static.
      axis_name: of the mapped axis; None without one.
    """

    index: jax.Array | int
    count: int
    axis_name: str | None

    def sum(self, tree: Any) -> Any:
        """The sum of every share's `tree` of floats, as one all-reduce; known to every share."""
        if self.axis_name is None:
            return tree
        flat, unravel = ravel_pytree(tree)
        return unravel(jax.lax.psum(flat, self.axis_name))

    def concatenate(self, values: jax.Array) -> jax.Array:
        """Every share's values [n, ...], in the order of the shares: [count n, ...]."""
        if self.axis_name is None:
            return values
        return jax.lax.all_gather(values, self.axis_name, tiled=True)


WHOLE = Shard(0, 1, None)


def all_devices(devices: Devices | None = None) -> tuple[jax.Device, ...]:
    """The devices given, or those of `only`, or all there are, those of other processes too."""
    if devices is None:
        devices = _default.get() or jax.devices()
    return tuple(devices)


@contextlib.contextmanager
def only(devices: Devices) -> Iterator[None]:
    """Within it these are all devices that there are, in this thread; none says nothing."""
    if not devices:
        yield
        return
    token = _default.set(tuple(devices))
    try:
        with jax.default_device(devices[0]):
            yield
    finally:
        _default.reset(token)


def divide_cpu() -> tuple[jax.Device, ...]:
    """Makes every core of the CPU a device of JAX; to be called before it has any.

    A program on one of them still computes with all cores that are idle.

    Returns:
      The cores; none where there is an accelerator, one core, in one of several processes, or
      where JAX was told how many devices a CPU is.
    """
    told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    told = told or jax.config.jax_num_cpu_devices > 0
    number = min(_num_cores(), _MOST_CORES)
    if told or number == 1 or jax.distributed.is_initialized():
        return ()
    jax.config.update("jax_num_cpu_devices", number)
    everything = all_devices()
    return () if is_accelerated(everything) else everything


def side_by_side(
    jobs: Sequence[Callable[[], None]], devices: Devices, stop: Callable[[], None]
) -> None:
    """Does all jobs, in threads, at any time one on each device; all in turn where there is one.

    What a job computes is the same on whichever device, bit for bit, where these are equal.

    Args:
      jobs: each finds its device as the only one there is. They may begin in this order and end
        in any.
      devices: for a job each; of this process. One or none: where the caller computes.
      stop: called where a job raises: has those that are under way end soon. Those that have not
        begun are left.

    Raises:
      BaseException: what the first job raised that did, once all have ended.
    """
    if len(devices) < 2:
        for job in jobs:
            job()
        return
    idle = queue.SimpleQueue()
    for device in devices:
        idle.put(device)

    def do(job: Callable[[], None]) -> None:
        device = idle.get()
        try:
            with only([device]):
                job()
        finally:
            idle.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        under_way = [pool.submit(do, job) for job in jobs]
        try:
            for done in as_completed(under_way):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            raise


def local_devices(devices: Devices) -> tuple[jax.Device, ...]:
    """Those of them that belong to this process."""
    here = jax.process_index()
    return tuple(device for device in devices if device.process_index == here)


def is_accelerated(devices: Devices) -> bool:
    """Whether these are GPUs or TPUs, where many small runs are faster side by side."""
    return devices[0].platform != "cpu"


def data_parallel(function: Callable[..., Any], devices: Devices) -> Callable[..., Any]:
    """Compiles `function(shard, donated, *kept)` for `devices`, all of them at one computation.

    Args:
      function: pure; the same results on every device, which `Shard.sum` and
        `Shard.concatenate` see to.
      devices: on which it runs.

    Returns:
      A function of (donated, *kept), both as `replicate` gives them; its results are such too.
      The buffers of `donated` are used up. With `.lower` as a jitted function has it.
    """
    if len(devices) == 1:

        def whole(donated, kept):
            return function(WHOLE, donated, *kept)

        program = jax.jit(_named(whole, function), donate_argnums=0)
        return _Program(lambda donated, *kept: (donated, kept), program)

    def share(index, donated, kept):
        return function(Shard(index, len(devices), _AXIS), donated, *kept)

    program = jax.pmap(
        _named(share, function), _AXIS, in_axes=(0, None, None), out_axes=None, donate_argnums=1,
        devices=devices,
    )  # fmt: skip
    here = [i for i, device in enumerate(devices) if device in local_devices(devices)]
    indices = jnp.asarray(here, jnp.int32)
    return _Program(lambda donated, *kept: (indices, donated, kept), program)


def member_parallel(function: Callable[..., Any], devices: Devices) -> Callable[..., Any]:
    """Compiles `function(donated, split, shared)` of stacked members for `devices`.

    Args:
      function: pure; `donated` and `split` have a leading axis of members, its results too.
      devices: among which the members are divided; all of this process.

    Returns:
      A function of (donated, split, shared): the first two as `split_members` gives them, its
      results too; the last as `replicate` does. The buffers of `donated` are used up.
    """
    if len(devices) == 1:
        return jax.jit(function, donate_argnums=0)
    return jax.pmap(function, _AXIS, in_axes=(0, 0, None), donate_argnums=0, devices=devices)


def split_members(tree: Any, devices: Devices) -> Any:
    """Divides stacked members [R, ...] among devices: [D, R/D rounded up, ...].

    Where R is no multiple of D the first member stands in for those that are missing; what is
    computed for them is dropped by `join_members`. On one device the members stay as they are.
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


def replicate(tree: Any, devices: Devices) -> Any:
    """The tree on each of `devices` that this process has."""
    local = local_devices(devices)
    if len(devices) == 1:
        return jax.device_put(tree, local[0])
    return jax.device_put(tree, NamedSharding(Mesh(np.asarray(local), (_AXIS,)), PartitionSpec()))


def collect(tree: Any) -> Any:
    """A replicated tree as ordinary arrays on one device of this process."""

    def one(leaf: jax.Array) -> jax.Array:
        return leaf.addressable_data(0) if len(leaf.sharding.device_set) > 1 else leaf

    return jax.tree.map(one, tree)


def join_processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    detect: bool = False,
) -> None:
    """Joins the processes of one run; to be called before anything else touches JAX.

    Without arguments JAX finds out from the cluster what it has to know, where the environment
    says that there are several tasks (SLURM, Open MPI, GKE); otherwise the run has one process.

    Args:
      coordinator_address: host:port of process 0, reachable from all.
      num_processes: how many there are.
      process_id: which this one is, from 0.
      detect: let JAX look for a cluster that the environment does not show (a TPU pod).

    Raises:
      RuntimeError: the others could not be reached, or what was given is incomplete.
    """
    given = (coordinator_address, num_processes, process_id)
    if all(value is None for value in given) and not (detect or _in_cluster()):
        return
    try:
        jax.distributed.initialize(*given)
    except ValueError as error:
        raise RuntimeError(f"the processes of this run cannot be joined: {error}") from error


def process() -> tuple[int, int]:
    """(Which process this is, how many there are)."""
    return jax.process_index(), jax.process_count()


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; every process has to ask."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils  # starts backends when imported

    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


class _Program(NamedTuple):
    """A compiled function behind a change of its arguments' layout."""

    arrange: Callable[..., tuple]
    program: Any

    def __call__(self, donated: Any, *kept: Any) -> Any:
        return self.program(*self.arrange(donated, *kept))

    def lower(self, donated: Any, *kept: Any) -> Any:
        return self.program.lower(*self.arrange(donated, *kept))


def _named(wrapper: Callable, function: Callable) -> Callable:
    """Gives a wrapper the name of what it wraps, which profiles and logs then show."""
    return functools.update_wrapper(wrapper, getattr(function, "func", function), ["__name__"], [])


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _in_cluster() -> bool:
    """Whether the environment names several tasks, or a TPU slice of several workers."""
    tasks = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(os.environ.get(name, "1") not in ("", "0", "1") for name in tasks):
        return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
