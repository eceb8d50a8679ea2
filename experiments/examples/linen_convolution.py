"""A convolutional VAE in Flax Linen, and how much its encoder over-fits.

python -m experiments.examples.linen_convolution
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpyro.distributions as dist

import gapjax
from experiments.examples import account


class Encoder(nn.Module):
    """One image [8, 8] to q(z given x); group normalization sees one image alone."""

    @nn.compact
    def __call__(self, x):  # noqa: D102
        hidden = nn.Conv(8, (3, 3), (2, 2))(x[..., None].astype(jnp.float32))
        hidden = nn.relu(nn.GroupNorm(2)(hidden))
        loc, raw_scale = jnp.split(nn.Dense(20)(hidden.ravel()), 2)
        return dist.Normal(loc, nn.softplus(raw_scale)).to_event(1)


class Decoder(nn.Module):
    """One z [10] to p(x given z) over [8, 8]."""

    @nn.compact
    def __call__(self, z):  # noqa: D102
        hidden = nn.relu(nn.Dense(4 * 4 * 8)(z)).reshape(4, 4, 8)
        logits = nn.ConvTranspose(1, (3, 3), (2, 2))(hidden)
        return dist.Bernoulli(logits=logits[..., 0]).to_event(2)


def init(rng_key):
    """New parameters."""
    keys = jax.random.split(rng_key)
    inputs = jnp.zeros((8, 8)), jnp.zeros(10)
    return gapjax.VAEParams(Encoder().init(keys[0], inputs[0]), Decoder().init(keys[1], inputs[1]))


data = gapjax.load_dataset("digits")
train, test = data.train[:360], data.test
prior = dist.Normal(jnp.zeros(10), jnp.ones(10)).to_event(1)
vae = gapjax.VAE(init, Encoder().apply, Decoder().apply, prior)
state, _ = gapjax.train(
    vae, gapjax.data_source(train), jax.random.key(0), num_epochs=30, batch_size=60,
    optimizer=gapjax.adam(3e-3),
)  # fmt: skip
account(vae, state.params, train, test, num_epochs=10)
