"""`results/`, `measure/`, `infer/search` on a model whose every number is known by integration."""

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from exact_model import PIXELS, POPULATION, Exact, bound, build, prob

import gapjax
from gapjax.measure.bounds import posterior_bounds
from gapjax.results.estimates import inference_gaps, paired_difference, summarize
from gapjax.results.ledger import balance
from gapjax.results.measurements import Measured

_SETS, _SIZE = 400, 100  # data sets, and the images of each
_BITS = PIXELS * np.log(2)
# Of 400 nominal 95 % intervals. An error that is too small by a quarter gives 86 %, one that is too
# large by a half 99.7 %.
_COVERAGE = (0.89, 0.985)


@pytest.fixture(scope="module")
def exact() -> Exact:
    return build()


@pytest.fixture(scope="module")
def sets():
    """The indices of the images of every data set [400, 100], drawn with replacement."""
    return np.random.default_rng(1).integers(0, POPULATION, (_SETS, _SIZE))


@pytest.fixture(scope="module")
def evaluations(exact, sets):
    """What `evaluate` gives of every set by each encoder, and the same for q*; 4 samples."""
    images, key = exact.images[sets.ravel()], jax.random.key(2)
    bpds = {
        name: gapjax.evaluate(exact.vae, params, key, images, num_samples=4).per_image
        for name, params in exact.params.items()
    }
    loc, scale = (np.asarray(part, np.float32)[sets.ravel()] for part in exact.best)
    posteriors = jax.vmap(lambda loc, scale: dist.Normal(loc, scale).to_event(1))(loc, scale)
    nats = posterior_bounds(
        exact.vae, exact.params["trained"], key, images, posteriors, num_samples=4, batch_size=500
    )
    bpds["best"] = np.asarray(gapjax.bits_per_dim(nats, (PIXELS,)))
    split = lambda bpd: [summarize(each, 4) for each in bpd.reshape(_SETS, _SIZE)]
    return {name: split(bpd) for name, bpd in bpds.items()}


def _covers(estimates, errors, truth):
    """The share of the intervals of 1.96 errors that have the truth in them."""
    return np.mean(np.abs(np.asarray(estimates) - truth) < 1.96 * np.asarray(errors))


def _wrong(shares):
    return {name: s for name, s in shares.items() if not _COVERAGE[0] <= s <= _COVERAGE[1]}


def test_the_integrals_are_right(exact):
    """The parts of the account of a nat are in order, and no q near the best is better."""
    for name, elbo in exact.elbo.items():
        assert np.all(elbo <= exact.log_prob) and np.all(elbo <= exact.elbo["best"]), name
    rng = np.random.default_rng(3)
    loc, scale = exact.best
    for size in (1e-2, 1e-1):
        noise = size * rng.normal(size=(2, *loc.shape))
        other = bound(exact.log_likelihood, loc + noise[0], scale * np.exp(noise[1]))
        assert np.all(other < exact.elbo["best"])
    # p(x) of all images there are sums to one.
    every = (np.arange(2**PIXELS)[:, None] >> np.arange(PIXELS)) & 1
    assert prob(exact, every).sum() == pytest.approx(1, abs=1e-8)


def test_bounds_are_unbiased(exact, sets, evaluations):
    """The mean of 40,000 estimates; noise and choice of images are in its error."""
    for name, several in evaluations.items():
        values = -_BITS * np.concatenate([one.per_image for one in several])
        noise = values - exact.elbo[name][sets.ravel()]
        assert abs(noise.mean()) < 4 * noise.std() / len(noise) ** 0.5, name


def test_log_prob_by_importance_sampling(exact):
    estimate = gapjax.log_likelihood(
        exact.vae, exact.params["refit"], jax.random.key(3), exact.images, num_samples=1000
    )
    error = np.asarray(estimate.log_prob) - exact.log_prob
    assert abs(error.mean()) < 0.01 and np.abs(error).max() < 0.4


def test_the_search_finds_the_best_posterior_from_below(exact):
    """Each q that is found has at most the ELBO of q*, and nearly all of it."""
    search = gapjax.PosteriorSearch(max_rounds=20)
    found = gapjax.best_posteriors(
        exact.vae, exact.params["trained"], jax.random.key(4), exact.images, search=search,
        batch_size=POPULATION,
    )  # fmt: skip
    q = found.posteriors.base_dist
    elbo = bound(exact.log_likelihood, np.float64(q.loc), np.float64(q.scale))
    missing = exact.elbo["best"] - elbo
    assert np.all(missing > -1e-4) and missing.mean() < 0.02
    assert missing.mean() < 0.1 * (exact.elbo["best"] - exact.elbo["trained"]).mean()


def test_the_errors_of_results_cover_the_truth(exact, evaluations):
    mean = {name: -elbo.mean() / _BITS for name, elbo in exact.elbo.items()}
    shares = {}
    for name, several in evaluations.items():
        shares[name] = _covers(
            [one.bpd for one in several], [one.stderr for one in several], mean[name]
        )
    order = ("trained", "best", "refit", "control")
    gaps = [inference_gaps(*four) for four in zip(*(evaluations[n] for n in order), strict=True)]
    for name, first, second in (
        ("inference_gap", "trained", "best"),
        ("gain", "trained", "refit"),
        ("gain_over_control", "control", "refit"),
    ):
        found = [getattr(each, name) for each in gaps]
        shares[name] = _covers(
            [one.bpd for one in found], [one.stderr for one in found], mean[first] - mean[second]
        )
    shares["gap_closed"] = _covers(
        [each.gap_closed for each in gaps], [each.gap_closed_stderr for each in gaps],
        (mean["trained"] - mean["refit"]) / (mean["trained"] - mean["best"]),
    )  # fmt: skip
    assert not _wrong(shares), shares


def test_the_errors_of_the_ledger_cover_the_truth(exact, sets, evaluations):
    """Of the accounts of two sets, which are drawn from one population; each is in two of them."""
    nats = {
        name: [-_BITS * one.per_image.astype(np.float64) for one in several]
        for name, several in evaluations.items()
    }
    ones = np.ones(_SIZE)
    measured = [
        Measured(
            {"as_trained": nats["trained"][i], "optimal": nats["refit"][i]}, nats["best"][i],
            exact.log_prob[sets[i]], ones, ones, ones, ones, ones,
        )
        for i in range(_SETS)
    ]  # fmt: skip
    books = [balance(measured[i - 1], measured[i], refit="optimal") for i in range(_SETS)]
    mean = {name: elbo.mean() for name, elbo in exact.elbo.items()}
    log_prob = exact.log_prob.mean()
    own = lambda key: [getattr(book.test.encoders["as_trained"], key) for book in books]
    truths = {
        "log_prob": ([book.test.log_prob for book in books], log_prob),
        "optimal": ([book.test.optimal for book in books], mean["best"]),
        "approximation_gap": (
            [book.test.approximation_gap for book in books], log_prob - mean["best"]
        ),
        "model_gap": ([book.model_gap for book in books], 0.0),
        "elbo_gap": ([book.elbo_gaps["as_trained"] for book in books], 0.0),
        "elbo": (own("elbo"), mean["trained"]),
        "bound_gap": (own("bound_gap"), log_prob - mean["trained"]),
        "amortization_gap": (own("amortization_gap"), mean["best"] - mean["trained"]),
        "by_refit": (own("inference_gap_by_refit"), mean["refit"] - mean["trained"]),
        "capacity_gap": (own("capacity_gap"), mean["best"] - mean["refit"]),
    }  # fmt: skip
    shares = {
        name: _covers([one.nats for one in found], [one.stderr for one in found], truth)
        for name, (found, truth) in truths.items()
    }
    assert not _wrong(shares), shares


def test_the_intervals_of_shares_cover_the_truth(exact, sets):
    """Of numbers without noise, that of which there are too few samples has no share."""
    bpd = {name: -elbo / _BITS for name, elbo in exact.elbo.items()}
    for first in ("trained", "control"):
        truth = (bpd[first] > bpd["refit"]).mean()
        several = [
            paired_difference(summarize(bpd[first][chosen]), summarize(bpd["refit"][chosen]))
            for chosen in sets
        ]
        ends = np.array([one.fraction_improved_interval for one in several])
        covered = np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1]))
        assert _COVERAGE[0] <= covered <= _COVERAGE[1]
        assert np.mean([one.fraction_improved for one in several]) == pytest.approx(truth, abs=0.01)
        covered = _covers(
            [one.fraction_improved for one in several],
            [one.fraction_improved_stderr for one in several], truth,
        )  # fmt: skip
        assert covered > _COVERAGE[0]


def test_a_share_needs_samples_and_says_what_is_left_of_its_bias(exact):
    """Nine tenths of the images improve. With one sample half of them seem to."""
    images = np.tile(exact.images, (20, 1))
    truth = (exact.elbo["refit"] > exact.elbo["trained"]).mean()
    median = np.median(exact.elbo["refit"] - exact.elbo["trained"]) / _BITS
    evaluate = lambda name, number: gapjax.evaluate(
        exact.vae, exact.params[name], jax.random.key(5), images, num_samples=number
    )
    one = [evaluate(name, 1) for name in ("trained", "refit")]
    assert np.isnan(paired_difference(*one).fraction_improved)
    raw = np.mean(one[0].per_image > one[1].per_image)
    many = paired_difference(*(evaluate(name, 100) for name in ("trained", "refit")))
    assert truth > 0.85 and raw < 0.65
    assert raw < many.fraction_improved - 0.15 and many.fraction_improved < truth
    corrected = many.fraction_improved - many.fraction_improved_bias
    assert many.fraction_improved < corrected < truth + 0.01
    assert many.median == pytest.approx(median, abs=0.15 * median)
    assert many.sign_test < 1e-6 and (many.num_samples, many.num_images) == (100, len(images))
