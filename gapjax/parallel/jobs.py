"""Independent jobs in threads, each on its own device."""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from gapjax.parallel.devices import Device, Devices, use_devices


def run_concurrently(
    jobs: Sequence[Callable[[], None]], devices: Devices, stop: Callable[[], None]
) -> None:
    """Runs all jobs in threads, at most one on each device at a time.

    On devices of one kind the result of a job does not depend on its device, bit for bit.

    Args:
      jobs: functions that are called with their device as the thread's only default device. They
        start in this order and may end in any.
      devices: of this process. With one or none the jobs run in turn in the calling thread.
      stop: called when a job raises. It should make the running jobs end soon; those that have not
        started are dropped.

    Raises:
      BaseException: the exception of the first job that raised, after all jobs have ended.
    """
    if len(devices) < 2:
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
