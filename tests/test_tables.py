"""The tables of levels that the codec codes with are the probabilities of the likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from gapjax.codec import tables
from gapjax.model.distributions import DiscretizedLogistic

_LOC = np.array([-0.3, 0.0, 0.1, 0.52, 0.999, 1.2], np.float32)[:, None]
_SCALE = np.array([0.0009, 0.004, 0.03, 0.4], np.float32)


def _logistic(levels, uniform_weight):
    return DiscretizedLogistic(
        *map(jnp.asarray, (_LOC, _SCALE)), levels, uniform_weight=uniform_weight
    )


def _level_probs(likelihood):
    levels = jnp.arange(tables.num_levels(likelihood))
    return np.exp(np.asarray(jax.jit(jax.vmap(likelihood.log_prob))(_filled(levels)), np.float64))


def _filled(levels):
    return jnp.broadcast_to(levels[:, None, None], (len(levels), 6, 4))


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_two_tables_give_every_level_its_probability(levels):
    """What the codec codes with is what the ELBO is computed from."""
    likelihood = _logistic(levels, 256e-7)
    size = tables.block_size(levels)

    @jax.jit
    def both(blocks):
        within = lambda block: tables.level_probs(likelihood, jnp.full((6, 4), block))
        return tables.block_probs(likelihood), jax.vmap(within)(blocks)

    blocks, within = (np.asarray(x, np.float64) for x in both(jnp.arange(-(-levels // size))))
    found = np.moveaxis(np.moveaxis(blocks, -1, 0)[..., None] * within, -1, 1).reshape(-1, 6, 4)
    np.testing.assert_allclose(found[:levels], _level_probs(likelihood), rtol=2e-4)
    np.testing.assert_array_equal(found[levels:], 0.0)


def test_the_tables_of_a_bernoulli_are_exact_in_both_tails():
    logits = jnp.array([[-15.0, 0.3, 15.0]])
    for likelihood in (
        dist.Bernoulli(logits=logits).to_event(2),
        dist.Bernoulli(probs=jax.nn.sigmoid(logits)).to_event(2),
    ):
        table = np.asarray(tables.block_probs(likelihood))
        assert table.shape == (1, 3, 2) and tables.block_size(2) == 1
        np.testing.assert_allclose(table[0, :2, 1], jax.nn.sigmoid(logits)[0, :2], rtol=1e-5)
        np.testing.assert_allclose(table.sum(-1), 1.0, rtol=1e-6)


def test_other_families_are_refused_by_name():
    with pytest.raises(TypeError, match="Poisson"):
        tables.num_levels(dist.Poisson(jnp.ones(3)).to_event(1))
