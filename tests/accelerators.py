"""Compiles gapjax's programs by the compilers of TPUs and GPUs, on a machine that has neither.

    python tests/accelerators.py [--environment=FOLDER] [--targets=v5e,h100] [--programs=train]

Makes a virtual environment, by default in a temporary folder that is deleted afterwards, installs
gapjax there with `jax[tpu]`, the CUDA plugin of JAX without a driver and NVIDIA's assembler, and
compiles every program at the size of MNIST for each target. The programs are those that calls of
the public functions ask for; nothing is computed. It prints a table: seconds to compile, FLOP,
bytes of arguments and temporaries beside the device's memory, kernels of the innermost loop on a
GPU, and collectives with their bytes on several devices. The exit code is 1 where a program is
refused or does not fit. It needs a network and about 3 GB of disk.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("jax[tpu]",)
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12")
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


_HEADS = (
    "program", "target", "seconds", "FLOP", "arguments, MB", "temporaries, MB", "of its memory",
    "kernels in the loop", "collectives, MB",
)  # fmt: skip


class Target(NamedTuple):
    """Devices to compile for."""

    platform: str
    topology: str
    count: int
    gigabytes: int  # of one device's memory
    programs: tuple[str, ...] = ("",)  # words in the names of those that are compiled by default


_SEVERAL = (
    "binary train", "binary self-consistent", "binary evaluate", "binary sweep", "grey train",
)  # fmt: skip
TARGETS = {
    "v5e": Target("tpu", "v5e:2x2", 1, 16),  # the chip of a Colab runtime
    "v5e-host": Target("tpu", "v5e:2x2", 4, 16, _SEVERAL),
    "v4-pod": Target("tpu", "v4:2x2x4", 16, 32, _SEVERAL),
    "h100": Target("cuda", "1x1x1", 1, 80),
    "h100-host": Target("cuda", "1x1x8", 8, 80, _SEVERAL),
}


def environment(folder: Path) -> str:
    """The Python of an environment with the compilers; it is made where it is not there."""
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        venv.create(folder, with_pip=True)
        install = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*install, *_PACKAGES, "-e", f"{ROOT}[codec]"], check=True)
        subprocess.run([*install, "--no-deps", *_PLUGINS], check=True)
    return python


def run_all(folder: Path, options: argparse.Namespace) -> int:
    """Compiles for every target, two at a time; 1 where something is refused or does not fit."""
    python = environment(folder)
    print("| " + " | ".join(_HEADS) + " |\n" + "|---" * len(_HEADS) + "|", flush=True)
    compile_for = functools.partial(run_inside, folder, python, options.programs)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return max(pool.map(compile_for, options.targets))


def run_inside(folder: Path, python: str, programs: list[str] | None, target: str) -> int:
    """Runs this file in the environment for a target, with JAX on the CPU; its exit code."""
    assembler = next(folder.glob("lib/python*/site-packages/nvidia/cuda_nvcc/bin"), folder)
    variables = {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_gpu_autotune_level=0 {os.environ.get('XLA_FLAGS', '')}",
        "PATH": f"{assembler}{os.pathsep}{os.environ['PATH']}", "TF_CPP_MIN_LOG_LEVEL": "3",
    }  # fmt: skip
    command, variables = [python, __file__, f"--inside={target}"], {**os.environ, **variables}
    command += [f"--programs={','.join(programs)}"] if programs else []
    return subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode


# ---- inside the environment --------------------------------------------------


class Asked(NamedTuple):
    """A program that a call asked for, with the shapes of its arrays."""

    program: Any
    static: Any
    arrays: tuple


@contextlib.contextmanager
def recorded(asked: list[Asked]) -> Iterator[None]:
    """Within, programs are traced alone and return ones of the right shapes."""
    import jax
    import jax.numpy as jnp

    from gapjax import parallel

    compiled = parallel._compiled

    def ones(shape: Any) -> Any:
        if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), shape.shape)
        return jnp.ones(shape.shape, shape.dtype)

    def record(program: Any, devices: Any, static: Any) -> Callable:
        def call(*arrays: Any) -> Any:
            shapes = jax.tree.map(_abstract, arrays)
            known = [each[:2] for each in asked]
            if (program, static) not in known:
                asked.append(Asked(program, static, shapes))
            traced = compiled(program, devices[:1], static).program
            return jax.tree.map(ones, jax.eval_shape(traced, *arrays))

        return call

    parallel._compiled = record
    try:
        yield
    finally:
        parallel._compiled = compiled


def _abstract(leaf: Any) -> Any:
    import jax
    import jax.numpy as jnp

    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.asarray(leaf).dtype)


def calls() -> dict[str, Callable[[], Any]]:
    """The public functions at the size of MNIST, by name."""
    import jax
    import numpy as np

    import gapjax
    from gapjax import models

    key, made = jax.random.key(0), {}
    binary, grey = np.zeros((60000, 28, 28), np.uint8), np.zeros((60000, 28, 28), np.uint8)
    grey[0, 0, 0] = 255

    def of(vae: gapjax.VAE, name: str, x: Any, *, everything: bool = False) -> None:
        params = jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(vae.init, key)
        )
        test = jax.tree.map(lambda leaf: leaf[:10000], x)
        few = jax.tree.map(lambda leaf: leaf[:1000], x)
        source = gapjax.data_source(x)
        samples = gapjax.self_consistent
        found = {
            "train": lambda: gapjax.train(vae, source, key, num_epochs=1),
            "self-consistent": lambda: samples(vae, params, x, key, num_epochs=1),
            "evaluate": lambda: gapjax.evaluate(vae, params, key, test, num_samples=10),
        }
        if everything:
            members = [gapjax.Member(params, source, key)] * 4
            found |= {
                "sweep of 4": lambda: gapjax.refit_members(
                    vae, members, num_epochs=1, sweep="vmap"
                ),
                "learned refinement": lambda: gapjax.close_gap(
                    vae, params, x, key, "refinement_mnist", num_epochs=1
                ),
                "q*": lambda: gapjax.best_posteriors(
                    vae, params, key, few, search=gapjax.PosteriorSearch(max_rounds=1)
                ),
                "Newton": lambda: gapjax.refine(vae, params, key, few),
                "AIS": lambda: gapjax.log_likelihood(
                    vae, params, key, few, method=gapjax.Annealing()
                ),
                "codec": lambda: gapjax.compress(vae, params, few[:64]),
            }
        made.update({f"{name} {what}": call for what, call in found.items()})

    of(gapjax.mlp_vae((28, 28)), "binary", binary, everything=True)
    of(gapjax.mlp_vae((28, 28), "discretized_logistic"), "grey", grey, everything=True)
    for form in ("non_centred", "top_down"):
        of(models.hierarchical_vae((28, 28), form=form), f"layers {form}", binary)
    of(models.conv_vae((28, 28)), "convolutional", binary)
    colour = np.zeros((10000, 32, 32, 3), np.uint8)
    of(models.conv_vae((32, 32, 3), "colour"), "colour", colour)
    counts = models.count_examples(np.ones((10000, 1000), np.uint16))
    of(models.count_vae(1000), "counts", counts)
    return made


def devices_of(target: Target) -> list:
    """The target's devices, as far as its compiler knows them."""
    from jax.experimental import topologies

    if target.platform == "tpu":
        described = topologies.get_topology_desc(platform="tpu", topology_name=target.topology)
    else:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", topology=target.topology, target_config=_H100
        )
    return list(described.devices)[: target.count]


def compiled_for(one: Asked, devices: list) -> Any:
    """What the target's compiler makes of a program."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from gapjax import parallel

    count = len(devices)
    made = parallel._compiled.__wrapped__(one.program, tuple(devices), one.static)
    if count == 1:
        place = SingleDeviceSharding(devices[0])
        put = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        return made.program.lower(*jax.tree.map(put, one.arrays)).compile()
    if one.program.over == "members":
        spread = lambda leaf: jax.ShapeDtypeStruct((count, 1, *leaf.shape[1:]), leaf.dtype)
        donated, split, shared = one.arrays
        return made.program.lower(*jax.tree.map(spread, (donated, split)), shared).compile()
    indices = jax.ShapeDtypeStruct((count,), jnp.int32)
    first, *others = one.arrays
    return made.program.lower(indices, first, tuple(others)).compile()


class Cost(NamedTuple):
    """What a compiled program takes."""

    flop: float | None
    argument_bytes: int
    temporary_bytes: int
    kernels: int | None  # of the innermost computation of the longest loop, on a GPU
    collectives: int
    collective_bytes: int


_SIZES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}
_KERNEL = re.compile(r" = \S+ (fusion|custom-call|sort|scatter|dot|convolution|copy|reduce)\(")
_COLLECTIVE = re.compile(
    r" = (.*?) (?:all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
)


def cost(compiled: Any, platform: str) -> Cost:
    """Read from what the compiler says."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    analysis = compiled.cost_analysis() or {}
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    counts = []
    for block in re.split(r"\n(?=%|ENTRY)", text):
        name = re.match(r"%?([\w.\-]+)", block)
        if name and name[1] in bodies:
            counts.append(len(_KERNEL.findall(block)))
    found = _COLLECTIVE.findall(text)
    return Cost(
        analysis.get("flops"), memory.argument_size_in_bytes, memory.temp_size_in_bytes,
        max(counts, default=None) if platform == "cuda" else None,
        len(found), sum(map(_bytes, found)),
    )  # fmt: skip


def _bytes(shape: str) -> int:
    """Bytes of the arrays of an HLO shape."""
    total = 0
    for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        number = functools.reduce(lambda a, b: a * int(b), filter(None, sizes.split(",")), 1)
        total += number * _SIZES.get(kind, 1)
    return total


def inside(key: str, words: Sequence[str] | None) -> int:
    """Compiles for one target and prints its rows."""
    target, failed = TARGETS[key], False
    devices = devices_of(target)
    for name, call in calls().items():
        if not any(word in name for word in words or target.programs):
            continue
        asked: list[Asked] = []
        with recorded(asked), contextlib.suppress(FloatingPointError):  # of made-up results
            call()
        for one in [one for one in asked if one.program.over != "one"] or asked:
            row, fits = _row(one, target, devices)
            label = f"{name}: `{one.program.function.__name__.strip('_')}`"
            print("| " + " | ".join((label, key, *row)) + " |", flush=True)
            failed |= not fits
    return int(failed)


def _row(one: Asked, target: Target, devices: list) -> tuple[list[str], bool]:
    """The cells of a program on a target, and whether it compiles and fits."""
    clock = time.monotonic()
    try:
        made = cost(compiled_for(one, devices), target.platform)
    except Exception as error:
        words = " ".join(str(error).split())[:160]
        return [f"refused: {type(error).__name__}: {words}", *[""] * 6], False
    seconds = time.monotonic() - clock
    share = (made.argument_bytes + made.temporary_bytes) / target.gigabytes / 2**30
    moved = f"{made.collectives}, {made.collective_bytes / 1e6:.1f}" if made.collectives else ""
    return [
        f"{seconds:.0f}", "" if made.flop is None else f"{made.flop:.2e}",
        f"{made.argument_bytes / 1e6:.0f}", f"{made.temporary_bytes / 1e6:.0f}", f"{share:.1%}",
        "" if made.kernels is None else str(made.kernels), moved,
    ], share <= 1  # fmt: skip


def main() -> int:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, help="where to make or find the environment")
    words = lambda text: text.split(",")
    parser.add_argument("--targets", type=words, default=list(TARGETS), help=", ".join(TARGETS))
    parser.add_argument("--programs", type=words, help="words in the names of programs")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"--targets has {', '.join(unknown)}; it can have {', '.join(TARGETS)}")
    if options.inside:
        return inside(options.inside, options.programs)
    if options.environment:
        return run_all(options.environment.resolve(), options)
    with tempfile.TemporaryDirectory(prefix="gapjax-accelerators-") as folder:
        return run_all(Path(folder), options)


if __name__ == "__main__":
    sys.exit(main())
