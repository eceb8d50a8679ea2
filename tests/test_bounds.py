"""`model/bounds`: log p(x) where that is known, and less by what is known to be missing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import gapjax
from gapjax import VAE, VAEParams, elbo, importance_weighted_bound


def _draws(bound, vae, params, images, num_samples, seed=0, repeats=300):
    """The bound of every image with fresh noise [repeats, N], float64."""
    keys = jax.random.split(jax.random.key(seed), (repeats, len(images)))
    return np.asarray(_compiled_draws(bound, vae, params, keys, images, num_samples), np.float64)


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def _compiled_draws(bound, vae, params, keys, images, num_samples):
    over_images = jax.vmap(lambda key, x: bound(vae, params, key, x, num_samples))
    return jax.vmap(over_images, (0, None))(keys, images)


def _agree(first, second, first_stderr, second_stderr=0.0):
    """Means that agree within 4.5 standard errors, everywhere."""
    return np.all(np.abs(first - second) < 4.5 * np.hypot(first_stderr, second_stderr))


def _stderr(draws):
    return draws.std(0) / np.sqrt(len(draws))


def _constant_vae(posterior, prior):
    """A VAE whose posterior is given and whose likelihood is 1: its ELBO is minus the KL."""
    nothing = dist.Normal(0.0, 1.0).expand([1]).to_event(1)
    decode = lambda decoder, z: nothing
    return VAE(lambda rng_key: None, lambda encoder, x: posterior, decode, prior)


@pytest.mark.parametrize("bound", [elbo, importance_weighted_bound])
def test_the_bounds_are_scalars_of_one_example(bound):
    vae = gapjax.mlp_vae((2, 2), latent_dim=2, hidden_sizes=(3,))
    params = jax.eval_shape(vae.init, jax.random.key(0))
    of_one = lambda params, rng_key, x: bound(vae, params, rng_key, x, 3)
    value = jax.eval_shape(of_one, params, jax.random.key(1), jnp.ones((2, 2), jnp.uint8))
    assert (value.shape, value.dtype) == ((), jnp.float32)


def test_analytic_kl_agrees_with_monte_carlo():
    posterior = dist.Normal(jnp.array([0.5, -1.0]), jnp.array([0.3, 1.5])).to_event(1)
    prior = dist.Normal(jnp.zeros(2), 2.0 * jnp.ones(2)).to_event(1)
    # The likelihood is constant, so ELBO - log p(x given z) is minus the KL, with no noise in it.
    vae, x = _constant_vae(posterior, prior), jnp.zeros(1)
    log_likelihood = -0.5 * math.log(2 * math.pi)
    kl = [
        log_likelihood - float(elbo(vae, VAEParams(0, 0), jax.random.key(seed), x))
        for seed in (0, 1)
    ]
    assert kl[0] == kl[1]
    z = jax.vmap(posterior.sample)(jax.random.split(jax.random.key(2), 20_000))
    terms = np.asarray(jax.vmap(lambda z: posterior.log_prob(z) - prior.log_prob(z))(z))
    assert _agree(terms.mean(), kl[0], _stderr(terms))


def test_without_an_analytic_kl_the_expectation_is_the_same(linear):
    """NumPyro has no KL for the plain prior: it is then estimated on the samples of z."""
    analytic = _draws(elbo, linear.vae, linear.wrong, linear.images, 1)
    estimated = _draws(elbo, linear.monte_carlo_vae, linear.wrong, linear.images, 1, seed=1)
    assert _agree(analytic.mean(0), estimated.mean(0), _stderr(analytic), _stderr(estimated))
    assert not np.allclose(analytic.std(0), estimated.std(0), rtol=0.1)  # another estimator


@pytest.mark.parametrize("num_samples", [1, 3])
def test_elbo_at_the_exact_posterior_is_log_p_for_every_draw(linear, num_samples):
    values = _draws(elbo, linear.monte_carlo_vae, linear.exact, linear.images, num_samples)
    expected = np.broadcast_to(linear.log_prob(linear.images), values.shape)
    np.testing.assert_allclose(values, expected, atol=3e-4)


def test_elbo_at_the_exact_posterior_is_log_p_on_average(linear):
    """The KL of this one is analytic, so its draws scatter around log p(x)."""
    values = _draws(elbo, linear.vae, linear.exact, linear.images, 1)
    assert _agree(values.mean(0), linear.log_prob(linear.images), _stderr(values))
    assert values.std(0).min() > 0.1


def test_elbo_falls_short_of_log_p_by_the_kl_of_the_posteriors(linear):
    x = linear.images
    of = lambda params: jax.vmap(lambda x: linear.vae.encode(params.encoder, x).base_dist)(x)
    wrong, exact = of(linear.wrong), of(linear.exact)
    ratio = (wrong.scale / exact.scale) ** 2
    shift = ((wrong.loc - exact.loc) / exact.scale) ** 2
    missing = 0.5 * np.asarray(ratio + shift - 1 - jnp.log(ratio)).sum(-1)
    values = _draws(elbo, linear.vae, linear.wrong, x, 1)
    assert _agree(values.mean(0), linear.log_prob(x) - missing, _stderr(values))


def test_more_samples_average_the_elbo_and_do_not_move_it(linear):
    one = _draws(elbo, linear.vae, linear.wrong, linear.images, 1)
    many = _draws(elbo, linear.vae, linear.wrong, linear.images, 16, seed=1)
    np.testing.assert_allclose(many.var(0).mean() * 16 / one.var(0).mean(), 1.0, rtol=0.15)
    assert _agree(one.mean(0), many.mean(0), _stderr(one), _stderr(many))


def test_importance_weighted_bound_rises_to_log_p(linear):
    exact = linear.log_prob(linear.images).mean()
    bounds = [
        _draws(importance_weighted_bound, linear.vae, linear.wrong, linear.images, num, seed=num)
        for num in (1, 8, 32)
    ]
    # The noise of the images is independent, so the mean over them has little of it.
    means = np.array([draws.mean() for draws in bounds])
    stderrs = np.array([_stderr(draws.mean(1)) for draws in bounds])
    assert np.all(np.diff(means) > 2 * (stderrs[1:] + stderrs[:-1]))
    assert np.all(means < exact + 4 * stderrs)
    assert exact - means[0] > 0.5
    assert exact - means[-1] < 0.15
    # With one sample its mean is the ELBO.
    elbos = _draws(elbo, linear.vae, linear.wrong, linear.images, 1).mean(1)
    assert _agree(elbos.mean(), means[0], _stderr(elbos), stderrs[0])


def test_importance_weighted_bound_at_the_exact_posterior_is_log_p_for_every_draw(linear):
    values = _draws(importance_weighted_bound, linear.vae, linear.exact, linear.images, 8)
    expected = np.broadcast_to(linear.log_prob(linear.images), values.shape)
    np.testing.assert_allclose(values, expected, atol=3e-4)


def test_elbo_has_the_gradient_of_the_reparameterised_bound(linear):
    """Gradients flow through the samples: on average they vanish at the exact posterior."""
    keys = jax.random.split(jax.random.key(0), 2000)
    x = linear.images[0]
    gradient = lambda params, key: jax.grad(lambda p: elbo(linear.vae, p, key, x))(params).encoder
    per_key = jax.jit(jax.vmap(gradient, (None, 0)))
    for params, vanishes in ((linear.exact, True), (linear.wrong, False)):
        gradients = np.asarray(per_key(params, keys)["bias"])
        assert _agree(gradients.mean(0), 0.0, _stderr(gradients)) == vanishes


def test_bits_per_dim_by_hand():
    # -8 bits over 2 x 2 pixels are two bits each.
    assert gapjax.bits_per_dim(-8 * math.log(2), (2, 2)) == pytest.approx(2.0)
    np.testing.assert_allclose(
        gapjax.bits_per_dim(jnp.array([0.0, 784 * math.log(2)]), (28, 28, 1)), [0.0, -1.0]
    )
