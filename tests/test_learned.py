"""Learned refinement: an encoder that ends with steps along the decoder's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from conftest import assert_same_bits

import gapjax
from gapjax import encoder_only, optimizers
from gapjax.infer.learned import refinement_params, with_refinement

KEY = jax.random.key(20)


def _blind(linear):
    """The linear Gaussian model with an encoder that does not see x, and its parameters."""
    encode = lambda encoder, x: dist.Normal(encoder["loc"], jnp.exp(encoder["log_scale"])).to_event(
        1
    )
    encoder = {"loc": jnp.full(2, 0.3), "log_scale": jnp.zeros(2)}
    init = lambda rng_key: gapjax.VAEParams(encoder, linear.exact.decoder)
    return gapjax.VAE(init, encode, linear.vae.decode, linear.vae.prior), init(KEY)


@pytest.fixture(scope="module")
def refined(linear):
    """A plain refit, and one of the same budget with a step of learned refinement."""
    vae, params = _blind(linear)
    refining = with_refinement(vae, hidden_sizes=(4,))
    start = refinement_params(refining, params, KEY)
    source = gapjax.model_source(vae, params.decoder, 200)
    refit = lambda vae, params: gapjax.refit_encoder(
        vae, params, source, KEY, num_epochs=40, batch_size=20,
        optimizer=optimizers.cosine_adam(0.03, 400),
    )  # fmt: skip
    return vae, refit(vae, params), refining, refit(refining, start), start


def test_a_step_reaches_the_exact_posterior_where_the_encoder_cannot(linear, refined):
    """In a linear Gaussian model the slope says where the posterior's mean is."""
    vae, plain, refining, ours, _ = refined
    exact = linear.log_prob(linear.images)

    def gap(vae, params):
        bound = gapjax.evaluate(vae, params, KEY, linear.images, num_samples=200).per_image
        return (exact + bound * np.log(2) * 6).mean()

    assert gap(vae, plain.params) > 0.5
    assert abs(gap(refining, ours.params)) < 0.03


def test_the_decoder_and_its_copy_are_frozen(refined):
    *_, ours, start = refined
    assert_same_bits(ours.params.decoder, start.decoder)
    assert_same_bits(ours.params.encoder.decoder, start.encoder.decoder)
    assert_same_bits(ours.averaged_params.encoder.decoder, start.encoder.decoder)
    assert np.any(ours.params.encoder.base["loc"] != start.encoder.base["loc"])


def test_no_optimizer_changes_what_is_frozen(linear):
    """Not even by weight decay, which needs no gradient; and it keeps no moments for it."""
    vae, params = _blind(linear)
    start = refinement_params(with_refinement(vae), params, KEY)
    optimizer = encoder_only(optax.adamw(0.1, weight_decay=0.5))
    state = optimizer.init(start)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, start), state, start)
    assert not any(
        np.any(leaf) for leaf in jax.tree.leaves((updates.encoder.decoder, updates.decoder))
    )
    assert all(np.all(leaf) for leaf in jax.tree.leaves(updates.encoder.base))
    trained = len(jax.tree.leaves((start.encoder.base, start.encoder.networks)))
    assert len(jax.tree.leaves(state)) == 2 * trained + 1  # two moments, and a count


def test_it_starts_at_the_posterior_of_the_encoder(linear):
    refining = with_refinement(linear.vae, num_steps=2, hidden_sizes=(4,))
    assert refining == with_refinement(linear.vae, 2, (4,)) != linear.vae
    start = refinement_params(refining, linear.wrong, KEY)
    x = jnp.asarray(linear.images[0])

    @jax.jit
    def both(encoder):
        value = lambda encoder: gapjax.elbo(refining, start._replace(encoder=encoder), KEY, x)
        return refining.encode(encoder, x), jax.grad(value)(encoder)

    ours, gradient = both(start.encoder)
    theirs = linear.vae.encode(linear.wrong.encoder, x)
    for first, second in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient.decoder))
    assert all(np.any(network["Dense_1"]["kernel"]) for network in gradient.networks)


def test_a_steep_slope_does_not_overflow(linear):
    """An image that is far from what the model expects has a slope of millions."""
    refining = with_refinement(linear.vae, num_steps=2, hidden_sizes=(4,))
    start = refinement_params(refining, linear.wrong, KEY)
    leaves, structure = jax.tree.flatten(start.encoder.networks)
    keys = jax.random.split(KEY, len(leaves))
    noise = lambda key, leaf: 0.1 * jax.random.normal(key, leaf.shape)
    trained = jax.tree.unflatten(structure, map(noise, keys, leaves))
    params = start._replace(encoder=start.encoder._replace(networks=trained))
    far = 1e6 * jnp.asarray(linear.images[0])

    @jax.jit
    def both(params):
        value = lambda params: gapjax.elbo(refining, params, KEY, far)
        return refining.encode(params.encoder, far), jax.value_and_grad(value)(params)

    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(both(params)))


def test_what_cannot_be_refined_is_refused(linear):
    with pytest.raises(ValueError, match="num_steps is 0"):
        with_refinement(linear.vae, 0)
    flow = gapjax.mlp_vae((2, 2), latent_dim=2, hidden_sizes=(4,), posterior="flow")
    refining = with_refinement(flow)
    shapes = jax.eval_shape(refining.init, KEY)
    with pytest.raises(TypeError, match="the posterior is TransformedDistribution"):
        jax.eval_shape(refining.encode, shapes.encoder, jnp.zeros((2, 2)))
