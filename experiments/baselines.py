"""What general-purpose compressors make of images: PNG, WebP, zstd and xz, bytes of one file each.

PNG and WebP get all images as one picture, a grid; zstd and xz get the pixels in order. Binary
pixels are packed, 8 to a byte, or 1-bit PNG. Every compressor runs at its highest setting.
"""

import importlib
import io
import lzma
import math
from collections.abc import Callable

import numpy as np


def sizes(images: np.ndarray, levels: int) -> dict[str, int | None]:
    """Bytes of uint8 [N, *event] by each compressor; None where it is not installed or cannot."""
    packed = np.packbits(images) if levels == 2 else images
    content = packed.tobytes()
    compressors: dict[str, Callable[[], int]] = {
        "packed": lambda: len(content),
        "png": lambda: _picture(images, levels, "PNG", optimize=True),
        "webp": lambda: _picture(images, levels, "WEBP", lossless=True, quality=100, method=6),
        "zstd": lambda: len(importlib.import_module("zstandard").compress(content, 22)),
        "xz": lambda: len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)),
    }
    found: dict[str, int | None] = {}
    for name, measure in compressors.items():
        try:
            found[name] = measure()
        except (ImportError, ValueError, OSError):
            found[name] = None
    return found


def _picture(images: np.ndarray, levels: int, form: str, **options: object) -> int:
    """Bytes of all images as one picture."""
    image_module = importlib.import_module("PIL.Image")
    picture = grid(images)
    if levels == 2:
        picture = picture * np.uint8(255)
    opened = image_module.fromarray(picture)
    if levels == 2 and form == "PNG":
        opened = opened.convert("1")
    file = io.BytesIO()
    opened.save(file, form, **options)
    return len(file.getvalue())


def grid(images: np.ndarray) -> np.ndarray:
    """Images [N, H, W] or [N, H, W, 3] as one picture about as wide as high; blank at the end."""
    if images.ndim != 3 and images.shape[3:] != (3,):
        raise ValueError(f"images have shape {images.shape}; a picture needs [N, H, W] or RGB")
    count, height, width, *channels = images.shape
    columns = max(1, math.ceil(math.sqrt(count)))
    rows = -(-count // columns)
    filled = np.zeros((rows * columns, height, width, *channels), images.dtype)
    filled[:count] = images
    picture = filled.reshape(rows, columns, height, width, *channels).swapaxes(1, 2)
    return picture.reshape(rows * height, columns * width, *channels)
