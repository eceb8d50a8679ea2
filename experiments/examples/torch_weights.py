"""The weights of a VAE trained in PyTorch: its own BPD is ours, and then the gap is measured.

python -m experiments.examples.torch_weights
"""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import torch
from torch.nn.functional import relu, softplus

import gapjax
from experiments.examples import account


def torch_elbo(encoder, decoder, x):
    """The ELBO of a batch [B, 64] in nats [B]."""
    loc, raw_scale = encoder[1](relu(encoder[0](x))).chunk(2, dim=-1)
    q = torch.distributions.Normal(loc, softplus(raw_scale))
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    logits = decoder[1](relu(decoder[0](q.rsample())))
    return torch.distributions.Bernoulli(logits=logits).log_prob(x).sum(-1) - kl.sum(-1)


def apply(params, inputs):
    """The same network in JAX; a PyTorch weight is [out, in]."""
    first, first_bias, last, last_bias = params
    return last @ jax.nn.relu(first @ inputs + first_bias) + last_bias


def encode(params, x):
    """One image [8, 8] to q(z given x)."""
    loc, raw_scale = jnp.split(apply(params, x.ravel().astype(jnp.float32)), 2)
    return dist.Normal(loc, jax.nn.softplus(raw_scale)).to_event(1)


data = gapjax.load_dataset("digits")
train, test = data.train[:360], data.test
torch.manual_seed(0)
linear = torch.nn.Linear
networks = torch.nn.ModuleList([linear(64, 100), linear(100, 20), linear(10, 100), linear(100, 64)])
optimizer = torch.optim.Adam(networks.parameters(), lr=1e-3)
as_torch = lambda images: torch.as_tensor(images.reshape(-1, 64), dtype=torch.float32)
for batch in as_torch(train).split(60) * 100:
    optimizer.zero_grad()
    (-torch_elbo(networks[:2], networks[2:], batch).mean()).backward()
    optimizer.step()
with torch.no_grad():
    many = as_torch(test).repeat(100, 1)
    theirs = gapjax.bits_per_dim(torch_elbo(networks[:2], networks[2:], many).mean().item(), (8, 8))

weights = [weight.detach().numpy().copy() for weight in networks.parameters()]
params = gapjax.VAEParams(encoder=weights[:4], decoder=weights[4:])
decode = lambda params, z: dist.Bernoulli(logits=apply(params, z).reshape(8, 8)).to_event(2)
vae = gapjax.VAE(lambda _: params, encode, decode, dist.Normal(jnp.zeros(10), 1.0).to_event(1))
ours = gapjax.evaluate(vae, params, jax.random.key(2), test, num_samples=100).bpd
print(f"BPD of {len(test)} test images: {theirs:.4f} by PyTorch, {ours:.4f} by gapjax")
assert abs(theirs - ours) < 3e-3, "these are not the same model"
account(vae, params, train, test)
