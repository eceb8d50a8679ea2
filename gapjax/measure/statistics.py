"""Means and shares over a set of images, with their standard errors."""

import math

import numpy as np

_Z = 1.96  # 95 % of a normal distribution lie within so many standard deviations


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


def share_of_positive(values: np.ndarray) -> tuple[float, float, tuple[float, float]]:
    """The share f of positive values of [N], zeros counted half; its error and a 95 % interval.

    z^2 / 2 positive and as many negative values are added, z = 1.96, so that there is a width where
    all values agree. With n = N + z^2, f' the share of them and t that of zeros,

        e^2 = (f' (1 - f') - t / 4) / n,   interval f' +- z e,   error^2 = e^2 + (f' - f)^2

    which is Agresti and Coull's interval (1998) where t is 0. NaN but for f where N is 1.
    """
    share, zeros = float((values > 0).mean() + (values == 0).mean() / 2), (values == 0).sum()
    if len(values) < 2:
        return share, math.nan, (math.nan, math.nan)
    number = len(values) + _Z**2
    centre = (share * len(values) + _Z**2 / 2) / number
    width = math.sqrt((centre * (1 - centre) - zeros / number / 4) / number)
    interval = (max(0.0, centre - _Z * width), min(1.0, centre + _Z * width))
    return share, math.hypot(width, centre - share), interval


def sign_test(values: np.ndarray) -> float:
    """Two-sided exact p-value of "as many are positive as negative" (binomial, without zeros)."""
    smaller, larger = sorted((int((values > 0).sum()), int((values < 0).sum())))
    k = np.arange(1, smaller + 1)
    log_ways = np.append(0.0, np.cumsum(np.log((smaller + larger + 1 - k) / k)))
    return min(1.0, 2 * float(np.exp(log_ways - (smaller + larger) * math.log(2)).sum()))
