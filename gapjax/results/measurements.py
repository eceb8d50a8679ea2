"""Nats of every image of a set, of each encoder and of its best posterior q*."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gapjax.examples import count, take
from gapjax.infer.search import BestPosteriors, PosteriorSearch, best_posteriors
from gapjax.measure.annealing import Annealing
from gapjax.measure.bounds import Bound, Images, check_finite, per_image_bounds, posterior_bounds
from gapjax.measure.log_likelihood import log_likelihood
from gapjax.model.bounds import elbo
from gapjax.vae import VAE, VAEParams


class AmortizationGaps(NamedTuple):
    """The amortization gaps of several encoders on one set of N images."""

    per_image: dict[str, np.ndarray]  # by encoder [N], the ELBO with q* minus its own, nats
    converged: np.ndarray  # [N] bool, whether the search for q* was finished


class Measured(NamedTuple):
    """What was measured of every image [N] of one set; a `Ledger` is means and differences of it.

    What belongs to q* is None where it was not looked for; see `BestPosteriors`.
    """

    elbo: dict[str, np.ndarray]  # by the name of each encoder, nats
    optimal: np.ndarray | None  # the ELBO with q* on fresh noise
    log_prob: np.ndarray
    ess: np.ndarray  # of `log_prob`, as `acceptance`
    acceptance: np.ndarray
    kept_start: np.ndarray | None
    converged: np.ndarray | None
    num_steps: np.ndarray | None


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

    A gap may be below zero by the noise of the samples. Where q* is fitted to test images it is a
    diagnostic only.

    Args:
      encoders: parameters of other encoders for the same decoder, by name; that of `params` is
        "as_trained". The search starts from the best of all, image by image.
      num_samples: posterior samples for every ELBO; all share their noise.

    References:
      Cremer, Li, Duvenaud, Inference Suboptimality in Variational Autoencoders, 2018.
    """
    bound_key, search_key = jax.random.split(rng_key)
    elbo, optimal, found = _bounds(
        vae, params, bound_key, search_key, images,
        {"as_trained": params.encoder, **(encoders or {})},
        num_samples=num_samples, search=search, batch_size=batch_size,
    )  # fmt: skip
    assert optimal is not None and found is not None
    gaps = {name: optimal.astype(np.float64) - nats for name, nats in elbo.items()}
    return AmortizationGaps(gaps, found.converged)


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
    bound: Bound = elbo,
    on_progress: Callable[[str, int], None] | None = None,
) -> Measured:
    """Measures every image of a set: the ELBO of each encoder and of q*, and log p(x).

    Args:
      encoders: parameters by name. The search for q* starts from the best for each image.
      num_samples: posterior samples for every ELBO; all share their noise.
      search: how q* is looked for; None leaves it out.
      method: of log p(x), see `log_likelihood`; q* is its proposal where there is one.
      num_importance_samples: of the method "importance".
      bound: what stands for the ELBO of encoders and q*; the search is by the ELBO.
      on_progress: called with what is being done and how many images are done.
    """
    bound_key, search_key, log_prob_key = jax.random.split(rng_key, 3)
    tell = (lambda what: lambda done: on_progress(what, done)) if on_progress else lambda _: None
    elbo, optimal, found = _bounds(
        vae, params, bound_key, search_key, images, encoders, num_samples=num_samples,
        search=search, batch_size=batch_size, bound=bound, on_progress=tell("posteriors"),
    )  # fmt: skip
    estimate = log_likelihood(
        vae, params, log_prob_key, images, posteriors=found.posteriors if found else None,
        method=method, num_samples=num_importance_samples, batch_size=batch_size,
        on_progress=tell("log p(x)"),
    )  # fmt: skip
    log_prob, ess, acceptance = map(np.asarray, estimate)
    search_of = (found.kept_start, found.converged, found.num_steps) if found else (None,) * 3
    return Measured(elbo, optimal, log_prob, ess, acceptance, *search_of)


def subset(images: Images, num_images: int | None, seed: int) -> Images:
    """At most `num_images` of the images, chosen at random by `seed`, in their own order."""
    images = jax.tree.map(np.asarray, images)
    if num_images is None or num_images >= count(images):
        return images
    if num_images < 2:
        raise ValueError(f"num_images is {num_images}; a standard error needs at least 2")
    chosen = np.random.default_rng(seed).choice(count(images), num_images, replace=False)
    return take(images, np.sort(chosen))


def _bounds(
    vae: VAE, params: VAEParams, bound_key: jax.Array, search_key: jax.Array, images: Images,
    encoders: Mapping[str, Any], *, num_samples: int, search: PosteriorSearch | None,
    batch_size: int, bound: Bound = elbo, on_progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray | None, BestPosteriors | None]:  # fmt: skip
    """The ELBO [N] of each encoder and, on common noise, of q*; and what the search returned."""
    options: Any = {"num_samples": num_samples, "batch_size": batch_size, "bound": bound}
    elbo = {}
    for name, encoder in encoders.items():
        own = params._replace(encoder=encoder)
        elbo[name] = np.asarray(per_image_bounds(vae, own, bound_key, images, **options))
        check_finite(vae, own, bound_key, images, elbo[name], num_samples)
    if search is None:
        return elbo, None, None
    found = best_posteriors(
        vae, params, search_key, images, encoders=list(encoders.values()), search=search,
        batch_size=batch_size, on_progress=on_progress,
    )  # fmt: skip
    optimal = posterior_bounds(vae, params, bound_key, images, found.posteriors, **options)
    return elbo, optimal, found
