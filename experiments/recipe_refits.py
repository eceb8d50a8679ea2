"""Refits of the checkpoints of runs by recipes, kept in a folder of their own.

Below FOLDER/checkpoints there is a store for each recipe, with an entry for each seed, and one for
its refits that are under way.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax

import gapjax
from experiments import stores, unfinished
from experiments.config import UsageError
from experiments.run import Run, progress_bar
from experiments.sweeps import checkpoint_facts, companies, is_kept, plain_recipe
from gapjax import checkpoints
from gapjax.fit.loop import Progress
from gapjax.fit.recipes import RECIPES, recipe_model, recipe_optimizer
from gapjax.fit.steps import init_state, steps_per_epoch

_SAVE_EVERY = 25  # epochs of a refit, so that an interruption loses no more than these
_NUMBERS = {"num_epochs": int, "batch_size": int, "num_samples": int, "learning_rate": float}
_CHANGEABLE = ", ".join(_NUMBERS)


def named(text: str) -> gapjax.Recipe:
    """A recipe of `RECIPES`, or one with other numbers: "samples:num_epochs=20:learning_rate=1e-3".

    Raises:
      UsageError: it is not known, or it has no such setting.
    """
    name, *changes = text.split(":")
    if name not in RECIPES:
        raise UsageError(f"--recipes: {name!r} is not known; there are {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    for change in changes:
        field, _, value = change.partition("=")
        if field not in _NUMBERS:
            raise UsageError(f"--recipes: {text!r} changes {field!r}; it can change {_CHANGEABLE}")
        try:
            number = _NUMBERS[field](value)
        except ValueError:
            number = 0
        if not (number > 0 and math.isfinite(number)):
            raise UsageError(f"--recipes: {text!r} has {value!r}, which is no positive number")
        recipe = recipe._replace(**{field: number})
    return recipe


def refit(runs: Sequence[Run], name: str, epoch: int, out: Path) -> list[dict]:
    """Refits the checkpoint of every run by one recipe, where that is not done; its records.

    On a GPU or TPU all runs are one compiled sweep. It sees neither validation nor test images.
    """
    recipe, store = named(name), out / "checkpoints" / name
    made_with = lambda run: {**checkpoint_facts(run, epoch), "recipe": plain_recipe(recipe)}
    missing = [run for run in runs if not is_kept(store, run, made_with(run))]
    for company in companies(missing):
        _refit_together(company, name, epoch, [made_with(run) for run in company], out)
    return [checkpoints.record(store, run.config.seed) for run in runs]


def _refit_together(
    company: Sequence[Run], name: str, epoch: int, made_with: list[dict], out: Path
) -> None:
    """Refits in one program, and saves each; goes on from where they were saved last."""
    recipe, seeds, first = named(name), [run.config.seed for run in company], company[0]
    clock = time.monotonic()
    resume, seconds = _unfinished(company, name, made_with, out)
    clock -= seconds
    done = resume[0].curve.epoch[-1] if resume else 0
    title = f"{name} seed {','.join(map(str, seeds))}"
    with progress_bar(first, title, recipe.num_epochs, done) as bar:
        closed = gapjax.close_gap(
            first.vae,
            [stores.trained_params(run, epoch) for run in company],
            first.dataset.train,
            [run.key("refit", epoch) for run in company],
            recipe,
            on_epoch=bar,
            on_chunk=partial(_keep, company, name, made_with, out, clock),
            resume=resume,
        )
    for seed, one, made in zip(seeds, closed, made_with, strict=True):
        facts = stores.entry_metadata(clock) | made
        facts["seconds"] /= len(company)
        checkpoints.save(out / "checkpoints" / name, seed, {"encoder": one.params.encoder}, facts)
    checkpoints.prune(_partial(out, name), lambda saved: [n for n in saved if n == seeds[0]])


def _partial(out: Path, name: str) -> Path:
    """The store of a recipe's refits that are under way, by the first of their seeds."""
    return out / "checkpoints" / f"{name}_partial"


def _keep(
    company: Sequence[Run],
    name: str,
    made_with: list[dict],
    out: Path,
    clock: float,
    progress: Progress | list[Progress],
) -> None:
    """Saves refits every `_SAVE_EVERY` epochs, in the place of what was saved of them before."""
    recipe = named(name)
    epoch = steps_per_epoch(len(company[0].dataset.train), recipe.batch_size)
    several = unfinished.as_list(progress)
    step = int(several[0].state.step)
    if step % (_SAVE_EVERY * epoch) or step >= recipe.num_epochs * epoch:
        return
    tree, members = unfinished.packed(several)
    facts = stores.entry_metadata(clock) | {"made_with": made_with, "members": members}
    checkpoints.save(_partial(out, name), company[0].config.seed, tree, facts)


def _unfinished(
    company: Sequence[Run], name: str, made_with: list[dict], out: Path
) -> tuple[list[Progress] | None, float]:
    """Where these refits were when they were saved last, and their seconds until then."""
    store, seed, run = _partial(out, name), company[0].config.seed, company[0]
    try:
        if seed not in checkpoints.numbers(store):
            return None, 0.0
        facts = checkpoints.record(store, seed)
        if facts["made_with"] != made_with:
            return None, 0.0
        train = run.dataset.train
        init = recipe_model(named(name), run.vae, train).init
        optimizer = gapjax.encoder_only(recipe_optimizer(named(name), len(train)))
        state = jax.eval_shape(lambda key: init_state(init(key), key, optimizer), run.key("train"))
        tree, _ = checkpoints.restore(store, seed, unfinished.packed_like(state, len(company)))
    except checkpoints.CorruptCheckpointError as error:
        print(f"skipped: {error}; the refit begins anew", flush=True)
        return None, 0.0
    return unfinished.unpacked(tree, facts["members"]), facts["seconds"]


def refitted(run: Run, name: str, out: Path) -> gapjax.VAEParams:
    """The parameters after a recipe."""
    vae = recipe_model(named(name), run.vae, run.dataset.train)
    like = {"encoder": jax.eval_shape(vae.init, jax.random.key(0)).encoder}
    tree, facts = checkpoints.restore(out / "checkpoints" / name, run.config.seed, like)
    return stores.trained_params(run, facts["epoch"])._replace(encoder=tree["encoder"])
