"""Test BPD over alpha, the share of model samples in a refit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from experiments.show import Results
from experiments.show.labels import end_label
from experiments.show.style import INKS, LABELS, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

_INKS = tuple(INKS[name] for name in ("test", "self_consistent", "optimal", "control", "train"))


def draw_alpha(axes: Axes, rows: Sequence[Results]) -> list[Annotation]:
    """Draws a curve for each checkpoint, and a dotted line for its encoder as trained.

    A band is one standard error over seeds, and a bar one over test images of the paired difference
    from the encoder as trained.
    """
    ends = []
    for number, row in enumerate(rows):
        ink = _INKS[number % len(_INKS)]
        alphas = np.array([each["alpha"] for each in row["alphas"]])
        bpd = np.array([each["test_bpd"]["mean"] for each in row["alphas"]])
        seeds = np.array([each["test_bpd"]["stderr"] or 0.0 for each in row["alphas"]])
        images = np.array([each["gain"]["stderr_over_images"] for each in row["alphas"]])
        label = f"epoch {row['epoch']}"
        axes.fill_between(
            alphas, bpd - seeds, bpd + seeds, color=ink.colour, alpha=0.16, linewidth=0, zorder=2
        )
        axes.errorbar(
            alphas, bpd, yerr=images, color=ink.colour, marker=ink.marker, elinewidth=0.9,
            capsize=2, markeredgecolor=PAPER, markeredgewidth=0.6, zorder=3, label=label,
        )  # fmt: skip
        trained = row["as_trained"]["mean"]
        axes.axhline(trained, color=ink.colour, linewidth=0.9, linestyle=":", zorder=1)
        ends.append(end_label(axes, (alphas[-1], bpd[-1]), label, ink.colour))
    axes.set_title("What alpha does: test images after the refit")
    axes.set_xlabel("alpha, the share of model samples")
    axes.set_ylabel(LABELS["bpd"])
    axes.set_xticks(alphas if len(alphas) <= 11 else np.linspace(0, 1, 11))
    axes.set_xlim(right=alphas[-1] + 0.01)  # room for half a marker
    return ends
