"""The notebook for Colab runs from top to bottom in a kernel, shows pictures, holds no outputs."""

import base64
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "experiments" / "gapjax_colab.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def _is_settings(cell):
    return "parameters" in cell.metadata.get("tags", ())


def test_outputs_are_stripped(notebook):
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert sum(map(_is_settings, notebook.cells)) == 1


def test_the_jax_of_a_runtime_is_kept(notebook, monkeypatch):
    """It fits the accelerator; a newer JAX beside the runtime's libtpu would not find the TPU."""
    (cell,) = (cell.source for cell in notebook.cells if "importlib.metadata" in cell.source)
    commands, here = [], {"jax": "0.7.2", "jaxlib": "0.7.1"}

    def version(name):
        if name not in here:
            raise importlib.metadata.PackageNotFoundError(name)
        return here[name]

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, int(len(commands) == 1))

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(cell, {"SOURCE": str(ROOT)})
    kept, anew = commands  # the second only because the first failed
    assert kept[-2:] == ["jax==0.7.2", "jaxlib==0.7.1"]
    assert kept[:-2] == anew == [sys.executable, *"-m pip install -q".split(), anew[-1]]
    assert anew[-1] == f"{ROOT}[experiments]"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_shows_its_figures_in_a_kernel_at_a_reduced_setting(notebook, tmp_path, monkeypatch):
    """On two devices. MNIST's place is taken by noise of the form of digits: the same programs."""
    rng = np.random.default_rng(0)
    sizes = {"train": 1437, "test": 360}
    images = {part: rng.integers(0, 2, (n, 8, 8), np.uint8) for part, n in sizes.items()}
    np.savez(tmp_path / "noise.npz", **images)
    (index,) = (i for i, cell in enumerate(notebook.cells) if _is_settings(cell))
    settings = notebook.cells[index].source
    for name in ("DIGITS", "MNIST", "MNIST_EPOCHS"):
        assert f"\n{name} = " in settings
    reduced = f"""
DIGITS = dict(num_epochs=4, checkpoint_every=2, refit_epochs=1, optimal_epochs=20)
MNIST = {str(tmp_path / "noise.npz")!r}
MNIST_EPOCHS = {{"cpu": 2}}
"""
    checks = """
assert [row["epoch"] for row in digits["checkpoints"]] == [2, 4]
for results in (digits, mnist):
    for row in results["checkpoints"]:
        assert 0 < row["optimal"]["bpd"] < row["test"]["bpd"] < 2
"""
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(reduced))
    notebook.cells.append(nbformat.v4.new_code_cell(checks))
    for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"):
        monkeypatch.setenv(name.upper(), str(getattr(jax.config, name)))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # of the kernel's own choice
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    pictures = [data["image/png"] for data in shown if "Figure" in data.get("text/plain", "")]
    assert len(pictures) == 3 + 1 + 3  # the figures of either set, and samples
    for picture in pictures:
        assert base64.b64decode(picture).startswith(b"\x89PNG")
