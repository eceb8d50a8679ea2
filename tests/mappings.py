"""One training step on several devices by `jax.pmap`, as gapjax has it, and by `jax.shard_map`.

    JAX_NUM_CPU_DEVICES=8 python tests/mappings.py
    python tests/mappings.py --environment=FOLDER --targets=v5e-host,v4-pod,h100-host

The first command times both in turn, on the virtual devices of the CPU: binary training at MNIST's
size. It prints milliseconds for a step, their ratio, whether the results are the same bits, and the
collectives of the compiled programs. The second compiles both for targets of
`tests/accelerators.py`, in an environment as its --environment makes it, and prints the costs of
each.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerators
import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import gapjax
from gapjax import parallel
from gapjax.fit.step import init_state, run_steps

_STEPS, _BATCH = 60, 100


def by_shard_map(function: Callable[..., Any], devices: list, static: dict) -> Any:
    """`parallel.program(function)` on the devices, as `jit` of a `shard_map`."""

    def share(state: Any, source: Any) -> Any:
        index = jax.lax.axis_index("shards")
        return function(parallel.Shard(index, len(devices), "shards"), state, source, **static)

    mesh = Mesh(np.asarray(devices), ("shards",))
    mapped = jax.shard_map(share, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(mapped, donate_argnums=0)


def _static() -> dict:
    return {
        "vae": gapjax.mlp_vae((28, 28)), "optimizer": gapjax.adam(1e-3), "batch_size": _BATCH,
        "objective": gapjax.elbo, "num_steps": _STEPS,
    }  # fmt: skip


def _start(static: dict) -> tuple:
    rng = np.random.default_rng(0)
    images = (rng.random((_STEPS * _BATCH, 28, 28)) < 0.2).astype(np.uint8)
    params = static["vae"].init(jax.random.key(0))
    state = init_state(params, jax.random.key(1), static["optimizer"])
    return state, gapjax.data_source(images)


def measure(repeats: int) -> None:
    """Times both on the devices of this process."""
    devices, static, times = jax.devices(), _static(), {}
    pmapped = run_steps.on(devices, **static)
    sharded = by_shard_map(run_steps.function, devices, static)
    programs = {"pmap": pmapped, "shard_map": sharded}
    placed = {name: parallel.replicate(_start(static), devices) for name in programs}
    for name, program in programs.items():
        compiled = program.lower(*placed[name]).compile()
        print(name, _collectives(accelerators.cost(compiled)), flush=True)
    for _ in range(repeats + 1):  # the first is not counted
        for name, program in programs.items():
            state, source = placed[name]
            clock = time.perf_counter()
            state, *out = program(state, source)
            jax.block_until_ready((state, out))
            times.setdefault(name, []).append(1e3 * (time.perf_counter() - clock) / _STEPS)
            placed[name] = state, source
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    ratios = [a / b for a, b in zip(*(found[1:] for found in times.values()), strict=True)]
    first, second = (
        jax.tree.leaves(parallel.unreplicate(state).params) for state, _ in placed.values()
    )
    alike = all(map(np.array_equal, first, second))
    print(
        f"{len(devices)} devices, JAX {jax.__version__}: "
        + ", ".join(f"{name} {value:.2f} ms a step" for name, value in medians.items())
        + f"; pmap's time over shard_map's {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}); {'' if alike else 'not '}the same bits"
    )


def compile_for(key: str) -> None:
    """Compiles both for a target."""
    target, static = accelerators.TARGETS[key], _static()
    devices = accelerators.devices_of(target)
    asked = accelerators.Asked(
        run_steps, parallel.Static(static), jax.tree.map(accelerators._abstract, _start(static))
    )
    sharded = by_shard_map(run_steps.function, devices, static).lower(*asked.arrays).compile()
    for name, compiled in (
        ("pmap", accelerators.compiled_for(asked, devices)), ("shard_map", sharded),
    ):  # fmt: skip
        found = accelerators.cost(compiled)
        loop = f"{found.cycles} cycles" if found.cycles else f"{found.kernels} kernels"
        print(
            f"{key}, {len(devices)} devices, JAX {jax.__version__}, {name}: {_collectives(found)}; "
            f"a step {loop}; temporaries {found.temporary_bytes / 1e6:.1f} MB",
            flush=True,
        )


def _collectives(cost: accelerators.Cost) -> str:
    return f"{cost.collectives} collectives of {cost.collective_bytes / 1e6:.2f} MB"


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--targets", help=", ".join(accelerators.TARGETS))
    parser.add_argument("--environment", type=Path, help="where to make or find the environment")
    options = parser.parse_args()
    if options.environment:
        again = [__file__, f"--targets={options.targets}"]
        sys.exit(accelerators.run_inside(options.environment.resolve(), again))
    if options.targets:
        for target in options.targets.split(","):
            compile_for(target)
    else:
        measure(options.repeats)


if __name__ == "__main__":
    main()
