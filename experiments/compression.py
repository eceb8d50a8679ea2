"""The gap in bytes: compresses the test images of rows of the atlas by their encoders.

python -m experiments.compression --rows=digits,kodak --data_dir=data --out=runs/atlas

The checkpoint of one seed is taken from the atlas's folder, and trained where it is not there, as
the refits are. Every encoder codes with and without refinement at test time, hierarchies in every
order of their latents. Every file is decompressed and compared. Beside its bytes stand those that
the ELBO predicts, its times, those of a file with one image, and those of PNG, WebP, zstd and xz.
Writes bytes.json, after each row, and a figure for each row.
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

import gapjax
from experiments import atlas, baselines, options, program, rows
from experiments.config import UsageError, known
from experiments.files import write_json
from experiments.kept import Job
from experiments.rows import ROWS
from experiments.run import commit, environment
from experiments.show import figures
from experiments.show.atlas_rows import CHECKPOINTS
from experiments.show.formatting import text_table
from gapjax import Refiner
from gapjax.codec import container, stack
from gapjax.codec.coding import ENCODER
from gapjax.codec.schedule import ORDERS
from gapjax.codec.stack import CodecError
from gapjax.codec.tables import SEED, describe
from gapjax.measure.bounds import per_image_bounds, posterior_bounds
from gapjax.measure.statistics import mean_and_stderr
from gapjax.model.chain import Chain
from gapjax.vae import prior_of


class Settings(NamedTuple):
    """What is measured of a row."""

    at: str = "late"
    encoders: tuple[str, ...] = ("trained",)  # or a recipe of the row, "learned" or "best"
    refiners: tuple[Refiner, ...] = (ENCODER,)
    num_images: int = 1000  # the first
    every: bool = False  # whether the held-out images and those of training follow the test images


def measured(job: Job, settings: Settings) -> dict[str, Any]:
    """Bytes of images by the encoders of a row, and by other compressors."""
    params, facts = atlas.trained(job)[settings.at]
    models = {"trained": (job.vae, params)}
    if set(settings.encoders) != {"trained"}:
        choice = atlas.choose(job, settings.at, params)
        models |= choice.models | {"best": choice.models[choice.best]}
    parts = (job.data.test, job.data.validation, job.data.train)
    images = np.concatenate(parts if settings.every else parts[:1])[: settings.num_images]
    files = {}
    for name in settings.encoders:
        for label, how in _ways(*models[known("encoders", name, models)], settings.refiners):
            text = label if name == "trained" else f"{name} {label}"
            files[text] = {"encoder": name, **_file(job, *models[name], images, **how)}
    nats = per_image_bounds(
        job.vae, params, job.key("evaluate"), images, num_samples=job.row.num_samples
    )
    mean, stderr = mean_and_stderr(np.asarray(nats) / np.log(2) / 8)
    return {
        "row": job.name, "seed": job.seed, "at": settings.at, "epoch": facts["epoch"],
        "images": len(images), "of": "test, validation, training" if settings.every else "test",
        "entries": int(images.size), "data_sha256": job.data.checksum, "commit": commit(),
        "elbo_bytes": -mean * len(images), "elbo_stderr": stderr * len(images),
        "files": files, "baselines": baselines.sizes(images, job.data.levels),
    }  # fmt: skip


def _ways(
    vae: gapjax.VAE, params: gapjax.VAEParams, refiners: tuple[Refiner, ...]
) -> Iterator[tuple[str, dict]]:
    """The ways to code with a model: the orders of a hierarchy, or refiners; each with its name."""
    if isinstance(prior_of(vae, params.decoder), Chain):
        yield from ((order, {"order": order}) for order in ORDERS)
        return
    for refiner in refiners:
        name = f" {refiner.method} {refiner.num_steps}" if refiner.num_steps else ""
        yield f"bits_back{name}", {"refiner": refiner}


def _file(
    job: Job, vae: gapjax.VAE, params: gapjax.VAEParams, images: np.ndarray,
    refiner: Refiner = ENCODER, order: str | None = None,
) -> dict:  # fmt: skip
    """Bytes of a file, of its streams without the header, and of a file with one image; times."""
    code = lambda images: gapjax.compress(vae, params, images, refiner, order=order)
    try:
        one = code(images[:1])  # which compiles the programs, too
    except (TypeError, ValueError) as error:  # a posterior or an order that is not possible
        return {"refused": str(error)}
    start = time.perf_counter()
    content = code(images)
    coded = time.perf_counter()
    decoded = gapjax.decompress(vae, params, content)
    end = time.perf_counter()
    if not np.array_equal(decoded, images):
        raise CodecError("what was compressed did not decompress to the same images")
    header, streams = container.parse(content)
    started = len(stack.start(0, describe(vae, params).latent_dim))
    return {
        "method": refiner.method if refiner.num_steps else "none", "steps": refiner.num_steps,
        "bytes": len(content), "stream_bytes": 4 * sum(map(len, streams)), "chains": len(streams),
        "elbo_bytes": _predicted(job, vae, params, images, refiner),
        "bpd": 8 * len(content) / images.size,
        "compress_ms": 1e3 * (coded - start) / len(images),
        "decompress_ms": 1e3 * (end - coded) / len(images),
        # of the bits that a chain starts from, those that it popped, in words of 32
        "initial_bits": 32 * (started - header.left_out),
        "one_image_bytes": len(one), "one_image_stream_bytes": 4 * len(container.parse(one)[1][0]),
    }  # fmt: skip


def _predicted(
    job: Job, vae: gapjax.VAE, params: gapjax.VAEParams, images: np.ndarray, refiner: Refiner
) -> float:
    """The bytes that the ELBO predicts, on noise that no step of refinement has seen."""
    key, samples = job.key("evaluate"), job.row.num_samples
    if refiner.num_steps:
        refined = gapjax.refine(vae, params, jax.random.key(SEED), images, refiner)
        nats = posterior_bounds(vae, params, key, images, refined.posteriors, num_samples=samples)
    else:
        nats = per_image_bounds(vae, params, key, images, num_samples=samples)
    return -float(np.asarray(nats, np.float64).sum() / np.log(2) / 8)


def table(results: Mapping) -> str:
    """A line for each file, beside the ELBO's bytes and the other compressors'."""
    heads = ("row", "file", "bytes", "ELBO's", "over", "initial bits", "PNG", "WebP")
    lines = []
    for row in results["rows"]:
        for name, file in row["files"].items():
            if "refused" not in file:
                predicted = file.get("elbo_bytes", row["elbo_bytes"])
                over = f"{file['stream_bytes'] / predicted - 1:+.2%}"
                sizes = file["bytes"], round(predicted), over, file["initial_bits"]
                others = (row["baselines"][name] for name in ("png", "webp"))
                lines.append((row["row"], name, *map(str, (*sizes, *others))))
    return text_table(heads, lines, 24, 14)


def settings_from_flags(values: flags.FlagValues) -> Settings:
    """The flags, checked."""
    refiners = [ENCODER]
    for method in ("newton", "adam"):
        name = f"{method}_steps"
        for steps in options.integers(name, values[name].value):
            if not 1 <= steps <= container.MAX_STEPS:
                raise UsageError(f"--{name} has {steps}; it must be from 1 to 1000")
            refiners.append(Refiner(method, steps))
    encoders = tuple(values.encoders)
    return Settings(values.at, encoders, tuple(refiners), values.num_images, values.every)


def compression(values: flags.FlagValues) -> None:
    """Measures the rows, and writes bytes.json after each of them."""
    if values.out is None or not values.rows:
        raise UsageError("--rows and --out are both needed; see --help")
    settings = settings_from_flags(values)
    program.use_compilation_cache()
    out = Path(values.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "bytes.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []  # of other calls
    for name in [known("rows", name, ROWS) for name in values.rows]:
        data = rows.load(ROWS[name].data, values.data_dir)
        if data.levels is None:
            raise UsageError(f"--rows has {name}, whose data are counts; they have no table")
        job = Job(name, ROWS[name], values.seed, data, rows.model(ROWS[name], data), out)
        found = measured(job, settings)
        same = ("row", "images", "seed", "at")
        kept = [each for each in kept if any(each.get(key) != found[key] for key in same)]
        results = {"schema": 1, "rows": [*kept, found], "environment": environment()}
        kept = results["rows"]
        write_json(path, results)
        figures.save(figures.compression(found), out / f"bytes_{name}")
    print(table(results))
    print("over: the streams' bytes, header aside, above the ELBO's")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of this program."""
    default = Settings()
    names = lambda *how: flags.DEFINE_list(*how, flag_values=values)
    number = lambda *how: flags.DEFINE_integer(*how, lower_bound=0, flag_values=values)
    names("rows", None, f"Which of {', '.join(ROWS)}.")
    names("encoders", "trained,paper", "trained, recipes of the row, learned, best.")
    names("newton_steps", "2", "Numbers of Newton steps to measure; none if empty.")
    names("adam_steps", "", "Numbers of Adam steps to measure; none if empty.")
    number("seed", 0, "Of the row.")
    number("num_images", default.num_images, "Images, the first.")
    flags.DEFINE_enum("at", default.at, CHECKPOINTS, "Which checkpoint.", flag_values=values)
    flags.DEFINE_boolean(
        "every", False, "After the test images take all others, too.", flag_values=values
    )
    options.define_path("data_dir", None, "See experiments.atlas.", values)
    options.define_path("out", None, "The folder of experiments.atlas, or another one.", values)


if __name__ == "__main__":
    define_flags()
    program.run_without_workdir(compression)
