"""BPD as curves over epochs: the paper's figures, the refits and their effects; and over alpha."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from experiments.show import Results
from experiments.show.labels import end_label, self_consistent_label
from experiments.show.style import GAP, GAP_TEXT, INKS, LABEL_SIZE, LABELS, MUTED, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation


_MOST_MARKERS = 25  # of a curve; more would hide it, with their edges


def as_runs(results: Results | Sequence[Results]) -> list[Results]:
    """The results of one run or of several as a list."""
    runs = [results] if isinstance(results, Mapping) else list(results)
    if not runs or not all(run["checkpoints"] for run in runs):
        raise ValueError("nothing to draw: results hold no checkpoint")
    return runs


def draw_figure1a(axes: Axes, runs: Sequence[Results]) -> list[Annotation]:
    """Draws train and test BPD, and marks the epoch of the lowest test BPD."""
    ends = [_curve(axes, runs, key, LABELS[key]) for key in ("test", "train")]
    epochs, test, _ = _series(runs, "test")
    if len(epochs) > 1 and np.isfinite(test).any():
        lowest = int(np.nanargmin(test))
        axes.axvline(epochs[lowest], color=MUTED, linewidth=0.8, linestyle=":", zorder=1)
        late = lowest >= len(epochs) / 2
        axes.annotate(
            f"lowest test BPD\nepoch {epochs[lowest]}", (epochs[lowest], 0.98),
            xycoords=axes.get_xaxis_transform(), xytext=(-5 if late else 5, 0),
            textcoords="offset points", ha="right" if late else "left", va="top", fontsize=8.5,
            color=MUTED,
        )  # fmt: skip
        axes.margins(y=0.12)
    _dress(axes, "figure1a", epochs)
    return ends


def draw_figure1b(axes: Axes, runs: Sequence[Results]) -> list[Annotation]:
    """Draws test BPD and that after optimal inference, and shades the gap between them."""
    from matplotlib.patheffects import withStroke

    epochs, test, _ = _series(runs, "test")
    _, optimal, _ = _series(runs, "optimal")
    if several := len(epochs) > 1:
        gap = axes.fill_between(epochs, optimal, test, color=GAP, linewidth=0, zorder=1.5)
        weight = np.nan_to_num(np.abs(test - optimal)) + 1e-12
        x = float(np.sum(weight * epochs) / np.sum(weight))
    else:
        gap = axes.vlines(epochs, optimal, test, color=GAP, linewidth=7, zorder=1.5)
        x = float(epochs[0])
    gap.set_label("inference_gap")
    ends = [_curve(axes, runs, key, LABELS[key], band=False) for key in ("test", "optimal")]
    middle = float(np.interp(x, epochs, (test + optimal) / 2))
    text = axes.annotate(
        LABELS["inference_gap"], (x, middle), xytext=(0 if several else -10, 0),
        textcoords="offset points", fontsize=LABEL_SIZE, fontstyle="italic", color=GAP_TEXT,
        linespacing=1.1, zorder=4, ha="center" if several else "right", va="center",
    )  # fmt: skip
    ground = GAP if several else PAPER  # around the text, which crosses lines
    text.set_path_effects([withStroke(linewidth=2.5, foreground=ground)])
    _dress(axes, "figure1b", epochs)
    return ends


def draw_figure2(axes: Axes, runs: Sequence[Results]) -> list[Annotation]:
    """Draws test BPD by each kind of inference."""
    labels = {
        "test": LABELS["amortized"], "control": LABELS["control"],
        "self_consistent": self_consistent_label(runs[0]), "optimal": LABELS["optimal"],
    }  # fmt: skip
    # All curves are of the same images, so the error of interest is that of the difference.
    paired = {"test": "", "control": "", "self_consistent": "gain", "optimal": "inference_gap"}
    ends = [
        _curve(axes, runs, key, label, band=False, error_of=paired[key])
        for key, label in labels.items()
    ]
    _dress(axes, "figure2", _series(runs, "test")[0])
    return ends


def draw_effects(axes: Axes, runs: Sequence[Results], kind: str) -> list[Annotation]:
    """Draws the BPD that the refits gain on one kind of image."""
    labels = {"control": LABELS["control"], "self_consistent": self_consistent_label(runs[0])}
    axes.axhline(0.0, color=MUTED, linewidth=0.8)
    gains = [
        {"checkpoints": [{"epoch": c["epoch"], **c["effects"][kind]} for c in run["checkpoints"]]}
        for run in runs
    ]
    ends = [_curve(axes, gains, key, label, band=len(runs) > 1) for key, label in labels.items()]
    _dress(axes, f"effect_on_{kind}", _series(gains, "control")[0])
    axes.set_ylabel("")
    return ends


def recorded_refits(checkpoint: Results) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Epochs and test BPD of those refits of a checkpoint that recorded them."""
    refits = checkpoint.get("refits", {})
    curves = {key: refits[key]["curve"] for key in ("control", "self_consistent") if key in refits}
    return {key: (np.array(c["epoch"]), np.array(c["test_bpd"])) for key, c in curves.items()}


def draw_refit(axes: Axes, checkpoint: Results, label: str) -> list[Annotation]:
    """Draws test BPD over the refits of one checkpoint."""
    curves = recorded_refits(checkpoint)
    labels = {"control": LABELS["control"], "self_consistent": label}
    ends = []
    for key, (epochs, bpd) in curves.items():
        ink = INKS[key]
        axes.plot(epochs, bpd, color=ink.colour, linestyle=ink.line, label=key, zorder=3)
        ends.append(end_label(axes, (epochs[-1], bpd[-1]), labels[key], ink.colour))
    last = max(epochs[-1] for epochs, _ in curves.values())
    for key, text in (("test", LABELS["amortized"]), ("optimal", LABELS["optimal"])):
        bpd, ink = checkpoint[key]["bpd"], INKS[key]
        axes.axhline(bpd, color=ink.colour, linewidth=1.0, linestyle=(0, (5, 3)), label=key)
        ends.append(end_label(axes, (last, bpd), text, ink.colour))
    axes.set_title(f"Refits of the encoder of epoch {checkpoint['epoch']}")
    axes.set_xlabel(LABELS["refit_epoch"])
    axes.set_xlim(0, last)
    return ends


def draw_alpha(axes: Axes, name: str, gains: Mapping[str, Sequence[tuple]]) -> None:
    """Draws a curve for each checkpoint: what a refit wins, over alpha; bars are stderr."""
    for checkpoint, ink in zip(gains, (INKS["self_consistent"], INKS["optimal"]), strict=True):
        alphas, summed = zip(*gains[checkpoint], strict=True)
        nats, errors = ([each[key] for each in summed] for key in ("mean", "stderr"))
        axes.errorbar(
            alphas, nats, yerr=errors, color=ink.colour, marker=ink.marker, elinewidth=0.9,
            capsize=2, markeredgecolor=PAPER, markeredgewidth=0.6, label=checkpoint,
        )  # fmt: skip
    axes.axhline(0.0, color=MUTED, linewidth=0.8)
    axes.set_title(name)
    axes.set_xlabel("alpha, the share of model samples")
    axes.set_ylabel("nats won on a test example")
    axes.legend(frameon=False, title="checkpoint")


def _series(
    runs: Sequence[Results], key: str, error_of: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epochs, BPD and errors, each [C] with C the checkpoints that all runs share.

    The error of one run is the standard error of `key` or of another entry, 0 where that is not
    known. That of several runs is the standard deviation across them.
    """
    tables = [
        {checkpoint["epoch"]: checkpoint for checkpoint in run["checkpoints"]} for run in runs
    ]
    epochs = sorted(set.intersection(*map(set, tables)))
    if not epochs:
        raise ValueError("nothing to draw: the runs share no checkpoint")
    bpd = np.array([[table[e][key]["bpd"] for e in epochs] for table in tables], float)
    if len(runs) > 1:
        return np.array(epochs), bpd.mean(0), bpd.std(0, ddof=1)
    known = [tables[0][e].get(key if error_of is None else error_of, {}) for e in epochs]
    return np.array(epochs), bpd[0], np.array([each.get("stderr") or 0.0 for each in known])


def _curve(
    axes: Axes, runs: Sequence[Results], key: str, label: str, *, band: bool = True,
    error_of: str | None = None,
) -> Annotation:  # fmt: skip
    """Draws one curve with a band or error bars, and its label at the end."""
    epochs, bpd, error = _series(runs, key, error_of)
    ink = INKS[key]
    if band and len(epochs) > 1:
        low, high = bpd - error, bpd + error
        axes.fill_between(epochs, low, high, color=ink.colour, alpha=0.16, linewidth=0, zorder=2)
    else:
        axes.vlines(epochs, bpd - error, bpd + error, color=ink.colour, linewidth=0.9, alpha=0.55)
    axes.plot(
        epochs, bpd, color=ink.colour, linestyle=ink.line, marker=ink.marker, markeredgecolor=PAPER,
        markeredgewidth=0.6, markevery=-(-len(epochs) // _MOST_MARKERS), label=key, zorder=3,
    )  # fmt: skip
    return end_label(axes, (epochs[-1], bpd[-1]), label, ink.colour)


def _dress(axes: Axes, name: str, epochs: np.ndarray) -> None:
    """Sets the title, the axis labels and the ticks of the epochs."""
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
