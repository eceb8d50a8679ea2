"""Forecasts how long each preset's training and refits take on accelerators; nothing is measured.

    python -m tests.forecast [--page=docs/accelerators.md]

From the table of a page that `tests/accelerators.py` made. On a GPU a step takes

    max(FLOP / peak, bytes / bandwidth) + kernels x launch

and on a TPU what its compiler estimates for the loop of the steps, of 100 images each; one of 200
takes at most twice that. FLOP are those of the matrix products: 6 for each weight and example where
it is trained, 4 where gradients pass through it, and 2 for samples of the model. Bytes are those of
Adam, which reads and writes a trained weight, its gradient and two moments, and of two products,
which read every weight. Peaks and bandwidths are those of the vendors' data sheets; the launch is
assumed. What is left out makes the times longer: the drawing of x, the host between calls,
compiling, evaluation.

It prints two tables: the parts of a step, and the time of each preset beside one CPU core's.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

from experiments.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
_LAUNCH = 2e-6  # seconds from one kernel to the next on a GPU; assumed
_CONVERGED = 0.4  # of the epochs of optimal inference, as experiments/cost.py has it
_CORES = {"v5e": "v5e chip", "h100": "H100", "v4-pod": "v4-32"}
# FLOP/s of the matrix units at JAX's default precision for float32, and bytes/s.
_PEAKS = {"v5e": (197e12, 819e9), "h100": (495e12, 3.35e12), "v4-pod": (275e12, 1.2e12)}
_SIZES = {  # pixels, outputs a pixel, training and test images; and the model in the page
    "digits": (64, 1, 1437, 360, "binary"),
    "grey_digits": (64, 2, 1437, 360, "grey"),
    "binary_mnist": (784, 1, 60000, 10000, "binary"),
    "grey_mnist": (784, 2, 60000, 10000, "grey"),
}


class Phase(NamedTuple):
    """One phase of a preset: its steps, and what one of them takes."""

    name: str
    steps: int
    program: str
    flop: float
    num_bytes: float
    members: int = 1  # refits of the phase, which all take these steps
    images: int = 100  # of a step


def phases(name: str) -> list[Phase]:
    """The phases of a preset; the control is a refit on training images alone."""
    preset, (pixels, outputs, train, test, kind) = PRESETS[name], _SIZES[name]
    first, second = preset["hidden_sizes"]
    latent, batch = preset["latent_dim"], preset["batch_size"]
    shared = first * second
    encoder = pixels * first + shared + 2 * latent * second
    decoder = latent * second + shared + outputs * pixels * first
    size = preset.get("refit_batch_size") or batch
    members = preset["num_epochs"] // preset["checkpoint_every"]
    refit, refit_bytes = 6 * encoder + 4 * decoder, 32 * encoder + 8 * (encoder + decoder)
    per_refit = preset["refit_epochs"] * math.ceil(train / size)
    optimal = math.ceil(_CONVERGED * preset["optimal_epochs"]) * math.ceil(test / batch)
    sampled = refit + 2 * preset["alpha"] * decoder
    steps, everything = preset["num_epochs"] * math.ceil(train / batch), encoder + decoder
    refits = f"{kind} self-consistent"
    return [
        Phase("train", steps, f"{kind} train", 6 * everything * batch, 40 * everything),
        Phase("self_consistent", per_refit, refits, sampled * size, refit_bytes, members, size),
        Phase("control", per_refit, refits, refit * size, refit_bytes, members, size),
        Phase("optimal", optimal, refits, refit * batch, refit_bytes, members),
    ]  # fmt: skip


def read(page: str) -> dict[tuple[str, str], dict[str, float]]:
    """Kernels and microseconds of the loop by program and target, from the page's table."""
    found = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 1 and (match := re.fullmatch(r"(.+): `run_steps`", cells[1])):
            number = lambda text: float(text) if text else math.nan
            found[match[1], cells[2]] = {"kernels": number(cells[9]), "loop": number(cells[10])}
    return found


def seconds(phase: Phase, target: str, table: dict) -> float:
    """Seconds of a step of one run."""
    row, (peak, bandwidth) = table[phase.program, target], _PEAKS[target]
    if target != "h100":
        return row["loop"] * 1e-6 * phase.images / 100
    return max(phase.flop / peak, phase.num_bytes / bandwidth) + row["kernels"] * _LAUNCH


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "accelerators.md")
    table = read(parser.parse_args().page.read_text(encoding="utf-8"))
    names = list(_CORES.values())
    print("| preset | phase | MFLOP | MB | " + " | ".join(f"{name}, µs" for name in names) + " |")
    print("|---" * 7 + "|")
    for name in ("binary_mnist", "grey_mnist"):
        for phase in phases(name)[:2]:
            times = " | ".join(f"{1e6 * seconds(phase, target, table):.0f}" for target in _CORES)
            parts = f"{phase.flop / 1e6:.0f} | {phase.num_bytes / 1e6:.0f}"
            print(f"| `{name}` | {phase.name} | {parts} | {times} |")
    print("\n| preset | steps | one CPU core | " + " | ".join(names) + " |\n" + "|---" * 6 + "|")
    for name in PRESETS:
        parts = phases(name)
        results = ROOT / "experiments" / "results" / name / "results.json"
        measured = json.loads(results.read_text(encoding="utf-8"))["seconds"]
        cpu = sum(measured[phase.name] for phase in parts)
        steps = sum(phase.steps * phase.members for phase in parts)
        times = [
            sum(phase.steps * phase.members * seconds(phase, target, table) for phase in parts)
            for target in _CORES
        ]
        cells = " | ".join(f"{time:.0f} s" for time in times)
        print(f"| `{name}` | {steps:,} | {cpu:,.0f} s | {cells} |")


if __name__ == "__main__":
    main()
