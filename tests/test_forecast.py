"""The forecast of docs/speed.md is what tests/forecast.py makes of the table of the compilers."""

import sys
from pathlib import Path

import forecast

ROOT = Path(__file__).parent.parent


def test_the_page_has_the_forecast_of_the_table(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["forecast"])
    forecast.main()
    made = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(made) == 2 + 4 + 2 + 4
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in made if line not in page] == []


def test_a_gpu_step_is_its_longer_part_and_its_launches():
    phase = forecast.Phase("train", 1, "binary train", 495e12, 3.35e12 / 2)
    table = {("binary train", "h100"): {"kernels": 500_000, "loop": float("nan")}}
    assert forecast.seconds(phase, "h100", table) == 1 + 1
    slow = phase._replace(num_bytes=3.35e12 * 3)
    assert forecast.seconds(slow, "h100", table) == 3 + 1
