"""Latents in layers, compressed by bits-back and by Bit-Swap, which needs fewer initial bits.

python -m experiments.examples.compress_hierarchy
"""

import jax
import numpy as np

import gapjax
from gapjax import models

data = gapjax.load_dataset("grey_digits")
# q(z1 given x) q(z2 given z1) is a Markov chain from the image up, as Bit-Swap needs it.
vae = models.hierarchical_vae(
    data.event_shape, "discretized_logistic", levels=data.levels, latent_dims=(12, 12),
    hidden_sizes=(32,), form="bottom_up",
)  # fmt: skip
source = gapjax.data_source(data.train)
state, _ = gapjax.train(vae, source, jax.random.key(0), num_epochs=40, batch_size=50)

images = data.test
bound = gapjax.evaluate(vae, state.params, jax.random.key(1), images)
print(f"{len(images)} test images of {images[0].size} pixels with {data.levels} levels")
print(f"their negative ELBO: {bound.bpd * images.size / 8:.0f} bytes")
for order in ("bits_back", "bit_swap"):
    content = gapjax.compress(vae, state.params, images, order=order)
    assert np.array_equal(gapjax.decompress(vae, state.params, content), images)
    alone = gapjax.compress(vae, state.params, images[:1], order=order)
    print(f"{order}: {len(content)} bytes; a file with one image: {len(alone)}")
