"""Optimizers move the encoder as they say and the decoder not at all; the rule that ends it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gapjax
from gapjax import optimizers
from gapjax.infer.search import _rule
from gapjax.optimizers import PlateauState, cosine_adam, scale_learning_rate

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


@pytest.mark.parametrize(
    "make",
    [
        gapjax.adam,
        lambda rate: cosine_adam(rate, 10, warmup=0.1),
        lambda rate: gapjax.encoder_only(gapjax.adam(rate)),
        lambda rate: gapjax.encoder_only(cosine_adam(rate, 10)),
    ],
    ids=["adam", "cosine", "encoder", "encoder_cosine"],
)
def test_optimizers_made_alike_are_equal(make):
    assert make(1e-3) == make(1e-3) and hash(make(1e-3)) == hash(make(1e-3))
    assert make(1e-3) != make(1e-4)


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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_adam_takes_steps_in_half_precision(dtype):
    """Its constants are plain numbers: 0.999 is 1 in bfloat16, and 1e-8 is 0 in float16."""
    params = {"w": jnp.ones(3, dtype)}
    optimizer = gapjax.adam(1e-2)
    state = optimizer.init(params)
    assert list(state.hyperparams) == ["learning_rate"]
    updates, after = optimizer.update({"w": jnp.full(3, 0.5, dtype)}, state, params)
    np.testing.assert_allclose(updates["w"].astype(jnp.float32), -1e-2, rtol=1e-2)
    assert jax.tree.map(jnp.dtype, after) == jax.tree.map(jnp.dtype, state)


def test_lbfgs_without_a_line_search_moves_the_encoder_alone():
    start = jax.tree.map(jnp.copy, PARAMS)
    optimizer = gapjax.encoder_only(optax.lbfgs(0.4, linesearch=None))
    params, _, updates = _run(optimizer, start, 10)
    np.testing.assert_allclose(params.encoder["w"], -0.5, atol=0.05)
    np.testing.assert_array_equal(updates.decoder["w"], np.zeros(3))


# --- the plateau rule ---------------------------------------------------------------------------

RULE = gapjax.Convergence(tolerance=0.1, decay=0.5, num_decays=1)
#         better, too little but best, worse,  not a number, better
VALUES = [1.0, 1.05, 0.7, float("nan"), 2.0]
BEST = [1.0, 1.05, 1.05, 1.05, 2.0]
PLATEAUS = [0, 1, 2, 3, 3]
FACTORS = [1.0, 0.5, 0.5, 0.5, 1.0]
IS_BEST = [True, True, False, False, True]


@pytest.mark.parametrize("as_value", [float, jnp.float32], ids=["float", "array"])
def test_values_are_judged_by_the_best_before_them(as_value):
    state = PlateauState(as_value(0.0), 0)
    jitted = jax.jit(optimizers.judge, static_argnums=0)
    judge = optimizers.judge if as_value is float else jitted
    for value, best, plateaus, factor, is_best in zip(
        VALUES, BEST, PLATEAUS, FACTORS, IS_BEST, strict=True
    ):
        state, judgement = judge(RULE, state, as_value(value))
        assert float(state.best) == pytest.approx(best)
        assert (int(state.num_plateaus), float(judgement.factor)) == (plateaus, factor)
        assert bool(judgement.is_best) == is_best
        assert optimizers.is_finished(RULE, state.num_plateaus) == (plateaus > 1)


def test_python_floats_stay_float64():
    state, judgement = optimizers.judge(RULE, PlateauState(1.0, 0), 1.0 + 1e-12)
    assert judgement.is_best
    assert float(state.best) == 1.0 + 1e-12


def test_the_rule_of_a_posterior_search_is_this_one():
    assert _rule(gapjax.PosteriorSearch(tolerance=0.1, decay=0.5, num_decays=1)) == RULE
