"""The gap in bytes: compresses a run's test images by every encoder, with and without refinement.

python -m experiments.compression --workdir=runs/digits --checkpoints=500

Writes compression.json, compression.png and compression.pdf to the workdir: bytes, the ELBO's
prediction and times of bits-back coding, beside those of PNG, WebP, zstd and xz. Every file is
decompressed and compared. On the first --gap_images images it also measures what part of the gap
between the encoder as trained and the best posterior of each image the refinement closes. The same
command resumes: what was measured is kept.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

import gapjax
from experiments import baselines, options, program, stores
from experiments.compress import AS_TRAINED, ENCODERS, encoder_params, store_of
from experiments.config import UsageError
from experiments.files import write_json
from experiments.run import Run, environment
from experiments.show import figures
from experiments.stores import chosen_epochs
from gapjax import Refiner, checkpoints
from gapjax.codec import container
from gapjax.codec.coding import ENCODER
from gapjax.codec.stack import CodecError
from gapjax.codec.tables import SEED
from gapjax.measure.bounds import posterior_bounds
from gapjax.measure.statistics import ratio_of_means
from gapjax.model.bounds import bits_per_dim
from gapjax.results.estimates import summarize

_STORE = "compression"
_GAP_SAMPLES = 200  # of each posterior; shares of images need at least `MIN_SAMPLES`


class Settings(NamedTuple):
    """What is measured."""

    encoders: tuple[str, ...] = (AS_TRAINED, "self_consistent")  # of `ENCODERS`
    refiners: tuple[Refiner, ...] = (ENCODER, Refiner(), Refiner("adam", 10))
    num_images: int = 0  # the first test images that are compressed; 0 for all
    gap_images: int = 200  # the first whose best posteriors are searched for; 0 for none


def compression_phase(run: Run, settings: Settings, epochs: Sequence[int]) -> dict:
    """Measures checkpoints; writes compression.json and its figure.

    What is measured is kept, row by row, and is not measured again.
    """
    images = run.dataset.test[: settings.num_images or None]
    rows = [_checkpoint(run, settings, epoch, images) for epoch in epochs]
    results = {
        "schema": 1, "preset": run.config.preset, "dataset": run.dataset.name,
        "event_shape": list(run.dataset.event_shape), "levels": run.dataset.levels,
        "num_images": len(images), "num_eval_samples": run.config.num_eval_samples,
        "environment": environment(), "baselines": baselines.sizes(images, run.dataset.levels),
        "checkpoints": rows,
    }  # fmt: skip
    if run.workdir.writes:
        write_json(run.workdir.path / "compression.json", results)
        figures.save(figures.compression(results), run.workdir.path / "compression")
    return results


def _checkpoint(run: Run, settings: Settings, epoch: int, images: np.ndarray) -> dict[str, Any]:
    """The rows of a checkpoint, and what part of the gap to q* each refinement closes."""
    record = stores.kept(run, _STORE, epoch)
    kept = record["rows"] if record.get("num_images") == len(images) else {}

    def once(name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if name not in kept:
            if run.interrupted():
                raise KeyboardInterrupt
            clock = time.monotonic()
            kept[name] = compute()
            stores.save(
                run, _STORE, epoch, {"rows": np.asarray(len(kept))}, clock,
                made_from=_made_from(epoch, kept), num_images=len(images), rows=kept,
            )  # fmt: skip
        return kept[name]

    rows = []
    for encoder in settings.encoders:
        params = encoder_params(run, epoch, encoder)
        for refiner in settings.refiners:
            measure = functools.partial(_measure, run, encoder, params, images, refiner)
            rows.append(once(f"{encoder} {refiner}", measure))
            print(_line(epoch, rows[-1]), flush=True)
    gap = None
    if settings.gap_images:
        name = f"gap {settings.gap_images} {settings.refiners}"
        gap = once(name, functools.partial(_gap, run, epoch, settings))
    return {"epoch": epoch, "rows": rows, "gap": gap}


def _made_from(epoch: int, rows: dict[str, dict[str, Any]]) -> list[tuple[str, int]]:
    """The entries that these rows were computed from."""
    names = {store_of(row["encoder"]) for row in rows.values() if "encoder" in row}
    return [(name, epoch) for name in sorted({"train", *names})]


def _measure(
    run: Run, encoder: str, params: gapjax.VAEParams, images: np.ndarray, refiner: Refiner
) -> dict[str, Any]:
    """Bytes, their prediction and times of one encoder with one refinement."""
    code = functools.partial(gapjax.compress, run.vae, params)
    _, streams = container.parse(code(images, refiner))
    # The programs are compiled; now the time.
    start = time.perf_counter()
    content = code(images, refiner)
    compressed = time.perf_counter()
    decoded = gapjax.decompress(run.vae, params, content)
    end = time.perf_counter()
    if not np.array_equal(decoded, images):
        raise CodecError("what was compressed did not decompress to the same images")
    nats = _bounds(run, params, images, refiner)
    prediction = -float(np.sum(nats, dtype=np.float64)) / np.log(2) / 8
    return {
        "encoder": encoder, **_named(refiner), "bytes": len(content),
        "stream_bytes": 4 * sum(map(len, streams)), "elbo_bytes": prediction,
        "over_elbo": len(content) / prediction - 1, "bpd": 8 * len(content) / images.size,
        "elbo_bpd": summarize(bits_per_dim(nats, run.dataset.event_shape)).bpd,
        "chains": len(streams), "compress_ms": 1e3 * (compressed - start) / len(images),
        "decompress_ms": 1e3 * (end - compressed) / len(images), "identical": True,
    }  # fmt: skip


def _gap(run: Run, epoch: int, settings: Settings) -> dict[str, Any]:
    """What part of the gap to the best posterior of each image each refinement closes."""
    images = run.dataset.test[: settings.gap_images]
    params = encoder_params(run, epoch, AS_TRAINED)
    bounds = functools.partial(
        posterior_bounds, run.vae, params, run.key("evaluate"), images, num_samples=_GAP_SAMPLES
    )
    search = gapjax.best_posteriors(run.vae, params, run.key("ledger", epoch), images)
    best, start = bounds(search.posteriors), _bounds(run, params, images, ENCODER, _GAP_SAMPLES)
    rows = []
    for refiner in filter(lambda refiner: refiner.num_steps, settings.refiners):
        refine = functools.partial(
            gapjax.refine, run.vae, params, jax.random.key(SEED), images, refiner
        )
        refine()
        clock = time.perf_counter()
        refined = refine()
        seconds = time.perf_counter() - clock
        won = bounds(refined.posteriors) - start
        closed, stderr = ratio_of_means(won, best - start)
        rows.append({
            **_named(refiner), "closed": closed, "closed_stderr": stderr, "worst": float(won.min()),
            "fraction_worse": float((won < 0).mean()), "ms": 1e3 * seconds / len(images),
        })  # fmt: skip
        print(f"epoch {epoch}: {rows[-1]}", flush=True)
    return {
        "num_images": len(images), "num_samples": _GAP_SAMPLES,
        "nats": float((best - start).mean()), "rows": rows,
    }  # fmt: skip


def _bounds(
    run: Run, params: gapjax.VAEParams, images: np.ndarray, refiner: Refiner, samples: int = 0
) -> np.ndarray:
    """The ELBO of every image with its refined posterior, on noise that the steps have not seen."""
    refined = gapjax.refine(run.vae, params, jax.random.key(SEED), images, refiner)
    return posterior_bounds(
        run.vae, params, run.key("evaluate"), images, refined.posteriors,
        num_samples=samples or run.config.num_eval_samples,
    )  # fmt: skip


def _named(refiner: Refiner) -> dict[str, Any]:
    method = refiner.method if refiner.num_steps else "none"
    return {"method": method, "steps": refiner.num_steps}


def _line(epoch: int, row: dict) -> str:
    return (
        f"epoch {epoch} {row['encoder']:16} {row['method']:6} {row['steps']:3} "
        f"{row['bytes']:9} bytes {row['bpd']:.4f} BPD, {row['over_elbo']:+.2%} over the ELBO, "
        f"{row['compress_ms']:.3f} and {row['decompress_ms']:.3f} ms"
    )


def settings_from_flags(values: flags.FlagValues) -> Settings:
    """The flags, checked."""
    encoders = tuple(values.encoders)
    for name in encoders:
        if name not in ENCODERS:
            raise UsageError(f"--encoders has {name!r}; it can have {', '.join(ENCODERS)}")
    refiners = [ENCODER]
    for method in ("newton", "adam"):
        name = f"{method}_steps"
        for steps in options.integers(name, values[name].value):
            if not 1 <= steps <= container.MAX_STEPS:
                raise UsageError(f"--{name} has {steps}; it must be from 1 to 1000")
            refiners.append(Refiner(method, steps))
    for name in ("num_images", "gap_images"):
        if values[name].value < 0:
            raise UsageError(f"--{name} is {values[name].value}; it must be at least 0")
    return Settings(encoders, tuple(refiners), values.num_images, values.gap_images)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of `Settings`."""
    names = functools.partial(flags.DEFINE_list, flag_values=values)
    number = functools.partial(flags.DEFINE_integer, flag_values=values)
    default = Settings()
    names("checkpoints", None, "Which to measure, e.g. 100,500; default: the last.")
    names("encoders", ",".join(default.encoders), f"Of {', '.join(ENCODERS)}.")
    names("newton_steps", "1,2", "Numbers of Newton steps to measure; none if empty.")
    names("adam_steps", "10", "Numbers of Adam steps to measure; none if empty.")
    number("num_images", 0, "How many of the test images are compressed, the first; 0: all.")
    number(
        "gap_images", default.gap_images,
        "How many of them the best posterior is searched for, for the share of the gap that "
        "refinement closes; 0: none.",
    )  # fmt: skip


def compression(run: Run) -> None:
    """The whole program."""
    epochs = chosen_epochs(run, flags.FLAGS.checkpoints)
    epochs = epochs or checkpoints.numbers(run.workdir.checkpoints / "train")[-1:]
    results = compression_phase(run, settings_from_flags(flags.FLAGS), epochs)
    for name, size in results["baselines"].items():
        print(f"{name:6} {size if size is not None else 'not installed, or not possible'}")


if __name__ == "__main__":
    options.define_place()
    define_flags()
    program.run_program(
        compression, new_runs=False, check=lambda values, _: settings_from_flags(values)
    )
