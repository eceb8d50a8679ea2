"""BPD of a set with its standard error, and paired differences between two encoders."""

from typing import NamedTuple

import jax
import numpy as np

from gapjax import parallel
from gapjax.measure.bounds import Bound, Images, check_finite, per_image_bounds
from gapjax.measure.statistics import effective_number, mean_and_stderr
from gapjax.model.bounds import bits_per_dim, elbo
from gapjax.vae import VAE, VAEParams


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

    @property
    def better(self) -> float:
        """The former name of `fraction_improved`, and its key in results.json."""
        return self.fraction_improved

    @property
    def better_stderr(self) -> float:
        """The former name of `fraction_improved_stderr`, and its key in results.json."""
        return self.fraction_improved_stderr


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
    bpd, stderr = mean_and_stderr(per_image)
    return Evaluation(bpd, stderr, per_image)


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
    improved_stderr = np.sqrt(improved * (1 - improved) / len(squares))
    bpd, stderr = mean_and_stderr(difference)
    return Difference(
        bpd=bpd,
        stderr=stderr,
        median=float(np.median(difference)),
        fraction_improved=improved,
        fraction_improved_stderr=float(improved_stderr) if len(squares) > 1 else float("nan"),
        num_effective=effective_number(squares),
    )
