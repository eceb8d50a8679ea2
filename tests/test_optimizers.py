"""What is optimised: the encoder moves as its optimizer says, the decoder not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gapjax
from gapjax.fit.optimizers import scale_learning_rate

PARAMS = gapjax.VAEParams(
    encoder={"w": jnp.array([1.0, -2.0])}, decoder={"w": jnp.array([3.0, -0.0, 5.0])}
)


def _gradients(params):
    return jax.tree.map(lambda p: 2 * p + 1, params)


def _adam_by_hand(p, steps, learning_rate):
    m = v = 0.0
    for t in range(1, steps + 1):
        g = 2 * p + 1
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - learning_rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return p


def _run(optimizer, params, steps):
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(_gradients(params), state, params)
        return optax.apply_updates(params, updates), state, updates

    for _ in range(steps):
        params, state, updates = step(params, state)
    return params, state, updates


@pytest.mark.parametrize("inner", [gapjax.adam(0.1), optax.adam(0.1)], ids=["gapjax", "optax"])
def test_encoder_only_is_adam_on_the_encoder_and_nothing_on_the_decoder(inner):
    params, state, updates = _run(gapjax.encoder_only(inner), PARAMS, 5)
    by_hand = _adam_by_hand(np.asarray(PARAMS.encoder["w"], np.float64), 5, 0.1)
    np.testing.assert_allclose(params.encoder["w"], by_hand, rtol=1e-5)
    np.testing.assert_array_equal(updates.decoder["w"], np.zeros(3))
    np.testing.assert_array_equal(params.decoder["w"], PARAMS.decoder["w"])
    # Moments of the encoder, and not a single one of the decoder.
    shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
    assert shapes.count((2,)) == 2 and (3,) not in shapes


def test_an_optimizer_that_moves_without_a_gradient_leaves_the_decoder():
    """Weight decay would shrink it, were it not frozen."""
    params, _, updates = _run(gapjax.encoder_only(optax.adamw(0.1, weight_decay=0.5)), PARAMS, 2)
    np.testing.assert_array_equal(updates.decoder["w"], np.zeros(3))
    assert np.all(params.encoder["w"] != PARAMS.encoder["w"])


def test_adam_trains_both_without_the_restriction():
    params, _, _ = _run(gapjax.adam(0.1), PARAMS, 3)
    for ours, start in zip(jax.tree.leaves(params), jax.tree.leaves(PARAMS), strict=True):
        by_hand = _adam_by_hand(np.asarray(start, np.float64), 3, 0.1)
        np.testing.assert_allclose(ours, by_hand, rtol=1e-5, atol=1e-6)


def test_equal_arguments_give_the_same_object():
    assert gapjax.adam(1e-3) is gapjax.adam(1e-3)
    assert gapjax.adam(1e-3) is not gapjax.adam(1e-4)
    assert gapjax.encoder_only(gapjax.adam(1e-3)) is gapjax.encoder_only(gapjax.adam(1e-3))


@pytest.mark.parametrize("wrap", [lambda o: o, gapjax.encoder_only], ids=["vae", "encoder"])
def test_scale_learning_rate_scales_the_next_steps(wrap):
    optimizer = wrap(gapjax.adam(0.1))
    state = optimizer.init(PARAMS)
    scaled = scale_learning_rate(state, 0.25)
    assert jax.tree.structure(scaled) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(scaled), strict=True):
        assert jax.typeof(before) == jax.typeof(after)  # or the next step would be recompiled
    updates, quarters = (
        optimizer.update(_gradients(PARAMS), s, PARAMS)[0].encoder["w"] for s in (state, scaled)
    )
    np.testing.assert_allclose(quarters, 0.25 * updates, rtol=1e-6)
    again, _ = optimizer.update(_gradients(PARAMS), state, PARAMS)
    np.testing.assert_array_equal(again.encoder["w"], updates)  # the state given is as it was


def test_scale_learning_rate_needs_one_in_the_state():
    with pytest.raises(KeyError, match="inject_hyperparams"):
        scale_learning_rate(optax.adam(0.1).init(PARAMS), 0.5)
