"""How fast the program is, as ratios: against its own matrix products, and a PyTorch loop.

python -m experiments.benchmark --json=benchmark.json

For joint training, self-consistent refits and evaluation, of either likelihood, one table:

  images/s   of the program, and ms for a step of --batch_size images
  floor      the same step's matrix products alone, compiled, on the same shapes
  x floor    the program's time over the floor's
  x torch    a plain in-memory PyTorch loop of the same model, over the program's time (joint
             training alone, where torch is installed: pip install .[benchmark])
  compile    seconds to trace and compile, cold and with the persistent cache

All that is compared is timed in turn, --repeats times, and medians are shown. Then the cost of
refits of several checkpoints, by each way that --sweep of the main program can compute them, and
that of training at one, two and four times the data: seconds, and peak memory so far. And
milliseconds to compress and decompress an image.
"""

import functools
import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax.experimental.compilation_cache import compilation_cache

import gapjax
from experiments import benchmark_references as references
from experiments.benchmark_references import ALPHA, EVENT, HIDDEN, LATENT
from experiments.files import write_json
from experiments.options import define_path
from experiments.run import environment
from gapjax import jobs, parallel
from gapjax.codec.stack import CodecError
from gapjax.fit.api import self_consistent_source
from gapjax.fit.step import init_state, run_steps
from gapjax.measure import bounds

_LIKELIHOODS = {"binary": ("bernoulli", 2), "grey": ("discretized_logistic", 256)}
_ALL_PHASES = ["train", "refit", "evaluate", "codec"]
_MEMBERS = 4
_CHAINS = 32  # of the codec, as with 10,000 images

define_path("json", None, "File to write the table to, as JSON.")
_STEPS = flags.DEFINE_integer("steps", 60, "Steps in one timing.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 100, "Images in a step.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timings of each program.", lower_bound=1)
_KINDS = flags.DEFINE_multi_enum("likelihood", [*_LIKELIHOODS], [*_LIKELIHOODS], "Which models.")
_PHASES = flags.DEFINE_multi_enum("phase", _ALL_PHASES, _ALL_PHASES, "Which programs.")
_SAMPLES = flags.DEFINE_integer("num_eval_samples", 10, "Samples in evaluation.", lower_bound=1)


def _images(levels: int, number: int) -> jax.Array:
    """Images with MNIST's share of ink; their content does not change the time of anything."""
    rng = np.random.default_rng(0)
    ink = rng.random((number, *EVENT)) < 0.2
    return jnp.asarray((ink * rng.integers(1, levels, ink.shape)).astype(np.uint8))


def _model(kind: str, steps: int) -> tuple[gapjax.VAE, gapjax.VAEParams, jax.Array]:
    """The model, its parameters, and as many images as these steps take."""
    likelihood, levels = _LIKELIHOODS[kind]
    vae = gapjax.mlp_vae(EVENT, likelihood, latent_dim=LATENT, hidden_sizes=HIDDEN)
    return vae, vae.init(jax.random.key(0)), _images(levels, steps * _BATCH.value)


def _program(phase: str, kind: str, steps: int):
    """A compiled phase: a function that runs it once, and one that compiles it anew."""
    vae, params, images = _model(kind, steps)
    devices, common = parallel.all_devices(), {"vae": vae, "batch_size": _BATCH.value}
    if phase == "evaluate":
        compiled = bounds.bounds.on(
            devices, num_samples=_SAMPLES.value, bound=gapjax.elbo, **common
        )
        arguments = parallel.replicate((params, jax.random.key(1), images), devices)
        run_evaluation = lambda: jax.block_until_ready(compiled(*arguments))
        return run_evaluation, lambda: compiled.lower(*arguments).compile()

    optimizer, source = gapjax.adam(1e-3), gapjax.data_source(images)
    if phase == "refit":
        optimizer = gapjax.encoder_only(optimizer)
        model = gapjax.model_source(vae, params.decoder, len(images))
        source = gapjax.mixture_source(model, source, ALPHA)
    compiled = run_steps.on(
        devices, optimizer=optimizer, objective=gapjax.elbo, num_steps=steps, **common
    )
    state = init_state(params, jax.random.key(1), optimizer)
    state, source = parallel.replicate((state, source), devices)

    def run() -> None:
        nonlocal state
        state, *out = compiled(state, source)
        jax.block_until_ready(out)

    return run, lambda: compiled.lower(state, source).compile()


def _seconds(programs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, timed in turn so that a slow minute slows them all."""
    times = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _compile_seconds(compile_program: Callable[[], object]) -> tuple[float, float]:
    """Seconds to trace and compile without a cache, and with a persistent cache that has it."""
    saved = jax.config.jax_compilation_cache_dir
    times = []
    with tempfile.TemporaryDirectory() as cache:
        for directory in (None, cache, cache):
            jax.config.update("jax_compilation_cache_dir", directory)
            compilation_cache.reset_cache()
            jax.clear_caches()
            start = time.perf_counter()
            compile_program()
            times.append(time.perf_counter() - start)
        jax.config.update("jax_compilation_cache_dir", saved)
        compilation_cache.reset_cache()
    return times[0], times[2]


def _peak_mib() -> float:
    """Peak resident memory of this process, MiB (ru_maxrss is in bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _row(kind: str, phase: str) -> dict:
    levels = _LIKELIHOODS[kind][1]
    run, compile_program = _program(phase, kind, _STEPS.value)
    cold, cached = _compile_seconds(compile_program)
    batch, steps = _BATCH.value, _STEPS.value
    products = references.products(phase, 1 if levels == 2 else 2, batch, _SAMPLES.value)
    programs = {"program": run, "floor": references.floor(products, steps)}
    if phase == "train":
        loop = references.torch_loop(np.asarray(_images(levels, steps * batch)), levels, batch)
        programs |= {"torch": loop} if loop else {}
    run()
    seconds = _seconds(programs, _REPEATS.value)
    return {
        "likelihood": kind, "phase": phase, "images_per_second": steps * batch / seconds["program"],
        "ms_per_step": 1e3 * seconds["program"] / steps,
        "floor_ms_per_step": 1e3 * seconds["floor"] / steps,
        "times_floor": seconds["program"] / seconds["floor"],
        "torch_over_program": seconds["torch"] / seconds["program"] if "torch" in seconds else None,
        "compile_seconds_cold": cold, "compile_seconds_cached": cached,
    }  # fmt: skip


def _sweeps(kind: str, cores: parallel.Devices) -> dict:
    """Milliseconds of a step of each of four refits: one by one, on cores, and in one program."""
    vae, _, images = _model(kind, _STEPS.value)
    members = []
    for key in map(jax.random.key, range(_MEMBERS)):
        params = vae.init(key)
        source = self_consistent_source(vae, params, images, ALPHA, False)
        members.append(gapjax.Member(params, source, key))
    options = {"num_epochs": 1, "batch_size": _BATCH.value}

    def alone(devices: parallel.Devices) -> None:
        refits = [functools.partial(gapjax.refit_encoder, vae, *m[:3], **options) for m in members]
        jobs.run_concurrently(refits, devices, stop=lambda: None)

    together = functools.partial(gapjax.refit_members, vae, members, **options)
    programs = {"off": functools.partial(alone, ())}
    programs |= {"cores": functools.partial(alone, cores)} if cores else {}
    programs |= {sweep: functools.partial(together, sweep=sweep) for sweep in ("map", "vmap")}
    for program in programs.values():
        program()
    seconds = _seconds(programs, _REPEATS.value)
    steps = _MEMBERS * _STEPS.value
    return {"likelihood": kind, **{name: 1e3 * value / steps for name, value in seconds.items()}}


def _coding(kind: str) -> dict | None:
    """Milliseconds an image to compress and to decompress, by a model that is not trained."""
    vae, params, images = _model(kind, _STEPS.value)
    images = np.asarray(images)
    compress = functools.partial(gapjax.compress, vae, params, images, num_chains=_CHAINS)
    try:
        content = compress()
    except CodecError as error:
        print(error)
        return None
    decompress = functools.partial(gapjax.decompress, vae, params, content)
    seconds = _seconds({"compress": compress, "decompress": decompress}, _REPEATS.value)
    ms = {f"{name}_ms": 1e3 * value / len(images) for name, value in seconds.items()}
    return {"likelihood": kind, "images": len(images), "chains": _CHAINS, **ms}


def _scaling() -> list[dict]:
    """Seconds of one epoch of joint training at one, two and four times the data."""
    rows = []
    for factor in (1, 2, 4):
        run, _ = _program("train", "binary", factor * _STEPS.value)
        run()
        seconds = _seconds({"epoch": run}, _REPEATS.value)["epoch"]
        rows.append({"times_data": factor, "seconds_per_epoch": seconds, "peak_mib": _peak_mib()})
    for _ in range(20):
        run()
    rows.append({"times_data": 4, "after_more_epochs": 20, "peak_mib": _peak_mib()})
    return rows


def main(_) -> None:
    """Prints the table, and writes it where --json says."""
    logging.set_verbosity(logging.WARNING)
    cores = parallel.expose_cpu_cores()
    with parallel.use_devices(cores[:1]):
        _benchmark(cores)


def _benchmark(cores: parallel.Devices) -> None:
    machine = environment()
    print(f"{machine['backend']}, {machine['device_kind']}, JAX {machine['jax']}")
    print(
        f"{'':6} {'':9} {'images/s':>9} {'ms/step':>8} {'floor ms':>9} {'x floor':>8} "
        f"{'x torch':>8} {'compile':>8} {'cached':>7}"
    )
    rows = []
    phases = [phase for phase in _PHASES.value if phase != "codec"]
    for kind, phase in itertools.product(_KINDS.value, phases):
        rows.append(row := _row(kind, phase))
        torch = f"{row['torch_over_program']:.2f}" if row["torch_over_program"] else ""
        print(
            f"{kind:6} {phase:9} {row['images_per_second']:9.0f} {row['ms_per_step']:8.2f} "
            f"{row['floor_ms_per_step']:9.2f} {row['times_floor']:8.2f} {torch:>8} "
            f"{row['compile_seconds_cold']:7.1f}s {row['compile_seconds_cached']:6.1f}s",
            flush=True,
        )
    sweeps = [_sweeps(kind, cores) for kind in _KINDS.value if "refit" in _PHASES.value]
    for row in sweeps:
        print(f"ms for a step of one of {_MEMBERS} refits, by --sweep: {json.dumps(row)}")
    coding = [_coding(kind) for kind in _KINDS.value if "codec" in _PHASES.value]
    coding = [row for row in coding if row]
    for row in coding:
        print(f"ms to code an image: {json.dumps(row)}")
    scaling = _scaling()
    for row in scaling:
        print(json.dumps(row))
    if flags.FLAGS.json:
        tables = {"programs": rows, "sweeps": sweeps, "codec": coding, "scaling": scaling}
        write_json(Path(flags.FLAGS.json), {"environment": machine, **tables})


if __name__ == "__main__":
    app.run(main)
