"""The programs' --recipe: which there are, and that it is the library's recipe."""

import dataclasses

import jax
import numpy as np
from small_runs import TINY

import gapjax
from experiments import options, refit, stores
from experiments import run as experiment
from experiments.workdir import Workdir
from gapjax.fit import recipes
from gapjax.fit.step import init_state

EPOCH = 2


def test_recipe_of_the_programs_is_that_of_the_library(tmp_path):
    """And its control sees training images alone, by the same optimizer."""
    config = TINY._replace(
        num_epochs=EPOCH, hidden_sizes=(8,), validation=1037, recipe="noisy", refit_epochs=2,
        refit_batch_size=100,
    )  # fmt: skip
    run = experiment.start(experiment.prepare(config, None), Workdir(tmp_path / "run"), sweep="off")
    state = init_state(run.vae.init(run.key("train")), run.key("train"), gapjax.adam(1e-3))
    stores.save(run, "train", EPOCH, state, 0.0)
    refit.refit_phase(run, [EPOCH], ("self_consistent", "control"))
    run.workdir.close()
    for kind, source in (("self_consistent", "noisy"), ("control", "data")):
        recipe = dataclasses.replace(
            recipes.RECIPES["noisy"], num_epochs=2, sources=((source, 1.0),)
        )
        closed = gapjax.close_gap(
            run.vae, state.params, run.dataset.train, run.key("refit", EPOCH), recipe
        )
        _, by_name = stores.encoders(run, EPOCH, [kind])
        jax.tree.map(np.testing.assert_array_equal, by_name[kind], closed.params.encoder)


def test_programs_know_the_recipes_that_keep_the_architecture():
    """Their stores have the shapes of the trained encoder."""
    unknown = set(recipes.RECIPES) - set(options._RECIPES)
    assert unknown == {"control", "larger", "refinement_1", "refinement_2", "refinement_mnist"}
