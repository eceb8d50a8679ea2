"""Recipes: the paper's is `self_consistent` to the bit; other encoders; what a recipe names."""

import dataclasses
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from conftest import assert_same_bits

import gapjax
from gapjax import models
from gapjax.fit import recipes
from gapjax.fit.recipes import (
    OBJECTIVES,
    RECIPES,
    SOURCES,
    Recipe,
    default_recipe,
    recipe_member,
    recipe_model,
    recipe_options,
    recipe_source,
)
from gapjax.fit.sources import first_example
from gapjax.model.mlp import mlp_encoder
from gapjax.models.counts import LIKELIHOODS
from gapjax.vae import Encoder, with_encoder

KEY = jax.random.key(11)
_EPOCHS, _BATCH = 2, 30
_SHORT = {"num_epochs": _EPOCHS, "batch_size": _BATCH}
_but = dataclasses.replace


def _close(small, recipe, key=KEY, params=None, **options):
    if not isinstance(recipe, Recipe):
        recipe = RECIPES[recipe]
    return gapjax.close_gap(
        small.vae, params or small.params, small.train_images, key, _but(recipe, **_SHORT),
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("name, alpha", [("paper", 0.5), ("control", 0)])
def test_the_paper_s_recipe_is_self_consistent_training_to_the_bit(small, name, alpha):
    ours = _close(small, name)
    theirs = gapjax.self_consistent(
        small.vae, small.params, small.train_images, KEY, alpha=alpha, **_SHORT
    )
    assert ours.vae is small.vae
    assert ours.refit.curve == theirs.curve
    assert_same_bits(ours.params, theirs.params)
    assert_same_bits(ours.refit.averaged_params, theirs.averaged_params)


@pytest.mark.parametrize("kind", ["bernoulli", "discretized_logistic", "normal"])
def test_without_a_name_the_recipe_is_the_best_for_pixels_and_real_numbers(kind):
    x = np.zeros((2, 3), np.uint8)
    assert default_recipe(gapjax.mlp_vae((3,), kind, latent_dim=2, hidden_sizes=(4,)), x) == "best"


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_without_a_name_the_recipe_for_counts_is_theirs(kind, monkeypatch):
    cells = models.count_examples(np.ones((6, 3), np.uint8))
    vae = models.count_vae(3, kind, latent_dim=2, hidden_sizes=(4,), max_library=3)
    followed = []
    monkeypatch.setattr(recipes, "recipe_options", lambda recipe, _: followed.append(recipe) or {})
    monkeypatch.setattr(recipes, "refit_encoder", lambda *_: SimpleNamespace(params=None))
    gapjax.close_gap(vae, vae.init(KEY), cells, KEY)
    assert followed == [RECIPES["counts"]]


def test_the_paper_s_recipe_has_the_defaults_of_self_consistent():
    recipe = RECIPES["paper"]
    assert (recipe.num_epochs, recipe.batch_size, recipe.learning_rate) == (100, 100, 1e-3)
    assert (recipe.schedule, recipe.objective, recipe.num_samples) == ("constant", "elbo", 1)
    assert not (recipe.hidden_sizes or recipe.refinement_steps)


def test_best_is_within_the_trained_encoder_s_cost(small):
    best = RECIPES["best"]
    assert best.hidden_sizes is None and best.evidence
    assert "data" not in dict(best.sources) or len(best.sources) > 1


@pytest.mark.parametrize("name", list(SOURCES))
def test_every_source_is_of_training_images_and_draws_their_levels(small, name):
    recipe = Recipe(((name, 1.0),))
    data = gapjax.data_source(small.train_images)
    source = recipe_source(recipe, small.vae, small.params, data)
    assert source.num_examples == len(small.train_images)
    draw = jax.eval_shape(
        lambda key: source.draw(source.begin_epoch(key), key, 0), jax.random.key(0)
    )
    assert draw.shape == (5, 5)
    assert np.issubdtype(draw.dtype, np.integer)


def test_a_recipe_keeps_the_decoder_and_the_source_as_trained(small):
    """Reconstructions are by the trained encoder, whatever the refit starts from."""
    recipe = Recipe(
        (("reconstructions", 1.0), ("data", 1.0)), schedule="cosine",
        objective="elbo_and_sleep",
    )  # fmt: skip
    closed = _close(small, recipe)
    assert_same_bits(closed.params.decoder, small.params.decoder)
    data = gapjax.data_source(small.train_images)
    source = recipe_source(recipe, small.vae, small.params, data)
    assert_same_bits(source.model.arrays[0], small.params)
    shapes = lambda tree: jax.tree.map(np.shape, tree)
    assert shapes(closed.params.encoder) == shapes(small.params.encoder)


def test_an_encoder_of_another_architecture_leaves_the_decoder_to_the_bit(small):
    recipe = _but(RECIPES["paper"], hidden_sizes=(24, 12))
    closed = _close(small, recipe)
    assert_same_bits(closed.params.decoder, small.params.decoder)
    sizes = sorted(leaf.shape for leaf in jax.tree.leaves(closed.params.encoder) if leaf.ndim == 2)
    assert sizes == [(12, 6), (24, 12), (25, 24)]
    bpd = lambda params: gapjax.evaluate(closed.vae, params, KEY, small.train_images).bpd
    start = closed.vae.init(KEY)._replace(decoder=small.params.decoder)
    assert bpd(closed.params) < bpd(start) - 0.05
    given = mlp_encoder((5, 5), latent_dim=3, hidden_sizes=(24, 12))
    again = _close(small, "paper", encoder=given)
    assert again.vae == closed.vae
    assert_same_bits(again.params, closed.params)


def test_a_new_encoder_takes_the_levels_from_the_likelihood(small):
    """Not from the largest value of the data, which here is below those of the model."""
    recipe = _but(RECIPES["paper"], hidden_sizes=(8,))
    levels = lambda vae: recipe_model(recipe, vae, small.train_images).encode.levels
    for number in (17, 256):
        assert levels(gapjax.mlp_vae((5, 5), "discretized_logistic", levels=number)) == number
    assert levels(small.vae) == 2
    real = lambda decoder, z: dist.Normal(jnp.zeros((5, 5)), 1.0).to_event(2)
    assert levels(small.vae._replace(decode=real)) == 2


def test_a_linear_encoder_is_a_new_one(small):
    """No hidden sizes are sizes, too, so that the trained encoder is no start."""
    recipe = _but(RECIPES["paper"], hidden_sizes=(), refinement_steps=1)
    model = recipe_model(recipe, small.vae, small.train_images)
    member = recipe_member(recipe, small.vae, small.params, small.train_images, KEY)
    shapes = lambda tree: jax.tree.map(np.shape, tree)
    assert shapes(member.params) == shapes(jax.eval_shape(model.init, KEY))


@pytest.mark.parametrize("shape", [(25,), (5, 5, 1)])
def test_every_recipe_has_a_source_for_any_data(small, shape):
    vae = gapjax.mlp_vae(shape, latent_dim=3, hidden_sizes=(4,))
    data = gapjax.data_source(small.train_images.reshape(-1, *shape))
    params = jax.eval_shape(vae.init, KEY)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    for recipe in RECIPES.values():
        moved = [name for name, _ in recipe.sources if "affine" in name and len(shape) == 1]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            source = recipe_source(recipe, vae, params, data)
        assert [", ".join(moved) in str(each.message) for each in told] == [True] * bool(moved)
        drawn = jax.eval_shape(first_example, source)
        assert drawn.shape == shape and np.issubdtype(drawn.dtype, np.integer)


def test_recipes_take_a_conditional_model_and_its_contexts():
    counts = np.random.default_rng(0).poisson(3.0, (12, 4)).astype(np.uint8)
    cells = models.count_examples(counts, batch=np.arange(12) % 2)
    vae = models.count_vae(4, latent_dim=2, hidden_sizes=(3,), num_batches=2)
    params = vae.init(KEY)
    closed = gapjax.close_gap(
        vae, params, cells, KEY, _but(RECIPES["counts"], num_epochs=1, batch_size=6)
    )
    assert closed.refit.num_steps == 2
    assert_same_bits(closed.params.decoder, params.decoder)
    for recipe in RECIPES.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = recipe_source(recipe, vae, params, gapjax.data_source(cells))
        drawn = jax.eval_shape(first_example, source)
        assert drawn.x.shape == (4,) and drawn.context["library"].shape == ()
    with pytest.raises(TypeError, match="hidden_sizes are of a feed-forward encoder of one array"):
        recipe_model(RECIPES["larger"], vae, cells)


def test_the_schedule_is_that_of_the_epochs_that_are_run(small):
    recipe = Recipe((("data", 1.0),), schedule="cosine", num_epochs=500, batch_size=45)
    close = lambda recipe, **options: gapjax.close_gap(
        small.vae, small.params, small.train_images, KEY, recipe, **options
    )
    given = close(recipe, num_epochs=2, batch_size=30)
    assert_same_bits(given.params, close(_but(recipe, **_SHORT)).params)


def test_any_encoder_of_the_same_latent_will_do(small):
    """One that is no network: its refit starts where it is put, by `refit_encoder` alone."""

    def encode(weight, x):
        return dist.Normal(x.reshape(-1).astype(jnp.float32) @ weight, 0.5 * jnp.ones(3)).to_event(
            1
        )

    encoder = Encoder(lambda rng_key: 0.1 * jax.random.normal(rng_key, (25, 3)), encode)
    vae = with_encoder(small.vae, encoder)
    assert vae == with_encoder(small.vae, encoder)
    start = gapjax.VAEParams(encoder.init(KEY), small.params.decoder)
    assert jax.tree.map(np.shape, vae.init(KEY)) == jax.tree.map(np.shape, start)
    refit = gapjax.refit_encoder(vae, start, gapjax.data_source(small.train_images), KEY, **_SHORT)
    assert_same_bits(refit.params.decoder, small.params.decoder)
    assert np.any(refit.params.encoder != start.encoder)


def test_a_sweep_is_its_members(small):
    recipe = Recipe((("noisy", 1.0),), schedule="cosine", refinement_steps=1, **_SHORT)
    keys = jax.random.split(KEY, 2)
    model = recipe_model(recipe, small.vae, small.train_images)
    members = [
        recipe_member(recipe, small.vae, small.params, small.train_images, key) for key in keys
    ]
    options = recipe_options(recipe, len(small.train_images))
    together = gapjax.refit_members(model, members, **options)
    alone = [_close(small, recipe, key) for key in keys]
    for refit, closed in zip(together, alone, strict=True):
        assert closed.vae == model
        assert_same_bits(refit.params.decoder, small.params.decoder)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            refit.params, closed.params,
        )  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sources": (("dreams", 1.0),)}, "source is 'dreams'; it must be one of data, model"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
        ({"objective": "iwae"}, "objective is 'iwae'; it must be one of elbo, sleep"),
    ],
)
def test_what_a_recipe_cannot_name_is_refused(small, change, message):
    with pytest.raises(ValueError, match=message):
        _close(small, _but(RECIPES["paper"], **change))
    with pytest.raises(ValueError, match="recipe is 'papers'; it must be one of paper, control"):
        gapjax.close_gap(small.vae, small.params, small.train_images, KEY, "papers")
    with pytest.raises(ValueError, match="batch_size is 0; it must be positive"):
        gapjax.close_gap(
            small.vae, small.params, small.train_images, KEY, _but(RECIPES["best"], batch_size=0)
        )


def test_recipes_name_what_there_is():
    for name, recipe in RECIPES.items():
        assert {source for source, _ in recipe.sources} <= set(SOURCES), name
        assert recipe.objective in OBJECTIVES and recipe.evidence, name
