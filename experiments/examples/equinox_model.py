"""A VAE of Equinox modules: eqx.partition gives the parameters, eqx.combine the module.

python -m experiments.examples.equinox_model
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist

import gapjax
from experiments.examples import account

LATENT_DIM, HIDDEN = 10, 100


def modules(rng_key):
    """The two networks."""
    encoder_key, decoder_key = jax.random.split(rng_key)
    encoder = eqx.nn.MLP(64, 2 * LATENT_DIM, HIDDEN, depth=1, key=encoder_key)
    return encoder, eqx.nn.MLP(LATENT_DIM, 64, HIDDEN, depth=1, key=decoder_key)


def init(rng_key):
    """New parameters: the arrays of the networks."""
    return gapjax.VAEParams(*(eqx.filter(net, eqx.is_inexact_array) for net in modules(rng_key)))


# What is no array, such as activation functions, is the same for all parameters.
_, encoder_rest = eqx.partition(modules(jax.random.key(0))[0], eqx.is_inexact_array)
_, decoder_rest = eqx.partition(modules(jax.random.key(0))[1], eqx.is_inexact_array)


def encode(params, x):
    """One image [8, 8] to q(z given x)."""
    out = eqx.combine(params, encoder_rest)(x.ravel().astype(jnp.float32))
    loc, raw_scale = jnp.split(out, 2)
    return dist.Normal(loc, jax.nn.softplus(raw_scale)).to_event(1)


def decode(params, z):
    """One z to p(x given z) over [8, 8]."""
    return dist.Bernoulli(logits=eqx.combine(params, decoder_rest)(z).reshape(8, 8)).to_event(2)


data = gapjax.load_dataset("digits")
train, test = data.train[:360], data.test
prior = dist.Normal(jnp.zeros(LATENT_DIM), jnp.ones(LATENT_DIM)).to_event(1)
vae = gapjax.VAE(init, encode, decode, prior)
state, _ = gapjax.train(
    vae, gapjax.data_source(train), jax.random.key(0), num_epochs=100, batch_size=60
)
account(vae, state.params, train, test)
