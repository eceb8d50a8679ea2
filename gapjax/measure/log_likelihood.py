"""log p(x) of every image of a set, from below and, on simulated images, from above.

The mathematics of one example is in `importance` and `annealing`; here images are vmapped and
divided among the devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from gapjax import parallel
from gapjax.examples import count, on_device, take
from gapjax.measure.annealing import Annealing, annealed_importance_sampling, reverse_annealing
from gapjax.measure.bounds import Images, check_finite
from gapjax.measure.importance import LogLikelihood, importance_sampling
from gapjax.measure.statistics import mean_and_stderr
from gapjax.model.checks import check_concrete, check_inputs, check_key, check_model, check_positive
from gapjax.model.free import of_images
from gapjax.vae import VAE, VAEParams, bind, local_inference, prior_of, sample, sample_model


class Sandwich(NamedTuple):
    """Bounds of log p(x) [N] from both sides on images [N, *event] simulated from the model, nats.

    `lower` is by annealed importance sampling, as `ess` and `acceptance`, `upper` by the reverse
    chain from the exact posterior. No estimate is further from the truth, on average, than `gap`,
    the mean of upper minus lower, whose standard error is over the images.
    """

    images: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    gap: float
    gap_stderr: float
    ess: np.ndarray
    acceptance: np.ndarray


def log_likelihood(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    images: Images,
    *,
    posteriors: Any = None,
    method: str | Annealing = "importance",
    num_samples: int = 5000,
    chunk_size: int = 250,
    batch_size: int = 20,
    devices: parallel.Devices | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> LogLikelihood:
    """Estimates of log p(x) for every image of a set.

    Args:
      posteriors: a q for every image, as `best_posteriors` finds them, a pytree with a leading
        axis [N]; by default the encoder's. A better q makes a tighter bound.
      method: "importance", or an `Annealing`.
      num_samples: S of importance sampling.
      chunk_size: samples at once for an image.
      batch_size: images at once; with `chunk_size` it bounds memory and changes nothing else.

    Raises:
      FloatingPointError: an estimate is NaN or infinite; the message says why.
    """
    annealing = method if isinstance(method, Annealing) else None
    if annealing is None and method != "importance":
        raise ValueError(f"method is {method!r}; it must be 'importance' or an Annealing")
    posteriors = of_images(posteriors, images)
    check_inputs("log_likelihood", vae, params, rng_key, images, posteriors=posteriors)
    check_positive(annealing, num_samples=num_samples, chunk_size=chunk_size, batch_size=batch_size)
    inference = params.encoder if posteriors is None else posteriors
    found: LogLikelihood = _in_batches(
        _log_likelihoods, (inference, params.decoder, rng_key, on_device(images)), count(images),
        batch_size, devices, on_progress, vae=vae, annealing=annealing,
        local=posteriors is not None, num_samples=num_samples, chunk_size=chunk_size,
    )  # fmt: skip
    nats, what = np.asarray(found.log_prob), "the estimate of log p(x)"
    check_finite(vae, params, rng_key, images, nats, posteriors=posteriors, what=what)
    if found.acceptance is None:  # here, as no program may give a NaN under jax_debug_nans
        found = found._replace(acceptance=np.full(count(images), np.nan))
    return found


def sandwich(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    num_images: int,
    *,
    contexts: Any = None,
    annealing: Annealing = Annealing(),  # noqa: B008 (an immutable tuple)
    batch_size: int = 20,
    devices: parallel.Devices | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Sandwich:
    """Bidirectional Monte Carlo: log p(x) of simulated images from both sides.

    How well annealing with these settings works on this model: the truth lies between the two. The
    N images are simulated: z ~ p(z), x ~ p(x given z).

    Args:
      contexts: those of the N images, with a leading axis [N], where the model is conditional.

    References:
      Grosse, Ghahramani, Adams, Sandwiching the Marginal Likelihood Using Bidirectional Monte
      Carlo, 2015.
    """
    check_positive(annealing, num_images=num_images, batch_size=batch_size)
    check_concrete("sandwich", "there use reverse_annealing", params=params, rng_key=rng_key)
    check_key(rng_key)
    first = vae if contexts is None else vae.at(take(on_device(contexts), 0))
    x = jax.eval_shape(lambda key: sample_model(first, params.decoder, key), rng_key)
    check_model(first, params, x)
    images, upper, (lower, ess, acceptance) = _in_batches(
        _sandwiches, (params, rng_key, on_device(contexts)), num_images, batch_size,
        devices, on_progress, vae=vae, annealing=annealing,
    )  # fmt: skip
    gap, gap_stderr = mean_and_stderr(np.asarray(upper, np.float64) - lower)
    return Sandwich(images, lower, upper, gap, gap_stderr, ess, acceptance)


def _in_batches(
    program: parallel.Program, arrays: tuple, num_images: int, batch_size: int,
    devices: parallel.Devices | None, on_progress: Callable[[int], None] | None, **static: Any,
) -> Any:  # fmt: skip
    """The program's results for images 0 to N - 1, [N, ...] of NumPy; the last batch is padded."""
    devices = parallel.all_devices(devices)
    arrays = parallel.replicate(arrays, devices, commit=False)
    batch_size = min(batch_size, num_images)
    parts = []
    for start in range(0, num_images, batch_size):
        batch = np.minimum(np.arange(start, start + batch_size), num_images - 1)
        parts.append(program(*arrays, batch, devices=devices, **static))
        if on_progress is not None:
            jax.block_until_ready(parts[-1])
            on_progress(min(start + batch_size, num_images))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num_images], *parts)


@parallel.program
def _log_likelihoods(
    shard, inference, decoder, rng_key, images, batch,
    *, vae, annealing, local, num_samples, chunk_size,
) -> LogLikelihood:  # fmt: skip
    """Estimates for the images of `batch`; `inference` is an encoder or a q for each image."""

    def one(index: jax.Array) -> LogLikelihood:
        own = take(inference, index) if local else inference
        model, x = bind(local_inference(vae) if local else vae, take(images, index))
        inputs = model, VAEParams(own, decoder), jax.random.fold_in(rng_key, index), x
        if annealing is None:
            return importance_sampling(*inputs, num_samples, chunk_size)
        return annealed_importance_sampling(*inputs, annealing)

    return shard.merge(jax.vmap(one)(shard.split(batch)), len(batch))


@parallel.program
def _sandwiches(shard, params, rng_key, contexts, batch, *, vae, annealing) -> tuple:
    """The simulated images of these indices, their upper and their lower estimates."""

    def one(index: jax.Array) -> tuple[jax.Array, jax.Array, LogLikelihood]:
        latent_key, pixel_key, chain_key = jax.random.split(jax.random.fold_in(rng_key, index), 3)
        model = vae if contexts is None else vae.at(take(contexts, index))
        z = sample(prior_of(model, params.decoder), latent_key)
        x = sample(model.decode(params.decoder, z), pixel_key)
        upper = reverse_annealing(model, params, chain_key, x, z, annealing)
        return x, upper, annealed_importance_sampling(model, params, chain_key, x, annealing)

    return shard.merge(jax.vmap(one)(shard.split(batch)), len(batch))
