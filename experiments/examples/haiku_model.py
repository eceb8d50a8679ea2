"""A VAE of Haiku modules: hk.transform gives a pure function of the parameters.

python -m experiments.examples.haiku_model
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpyro.distributions as dist

import gapjax
from experiments.examples import account

LATENT_DIM, HIDDEN = 10, 100


def encoder(x):
    """One image [8, 8] to q(z given x)."""
    out = hk.nets.MLP([HIDDEN, 2 * LATENT_DIM])(x.ravel().astype(jnp.float32))
    loc, raw_scale = jnp.split(out, 2)
    return dist.Normal(loc, jax.nn.softplus(raw_scale)).to_event(1)


def decoder(z):
    """One z to p(x given z) over [8, 8]."""
    logits = hk.nets.MLP([HIDDEN, 64])(z).reshape(8, 8)
    return dist.Bernoulli(logits=logits).to_event(2)


encode, decode = (hk.without_apply_rng(hk.transform(net)) for net in (encoder, decoder))


def init(rng_key):
    """New parameters."""
    encoder_key, decoder_key = jax.random.split(rng_key)
    return gapjax.VAEParams(
        encode.init(encoder_key, jnp.zeros((8, 8))), decode.init(decoder_key, jnp.zeros(LATENT_DIM))
    )


data = gapjax.load_dataset("digits")
train, test = data.train[:360], data.test
prior = dist.Normal(jnp.zeros(LATENT_DIM), jnp.ones(LATENT_DIM)).to_event(1)
vae = gapjax.VAE(init, encode.apply, decode.apply, prior)
state, _ = gapjax.train(
    vae, gapjax.data_source(train), jax.random.key(0), num_epochs=100, batch_size=60
)
account(vae, state.params, train, test)
