"""What over-fitting of the encoder costs, and what a refit won of it (eq. 11)."""

import warnings
from typing import NamedTuple

from gapjax.measure.statistics import ratio_of_means
from gapjax.results.estimates import Difference, Evaluation, paired_difference


class Gaps(NamedTuple):
    """The gaps of one checkpoint; every difference is paired, over the same test images.

    Attributes:
      inference_gap: test minus optimal (eq. 11 with the refit on the test set), BPD.
      gain: test minus self-consistent, BPD; positive where self-consistent training helped.
      gain_over_control: control minus self-consistent, BPD: what the model's samples did.
      gap_closed: gain / inference_gap, a share.
      gap_closed_stderr: its standard error, by the delta method; NaN of one image.
      converged: whether the optimal inference had converged; None where that is not known. If it
        is False, the gap is larger than `inference_gap` and the share smaller than `gap_closed`.
    """

    inference_gap: Difference
    gain: Difference
    gain_over_control: Difference
    gap_closed: float
    gap_closed_stderr: float
    converged: bool | None = None


def inference_gaps(
    test: Evaluation,
    optimal: Evaluation,
    self_consistent: Evaluation,
    control: Evaluation,
    *,
    converged: bool | None = None,
) -> Gaps:
    """Compares four encoders of one decoder on the same test images with common noise.

    Args:
      test: the encoder as trained.
      optimal: after optimal inference (fitted on these images).
      self_consistent: after self-consistent training.
      control: after the same refit with alpha = 0.
      converged: `Refit.converged` of the optimal inference. If it is False, a `UserWarning` says
        that the gap is larger than measured.

    Returns:
      `Gaps`.
    """
    if converged is False:
        warnings.warn(
            "the optimal inference has not converged: the inference gap is larger than measured, "
            "and the share that is closed is smaller; raise num_epochs of optimal_inference",
            stacklevel=2,
        )
    inference_gap = paired_difference(test, optimal)
    gain = paired_difference(test, self_consistent)
    ratio, ratio_stderr = ratio_of_means(
        test.per_image - self_consistent.per_image, test.per_image - optimal.per_image
    )
    return Gaps(
        inference_gap=inference_gap,
        gain=gain,
        gain_over_control=paired_difference(control, self_consistent),
        gap_closed=ratio,
        gap_closed_stderr=ratio_stderr,
        converged=converged,
    )
