"""The two refits of the paper: optimal inference and self-consistent training.

Both are calls of `refit_encoder` on a source. `fit/recipes` has the refits that go beyond them.
"""

import functools
from collections.abc import Sequence
from typing import Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gapjax.fit.arguments import RefitOptions, RunOptions, is_sweep, members
from gapjax.fit.checks import check_arguments
from gapjax.fit.loop import Monitor
from gapjax.fit.plateau import Convergence
from gapjax.fit.refits import Refit, refit_encoder
from gapjax.fit.sources import data_source, mixture_source, model_source
from gapjax.measure.per_image import Images, per_image_bounds
from gapjax.measure.statistics import mean_and_stderr
from gapjax.model.arguments import check_array, check_concrete, check_key
from gapjax.model.bounds import bits_per_dim
from gapjax.model.vae import VAE, VAEParams


@overload
def optimal_inference(
    vae: VAE,
    params: VAEParams,
    test_images: Images,
    rng_key: jax.Array,
    *,
    num_epochs: int = 1000,
    until: Convergence | None = ...,
    monitor_every: int = 20,
    num_samples: int = 4,
    **refit_options: Unpack[RunOptions],
) -> Refit: ...


@overload
def optimal_inference(
    vae: VAE,
    params: VAEParams | Sequence[VAEParams],
    test_images: Images,
    rng_key: Sequence[jax.Array],
    *,
    num_epochs: int = 1000,
    until: Convergence | None = ...,
    monitor_every: int = 20,
    num_samples: int = 4,
    **refit_options: Unpack[RunOptions],
) -> list[Refit]: ...


def optimal_inference(
    vae: VAE,
    params: VAEParams | Sequence[VAEParams],
    test_images: Images,
    rng_key: jax.Array | Sequence[jax.Array],
    *,
    num_epochs: int = 1000,
    until: Convergence | None = Convergence(),  # noqa: B008 (an immutable tuple)
    monitor_every: int = 20,
    num_samples: int = 4,
    **refit_options: Unpack[RunOptions],
) -> Refit | list[Refit]:
    """Optimal inference (eq. 12): refits the encoder on the *test* set until it has converged.

    Diagnostic only, because it is fitted on test data: it measures how much of the test BPD is
    due to the over-fitting of the encoder. Convergence is judged by the BPD of these images on
    fixed noise; see `Convergence`.

    Args:
      vae: the model.
      params: trained parameters, where the refit starts; a list in a sweep.
      test_images: [N, *event].
      rng_key: of the refit; a list of keys is a sweep.
      num_epochs: at most this many.
      until: the rule that ends it; None runs `num_epochs`.
      monitor_every: epochs between two measurements.
      num_samples: posterior samples for each image where convergence is judged.
      **refit_options: see `refit_encoder`.

    Returns:
      A `Refit`; a list of them in a sweep.
    """
    check_array("test_images", test_images)
    images = jnp.asarray(test_images)

    def monitor_of(monitor_key: jax.Array) -> Monitor:
        def bpd(candidate: VAEParams) -> float:
            nats = per_image_bounds(
                vae, candidate, monitor_key, images, num_samples=num_samples,
                devices=refit_options.get("devices"),
            )  # fmt: skip
            return mean_and_stderr(np.asarray(bits_per_dim(nats, images.shape[1:])))[0]

        return bpd

    (keys,) = members(rng_key)
    check_arguments("optimal_inference", keys, test_images=images)
    for key in keys:
        check_key(key)
    pairs = [jax.random.split(key) for key in keys]
    refit_keys, monitors = [pair[0] for pair in pairs], [monitor_of(pair[1]) for pair in pairs]
    source, several = data_source(images), is_sweep(rng_key)
    refit = functools.partial(
        refit_encoder, vae, params, source, num_epochs=num_epochs, monitor_every=monitor_every,
        until=until, **refit_options,
    )  # fmt: skip
    if several:
        return refit(refit_keys, monitor=monitors)
    return refit(refit_keys[0], monitor=monitors[0])


@overload
def self_consistent(
    vae: VAE,
    params: VAEParams,
    train_images: Images,
    rng_key: jax.Array,
    *,
    alpha: ArrayLike = 0.5,
    stratified: bool = False,
    num_epochs: int = 100,
    **refit_options: Unpack[RefitOptions],
) -> Refit: ...


@overload
def self_consistent(
    vae: VAE,
    params: VAEParams | Sequence[VAEParams],
    train_images: Images,
    rng_key: Sequence[jax.Array],
    *,
    alpha: ArrayLike | Sequence[ArrayLike] = 0.5,
    stratified: bool = False,
    num_epochs: int = 100,
    **refit_options: Unpack[RefitOptions],
) -> list[Refit]: ...


def self_consistent(
    vae: VAE,
    params: VAEParams | Sequence[VAEParams],
    train_images: Images,
    rng_key: jax.Array | Sequence[jax.Array],
    *,
    alpha: ArrayLike | Sequence[ArrayLike] = 0.5,
    stratified: bool = False,
    num_epochs: int = 100,
    **refit_options: Unpack[RefitOptions],
) -> Refit | list[Refit]:
    """Self-consistent training (eqs. 14-16): refits the encoder on model samples and data.

    Every x is a fresh sample of the model with probability alpha, and a training image
    otherwise. Test data is never used. alpha = 0 is the control: the same refit, with the same
    noise and order, on training data alone.

    Args:
      vae: the model.
      params: trained parameters, where the refit starts; a list in a sweep.
      train_images: [N, *event].
      rng_key: of the refit; a list of keys is a sweep.
      alpha: share of model samples, in [0, 1]; a list or an array [R] in a sweep.
      stratified: give every batch that share, instead of deciding for each example at random;
        see `mixture_source`. The authors' code takes 100 training images and 100 samples in each
        step: that is `stratified=True, batch_size=200` for twice as many epochs.
      num_epochs: epochs of N examples.
      **refit_options: see `refit_encoder`.

    Returns:
      A `Refit`; a list of them in a sweep.
    """
    check_array("train_images", train_images)
    check_concrete("self_consistent", "alpha has no gradient", alpha=alpha)
    data = data_source(train_images)
    if isinstance(alpha, jax.Array | np.ndarray) and alpha.ndim == 1:
        alpha = list(alpha)
    _, all_params, alphas = members(rng_key, params=params, alpha=alpha)
    numbers = [alpha for alpha in alphas if isinstance(alpha, int | float)]
    if len(set(numbers)) > 1 or 0 < len(numbers) < len(alphas):
        # Python numbers 0 and 1 make programs of their own; a sweep is one program.
        alphas = [jnp.asarray(alpha, jnp.float32) for alpha in alphas]
    sources = [
        mixture_source(
            model_source(vae, each.decoder, data.num_examples), data, alpha, stratified=stratified
        )
        for each, alpha in zip(all_params, alphas, strict=True)
    ]
    source = sources if is_sweep(rng_key) else sources[0]
    refit = functools.partial(refit_encoder, vae, params, num_epochs=num_epochs, **refit_options)
    return refit(source, rng_key)
