"""Exact evaluation of a set of images: every image once, with standard errors."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gapjax import devices as hardware
from gapjax.vae import VAE, VAEParams, bits_per_dim, elbo

Bound = Callable[[VAE, VAEParams, jax.Array, jax.Array, int], jax.Array]
_GRADIENTS = 10  # held at once, each as large as the encoder


class Difference(NamedTuple):
    """A paired difference over N images, and whether its mean speaks for most of them.

    A handful of images on which two encoders differ vastly can decide a mean, and a standard
    error with it: so it is on grey MNIST. The median and the share of images do not heed them.

    Attributes:
      bpd: mean over the images of first minus second, bits per dimension.
      stderr: standard error of that mean.
      median: over the images, bits per dimension.
      better: share of the images where `second` has the lower BPD; equal ones count half.
      better_stderr: its standard error, root of better (1 - better) / N.
      num_effective: images that `stderr` rests on, (sum d^2)^2 / sum d^4 with d the deviations
        from the mean: N/3 where differences are normal, 1 where all come from one image; N where
        none deviates.
    """

    bpd: float
    stderr: float
    median: float
    better: float
    better_stderr: float
    num_effective: float


class Evaluation(NamedTuple):
    """The BPD of a set.

    Attributes:
      bpd: mean over the images, bits per dimension, lower is better.
      stderr: standard error of that mean over images (sample standard deviation over root N).
      per_image: [N] float32, BPD of every image in the order given.
    """

    bpd: float
    stderr: float
    per_image: np.ndarray


def evaluate(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    images: ArrayLike,
    *,
    num_samples: int = 1,
    batch_size: int = 500,
    bound: Bound = elbo,
    devices: hardware.Devices | None = None,
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
      ValueError: no images, or a non-positive number of samples or batch size.
    """
    nats = _of_each(bound, vae, params, rng_key, images, num_samples, batch_size, devices)
    return summarize(np.asarray(bits_per_dim(nats, np.shape(images)[1:])))


def encoder_gradient_norms(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    images: ArrayLike,
    *,
    num_samples: int = 1,
    devices: hardware.Devices | None = None,
) -> np.ndarray:
    """How hard each image pulls at the encoder: the norm of its own gradient.

        g(x) = || grad_phi ELBO(x, theta, phi) ||

    What a step of a refit sees is the mean of such gradients over a batch; where a few images
    have far larger ones they rule it, and `effective_number` of the squares says how few.

    Args:
      vae: the model.
      params: its parameters.
      rng_key: a key; the noise of each image is that of `evaluate`.
      images: [N, *event].
      num_samples: S, posterior samples for each; a refit takes one.
      devices: among which the images are divided; all by default.

    Returns:
      [N] float32, nats by unit of the encoder's parameters.

    Raises:
      ValueError: no images, or a non-positive number of samples.
    """
    norm = _encoder_gradient_norm
    norms = _of_each(norm, vae, params, rng_key, images, num_samples, _GRADIENTS, devices)
    return np.asarray(norms)


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
    better = float((difference > 0).mean() + (difference == 0).mean() / 2)
    squares = (difference - difference.mean()) ** 2
    return Difference(
        *mean_and_stderr(difference),
        median=float(np.median(difference)),
        better=better,
        better_stderr=float(np.sqrt(better * (1 - better) / len(difference))),
        num_effective=effective_number(squares),
    )


def effective_number(weights: np.ndarray) -> float:
    """How many of N weights their sum rests on: N where they are equal, 1 where one has it all.

        (sum w)^2 / sum w^2

    Args:
      weights: [N], none negative.

    Returns:
      Between 1 and N; N where all are zero.

    References:
      Kish, Survey Sampling, 1965.
    """
    weights = np.asarray(weights, np.float64)
    squares = (weights**2).sum()
    return float(weights.sum() ** 2 / squares if squares > 0 else len(weights))


def mean_and_stderr(values: np.ndarray) -> tuple[float, float]:
    """Mean of values [N] and its standard error (NaN where N is 1), in float64."""
    values = np.asarray(values, np.float64)
    stderr = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(stderr)


def bounds(
    shard: hardware.Shard, donated: None, params: VAEParams, rng_key: jax.Array, images: jax.Array,
    *, vae: VAE, num_samples: int, batch_size: int, bound: Bound,
) -> jax.Array:  # fmt: skip
    """The bound of every image [N], in nats; each device computes its share of every batch."""
    del donated
    num_images = images.shape[0]

    def one(index: jax.Array) -> jax.Array:
        image = images[jnp.minimum(index, num_images - 1)]
        return bound(vae, params, jax.random.fold_in(rng_key, index), image, num_samples)

    share = -(-batch_size // shard.count)
    num_batches = -(-num_images // (share * shard.count))
    first = shard.index * num_batches * share
    indices = (first + jnp.arange(num_batches * share)).reshape(num_batches, share)
    nats = jax.lax.map(jax.vmap(one), indices).reshape(-1)
    return shard.concatenate(nats)[:num_images]


def _encoder_gradient_norm(
    vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array, num_samples: int
) -> jax.Array:
    """See `encoder_gradient_norms`; of one image, in the form of a bound."""
    bound = lambda encoder: elbo(vae, params._replace(encoder=encoder), rng_key, x, num_samples)
    gradient = jax.tree.leaves(jax.grad(bound)(params.encoder))
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in gradient))


def _of_each(
    function: Bound, vae: VAE, params: VAEParams, rng_key: jax.Array, images: ArrayLike,
    num_samples: int, batch_size: int, devices: hardware.Devices | None,
) -> jax.Array:  # fmt: skip
    """The value of every image [N], on its own noise, on all devices; see `evaluate`."""
    if len(images) == 0:
        raise ValueError("images is empty; there is nothing to evaluate")
    if num_samples < 1 or batch_size < 1:
        raise ValueError(
            f"num_samples is {num_samples} and batch_size {batch_size}; both must be positive"
        )
    devices = hardware.all_devices(devices)
    images = jnp.asarray(images)
    program = _program(vae, num_samples, min(batch_size, len(images)), function, devices)
    return hardware.collect(program(None, *hardware.replicate((params, rng_key, images), devices)))


@functools.cache
def _program(vae, num_samples, batch_size, bound, devices):
    """The compiled program of these constants; equal constants give the same one."""
    one = functools.partial(
        bounds, vae=vae, num_samples=num_samples, batch_size=batch_size, bound=bound
    )
    return hardware.data_parallel(one, devices)
