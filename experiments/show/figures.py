"""The figures: pure functions from results to a matplotlib `Figure`.

`results` is the dictionary that the main program writes as `results.json`. The paper's three
figures also take a list of such dictionaries, one per seed. Their curves are then means over the
seeds, and their bands one standard deviation across seeds. ValueError says that there is no
checkpoint, or none that all runs share.

Figures are built without pyplot, so no display is needed, and matplotlib's global state is left
as it was. matplotlib is imported at the first call. The matplotlib label of every curve is its key
in results ("train", "test", "optimal", ...), so that the drawn numbers can be read back.

Optimal inference was fitted on the test data; its label says so in every figure.

References:
  Zhang, Hayes, Barber. Generalization Gap in Amortized Inference. NeurIPS 2022.
  https://arxiv.org/abs/2205.11640
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from experiments.files import replacing
from experiments.show import Results, atlas_rows, bars, curves
from experiments.show.images import draw_mosaic, mosaic
from experiments.show.labels import error_note, finish, footnote, self_consistent_label
from experiments.show.style import LABELS, SINGLE, new_figure, style
from experiments.show.trade_off import draw_trade_off

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

__all__ = [
    "alpha", "atlas", "compression", "effects", "figure1a", "figure1b", "figure2",
    "image_grid", "ledger", "overview", "recipes", "refit_curves", "save",
]  # fmt: skip


def figure1a(results: Results | Sequence[Results]) -> Figure:
    """Draws train and test BPD, and marks the lowest of the latter (the paper's figure 1a)."""
    return _single(curves.draw_figure1a, results)


def figure1b(results: Results | Sequence[Results]) -> Figure:
    """Draws test BPD with and without optimal inference (the paper's figure 1b).

    The area between the curves is the inference generalization gap (equation 11).
    """
    return _single(curves.draw_figure1b, results)


def figure2(results: Results | Sequence[Results]) -> Figure:
    """Draws test BPD by each kind of inference (the paper's figure 2, and the control)."""
    return _single(curves.draw_figure2, results, paired=True)


def overview(results: Results | Sequence[Results]) -> Figure:
    """Draws the paper's three figures side by side; the last two share their BPD axis."""
    runs = curves.as_runs(results)
    notes = [error_note(runs)]
    if len(runs) == 1:
        notes = ["1a, 1b: " + notes[0], "2: " + error_note(runs, paired=True)]
    with _figure((12.4, 4.2), runs, *notes) as (figure, ends):
        left, middle, right = figure.subplots(1, 3)
        right.sharey(middle)
        ends += curves.draw_figure1a(left, runs)
        ends += curves.draw_figure1b(middle, runs)
        ends += curves.draw_figure2(right, runs)
        middle.set_ylabel("")
        right.set_ylabel("")
    return figure


def refit_curves(results: Results) -> Figure | None:
    """Draws test BPD over the refits, of the checkpoint of the lowest test BPD and of the last one.

    One dashed line is the encoder as trained, where both refits start; the other one is the result
    of optimal inference, whose label says that it was fitted on the test set. None if the results
    hold no curves.
    """
    recorded = [c for c in results["checkpoints"] if curves.recorded_refits(c)]
    if not recorded:
        return None
    lowest, last = min(recorded, key=lambda c: c["test"]["bpd"]), recorded[-1]
    chosen = [last] if lowest is last else [lowest, last]
    with _figure((SINGLE[0] + 4.8 * (len(chosen) - 1), SINGLE[1]), [results]) as (figure, ends):
        panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
        for axes, checkpoint in zip(panels, chosen, strict=True):
            ends += curves.draw_refit(axes, checkpoint, self_consistent_label(results))
        panels[0].set_ylabel("test " + LABELS["bpd"])
    return figure


def effects(results: Results | Sequence[Results]) -> Figure | None:
    """Draws the BPD that the refits gain on samples of the model, training and test images.

    A curve is BPD as trained minus BPD after the refit: below zero the refit has raised the BPD.
    None if the results do not hold these numbers.
    """
    runs = curves.as_runs(results)
    if not all("effects" in checkpoint for run in runs for checkpoint in run["checkpoints"]):
        return None
    with _figure((12.4, 4.0), runs, error_note(runs, paired=True)) as (figure, ends):
        panels = figure.subplots(1, 3, sharey=True)
        for axes, kind in zip(panels, ("model", "train", "test"), strict=True):
            ends += curves.draw_effects(axes, runs, kind)
        panels[0].set_ylabel("bits per dimension won by the refit")
    return figure


def ledger(results: Results) -> Figure:
    """Draws what is lost on unseen images: a stacked bar for every checkpoint of ledger.json.

    A bar is train log p(x) minus test ELBO with the encoder as trained, in nats per image. Its
    parts are the losses through the decoder, the posterior family, the encoder's capacity and the
    encoder's over-fitting, each labelled with its key ("model_gap", ...) and with an error bar of
    one standard error. A dash shows the same difference for the self-consistent encoder.
    """
    (run,) = curves.as_runs(results)
    rows = sorted(run["checkpoints"], key=lambda row: row["epoch"])
    counts = [f"{rows[-1][name]['num_images']:,} {name}" for name in ("train", "test")]
    notes = (
        f"{' and '.join(counts)} images",
        "* fitted on the test images",
        "log p(x) and the best posterior from below",
        "± 1 stderr over images",
    )
    size = max(SINGLE[0], 2.8 + 0.9 * len(rows)), 4.4
    with _figure(size, [results], *notes) as (figure, ends):
        ends += bars.draw_ledger(figure.add_subplot(), rows)
    return figure


def recipes(results: Results, name: str) -> Figure:
    """Draws a bar for each recipe of a row of atlas.json: the share of the late gap it closes.

    Those whose encoder costs more than the trained one are hatched.
    """
    row = next(row for row in results["rows"] if row["row"] == name)
    notes = [
        f"seeds: {row['seeds']}; ± 1 stderr over them, of one over test examples",
        "* chosen on validation examples",
        "hatched: costs more at test time" if row["larger_encoder"] else "",
    ]
    size = SINGLE[0] + 1.2, 1.5 + 0.32 * len(row["closed"])
    with _figure(size, [results], *notes) as (figure, _):
        axes = figure.add_subplot()
        bars.draw_recipes(axes, row)
        axes.set_title(f"{name}: closed without test examples, epoch {row['epochs'][1]:.0f}")
    return figure


def atlas(results: Results) -> Figure:
    """Draws a line for each row of atlas.json that has a gap: its size, and what closes it."""
    rows = atlas_rows.shown(results)
    if not rows:
        raise ValueError("nothing to draw: no row of plain training has a gap")
    notes = [
        "late checkpoint, mean of as many seeds as the number in brackets ± 1 stderr over "
        "them (of one seed over test examples)",
        "open circle: the gap at the early checkpoint",
        "* fitted on test examples, as the gap is",
    ]
    with _figure((9.0, 1.9 + 0.5 * len(rows)), [results], *notes) as (figure, _):
        bars.draw_atlas(*figure.subplots(1, 2, sharey=True, width_ratios=(1, 2)), rows)
    return figure


def alpha(results: Results) -> Figure:
    """Draws what a refit wins over alpha, of the rows of atlas.json that vary it."""
    rows, seeds = atlas_rows.alphas(results), {r["row"]: r["seeds"] for r in results["rows"]}
    note = "in brackets: seeds; bars: ± 1 stderr over them, of one seed over test examples"
    with _figure((SINGLE[0] * len(rows), SINGLE[1]), [results], note) as (figure, _):
        panels = figure.subplots(1, len(rows), squeeze=False)[0]
        for axes, (name, gains) in zip(panels, rows.items(), strict=True):
            curves.draw_alpha(axes, f"{name} ({seeds[name]})", gains)
    return figure


def compression(results: Results) -> Figure:
    """Draws BPD of compressed images over the time to code and decode one, of a row of bytes.json.

    There is a curve, labelled "ENCODER METHOD", for each encoder and method of refinement, which
    starts from the encoder's own posterior; each other compressor has a line.
    """
    note = f"{results['row']}, {results['images']:,} images, all overhead counted"
    with _figure(SINGLE, [{}], note) as (figure, ends):
        ends += draw_trade_off(figure.add_subplot(), results)
    return figure


def image_grid(
    images: ArrayLike,
    levels: int,
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
) -> Figure:
    """Lays images out on a grid, row by row; the highest level of a grey image is darkest.

    Args:
      images: [N, H, W] or [N, H, W, C] with C = 1 or 3, from 0 to levels - 1.
      levels: the number of grey levels; 2 for binary images.
      columns: the number of images in a row; by default the grid is about twice as wide as high.
      row_labels: one label for each row, to its left.
      column_labels: one label for each column, above it.

    Raises:
      ValueError: the images have another shape, or do not fill the labelled rows.
    """
    picture = mosaic(images, levels, columns, row_labels)
    with style():
        figure = new_figure((4.0, 4.0), layout=None)
        draw_mosaic(figure, picture, row_labels, column_labels)
    return figure


def save(figure: Figure, stem: str | os.PathLike[str], *, dpi: float = 200.0) -> tuple[Path, Path]:
    """Writes a figure as PNG and as PDF, each atomically, and gives their paths.

    The files hold no date, so the same figure gives the same bytes. `stem` is the path without its
    ending, in a directory that exists, and `dpi` is that of the PNG.
    """
    stem = Path(stem)
    png, pdf = (stem.with_name(stem.name + ending) for ending in (".png", ".pdf"))
    with style():
        with replacing(png) as temporary:
            figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})
        with replacing(pdf) as temporary:
            metadata = {"CreationDate": None, "Creator": None, "Producer": None}
            figure.savefig(temporary, format="pdf", metadata=metadata)
    return png, pdf


def _single(
    draw: Callable[[Axes, list[Results]], list[Annotation]],
    results: Results | Sequence[Results],
    paired: bool = False,
) -> Figure:
    """A figure of one panel."""
    runs = curves.as_runs(results)
    with _figure(SINGLE, runs, error_note(runs, paired)) as (figure, ends):
        ends += draw(figure.add_subplot(), runs)
    return figure


@contextlib.contextmanager
def _figure(
    size: tuple[float, float], runs: Sequence[Results], *notes: str
) -> Iterator[tuple[Figure, list[Annotation]]]:
    """A figure to draw into, and a list for the labels at the ends of its curves."""
    with style():
        figure, ends = new_figure(size), []
        yield figure, ends
        finish(figure, ends, footnote(runs, *notes))
