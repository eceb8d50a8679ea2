"""A distribution as real arrays, there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from gapjax.model.free import from_free, of_images, to_free


@pytest.mark.parametrize(
    "distribution",
    [
        dist.Normal(jnp.array([0.5, -1.0]), jnp.array([0.3, 2.0])).to_event(1),
        dist.Normal(0.5, 0.3).expand([2]).to_event(1),
        dist.MultivariateNormal(jnp.ones(2), scale_tril=jnp.array([[0.5, 0.0], [-0.3, 2.0]])),
        dist.MultivariateNormal(jnp.ones(2), jnp.array([[0.5, 0.2], [0.2, 1.0]])),
        dist.Gamma(jnp.array([2.0, 0.4]), jnp.array([1.0, 3.0])).to_event(1),
    ],
    ids=["normal", "expanded", "cholesky", "covariance", "gamma"],
)
def test_free_parameters_are_the_distribution(distribution):
    """There and back; and wherever an optimizer goes, a distribution comes out."""
    z = jnp.array([0.4, 0.9])
    free = to_free(distribution)
    np.testing.assert_allclose(
        from_free(distribution, free).log_prob(z), distribution.log_prob(z), rtol=1e-5
    )
    moved = from_free(distribution, [leaf - 1.5 for leaf in free])
    assert np.isfinite(moved.log_prob(z)) and moved.log_prob(z) != distribution.log_prob(z)


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (object(), "object cannot be optimised.*register_dataclass"),
        (dist.Delta(jnp.zeros(2, jnp.int32), jnp.int32(0)), "no parameter of a float type"),
        (dist.Bernoulli(0.5), "no gradient"),
    ],
    ids=["no pytree", "integers", "discrete"],
)
def test_what_has_no_free_parameters_is_refused(thing, words):
    with pytest.raises(TypeError, match=words):
        to_free(thing)


_SPELLINGS = {
    "written out": dist.Normal(jnp.full(2, 0.1), jnp.full(2, 0.5)).to_event(1),
    "broadcast": dist.Normal(jnp.full(2, 0.1), 0.5).to_event(1),
    "expanded": dist.Normal(0.1, 0.5).expand([2]).to_event(1),
    "expanded twice": dist.Normal(0.1, 0.5).expand([1]).expand([2]).to_event(1).expand([]),
    "bfloat16": dist.Normal(jnp.full(2, 0.1), jnp.full(2, 0.5, jnp.bfloat16)).to_event(1),
}


@pytest.mark.parametrize("name", _SPELLINGS)
def test_one_distribution_has_one_form(name):
    """Every entry has a scale of its own, of one type, which can be moved alone."""
    free = to_free(_SPELLINGS[name])
    assert [(leaf.shape, leaf.dtype) for leaf in free] == [((2,), jnp.float32)] * 2
    np.testing.assert_allclose(free[0], 0.1)
    np.testing.assert_allclose(jnp.exp(free[1]), 0.5, rtol=1e-6)
    moved = from_free(_SPELLINGS[name], [free[0], free[1] + jnp.array([0.0, 1.0])])
    assert moved.batch_shape == () and moved.event_shape == (2,)
    np.testing.assert_allclose(moved.variance[1], np.e**2 * moved.variance[0], rtol=1e-4)


_TRIL = jnp.array([[0.5, 0.0], [-0.3, 2.0]])


@pytest.mark.parametrize(
    "by_hand, one",
    [
        (lambda m: dist.Normal(m, jnp.ones((3, 2))).to_event(1), lambda m: dist.Normal(m, 1.0)),
        (lambda m: dist.Normal(m, 1.0).to_event(1), lambda m: dist.Normal(m, 1.0)),
        (
            lambda m: dist.Normal(0.0, 1.0).expand([3, 2]).to_event(1),
            lambda m: dist.Normal(0 * m, 1.0),
        ),
        (
            lambda m: dist.Normal(0.0, 1.0).expand([2]).to_event(1).expand([3]),
            lambda m: dist.Normal(0 * m, 1.0),
        ),
        (lambda m: dist.MultivariateNormal(m, scale_tril=_TRIL), None),
        (lambda m: dist.LogNormal(m, jnp.ones(2)).to_event(1), lambda m: dist.LogNormal(m, 1.0)),
    ],
    ids=["full", "broadcast", "expanded", "expanded again", "covariance", "transformed"],
)
def test_posteriors_made_by_hand_are_those_of_vmap(by_hand, one):
    loc, z = jnp.arange(6.0).reshape(3, 2), jnp.array([0.4, 0.9])
    made = by_hand(loc)
    expected = made.log_prob(jnp.stack([z] * 3))
    each = of_images(made, loc)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(each) if jnp.ndim(leaf)} == {3}
    np.testing.assert_allclose(jax.vmap(lambda q: q.log_prob(z))(each), expected, rtol=1e-5)
    if one is None:
        return
    by_vmap = jax.vmap(lambda m: one(m).to_event(1))(loc)
    assert of_images(by_vmap, loc) is by_vmap
    for ours, theirs in zip(*(jax.vmap(to_free)(q) for q in (each, by_vmap)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
