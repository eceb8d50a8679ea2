"""The ledger: where every nat goes, from train log p(x) down to the test ELBO."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gapjax.examples import count
from gapjax.measure.bounds import Images
from gapjax.measure.statistics import mean_and_stderr
from gapjax.results.measurements import Measured, measure, subset
from gapjax.vae import VAE, VAEParams


class Estimate(NamedTuple):
    """A mean over images, or a difference of two, in nats."""

    nats: float  # mean over the images, or a difference of such means
    stderr: float  # over images; of a difference on one set that of the paired difference
    fitted_on_test: bool  # a posterior or an encoder in it was, so it is a diagnostic only


class EncoderAccount(NamedTuple):
    """The losses of one encoder on one set of images.

        log p(x) = elbo + amortization_gap + approximation_gap,
        amortization_gap = inference_gap_by_refit + capacity_gap   (on the test set)

    The last two are of the test set alone. What has q* in it is a lower bound, as `optimal` is; on
    the test set `amortization_gap` is the gap of eq. 11 with q*.
    """

    elbo: Estimate  # eq. 4 with this encoder
    amortization_gap: Estimate | None  # ELBO with q* minus `elbo`; None where q* was not looked for
    bound_gap: Estimate  # log p(x) minus `elbo`: the whole loss due to inference
    # eq. 11 with the encoder refitted on it (eq. 12): what over-fitting costs
    inference_gap_by_refit: Estimate | None
    # ELBO with q* minus that of the refitted encoder: its capacity, or a refit that goes on
    capacity_gap: Estimate | None


class SetAccount(NamedTuple):
    """The ledger of one set of images."""

    num_images: int  # how many were measured
    num_available: int  # how many there are
    # estimate of log p(x); its mean is not above the truth, however many samples
    log_prob: Estimate
    # ELBO with the best posterior q* of each image (eq. 10) that a search found, which is not above
    # that of the best of the family. None where not looked for
    optimal: Estimate | None
    # `log_prob` minus `optimal`, both from below: the loss due to the posterior's family
    approximation_gap: Estimate | None
    encoders: dict[str, EncoderAccount]  # an `EncoderAccount` by the name of each encoder
    # diagnostics: of q*, "kept_start" and "unconverged" (shares of the images) and "steps"; of log
    # p(x), "ess" (median), "ess_least" and "acceptance"
    quality: dict[str, float]


class Ledger(NamedTuple):
    """Where every nat goes, from the decoder's log-likelihood down to the ELBO.

        train log p - test elbo = model_gap + approximation_gap + amortization_gap

    The last two are those of the test images.
    """

    train: SetAccount  # the training images
    test: SetAccount  # the test images
    model_gap: Estimate  # model generalization gap, train minus test log p(x)
    elbo_gaps: dict[str, Estimate]  # train minus test ELBO, by encoder


def ledger(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    train_images: Images,
    test_images: Images,
    *,
    encoders: Mapping[str, Any] | None = None,
    refit: str | None = None,
    num_images: int | None = 1000,
    subset_seed: int = 0,
    **options: Any,
) -> Ledger:
    """The whole account of one model: how far is the ELBO from log p(x), and why.

    Args:
      encoders: parameters of other encoders for the same decoder, by name; that of `params` is
        "as_trained".
      refit: the name of the one that was refitted on the test images (`optimal_inference`).
      num_images: most images of each set, a random subset by `subset_seed`; None takes all.
      **options: of `gapjax.results.measurements.measure`; search=None does without q*, and
        `bound=importance_weighted_bound` puts that in the place of the ELBO.
    """
    train_key, test_key = jax.random.split(rng_key)
    encoders = {"as_trained": params.encoder, **(encoders or {})}
    if refit is not None and refit not in encoders:
        raise ValueError(f"refit is {refit!r}; encoders has {', '.join(encoders)}")
    measured = [
        measure(vae, params, key, subset(images, num_images, subset_seed), encoders, **options)
        for key, images in ((train_key, train_images), (test_key, test_images))
    ]
    return balance(*measured, refit=refit, num_available=(count(train_images), count(test_images)))


def balance(
    train: Measured,
    test: Measured,
    *,
    refit: str | None = None,
    num_available: tuple[int, int] | None = None,
) -> Ledger:
    """The ledger of what was measured of training and of test images, by the same encoders.

    `refit` is as for `ledger`; `num_available` says how many images there are of each set.
    """
    available = num_available or (len(train.log_prob), len(test.log_prob))
    of_train = _account(train, False, refit, available[0])
    of_test = _account(test, True, refit, available[1])
    elbo_gaps = {
        name: _between(of_train.encoders[name].elbo, of_test.encoders[name].elbo)
        for name in train.elbo
    }
    return Ledger(of_train, of_test, _between(of_train.log_prob, of_test.log_prob), elbo_gaps)


def _account(measured: Measured, of_test: bool, refit: str | None, available: int) -> SetAccount:
    """The account of one set."""
    log_prob, optimal = measured.log_prob, measured.optimal
    refitted = measured.elbo[refit] if of_test and refit is not None else None
    encoders = {}
    for name, elbo in measured.elbo.items():
        fitted = name == refit  # on the test images, whatever the images it is measured on
        encoders[name] = EncoderAccount(
            elbo=_mean(elbo, fitted),
            amortization_gap=_gap(optimal, elbo, of_test or fitted),
            bound_gap=_gap(log_prob, elbo, fitted),
            inference_gap_by_refit=_gap(refitted, elbo, True),
            capacity_gap=_gap(optimal, refitted, True),
        )
    quality = {
        "ess": float(np.median(measured.ess)),
        "ess_least": float(np.min(measured.ess)),
        "acceptance": float(np.mean(measured.acceptance)),
    }
    search = {"kept_start": measured.kept_start, "steps": measured.num_steps}
    quality |= {name: float(np.mean(v)) for name, v in search.items() if v is not None}
    if measured.converged is not None:
        quality["unconverged"] = float(1 - np.mean(measured.converged))
    return SetAccount(
        num_images=len(log_prob),
        num_available=available,
        log_prob=_mean(log_prob, False),
        optimal=None if optimal is None else _mean(optimal, of_test),
        approximation_gap=_gap(log_prob, optimal, of_test),
        encoders=encoders,
        quality=quality,
    )


def _mean(values: np.ndarray, fitted_on_test: bool) -> Estimate:
    return Estimate(*mean_and_stderr(values), fitted_on_test)


def _gap(upper: np.ndarray | None, lower: np.ndarray | None, fitted_on_test: bool) -> Any:
    """Mean of upper minus lower over the same images, paired; None where one is not known."""
    if upper is None or lower is None:
        return None
    return _mean(np.subtract(upper, lower, dtype=np.float64), fitted_on_test)


def _between(first: Estimate, second: Estimate) -> Estimate:
    """First minus second, of two independent sets."""
    return Estimate(
        first.nats - second.nats,
        math.hypot(first.stderr, second.stderr),
        first.fitted_on_test or second.fitted_on_test,
    )
