"""What is drawn from a VAE: samples of the model, and reconstructions."""

import jax
import jax.numpy as jnp
import numpy as np

from gapjax.vae import reconstruct, sample_model


def test_samples_of_the_model_follow_it(linear):
    draw = jax.vmap(lambda key: sample_model(linear.vae, linear.exact.decoder, key))
    x = np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(0), 20_000)), np.float64)
    weight, bias = (np.asarray(linear.exact.decoder[name]) for name in ("weight", "bias"))
    covariance = weight @ weight.T + 0.25 * np.eye(len(bias))
    np.testing.assert_allclose(x.mean(0), bias, atol=5 * np.sqrt(covariance.max() / len(x)))
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=7 * covariance.max() / len(x) ** 0.5)


def test_reconstruct_is_the_mean_at_a_posterior_sample(linear):
    rng_key, x = jax.random.key(0), jnp.asarray(linear.images[0])
    z = linear.vae.encode(linear.exact.encoder, x).sample(rng_key)
    weight, bias = linear.exact.decoder["weight"], linear.exact.decoder["bias"]
    ours = reconstruct(linear.vae, linear.exact, rng_key, x)
    np.testing.assert_allclose(ours, weight @ z + bias, rtol=1e-5)
