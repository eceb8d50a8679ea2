"""The notebook for Colab runs from top to bottom, and holds no outputs."""

import json
import sys
import types
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

from gapjax import parallel

NOTEBOOK = Path(__file__).parent.parent / "experiments" / "gapjax_colab.ipynb"


def _cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_outputs_are_stripped():
    for cell in _cells():
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in _cells()) == 1


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_at_a_reduced_setting(tmp_path, monkeypatch):
    """On two devices. MNIST's place is taken by noise of its form."""
    shown = []
    colab = types.ModuleType("IPython.display")
    colab.display = shown.append
    ipython = types.ModuleType("IPython")
    ipython.version_info = (9, 0)  # matplotlib asks for it
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", colab)
    rng = np.random.default_rng(0)
    images = {part: rng.integers(0, 2, (120, 28, 28), np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "noise.npz", **images)
    reduced = {
        "DIGITS": dict(num_epochs=4, checkpoint_every=2, refit_epochs=1, optimal_epochs=20),
        "MNIST": str(tmp_path / "noise.npz"),
        "MNIST_EPOCHS": {"cpu": 2},
    }
    names = {"__name__": "__main__"}
    for cell in _cells():
        if cell["cell_type"] != "code":
            continue
        with parallel.use_devices(jax.devices()[:2]):
            exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(reduced) <= set(names)
            names.update(reduced)
    assert len(shown) == 3 + 1 + 3  # the figures of either set, and samples
    assert [row["epoch"] for row in names["digits"]["checkpoints"]] == [2, 4]
    for results in (names["digits"], names["mnist"]):
        for row in results["checkpoints"]:
            assert 0 < row["optimal"]["bpd"] < row["test"]["bpd"] < 2
    plt.close("all")
