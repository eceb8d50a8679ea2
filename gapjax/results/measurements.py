"""What the ledger is made from: nats of every image of a set, of each encoder and of q*."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gapjax.infer.search import PosteriorSearch
from gapjax.measure.annealing import Annealing
from gapjax.measure.bounds import Images
from gapjax.measure.log_likelihood import log_likelihood
from gapjax.results.amortization import measure_bounds
from gapjax.vae import VAE, VAEParams


class Measured(NamedTuple):
    """What was measured of every image of one set; a `Ledger` is means and differences of it.

    Attributes:
      elbo: [N] nats, by the name of each encoder.
      optimal: [N] nats, ELBO with q* on fresh noise; None where it was not looked for.
      log_prob: [N] nats, estimate of log p(x).
      ess: [N] effective sample size behind `log_prob`.
      acceptance: [N] acceptance rate of its chains, or NaN.
      kept_start: [N] whether q* is where the search started; None as `optimal`.
      converged: [N] whether the search for q* was finished.
      num_steps: [N] steps of the search.
    """

    elbo: dict[str, np.ndarray]
    optimal: np.ndarray | None
    log_prob: np.ndarray
    ess: np.ndarray
    acceptance: np.ndarray
    kept_start: np.ndarray | None
    converged: np.ndarray | None
    num_steps: np.ndarray | None


def measure(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    images: Images,
    encoders: Mapping[str, Any],
    *,
    num_samples: int = 50,
    search: PosteriorSearch | None = PosteriorSearch(),  # noqa: B008 (an immutable tuple)
    method: str | Annealing = Annealing(),  # noqa: B008 (an immutable tuple)
    num_importance_samples: int = 5000,
    batch_size: int = 50,
    on_progress: Callable[[str, int], None] | None = None,
) -> Measured:
    """Measures every image of a set: the ELBO of each encoder and of q*, and log p(x).

    Args:
      vae: the model.
      params: its parameters.
      rng_key: of the measurement; folded with each image's index.
      images: [N, *event].
      encoders: parameters by name. The search for q* starts from the best of them, image by
        image.
      num_samples: posterior samples for every ELBO; all share their noise.
      search: how q* is looked for; None leaves it out.
      method: of log p(x), see `log_likelihood`; q* is its proposal where there is one.
      num_importance_samples: of the method "importance".
      batch_size: images at once; bounds memory, changes nothing else.
      on_progress: called with what is being done and how many images are done.

    Returns:
      `Measured`.
    """
    bound_key, search_key, log_prob_key = jax.random.split(rng_key, 3)
    tell = (lambda what: lambda done: on_progress(what, done)) if on_progress else lambda _: None
    bounds = measure_bounds(
        vae, params, bound_key, search_key, images, encoders, num_samples=num_samples,
        search=search, batch_size=batch_size, on_progress=tell("posteriors"),
    )  # fmt: skip
    found = bounds.found
    estimate = log_likelihood(
        vae, params, log_prob_key, images, posteriors=found.posteriors if found else None,
        method=method, num_samples=num_importance_samples, batch_size=batch_size,
        on_progress=tell("log p(x)"),
    )  # fmt: skip
    return Measured(
        elbo=bounds.elbo,
        optimal=bounds.optimal,
        log_prob=np.asarray(estimate.log_prob),
        ess=np.asarray(estimate.ess),
        acceptance=np.asarray(estimate.acceptance),
        kept_start=found.kept_start if found else None,
        converged=found.converged if found else None,
        num_steps=found.num_steps if found else None,
    )


def subset(images: Images, num_images: int | None, seed: int) -> np.ndarray:
    """At most `num_images` of the images, chosen at random by `seed`, in their own order.

    Raises:
      ValueError: num_images is less than 2, which leave no standard error.
    """
    images = np.asarray(images)
    if num_images is None or num_images >= len(images):
        return images
    if num_images < 2:
        raise ValueError(f"num_images is {num_images}; a standard error needs at least 2")
    chosen = np.random.default_rng(seed).choice(len(images), num_images, replace=False)
    return images[np.sort(chosen)]
