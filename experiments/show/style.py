"""How every figure looks: colours, words and matplotlib's settings."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Ink(NamedTuple):
    """How one quantity is drawn in every figure."""

    colour: str  # of the line and of its label, as "#rrggbb"
    marker: str
    line: str | tuple[float, tuple[float, ...]]  # matplotlib's style, or (offset, (on, off))


# After Okabe and Ito's palette for colour-blind readers. The light colours are darkened, so that
# text in them is readable on white. Markers and dashes tell the curves apart in black and white.
INKS: Mapping[str, Ink] = {
    "train": Ink("#4d4d4d", "s", "-"),
    "test": Ink("#c75000", "o", "-"),
    "control": Ink("#a04a86", "D", (0, (1, 1.2))),
    "self_consistent": Ink("#0067a5", "^", "-"),
    "optimal": Ink("#007a5a", "v", (0, (4, 1.6))),
}
LABELS: Mapping[str, str] = {
    "train": "train",
    "test": "test",
    "amortized": "amortized\n(as trained)",
    "control": "control, α = 0",
    "self_consistent": "self-consistent",
    "optimal": "optimal inference\n(fitted on\nthe test set)",
    "inference_gap": "inference\ngeneralization gap",
    "bpd": "bits per dimension (lower is better)",
    "epoch": "training epochs",
    "refit_epoch": "epochs of the refit",
    "figure1a": "1a  Train and test",
    "figure1b": "1b  Test, and after optimal inference",
    "figure2": "2  Test, by kind of inference",
    "effect_on_model": "On fresh samples of the model",
    "effect_on_train": "On training images",
    "effect_on_test": "On test images",
    "trade_off": "Compressed test images",
}

PAPER = "#ffffff"
TEXT = "#222222"
MUTED = "#6b6b6b"
GAP = "#f6d9c4"
GAP_TEXT = "#8a3a00"
LABEL_SIZE = 9.5
SINGLE = (6.4, 4.0)  # inches, of a figure of one panel
_RC = {
    "font.family": "DejaVu Sans", "font.size": 10.0, "text.color": TEXT,
    "axes.edgecolor": MUTED, "axes.labelcolor": TEXT, "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
    "axes.titlesize": 11.0, "axes.titleweight": "bold", "axes.titlepad": 10.0,
    "axes.axisbelow": True, "axes.grid": True, "axes.grid.axis": "y", "axes.unicode_minus": True,
    "grid.color": "#e7e7e7", "grid.linewidth": 0.8,
    "xtick.color": MUTED, "xtick.labelcolor": TEXT, "xtick.labelsize": 9.0,
    "ytick.color": MUTED, "ytick.labelcolor": TEXT, "ytick.labelsize": 9.0,
    "ytick.major.size": 0.0, "lines.linewidth": 1.8, "lines.markersize": 4.5,
    "figure.facecolor": PAPER, "savefig.facecolor": PAPER, "pdf.fonttype": 42,
}  # fmt: skip


def style() -> contextlib.AbstractContextManager[None]:
    """Applies the figures' settings inside a `with` block; matplotlib's own are restored."""
    import matplotlib

    return matplotlib.rc_context(_RC)


def new_figure(size: tuple[float, float], layout: str | None = "constrained") -> Figure:
    """An empty figure with an Agg canvas, made without pyplot; a notebook shows it as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout=layout)
    FigureCanvasAgg(figure)
    # Jupyter looks for this method. Its own for figures is there only where pyplot was imported.
    figure._repr_png_ = functools.partial(_png, figure)
    if layout is not None:
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.02)
    return figure


def _png(figure: Figure) -> bytes:
    """The figure as a notebook shows it."""
    picture = io.BytesIO()
    with style():
        figure.savefig(picture, format="png")
    return picture.getvalue()
