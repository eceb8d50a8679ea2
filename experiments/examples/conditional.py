"""A VAE of digits given their labels: an example is `Given(x, context)`.

python -m experiments.examples.conditional

Encoder, decoder and prior see the label. Samples of the model, on which self-consistent training
fits the encoder, take their labels from the training data.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gapjax
from experiments.examples import account
from gapjax import models
from gapjax.model.networks import MLP, apply_module, init_module

ENCODER, DECODER = MLP((100,), 20), MLP((100,), 64)


def init(rng_key):
    """New parameters; the prior's mean of each label is the decoder's."""
    encoder_key, decoder_key = jax.random.split(rng_key)
    network = init_module(DECODER, decoder_key, jnp.zeros(10 + 10))
    decoder = {"network": network, "prior": jnp.zeros((10, 10))}
    return gapjax.VAEParams(init_module(ENCODER, encoder_key, jnp.zeros(64 + 10)), decoder)


def encode(params, x, label):
    """One image [8, 8] and its label to q(z given x, label)."""
    inputs = jnp.concatenate([x.ravel().astype(jnp.float32), label])
    loc, raw_scale = jnp.split(apply_module(ENCODER, params, inputs), 2)
    return dist.Normal(loc, jax.nn.softplus(raw_scale)).to_event(1)


def decode(params, z, label):
    """One z and a label to p(x given z, label)."""
    logits = apply_module(DECODER, params["network"], jnp.concatenate([z, label]))
    return dist.Bernoulli(logits=logits.reshape(8, 8)).to_event(2)


def prior(params, label):
    """p(z given label), learned with the decoder."""
    return dist.Normal(params["prior"] @ label, 1.0).to_event(1)


images, labels = load_digits(return_X_y=True)
examples = (images >= 8).astype(np.uint8).reshape(-1, 8, 8), np.eye(10, dtype=np.float32)[labels]
parts = train_test_split(*examples, test_size=0.2, random_state=0, stratify=labels)
train, test = models.Given(parts[0][:360], parts[2][:360]), models.Given(parts[1], parts[3])
vae = gapjax.VAE(init, encode, decode, prior)
state, _ = gapjax.train(
    vae, gapjax.data_source(train), jax.random.key(0), num_epochs=100, batch_size=60
)
account(vae, state.params, train, test)
