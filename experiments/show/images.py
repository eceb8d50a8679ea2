"""Images on a grid, with labels beside the rows and above the columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from experiments.show.style import LABEL_SIZE

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

Labels = Sequence[str] | None
_INCH = 0.01  # of a pixel of the mosaic: two pixels of the PNG, so that edges are sharp
_EDGE = 0.08  # inches
_GUTTER = 4  # pixels of the mosaic


class Mosaic(NamedTuple):
    """All images, enlarged, as one picture with gutters."""

    pixels: np.ndarray  # [H, W] or [H, W, 3], from 0 to 1
    rows: list[float]  # the centre of each, in pixels from the top
    columns: list[float]  # the centre of each, in pixels from the left


def mosaic(images: ArrayLike, levels: int, columns: int | None, row_labels: Labels) -> Mosaic:
    """Lays images out; see `experiments.show.figures.image_grid`."""
    images = np.asarray(images)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.shape[3:] not in ((), (3,)) or images.ndim < 3 or not images.size:
        raise ValueError(f"images of shape [N, H, W] or [N, H, W, C] expected, got {images.shape}")
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    columns = columns or _num_columns(len(images))
    rows = -(-len(images) // columns)
    if row_labels is not None and len(images) != columns * len(row_labels):
        raise ValueError(f"{len(images)} images do not fill {len(row_labels)} rows of {columns}")
    enlarge = max(1, round(60 / max(images.shape[1:3])))
    cells = images.repeat(enlarge, axis=1).repeat(enlarge, axis=2) / (levels - 1)
    high, wide = (size + _GUTTER for size in cells.shape[1:3])  # from one to the next
    paper, line = (1.0, 0.85) if cells.ndim == 4 else (0.0, 0.15)
    shape = (rows * high + _GUTTER, columns * wide + _GUTTER)
    pixels = np.full(shape + cells.shape[3:], paper)
    for i, cell in enumerate(cells):
        top, left = i // columns * high, i % columns * wide
        pixels[top : top + high + _GUTTER, left : left + wide + _GUTTER] = line
        pixels[top + _GUTTER : top + high, left + _GUTTER : left + wide] = cell
    centres = [
        [i * step + (step + _GUTTER) / 2 for i in range(count)]
        for count, step in ((rows, high), (columns, wide))
    ]
    return Mosaic(np.clip(pixels, 0.0, 1.0), *centres)


def _num_columns(count: int) -> int:
    """About twice as many columns as rows, such that all rows are full if possible."""
    aim = np.sqrt(2 * count)
    full = [c for c in range(int(aim / 2), 2 * int(aim) + 1) if c and count % c == 0]
    return min(full, key=lambda c: abs(c - aim)) if full else int(np.ceil(aim))


def draw_mosaic(figure: Figure, picture: Mosaic, row_labels: Labels, column_labels: Labels) -> None:
    """Draws a mosaic and its labels, and fits the size of the figure to them."""
    beside, (left, _) = _write(figure, row_labels, ha="right", va="center")
    above, (_, top) = _write(figure, column_labels, ha="center", va="bottom", linespacing=1.2)
    left = left + 0.2 if beside else _EDGE
    top = top + 2 * _EDGE if above else _EDGE
    high, wide = picture.pixels.shape[0] * _INCH, picture.pixels.shape[1] * _INCH
    width, height = left + wide + _EDGE, high + top + _EDGE
    figure.set_size_inches(width, height)
    axes = figure.add_axes(
        (left / width, _EDGE / height, wide / width, high / height), frame_on=False
    )
    axes.imshow(picture.pixels, cmap="gray_r", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_axis_off()
    for text, row in zip(beside, picture.rows, strict=False):
        text.set_position(((left - 0.12) / width, 1 - (top + row * _INCH) / height))
    for text, column in zip(above, picture.columns, strict=False):
        text.set_position(((left + column * _INCH) / width, 1 - (top - _EDGE / 2) / height))


def _write(
    figure: Figure, labels: Labels, **place: str | float
) -> tuple[list[Text], tuple[float, float]]:
    """Writes labels, to be placed later, and gives the largest width and height in inches."""
    texts = [figure.text(0, 0, label, fontsize=LABEL_SIZE, **place) for label in labels or ()]
    sizes = [text.get_window_extent().size for text in texts] or [(0.0, 0.0)]
    return texts, tuple(np.ceil(50 * np.max(sizes, axis=0) / figure.dpi) / 50)
