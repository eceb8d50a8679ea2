"""How many nats an encoder is from the best posterior of each image, on any set of images."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gapjax.infer.search import BestPosteriors, PosteriorSearch, best_posteriors
from gapjax.measure.bounds import Images, per_image_bounds, posterior_bounds
from gapjax.vae import VAE, VAEParams


class AmortizationGaps(NamedTuple):
    """The amortization gaps of several encoders on one set of N images.

    Attributes:
      per_image: by the name of each encoder [N], the ELBO with q* minus that of the encoder, nats.
        It may be below zero by the noise of the samples.
      converged: [N] bool, whether the search for q* was finished.
    """

    per_image: dict[str, np.ndarray]
    converged: np.ndarray


class Bounds(NamedTuple):
    """The ELBO of every image of a set: of encoders, and of the best posterior.

    Attributes:
      elbo: [N] nats, by the name of each encoder.
      optimal: [N] nats, with q* on the same fresh noise; None where it was not looked for.
      found: what the search for q* returned.
    """

    elbo: dict[str, np.ndarray]
    optimal: np.ndarray | None
    found: BestPosteriors | None


def amortization_gaps(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    images: Images,
    encoders: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 50,
    search: PosteriorSearch = PosteriorSearch(),  # noqa: B008 (an immutable tuple)
    batch_size: int = 50,
) -> AmortizationGaps:
    """How far encoders are from q* (eq. 10), image by image.

    On images that an encoder was not fitted to it says what is left to gain there; on those it was,
    what the encoder cannot say. Where q* is fitted to test images it is a diagnostic only.

    Args:
      vae: the model.
      params: trained parameters; the encoder is "as_trained".
      rng_key: of the noise of the bounds, and of the search.
      images: [N, *event], of any kind: training images, reconstructions, samples, test images.
      encoders: parameters of other encoders for the same decoder, by name. The search starts from
        the best of all, image by image.
      num_samples: posterior samples for every ELBO; all share their noise.
      search: how q* is looked for.
      batch_size: images at once; bounds memory, changes nothing else.

    Returns:
      `AmortizationGaps`.

    Raises:
      ValueError: as of `best_posteriors`.
      TypeError: as of `best_posteriors`.

    References:
      Cremer, Li, Duvenaud, Inference Suboptimality in Variational Autoencoders, 2018.
    """
    bound_key, search_key = jax.random.split(rng_key)
    bounds = measure_bounds(
        vae, params, bound_key, search_key, images,
        {"as_trained": params.encoder, **(encoders or {})},
        num_samples=num_samples, search=search, batch_size=batch_size,
    )  # fmt: skip
    assert bounds.optimal is not None and bounds.found is not None
    optimal = bounds.optimal.astype(np.float64)
    gaps = {name: optimal - elbo for name, elbo in bounds.elbo.items()}
    return AmortizationGaps(gaps, bounds.found.converged)


def measure_bounds(
    vae: VAE,
    params: VAEParams,
    bound_key: jax.Array,
    search_key: jax.Array,
    images: Images,
    encoders: Mapping[str, Any],
    *,
    num_samples: int,
    search: PosteriorSearch | None,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> Bounds:
    """The ELBO of each encoder and of q*, on common noise; see `amortization_gaps`.

    Args:
      vae: the model.
      params: its parameters.
      bound_key: of the noise of every ELBO.
      search_key: of the search for q*.
      images: [N, *event].
      encoders: parameters by name.
      num_samples: posterior samples for every ELBO.
      search: how q* is looked for; None leaves it out.
      batch_size: images at once.
      on_progress: see `best_posteriors`.
    """
    elbo = {
        name: np.asarray(
            per_image_bounds(
                vae, params._replace(encoder=encoder), bound_key, images,
                num_samples=num_samples, batch_size=batch_size,
            )
        )
        for name, encoder in encoders.items()
    }  # fmt: skip
    if search is None:
        return Bounds(elbo, None, None)
    found = best_posteriors(
        vae, params, search_key, images, encoders=list(encoders.values()), search=search,
        batch_size=batch_size, on_progress=on_progress,
    )  # fmt: skip
    optimal = posterior_bounds(
        vae, params, bound_key, images, found.posteriors,
        num_samples=num_samples, batch_size=batch_size,
    )  # fmt: skip
    return Bounds(elbo, optimal, found)
