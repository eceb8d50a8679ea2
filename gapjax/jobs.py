"""Independent jobs in threads, each on its own device, and the processes that make up one run."""

import os
import queue
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import jax
import numpy as np

from gapjax.parallel import Device, Devices, use_devices

_HEARTBEAT_SECONDS = 30  # without a sign of life from a process the others end; JAX's own is 100


def run_concurrently(
    jobs: Sequence[Callable[[], None]], devices: Devices, stop: Callable[[], None]
) -> None:
    """Runs jobs in threads, each with one device of its own as the only default device.

    They start in order and may end in any. On devices of one kind the result of a job does not
    depend on its device, bit for bit. With one device, or none for the default, they run in turn
    in the calling thread.

    Args:
      devices: of this process.
      stop: called when a job raises, to make the running jobs end soon; the others are dropped.
    """
    if len(devices) < 2:
        with use_devices(devices):
            for job in jobs:
                job()
        return
    idle: queue.SimpleQueue[Device] = queue.SimpleQueue()
    for device in devices:
        idle.put(device)

    def do(job: Callable[[], None]) -> None:
        device = idle.get()
        try:
            with use_devices([device]):
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


def join_processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    detect: bool = False,
) -> None:
    """Connects the processes of one run. Call it before JAX is initialized.

    Without arguments JAX takes the settings from the cluster if the environment shows several
    tasks (SLURM, Open MPI, GKE); otherwise the run has one process.

    Args:
      coordinator_address: host:port of process 0, reachable from all processes.
      detect: let JAX look for a cluster that the environment does not show (a TPU pod).
    """
    given = (coordinator_address, num_processes, process_id)
    if all(value is None for value in given) and not (detect or _in_cluster()):
        return
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except ValueError as error:
        raise RuntimeError(f"the processes of this run cannot be joined: {error}") from error


def leave(code: int) -> None:
    """Ends a process of several at once; JAX's own end would wait minutes for the others.

    The first waits a second: JAX aborts those that are still there when it has gone.
    """
    if not jax.distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(process()[0] == 0)
    os._exit(code)


def process() -> tuple[int, int]:
    """(Index of this process, number of processes)."""
    return jax.process_index(), jax.process_count()


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process. Every process must call it."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils  # importing it initializes JAX

    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def _in_cluster() -> bool:
    """Whether the environment shows several tasks, or a TPU slice of several workers."""
    tasks = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    several = any(os.environ.get(name, "1") not in ("", "0", "1") for name in tasks)
    return several or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
