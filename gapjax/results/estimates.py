"""From nats per image to the BPD of a set, paired differences of encoders, and gaps (eq. 11)."""

import warnings
from typing import NamedTuple

import jax
import numpy as np

from gapjax import parallel
from gapjax.measure.bounds import Bound, Images, check_finite, per_image_bounds
from gapjax.measure.statistics import effective_number, mean_and_stderr, ratio_of_means
from gapjax.model.bounds import bits_per_dim, elbo
from gapjax.vae import VAE, VAEParams


class Evaluation(NamedTuple):
    """The BPD of a set.

    Attributes:
      bpd: mean over the images, bits per dimension, lower is better.
      stderr: standard error of that mean over images (sample standard deviation over root N); NaN
        where N is 1.
      per_image: [N] float32, BPD of every image in the order given.
    """

    bpd: float
    stderr: float
    per_image: np.ndarray


class Difference(NamedTuple):
    """A paired difference over N images, with statistics that outliers do not move.

    A few images on which two encoders differ vastly can dominate the mean and its standard
    error. The median and the fraction of improved images show whether they do.

    Attributes:
      bpd: mean over the images of first minus second, bits per dimension.
      stderr: standard error of that mean; NaN where N is 1.
      median: over the images, bits per dimension.
      fraction_improved: fraction of the images where `second` has the lower BPD; ties count half.
      fraction_improved_stderr: its standard error, root of f (1 - f) / N; NaN where N is 1.
      num_effective: effective number of images behind `stderr`, (sum d^2)^2 / sum d^4 with d the
        deviations from the mean. It is N/3 for normal differences, 1 if all of the variance comes
        from one image, and N if there is none.
    """

    bpd: float
    stderr: float
    median: float
    fraction_improved: float
    fraction_improved_stderr: float
    num_effective: float


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


def evaluate(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    images: Images,
    *,
    num_samples: int = 1,
    batch_size: int = 500,
    bound: Bound = elbo,
    devices: parallel.Devices | None = None,
) -> Evaluation:
    """BPD of a set: exact over the images, averaged over S posterior samples for each.

    The noise of image i depends on `rng_key` and i alone: not on the batch size, and not on the
    parameters, so that two encoders evaluated with one key are compared on common noise.

    Args:
      vae: the model.
      params: its parameters.
      rng_key: a key; it is folded with each image's index.
      images: [N, *event], any N: the last batch is padded and the padding dropped.
      num_samples: S.
      batch_size: images evaluated at once; bounds memory, changes nothing else.
      bound: `elbo`, `importance_weighted_bound`, or any function of that form, in nats.
      devices: among which the images are divided; all by default.

    Returns:
      An `Evaluation`.

    Raises:
      ValueError: no images, images outside of the support of the likelihood, a distribution that
        is not of one whole example, or a number of samples or batch size that is not positive.
      TypeError: an argument of another type, or one that is traced by `jax.jit`.
      FloatingPointError: the bound of an image is NaN or infinite; the message says why.
    """
    nats = per_image_bounds(
        vae, params, rng_key, images, num_samples=num_samples, batch_size=batch_size, bound=bound,
        devices=devices,
    )  # fmt: skip
    check_finite(vae, params, rng_key, images, np.asarray(nats), num_samples)
    return summarize(np.asarray(bits_per_dim(nats, np.shape(images)[1:])))


def summarize(per_image: np.ndarray) -> Evaluation:
    """The `Evaluation` of BPDs per image [N]; of one image the standard error is NaN."""
    return Evaluation(*mean_and_stderr(per_image), per_image)


def paired_difference(first: Evaluation, second: Evaluation) -> Difference:
    """First minus second over the same images: its mean, with the standard error, and its spread.

    Two encoders' BPDs go up and down together from image to image; the standard error of their
    paired difference is far smaller than that of either.

    Args:
      first: an evaluation of N images.
      second: an evaluation of the same N images in the same order, with the same key.

    Returns:
      A `Difference`, positive where `second` is better.

    Raises:
      ValueError: the two are of different sets.
    """
    if first.per_image.shape != second.per_image.shape:
        raise ValueError(
            f"evaluations of {first.per_image.shape[0]} and {second.per_image.shape[0]} images "
            "cannot be paired"
        )
    difference = first.per_image.astype(np.float64) - second.per_image.astype(np.float64)
    improved = float((difference > 0).mean() + (difference == 0).mean() / 2)
    squares = (difference - difference.mean()) ** 2
    error = float(np.sqrt(improved * (1 - improved) / len(squares)))
    return Difference(
        *mean_and_stderr(difference), float(np.median(difference)), improved,
        error if len(squares) > 1 else float("nan"), effective_number(squares),
    )  # fmt: skip


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
    """
    if converged is False:
        warnings.warn(
            "the optimal inference has not converged: the inference gap is larger than measured, "
            "and the share that is closed is smaller; raise num_epochs of optimal_inference",
            stacklevel=2,
        )
    differences = (
        paired_difference(test, optimal),
        paired_difference(test, self_consistent),
        paired_difference(control, self_consistent),
    )
    share = ratio_of_means(
        test.per_image - self_consistent.per_image, test.per_image - optimal.per_image
    )
    return Gaps(*differences, *share, converged)
