"""Gaps: numbers worked out by hand, and errors that cover what they should."""

import numpy as np
import pytest

from gapjax import inference_gaps
from gapjax.evaluation import summarize


def _evaluation(values):
    return summarize(np.asarray(values, np.float32))


def test_gaps_by_hand():
    gaps = inference_gaps(
        test=_evaluation([1.0, 2.0, 3.0, 4.0]),
        optimal=_evaluation([0.5, 1.0, 2.5, 3.0]),  # differences 0.5 1 0.5 1
        self_consistent=_evaluation([0.75, 2.0, 2.75, 3.75]),  # differences 0.25 0 0.25 0.25
        control=_evaluation([1.0, 2.25, 2.75, 4.0]),  # minus self-consistent 0.25 0.25 0 0.25
    )
    assert gaps.inference_gap.bpd == pytest.approx(0.75)
    assert gaps.gain.bpd == pytest.approx(0.1875)
    assert gaps.gain_over_control.bpd == pytest.approx(0.1875)
    assert gaps.gap_closed == pytest.approx(0.25)
    assert gaps.inference_gap.stderr == pytest.approx(np.std([0.5, 1, 0.5, 1], ddof=1) / 2)
    assert gaps.gain.stderr == pytest.approx(0.125 / 2)
    assert gaps.gain_over_control.stderr == pytest.approx(0.125 / 2)
    # n - r d is 0.125 -0.25 0.125 0; its standard deviation over |mean d| root N.
    residual = np.std([0.125, -0.25, 0.125, 0.0], ddof=1)
    assert gaps.gap_closed_stderr == pytest.approx(residual / (0.75 * 2))


def test_signs_follow_who_is_better():
    base, better, best = _evaluation([2.0, 3.0]), _evaluation([1.5, 2.5]), _evaluation([1.0, 2.0])
    gaps = inference_gaps(test=base, optimal=best, self_consistent=better, control=base)
    assert gaps.inference_gap.bpd == 1.0 and gaps.gain.bpd == 0.5
    assert gaps.gain_over_control.bpd == 0.5 and gaps.gap_closed == 0.5
    worse = inference_gaps(test=better, optimal=best, self_consistent=base, control=better)
    assert worse.gain.bpd == -0.5 and worse.gain_over_control.bpd == -0.5
    assert worse.gap_closed == -1.0


def test_without_a_gap_the_share_is_not_a_number():
    same = _evaluation([1.0, 2.0])
    gaps = inference_gaps(same, same, _evaluation([0.5, 1.0]), same)
    assert np.isnan(gaps.gap_closed) and np.isnan(gaps.gap_closed_stderr)
    assert gaps.inference_gap.bpd == 0.0


def test_sets_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        inference_gaps(*(_evaluation(np.ones(n)) for n in (3, 3, 2, 3)))


def test_the_standard_errors_cover_the_truth():
    """Over simulated test sets, 1.96 standard errors hold the true value about 19 in 20 times."""
    rng = np.random.default_rng(0)
    num_sets, num_images, true_gap, true_share = 600, 250, 0.05, 0.3
    hits = np.zeros(3)
    for _ in range(num_sets):
        image = rng.normal(0.4, 0.1, num_images)  # common to the encoders
        gap = true_gap + rng.normal(0, 0.08, num_images)
        gain = true_share * gap + rng.normal(0, 0.05, num_images)
        gaps = inference_gaps(
            _evaluation(image), _evaluation(image - gap), _evaluation(image - gain),
            _evaluation(image),
        )  # fmt: skip
        errors = (
            (gaps.gap_closed - true_share) / gaps.gap_closed_stderr,
            (gaps.inference_gap.bpd - true_gap) / gaps.inference_gap.stderr,
            (gaps.gain.bpd - true_share * true_gap) / gaps.gain.stderr,
        )
        hits += np.abs(errors) < 1.96
    assert np.all(hits / num_sets > 0.92) and np.all(hits / num_sets < 0.98)
