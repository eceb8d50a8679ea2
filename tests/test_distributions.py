"""The discretized logistic: sums to 1, samples what it says, exact and finite everywhere."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from conftest import PlainNormal

from gapjax.model.distributions import DiscretizedLogistic, common_dtype, integer_range

LEVELS = [2, 17, 256]
WEIGHTS = [0.0, 2.56e-5, 0.3]  # of the uniform: none, the default of grey images, plain to see
TINY, HUGE = 1e-38, 3e38
EXTREME_LOCS = np.array([-HUGE, -1e12, -1e6, -0.5, 0.0, 0.3, 1.0, 1e6, 1e12, HUGE], np.float32)
EXTREME_SCALES = np.array([TINY, 1e-20, 1e-8, 1e-2, 1.0, 1e6, 1e20, HUGE], np.float32)


def _all_log_probs(loc, scale, levels, weight=0.0):
    """log P(k) [N, levels]; compiled once for all N up to 128."""
    loc, scale = np.broadcast_arrays(*np.atleast_1d(loc, scale))
    padding = (0, 128 - len(loc))
    loc, scale = (np.pad(a, padding, constant_values=1.0)[:, None] for a in (loc, scale))
    table = _table_of_log_probs(loc.astype(np.float32), scale.astype(np.float32), levels, weight)
    return np.asarray(table)[: 128 - padding[1]]


@functools.partial(jax.jit, static_argnames=("levels", "weight"))
def _table_of_log_probs(loc, scale, levels, weight):
    pixels = DiscretizedLogistic(loc, scale, levels, uniform_weight=weight)
    return pixels.log_prob(jnp.arange(levels)[None])


@functools.partial(jax.jit, static_argnames=("levels", "sample_shape", "weight"))
def _sample(rng_key, loc, scale, levels, sample_shape=(), weight=0.0):
    pixels = DiscretizedLogistic(loc, scale, levels, uniform_weight=weight)
    return pixels.sample(rng_key, sample_shape)


@functools.partial(jax.jit, static_argnames=("levels", "weight"))
def _values_and_gradients(loc, scale, k, levels, weight=0.0):
    def log_prob(loc, scale, k):
        return DiscretizedLogistic(loc, scale, levels, uniform_weight=weight).log_prob(k)

    return jax.vmap(jax.value_and_grad(log_prob, argnums=(0, 1)))(loc, scale, k)


def _scipy_log_probs(loc, scale, levels, weight=0.0):
    """log P(k) in float64 from the CDF, each difference taken in the tail where it is exact."""
    loc, scale = (np.asarray(a, np.float64)[..., None] for a in (loc, scale))
    ks = np.arange(levels)
    logistic = scipy.stats.logistic(loc * (levels - 1), scale * (levels - 1))
    lower, upper = ks - 0.5, ks + 0.5
    right_half = ks > loc * (levels - 1)  # above the centre subtract survival functions
    with np.errstate(divide="ignore", invalid="ignore"):
        big = np.where(right_half, logistic.logsf(lower), logistic.logcdf(upper))
        little = np.where(right_half, logistic.logsf(upper), logistic.logcdf(lower))
        interior = big + np.log(-np.expm1(little - big))
    ends = np.where(ks == 0, logistic.logcdf(upper), logistic.logsf(lower))
    logistic = np.where((ks == 0) | (ks == levels - 1), ends, interior)
    if weight == 0:
        return logistic
    return np.log((1 - weight) * np.exp(logistic) + weight / levels)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("levels", LEVELS)
def test_probabilities_sum_to_one(levels, weight):
    rng = np.random.default_rng(levels)
    loc = np.concatenate([rng.uniform(-0.3, 1.3, 100), [-1e6, 1e6, -1e6, 1e6, 0, 0.5, 1] * 4])
    scale = np.concatenate(
        [10 ** rng.uniform(-4, 2, 100), np.repeat([1e-8, 1e-3, 1.0, 1e6], 7)]
    )  # fmt: skip
    total = np.exp(_all_log_probs(loc, scale, levels, weight).astype(np.float64)).sum(-1)
    np.testing.assert_allclose(total, 1.0, atol=2e-5)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("levels", LEVELS)
def test_agrees_with_scipy_in_float64(levels, weight):
    rng = np.random.default_rng(levels)
    loc = np.concatenate([rng.uniform(-0.3, 1.3, 60), [-2.0, 3.0, 0.0, 1.0]])
    scale = np.concatenate([10 ** rng.uniform(-2.5, 1, 60), [0.02, 0.02, 0.1, 5.0]])
    loc, scale = loc.astype(np.float32), scale.astype(np.float32)
    ours = _all_log_probs(loc, scale, levels, weight)
    exact = _scipy_log_probs(loc, scale, levels, weight)
    assert _scipy_log_probs(loc, scale, levels).min() < -50  # far tails are among them
    assert weight == 0 or exact.min() >= np.log(weight / levels)
    # An error of one float32 rounding in (k - loc) / scale moves log P by as much.
    rounding = 1e-6 * (1 + (np.abs(loc) + 1) / scale)[:, None]
    assert np.all(np.abs(ours - exact) <= rounding + 2e-6 * np.abs(exact))


@pytest.mark.parametrize("weight", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("loc, scale", [(0.45, 0.08), (0.02, 0.1), (1.1, 0.3), (-4.0, 0.02)])
def test_samples_follow_the_probabilities(levels, loc, scale, weight):
    num_samples = 20_000
    samples = _sample(jax.random.key(levels), loc, scale, levels, (num_samples,), weight)
    samples = np.asarray(samples)
    assert samples.dtype == np.int32
    assert samples.min() >= 0 and samples.max() <= levels - 1
    log_probs = _all_log_probs(loc, scale, levels, weight)[0].astype(np.float64)
    expected = num_samples * np.exp(log_probs)
    observed = np.bincount(samples, minlength=levels)
    # Bins that expect few are pooled, except the end bins, which are always looked at.
    rare = expected < 10
    rare[[0, -1]] = False
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    kept = expected > 1e-3
    assert observed[~kept].sum() == 0
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    degrees = max(kept.sum() - 1, 1)
    assert scipy.stats.chi2.sf(statistic, degrees) > 1e-4


def test_the_uniform_of_grey_images_is_sampled_as_often_as_it_weighs():
    """A distribution at level 0 alone: every other level is the uniform's, and each as often."""
    weight, num_samples = 2.56e-5, 2**24
    samples = _sample(jax.random.key(0), -4.0, 0.02, 16, (num_samples,), weight)
    counts = np.bincount(samples, minlength=16)[1:]
    expected = num_samples * weight / 16
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert 1e-4 < scipy.stats.chi2.cdf(statistic, 15) < 1 - 1e-4


def test_a_weight_of_zero_is_the_limit_of_small_ones():
    """The two ways of computing log P agree where the uniform adds nothing that can be seen."""
    loc, scale = np.array([-0.2, 0.4, 0.5, 1.1]), np.array([0.5, 0.03, 2.0, 0.1])
    none, least = _all_log_probs(loc, scale, 256), _all_log_probs(loc, scale, 256, 1e-30)
    np.testing.assert_allclose(least[none > -60], none[none > -60], rtol=1e-5, atol=1e-6)
    key = jax.random.key(0)
    np.testing.assert_array_equal(
        _sample(key, loc, scale, 256, (100, 4), 1e-30), _sample(key, loc, scale, 256, (100, 4))
    )


def test_bins_are_centred_on_their_levels():
    """A narrow distribution at level k/(K-1) gives k, and one between two levels gives both."""
    levels = 17
    on = np.arange(levels) / (levels - 1)
    np.testing.assert_allclose(np.exp(np.diag(_all_log_probs(on, 1e-4, levels))), 1.0, atol=1e-5)
    half = _all_log_probs((np.arange(levels - 1) + 0.5) / (levels - 1), 1e-4, levels)
    np.testing.assert_allclose(np.exp(np.diagonal(half)), 0.5, atol=2e-3)
    np.testing.assert_allclose(np.exp(np.diagonal(half, 1)), 0.5, atol=2e-3)
    draw = _sample(jax.random.key(0), jnp.asarray(on), jnp.full(levels, 1e-4), levels, (50,))
    np.testing.assert_array_equal(draw, np.broadcast_to(np.arange(levels), (50, levels)))


@pytest.mark.parametrize("weight", [0.0, 1e-30, 2.56e-5, 1.0])
@pytest.mark.parametrize("levels", [*LEVELS, 65_536])
def test_values_and_gradients_are_finite_at_extreme_parameters(levels, weight):
    ks = np.unique([0, 1, levels // 2, levels - 2, levels - 1])
    # The worst gradients are just inside the clips, which are in units of one bin.
    edge_locs = np.float32(1e12 / (levels - 1)) * np.array([-1, -0.999, 0.999, 1], np.float32)
    edge_scales = np.float32(1 / (levels - 1)) * np.array([1e-12, 1.001e-12, 1e12], np.float32)
    loc, scale, k = (
        jnp.asarray(a.ravel())
        for a in np.meshgrid(
            np.concatenate([EXTREME_LOCS, edge_locs]),
            np.concatenate([EXTREME_SCALES, edge_scales]),
            ks.astype(np.float32),
        )
    )
    values, gradients = _values_and_gradients(loc, scale, k, levels, weight)
    chex.assert_tree_all_finite((values, gradients))
    assert np.all(values <= 0)
    samples = _sample(jax.random.key(0), loc, scale, levels, (), weight)
    assert samples.min() >= 0 and samples.max() <= levels - 1


@pytest.mark.parametrize("weight", WEIGHTS)
def test_gradient_agrees_with_finite_differences(weight):
    """In every bin, far on either side of the centre and in it, for narrow and wide scales."""
    levels, step = 17, 1e-6
    rng = np.random.default_rng(0)
    loc, scale = rng.uniform(-0.3, 1.3, (40, 1)), 10 ** rng.uniform(-2, 1, (40, 1))
    loc, scale, k = (a.ravel() for a in np.broadcast_arrays(loc, scale, np.arange(levels)))
    of = lambda loc, scale: _scipy_log_probs(loc, scale, levels, weight)[np.arange(len(k)), k]
    by_loc = (of(loc + step, scale) - of(loc - step, scale)) / (2 * step)
    by_scale = (of(loc, scale + step) - of(loc, scale - step)) / (2 * step)
    _, gradients = _values_and_gradients(loc, scale, k.astype(np.float32), levels, weight)
    np.testing.assert_allclose(gradients[0], by_loc, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(gradients[1], by_scale, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_second_derivatives_agree_with_finite_differences(weight):
    """The derivatives are given in closed form, and are themselves differentiated."""
    levels, step = 17, 1e-4
    rng = np.random.default_rng(1)
    loc, scale = rng.uniform(-0.3, 1.3, (20, 1)), 10 ** rng.uniform(-1, 0, (20, 1))
    loc, scale, k = (a.ravel() for a in np.broadcast_arrays(loc, scale, np.arange(levels)))
    of = lambda i, j: _scipy_log_probs(loc + i * step, scale + j * step, levels, weight)[
        np.arange(len(k)), k
    ]
    by_loc = (of(1, 0) - 2 * of(0, 0) + of(-1, 0)) / step**2
    by_scale = (of(0, 1) - 2 * of(0, 0) + of(0, -1)) / step**2
    by_both = (of(1, 1) - of(1, -1) - of(-1, 1) + of(-1, -1)) / (4 * step**2)

    def log_prob(loc, scale, k):
        return DiscretizedLogistic(loc, scale, levels, uniform_weight=weight).log_prob(k)

    hessian = jax.jit(jax.vmap(jax.hessian(log_prob, argnums=(0, 1))))(loc, scale, k * 1.0)
    np.testing.assert_allclose(hessian[0][0], by_loc, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(hessian[1][1], by_scale, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(hessian[0][1], by_both, rtol=2e-3, atol=2e-3)


def test_gradient_by_the_value_is_minus_that_by_the_mean():
    of = lambda value, loc: DiscretizedLogistic(loc, 0.1, 17).log_prob(value)
    by_value, by_loc = jax.grad(of, argnums=(0, 1))(6.0, 0.4)
    np.testing.assert_allclose(by_value, -by_loc / 16, rtol=1e-6)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("levels", LEVELS)
def test_mean_is_the_sum_over_levels(levels, weight):
    loc = np.array([-1e6, -0.2, 0.0, 0.3, 0.5, 0.9, 1.4, 1e6, 0.3, 0.3])
    scale = np.array([1.0, 0.1, 0.01, 0.2, 3.0, 1e-8, 0.1, 1e-8, 1e6, 1e-3])
    probabilities = np.exp(_all_log_probs(loc, scale, levels, weight).astype(np.float64))
    mean_of = lambda *given: DiscretizedLogistic(*given, levels, uniform_weight=weight).mean
    mean = jax.jit(mean_of)(loc, scale)
    expected = probabilities @ np.arange(levels)
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("levels, weight", [(2, 0.0), (17, 0.02), (256, 0.0)])
def test_an_interval_has_the_sum_of_its_levels(levels, weight):
    loc, scale = np.meshgrid([-0.3, 0.0, 0.1, 0.52, 0.999, 1.2], [0.0009, 0.004, 0.03, 0.4])
    loc, scale = loc.ravel().astype(np.float32), scale.ravel().astype(np.float32)
    probs = np.exp(_all_log_probs(loc, scale, levels, weight).astype(np.float64))
    pixels = DiscretizedLogistic(jnp.asarray(loc), scale, levels, uniform_weight=weight)
    ends = np.array([(0, levels - 1), (0, 0), (levels // 3, levels // 2), (1, levels - 1)])
    between = jax.jit(jax.vmap(pixels.log_prob_between))(*ends.T)
    for (first, last), found in zip(ends, np.exp(np.asarray(between, np.float64)), strict=True):
        expected = probs[:, first : last + 1].sum(-1)
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-30)


@pytest.mark.parametrize("levels", [1, 0, -3])
def test_fewer_than_two_levels_are_refused(levels):
    with pytest.raises(ValueError, match=f"levels is {levels}"):
        DiscretizedLogistic(0.0, 1.0, levels)


@pytest.mark.parametrize("weight", [-0.1, 1.1, 1e-31, float("nan")])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ValueError, match=f"uniform_weight is {weight}"):
        DiscretizedLogistic(0.0, 1.0, 17, uniform_weight=weight)


class TransformedTest(chex.TestCase):
    """Inside jit, vmap and `to_event` it is the same distribution."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_to_event_sums_over_pixels(self):
        loc, scale = jnp.linspace(0.1, 0.9, 6).reshape(2, 3), jnp.full((2, 3), 0.1)
        x = jnp.arange(6, dtype=jnp.uint8).reshape(2, 3)
        pixels = DiscretizedLogistic(loc, scale, 17)

        @self.variant
        def of_image(loc, scale, x, rng_key):
            image = DiscretizedLogistic(loc, scale, 17).to_event(2)
            return image.log_prob(x), image.sample(rng_key), image.mean

        log_prob, sample, mean = of_image(loc, scale, x, jax.random.key(0))
        chex.assert_shape(log_prob, ())
        np.testing.assert_allclose(log_prob, pixels.log_prob(x).sum(), rtol=1e-5)
        chex.assert_shape([sample, mean], (2, 3))
        np.testing.assert_allclose(mean, pixels.mean, rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_a_batch_is_its_examples(self):
        locs, scales = np.linspace(-0.5, 1.5, 5), np.linspace(0.01, 2.0, 5)
        log_prob = lambda loc, scale: DiscretizedLogistic(loc, scale, 17).log_prob(4)
        batched = self.variant(jax.vmap(log_prob))(locs, scales)
        np.testing.assert_allclose(batched, _all_log_probs(locs, scales, 17)[:, 4], rtol=1e-5)

    def test_it_passes_through_vmap_as_a_pytree(self):
        make = jax.vmap(lambda loc: DiscretizedLogistic(loc, 0.1, 17, uniform_weight=0.3))
        distributions = make(jnp.array([0.1, 0.9]))
        means = jax.vmap(lambda one: one.mean)(distributions)
        locs = jnp.array([0.1, 0.9])
        expected = DiscretizedLogistic(locs, 0.1, 17, uniform_weight=0.3).mean
        np.testing.assert_allclose(means, expected, rtol=1e-6)


# --- the values of a likelihood, and the dtypes that hold them ------------------------------------


@pytest.mark.parametrize(
    "distribution, expected",
    [
        (dist.Bernoulli(logits=jnp.zeros(3)).to_event(1), (0, 1)),
        (DiscretizedLogistic(jnp.zeros((2, 3)), 0.1, 17).to_event(2), (0, 16)),
        (dist.Categorical(logits=jnp.zeros(5)).expand([2]).to_event(1), (0, 4)),
        (dist.Poisson(3.0), None),
        (dist.Normal(jnp.zeros(3), 1.0).to_event(1), None),
        (dist.Uniform(0.0, 1.0), None),
        (PlainNormal(2), None),
    ],
    ids=lambda each: type(each).__name__,
)
def test_levels_are_known_where_the_support_says_them(distribution, expected):
    assert integer_range(distribution) == expected


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ("uint8", "uint8", "uint8"),
        ("bool", "uint8", "uint8"),
        ("uint8", "int8", "int16"),
        ("uint16", "int16", "int32"),
        ("uint8", "float16", "float32"),
        ("int32", "bfloat16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "bfloat16", "float32"),
        ("int32", "float32", "float32"),
    ],
)
def test_a_dtype_holds_the_values_of_two(first, second, expected):
    for pair in ((first, second), (second, first)):
        assert common_dtype(*map(jnp.dtype, pair)) == jnp.dtype(expected)
