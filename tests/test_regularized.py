"""An encoder with bounded weights is one whose weights were bounded by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gapjax
from gapjax import models

KEY = jax.random.key(0)


def test_bounded_weights_are_those_of_an_encoder_with_them():
    vae = gapjax.mlp_vae((3, 3), latent_dim=2, hidden_sizes=(4,))
    bounded = models.with_weight_norm(vae, 0.5)
    assert bounded == models.with_weight_norm(vae, 0.5)
    params = vae.init(KEY)
    large = jax.tree.map(lambda leaf: 3.0 * leaf, params.encoder)
    norm = lambda w: np.linalg.norm(w, axis=0)

    def by_hand(w):
        w = np.asarray(w)
        return jnp.asarray(w * np.minimum(1, 0.5 / norm(w)) if w.ndim == 2 else w)

    x = jnp.ones((3, 3), jnp.uint8)
    found = bounded.encode(large, x).base_dist
    wanted = vae.encode(jax.tree.map(by_hand, large), x).base_dist
    np.testing.assert_allclose(found.loc, wanted.loc, rtol=1e-5)
    np.testing.assert_allclose(found.scale, wanted.scale, rtol=1e-5)
    assert abs(found.loc - vae.encode(large, x).base_dist.loc).max() > 0.1
    zeros = jax.tree.map(jnp.zeros_like, large)
    slope = jax.grad(lambda encoder: bounded.encode(encoder, x).base_dist.loc.sum())(zeros)
    assert all(map(np.all, jax.tree.map(np.isfinite, jax.tree.leaves(slope))))
    with pytest.raises(ValueError, match="max_norm is 0"):
        models.with_weight_norm(vae, 0)
