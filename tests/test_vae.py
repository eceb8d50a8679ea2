"""`model/bounds` are log p(x) where that is known; `model/mlp` has the shapes it promises."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from conftest import random_params

import gapjax
from gapjax import VAE, VAEParams, elbo, importance_weighted_bound
from gapjax.model import mlp
from gapjax.model.bounds import sample_and_log_prob
from gapjax.model.distributions import from_free, to_free


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


@pytest.mark.parametrize("likelihood, levels", [("bernoulli", 2), ("discretized_logistic", 17)])
def test_mlp_vae_has_the_shapes_of_the_paper(likelihood, levels):
    vae = gapjax.mlp_vae((3, 2), likelihood, latent_dim=4, hidden_sizes=(6, 5), levels=levels)
    x = jnp.array([[0, 1], [1, 0], [1, 1]], jnp.uint8)

    @jax.jit
    def of_all(params, rng_key):
        assert isinstance(params, VAEParams)
        posterior = vae.encode(params.encoder, x)
        pixels = vae.decode(params.decoder, jnp.zeros(4))
        for each, event_shape in ((posterior, (4,)), (pixels, (3, 2)), (vae.prior, (4,))):
            assert (each.batch_shape, each.event_shape) == ((), event_shape)
        sample = gapjax.sample_model(vae, params.decoder, rng_key)
        return sample, gapjax.reconstruct(vae, params, rng_key, x)

    for image in of_all(random_params(vae), jax.random.key(0)):
        chex.assert_shape(image, (3, 2))
        assert 0 <= image.min() and image.max() <= levels - 1


@pytest.mark.parametrize("levels", [17, 256])
def test_the_scale_of_a_pixel_is_bounded_from_below(levels):
    """So the cost of a pixel is bounded, whatever the network emits: less so by the scale alone."""
    make = functools.partial(
        gapjax.mlp_vae, (2,), "discretized_logistic", latent_dim=1, hidden_sizes=(), levels=levels
    )
    vae = make(uniform_weight=0)
    params = jax.tree.map(jnp.zeros_like, random_params(vae)).decoder
    (name,) = params["MLP_0"]
    with_bias = lambda bias: {"MLP_0": {name: {**params["MLP_0"][name], "bias": bias}}}
    bias = jnp.array([0.0, 0.0, -50.0, -1.0])
    pixels = vae.decode(with_bias(bias), jnp.zeros(1)).base_dist
    bins = levels - 1
    np.testing.assert_allclose(pixels.scale * bins, [255 * math.exp(-7), bins / math.e], rtol=1e-5)
    worst = pixels.log_prob(jnp.array([bins, 0.0]))[0]  # the other end of the range
    assert worst == pytest.approx(-(bins - 0.5) / (255 * math.exp(-7)), rel=1e-3)
    by_default = make().decode(with_bias(bias), jnp.zeros(1)).log_prob(jnp.array([bins, 0.0]))
    expected = math.log(256e-7 / levels) + pixels.log_prob(0.0)[1]
    np.testing.assert_allclose(by_default, expected, rtol=1e-4)


def test_the_decoder_mirrors_the_encoder():
    vae = gapjax.mlp_vae((2,), latent_dim=3, hidden_sizes=(6, 5))
    params = jax.eval_shape(vae.init, jax.random.key(0))
    encoder, decoder = (
        sorted(leaf.shape for leaf in jax.tree.leaves(part) if len(leaf.shape) == 2)
        for part in params
    )
    assert encoder == sorted([(2, 6), (6, 5), (5, 6)])
    assert decoder == sorted([(3, 5), (5, 6), (6, 2)])


def test_encode_takes_levels_as_uint8_and_as_floats():
    vae = gapjax.mlp_vae((3,), "discretized_logistic", latent_dim=2, hidden_sizes=(4,), levels=17)
    params = random_params(vae)

    @jax.jit
    def of(x):
        q = vae.encode(params.encoder, x).base_dist
        return q.loc, q.scale, elbo(vae, params, jax.random.key(1), x)

    levels = np.array([0, 1, 16])
    of_bytes = of(jnp.asarray(levels, jnp.uint8))
    chex.assert_tree_all_finite(of_bytes)
    for dtype in (jnp.float32, jnp.int32):
        chex.assert_trees_all_equal(of_bytes, of(jnp.asarray(levels, dtype)))


def test_the_network_sees_the_unit_interval():
    """The same picture with 2 and with 256 levels gives the same posterior."""
    make = lambda levels: gapjax.mlp_vae(
        (3,), "discretized_logistic", latent_dim=2, hidden_sizes=(), levels=levels
    )
    params = random_params(make(2))
    x = np.array([0, 1, 1], np.uint8)
    encode = lambda vae, x: jax.jit(vae.encode)(params.encoder, x).base_dist.loc
    np.testing.assert_allclose(
        encode(make(2), jnp.asarray(x)), encode(make(256), jnp.asarray(255 * x)), rtol=1e-6
    )
    other = encode(make(2), jnp.asarray(1 - x))
    assert not np.allclose(other, encode(make(2), jnp.asarray(x)))


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
        ({"likelihood": "discretized_logistic", "uniform_weight": 1.5}, "uniform_weight is 1.5"),
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


@pytest.mark.parametrize("posterior", ["full_covariance", "flow"])
def test_richer_posteriors_say_the_density_of_what_they_sample(posterior):
    """log q(z) is that of the noise minus the log determinant of the map, by autodiff; so too
    where q(z) is asked of a z that q did not just give, and after q was taken apart."""
    vae = gapjax.mlp_vae((2, 2), latent_dim=3, hidden_sizes=(4,), posterior=posterior)
    params = random_params(vae)
    x = jnp.array([[0, 1], [1, 1]], jnp.uint8)
    q = vae.encode(params.encoder, x)
    rng_key = jax.random.key(0)
    z, log_q = sample_and_log_prob(q, rng_key)
    noise = jax.random.normal(rng_key, (3,))
    if posterior == "flow":
        base = q.base_dist.base_dist
        start = lambda noise: base.loc + base.scale * noise
        forward = lambda noise: functools.reduce(lambda z, f: f(z), q.transforms, start(noise))
    else:
        forward = lambda noise: q.loc + q.scale_tril @ noise
    np.testing.assert_allclose(forward(noise), z, rtol=1e-5)
    log_det = np.linalg.slogdet(np.asarray(jax.jacobian(forward)(noise), np.float64))[1]
    expected = -0.5 * float((noise**2).sum()) - 1.5 * math.log(2 * math.pi) - log_det
    assert float(log_q) == pytest.approx(expected, abs=1e-3)
    assert float(q.log_prob(z)) == pytest.approx(expected, abs=1e-3)
    again = jax.tree.map(lambda leaf: leaf, from_free(q, to_free(q)))
    assert float(again.log_prob(z)) == pytest.approx(expected, abs=1e-3)


def test_posterior_families_are_named_and_differ():
    with pytest.raises(ValueError, match=r"'gaussian'.*full_covariance"):
        gapjax.mlp_vae((2, 2), posterior="gaussian")
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(
            gapjax.mlp_vae((2, 2), latent_dim=3, hidden_sizes=(4,), posterior=name).init,
            jax.random.key(0),
        ).encoder))
        for name in mlp.POSTERIORS
    }  # fmt: skip
    assert sizes["diagonal"] < sizes["full_covariance"] < sizes["flow"]
