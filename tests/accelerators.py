"""Compiles gapjax's programs by the compilers of TPUs and GPUs, on a machine that has neither.

    python tests/accelerators.py [--environment=FOLDER] [--targets=v5e,h100] [--programs=train]

Makes a virtual environment, by default in a temporary folder that is deleted afterwards, installs
gapjax there with `jax[tpu]`, the CUDA plugin of JAX without a driver and NVIDIA's assembler, and
compiles the programs for each target. They are those that calls of the public functions ask for;
nothing is computed. Images have the shapes of MNIST and CIFAR. There are 1,000 of them, and 60,000
in the first program on one device: a TPU's compiler takes half a minute for the sort by which an
epoch is shuffled.

It prints the versions and a table. CPU-seconds are those to compile. XLA counts FLOP and bytes for
TPUs alone, and the body of a loop once, so that they are about those of a step, beside what was
drawn for all steps of the call. "The loop" is the longest that takes a gradient, which is that of
the steps, or else the longest: its kernels on a GPU, and its microseconds as a TPU's compiler
estimates them. Collectives are all that the program names. The exit code is 1 where a program is
refused, does not fit, or computes in float64. It needs a network and about 3 GB of disk.
"""

import argparse
import concurrent.futures
import contextlib
import math
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
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_HEADS = (
    "program", "target", "CPU-seconds", "GFLOP", "MB accessed", "arguments, MB", "temporaries, MB",
    "of its memory", "kernels in the loop", "loop, µs", "collectives", "their MB", "notes",
)  # fmt: skip


class Target(NamedTuple):
    """Devices to compile for."""

    platform: str
    topology: str
    count: int
    gigabytes: int  # of one device's memory
    gigahertz: float | None = None  # of a TPU's clock
    programs: tuple[str, ...] = ("",)  # words in the names of those that are compiled by default


_SEVERAL = ("y train", "y self-consistent", "binary evaluate", "binary sweep")
TARGETS = {
    "v5e": Target("tpu", "v5e:2x2", 1, 16, 1.5),  # the chip of a Colab runtime
    "h100": Target("cuda", "1x1x1", 1, 80),
    "v5e-host": Target("tpu", "v5e:2x2", 4, 16, 1.5, _SEVERAL),
    "v4-pod": Target("tpu", "v4:2x2x4", 16, 32, 1.05, _SEVERAL),  # a v4-32
    "h100-host": Target("cuda", "1x1x8", 8, 80, None, _SEVERAL),
}


def environment(folder: Path) -> str:
    """The Python of an environment with the compilers; it is made where it is not there."""
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        venv.create(folder, with_pip=True)
        install = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*install, "jax[tpu]", "-e", f"{ROOT}[codec]"], check=True)
        version = [python, "-c", "import jaxlib; print(jaxlib.__version__)"]
        found = subprocess.run(version, check=True, capture_output=True, text=True).stdout.strip()
        plugins = [f"jax-cuda12-{part}=={found}" for part in ("plugin", "pjrt")]
        subprocess.run([*install, "--no-deps", *plugins, "nvidia-cuda-nvcc-cu12"], check=True)
    return python


def run_all(folder: Path, options: argparse.Namespace) -> int:
    """Compiles for every target, two at a time; 1 where something is refused or does not fit."""
    python = environment(folder)
    listed = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True)
    versions = re.findall(r"^(?:jax|libtpu|flax|nvidia)\S*==\S+", listed.stdout.decode(), re.M)
    print(", ".join(version.replace("==", " ") for version in versions) + "\n")
    print("| " + " | ".join(_HEADS) + " |\n" + "|---" * len(_HEADS) + "|", flush=True)
    words = [f"--programs={','.join(options.programs)}"] if options.programs else []
    compile_for = lambda target: run_inside(folder, [__file__, f"--inside={target}", *words])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return max(pool.map(compile_for, options.targets))


def run_inside(folder: Path, arguments: list[str]) -> int:
    """Runs a program in the environment, with JAX on the CPU; its exit code."""
    assembler = next(folder.glob("lib/python*/site-packages/nvidia/cuda_nvcc/bin"), folder)
    variables = {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": f"--xla_gpu_autotune_level=0 {os.environ.get('XLA_FLAGS', '')}",
        "PATH": f"{assembler}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3",
    }  # fmt: skip
    command, variables = [environment(folder), *arguments], {**os.environ, **variables}
    code = subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode
    if code not in (0, 1):
        print(f"{' '.join(arguments)} ended with {code}", flush=True)
    return abs(code)


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
            if (program, static) not in [each[:2] for each in asked]:
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


def calls(*, full: bool) -> dict[str, Callable[[], Any]]:
    """Calls of the public functions by name; `full` is whether the first takes all of MNIST."""
    import jax
    import numpy as np

    import gapjax
    from gapjax import models
    from gapjax.fit.api import self_consistent_source

    key, made = jax.random.key(0), {}

    def of(vae: gapjax.VAE, name: str, few: Any, *, also: str = "", x: Any = None) -> None:
        zeros = lambda leaf: np.zeros(leaf.shape, leaf.dtype)
        params = jax.tree.map(zeros, jax.eval_shape(vae.init, key))
        source, consistent = gapjax.data_source(few if x is None else x), gapjax.self_consistent
        found = {"train": lambda: gapjax.train(vae, source, key, num_epochs=1)}
        if also:
            found["self-consistent"] = lambda: consistent(vae, params, few, key, num_epochs=1)
        if also == "everything":
            images = jax.numpy.asarray(few)
            of_own = lambda params: self_consistent_source(vae, params, images, 0.5, False)
            own = [jax.tree.map(np.copy, params) for _ in range(4)]
            members = [gapjax.Member(each, of_own(each), key) for each in own]
            search, annealing = gapjax.PosteriorSearch(max_rounds=1), gapjax.Annealing()
            found |= {
                "evaluate": lambda: gapjax.evaluate(vae, params, key, few, num_samples=10),
                "sweep of 4": lambda: gapjax.refit_members(
                    vae, members, num_epochs=1, sweep="vmap"
                ),
                "learned refinement": lambda: gapjax.close_gap(
                    vae, params, few, key, "refinement_mnist", num_epochs=1
                ),
                "q*": lambda: gapjax.best_posteriors(vae, params, key, few, search=search),
                "Newton": lambda: gapjax.refine(vae, params, key, few),
                "AIS": lambda: gapjax.log_likelihood(vae, params, key, few, method=annealing),
                "codec": lambda: gapjax.compress(vae, params, few[:64]),
            }
        made.update({f"{name} {what}": call for what, call in found.items()})

    binary, grey = (np.zeros((1000, 28, 28), np.uint8) for _ in range(2))
    grey[0, 0, 0] = 255
    mnist = np.zeros((60000, 28, 28), np.uint8) if full else None
    of(gapjax.mlp_vae((28, 28)), "binary", binary, also="everything", x=mnist)
    of(gapjax.mlp_vae((28, 28), "discretized_logistic"), "grey", grey, also="everything")
    for form in ("non_centred", "top_down"):
        of(models.hierarchical_vae((28, 28), form=form), f"layers {form}", binary, also="refit")
    of(models.conv_vae((28, 28)), "convolutional", binary)
    colour = np.zeros((1000, 32, 32, 3), np.uint8)
    of(models.conv_vae((32, 32, 3), "colour"), "colour", colour, also="refit")
    counts = models.count_examples(np.ones((1000, 1000), np.uint16))
    of(models.count_vae(1000), "counts", counts, also="refit")
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
        place = {"sharding": SingleDeviceSharding(devices[0])}
        put = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, **place)
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
    accessed: float | None  # bytes
    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int
    kernels: int  # of the loop
    cycles: int  # of the loop, as a TPU's compiler estimates them
    collectives: int
    collective_bytes: int
    notes: str


_SIZES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}
_OPERATION = re.compile(r"^ +(?:ROOT )?%\S+ = (?:\(.*?\)|\S+) ([a-z-]+)\(", re.M)
_NO_KERNEL = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "while",
    "conditional", "call", "opt-barrier", "partition-id", "replica-id", "all-reduce-done",
    "all-gather-done", "copy-done", "async-done",
}  # fmt: skip
_COLLECTIVE = re.compile(
    r" = (.*?) (?:all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
)


def cost(compiled: Any) -> Cost:
    """Read from what the compiler says."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    analysis = compiled.cost_analysis() or {}
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    loops, sorts = [], 0
    for block in re.split(r"\n(?=%|ENTRY)", text):
        name = re.match(r"%?([\w.\-]+)", block)
        if name and name[1] in bodies:
            operations = _OPERATION.findall(block)
            kernels = sum(one not in _NO_KERNEL for one in operations)
            estimates = re.findall(r'estimated_cycles":"(\d+)"', block)
            loops.append(("transpose(jvp" in block, sum(map(int, estimates)), kernels))
            sorts += operations.count("sort")
    _, cycles, kernels = max(loops, default=(False, 0, 0))
    found = _COLLECTIVE.findall(text)
    notes = ["float64"] if "f64[" in text else []
    notes += [f"{sorts} sorts in loops"] if sorts else []
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return Cost(
        analysis.get("flops"), analysis.get("bytes accessed"), arguments, temporary,
        arguments + temporary + kept, kernels, cycles, len(found), sum(map(_bytes, found)),
        ", ".join(notes),
    )  # fmt: skip


def _bytes(shape: str) -> int:
    """Bytes of the arrays of an HLO shape."""
    total = 0
    for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        total += math.prod(map(int, filter(None, sizes.split(",")))) * _SIZES.get(kind, 1)
    return total


def inside(key: str, words: Sequence[str] | None) -> int:
    """Compiles for one target and prints its rows."""
    target, failed = TARGETS[key], False
    devices = devices_of(target)
    for name, call in calls(full=target.count == 1).items():
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
    """The cells of a program on a target, and whether it compiles, fits and needs no float64."""
    clock = time.process_time()
    try:
        made = cost(compiled_for(one, devices))
    except Exception as error:
        words = " ".join(str(error).split())[:160]
        return [*[""] * 10, f"refused: {type(error).__name__}: {words}"], False
    seconds = time.process_time() - clock
    share = made.peak_bytes / target.gigabytes / 2**30
    several, on_gpu = target.count > 1, target.platform == "cuda"
    return [
        f"{seconds:.0f}", "" if made.flop is None else f"{made.flop / 1e9:.3g}",
        "" if made.accessed is None else f"{made.accessed / 1e6:.0f}",
        f"{made.argument_bytes / 1e6:.0f}", f"{made.temporary_bytes / 1e6:.0f}", f"{share:.1%}",
        str(made.kernels) if on_gpu and made.kernels else "",
        f"{made.cycles / target.gigahertz / 1e3:.0f}" if target.gigahertz and made.cycles else "",
        str(made.collectives) if several else "",
        f"{made.collective_bytes / 1e6:.1f}" if several else "", made.notes,
    ], share <= 1 and "float64" not in made.notes  # fmt: skip


def main() -> int:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = lambda text: text.split(",")
    parser.add_argument("--environment", type=Path, help="where to make or find the environment")
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
