"""Bits per dimension of compressed images over the time that they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from experiments.show import Results
from experiments.show.labels import end_label
from experiments.show.style import INKS, LABELS, MUTED, PAPER, Ink

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

_ENCODER_INKS: Mapping[str, Ink] = {
    "trained": INKS["test"], "paper": INKS["self_consistent"], **INKS
}  # fmt: skip
_LINES = {"newton": "-", "adam": (0, (4, 1.6))}
_BASELINES = {"png": "PNG", "webp": "WebP", "zstd": "zstd", "xz": "xz"}


def draw_trade_off(axes: Axes, results: Results) -> list[Annotation]:
    """Draws a curve for each encoder and method of a row, and a line for each other compressor."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = [file for file in results["files"].values() if "refused" not in file]
    right = 1.15 * max(map(_time, rows))
    ends = []
    for encoder in dict.fromkeys(row["encoder"] for row in rows):
        ink = _ENCODER_INKS.get(encoder, INKS["train"])
        own = sorted((row for row in rows if row["encoder"] == encoder), key=lambda r: r["steps"])
        methods = dict.fromkeys(row["method"] for row in own if row["steps"]) or ("newton",)
        for method in methods:
            drawn = [row for row in own if not row["steps"] or row["method"] == method]
            axes.plot(
                [_time(row) for row in drawn], [row["bpd"] for row in drawn], color=ink.colour,
                linestyle=_LINES[method], marker=ink.marker, markeredgecolor=PAPER,
                markeredgewidth=0.6, label=f"{encoder} {method}", zorder=3,
            )  # fmt: skip
            place = right, drawn[-1]["bpd"]
            ends.append(end_label(axes, place, _words(encoder, method, drawn), ink.colour))
    axes.set_xscale("log")
    axes.set_xlim(right=right)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    ends += _draw_baselines(axes, results, right, 1.6 * max(row["bpd"] for row in rows))
    axes.set_title(f"{LABELS['trade_off']}, epoch {results['epoch']}")
    axes.set_xlabel("milliseconds to code and decode an image")
    axes.set_ylabel(LABELS["bpd"])
    return ends


def _time(row: Mapping) -> float:
    return row["compress_ms"] + row["decompress_ms"]


def _draw_baselines(axes: Axes, results: Results, right: float, highest: float) -> list[Annotation]:
    """Lines for the compressors that are no higher; the others' numbers are in the file."""
    pixels = results["entries"]
    ends = []
    for name, size in results["baselines"].items():
        if name in _BASELINES and size and 8 * size / pixels < highest:
            bpd = 8 * size / pixels
            axes.axhline(bpd, color=MUTED, linewidth=0.9, linestyle=":", label=name)
            ends.append(end_label(axes, (right, bpd), _BASELINES[name], MUTED))
    return ends


def _words(encoder: str, method: str, rows: Sequence[Mapping]) -> str:
    """The label of a curve; its steps where there are any."""
    steps = ", ".join(str(row["steps"]) for row in rows if row["steps"])
    name = encoder.replace("_", " ")
    return f"{name},\n{steps} steps of {method}" if steps else name
