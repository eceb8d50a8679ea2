"""What the Newton steps and the codec know of each family: Fisher information, levels' tables."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from gapjax import DiscretizedLogistic
from gapjax.model import families

_LOC = np.array([-0.3, 0.0, 0.1, 0.52, 0.999, 1.2], np.float32)[:, None]
_SCALE = np.array([0.0009, 0.004, 0.03, 0.4], np.float32)


def _logistic(levels, uniform_weight):
    return DiscretizedLogistic(
        *map(jnp.asarray, (_LOC, _SCALE)), levels, uniform_weight=uniform_weight
    )


def _level_probs(likelihood):
    levels = jnp.arange(families.num_levels(likelihood))
    return np.exp(np.asarray(jax.jit(jax.vmap(likelihood.log_prob))(_filled(levels)), np.float64))


def _filled(levels):
    return jnp.broadcast_to(levels[:, None, None], (len(levels), 6, 4))


@pytest.mark.parametrize("levels, uniform_weight", [(2, 0.0), (17, 0.02), (256, 0.0)])
def test_an_interval_has_the_sum_of_its_levels(levels, uniform_weight):
    likelihood = _logistic(levels, uniform_weight)
    probs = _level_probs(likelihood)
    ends = np.array([(0, levels - 1), (0, 0), (levels // 3, levels // 2), (1, levels - 1)])
    between = jax.jit(jax.vmap(likelihood.log_prob_between))(*ends.T)
    for (first, last), found in zip(ends, np.exp(np.asarray(between, np.float64)), strict=True):
        np.testing.assert_allclose(found, probs[first : last + 1].sum(0), rtol=2e-4, atol=1e-30)


@pytest.mark.parametrize("levels, least", [(11, 1.0), (256, 0.85)])
def test_the_information_is_the_variance_of_the_score(levels, least):
    """Summed over all levels in float64; that of the cells is no more, and not much less."""
    likelihood = _logistic(levels, 256e-7)
    bins = levels - 1
    loc, scale = np.broadcast_arrays(np.float64(_LOC) * bins, np.float64(_SCALE) * bins)

    def log_prob(loc, scale):
        scaled = DiscretizedLogistic(loc / bins, scale / bins, levels, uniform_weight=256e-7)
        return jax.vmap(scaled.log_prob)(_filled(jnp.arange(levels)))

    arguments = jnp.asarray(loc, jnp.float32), jnp.asarray(scale, jnp.float32)
    ones, zeros = jnp.ones(loc.shape), jnp.zeros(loc.shape)
    by_loc, by_scale = (
        np.asarray(jax.jit(lambda t: jax.jvp(log_prob, arguments, t)[1])(tangents), np.float64)
        for tangents in ((ones, zeros), (zeros, ones))
    )
    probs = _level_probs(likelihood)
    found = np.asarray(jax.jit(families.information)(likelihood).fisher)
    for (i, j), exact in {
        (0, 0): probs * by_loc**2, (1, 1): probs * by_scale**2, (0, 1): probs * by_loc * by_scale
    }.items():  # fmt: skip
        exact = exact.sum(0)
        np.testing.assert_array_equal(found[i, j], found[j, i])
        if i == j:
            tiny = 1e-5 * np.max(exact)
            assert np.all(found[i, j] <= exact * 1.001 + tiny)
            least_here = least if i == 0 else least - 0.3 * (levels > 12)
            assert np.all(found[i, j] >= exact * (least_here - 1e-3) - tiny)


@pytest.mark.parametrize("uniform_weight", [0.0, 256e-7])
def test_the_information_is_finite_where_a_decoder_is_certain(uniform_weight):
    likelihood = DiscretizedLogistic(
        jnp.array([-1e6, 0.0, 1.0, 1e6]), jnp.array([1e-9, 1e-6, 1e9, 1.0]),
        uniform_weight=uniform_weight,
    )  # fmt: skip
    assert np.isfinite(jax.jit(families.information)(likelihood).fisher).all()


def test_the_information_of_a_bernoulli_and_of_a_normal():
    logits = jnp.array([-2.0, 0.0, 40.0])
    by_logits = families.information(dist.Bernoulli(logits=logits).to_event(1))
    probs = np.asarray(jax.nn.sigmoid(logits))
    np.testing.assert_allclose(by_logits.fisher[0, 0], probs * (1 - probs), atol=1e-7)
    by_probs = families.information(dist.Bernoulli(probs=jnp.asarray([0.5, 0.1])))
    np.testing.assert_allclose(by_probs.fisher[0, 0], [4.0, 1 / 0.09], rtol=1e-6)
    normal = families.information(dist.Normal(jnp.zeros(2), jnp.array([0.5, 2.0])).to_event(1))
    np.testing.assert_allclose(normal.fisher[0, 0], [4.0, 0.25])
    np.testing.assert_allclose(normal.fisher[1, 1], [8.0, 0.5])
    np.testing.assert_allclose(normal.fisher[0, 1], 0.0)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_two_tables_give_every_level_its_probability(levels):
    """What the codec codes with is what the ELBO is computed from."""
    likelihood = _logistic(levels, 256e-7)
    size = families.block_size(levels)

    @jax.jit
    def tables(blocks):
        within = lambda block: families.level_probs(likelihood, jnp.full((6, 4), block))
        return families.block_probs(likelihood), jax.vmap(within)(blocks)

    blocks, within = (np.asarray(x, np.float64) for x in tables(jnp.arange(-(-levels // size))))
    found = np.moveaxis(np.moveaxis(blocks, -1, 0)[..., None] * within, -1, 1).reshape(-1, 6, 4)
    np.testing.assert_allclose(found[:levels], _level_probs(likelihood), rtol=2e-4)
    np.testing.assert_array_equal(found[levels:], 0.0)


def test_the_tables_of_a_bernoulli_are_exact_in_both_tails():
    logits = jnp.array([[-15.0, 0.3, 15.0]])
    for likelihood in (
        dist.Bernoulli(logits=logits).to_event(2),
        dist.Bernoulli(probs=jax.nn.sigmoid(logits)).to_event(2),
    ):
        table = np.asarray(families.block_probs(likelihood))
        assert table.shape == (1, 3, 2) and families.block_size(2) == 1
        np.testing.assert_allclose(table[0, :2, 1], jax.nn.sigmoid(logits)[0, :2], rtol=1e-5)
        np.testing.assert_allclose(table.sum(-1), 1.0, rtol=1e-6)


def test_other_families_are_refused_by_name():
    poisson = dist.Poisson(jnp.ones(3)).to_event(1)
    for function in (families.information, families.num_levels):
        with pytest.raises(TypeError, match="Poisson"):
            function(poisson)
    with pytest.raises(TypeError, match="the prior is MultivariateNormal with event shape"):
        families.diagonal_normal(dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)), "the prior")
    with pytest.raises(TypeError, match="the posterior is Normal with event shape"):
        families.diagonal_normal(dist.Normal(0.0, 1.0), "the posterior")
