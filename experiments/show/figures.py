"""The figures: pure functions from results to a matplotlib `Figure`.

`results` is the dictionary that the main program writes as `results.json`. The three figures of
the paper also take a list of such dictionaries, one per seed: the curves are then means over the
seeds, and the bands one standard deviation across them.

Nothing here touches matplotlib's global state beyond the call, and no display is needed: figures
are built without pyplot, and matplotlib itself is imported at the first call. Every curve carries
its key in results ("train", "test", "optimal", ...) as its matplotlib label, so that what was
drawn can be read back.

"Optimal inference" was fitted on the test data, and says so wherever it is drawn.

References:
  Zhang, Hayes, Barber. Generalization Gap in Amortized Inference. NeurIPS 2022.
  https://arxiv.org/abs/2205.11640
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

__all__ = [
    "effects",
    "figure1a",
    "figure1b",
    "figure2",
    "image_grid",
    "ledger",
    "overview",
    "refit_curves",
    "save",
]

Results = Mapping[str, Any]


class Ink(NamedTuple):
    """How one quantity is drawn in every figure: by colour, by marker and by line."""

    colour: str
    marker: str
    line: str


# After Okabe and Ito's palette for colour-blind readers, the lighter tones darkened until text in
# them is readable on white. Markers and dashes tell the curves apart in grey print too.
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
}

# From the bottom of a bar to its top: what is lost, its colour, and in words.
_LOSSES: Mapping[str, tuple[str, str]] = {
    "model_gap": ("#8a8a8a", "decoder over-fits\n(log p(x): train − test)"),
    "approximation_gap": ("#7fb4d6", "posterior family\nis too simple*"),
    "capacity_gap": ("#a9d3b4", "encoder cannot give\nthe best posterior*"),
    "inference_gap_by_refit": ("#e08a4a", "encoder over-fits*"),
}

_PAPER = "#ffffff"
_TEXT = "#222222"
_MUTED = "#6b6b6b"
_GRID = "#e7e7e7"
_GAP = "#f6d9c4"
_FONT_SIZE = 10.0
_LABEL_SIZE = 9.5
_SINGLE = (6.4, 4.0)
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": _FONT_SIZE,
    "text.color": _TEXT,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _TEXT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlepad": 10.0,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.unicode_minus": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "figure.facecolor": _PAPER,
    "savefig.facecolor": _PAPER,
    "pdf.fonttype": 42,
}


def figure1a(results: Results | Sequence[Results]) -> Figure:
    """Draws train and test BPD of every checkpoint (the paper's figure 1a).

    Args:
      results: the results of one run, or a list of them, one per seed.

    Returns:
      The figure; the epoch of the lowest test BPD is marked.
    """
    return _single(_draw_figure1a, results)


def figure1b(results: Results | Sequence[Results]) -> Figure:
    """Draws test BPD beside that after optimal inference (the paper's figure 1b).

    Args:
      results: the results of one run, or a list of them, one per seed.

    Returns:
      The figure; the area between the curves is the inference generalization gap (equation 11).
    """
    return _single(_draw_figure1b, results)


def figure2(results: Results | Sequence[Results]) -> Figure:
    """Draws test BPD by each kind of inference (the paper's figure 2, with the control).

    Args:
      results: the results of one run, or a list of them, one per seed.

    Returns:
      The figure: amortized, control (alpha = 0), self-consistent and optimal inference.
    """
    return _single(_draw_figure2, results)


def overview(results: Results | Sequence[Results]) -> Figure:
    """Draws the paper's three figures side by side; the last two share their BPD axis.

    Args:
      results: the results of one run, or a list of them, one per seed.

    Returns:
      The figure, three panels wide.
    """
    runs = _runs(results)
    with _style():
        figure = _new_figure((12.4, 4.2))
        left, middle, right = figure.subplots(1, 3)
        right.sharey(middle)
        ends = _draw_figure1a(left, runs)
        ends += _draw_figure1b(middle, runs)
        ends += _draw_figure2(right, runs)
        middle.set_ylabel("")
        right.set_ylabel("")
        bands = "1a, 1b: " + _band_words(runs)
        paired = "2: " + _band_words(runs, paired=True)
        notes = [bands, paired] if len(runs) == 1 else [_band_words(runs)]
        _finish(figure, ends, _footnote(runs, *notes))
    return figure


def refit_curves(results: Results, epochs: Sequence[int] | None = None) -> Figure | None:
    """Draws the test BPD over the refits: self-consistent training beside its control.

    Args:
      results: the results of one run.
      epochs: the checkpoints to show, one panel each; those with the lowest and the last test
        BPD if left out.

    Returns:
      The figure, or None if the results hold no curve of these checkpoints. Dashed lines stand
      where the encoder started and, labelled as fitted on the test set, where optimal inference
      ended.
    """
    by_epoch = {c["epoch"]: c for c in results["checkpoints"] if _curves(c)}
    if epochs is None:
        wanted = list(by_epoch)
        lowest = min(wanted, key=lambda e: by_epoch[e]["test"]["bpd"], default=None)
        epochs = sorted({lowest, wanted[-1]}) if wanted else []
    chosen = [by_epoch[epoch] for epoch in epochs if epoch in by_epoch]
    if not chosen:
        return None
    with _style():
        figure = _new_figure((_SINGLE[0] + 4.8 * (len(chosen) - 1), _SINGLE[1]))
        panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
        ends = []
        for axes, checkpoint in zip(panels, chosen, strict=True):
            ends += _draw_refit(axes, checkpoint, _self_consistent_label(results))
        panels[0].set_ylabel("test " + LABELS["bpd"])
        _finish(figure, ends, _footnote([results]))
    return figure


def effects(results: Results | Sequence[Results]) -> Figure | None:
    """Draws what self-consistent training and its control win on each kind of image.

    Args:
      results: the results of one run, or a list of them, one per seed.

    Returns:
      The figure, a panel for samples of the model, training images and test images, or None if
      the results do not hold these numbers. Below zero a refit has made things worse.
    """
    runs = _runs(results)
    if not all("effects" in checkpoint for run in runs for checkpoint in run["checkpoints"]):
        return None
    labels = {"control": LABELS["control"], "self_consistent": _self_consistent_label(runs[0])}
    with _style():
        figure = _new_figure((12.4, 4.0))
        panels = figure.subplots(1, 3, sharey=True)
        ends = []
        for axes, kind in zip(panels, ("model", "train", "test"), strict=True):
            axes.axhline(0.0, color=_MUTED, linewidth=0.8)
            own = [_of_kind(run, kind) for run in runs]
            for key, label in labels.items():
                ends.append(_curve(axes, own, key, label, band=len(runs) > 1))
            _dress(axes, f"effect_on_{kind}", _series(own, "control")[0])
            axes.set_ylabel("")
        panels[0].set_ylabel("bits per dimension won by the refit")
        _finish(figure, ends, _footnote(runs, _band_words(runs, paired=True)))
    return figure


def _of_kind(run: Results, kind: str) -> Results:
    """A run as if the effects on one kind of image were all it held."""
    return {
        "checkpoints": [{"epoch": c["epoch"], **c["effects"][kind]} for c in run["checkpoints"]]
    }


def ledger(results: Results) -> Figure:
    """Draws where the nats go on unseen images: a stacked bar for every checkpoint.

    A bar is train log p(x) minus test ELBO with the encoder as trained; its parts are what the
    decoder, the posterior's family, the encoder's capacity and the encoder's over-fitting lose.
    A dash across it is where the self-consistent encoder ends.

    Args:
      results: of one run, as the ledger program writes them to ledger.json.

    Returns:
      The figure. The parts carry their keys as labels ("model_gap", ...), and their standard
      errors as bars.

    Raises:
      ValueError: there is no checkpoint in it.
    """
    rows = sorted(results["checkpoints"], key=_epoch)
    if not rows:
        raise ValueError("nothing to draw: results hold no checkpoint")
    with _style():
        figure = _new_figure((max(_SINGLE[0], 2.8 + 0.9 * len(rows)), 4.4))
        axes = figure.add_subplot()
        ends = _draw_ledger(axes, rows)
        counts = [f"{rows[-1][name]['num_images']:,} {name}" for name in ("train", "test")]
        notes = (f"{' and '.join(counts)} images", "* fitted on the test images", "± 1 stderr")
        _finish(figure, ends, _footnote([results], *notes))
    return figure


def image_grid(
    images: Any,
    levels: int,
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
) -> Figure:
    """Lays images out on a grid, row by row.

    Args:
      images: [N, H, W] or [N, H, W, C] with C of 1 or 3, integers 0 to levels - 1 (floats are
        taken on the same scale).
      levels: the number of grey levels; 2 for binary images.
      columns: images in a row. Left out: as many as fill `row_labels`, or a grid about twice as
        wide as high.
      row_labels: one label for each row.
      column_labels: one label for each column, above it.

    Returns:
      The figure. Images of one channel are drawn as ink: the highest level is the darkest.

    Raises:
      ValueError: the images are not of such a shape, or do not fill the labelled rows.
    """
    mosaic, rows, columns = _mosaic(images, levels, columns, row_labels)
    with _style():
        figure = _new_figure((4.0, 4.0), layout=None)

        def write(labels: Sequence[str] | None, **place: str) -> tuple[list, tuple[float, float]]:
            texts = [figure.text(0, 0, t, fontsize=_LABEL_SIZE, **place) for t in labels or ()]
            sizes = [text.get_window_extent().size for text in texts] or [(0.0, 0.0)]
            return texts, tuple(np.ceil(50 * np.max(sizes, axis=0) / figure.dpi) / 50)

        beside, (left, _) = write(row_labels, ha="right", va="center")
        above, (_, top) = write(column_labels, ha="center", va="bottom", linespacing=1.2)
        edge, inch = 0.08, 0.01  # two pixels of the PNG to each of the mosaic, so edges are sharp
        left = left + 0.2 if beside else edge
        top = top + 2 * edge if above else edge
        high, wide = mosaic.shape[0] * inch, mosaic.shape[1] * inch
        width, height = left + wide + edge, high + top + edge
        figure.set_size_inches(width, height)
        axes = figure.add_axes(
            (left / width, edge / height, wide / width, high / height), frame_on=False
        )
        axes.imshow(mosaic, cmap="gray_r", vmin=0.0, vmax=1.0, interpolation="nearest")
        axes.set_axis_off()
        for text, row in zip(beside, rows, strict=False):
            text.set_position(((left - 0.12) / width, 1 - (top + row * inch) / height))
        for text, column in zip(above, columns, strict=False):
            text.set_position(((left + column * inch) / width, 1 - (top - edge / 2) / height))
    return figure


def save(figure: Figure, stem: str | os.PathLike[str], *, dpi: float = 200.0) -> tuple[Path, Path]:
    """Writes a figure as PNG and as PDF, each whole or not at all.

    The files carry no date, so the same figure gives the same bytes.

    Args:
      figure: what to write.
      stem: the path without its ending, in a directory that exists.
      dpi: pixels per inch of the PNG.

    Returns:
      The paths of the PNG and of the PDF.

    Raises:
      OSError: a file could not be written; the older ones, if any, are still there.
    """
    stem = Path(stem)
    png, pdf = (stem.with_name(stem.name + ending) for ending in (".png", ".pdf"))
    with _style():
        with replacing(png) as temporary:
            figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})
        with replacing(pdf) as temporary:
            metadata = {"CreationDate": None, "Creator": None, "Producer": None}
            figure.savefig(temporary, format="pdf", metadata=metadata)
    return png, pdf


def _style() -> contextlib.AbstractContextManager:
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def _new_figure(size: tuple[float, float], layout: str | None = "constrained") -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout=layout)
    FigureCanvasAgg(figure)
    if layout is not None:
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.02)
    return figure


def _single(draw: Any, results: Results | Sequence[Results]) -> Figure:
    runs = _runs(results)
    with _style():
        figure = _new_figure(_SINGLE)
        ends = draw(figure.add_subplot(), runs)
        _finish(figure, ends, _footnote(runs, _band_words(runs, paired=draw is _draw_figure2)))
    return figure


def _runs(results: Results | Sequence[Results]) -> list[Results]:
    runs = [results] if isinstance(results, Mapping) else list(results)
    if not runs or not all(run["checkpoints"] for run in runs):
        raise ValueError("nothing to draw: results hold no checkpoint")
    return runs


def _series(runs: Sequence[Results], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epochs, BPD and half the width of the band, each [checkpoints that all runs share]."""
    tables = [{c["epoch"]: c[key] for c in run["checkpoints"]} for run in runs]
    epochs = sorted(set.intersection(*(set(table) for table in tables)))
    if not epochs:
        raise ValueError("nothing to draw: the runs share no checkpoint")
    bpd = np.array([[table[e]["bpd"] for e in epochs] for table in tables], float)
    if len(runs) > 1:
        return np.array(epochs), bpd.mean(0), bpd.std(0, ddof=1)
    error = [tables[0][e].get("stderr") or 0.0 for e in epochs]
    return np.array(epochs), bpd[0], np.array(error, float)


def _draw_figure1a(axes: Axes, runs: Sequence[Results]) -> list[Annotation]:
    ends = [_curve(axes, runs, key, LABELS[key]) for key in ("test", "train")]
    epochs, test, _ = _series(runs, "test")
    if len(epochs) > 1 and np.isfinite(test).any():
        lowest = int(np.nanargmin(test))
        axes.axvline(epochs[lowest], color=_MUTED, linewidth=0.8, linestyle=":", zorder=1)
        late = lowest >= len(epochs) / 2
        axes.annotate(
            f"lowest test BPD\nepoch {epochs[lowest]}",
            (epochs[lowest], 0.98),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-5 if late else 5, 0),
            textcoords="offset points",
            ha="right" if late else "left",
            va="top",
            fontsize=8.5,
            color=_MUTED,
        )
        axes.margins(y=0.12)
    _dress(axes, "figure1a", epochs)
    return ends


def _draw_figure1b(axes: Axes, runs: Sequence[Results]) -> list[Annotation]:
    epochs, test, _ = _series(runs, "test")
    _, optimal, _ = _series(runs, "optimal")
    if len(epochs) > 1:
        gap = axes.fill_between(epochs, optimal, test, color=_GAP, linewidth=0, zorder=1.5)
        weight = np.nan_to_num(np.abs(test - optimal)) + 1e-12
        x = float(np.sum(weight * epochs) / np.sum(weight))
        place = {"ha": "center", "va": "center"}
    else:
        gap = axes.vlines(epochs, optimal, test, color=_GAP, linewidth=7, zorder=1.5)
        x = float(epochs[0])
        place = {"ha": "right", "va": "center"}
    gap.set_label("inference_gap")
    ends = [_curve(axes, runs, key, LABELS[key], band=False) for key in ("test", "optimal")]
    middle = float(np.interp(x, epochs, (test + optimal) / 2))
    text = axes.annotate(
        LABELS["inference_gap"],
        (x, middle),
        xytext=(0 if len(epochs) > 1 else -10, 0),
        textcoords="offset points",
        fontsize=_LABEL_SIZE,
        fontstyle="italic",
        color="#8a3a00",
        linespacing=1.1,
        zorder=4,
        **place,
    )
    text.set_path_effects(_halo(_GAP if len(epochs) > 1 else _PAPER))
    _dress(axes, "figure1b", epochs)
    return ends


def _draw_figure2(axes: Axes, runs: Sequence[Results]) -> list[Annotation]:
    labels = {
        "test": LABELS["amortized"],
        "control": LABELS["control"],
        "self_consistent": _self_consistent_label(runs[0]),
        "optimal": LABELS["optimal"],
    }
    ends = []
    for key, label in labels.items():
        # The curves are of the same images: what tells them apart is the error of the difference.
        error = _series(runs, key)[2] if len(runs) > 1 else _paired_error(runs[0], key)
        ends.append(_curve(axes, runs, key, label, band=False, error=error))
    _dress(axes, "figure2", _series(runs, "test")[0])
    return ends


def _draw_ledger(axes: Axes, rows: Sequence[Results]) -> list[Annotation]:
    places = np.arange(len(rows))
    above, below = np.zeros(len(rows)), np.zeros(len(rows))
    ends, parts = [], []
    for key, (colour, words) in _LOSSES.items():
        entries = [_loss(row, key) for row in rows]
        if any(entry is None for entry in entries):
            continue
        nats = np.array([entry["nats"] for entry in entries])
        base = np.where(nats >= 0, above, below)
        axes.bar(places, nats, 0.62, bottom=base, color=colour, label=key, zorder=2)
        error = [entry["stderr"] for entry in entries]
        axes.errorbar(  # beside the numbers
            places - 0.22, base + nats, error, fmt="none", ecolor=_TEXT, elinewidth=0.9, zorder=3
        )
        above, below = above + np.maximum(nats, 0), below + np.minimum(nats, 0)
        middle = base[-1] + nats[-1] / 2
        ends.append(_end_label(axes, (places[-1] + 0.34, middle), words, _TEXT))
        parts += zip(places, base, nats, strict=True)
    for place, start, value in parts:
        if abs(value) > 0.05 * (above.max() - below.min()):  # where a number has room
            axes.text(place, start + value / 2, f"{value:.2f}", ha="center", va="center",
                      fontsize=8.5, zorder=4)  # fmt: skip
    helped = [row["test"]["encoders"].get("self_consistent") for row in rows]
    if all(helped):
        lost = [
            row["train"]["log_prob"]["nats"] - encoder["elbo"]["nats"]
            for row, encoder in zip(rows, helped, strict=True)
        ]
        colour = INKS["self_consistent"].colour
        axes.hlines(lost, places - 0.36, places + 0.36, color=colour, linewidth=2.2, zorder=4,
                    label="self_consistent")  # fmt: skip
        words = "after self-consistent\ntraining"
        ends.append(_end_label(axes, (places[-1] + 0.34, lost[-1]), words, colour))
    axes.axhline(0.0, color=_MUTED, linewidth=0.8)
    axes.set_xticks(places, [str(row["epoch"]) for row in rows])
    axes.set_xlim(-0.5, len(rows) - 0.62)
    axes.set_title("What is lost on unseen images: train log p(x) minus test ELBO")
    axes.set_xlabel(LABELS["epoch"])
    axes.set_ylabel("nats per image")
    return ends


def _loss(row: Results, key: str) -> Results | None:
    """One part of a bar: of the whole checkpoint, of its test set, or of its encoder as trained."""
    test = row["test"]
    for place in (row, test, test["encoders"]["as_trained"]):
        if key in place:
            return place[key]
    return None


def _paired_error(run: Results, key: str) -> np.ndarray:
    """Standard error of the paired difference from the amortized encoder; 0 where unknown."""
    difference = {"self_consistent": "gain", "optimal": "inference_gap"}.get(key)
    entries = [c.get(difference) or {} for c in sorted(run["checkpoints"], key=_epoch)]
    return np.array([entry.get("stderr") or 0.0 for entry in entries], float)


def _epoch(checkpoint: Results) -> int:
    return checkpoint["epoch"]


def _draw_refit(axes: Axes, checkpoint: Results, label: str) -> list[Annotation]:
    curves = _curves(checkpoint)
    labels = {"control": LABELS["control"], "self_consistent": label}
    ends = []
    for key, (epochs, bpd) in curves.items():
        ink = INKS[key]
        axes.plot(epochs, bpd, color=ink.colour, linestyle=ink.line, label=key, zorder=3)
        ends.append(_end_label(axes, (epochs[-1], bpd[-1]), labels[key], ink.colour))
    last = max(epochs[-1] for epochs, _ in curves.values())
    for key, text in (("test", LABELS["amortized"]), ("optimal", LABELS["optimal"])):
        bpd, ink = checkpoint[key]["bpd"], INKS[key]
        axes.axhline(bpd, color=ink.colour, linewidth=1.0, linestyle=(0, (5, 3)), label=key)
        ends.append(_end_label(axes, (last, bpd), text, ink.colour))
    axes.set_title(f"Refits of the encoder of epoch {checkpoint['epoch']}")
    axes.set_xlabel(LABELS["refit_epoch"])
    axes.set_xlim(0, last)
    return ends


def _curves(checkpoint: Results) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Epochs and test BPD of the refits that recorded them."""
    found = {}
    for key in ("control", "self_consistent"):
        refit = (checkpoint.get("refits") or {}).get(key) or {}
        curve = refit.get("curve") or {}
        epochs, bpd = curve.get("epoch") or [], curve.get("test_bpd") or []
        if len(epochs) and len(epochs) == len(bpd):
            found[key] = np.array(epochs, float), np.array(bpd, float)
    return found


def _curve(
    axes: Axes,
    runs: Sequence[Results],
    key: str,
    label: str,
    band: bool = True,
    error: np.ndarray | None = None,
) -> Annotation:
    """Draws one curve with its band (or error bars) and its label at the end."""
    epochs, bpd, own_error = _series(runs, key)
    error = own_error if error is None else error
    ink = INKS[key]
    if band and len(epochs) > 1:
        low, high = bpd - error, bpd + error
        axes.fill_between(epochs, low, high, color=ink.colour, alpha=0.16, linewidth=0, zorder=2)
    else:
        axes.vlines(epochs, bpd - error, bpd + error, color=ink.colour, linewidth=0.9, alpha=0.55)
    axes.plot(
        epochs,
        bpd,
        color=ink.colour,
        linestyle=ink.line,
        marker=ink.marker,
        markeredgecolor=_PAPER,
        markeredgewidth=0.6,
        label=key,
        zorder=3,
    )
    return _end_label(axes, (epochs[-1], bpd[-1]), label, ink.colour)


def _end_label(axes: Axes, end: tuple[float, float], label: str, colour: str) -> Annotation:
    return axes.annotate(
        label,
        end,
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        fontsize=_LABEL_SIZE,
        linespacing=1.1,
        annotation_clip=False,
    )


def _self_consistent_label(results: Results) -> str:
    alpha = (results.get("config") or {}).get("alpha")
    known = isinstance(alpha, int | float)
    return LABELS["self_consistent"] + (f",\nα = {alpha:g}" if known else "")


def _dress(axes: Axes, name: str, epochs: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(LABELS[name])
    axes.set_xlabel(LABELS["epoch"])
    axes.set_ylabel(LABELS["bpd"])
    if len(epochs) == 1:
        axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        axes.set_xticks(epochs)
    else:
        axes.set_xlim(left=min(0, epochs[0]))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _band_words(runs: Sequence[Results], paired: bool = False) -> str:
    if len(runs) > 1:
        return f"mean of {len(runs)} seeds ± 1 standard deviation across them"
    if paired:
        return "± 1 standard error of the paired difference from amortized"
    return "± 1 standard error over images"


def _footnote(runs: Sequence[Results], *notes: str) -> str:
    first = runs[0]
    num_test = (first.get("data") or {}).get("num_test")
    words = [
        str(first.get("dataset") or first.get("preset") or ""),
        f"{num_test:,} test images" if num_test else "",
        *notes,
    ]
    return "  ·  ".join(word for word in words if word)


def _finish(figure: Figure, ends: Sequence[Annotation], footnote: str) -> None:
    """Adds the footnote, lays the figure out and moves its end labels apart."""
    figure.supxlabel(footnote, x=0.995, ha="right", fontsize=8.0, color=_MUTED)
    figure.draw_without_rendering()
    points = 72.0 / figure.dpi
    for axes in figure.axes:
        own = [end for end in ends if end.axes is axes and np.isfinite(end.xy[1])]
        wanted = [axes.transData.transform(end.xy)[1] * points for end in own]
        heights = [1.2 * _LABEL_SIZE * (1 + end.get_text().count("\n")) + 2.0 for end in own]
        limits = axes.bbox.y0 * points, axes.bbox.y1 * points
        for end, y, spread in zip(own, wanted, _spread(wanted, heights, limits), strict=True):
            end.xyann = (8, spread - y)


def _spread(
    wanted: Sequence[float], heights: Sequence[float], limits: tuple[float, float]
) -> list[float]:
    """Centres for labels of these heights: apart, in order, near those wanted, inside limits."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    stacks: list[list[float]] = []  # each: the bottom, the height, and how many labels it holds
    for i in order:
        stacks.append([wanted[i] - heights[i] / 2, heights[i], 1])
        while len(stacks) > 1 and stacks[-2][0] + stacks[-2][1] > stacks[-1][0]:
            bottom, height, count = stacks.pop()
            below = stacks[-1]
            # The merged stack lies at the mean of where its labels would have it.
            shifted = below[0] * below[2] + (bottom - below[1]) * count
            below[0] = shifted / (below[2] + count)
            below[1] += height
            below[2] += count
    ceiling = limits[1]
    for stack in reversed(stacks):
        ceiling = stack[0] = min(stack[0], ceiling - stack[1])
    floor = limits[0]
    for stack in stacks:
        stack[0] = max(stack[0], floor)
        floor = stack[0] + stack[1]
    centres = [0.0] * len(wanted)
    labels = iter(order)
    for bottom, _, count in stacks:
        for _ in range(int(count)):
            i = next(labels)
            centres[i] = bottom + heights[i] / 2
            bottom += heights[i]
    return centres


def _halo(colour: str) -> list[Any]:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.5, foreground=colour)]


def _mosaic(
    images: Any, levels: int, columns: int | None, row_labels: Sequence[str] | None
) -> tuple[np.ndarray, list[float], list[float]]:
    """One enlarged picture of all images, with gutters; the centres of its rows and columns."""
    images = np.asarray(images)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)) or not images.size:
        raise ValueError(f"images of shape [N, H, W] or [N, H, W, C] expected, got {images.shape}")
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    count = len(images)
    if row_labels is not None:
        columns = columns or max(1, count // max(1, len(row_labels)))
        if count != columns * len(row_labels):
            raise ValueError(f"{count} images do not fill {len(row_labels)} rows of {columns}")
    columns = columns or _columns(count)
    rows = -(-count // columns)
    enlarge = max(1, round(60 / max(images.shape[1:3])))
    cells = images.repeat(enlarge, axis=1).repeat(enlarge, axis=2) / (levels - 1)
    (high, wide), gutter, colour = cells.shape[1:3], 4, cells.ndim == 4
    paper, line = (1.0, 0.85) if colour else (0.0, 0.15)
    shape = (rows * (high + gutter) + gutter, columns * (wide + gutter) + gutter)
    mosaic = np.full(shape + cells.shape[3:], paper)
    step = high + gutter, wide + gutter
    corners = [(i // columns * step[0], i % columns * step[1]) for i in range(count)]
    for top, left in corners:
        mosaic[top : top + high + 2 * gutter, left : left + wide + 2 * gutter] = line
    for (top, left), cell in zip(corners, cells, strict=True):
        mosaic[top + gutter : top + gutter + high, left + gutter : left + gutter + wide] = cell
    centres = [
        [gutter + i * (size + gutter) + size / 2 for i in range(number)]
        for number, size in ((rows, high), (columns, wide))
    ]
    return np.clip(mosaic, 0.0, 1.0), *centres


def _columns(count: int) -> int:
    """About twice as many columns as rows, with full rows where that can be."""
    aim = np.sqrt(2 * count)
    full = [c for c in range(int(aim / 2), 2 * int(aim) + 1) if c and count % c == 0]
    return min(full, key=lambda c: abs(c - aim)) if full else int(np.ceil(aim))
