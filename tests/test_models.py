"""`models/hierarchy`, `models/convolution`, `models/counts`, `models/colour`, `models/priors`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import gapjax
from gapjax.model.bounds import elbo, importance_weighted_bound, log_joint
from gapjax.model.checks import check_model
from gapjax.models.colour import ColourLogistic
from gapjax.models.convolution import conv_vae
from gapjax.models.counts import count_examples, count_vae
from gapjax.models.hierarchy import FORMS, auxiliary_vae, hierarchical_vae
from gapjax.models.priors import FlowPrior, MixturePrior, VampPrior, with_prior
from gapjax.vae import Given, sample_model

KEY = jax.random.key(0)


def _shape_of(x):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), x)


@pytest.mark.parametrize("form", FORMS)
def test_a_hierarchy_is_a_model_of_the_image(form):
    make = lambda: hierarchical_vae((3, 3), latent_dims=(4, 3, 2), hidden_sizes=(5,), form=form)
    vae = make()
    assert vae == make() and hash(vae) == hash(make())
    params = jax.eval_shape(vae.init, KEY)
    found = check_model(vae, params, jax.ShapeDtypeStruct((3, 3), jnp.uint8))
    assert found.has_rsample
    assert found.likelihood == "BernoulliLogits"


def test_the_forms_of_a_hierarchy_are_one_generative_model():
    options = {"latent_dims": (3, 2), "hidden_sizes": (4,)}
    noise = hierarchical_vae((2, 2), **options)
    chain = hierarchical_vae((2, 2), **options, form="top_down")
    decoder = noise.init(KEY).decoder
    e = jnp.arange(5.0) / 5 - 0.3
    link = chain.prior(decoder).link_at("z1", {"z2": e[3:]}).base_dist
    z = {"z2": e[3:], "z1": link.loc + link.scale * e[:3]}
    x = jnp.array([[0, 1], [1, 1]], jnp.uint8)
    # The densities of e and of z differ by the volume that the scale makes.
    of_noise = log_joint(noise, decoder, x, e)
    of_chain = log_joint(chain, decoder, x, z) + jnp.log(link.scale).sum()
    np.testing.assert_allclose(of_noise, of_chain, rtol=1e-5)


def _auxiliary():
    vae = auxiliary_vae((2, 2), latent_dim=1, auxiliary_dim=1, hidden_sizes=(4,))
    return vae, vae.init(KEY), jnp.array([[0, 1], [1, 1]], jnp.uint8)


def test_the_bound_with_an_auxiliary_variable_is_below_log_p():
    vae, params, x = _auxiliary()
    pixels = gapjax.mlp_vae((2, 2), latent_dim=1, hidden_sizes=(4,)).decode
    grid = jnp.linspace(-8.0, 8.0, 1001)[:, None]
    plain = gapjax.VAE(vae.init, vae.encode, pixels, dist.Normal(jnp.zeros(1), 1.0).to_event(1))
    at = lambda z: log_joint(plain, params.decoder["pixels"], x, z)
    log_p = jax.nn.logsumexp(jax.jit(jax.vmap(at))(grid)) + np.log(16 / 1000)
    one = lambda key: elbo(vae, params, key, x)
    values = jax.jit(jax.vmap(one))(jax.random.split(KEY, 4000))
    assert values.mean() + 4.5 * values.std() / np.sqrt(4000) < log_p
    many = jax.jit(lambda params: importance_weighted_bound(vae, params, KEY, x, 20_000))
    weighted = many(params)
    np.testing.assert_allclose(weighted, log_p, atol=0.03)


def test_where_nothing_depends_on_the_auxiliary_variable_the_bound_is_the_plain_one():
    vae, params, x = _auxiliary()
    encoder, decoder = jax.tree.map(jnp.copy, params)
    (to_z,), (to_a,) = encoder["links"], decoder["links"]
    first = to_z["MLP_0"]["Dense_0"]
    first["kernel"] = first["kernel"].at[0].set(0.0)  # q(z given a, x) does not see a
    q_of_a, r = encoder["start"]["MLP_0"]["Dense_1"], to_a["MLP_0"]["Dense_1"]
    for name in ("kernel", "bias"):  # and q(a given x) = r(a given z)
        q_of_a[name] = q_of_a[name].at[..., :2].set(0.0)
        r[name] = jnp.zeros_like(r[name])
    params = gapjax.VAEParams(encoder, decoder)
    q = vae.encode(params.encoder, x).link_at("z", {"a": jnp.zeros(1)})
    plain = gapjax.mlp_vae((2, 2), latent_dim=1, hidden_sizes=(4,))
    plain = plain._replace(encode=lambda params, x: q)
    keys = jax.random.split(KEY, 20)
    of_pair = lambda key: importance_weighted_bound(vae, params, key, x, 1)
    of_z = lambda key: importance_weighted_bound(
        plain, params._replace(decoder=decoder["pixels"]), jax.random.split(key)[1], x, 1
    )
    both = jax.jit(jax.vmap(lambda key: (of_pair(key), of_z(key))))
    np.testing.assert_allclose(*both(keys), rtol=1e-5)


@pytest.mark.parametrize("uniform_weight", [0.0, 0.1])
def test_the_colours_of_a_pixel_are_a_distribution_and_its_samples_follow_it(uniform_weight):
    colour = ColourLogistic(
        jnp.array([0.3, 0.6, 0.2]), jnp.array([0.2, 0.1, 0.15]), jnp.array([0.8, -0.4, 0.5]), 3,
        uniform_weight=uniform_weight,
    )  # fmt: skip
    pixels = jnp.array(list(itertools.product(range(3), repeat=3)))
    probs = np.exp(colour.log_prob(pixels))
    np.testing.assert_allclose(probs.sum(), 1.0, rtol=1e-5)
    draws = np.asarray(colour.sample(KEY, (20_000,)))
    counts = np.bincount(draws @ np.array([9, 3, 1]), minlength=27) / len(draws)
    error = np.sqrt(probs * (1 - probs) / len(draws))
    assert np.all(np.abs(counts - probs) < 4.5 * error + 1e-4)
    with pytest.raises(ValueError, match="3 channels need 3"):
        ColourLogistic(jnp.zeros(3), jnp.ones(3), jnp.zeros(2))


@pytest.mark.parametrize(
    ("shape", "likelihood"), [((8, 8), "bernoulli"), ((8, 8), "discretized_logistic"),
                              ((8, 8, 3), "colour")]
)  # fmt: skip
def test_a_convolutional_model_takes_images_with_and_without_channels(shape, likelihood):
    vae = conv_vae(shape, likelihood, latent_dim=3, num_channels=(8,))
    assert vae == conv_vae(shape, likelihood, latent_dim=3, num_channels=(8,))
    params = jax.eval_shape(vae.init, KEY)
    check_model(vae, params, jax.ShapeDtypeStruct(shape, jnp.uint8))
    draw = jax.eval_shape(lambda params: sample_model(vae, params, KEY), params.decoder)
    assert draw.shape == shape
    with pytest.raises(ValueError, match="sides divisible by 2"):
        conv_vae((7, 8), num_channels=(8,))


@pytest.mark.parametrize("likelihood", ["negative_binomial", "poisson", "multinomial"])
def test_a_model_of_counts_scales_with_the_library_and_sees_the_batch(likelihood):
    counts = np.array([[3, 0, 2], [0, 9, 1]])
    examples = count_examples(counts, batch=np.array([0, 1]))
    np.testing.assert_array_equal(examples.context["library"], [5, 10])
    vae = count_vae(3, likelihood, latent_dim=2, hidden_sizes=(4,), num_batches=2, max_library=20)
    params = vae.init(KEY)
    check_model(vae, params, _shape_of(jax.tree.map(lambda leaf: leaf[0], examples)))
    z, context = jnp.array([0.3, -0.2]), {"library": jnp.array(5), "batch": jnp.array(0)}
    mean = vae.at(context).decode(params.decoder, z).mean
    np.testing.assert_allclose(mean.sum(), 5.0, rtol=1e-5)
    twice = vae.at({**context, "library": jnp.array(10)}).decode(params.decoder, z).mean
    np.testing.assert_allclose(twice, 2 * mean, rtol=1e-5)
    other = vae.at({**context, "batch": jnp.array(1)}).decode(params.decoder, z).mean
    assert np.abs(other - mean).max() > 1e-3
    noisy = vae.at(context).encode(params.encoder, jnp.array([-2.0, 0.5, 0.0]))
    assert np.isfinite(noisy.base_dist.loc).all()
    if likelihood == "multinomial":
        assert sample_model(vae.at(context), params.decoder, KEY).sum() == 5
        draws = vae.at(context).decode(params.decoder, z).sample(KEY, (4000,))
        np.testing.assert_allclose(draws.mean(0), mean, atol=4.5 * np.sqrt(5 / 4 / 4000))


def test_counts_that_cannot_be_are_refused():
    with pytest.raises(TypeError, match="give integers"):
        count_examples(np.ones((2, 3)))
    with pytest.raises(ValueError, match="max_library is None"):
        count_vae(3, "multinomial")
    with pytest.raises(TypeError, match="batch is float64"):
        count_examples(np.ones((2, 3), int), batch=np.zeros(2))


@pytest.mark.parametrize(
    "prior", [MixturePrior(2, 3), VampPrior((2, 2), 2, 3, (4,)), FlowPrior(2, 2, 4)]
)
def test_a_learned_prior_is_normalised_and_its_samples_follow_it(prior):
    params = prior.init(KEY)
    if isinstance(prior, FlowPrior):  # which starts as the identity
        params = jax.tree.map(lambda p: p + 0.3, params)
    found = prior(params)
    side = np.linspace(-9, 9, 181)
    grid = jnp.asarray(np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2))
    density = np.exp(np.asarray(jax.vmap(found.log_prob)(grid.astype(jnp.float32)), np.float64))
    cell = (side[1] - side[0]) ** 2
    np.testing.assert_allclose(density.sum() * cell, 1.0, atol=2e-3)
    draws = np.asarray(jax.vmap(found.sample)(jax.random.split(KEY, 4000)))
    mean = (density[:, None] * np.asarray(grid)).sum(0) * cell
    error = draws.std(0) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(0) - mean) < 4.5 * error + 1e-3)


def test_a_learned_prior_is_trained_and_then_frozen():
    images = np.random.default_rng(0).integers(0, 2, (20, 2, 2)).astype(np.uint8)
    vae = with_prior(gapjax.mlp_vae((2, 2), latent_dim=2, hidden_sizes=(3,)), MixturePrior(2, 3))
    state, _ = gapjax.train(
        vae, gapjax.data_source(images), KEY, num_epochs=2, batch_size=10,
        optimizer=gapjax.adam(0.05),
    )  # fmt: skip
    start = vae.init(jax.random.split(KEY)[0]).decoder["prior"]
    learned = state.params.decoder["prior"]
    moved = jax.tree.map(lambda old, new: float(jnp.abs(new - old).max()), start, learned)
    assert min(jax.tree.leaves(moved)) > 1e-3
    refit = gapjax.self_consistent(
        vae, state.params, images, jax.random.key(1), num_epochs=1, batch_size=10
    )
    jax.tree.map(np.testing.assert_array_equal, refit.params.decoder, state.params.decoder)


def _conditional():
    """x ~ N(z + c, 1), z ~ N(0, 1), so that z given x, c ~ N((x - c) / 2, 1/2)."""
    encode = lambda params, x, c: dist.Normal(params * (x - c), jnp.sqrt(0.5)).to_event(1)
    decode = lambda params, z, c: dist.Normal(z + c, 1.0).to_event(1)
    prior = dist.Normal(jnp.zeros(1), jnp.ones(1)).to_event(1)
    init = lambda rng_key: gapjax.VAEParams(jnp.zeros(()), jnp.zeros(()))
    return gapjax.VAE(init, encode, decode, prior)


def test_a_conditional_model_is_measured_and_refitted_at_the_context_of_each_example():
    rng = np.random.default_rng(0)
    context = 10.0 * rng.normal(size=(200, 1)).astype(np.float32)
    x = context + np.sqrt(2.0).astype(np.float32) * rng.normal(size=(200, 1)).astype(np.float32)
    examples, vae = Given(x, context), _conditional()
    exact = gapjax.VAEParams(jnp.asarray(0.5), jnp.zeros(()))
    found = gapjax.evaluate(vae, exact, KEY, examples, bound=gapjax.importance_weighted_bound)
    log_prob = -0.25 * (x - context)[:, 0] ** 2 - 0.5 * np.log(4 * np.pi)
    np.testing.assert_allclose(-found.per_image * np.log(2), log_prob, rtol=1e-4, atol=1e-4)
    refit = gapjax.self_consistent(
        vae, vae.init(KEY), examples, KEY, num_epochs=60, batch_size=50,
        optimizer=gapjax.adam(0.02),
    )  # fmt: skip
    np.testing.assert_allclose(refit.params.encoder, 0.5, atol=0.03)
