"""Bars: what is lost on unseen images and through which part; what each recipe closes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from experiments.show import Results
from experiments.show.labels import end_label
from experiments.show.style import INKS, LABELS, MUTED, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

# The parts of a bar from bottom to top: the key in ledger.json, the colour and the label.
LOSSES: Mapping[str, tuple[str, str]] = {
    "model_gap": ("#8a8a8a", "decoder over-fits\n(log p(x): train − test)"),
    "approximation_gap": ("#7fb4d6", "posterior family\nis too simple*"),
    "capacity_gap": ("#a9d3b4", "encoder cannot give\nthe best posterior*"),
    "inference_gap_by_refit": ("#e08a4a", "encoder over-fits*"),
}


def draw_ledger(axes: Axes, rows: Sequence[Results]) -> list[Annotation]:
    """Draws a bar for each checkpoint."""
    places = np.arange(len(rows))
    ends = _draw_losses(axes, rows, places) + _draw_self_consistent(axes, rows, places)
    axes.axhline(0.0, color=MUTED, linewidth=0.8)
    axes.set_xticks(places, [str(row["epoch"]) for row in rows])
    axes.set_xlim(-0.5, len(rows) - 0.62)
    axes.set_title("What is lost on unseen images: train log p(x) minus test ELBO")
    axes.set_xlabel(LABELS["epoch"])
    axes.set_ylabel("nats per image")
    return ends


def draw_recipes(axes: Axes, row: Results) -> None:
    """Draws the share of the late gap that each recipe closes, the largest on top."""
    shares = {name: row["closed"][name] for name in row["late"]["validation_by_recipe"]}
    names = sorted(shares, key=lambda name: shares[name]["mean"])
    places = np.arange(len(names))
    closed, error = ([100 * shares[name][key] for name in names] for key in ("mean", "stderr"))
    inks = {"paper": INKS["self_consistent"].colour, "control": INKS["control"].colour}
    colours = [inks.get(name, "#7fb4d6") for name in names]
    patches = axes.barh(places, closed, 0.66, color=colours, zorder=2, label="closed")
    for patch, name in zip(patches, names, strict=True):
        if name in row["larger_encoder"]:
            patch.set_hatch("//")
            patch.set_edgecolor("white")
    axes.errorbar(
        closed, places, xerr=error, fmt="none", ecolor=TEXT, elinewidth=0.9, capsize=2, zorder=3
    )
    for place, share, width in zip(places, closed, error, strict=True):
        axes.annotate(
            f"{share:.0f} %", (max(share + width, 0.0), place), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=8.5,
        )  # fmt: skip
    axes.axvline(0.0, color=MUTED, linewidth=0.8)
    best = row["late"]["best"]
    axes.set_yticks(places, [name.replace("_", " ") + " *" * (name in best) for name in names])
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    low, high = np.subtract(closed, error).min() - 3, np.add(closed, error).max() + 10
    axes.set_xlim(min(0.0, low), max(100.0, high))
    axes.set_xlabel("share of the gap to q* that is closed on test examples, %")


# The cures of atlas.json: the colour, the marker and the label.
_CURES: Mapping[str, tuple[str, str, str]] = {
    "control": (INKS["control"].colour, "D", "control, α = 0"),
    "paper": (INKS["self_consistent"].colour, "^", "paper's recipe"),
    "best": ("#c75000", "o", "best recipe of equal cost"),
    "learned": ("#7a5b00", "s", "learned refinement"),
    "newton": ("#4d4d4d", "P", "two Newton steps"),
    "optimal": (INKS["optimal"].colour, "v", "refit on the test set*"),
}


def draw_atlas(gap_axes: Axes, closed_axes: Axes, rows: Sequence[Results]) -> None:
    """Draws the gap of every row, and beside it the share that each cure closes."""
    places = np.arange(len(rows))[::-1]
    for at, face in (("early", "white"), ("late", "#e08a4a")):
        means, errors = ([row[at]["gap"][key] for row in rows] for key in ("mean", "stderr"))
        gap_axes.errorbar(
            means, places, xerr=errors, fmt="o", color="#b4581a", markerfacecolor=face,
            elinewidth=0.9, capsize=2, zorder=3, label=f"{at} gap",
        )  # fmt: skip
    for place, row in zip(places, rows, strict=True):
        ends = [row[at]["gap"]["mean"] for at in ("early", "late")]
        gap_axes.plot(ends, (place, place), color="#e08a4a", linewidth=2.0, zorder=2)
        gap_axes.annotate(
            f"{ends[1]:.3g}", (max(ends), place), (9, 0), textcoords="offset points", va="center",
            fontsize=8.5,
        )  # fmt: skip
    gap_axes.set_xscale("log")
    gap_axes.xaxis.set_major_formatter("{x:g}")
    gap_axes.margins(x=0.2)  # room for the numbers
    gap_axes.set_yticks(places, [f"{row['row']} ({row['seeds']})" for row in rows])
    gap_axes.set_xlabel("gap, nats an example")
    offsets = np.linspace(0.28, -0.28, len(_CURES))
    for offset, (name, (colour, marker, label)) in zip(offsets, _CURES.items(), strict=True):
        known = [(place, row["closed"][name]) for place, row in zip(places, rows, strict=True)
                 if name in row["closed"]]  # fmt: skip
        at = [place + offset for place, _ in known]
        shares, errors = ([100 * each[key] for _, each in known] for key in ("mean", "stderr"))
        closed_axes.errorbar(
            shares, at, xerr=errors, fmt=marker, color=colour, elinewidth=0.9, label=label, zorder=3
        )
    for place in places[:-1] - 0.5:
        closed_axes.axhline(place, color=MUTED, linewidth=0.3)
    for end in (0.0, 100.0):
        closed_axes.axvline(end, color=MUTED, linewidth=0.8)
    closed_axes.tick_params(labelleft=False)
    closed_axes.set_ylim(-0.6, len(rows) - 0.4)
    closed_axes.set_xlabel("share of the gap that is closed on test examples, %")
    for axes in (gap_axes, closed_axes):
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
    handles, labels = closed_axes.get_legend_handles_labels()
    figure = closed_axes.get_figure(root=True)
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8.5)


def _draw_losses(axes: Axes, rows: Sequence[Results], places: np.ndarray) -> list[Annotation]:
    """Draws those parts that every checkpoint has; negative ones hang below zero."""
    above, below = np.zeros(len(rows)), np.zeros(len(rows))
    ends, parts = [], []
    for key, (colour, words) in LOSSES.items():
        losses = [_loss(row, key) for row in rows]
        if any(loss is None for loss in losses):
            continue
        nats = np.array([loss["nats"] for loss in losses])
        base = np.where(nats >= 0, above, below)
        axes.bar(places, nats, 0.62, bottom=base, color=colour, label=key, zorder=2)
        error = np.array([loss["stderr"] for loss in losses], float)  # NaN where it is null
        axes.errorbar(  # left of the numbers
            places - 0.22, base + nats, error, fmt="none", ecolor=TEXT, elinewidth=0.9, zorder=3
        )
        above, below = above + np.maximum(nats, 0), below + np.minimum(nats, 0)
        middle = base[-1] + nats[-1] / 2
        ends.append(end_label(axes, (places[-1] + 0.34, middle), words, TEXT))
        parts += zip(places, base, nats, strict=True)
    for place, start, value in parts:
        if abs(value) > 0.05 * (above.max() - below.min()):  # high enough for a number
            axes.text(place, start + value / 2, f"{value:.2f}", ha="center", va="center",
                      fontsize=8.5, zorder=4)  # fmt: skip
    return ends


def _draw_self_consistent(
    axes: Axes, rows: Sequence[Results], places: np.ndarray
) -> list[Annotation]:
    """Draws a dash where the self-consistent encoder ends, if every checkpoint has one."""
    encoders = [row["test"]["encoders"].get("self_consistent") for row in rows]
    if not all(encoders):
        return []
    lost = [
        row["train"]["log_prob"]["nats"] - encoder["elbo"]["nats"]
        for row, encoder in zip(rows, encoders, strict=True)
    ]
    colour = INKS["self_consistent"].colour
    axes.hlines(lost, places - 0.36, places + 0.36, color=colour, linewidth=2.2, zorder=4,
                label="self_consistent")  # fmt: skip
    words = "after self-consistent\ntraining"
    return [end_label(axes, (places[-1] + 0.34, lost[-1]), words, colour)]


def _loss(row: Results, key: str) -> Results | None:
    """One part: of the checkpoint, of its test set, or of the encoder as trained."""
    test = row["test"]
    for place in (row, test, test["encoders"]["as_trained"]):
        if key in place:
            return place[key]
    return None
