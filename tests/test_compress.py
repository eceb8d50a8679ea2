"""Compression: `experiments/compress` and `baselines`."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

import gapjax
from experiments import baselines, compress, options, train
from experiments import run as experiment
from experiments.workdir import Workdir
from gapjax.codec import container
from gapjax.codec.coding import ENCODER
from gapjax.codec.stack import CodecError

pytest.importorskip("constriction", reason="the extra 'codec' is not installed")

_ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A workdir with a checkpoint of a few steps, whose data are gone, and images of its kind."""
    folder = tmp_path_factory.mktemp("compress")
    digits, data = gapjax.load_dataset("digits"), folder / "data.npz"
    np.savez(data, train=digits.train, test=digits.test, levels=2)
    values = flags.FlagValues()
    options.define_run(values)
    values(
        [
            "", "--num_epochs=1", "--checkpoint_every=1", "--hidden_sizes=16", "--latent_dim=2",
            "--batch_size=200", f"--dataset={data}",
        ]
    )  # fmt: skip
    prepared = experiment.prepare(options.config_from_flags(values), None)
    run = experiment.start(prepared, Workdir(folder / "run"))
    with jax.default_device(jax.devices()[0]):
        train.train_phase(run)
    run.workdir.close()
    data.unlink()
    images = prepared.dataset.test[:30]
    np.savez(folder / "images.npz", images=images)
    return folder, images


def _flags(**given):
    values = flags.FlagValues()
    compress.define_flags(values)
    values(["", *(f"--{name}={value}" for name, value in given.items())])
    return values


def _program(*arguments, hash_seed="0"):
    """In a process of its own, with another order of hashes than the process before it."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), *sys.path]),
        "JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": hash_seed,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-m", "experiments.compress", *arguments],
        env=environment, text=True, capture_output=True, timeout=200,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_another_process_finds_the_images_again(checkpoint):
    folder, images = checkpoint
    model, packed = f"--checkpoint={folder}/run", folder / "out.gap"
    code, out, err = _program(
        model, "--refinement_steps=1", f"--input={folder}/images.npz", f"--output={packed}"
    )
    assert code == 0, err
    assert out.startswith(f"30 images: {packed.stat().st_size} bytes, ")
    back = folder / "back.npz"
    there = f"--input={packed}", f"--output={back}", "--decompress"
    code, out, err = _program(f"{model}:1", *there, hash_seed="1")
    assert code == 0, err
    with np.load(back) as arrays:
        np.testing.assert_array_equal(arrays["images"], images)
        assert arrays["images"].dtype == np.uint8
    packed.write_bytes(packed.read_bytes()[:-1])
    back.unlink()
    code, out, err = _program(model, *there)
    assert (code, out) == (1, "")
    assert err == f"compress: --input={packed}: the file is truncated\n"
    assert not back.exists()


@pytest.mark.parametrize(
    "given, words",
    [
        ({"checkpoint": ""}, "--checkpoint is not given"),
        ({"checkpoint": "{folder}/run:7"}, "run:7: no checkpoint of epoch 7; there are 1"),
        ({"checkpoint": "{folder}/elsewhere"}, "there are none"),
        ({"encoder": "optimal"}, "has no optimal refit of epoch 1"),
        ({"refinement_steps": -1}, "--refinement_steps is -1"),
        ({"input": "{folder}/run/config.json"}, r"--input=.*no \.npz file"),
        ({"input": "{folder}/named.npz"}, "no array named images"),
        ({"input": "{folder}/flat.npz"}, "shape"),
        ({"input": "{folder}/objects.npz"}, r"no \.npz file of numbers"),
        ({"input": "{folder}/wide.npz"}, r"shape \(2, 8, 9\); the model takes \[N, 8, 8\]"),
        ({"decompress": "true", "input": "{folder}/big.gap"}, r"\(30000, 30000, 1\) with 2 levels"),
        ({"decompress": "true", "input": "{folder}/levels.gap"}, "200 levels; the model is for"),
        ({"output": "{folder}/images.npz"}, "--output: .*images.npz is the input"),
        ({"output": "{folder}/hard.npz"}, "--output: .*hard.npz is the input"),
        ({"output": "{folder}/pipe"}, "--output: .*pipe is no regular file"),
        ({"output": "{folder}/link"}, "--output: .*link is no regular file"),
        ({"output": "/dev/null"}, "--output: /dev/null is no regular file"),
        ({"output": "{folder}"}, "--output: .* is no regular file"),
        ({"input": "{folder}/grey.npz"}, "values from 9 to 9"),
        ({"decompress": "true"}, "not a file of gapjax's codec"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_in_one_line(checkpoint, given, words):
    folder, _ = checkpoint
    np.savez(folder / "named.npz", x=np.zeros(3))
    np.savez(folder / "flat.npz", images=np.zeros(3, np.uint8))
    np.savez(folder / "objects.npz", images=np.array([None, 1], object))
    np.savez(folder / "wide.npz", images=np.zeros((2, 8, 9), np.uint8))
    np.savez(folder / "grey.npz", images=np.full((2, 8, 8), 9))
    for name, levels, shape in (("big", 2, (30000, 30000, 1)), ("levels", 200, (8, 8))):
        header = container.Header(levels, shape, 1, ENCODER, bytes(8), bytes(8), bytes(8), 0)
        (folder / f"{name}.gap").write_bytes(container.pack(header, [np.zeros(0, np.uint32)]))
    if not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
        (folder / "link").symlink_to(folder / "nowhere")
        (folder / "hard.npz").hardlink_to(folder / "images.npz")
    usual = {
        "checkpoint": "{folder}/run", "input": "{folder}/images.npz", "output": "{folder}/no.gap"
    }  # fmt: skip
    values = {name: str(value).format(folder=folder) for name, value in {**usual, **given}.items()}
    with pytest.raises((ValueError, RuntimeError), match=words) as raised:
        compress.compress(_flags(**values))
    assert "\n" not in str(raised.value)
    assert not (folder / "no.gap").exists()


def test_a_checkpoint_of_an_earlier_version_is_named(checkpoint, monkeypatch):
    folder, _ = checkpoint
    record = compress.checkpoints.record(folder / "run" / "checkpoints" / "train", 1)
    del record["origin"]["levels"]
    monkeypatch.setattr(compress.checkpoints, "record", lambda store, number: record)
    with pytest.raises(options.UsageError, match="run is of an earlier version; train it again"):
        compress.compress(
            _flags(checkpoint=f"{folder}/run", input=f"{folder}/images.npz", output=f"{folder}/no")
        )


def test_a_file_that_unpacks_to_too_much_is_refused(checkpoint, monkeypatch):
    folder, _ = checkpoint
    monkeypatch.setattr(compress.container, "MAX_PIXELS", 100)
    with pytest.raises(CodecError, match="divide them among several files"):
        compress.compress(
            _flags(
                checkpoint=f"{folder}/run", input=f"{folder}/images.npz", output=f"{folder}/no.gap"
            )
        )


def test_other_compressors_get_every_pixel():
    """Their pictures are read back; noise takes what it takes, blank images hardly anything."""
    images = np.random.default_rng(0).integers(0, 2, (10, 6, 5)).astype(np.uint8)
    picture = baselines.grid(images)
    assert picture.shape == (18, 20)
    np.testing.assert_array_equal(picture[6:12, 5:10], images[5])
    assert picture[12:, 10:].sum() == 0
    noise, blank = (baselines.sizes(x, 2) for x in (images, 0 * images))
    assert noise["packed"] == -(-300 // 8)
    many = np.tile(images, (40, 1, 1))
    assert baselines.sizes(many, 256)["packed"] == many.size
    for name in ("png", "webp", "xz"):
        assert blank[name] < noise[name]
    assert baselines.sizes(images.reshape(10, 30), 2)["png"] is None
