"""Studies of several runs: their checkpoints are refitted and compared, in a folder of its own.

Below FOLDER/checkpoints there is a store for each thing that is computed, with an entry for each
seed; the refits by a recipe that are under way have another.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import gapjax
from experiments import program, stores
from experiments.config import UsageError
from experiments.effects import num_images
from experiments.options import checkpoints_of, define_path, define_paths
from experiments.run import Run, prepare, progress_bar
from experiments.show.formatting import text_table
from experiments.workdir import Workdir
from gapjax import checkpoints, parallel
from gapjax.fit.loop import Progress
from gapjax.fit.recipes import RECIPES, recipe_member, recipe_model, recipe_options
from gapjax.fit.sources import draw_examples
from gapjax.fit.step import init_state, steps_per_epoch
from gapjax.measure.statistics import mean_and_stderr
from gapjax.results import measurements

KINDS = ("training", "reconstructions", "samples", "test")  # of images; see `images_of`
_SAVE_EVERY = 25  # epochs of a refit, so that an interruption loses no more than these
_NUMBERS = {"num_epochs": int, "batch_size": int, "num_samples": int, "learning_rate": float}
_draw = jax.jit(draw_examples)
flags.disclaim_key_flags()  # --help shows them as the program's own


# ---- runs and what is kept of them -------------------------------------------


def define_flags(results: str) -> None:
    """Defines the flags of every study; `results` is what its folder is for."""
    define_paths("runs", "Workdirs of trained runs, one for each seed: a,b,c.")
    define_path("out", None, f"Folder for {results}; made if needed.")
    define_path("data_dir", None, "Where MNIST is; see experiments.train.")


def open_study(
    values: flags.FlagValues, flag: str, given: Sequence[str] | None, *, validation: bool
) -> tuple[list[Run], list[int], Path]:
    """The runs, the epochs that a flag names of their checkpoints, and the folder, which it makes.

    `validation` is whether the runs must hold out validation images.
    """
    program.use_compilation_cache()
    runs = open_runs(values.runs or (), values.data_dir, validation=validation)
    saved = checkpoints.numbers(runs[0].workdir.checkpoints / "train")
    epochs, out = checkpoints_of(flag, given, saved), Path(values.out)
    out.mkdir(parents=True, exist_ok=True)
    if not sys.stderr.isatty():
        seeds = ", ".join(str(run.config.seed) for run in runs)
        print(f"{Path(sys.argv[0]).stem} in {out}; runs of seeds {seeds}", flush=True)
    return runs, epochs, out


def open_runs(
    folders: Sequence[str], data_dir: str | None, *, validation: bool = True
) -> list[Run]:
    """Runs that differ in their seeds alone, for reading; their folders are not claimed.

    UsageError: no folders, different configurations, or no validation images where they must be.
    """
    if not folders:
        raise UsageError("--runs is not given; name the workdirs of trained runs")
    runs: list[Run] = []
    for folder in folders:
        workdir = Workdir(Path(folder))
        config, dataset, heldout, vae = prepare(workdir.config(), data_dir)
        if heldout is None and validation:
            raise UsageError(
                f"--runs: {folder} holds out no validation images to choose a recipe by; "
                "name those to compare with --recipes, or train it with --validation"
            )
        runs.append(Run(config, dataset, vae, workdir, data_dir, heldout))
        if config._replace(seed=0) != runs[0].config._replace(seed=0):
            raise UsageError(f"--runs: {folder} is of another configuration than {folders[0]}")
    runs.sort(key=lambda run: run.config.seed)
    if len({run.config.seed for run in runs}) < len(runs):
        raise UsageError("--runs: two are of the same seed")
    return runs


def checkpoint_facts(run: Run, epoch: int) -> dict:
    """What an entry records of the checkpoint that it was computed from."""
    store = run.workdir.checkpoints / "train"
    return {"epoch": epoch, "checkpoint": checkpoints.checksum(store, epoch)}


def is_kept(store: Path, run: Run, made_with: dict) -> bool:
    """Whether there is an entry of the run's seed that was made with this."""
    if run.config.seed not in checkpoints.numbers(store):
        return False
    record = checkpoints.record(store, run.config.seed)
    return all(record.get(key) == value for key, value in made_with.items())


def once(
    store: Path, run: Run, made_with: dict, like: Any, compute: Callable[[], tuple[Any, jax.Array]]
) -> Any:
    """The tree of the run's seed, which is computed where none is kept that was made with this.

    `compute` gives it and, by image, whether the search for q* has converged.
    """
    if not is_kept(store, run, made_with):
        clock = time.monotonic()
        tree, converged = compute()
        facts = stores.entry_metadata(clock) | made_with | {"converged": float(converged.mean())}
        checkpoints.save(store, run.config.seed, tree, facts)
    return checkpoints.restore(store, run.config.seed, like)[0]


def _side_by_side(missing: Sequence[Run]) -> list[list[Run]]:
    """What is refitted in one program: on GPUs and TPUs all, on CPUs each by itself."""
    if parallel.is_accelerated(parallel.all_devices()):
        return [list(missing)] if missing else []
    return [[each] for each in missing]


# ---- numbers -----------------------------------------------------------------


def bpd(run: Run, vae: gapjax.VAE, params: gapjax.VAEParams, images: np.ndarray) -> np.ndarray:
    """BPD of every image [N], on noise common to all encoders."""
    samples = run.config.num_eval_samples
    return gapjax.evaluate(vae, params, run.key("evaluate"), images, num_samples=samples).per_image


def over_seeds(values: Any) -> dict:
    """Mean of a number by seed and its standard error; of one seed there is none."""
    values = np.asarray(values, np.float64)
    mean, stderr = mean_and_stderr(values)
    alone = len(values) == 1
    return {"mean": mean, "stderr": None if alone else stderr, "values": values.tolist()}


def over_seeds_and_images(per_image: np.ndarray) -> dict:
    """`over_seeds` of the means of [R, N] numbers, and the standard error over the N images."""
    over_images = mean_and_stderr(per_image.mean(0, dtype=np.float64))[1]
    return over_seeds(per_image.mean(1, dtype=np.float64)) | {"stderr_over_images": over_images}


# ---- refits by recipes -------------------------------------------------------


def plain_recipe(recipe: gapjax.recipes.Recipe) -> dict:
    """A recipe as JSON gives it back."""
    listed = lambda value: [listed(each) for each in value] if isinstance(value, tuple) else value
    return {
        name: listed(value)
        for name, value in dataclasses.asdict(recipe).items()
        if name != "evidence"
    }


def named(text: str) -> gapjax.recipes.Recipe:
    """A recipe of `RECIPES`, or one with other numbers: "samples:num_epochs=20:learning_rate=1e-3".

    UsageError: it is not known, or it has no such setting.
    """
    name, *changes = text.split(":")
    if name not in RECIPES:
        raise UsageError(f"--recipes: {name!r} is not known; there are {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    for change in changes:
        field, _, value = change.partition("=")
        if field not in _NUMBERS:
            known = ", ".join(_NUMBERS)
            raise UsageError(f"--recipes: {text!r} changes {field!r}; it can change {known}")
        try:
            number = _NUMBERS[field](value)
        except ValueError:
            number = 0
        if not (number > 0 and math.isfinite(number)):
            raise UsageError(f"--recipes: {text!r} has {value!r}, which is no positive number")
        recipe = dataclasses.replace(recipe, **{field: number})
    return recipe


def refit(runs: Sequence[Run], name: str, epoch: int, out: Path) -> list[dict]:
    """Refits the checkpoint of every run by one recipe, where that is not done; its records."""
    recipe, store = named(name), out / "checkpoints" / name
    made_with = lambda run: {**checkpoint_facts(run, epoch), "recipe": plain_recipe(recipe)}
    missing = [run for run in runs if not is_kept(store, run, made_with(run))]
    for together in _side_by_side(missing):
        _refit_together(together, name, epoch, [made_with(run) for run in together], out)
    return [checkpoints.record(store, run.config.seed) for run in runs]


def _refit_together(
    together: Sequence[Run], name: str, epoch: int, made_with: list[dict], out: Path
) -> None:
    """Refits in one program, and saves each; goes on from where they were saved last."""
    recipe, seeds, first = named(name), [run.config.seed for run in together], together[0]
    train = jnp.asarray(first.dataset.train)
    clock = time.monotonic()
    resume, seconds = _unfinished(first, name, made_with, out)
    clock -= seconds
    model = recipe_model(recipe, first.vae, train)
    members = [
        recipe_member(
            recipe, first.vae, stores.trained_params(run, epoch), train, run.key("refit", epoch)
        )._replace(resume=resumed)
        for run, resumed in zip(together, resume or [None] * len(together), strict=True)
    ]
    done = resume[0].curve.epoch[-1] if resume else 0
    title = f"{name} seed {','.join(map(str, seeds))}"
    images = len(train) * len(members)
    with progress_bar(first, title, recipe.num_epochs, done, images) as bar:
        refits = gapjax.refit_members(
            model,
            members,
            on_epoch=bar,
            on_chunk=partial(_keep, first, name, made_with, out, clock),
            **recipe_options(recipe, len(train)),
        )
    for run, one, made in zip(together, refits, made_with, strict=True):
        tree, facts = {"encoder": one.params.encoder}, stores.entry_metadata(clock) | made
        facts["seconds"] /= len(together)
        checkpoints.save(out / "checkpoints" / name, run.config.seed, tree, facts)
    checkpoints.prune(_partial(out, name), lambda saved: [n for n in saved if n == seeds[0]])


def _partial(out: Path, name: str) -> Path:
    """The store of a recipe's refits that are under way, by the first of their seeds."""
    return out / "checkpoints" / f"{name}_partial"


def _keep(
    first: Run, name: str, made_with: list[dict], out: Path, clock: float, progress: list[Progress]
) -> None:
    """Saves refits every `_SAVE_EVERY` epochs, in the place of what was saved of them before."""
    recipe = named(name)
    epoch = steps_per_epoch(len(first.dataset.train), recipe.batch_size)
    step = int(progress[0].state.step)
    if step % (_SAVE_EVERY * epoch) or step >= recipe.num_epochs * epoch:
        return
    tree, members = stores.packed(progress)
    facts = stores.entry_metadata(clock) | {"made_with": made_with, "members": members}
    checkpoints.save(_partial(out, name), first.config.seed, tree, facts)


def _unfinished(
    run: Run, name: str, made_with: list[dict], out: Path
) -> tuple[list[Progress] | None, float]:
    """Where these refits were when they were saved last, and their seconds until then."""

    def state() -> Any:
        init = recipe_model(named(name), run.vae, run.dataset.train).init
        options = recipe_options(named(name), len(run.dataset.train))
        optimizer = gapjax.encoder_only(options["optimizer"])
        return jax.eval_shape(lambda key: init_state(init(key), key, optimizer), run.key("train"))

    is_wanted = lambda record: record["made_with"] == made_with
    return stores.unfinished(_partial(out, name), run.config.seed, is_wanted, state)


def refitted(run: Run, name: str, out: Path) -> gapjax.VAEParams:
    """The parameters after a recipe."""
    vae = recipe_model(named(name), run.vae, run.dataset.train)
    like = {"encoder": jax.eval_shape(vae.init, jax.random.key(0)).encoder}
    tree, facts = checkpoints.restore(out / "checkpoints" / name, run.config.seed, like)
    return stores.trained_params(run, facts["epoch"])._replace(encoder=tree["encoder"])


# ---- nats from the best posterior q* of each image ---------------------------


def images_of(run: Run, kind: str, params: gapjax.VAEParams, epoch: int, number: int) -> np.ndarray:
    """At most so many images of one of `KINDS`, as the trained model makes them or as they are.

    Reconstructions are x ~ p(x given z) with z ~ q(z given x) of training images.
    """
    number = min(number, num_images(run))
    train = run.dataset.train[:number]
    if kind in ("training", "test"):
        return train if kind == "training" else run.dataset.test[:number]
    source = {
        "reconstructions": lambda: gapjax.derived_sources.reconstruction_source(
            run.vae, params, train
        ),
        "samples": lambda: gapjax.model_source(run.vae, params.decoder, number),
    }[kind]()
    key = run.key("effects", epoch)
    plan = source.begin_epoch(key)
    drawn = _draw(source, plan, jax.random.split(key, number), jnp.arange(number))
    return np.asarray(drawn.astype(train.dtype))


def amortization_gaps(
    run: Run, epoch: int, kind: str, recipes: Sequence[str], number: int, out: Path
) -> dict[str, np.ndarray]:
    """Nats from q* [N] of the encoder as trained and after recipes, on at most so many images.

    The recipes are of the trained encoder's architecture. What is computed is kept.
    """
    made, number = out / "checkpoints", min(number, num_images(run))
    refits = {name: checkpoints.checksum(made / name, run.config.seed) for name in recipes}

    def compute() -> tuple[dict, Any]:
        params = stores.trained_params(run, epoch)
        found = measurements.amortization_gaps(
            run.vae, params, run.key("ledger", epoch),
            images_of(run, kind, params, epoch, number),
            {name: refitted(run, name, out).encoder for name in recipes},
        )  # fmt: skip
        return found.per_image, found.converged

    return once(
        made / f"amortization_{kind}", run,
        checkpoint_facts(run, epoch) | {"refits": refits, "images": number},
        dict.fromkeys(("as_trained", *recipes), np.zeros(number)), compute,
    )  # fmt: skip


def amortization_summary(by_kind: Mapping[str, Sequence[Mapping[str, np.ndarray]]]) -> dict:
    """Of the gaps of every run by kind: their mean by encoder, with either standard error."""
    return {
        kind: {
            name: over_seeds_and_images(np.stack([run[name] for run in runs])) for name in runs[0]
        }
        for kind, runs in by_kind.items()
    }


def amortization_table(results: Mapping[str, Mapping[str, Mapping]]) -> str:
    """The summary as plain text, a line for each kind."""
    cell = "{mean:.2f} ± {stderr_over_images:.2f}".format
    rows = [(kind, *(cell(**each) for each in row.values())) for kind, row in results.items()]
    return text_table(("nats from q*", *next(iter(results.values()))), rows, 20, 18)
