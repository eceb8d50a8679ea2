"""`model/chain`: a linear Gaussian hierarchy, whose log p(x) and posterior are known exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from conftest import random_params
from jax.tree_util import Partial

import gapjax
from gapjax import VAE, VAEParams, elbo, importance_weighted_bound
from gapjax.measure.bounds import per_image_bounds, posterior_bounds
from gapjax.model.bounds import divergence
from gapjax.model.chain import Chain
from gapjax.models.hierarchy import hierarchical_vae
from gapjax.vae import sample_model

# z2 ~ N(0, 1), z1 ~ N(A z2, S1^2), x ~ N(B z1, SX^2); one number each.
A, B, S1, SX = 1.2, 0.8, 0.6, 0.5
_VARIANCES = np.array([[1.0, A, A * B], [A, A**2 + S1**2, B * (A**2 + S1**2)], [0, 0, 0]])
_VARIANCES[2] = [*_VARIANCES[:2, 2], B**2 * (A**2 + S1**2) + SX**2]  # of (z2, z1, x)


def _normal(loc, scale):
    return dist.Normal(jnp.reshape(loc, (1,)), scale).to_event(1)


def _from(name, slope, scale, offset, latents):
    return _normal(slope * latents[name][0] + offset, scale)


def _given(target, known):
    """Slopes [K] and standard deviation of one Gaussian variable given others, by their numbers."""
    of_known = _VARIANCES[np.ix_(known, known)]
    slopes = np.linalg.solve(of_known, _VARIANCES[known, target])
    return slopes, np.sqrt(_VARIANCES[target, target] - slopes @ _VARIANCES[known, target])


_PRIOR = Chain({"z2": _normal(0.0, 1.0), "z1": Partial(_from, "z2", A, S1, 0.0)})


def _decode(params, z):
    return _normal(B * z["z1"][0], SX)


def _exact_posterior(order, params, x):
    numbers = {"z2": 0, "z1": 1}
    first, second = order
    (slope,), scale = _given(numbers[first], [2])
    (by_x, by_first), below = _given(numbers[second], [2, numbers[first]])
    link = functools.partial(_from, first, by_first, below, by_x * x[0])
    return Chain({first: _normal(slope * x[0], scale), second: link})


def _log_prob(x):
    variance = _VARIANCES[2, 2]
    return -0.5 * (x[0] ** 2 / variance + np.log(2 * np.pi * variance))


def _model(order):
    encode = functools.partial(_exact_posterior, order)
    return VAE(lambda rng_key: VAEParams({}, {}), encode, _decode, _PRIOR)


@pytest.mark.parametrize("order", [("z2", "z1"), ("z1", "z2")])
def test_the_exact_posterior_in_either_order_gives_log_p(order):
    x = jnp.array([0.7])
    one = lambda key: importance_weighted_bound(_model(order), VAEParams({}, {}), key, x, 1)
    values = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 20))
    np.testing.assert_allclose(values, _log_prob(x), atol=2e-5)


def test_a_kl_that_is_known_link_by_link_has_no_noise():
    """The links below agree, so that the KL is that of the first alone."""
    first = _normal(0.5, 0.7)
    q = Chain({**_PRIOR.links, "z2": first})
    keys = jax.random.split(jax.random.key(7), 5)
    found = jax.vmap(lambda key: divergence(q, _PRIOR, key))(keys)
    known = np.log(1 / 0.7) + (0.7**2 + 0.5**2 - 1) / 2
    np.testing.assert_allclose(found, known, rtol=1e-5)


def test_the_elbo_by_link_is_unbiased():
    x = jnp.array([-1.1])
    keys = jax.random.split(jax.random.key(1), 4000)
    wide = lambda params, x: Chain({"z2": _normal(0.3, 0.9), "z1": Partial(_from, "z2", 1, 0.4, x)})
    by_link = VAE(lambda rng_key: VAEParams({}, {}), wide, _decode, _PRIOR)

    def value(vae, bound, key):
        return bound(vae, VAEParams({}, {}), key, x)

    by_sample = functools.partial(importance_weighted_bound, num_samples=1)
    links = jax.jit(jax.vmap(functools.partial(value, by_link, elbo)))(keys)
    samples = jax.jit(jax.vmap(functools.partial(value, by_link, by_sample)))(keys)
    error = np.hypot(links.std(), samples.std()) / np.sqrt(len(keys))
    assert abs(links.mean() - samples.mean()) < 4.5 * error
    assert links.mean() < _log_prob(x)


def test_a_chain_is_a_distribution_and_a_pytree():
    assert _PRIOR.event_shape == {"z2": (1,), "z1": (1,)}
    assert _PRIOR.has_rsample
    draws = jax.vmap(_PRIOR.sample)(jax.random.split(jax.random.key(2), 20_000))
    both = np.concatenate([draws["z2"], draws["z1"]], 1)
    np.testing.assert_allclose(np.cov(both.T), _VARIANCES[:2, :2], atol=0.06)
    z, log_prob = _PRIOR.sample_and_log_prob(jax.random.key(3))
    np.testing.assert_allclose(log_prob, _PRIOR.log_prob(z), rtol=1e-6)
    leaves, treedef = jax.tree.flatten(_PRIOR)
    again = jax.tree.unflatten(treedef, leaves)
    assert list(again.links) == ["z2", "z1"]
    with pytest.raises(ValueError, match="links is empty"):
        Chain({})


def test_annealing_takes_latents_in_layers():
    x = np.array([[0.7], [-2.0]], np.float32)
    annealing = gapjax.Annealing(num_temperatures=30, num_chains=16)
    vae = _model(("z2", "z1"))._replace(encode=lambda params, x: _PRIOR)
    found = gapjax.log_likelihood(
        vae, VAEParams({}, {}), jax.random.key(4), x, method=annealing, batch_size=2
    )
    np.testing.assert_allclose(found.log_prob, [float(_log_prob(one)) for one in x], atol=0.3)


def test_samples_of_the_model_have_the_marginal_variance():
    keys = jax.random.split(jax.random.key(5), 20_000)
    draws = jax.vmap(lambda key: sample_model(_model(("z2", "z1")), {}, key))(keys)
    np.testing.assert_allclose(np.var(draws), _VARIANCES[2, 2], rtol=0.05)


def test_posteriors_of_images_hold_the_weights_that_all_share_once():
    vae = hierarchical_vae((2, 2), latent_dims=(2, 1), hidden_sizes=(3,), form="top_down")
    params = random_params(vae)
    images = np.random.default_rng(0).integers(0, 2, (5, 2, 2), np.uint8)
    key = jax.random.key(0)
    encoders = np.asarray(per_image_bounds(vae, params, key, images))
    adam = gapjax.Refiner("adam", num_steps=0)
    refined = gapjax.refine(vae, params, key, images, adam, batch_size=5)
    search = gapjax.PosteriorSearch(2, max_rounds=1, num_heldout=50, steps_per_round=20)
    found = gapjax.best_posteriors(vae, params, key, images, refiner=adam, search=search)
    for posteriors in (refined.posteriors, found.posteriors):
        link = posteriors.links["z1"]
        assert link.features.shape == (5, 64)
        jax.tree.map(np.testing.assert_array_equal, link.weights.params, params.encoder["links"][0])
    nats = lambda q: posterior_bounds(vae, params, key, images, q, num_samples=1)
    np.testing.assert_allclose(nats(refined.posteriors), encoders, rtol=1e-5)
    assert nats(found.posteriors).mean() > encoders.mean()
    log_prob = gapjax.log_likelihood(
        vae, params, key, images, posteriors=found.posteriors, num_samples=200
    ).log_prob
    assert log_prob.mean() > nats(found.posteriors).mean()
