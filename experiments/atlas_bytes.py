"""What rows of the atlas cost in bytes: compresses test images by their models, in every order.

python -m experiments.atlas_bytes --rows=digits_bottom_up,kodak --data_dir=data --out=runs/atlas

The late checkpoint of one seed is used; it is trained where it is not there. Every file is
decompressed and compared. Beside its bytes stand those that the ELBO predicts, those of a file with
one image, and those of PNG, WebP, zstd and xz. Writes bytes.json.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import gapjax
from experiments import atlas, baselines, program, rows
from experiments.atlas import Job
from experiments.config import UsageError, known
from experiments.files import write_json
from experiments.options import define_path
from experiments.rows import ROWS
from experiments.run import commit, environment
from experiments.show.formatting import text_table
from gapjax.codec import container, stack
from gapjax.codec.schedule import ORDERS
from gapjax.codec.stack import CodecError
from gapjax.codec.tables import describe
from gapjax.measure.bounds import per_image_bounds
from gapjax.measure.statistics import mean_and_stderr
from gapjax.model.chain import Chain
from gapjax.vae import prior_of


def measured(job: Job, number: int, *, every: bool = False) -> dict[str, Any]:
    """Bytes of the first `number` test images by the model of a row, and by other compressors.

    `every` is whether the images held out and those of training follow the test images.
    """
    params, facts = atlas.trained(job)["late"]
    parts = (job.data.test, job.data.validation, job.data.train)
    images = np.concatenate(parts if every else parts[:1])[:number]
    nats = per_image_bounds(
        job.vae, params, job.key("evaluate"), images, num_samples=job.row.num_samples
    )
    mean, stderr = mean_and_stderr(np.asarray(nats) / np.log(2) / 8)
    is_chain = isinstance(prior_of(job.vae, params.decoder), Chain)
    orders = ORDERS if is_chain else (None,)
    return {
        "row": job.name, "seed": job.seed, "epoch": facts["epoch"], "images": len(images),
        "of": "test, validation, training" if every else "test",
        "entries": int(images.size), "data_sha256": job.data.checksum, "commit": commit(),
        "elbo_bytes": -mean * len(images), "elbo_stderr": stderr * len(images),
        "files": {order or "bits_back": _file(job, params, images, order) for order in orders},
        "baselines": baselines.sizes(images, job.data.levels),
    }  # fmt: skip


def _file(job: Job, params: gapjax.VAEParams, images: np.ndarray, order: str | None) -> dict:
    """Bytes of a file, of its streams without the header, and of a file with one image."""
    try:
        content = gapjax.compress(job.vae, params, images, order=order)
    except ValueError as error:  # an order that is not possible
        return {"refused": str(error)}
    if not np.array_equal(gapjax.decompress(job.vae, params, content), images):
        raise CodecError("what was compressed did not decompress to the same images")
    header, streams = container.parse(content)
    started = len(stack.start(0, describe(job.vae, params).latent_dim))
    one = gapjax.compress(job.vae, params, images[:1], order=order)
    return {
        "bytes": len(content), "stream_bytes": 4 * sum(map(len, streams)), "chains": len(streams),
        # of the bits that a chain starts from, those that it popped, in words of 32
        "initial_bits": 32 * (started - header.left_out),
        "one_image_bytes": len(one), "one_image_stream_bytes": 4 * len(container.parse(one)[1][0]),
    }  # fmt: skip


def table(results: Mapping) -> str:
    """A line for each file, beside the ELBO's bytes and the other compressors'."""
    heads = ("row", "order", "bytes", "ELBO's", "over", "initial bits", "PNG", "WebP")
    lines = []
    for row in results["rows"]:
        for order, file in row["files"].items():
            if "refused" not in file:
                over = f"{file['stream_bytes'] / row['elbo_bytes'] - 1:+.2%}"
                sizes = file["bytes"], round(row["elbo_bytes"]), over, file["initial_bits"]
                others = (row["baselines"][name] for name in ("png", "webp"))
                lines.append((row["row"], order, *map(str, (*sizes, *others))))
    return text_table(heads, lines, 24, 14)


def atlas_bytes(values: flags.FlagValues) -> None:
    """Measures the rows, and writes bytes.json after each of them."""
    if values.out is None or not values.rows:
        raise UsageError("--rows and --out are both needed; see --help")
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
        found = measured(job, values.num_images, every=values.every)
        same = ("row", "images", "seed")
        kept = [each for each in kept if any(each[key] != found[key] for key in same)] + [found]
        results = {"schema": 1, "rows": kept, "environment": environment()}
        write_json(path, results)
    print(table(results))
    print("over: the streams' bytes, header aside, above the ELBO's")


if __name__ == "__main__":
    flags.DEFINE_list("rows", None, f"Which of {', '.join(ROWS)}.")
    flags.DEFINE_integer("seed", 0, "Of the row.", lower_bound=0)
    flags.DEFINE_integer("num_images", 1000, "Images, the first.", lower_bound=1)
    flags.DEFINE_boolean("every", False, "After the test images take all others, too.")
    define_path("data_dir", None, "See experiments.atlas.")
    define_path("out", None, "The folder of experiments.atlas, or another one.")
    program.run_without_workdir(atlas_bytes)
