"""Under `jax_numpy_dtype_promotion="strict"`: gapjax itself mixes no dtypes.

Distributions and optimizers of other libraries do; they are called under the promotion that they
are written for.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

import gapjax
from gapjax.fit.steps import kernel
from gapjax.measure.annealing import annealed_importance_sampling, reverse_annealing
from gapjax.measure.importance import importance_sampling

KEY = jax.random.key(0)
IMAGES = (np.arange(28).reshape(7, 2, 2) % 3 == 0).astype(np.uint8)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def test_it_is_strict():
    with pytest.raises(ValueError, match="strict"):
        jnp.ones(2, jnp.int32) + jnp.ones(2, jnp.float32)


def _models():
    make = functools.partial(gapjax.mlp_vae, (2, 2), latent_dim=2, hidden_sizes=(3,))
    yield "bernoulli", make("bernoulli")
    yield "full covariance", make("bernoulli", posterior="full_covariance")
    yield "grey flow", make("discretized_logistic", levels=17, posterior="flow")


@pytest.mark.parametrize("name, vae", list(_models()), ids=lambda value: str(value)[:15])
def test_every_function_of_one_example_and_every_step(name, vae):
    """Dtypes are promoted where a program is traced; nothing is computed."""
    params, x = random_params(vae), jnp.asarray(IMAGES[0])
    annealing = gapjax.Annealing(num_temperatures=2, num_chains=2, num_leapfrog=1)
    for function in (
        functools.partial(gapjax.elbo, vae, num_samples=2),
        functools.partial(gapjax.importance_weighted_bound, vae, num_samples=2),
        functools.partial(importance_sampling, vae, num_samples=3, chunk_size=2),
        functools.partial(annealed_importance_sampling, vae, annealing=annealing),
        lambda params, key, x: reverse_annealing(vae, params, key, x, jnp.zeros(2), annealing),
        lambda params, key, x: gapjax.sample_model(vae, params.decoder, key),
        functools.partial(gapjax.reconstruct, vae),
    ):
        jax.eval_shape(function, params, KEY, x)
    data = gapjax.data_source(IMAGES)
    model = gapjax.model_source(vae, params.decoder, 7)
    for stratified in (False, True):
        source = gapjax.mixture_source(model, data, 0.5, stratified=stratified)
        optimizer = gapjax.encoder_only(gapjax.adam(1e-3))
        init, step = kernel(vae, source, optimizer, batch_size=3)
        jax.eval_shape(step, init(params, KEY))


def test_a_small_experiment_from_training_to_the_ledger():
    vae = gapjax.mlp_vae((2, 2), latent_dim=2, hidden_sizes=(3,))
    options = {"num_epochs": 2, "batch_size": 3}
    state, curve = gapjax.train(vae, gapjax.data_source(IMAGES), KEY, **options)
    refit = gapjax.self_consistent(vae, state.params, IMAGES, jax.random.split(KEY), **options)[0]
    optimal = gapjax.optimal_inference(
        vae, state.params, IMAGES, KEY, monitor_every=1,
        until=gapjax.Convergence(tolerance=9.0, num_decays=1), **options,
    )  # fmt: skip
    evaluation = gapjax.evaluate(vae, refit.params, KEY, IMAGES)
    assert np.isfinite([*curve.loss_bpd, evaluation.bpd]).all() and optimal.converged
    search = gapjax.PosteriorSearch(1, num_heldout=2, steps_per_round=1, max_rounds=1)
    ledger = gapjax.ledger(
        vae, state.params, KEY, IMAGES, IMAGES, num_samples=2, search=search,
        method="importance", num_importance_samples=4,
    )  # fmt: skip
    assert np.isfinite(ledger.test.optimal.nats)
