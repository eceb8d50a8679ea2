"""Compresses images without loss with a checkpoint of a run, and decompresses them.

python -m experiments.compress --checkpoint=runs/digits:500 --input=images.npz --output=out.gap
python -m experiments.compress --checkpoint=runs/digits:500 --decompress --input=out.gap \
    --output=images.npz

The .npz file holds `images`, integers [N, *event] from 0 to levels - 1. The data that the run was
trained on are not needed. A file is decompressed with the checkpoint and the encoder that made it,
on the same kind of machine; what else it needs to know stands in the file.
"""

import functools
import zipfile
from pathlib import Path

import numpy as np
from absl import flags

import gapjax
from experiments import options, program
from experiments.config import UsageError
from experiments.files import check_replaceable, replacing, write_atomically
from experiments.results_json import REFITTED
from experiments.run import Run, make_vae
from experiments.stores import ORIGIN, encoders
from experiments.workdir import Workdir
from gapjax import checkpoints
from gapjax.codec import container
from gapjax.codec.stack import CodecError
from gapjax.infer.newton import METHODS

ENCODERS = ("as_trained", *REFITTED)


def encoder_params(run: Run, epoch: int, encoder: str) -> gapjax.VAEParams:
    """The parameters of a checkpoint with one of `ENCODERS`."""
    kinds = () if encoder == "as_trained" else (encoder.removesuffix("_averaged"),)
    trained, by_name = encoders(run, epoch, kinds, averaged=kinds)
    return trained._replace(encoder=by_name[encoder])


def compress(values: flags.FlagValues) -> None:
    """Compresses or decompresses one file, as the flags say."""
    for name in ("checkpoint", "input", "output"):
        if not values[name].value:
            raise UsageError(f"--{name} is not given")
    if values.refinement_steps < 0 or values.refinement_steps > container.MAX_STEPS:
        raise UsageError(
            f"--refinement_steps is {values.refinement_steps}; it must be from 0 to "
            f"{container.MAX_STEPS}"
        )
    program.use_compilation_cache()
    workdir, epoch = _checkpoint(values.checkpoint)
    source, target = Path(values.input), Path(values.output)
    try:
        check_replaceable(target, source)
    except UsageError as error:
        raise UsageError(f"--output: {error}") from error
    run = _model(workdir, epoch)
    params = encoder_params(run, epoch, values.encoder)
    try:
        if values.decompress:
            _decompress(run.vae, params, source, target)
        else:
            refiner = gapjax.Refiner(values.refinement, values.refinement_steps)
            _compress(run.vae, params, source, target, refiner)
    except TypeError as error:  # a family of distributions that is not coded
        raise UsageError(f"--checkpoint={values.checkpoint}: {error}") from error
    except CodecError as error:
        raise CodecError(f"--input={source}: {error}") from error


def _compress(
    vae: gapjax.VAE, params: gapjax.VAEParams, source: Path, target: Path, refiner: gapjax.Refiner
) -> None:
    images = _read_images(source)
    content = gapjax.compress(vae, params, images, refiner)
    if not np.array_equal(gapjax.decompress(vae, params, content), images):
        raise CodecError("what was compressed does not decompress; nothing was written")
    write_atomically(target, content)
    bpd = f", {8 * len(content) / images.size:.4f} bits per dimension" if images.size else ""
    print(f"{len(images)} images: {len(content)} bytes{bpd}")


def _decompress(vae: gapjax.VAE, params: gapjax.VAEParams, source: Path, target: Path) -> None:
    images = gapjax.decompress(vae, params, source.read_bytes())
    with replacing(target) as temporary, temporary.open("wb") as file:
        np.savez(file, images=images)
    print(f"{len(images)} images of shape {images.shape[1:]}")


def _checkpoint(given: str) -> tuple[Workdir, int]:
    """The workdir and the epoch of WORKDIR[:EPOCH]; by default the last."""
    path, _, number = given.rpartition(":")
    if not (path and number.isdecimal()) or Path(given).is_dir():
        path, number = given, ""
    workdir = Workdir(Path(path))
    saved = checkpoints.numbers(workdir.checkpoints / "train")
    wanted = [number] if number else None
    return workdir, options.checkpoints_of(f"checkpoint={given}", wanted, saved)[-1]


def _model(workdir: Workdir, epoch: int) -> Run:
    """The run with no data in it: of the shape that it was trained on, whatever a file says."""
    config = workdir.config()
    origin = checkpoints.record(workdir.checkpoints / "train", epoch)[ORIGIN]
    if "levels" not in origin:
        raise UsageError(f"--checkpoint={workdir.path} is of an earlier version; train it again")
    event_shape, levels = tuple(origin["event_shape"]), origin["levels"]
    nothing = np.zeros((0, *event_shape), np.uint8)
    provenance = workdir.provenance()  # by which entries know their run
    dataset = gapjax.Dataset(config.dataset, nothing, nothing, levels, provenance)
    return Run(config, dataset, make_vae(config, event_shape, levels), workdir)


def _read_images(path: Path) -> np.ndarray:
    """The array `images` of an .npz file."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo("images.npy").file_size
        if size > 8 * container.MAX_PIXELS:
            raise CodecError(f"images take {size} bytes; divide them among several files")
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["images"]
    except (OSError, CodecError):
        raise
    except KeyError as error:
        raise CodecError("it holds no array named images; save one with numpy.savez") from error
    except Exception as error:  # zipfile, zlib and NumPy's parser each raise their own
        raise CodecError(
            "it is no .npz file of numbers, or truncated or damaged; save one with "
            "numpy.savez(file, images=...)"
        ) from error
    if images.ndim < 2:
        raise CodecError(f"images have shape {images.shape}; it must be [N, *event]")
    return images


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of this program."""
    path = functools.partial(options.define_path, default=None, flag_values=values)
    of = lambda define: functools.partial(define, flag_values=values)
    choice, integer, boolean = map(of, (flags.DEFINE_enum, flags.DEFINE_integer, flags.DEFINE_bool))
    path(name="checkpoint", help="WORKDIR[:EPOCH] of the model; default: the last epoch.")
    choice("encoder", "as_trained", ENCODERS, "Which of its encoders.")
    integer("refinement_steps", 0, "Steps by which the encoder's posterior of each image is "
            "improved.")  # fmt: skip
    choice("refinement", "newton", METHODS, "What these steps are, see gapjax.refine.")
    path(name="input", help="An .npz file with images; with --decompress, a compressed file.")
    path(name="output", help="The file to write.")
    boolean("decompress", False, "The other direction. The refinement stands in the file.")


if __name__ == "__main__":
    define_flags()
    program.run_without_workdir(compress, ends_at_once=True)
