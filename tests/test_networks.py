"""The Linen modules: shapes, the start of training, and finite outputs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gapjax.model import networks


def _params(module, inputs):
    """Random parameters in the shapes of the module's own, which need not be compiled."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


def _shapes(params):
    return sorted(leaf.shape for leaf in jax.tree.leaves(params))


def test_encoder_gives_a_location_and_a_positive_scale():
    encoder = networks.MLPEncoder((7, 5), 3)
    x = jnp.linspace(0.0, 1.0, 12).reshape(3, 4)
    params = _params(encoder, x)
    loc, scale, _ = jax.jit(encoder.apply)({"params": params}, x)
    chex.assert_shape([loc, scale], (3,))
    assert np.all(scale > 0)
    assert _shapes(params) == sorted([(12, 7), (7,), (7, 5), (5,), (5, 6), (6,)])


def test_decoder_gives_a_slice_for_each_parameter():
    decoder = networks.MLPDecoder((5, 7), (3, 4), 2)
    z = jnp.arange(3.0)
    params = _params(decoder, z)
    out = jax.eval_shape(decoder.apply, {"params": params}, z)
    assert out.shape == (2, 3, 4)
    assert _shapes(params) == sorted([(3, 5), (5,), (5, 7), (7,), (7, 24), (24,)])


def test_mlp_is_relu_layers_and_a_linear_one():
    mlp = networks.MLP((6, 5), 2)
    inputs = jnp.linspace(-1.0, 1.0, 4)
    params = _params(mlp, inputs)
    hidden = np.asarray(inputs)
    for name in ("Dense_0", "Dense_1", "Dense_2"):
        hidden = hidden @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])
        hidden = hidden if name == "Dense_2" else np.maximum(hidden, 0)
    np.testing.assert_allclose(mlp.apply({"params": params}, inputs), hidden, rtol=1e-5, atol=1e-6)


def test_kernels_start_uniform_within_one_over_root_fan_in():
    init = jax.jit(networks.MLP((200,), 40).init)
    params = init(jax.random.key(0), jnp.zeros(64))["params"]
    for layer, fan_in in (("Dense_0", 64), ("Dense_1", 200)):
        kernel, bound = np.asarray(params[layer]["kernel"]), fan_in**-0.5
        assert 0.98 * bound < np.abs(kernel).max() <= bound * (1 + 1e-6)
        np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.05)


@pytest.mark.parametrize("raw", [-1e38, -200.0, 0.0, 1e38])
def test_scale_has_a_finite_logarithm_and_gradient_for_any_output(raw):
    encoder = networks.MLPEncoder((), 1)
    params = {"MLP_0": {"Dense_0": {"kernel": jnp.zeros((1, 2)), "bias": jnp.array([0.0, raw])}}}
    log_scale = lambda params: jnp.log(encoder.apply({"params": params}, jnp.ones(1))[1][0])
    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(log_scale))(params))


def test_an_autoregressive_layer_sees_earlier_latents_alone():
    module = networks.Autoregressive(8)
    z, context = jnp.arange(1.0, 5.0), jnp.linspace(-1.0, 1.0, 8)
    shapes = jax.eval_shape(module.init, jax.random.key(0), z, context)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    for jacobian in jax.jacobian(lambda z: module.apply(params, z, context))(z):
        assert np.all(np.triu(jacobian) == 0)
        assert np.abs(jacobian[3, :3]).sum() > 0  # and it does see them
