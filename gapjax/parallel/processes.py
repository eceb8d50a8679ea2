"""The processes of one run: joining them, which one this is, and what they have to agree on."""

import os

import jax
import numpy as np


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
      num_processes: number of processes.
      process_id: index of this process, from 0.
      detect: let JAX look for a cluster that the environment does not show (a TPU pod).

    Raises:
      RuntimeError: the other processes could not be reached, or the arguments are incomplete.
    """
    given = (coordinator_address, num_processes, process_id)
    if all(value is None for value in given) and not (detect or _in_cluster()):
        return
    try:
        jax.distributed.initialize(*given)
    except ValueError as error:
        raise RuntimeError(f"the processes of this run cannot be joined: {error}") from error


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
    if any(os.environ.get(name, "1") not in ("", "0", "1") for name in tasks):
        return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
