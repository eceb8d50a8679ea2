"""From nats per image to the BPD of a set, paired differences of encoders, and gaps (eq. 11)."""

import math
import warnings
from typing import NamedTuple

import jax
import numpy as np

from gapjax import parallel
from gapjax.examples import event_shape, shape_of_one
from gapjax.measure import statistics
from gapjax.measure.bounds import Bound, Images, check_finite, per_image_bounds
from gapjax.model.bounds import bits_per_dim, elbo
from gapjax.vae import VAE, VAEParams

MIN_SAMPLES = 100  # of the posterior, for shares and medians of images; see `Difference`


class Evaluation(NamedTuple):
    """The BPD of a set.

    Attributes:
      bpd: mean over the images, bits per dimension, lower is better.
      stderr: standard error of that mean over images; NaN where N is 1.
      per_image: [N] float32, BPD of every image in the order given.
      num_samples: posterior samples of each image; infinite where there is no such noise.
      with_half: [N], the same with half of the samples; None of fewer than `MIN_SAMPLES`.
    """

    bpd: float
    stderr: float
    per_image: np.ndarray
    num_samples: float = math.nan
    with_half: np.ndarray | None = None


class Difference(NamedTuple):
    """A paired difference over N images, with statistics that outliers do not move.

    A few images on which two encoders differ vastly can dominate the mean and its standard
    error. The median and the fraction of improved images show whether they do. Unlike the mean
    these are biased by the noise of each image's own bound, so they are NaN where an evaluation has
    fewer than `MIN_SAMPLES` posterior samples.

    Attributes:
      bpd: mean over the images of first minus second, bits per dimension.
      stderr: standard error of that mean; NaN where N is 1.
      median: over the images, bits per dimension.
      fraction_improved: fraction of the images where `second` has the lower BPD; ties count half.
      fraction_improved_stderr: its standard error; NaN where N is 1.
      num_effective: effective number of images behind `stderr`, (sum d^2)^2 / sum d^4 with d the
        deviations from the mean: N/3 for normal ones, 1 if one image has all of the variance.
      fraction_improved_interval: 95 %, also where all images agree; see `share_of_positive`.
      fraction_improved_bias, median_bias: what is left of either's bias, estimated as the value
        with half of the samples minus the value: too small where the noise exceeds the differences.
      sign_test: p-value of "as many images improve as get worse", see `statistics.sign_test`.
      num_samples: posterior samples of each image, of the evaluation with fewer.
      num_images: N.
    """

    bpd: float
    stderr: float
    median: float
    fraction_improved: float
    fraction_improved_stderr: float
    num_effective: float
    fraction_improved_interval: tuple[float, float]
    fraction_improved_bias: float
    median_bias: float
    sign_test: float
    num_samples: float
    num_images: int


class Gaps(NamedTuple):
    """The gaps of one checkpoint; every difference is paired, over the same test images.

    Attributes:
      inference_gap: test minus optimal (eq. 11 with the refit on the test set), BPD.
      gain: test minus self-consistent, BPD; positive where self-consistent training helped.
      gain_over_control: control minus self-consistent, BPD: what the model's samples did.
      gap_closed: gain / inference_gap, a share.
      gap_closed_stderr: its standard error, by the delta method; NaN of one image.
      converged: as given to `inference_gaps`.
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
      rng_key: a key; it is folded with each image's index.
      images: [N, *event], any N.
      num_samples: S. From `MIN_SAMPLES` on, images are evaluated with half of them as well, which
        says how biased shares and medians are.
      batch_size: images evaluated at once; bounds memory, changes nothing else.
      bound: `elbo`, `importance_weighted_bound`, or any function of that form, in nats.
      devices: among which the images are divided; all by default.

    Raises:
      ValueError: no images, images outside of the support of the likelihood, a distribution that
        is not of one whole example, or a size that is not positive.
      TypeError: an argument of another type, or one that is traced by `jax.jit`.
      FloatingPointError: the bound of an image is NaN or infinite; the message says why.
    """

    def bpds(samples: int) -> np.ndarray:
        nats = per_image_bounds(
            vae, params, rng_key, images, num_samples=samples, batch_size=batch_size, bound=bound,
            devices=devices,
        )  # fmt: skip
        check_finite(vae, params, rng_key, images, np.asarray(nats), samples)
        return np.asarray(bits_per_dim(nats, event_shape(shape_of_one(images))))

    whole, half = bpds(num_samples), num_samples // 2
    return summarize(whole, num_samples, bpds(half) if num_samples >= MIN_SAMPLES else None)


def summarize(
    per_image: np.ndarray, num_samples: float = math.inf, with_half: np.ndarray | None = None
) -> Evaluation:
    """The `Evaluation` of BPDs per image [N], by default of exact ones; see there."""
    with_half = per_image if num_samples == math.inf else with_half
    return Evaluation(*statistics.mean_and_stderr(per_image), per_image, num_samples, with_half)


def paired_difference(first: Evaluation, second: Evaluation) -> Difference:
    """First minus second of the same N images in the same order, evaluated with the same key.

    Two encoders' BPDs go up and down together from image to image; the standard error of their
    paired difference is far smaller than that of either. It is positive where `second` is better.
    """
    if len(first.per_image) != len(second.per_image):
        sizes = f"{len(first.per_image)} and {len(second.per_image)}"
        raise ValueError(f"evaluations of {sizes} images cannot be paired")
    difference = np.subtract(first.per_image, second.per_image, dtype=np.float64)
    effective = statistics.effective_number((difference - difference.mean()) ** 2)
    median = fraction = error = fraction_bias = median_bias = p_value = math.nan
    interval = (math.nan, math.nan)
    if first.with_half is not None and second.with_half is not None:
        with_half = np.subtract(first.with_half, second.with_half, dtype=np.float64)
        median, p_value = float(np.median(difference)), statistics.sign_test(difference)
        fraction, error, interval = statistics.share_of_positive(difference)
        fraction_bias = statistics.share_of_positive(with_half)[0] - fraction
        median_bias = float(np.median(with_half)) - median
    return Difference(
        *statistics.mean_and_stderr(difference), median, fraction, error, effective, interval,
        fraction_bias, median_bias, p_value, min(first.num_samples, second.num_samples),
        len(difference),
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
      converged: `Refit.converged` of the optimal inference; None where that is not known. If it is
        False, a `UserWarning` says that the gap is larger than measured and the share smaller.
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
    share = statistics.ratio_of_means(
        test.per_image - self_consistent.per_image, test.per_image - optimal.per_image
    )
    return Gaps(*differences, *share, converged)
