"""Grey levels to binary pixels: the binarization methods and the checks of their arguments."""

import numpy as np

from gapjax.data.dataset import DatasetError, Stored, as_integer, one_line

BINARIZATIONS: tuple[str, ...] = ("threshold", "stochastic", "none")

_CHUNK = 8192  # images binarized at a time, to bound the memory that the random numbers take


def check_binarization(binarization: str | None, threshold: float, binarization_seed: int) -> None:
    """Checks the arguments of `load_dataset` that concern binarization.

    Raises:
      DatasetError: if one of them cannot be used.
    """
    if binarization is not None and binarization not in BINARIZATIONS:
        raise DatasetError(
            f"binarization={one_line(repr(binarization))} is unknown; "
            f"give one of {', '.join(BINARIZATIONS)}"
        )
    try:
        usable = 0.0 < float(threshold) <= 1.0  # False for NaN
    except (TypeError, ValueError):
        usable = False
    if not usable:
        raise DatasetError(
            f"threshold={one_line(repr(threshold))} is not usable; give a number above 0 and at "
            "most 1"
        )
    seed = as_integer(binarization_seed)
    if seed is None or seed < 0:
        raise DatasetError(
            f"binarization_seed={one_line(repr(binarization_seed))} is not usable; "
            "give a non-negative integer"
        )


def binarize(
    stored: Stored, method: str, *, threshold: float, seed: int
) -> tuple[np.ndarray, np.ndarray, int, str]:
    """Applies a binarization method to both parts.

    Args:
      stored: The data as stored.
      method: One of `BINARIZATIONS`.
      threshold: For "threshold": pixels with pixel / (levels - 1) >= threshold become 1.
      seed: For "stochastic"; the parts are drawn independently of each other.

    Returns:
      The training images, the test images, their number of levels, and a description of the method
      for the provenance.

    Raises:
      DatasetError: if the data are binary already.
    """
    train, test, levels = stored.train, stored.test, stored.levels
    if method == "none":
        return train, test, levels, stored.binarization
    if levels == 2:
        raise DatasetError(
            f"binarization={method!r} does not fit {stored.name!r}, which is binary already; "
            "use binarization='none' or leave it out"
        )
    if method == "threshold":
        train, test = (_threshold(x, levels, threshold) for x in (train, test))
        return train, test, 2, f"threshold {float(threshold):g}"
    train, test = (
        _stochastic(x, levels, np.random.default_rng([seed, part]))
        for part, x in enumerate((train, test))
    )
    return train, test, 2, f"stochastic, seed {int(seed)}"


def _threshold(x: np.ndarray, levels: int, threshold: float) -> np.ndarray:
    lowest = np.argmax(np.arange(levels) / (levels - 1) >= threshold)
    return (x >= lowest).astype(np.uint8)


def _stochastic(x: np.ndarray, levels: int, generator: np.random.Generator) -> np.ndarray:
    """Draws Bernoulli(x / (levels - 1)) for every pixel; 0 and levels - 1 are deterministic."""
    probability = np.arange(levels) / (levels - 1)
    result = np.empty(x.shape, np.uint8)
    for start in range(0, len(x), _CHUNK):
        part = x[start : start + _CHUNK]
        result[start : start + _CHUNK] = generator.random(part.shape) < probability[part]
    return result
