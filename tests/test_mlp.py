"""`model/mlp` has the shapes that it promises, and its densities are those of what it samples."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

import gapjax
from gapjax import VAEParams, elbo
from gapjax.model import mlp
from gapjax.model.bounds import sample_and_log_prob
from gapjax.model.free import from_free, to_free
from gapjax.vae import reconstruct, sample_model


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
        sample = sample_model(vae, params.decoder, rng_key)
        return sample, reconstruct(vae, params, rng_key, x)

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


def test_data_without_levels_have_no_discretized_logistic():
    with pytest.raises(ValueError, match=r"levels is None; .*count_vae"):
        gapjax.mlp_vae((2,), "discretized_logistic", levels=None)


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


@pytest.mark.parametrize("posterior", mlp.POSTERIORS)
@pytest.mark.parametrize("likelihood", mlp.LIKELIHOODS)
def test_models_made_alike_are_equal(likelihood, posterior):
    make = lambda **more: gapjax.mlp_vae(
        (3, 3), likelihood,
        **{"latent_dim": 2, "hidden_sizes": (4,), "posterior": posterior, "levels": 17, **more},
    )  # fmt: skip
    assert make() == make() and hash(make()) == hash(make())
    for other in ({"latent_dim": 3}, {"hidden_sizes": [4, 4]}):
        assert make(**other) == make(**other) != make()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"likelihood": "gaussian"}, "gaussian.*one of bernoulli, discretized_logistic, normal"),
        ({"latent_dim": 0}, "latent_dim is 0"),
        ({"hidden_sizes": (10, 0)}, r"hidden_sizes is \(10, 0\)"),
        ({"likelihood": "discretized_logistic", "uniform_weight": 1.5}, "uniform_weight is 1.5"),
        ({"event_shape": (8, -1)}, r"event_shape is \(8, -1\)"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        gapjax.mlp_vae(**{"event_shape": (8, 8), **arguments})


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
