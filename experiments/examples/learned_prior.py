"""A learned prior, a mixture of Gaussians, beside the standard normal one of the same networks.

python -m experiments.examples.learned_prior

The prior is trained with the decoder and frozen with it in refits.
"""

import jax

import gapjax
from experiments.examples import account
from gapjax import models

data = gapjax.load_dataset("digits")
train, test = data.train[:360], data.test
plain = gapjax.mlp_vae(data.event_shape, latent_dim=10, hidden_sizes=(100,))
priors = {
    "standard normal": plain,
    "mixture of 20 Gaussians": models.with_prior(plain, models.MixturePrior(10, 20)),
}
for name, vae in priors.items():
    state, _ = gapjax.train(
        vae, gapjax.data_source(train), jax.random.key(0), num_epochs=100, batch_size=60
    )
    print(name)
    account(vae, state.params, train, test)
