"""Text in figures: labels at the ends of curves, which do not overlap, and the footnote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from experiments.show import Results
from experiments.show.style import LABEL_SIZE, LABELS, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

_BETWEEN = "  ·  "
_LETTERS = 16  # of a footnote, to an inch


def end_label(axes: Axes, end: tuple[float, float], label: str, colour: str) -> Annotation:
    """Writes a label to the right of a curve's end; `finish` moves such labels apart."""
    return axes.annotate(
        label, end, xytext=(8, 0), textcoords="offset points", va="center", color=colour,
        fontsize=LABEL_SIZE, linespacing=1.1, annotation_clip=False,
    )  # fmt: skip


def self_consistent_label(results: Results) -> str:
    """The label of self-consistent training, with its α."""
    return f"{LABELS['self_consistent']},\nα = {results['config']['alpha']:g}"


def error_note(runs: Sequence[Results], paired: bool = False) -> str:
    """What the bands or error bars show."""
    if len(runs) > 1:
        return f"mean of {len(runs)} seeds ± 1 standard deviation across them, same test images"
    if paired:
        return "± 1 standard error of the paired difference from amortized"
    return "± 1 standard error over images"


def footnote(runs: Sequence[Results], *notes: str) -> str:
    """The line below a figure: the data set, the number of test images, and notes."""
    first = runs[0]
    num_test = (first.get("data") or {}).get("num_test")
    words = [
        str(first.get("dataset") or first.get("preset") or ""),
        f"{num_test:,} test images" if num_test else "",
        *notes,
    ]
    return _BETWEEN.join(word for word in words if word)


def finish(figure: Figure, ends: Sequence[Annotation], note: str) -> None:
    """Adds the footnote, lays the figure out and moves its end labels apart."""
    lines = [""]
    for words in note.split(_BETWEEN):  # as many lines as they need
        longer = _BETWEEN.join(filter(None, (lines[-1], words)))
        fits = len(longer) <= _LETTERS * figure.get_figwidth()
        lines[-1:] = [longer] if fits or not lines[-1] else [lines[-1], words]
    figure.supxlabel("\n".join(lines), x=0.995, ha="right", fontsize=8.0, color=MUTED)
    figure.draw_without_rendering()
    points = 72.0 / figure.dpi
    for axes in figure.axes:
        inside = [end for end in ends if end.axes is axes and np.isfinite(end.xy[1])]
        wanted = [axes.transData.transform(end.xy)[1] * points for end in inside]
        heights = [1.2 * LABEL_SIZE * (1 + end.get_text().count("\n")) + 2.0 for end in inside]
        limits = axes.bbox.y0 * points, axes.bbox.y1 * points
        for end, y, centre in zip(inside, wanted, _spread(wanted, heights, limits), strict=True):
            end.xyann = (8, centre - y)


def _spread(
    wanted: Sequence[float], heights: Sequence[float], limits: tuple[float, float]
) -> np.ndarray:
    """Centres of labels that do not overlap, by least squares as near as possible to the wanted."""
    from scipy.optimize import isotonic_regression

    order = np.argsort(wanted, kind="stable")
    high = np.take(heights, order)
    below = np.cumsum(high) - high  # of all labels under each
    # Without what is below them the bottoms only have to be in order.
    bottoms = isotonic_regression(np.take(wanted, order) - high / 2 - below).x
    bottoms = np.maximum(np.minimum(bottoms, limits[1] - high.sum()), limits[0])
    centres = np.empty(len(order))
    centres[order] = bottoms + below + high / 2
    return centres
