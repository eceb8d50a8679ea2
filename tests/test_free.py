"""A distribution as real arrays, there and back."""

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from gapjax.model.free import from_free, to_free


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
