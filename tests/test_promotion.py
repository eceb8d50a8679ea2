"""Under `jax_numpy_dtype_promotion="strict"`: gapjax itself mixes no dtypes.

Distributions and optimizers of other libraries do; the programs that gapjax compiles, and its
functions of one example, call them under the promotion that they are written for.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

import gapjax
from gapjax import kernel, parallel
from gapjax.infer.learned import refinement_params, with_refinement
from gapjax.measure.annealing import annealed_importance_sampling, reverse_annealing
from gapjax.measure.importance import importance_sampling
from gapjax.vae import reconstruct, sample_model

KEY = jax.random.key(0)
VAE_OF_TWO = gapjax.mlp_vae((2, 2), latent_dim=2, hidden_sizes=(3,))
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
        lambda params, key, x: sample_model(vae, params.decoder, key),
        functools.partial(reconstruct, vae),
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
    refit = gapjax.self_consistent(vae, state.params, IMAGES, KEY, **options)
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


@pytest.mark.parametrize("name, vae", list(_models())[::2], ids=lambda value: str(value)[:15])
def test_the_posteriors_of_each_image(name, vae):
    """Newton's method on a diagonal Gaussian, and Adam on any family."""
    params = random_params(vae)
    refiner = gapjax.Refiner(num_steps=1) if name == "bernoulli" else gapjax.Refiner("adam", 1)
    refined = gapjax.refine(vae, params, KEY, IMAGES, refiner)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(refined.posteriors))
    learned = with_refinement(VAE_OF_TWO)
    start = refinement_params(learned, random_params(VAE_OF_TWO), KEY)
    assert np.isfinite(gapjax.evaluate(learned, start, KEY, IMAGES).bpd)


@pytest.mark.parametrize("likelihood", ["bernoulli", "discretized_logistic"])
def test_files_are_the_same_bytes(likelihood):
    """Also of binary images, whose programs mix integers and floats."""
    pytest.importorskip("constriction")
    levels = {"bernoulli": 2, "discretized_logistic": 17}[likelihood]
    vae = gapjax.mlp_vae((2, 2), likelihood, latent_dim=2, hidden_sizes=(3,), levels=levels)
    params = random_params(vae)
    for refiner in (gapjax.Refiner(num_steps=0), gapjax.Refiner(), gapjax.Refiner("adam", 1)):
        content = gapjax.compress(vae, params, IMAGES, refiner)
        np.testing.assert_array_equal(gapjax.decompress(vae, params, content), IMAGES)
        parallel._compiled.cache_clear()
        with jax.numpy_dtype_promotion("standard"):
            assert gapjax.compress(vae, params, IMAGES, refiner) == content
        parallel._compiled.cache_clear()
