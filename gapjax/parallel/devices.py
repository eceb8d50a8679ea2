"""The devices that programs run on: all of them, this thread's, this process's, a CPU's cores."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:  # jax.Device, which type checkers take for a variable
    from jaxlib._jax import Device
else:
    Device = jax.Device

Devices = Sequence[Device]
_MOST_CORES = 4  # each core compiles its own programs and holds its own data, about 0.7 GB
_default: ContextVar[tuple[Device, ...] | None] = ContextVar("devices", default=None)


def all_devices(devices: Devices | None = None) -> tuple[Device, ...]:
    """The devices given, else those of `use_devices`, else all, including other processes'."""
    if devices is None:
        devices = _default.get() or jax.devices()
    return tuple(devices)


@contextlib.contextmanager
def use_devices(devices: Devices) -> Iterator[None]:
    """Sets this thread's default devices; an empty sequence changes nothing."""
    if not devices:
        yield
        return
    token = _default.set(tuple(devices))
    try:
        with jax.default_device(devices[0]):
            yield
    finally:
        _default.reset(token)


def expose_cpu_cores() -> tuple[Device, ...]:
    """Makes every core of the CPU a JAX device. Call it before JAX is initialized.

    A program on one of these devices still uses all cores that are idle.

    Returns:
      The devices, at most 4. An empty tuple if there is an accelerator or a single core, if this
      is one of several processes, or if the number of CPU devices is configured already.
    """
    configured = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    configured = configured or (
        jax.config.jax_num_cpu_devices > 0  # type: ignore[attr-defined]
    )
    number = min(_num_cores(), _MOST_CORES)
    if configured or number == 1 or jax.distributed.is_initialized():
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
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
