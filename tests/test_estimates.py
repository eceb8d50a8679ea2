"""`measure/bounds`, `measure/statistics`, `results/estimates`: BPD of a set, differences, gaps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from conftest import assert_same_bits

import gapjax
from gapjax.measure.bounds import encoder_gradient_norms
from gapjax.measure.statistics import effective_number, sign_test
from gapjax.results.estimates import inference_gaps, summarize


def _noisy_bound(vae, params, rng_key, x, num_samples):
    """Noise and image apart, so that both can be told from the value."""
    return x.sum() + jax.random.uniform(rng_key)


@pytest.fixture(scope="module")
def by_hand(small):
    """BPD of every test image by the plain formula, no batches."""
    rng_key, images = jax.random.key(1), jnp.asarray(small.test_images)
    bound = lambda i, x: gapjax.elbo(small.vae, small.params, jax.random.fold_in(rng_key, i), x, 3)
    nats = jax.jit(jax.vmap(bound))(jnp.arange(len(images)), images)
    return rng_key, -np.asarray(nats, np.float64) / (25 * math.log(2))


@pytest.mark.parametrize("batch_size", [7, 40, 1000])
def test_a_ragged_set_is_the_plain_mean_whatever_the_batch(small, by_hand, batch_size):
    rng_key, per_image = by_hand
    images = small.test_images
    assert len(images) % 7 and len(images) == 40
    ours = gapjax.evaluate(
        small.vae, small.params, rng_key, images, num_samples=3, batch_size=batch_size
    )
    np.testing.assert_allclose(ours.per_image, per_image, rtol=1e-5)
    assert ours.bpd == pytest.approx(per_image.mean(), rel=1e-6)
    assert ours.stderr == pytest.approx(per_image.std(ddof=1) / math.sqrt(40), rel=1e-4)


def test_every_image_counts_once_and_has_noise_of_its_own():
    images = np.arange(0, 110, 10).astype(np.uint8)[:, None]  # eleven
    values = []
    for batch_size in (4, 11):
        evaluation = gapjax.evaluate(
            None, None, jax.random.key(0), images, batch_size=batch_size, bound=_noisy_bound
        )
        values.append(-evaluation.per_image * math.log(2))
        np.testing.assert_array_equal(np.floor(values[-1] / 10 + 1e-4), np.arange(11))
    np.testing.assert_allclose(values[1], values[0], rtol=1e-6)
    noise = values[0] - images[:, 0]
    assert len(np.unique(np.round(noise, 4))) == 11
    other = gapjax.evaluate(None, None, jax.random.key(1), images, bound=_noisy_bound)
    assert np.all(np.abs(-other.per_image * math.log(2) - values[0]) > 1e-5)


class _Reveals:
    """A likelihood whose log-probability is z itself."""

    def __init__(self, z):
        self.z = z

    def log_prob(self, x):
        return self.z.sum()


def test_two_encoders_are_compared_on_the_same_noise():
    prior = dist.Normal(jnp.zeros(2), jnp.ones(2)).to_event(1)
    encode = lambda encoder, x: dist.Normal(encoder[0], encoder[1]).to_event(1)
    vae = gapjax.VAE(None, encode, lambda decoder, z: _Reveals(z), prior)
    noise = []
    for loc, scale in ((0.5, 1.5), (-2.0, 0.1)):
        params = gapjax.VAEParams((jnp.full(2, loc), jnp.full(2, scale)), ())
        nats = -math.log(2) * gapjax.evaluate(
            vae, params, jax.random.key(0), np.zeros((9, 1), np.uint8)
        ).per_image.astype(np.float64)
        kl = 2 * (0.5 * (scale**2 + loc**2 - 1) - math.log(scale))
        noise.append((nats + kl - 2 * loc) / scale)  # eps_1 + eps_2 of every image
    np.testing.assert_allclose(noise[0], noise[1], atol=1e-4)
    assert noise[0].std() > 0.3


def test_the_same_key_gives_the_same_bits(small):
    first, second = (
        gapjax.evaluate(
            small.vae, small.params, jax.random.key(2), small.test_images, num_samples=3
        )
        for _ in range(2)
    )
    assert_same_bits(first.per_image, second.per_image)
    assert first[:2] == second[:2]


def test_the_importance_weighted_bound_is_a_choice_of_bound(small):
    key = jax.random.key(3)
    elbo = gapjax.evaluate(small.vae, small.params, key, small.test_images, num_samples=3)
    tighter = gapjax.evaluate(
        small.vae, small.params, key, small.test_images, num_samples=20,
        bound=gapjax.importance_weighted_bound,
    )  # fmt: skip
    assert tighter.bpd < elbo.bpd - 0.005


def test_the_exact_posterior_evaluates_to_log_p(linear):
    evaluation = gapjax.evaluate(
        linear.monte_carlo_vae, linear.exact, jax.random.key(0), linear.images
    )
    expected = -linear.log_prob(linear.images) / (6 * math.log(2))
    np.testing.assert_allclose(evaluation.per_image, expected, atol=1e-4)


def test_paired_differences_have_far_smaller_errors(small):
    rng = np.random.default_rng(0)
    nudged = small.params._replace(
        encoder=jax.tree.map(
            lambda p: p + 0.02 * jnp.asarray(rng.normal(size=p.shape), p.dtype),
            small.params.encoder,
        )
    )
    first, second = (
        gapjax.evaluate(small.vae, params, jax.random.key(2), small.test_images, num_samples=3)
        for params in (small.params, nudged)
    )
    paired = gapjax.paired_difference(first, second)
    assert paired.bpd == pytest.approx(first.bpd - second.bpd, abs=1e-6)
    assert 0 < paired.stderr < 0.5 * math.hypot(first.stderr, second.stderr)


def test_standard_errors_by_hand():
    first = summarize(np.array([1.0, 2.0, 4.0, 5.0], np.float32))
    assert first.bpd == 3.0
    assert first.stderr == pytest.approx(math.sqrt(10 / 3) / 2)
    second = summarize(np.array([1.0, 1.0, 3.0, 5.0], np.float32))
    paired = gapjax.paired_difference(first, second)
    assert paired.bpd == 0.5
    assert paired.stderr == pytest.approx(math.sqrt(1 / 3) / 2)
    assert gapjax.paired_difference(second, first).bpd == -0.5


def test_one_image_that_decides_the_mean_is_told_from_most():
    first = np.zeros(400, np.float32)
    second = np.full(400, 0.25, np.float32)
    second[:3] = first[:3]  # equal
    first[7] = 400.0
    paired = gapjax.paired_difference(summarize(first), summarize(second))
    assert paired.bpd == pytest.approx((399.75 - 396 * 0.25) / 400)
    assert paired.median == -0.25
    assert paired.fraction_improved == (1 + 1.5) / 400
    low, high = paired.fraction_improved_interval
    assert 0 < low < paired.fraction_improved < high < 0.025
    assert paired.num_effective == pytest.approx(1.0, abs=0.01)
    other = gapjax.paired_difference(summarize(second), summarize(first))
    assert (other.median, other.fraction_improved) == (0.25, 1 - paired.fraction_improved)


def test_the_error_of_a_normal_difference_rests_on_a_third_of_the_images():
    values = scipy.stats.norm.ppf((np.arange(10_000) + 0.5) / 10_000)
    paired = gapjax.paired_difference(summarize(values), summarize(np.zeros(10_000)))
    assert paired.num_effective == pytest.approx(10_000 / 3, rel=0.01)
    assert paired.fraction_improved == 0.5
    assert paired.fraction_improved_stderr == pytest.approx(0.005, rel=1e-3)
    assert paired.fraction_improved_interval == pytest.approx((0.4902, 0.5098), abs=1e-4)
    nothing = gapjax.paired_difference(summarize(values), summarize(values))
    assert (nothing.median, nothing.fraction_improved, nothing.num_effective) == (0, 0.5, 10_000)


@pytest.mark.parametrize(
    ("number", "better", "ties"),
    [(20, 0.95, 0.0), (50, 0.95, 0.0), (200, 0.99, 0.0), (50, 1.0, 0.0), (200, 0.6, 0.0),
     (100, 0.1, 0.9), (100, 0.05, 0.93), (40, 0.02, 0.97)],
)  # fmt: skip
def test_the_interval_of_a_share_covers_it(number, better, ties):
    """At the ends, where all images agree, and with ties, which count half."""
    rng = np.random.default_rng(0)
    truth, covered, widths, deviations = better + ties / 2, [], [], []
    for _ in range(1000):
        signs = rng.choice([1.0, 0.0, -1.0], number, p=[better, ties, 1 - better - ties])
        difference = signs * rng.exponential(size=number)
        paired = gapjax.paired_difference(summarize(difference), summarize(np.zeros(number)))
        low, high = paired.fraction_improved_interval
        within = abs(paired.fraction_improved - truth) <= 1.96 * paired.fraction_improved_stderr
        covered.append((low <= truth <= high, within))
        widths.append(high - low)
        deviations.append(paired.fraction_improved - truth)
    assert np.all(np.mean(covered, axis=0) > 0.925) and np.min(widths) > 0
    # Not much wider than need be: 4 deviations, or where all agree some 3 / N.
    assert np.mean(widths) < 1.5 * max(4 * np.std(deviations), 4.5 / number)


def test_the_sign_test_is_the_exact_binomial_one():
    for positive, negative in ((0, 0), (1, 0), (5, 5), (3, 12), (60, 40), (4700, 5300)):
        values = np.repeat([1.0, 0.0, -1.0], [positive, 7, negative])
        expected = (
            scipy.stats.binomtest(positive, positive + negative).pvalue
            if positive + negative
            else 1.0
        )
        for each in (values, -values):
            assert sign_test(each) == pytest.approx(expected, rel=1e-9)


def test_a_share_needs_posterior_samples(small):
    """With fewer than 100 there is none, nor a median; with more, half of them say how biased."""
    nudged = small.params._replace(encoder=jax.tree.map(lambda p: 1.01 * p, small.params.encoder))
    evaluate = lambda params, number: gapjax.evaluate(
        small.vae, params, jax.random.key(2), small.test_images, num_samples=number
    )
    few = [evaluate(params, 3) for params in (small.params, nudged)]
    many = [evaluate(params, 100) for params in (small.params, nudged)]
    for first, second in (few, (few[0], many[1]), (many[0], few[1])):
        paired = gapjax.paired_difference(first, second)
        unknown = (
            paired.median, paired.fraction_improved, paired.fraction_improved_stderr,
            *paired.fraction_improved_interval, paired.fraction_improved_bias, paired.median_bias,
            paired.sign_test,
        )  # fmt: skip
        assert np.isnan(unknown).all() and paired.stderr > 0 and paired.num_effective > 1
        assert (paired.num_samples, paired.num_images) == (3, 40)
    paired, halves = gapjax.paired_difference(*many), [evaluate(small.params, 50).per_image]
    halves.append(evaluate(nudged, 50).per_image)
    assert paired.num_samples == 100 and few[0].with_half is None
    np.testing.assert_array_equal(many[0].with_half, halves[0])
    with_half = np.subtract(*halves, dtype=np.float64)
    assert paired.median + paired.median_bias == pytest.approx(np.median(with_half), abs=1e-12)
    assert paired.fraction_improved + paired.fraction_improved_bias == pytest.approx(
        (with_half > 0).mean()
    )


def test_the_pull_of_an_image_is_the_norm_of_its_own_gradient():
    """With log p(x given z) = z the gradient of the ELBO is known: 1 - loc, eps - s + 1/s."""
    loc, scale = -0.7, 1.6
    prior = dist.Normal(jnp.zeros(1), jnp.ones(1)).to_event(1)
    encode = lambda encoder, x: dist.Normal(encoder["loc"], encoder["scale"]).to_event(1)
    vae = gapjax.VAE(None, encode, lambda decoder, z: _Reveals(z), prior)
    encoder = {"loc": jnp.full(1, loc), "scale": jnp.full(1, scale)}
    params = gapjax.VAEParams(encoder, jnp.ones(5))
    key, images = jax.random.key(0), np.zeros((23, 1), np.uint8)  # two batches and a ragged one
    nats = -math.log(2) * gapjax.evaluate(vae, params, key, images).per_image.astype(np.float64)
    kl = 0.5 * (scale**2 + loc**2 - 1) - math.log(scale)
    noise = (nats + kl - loc) / scale
    norms = encoder_gradient_norms(vae, params, key, images)
    expected = np.hypot(1 - loc, noise - scale + 1 / scale)
    np.testing.assert_allclose(norms, expected, rtol=1e-4)
    assert noise.std() > 0.3
    with pytest.raises(ValueError, match="images is empty"):
        encoder_gradient_norms(vae, params, key, images[:0])


def test_the_effective_number_of_weights():
    assert effective_number(np.full(7, 0.2)) == pytest.approx(7)
    assert effective_number(np.array([0, 0, 5.0])) == 1
    assert effective_number(np.array([1.0, 2.0])) == pytest.approx(9 / 5)
    assert effective_number(np.zeros(4)) == 4
    assert effective_number(np.full(3, 1e25, np.float32)) == pytest.approx(3)


def test_of_one_image_there_is_no_standard_error():
    one = summarize(np.array([2.0], np.float32))
    assert one.bpd == 2.0 and math.isnan(one.stderr)
    paired = gapjax.paired_difference(one, one)
    assert math.isnan(paired.stderr) and math.isnan(paired.fraction_improved_stderr)


def test_sets_of_different_sizes_cannot_be_paired():
    with pytest.raises(ValueError, match="3 and 2 images"):
        gapjax.paired_difference(summarize(np.ones(3)), summarize(np.ones(2)))


def _floats(values):
    return summarize(np.asarray(values, np.float32))


def test_gaps_by_hand():
    gaps = inference_gaps(
        test=_floats([1.0, 2.0, 3.0, 4.0]),
        optimal=_floats([0.5, 1.0, 2.5, 3.0]),  # differences 0.5 1 0.5 1
        self_consistent=_floats([0.75, 2.0, 2.75, 3.75]),  # differences 0.25 0 0.25 0.25
        control=_floats([1.0, 2.25, 2.75, 4.0]),  # minus self-consistent 0.25 0.25 0 0.25
    )
    assert gaps.inference_gap.bpd == pytest.approx(0.75)
    assert gaps.gain.bpd == pytest.approx(0.1875)
    assert gaps.gain_over_control.bpd == pytest.approx(0.1875)
    assert gaps.gap_closed == pytest.approx(0.25)
    assert gaps.inference_gap.stderr == pytest.approx(np.std([0.5, 1, 0.5, 1], ddof=1) / 2)
    assert gaps.gain.stderr == pytest.approx(0.125 / 2)
    assert gaps.gain_over_control.stderr == pytest.approx(0.125 / 2)
    # n - r d is 0.125 -0.25 0.125 0; its standard deviation over |mean d| root N.
    residual = np.std([0.125, -0.25, 0.125, 0.0], ddof=1)
    assert gaps.gap_closed_stderr == pytest.approx(residual / (0.75 * 2))


def test_signs_follow_who_is_better():
    base, better, best = _floats([2.0, 3.0]), _floats([1.5, 2.5]), _floats([1.0, 2.0])
    gaps = inference_gaps(test=base, optimal=best, self_consistent=better, control=base)
    assert gaps.inference_gap.bpd == 1.0 and gaps.gain.bpd == 0.5
    assert gaps.gain_over_control.bpd == 0.5 and gaps.gap_closed == 0.5
    worse = inference_gaps(test=better, optimal=best, self_consistent=base, control=better)
    assert worse.gain.bpd == -0.5 and worse.gain_over_control.bpd == -0.5
    assert worse.gap_closed == -1.0


def test_without_a_gap_the_share_is_not_a_number():
    same = _floats([1.0, 2.0])
    gaps = inference_gaps(same, same, _floats([0.5, 1.0]), same)
    assert np.isnan(gaps.gap_closed) and np.isnan(gaps.gap_closed_stderr)
    assert gaps.inference_gap.bpd == 0.0


def test_an_optimal_inference_that_has_not_converged_is_told_of(recwarn):
    same = [_floats([1.0, 2.0])] * 4
    assert inference_gaps(*same).converged is None
    assert inference_gaps(*same, converged=True).converged is True
    assert not recwarn.list
    with pytest.warns(UserWarning, match="has not converged: the inference gap is larger"):
        assert inference_gaps(*same, converged=False).converged is False


def test_of_one_image_the_share_has_no_error():
    one = [_floats([bpd]) for bpd in (1.0, 0.5, 0.75, 1.0)]
    gaps = inference_gaps(*one)
    assert gaps.gap_closed == 0.5 and np.isnan(gaps.gap_closed_stderr)
    assert np.isnan([gaps.gain.stderr, gaps.gain.fraction_improved_stderr]).all()


def test_gaps_of_sets_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        inference_gaps(*(_floats(np.ones(n)) for n in (3, 3, 2, 3)))


def test_the_standard_errors_cover_the_truth():
    """Over simulated test sets, 1.96 standard errors hold the true value about 19 in 20 times."""
    rng = np.random.default_rng(0)
    num_sets, num_images, true_gap, true_share = 600, 250, 0.05, 0.3
    hits = np.zeros(3)
    for _ in range(num_sets):
        image = rng.normal(0.4, 0.1, num_images)  # common to the encoders
        gap = true_gap + rng.normal(0, 0.08, num_images)
        gain = true_share * gap + rng.normal(0, 0.05, num_images)
        gaps = inference_gaps(
            _floats(image), _floats(image - gap), _floats(image - gain),
            _floats(image),
        )  # fmt: skip
        errors = (
            (gaps.gap_closed - true_share) / gaps.gap_closed_stderr,
            (gaps.inference_gap.bpd - true_gap) / gaps.inference_gap.stderr,
            (gaps.gain.bpd - true_share * true_gap) / gaps.gain.stderr,
        )
        hits += np.abs(errors) < 1.96
    assert np.all(hits / num_sets > 0.92) and np.all(hits / num_sets < 0.98)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"images": np.zeros((0, 5, 5), np.uint8)}, "images is empty"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": -3}, "batch_size -3"),
    ],
)
def test_bad_arguments_are_named(options, words):
    arguments = {"images": np.zeros((4, 5, 5), np.uint8), **options}
    with pytest.raises(ValueError, match=words):
        gapjax.evaluate(None, None, jax.random.key(0), **arguments)
