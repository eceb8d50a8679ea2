"""Running programs on one device, on several, and in several processes.

There are three ways to use several devices:

    data_parallel     one run: every device computes its share of each batch, and the gradients
                      are summed over the devices once a step
    member_parallel   many runs in one program: every device computes some of them, and nothing
                      is communicated
    run_concurrently  independent jobs, such as refits: each in a thread, on its own device

A CPU is one device by default, and its cores share every matrix product. Independent small jobs
finish sooner on one core each, so `expose_cpu_cores` makes every core a device.

Other modules of gapjax name devices by `from gapjax import parallel` alone.
"""

from gapjax.parallel.devices import (
    Device,
    Devices,
    all_devices,
    expose_cpu_cores,
    is_accelerated,
    local_devices,
    use_devices,
)
from gapjax.parallel.jobs import run_concurrently
from gapjax.parallel.processes import any_process, join_processes, process
from gapjax.parallel.programs import (
    WHOLE,
    Program,
    Shard,
    data_parallel,
    join_members,
    member_parallel,
    replicate,
    split_members,
    unreplicate,
)

__all__ = [
    "WHOLE",
    "Device",
    "Devices",
    "Program",
    "Shard",
    "all_devices",
    "any_process",
    "data_parallel",
    "expose_cpu_cores",
    "is_accelerated",
    "join_members",
    "join_processes",
    "local_devices",
    "member_parallel",
    "process",
    "replicate",
    "run_concurrently",
    "split_members",
    "unreplicate",
    "use_devices",
]
