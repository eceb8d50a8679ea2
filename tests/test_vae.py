"""The bounds: equal to log p(x) where that is known, and what `mlp_vae` promises."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import gapjax
from gapjax import VAE, VAEParams, elbo, importance_weighted_bound


def _per_image(bound, vae, params, images, num_samples, seed=0, repeats=None):
    """The bound of every image [N], or of repeats of it [repeats, N] with fresh noise."""
    one = lambda key, x: bound(vae, params, key, x, num_samples)
    over_images = jax.vmap(one)
    keys = jax.random.split(jax.random.key(seed), (repeats or 1, len(images)))
    values = jax.jit(jax.vmap(over_images, (0, None)))(keys, jnp.asarray(images))
    return np.asarray(values if repeats else values[0], np.float64)


def _constant_vae(posterior, prior):
    """A VAE whose posterior is given and whose likelihood is 1: its ELBO is minus the KL."""
    nothing = dist.Normal(0.0, 1.0).expand([1]).to_event(1)
    decode = lambda decoder, z: nothing
    return VAE(lambda rng_key: None, lambda encoder, x: posterior, decode, prior)


class ElboTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_the_bounds_are_scalars_of_one_example(self):
        vae = gapjax.mlp_vae((2, 2), latent_dim=2, hidden_sizes=(3,))
        params = vae.init(jax.random.key(0))
        x, rng_key = jnp.ones((2, 2), jnp.uint8), jax.random.key(1)
        for bound in (elbo, importance_weighted_bound):
            value = self.variant(lambda k, x, bound=bound: bound(vae, params, k, x, 3))(rng_key, x)
            chex.assert_shape(value, ())
            chex.assert_type(value, jnp.float32)


@pytest.mark.parametrize("prior_scale", [1.0, 2.0])
def test_analytic_kl_agrees_with_monte_carlo(prior_scale):
    posterior = dist.Normal(jnp.array([0.5, -1.0]), jnp.array([0.3, 1.5])).to_event(1)
    prior = dist.Normal(jnp.zeros(2), prior_scale * jnp.ones(2)).to_event(1)
    # The likelihood is constant, so ELBO - log p(x given z) is minus the KL, with no noise in it.
    vae, x = _constant_vae(posterior, prior), jnp.zeros(1)
    log_likelihood = -0.5 * math.log(2 * math.pi)
    kl = [
        log_likelihood - float(elbo(vae, VAEParams(0, 0), jax.random.key(seed), x))
        for seed in (0, 1)
    ]
    assert kl[0] == kl[1]
    z = posterior.sample(jax.random.key(2), (20_000,))
    terms = np.asarray(posterior.log_prob(z) - prior.log_prob(z), np.float64)
    assert abs(terms.mean() - kl[0]) < 4 * terms.std() / np.sqrt(len(terms))


def test_without_an_analytic_kl_the_expectation_is_the_same(linear):
    """NumPyro has no KL for the plain prior: it is then estimated on the samples of z."""
    images, repeats = linear.images[:4], 3000
    analytic = _per_image(elbo, linear.vae, linear.wrong, images, 1, repeats=repeats)
    estimated = _per_image(
        elbo, linear.monte_carlo_vae, linear.wrong, images, 1, seed=1, repeats=repeats
    )
    stderr = np.sqrt((analytic.var(0) + estimated.var(0)) / repeats)
    assert np.all(np.abs(analytic.mean(0) - estimated.mean(0)) < 4.5 * stderr)
    assert not np.allclose(analytic.std(0), estimated.std(0), rtol=0.02)  # another estimator


@pytest.mark.parametrize("num_samples", [1, 3])
def test_elbo_at_the_exact_posterior_is_log_p_for_every_draw(linear, num_samples):
    values = _per_image(
        elbo, linear.monte_carlo_vae, linear.exact, linear.images, num_samples, repeats=5
    )
    expected = np.broadcast_to(linear.log_prob(linear.images), values.shape)
    np.testing.assert_allclose(values, expected, atol=2e-4)


def test_elbo_at_the_exact_posterior_is_log_p_on_average(linear):
    """The KL of this one is analytic, so its draws scatter around log p(x)."""
    repeats = 2000
    values = _per_image(elbo, linear.vae, linear.exact, linear.images, 1, repeats=repeats)
    scatter = values.std(0) / np.sqrt(repeats)
    assert np.all(np.abs(values.mean(0) - linear.log_prob(linear.images)) < 4.5 * scatter)


def test_elbo_falls_short_of_log_p_by_the_kl_of_the_posteriors(linear):
    repeats, x = 4000, linear.images[:3]
    of = lambda params: jax.vmap(lambda x: linear.vae.encode(params.encoder, x).base_dist)(x)
    wrong, exact = of(linear.wrong), of(linear.exact)
    ratio = (wrong.scale / exact.scale) ** 2
    shift = ((wrong.loc - exact.loc) / exact.scale) ** 2
    missing = 0.5 * np.asarray(ratio + shift - 1 - jnp.log(ratio)).sum(-1)
    values = _per_image(elbo, linear.vae, linear.wrong, x, 1, repeats=repeats)
    scatter = values.std(0) / np.sqrt(repeats)
    assert np.all(np.abs(values.mean(0) - (linear.log_prob(x) - missing)) < 4.5 * scatter)


def test_more_samples_average_the_elbo_and_do_not_move_it(linear):
    x, repeats = linear.images[:3], 1000
    one = _per_image(elbo, linear.vae, linear.wrong, x, 1, repeats=repeats)
    many = _per_image(elbo, linear.vae, linear.wrong, x, 16, seed=1, repeats=repeats)
    np.testing.assert_allclose(many.var(0) * 16 / one.var(0), 1.0, rtol=0.4)
    scatter = np.sqrt((one.var(0) + many.var(0)) / repeats)
    assert np.all(np.abs(one.mean(0) - many.mean(0)) < 4.5 * scatter)


def test_importance_weighted_bound_rises_to_log_p(linear):
    repeats, exact = 400, linear.log_prob(linear.images).mean()
    means, scatters = [], []
    for num_samples in (1, 4, 32, 256):
        values = _per_image(
            importance_weighted_bound, linear.vae, linear.wrong, linear.images, num_samples,
            seed=num_samples, repeats=repeats,
        ).mean(1)  # fmt: skip
        means.append(values.mean())
        scatters.append(values.std() / np.sqrt(repeats))
    means, scatters = np.array(means), np.array(scatters)
    assert np.all(np.diff(means) > 2 * (scatters[1:] + scatters[:-1]))
    assert np.all(means < exact + 4 * scatters)
    assert exact - means[0] > 0.5
    assert exact - means[-1] < 0.05
    # With one sample its mean is the ELBO.
    elbos = _per_image(elbo, linear.vae, linear.wrong, linear.images, 1, repeats=repeats).mean(1)
    scatter = np.hypot(elbos.std() / np.sqrt(repeats), scatters[0])
    assert abs(elbos.mean() - means[0]) < 4.5 * scatter


def test_importance_weighted_bound_at_the_exact_posterior_is_log_p_for_every_draw(linear):
    values = _per_image(importance_weighted_bound, linear.vae, linear.exact, linear.images, 5)
    np.testing.assert_allclose(values, linear.log_prob(linear.images), atol=2e-4)


def test_elbo_has_the_gradient_of_the_reparameterised_bound(linear):
    """Gradients flow through the samples: on average they vanish at the exact posterior."""
    keys = jax.random.split(jax.random.key(0), 2000)
    x = linear.images[0]
    for params, zero in ((linear.exact, True), (linear.wrong, False)):
        gradient = jax.grad(lambda p, key: elbo(linear.vae, p, key, x))
        gradients = jax.jit(jax.vmap(gradient, (None, 0)))(params, keys).encoder["bias"]
        mean = np.asarray(gradients.mean(0))
        stderr = np.asarray(gradients.std(0)) / np.sqrt(len(keys))
        assert np.all(np.abs(mean) < 4.5 * stderr) == zero


def test_bits_per_dim_by_hand():
    # -8 bits over 2 x 2 pixels are two bits each.
    assert gapjax.bits_per_dim(-8 * math.log(2), (2, 2)) == pytest.approx(2.0)
    np.testing.assert_allclose(
        gapjax.bits_per_dim(jnp.array([0.0, 784 * math.log(2)]), (28, 28, 1)), [0.0, -1.0]
    )


@pytest.mark.parametrize(
    "likelihood, levels, type_of", [("bernoulli", 2, bool), ("discretized_logistic", 17, int)]
)
def test_mlp_vae_has_the_shapes_of_the_paper(likelihood, levels, type_of):
    vae = gapjax.mlp_vae((3, 2), likelihood, latent_dim=4, hidden_sizes=(6, 5), levels=levels)
    params = vae.init(jax.random.key(0))
    assert isinstance(params, VAEParams)
    x = jnp.array([[0, 1], [1, 0], [1, 1]], jnp.uint8)
    posterior = vae.encode(params.encoder, x)
    assert (posterior.batch_shape, posterior.event_shape) == ((), (4,))
    likelihood = vae.decode(params.decoder, jnp.zeros(4))
    assert (likelihood.batch_shape, likelihood.event_shape) == ((), (3, 2))
    assert (vae.prior.batch_shape, vae.prior.event_shape) == ((), (4,))
    sample = gapjax.sample_model(vae, params.decoder, jax.random.key(1))
    chex.assert_shape(sample, (3, 2))
    assert 0 <= sample.min() and sample.max() <= levels - 1
    mean = gapjax.reconstruct(vae, params, jax.random.key(1), x)
    chex.assert_shape(mean, (3, 2))
    assert 0 <= mean.min() and mean.max() <= levels - 1


def test_the_decoder_mirrors_the_encoder():
    vae = gapjax.mlp_vae((2,), latent_dim=3, hidden_sizes=(6, 5))
    params = jax.eval_shape(vae.init, jax.random.key(0))
    encoder, decoder = (
        sorted(leaf.shape for leaf in jax.tree.leaves(part) if len(leaf.shape) == 2)
        for part in params
    )
    assert encoder == sorted([(2, 6), (6, 5), (5, 6)])
    assert decoder == sorted([(3, 5), (5, 6), (6, 2)])


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_encode_takes_levels_as_uint8_and_as_floats(levels):
    vae = gapjax.mlp_vae(
        (3,), "discretized_logistic", latent_dim=2, hidden_sizes=(4,), levels=levels
    )
    params = vae.init(jax.random.key(0))
    levels_of_x = np.array([0, 1, levels - 1])
    as_bytes = vae.encode(params.encoder, jnp.asarray(levels_of_x, jnp.uint8))
    as_floats = vae.encode(params.encoder, jnp.asarray(levels_of_x, jnp.float32))
    chex.assert_trees_all_equal(as_bytes, as_floats)
    values = [
        elbo(vae, params, jax.random.key(1), jnp.asarray(levels_of_x, dtype))
        for dtype in (jnp.uint8, jnp.float32, jnp.int32)
    ]
    assert values[0] == values[1] == values[2]
    assert np.isfinite(values[0])


def test_the_network_sees_the_unit_interval():
    """The same picture with 2 and with 256 levels gives the same posterior."""
    make = lambda levels: gapjax.mlp_vae(
        (3,), "discretized_logistic", latent_dim=2, hidden_sizes=(4,), levels=levels
    )
    params = make(2).init(jax.random.key(0))
    x = np.array([0, 1, 1], np.uint8)
    chex.assert_trees_all_close(
        make(2).encode(params.encoder, jnp.asarray(x)),
        make(256).encode(params.encoder, jnp.asarray(255 * x)),
        rtol=1e-6,
    )


def test_equal_arguments_give_the_same_object():
    make = lambda **more: gapjax.mlp_vae(
        (3, 3), "bernoulli", latent_dim=2, hidden_sizes=(4,), **more
    )
    assert make() is make()
    assert make(levels=17) is make(levels=17)
    assert hash(make()) == hash(make())
    assert gapjax.mlp_vae((3, 3), "bernoulli", latent_dim=3, hidden_sizes=(4,)) is not make()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"likelihood": "gaussian"}, "gaussian.*bernoulli, discretized_logistic"),
        ({"latent_dim": 0}, "latent_dim 0"),
        ({"hidden_sizes": (10, 0)}, r"hidden_sizes \(10, 0\)"),
        ({"event_shape": (8, -1)}, r"event_shape \(8, -1\)"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        gapjax.mlp_vae(**{"event_shape": (8, 8), **arguments})


def test_samples_of_the_model_follow_it(linear):
    draw = jax.vmap(lambda key: gapjax.sample_model(linear.vae, linear.exact.decoder, key))
    x = np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(0), 20_000)), np.float64)
    weight, bias = (np.asarray(linear.exact.decoder[name]) for name in ("weight", "bias"))
    covariance = weight @ weight.T + 0.25 * np.eye(len(bias))
    np.testing.assert_allclose(x.mean(0), bias, atol=5 * np.sqrt(covariance.max() / len(x)))
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=7 * covariance.max() / len(x) ** 0.5)


def test_reconstruct_is_the_mean_at_a_posterior_sample(linear):
    rng_key, x = jax.random.key(0), jnp.asarray(linear.images[0])
    z = linear.vae.encode(linear.exact.encoder, x).sample(rng_key)
    weight, bias = linear.exact.decoder["weight"], linear.exact.decoder["bias"]
    ours = gapjax.reconstruct(linear.vae, linear.exact, rng_key, x)
    np.testing.assert_allclose(ours, weight @ z + bias, rtol=1e-5)
