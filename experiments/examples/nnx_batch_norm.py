"""A VAE of Flax NNX modules with batch normalization, trained by a loop of its own.

python -m experiments.examples.nnx_batch_norm

gapjax sees one example at a time, so the statistics of the batches stay as training left them, and
only the weights are parameters.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from flax import nnx

import gapjax
from experiments.examples import account


def network(num_inputs, num_outputs, rngs):
    """A hidden layer with batch normalization; inputs and outputs have a batch axis."""
    layers = nnx.Linear(num_inputs, 100, rngs=rngs), nnx.BatchNorm(100, rngs=rngs)
    return nnx.Sequential(*layers, nnx.relu, nnx.Linear(100, num_outputs, rngs=rngs))


def moments(encoder, x):
    """Means and scales [B, 10] of q(z given x) of a batch [B, 8, 8]."""
    loc, raw_scale = jnp.split(encoder(x.reshape(-1, 64).astype(jnp.float32)), 2, axis=-1)
    return loc, jax.nn.softplus(raw_scale)


def loss(networks, x, rng_key):
    """Minus the ELBO of a batch, in nats of one image."""
    q = dist.Normal(*moments(networks[0], x))
    p = dist.Bernoulli(logits=networks[1](q.rsample(rng_key)).reshape(x.shape))
    kl = dist.kl_divergence(q, dist.Normal(0.0, 1.0))
    return (kl.sum() - p.log_prob(x.astype(jnp.float32)).sum()) / len(x)


@nnx.jit
def step(networks, optimizer, x, rng_key):
    """One step of Adam; it moves the statistics as well."""
    optimizer.update(networks, nnx.grad(loss)(networks, x, rng_key))


data = gapjax.load_dataset("digits")
train, test = data.train[:360], data.test
networks = nnx.List([network(64, 20, nnx.Rngs(0)), network(10, 64, nnx.Rngs(1))])
optimizer = nnx.Optimizer(networks, gapjax.adam(1e-3), wrt=nnx.Param)
for number, key in enumerate(jax.random.split(jax.random.key(0), 400)):
    step(networks, optimizer, np.roll(train, 60 * number, axis=0)[:60], key)

networks.eval()  # from here on the statistics are those of the training batches
(encoder, phi, kept), (decoder, theta, rest) = (nnx.split(n, nnx.Param, ...) for n in networks)
one = lambda batch: dist.Normal(*(moment[0] for moment in batch)).to_event(1)
encode = lambda phi, x: one(moments(nnx.merge(encoder, phi, kept), x[None]))
logits = lambda theta, z: nnx.merge(decoder, theta, rest)(z[None]).reshape(8, 8)
decode = lambda theta, z: dist.Bernoulli(logits=logits(theta, z)).to_event(2)
prior, params = dist.Normal(jnp.zeros(10), 1.0).to_event(1), gapjax.VAEParams(phi, theta)
account(gapjax.VAE(lambda rng_key: params, encode, decode, prior), params, train, test)
