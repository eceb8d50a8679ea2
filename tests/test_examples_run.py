"""Every script of experiments/examples runs, here for two epochs, and is short."""

import re
import runpy
from pathlib import Path

import pytest

import gapjax

FOLDER = Path(__file__).resolve().parent.parent / "experiments" / "examples"
_FITS = ("train", "refit_encoder", "self_consistent", "optimal_inference", "close_gap")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_an_example_runs_and_is_short(path, monkeypatch, tmp_path, capsys):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    for library in re.findall(r"^(?:import|from) (\w+)", text, re.M):
        pytest.importorskip(library, reason=f"{path.stem} needs {library}")
    for name in _FITS:
        shortened = _shortened(getattr(gapjax, name))
        monkeypatch.setattr(gapjax, name, shortened)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(path)])
    runpy.run_module(f"experiments.examples.{path.stem}", run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(r"\d", printed)
    assert not re.search(r"\bnan\b", printed), printed


def _shortened(fit):
    return lambda *args, **options: fit(*args, **{**options, "num_epochs": 2})
