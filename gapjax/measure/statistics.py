"""Means over a set of images, with their standard errors."""

import numpy as np


def effective_number(weights: np.ndarray) -> float:
    """How many of N weights their sum rests on: N where they are equal, 1 where one has it all.

    (sum w)^2 / sum w^2   (Kish, Survey Sampling, 1965); N where all are zero
    """
    weights = np.asarray(weights, np.float64)
    squares = (weights**2).sum()
    return float(weights.sum() ** 2 / squares if squares > 0 else len(weights))


def mean_and_stderr(values: np.ndarray) -> tuple[float, float]:
    """Mean of values [N] and its standard error (NaN where N is 1), in float64."""
    values = np.asarray(values, np.float64)
    stderr = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(stderr)


def ratio_of_means(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, float]:
    """The ratio r = mean(n) / mean(d) of paired values [N], and its first-order standard error.

    The latter is std(n - r d) / (|mean d| root N). Both are NaN where mean d is 0.
    """
    numerator, denominator = (np.asarray(v, np.float64) for v in (numerator, denominator))
    mean = denominator.mean()
    if mean == 0:
        return float("nan"), float("nan")
    ratio = numerator.mean() / mean
    stderr = mean_and_stderr(numerator - ratio * denominator)[1] / abs(mean)
    return float(ratio), float(stderr)
