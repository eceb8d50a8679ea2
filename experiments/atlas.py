"""Where is the gap, and what closes it? Many models and data sets, each by the same rules.

python -m experiments.atlas --rows=digits,starmap --seeds=3 --data_dir=data --out=runs/atlas

Every row of experiments/rows.py is trained with several seeds. Two checkpoints are looked at: the
early one, with the lowest validation loss or at an epoch that the row names, and the late one, at
the end of the row's budget. At each the encoder is refitted by the paper's recipe, by its control
and by other recipes of equal cost. The best of these is chosen on validation examples. Then test
examples are used, once: every encoder is scored, and a posterior q* of each example's own says how
large the gap is. The same command resumes, checkpoint by checkpoint and refit by refit, and rows
that differ in their refits alone share a training. Writes atlas.json and atlas.png.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

import gapjax
from experiments import program, rows
from experiments.config import UsageError, known
from experiments.files import write_json
from experiments.kept import Job, objective_name
from experiments.options import define_path
from experiments.over_seeds import row_of
from experiments.rows import ROWS, Data, Row, spread
from experiments.run import environment
from experiments.show import atlas_rows, figures
from experiments.show.atlas_rows import CHECKPOINTS
from gapjax import checkpoints
from gapjax.examples import context_of, count, take
from gapjax.fit.api import init_params
from gapjax.fit.recipes import RECIPES, Recipe, recipe_model
from gapjax.fit.sources import draw_examples
from gapjax.fit.step import init_state
from gapjax.measure.bounds import per_image_bounds, posterior_bounds

_VALIDATED = 20  # times in the budget that the validation loss is measured
_STEPS = 2  # of learned refinement and of Newton's method
_NOTES = (
    "Nats are of the ELBO, per example; gaps and gains are of the late checkpoint unless said.",
    "`gap` is the ELBO of the best posterior q* of a test example that a search found, minus that "
    "of the encoder as trained; the mean over some test examples, evenly spread. Where q* "
    "was not looked for, it is that of the encoder refitted on the test set.",
    "`closed` is by cure the share of that gap, the ratio of two means over the same examples, "
    "and the nats that it wins. `optimal` is fitted on test examples; nothing else is.",
    "`stderr` is over seeds, which share data and test examples; `stderr_over_examples` is of the "
    "mean over seeds, over test examples. Of one seed both are the latter.",
)


@contextlib.contextmanager
def _bar(job: Job, what: str, epochs: int) -> Iterator[Callable[[int, float], None]]:
    """A progress bar, where there is a terminal."""
    with tqdm(total=epochs, desc=f"{job.name} {what}", unit="epoch", disable=None) as bar:
        yield lambda epoch, loss: bool(bar.update(epoch - bar.n))


# ---- without test examples ---------------------------------------------------


def trained(job: Job) -> dict[str, tuple[gapjax.VAEParams, dict]]:
    """The parameters at either checkpoint, with their epoch and validation nats."""
    row, like = job.row, jax.eval_shape(job.vae.init, job.key("train"))

    def compute() -> tuple[dict, dict]:
        source, optimizer = gapjax.data_source(job.data.train), gapjax.adam(row.learning_rate)
        init_key, run_key = jax.random.split(job.key("train"))
        params = init_params.on(vae=job.vae)(init_key)
        state, early, curve = init_state(params, run_key, optimizer), params, []
        if job.has("training"):  # what an interruption left
            (state, early), record = checkpoints.restore(
                job.place("training"), job.seed, jax.eval_shape(lambda: (state, early))
            )
            curve = record["curve"]
        stops = np.ceil(np.linspace(0, row.epochs, _VALIDATED + 1)[1:]).astype(int)
        stops = np.unique([*stops, row.early or row.epochs])
        with _bar(job, "training", row.epochs) as show:
            for stop in map(int, stops[len(curve) :]):
                state, _ = gapjax.train(
                    job.vae, source, num_epochs=stop, batch_size=row.batch_size, state=state,
                    optimizer=optimizer, objective=row.objective, on_epoch=show,
                )  # fmt: skip
                nats = float(_nats(job, job.vae, state.params, job.data.validation).mean())
                is_best = not curve or nats > max(each[1] for each in curve)
                if is_best if row.early is None else stop == row.early:
                    early = jax.tree.map(np.asarray, state.params)
                curve.append((stop, nats))
                facts = {"curve": curve, "made_with": job.facts("training")}
                checkpoints.save(job.place("training"), job.seed, (state, early), facts)
        epochs = [row.early or max(curve, key=lambda each: each[1])[0], row.epochs]
        facts = {"curve": curve, "epochs": epochs, "nats": curve[-1][1]}
        return {"early": early, "late": state.params}, facts

    tree, record = job.kept("train", dict.fromkeys(CHECKPOINTS, like), compute)
    checkpoints.prune(job.place("training"), lambda saved: [n for n in saved if n == job.seed])
    return {
        name: (tree[name], {"epoch": epoch, "validation": dict(record["curve"])[epoch]})
        for name, epoch in zip(CHECKPOINTS, record["epochs"], strict=True)
    }


def candidates(row: Row) -> dict[str, Recipe]:
    """The recipes that a row tries: all of as many epochs and samples, or each with its own."""
    names = ("control", "paper", *row.recipes)
    same: dict[str, Any] = {}
    if row.refit_epochs:
        same = {"num_epochs": row.refit_epochs, "batch_size": row.batch_size, "num_samples": 1}
    return {name: dataclasses.replace(_recipe(name), **same) for name in names}


def _costs_same(recipe: Recipe) -> bool:
    """Whether the encoder costs at test time what the trained one does."""
    return recipe.hidden_sizes is None and not recipe.refinement_steps


def _recipe(name: str) -> Recipe:
    """A recipe of the library, or the paper's with another share of samples: "alpha_0.3"."""
    if not name.startswith("alpha_"):
        return RECIPES[name]
    alpha = float(name.removeprefix("alpha_"))
    return dataclasses.replace(RECIPES["paper"], sources=(("model", alpha), ("data", 1 - alpha)))


def refitted(
    job: Job, at: str, params: gapjax.VAEParams, name: str, recipe: Recipe
) -> tuple[gapjax.VAE, gapjax.VAEParams, float]:
    """The model after a recipe, its parameters, and its nats on validation examples."""
    vae = recipe_model(recipe, job.vae, job.data.train)
    without_words = {"evidence": ""}
    definition = json.loads(json.dumps(dataclasses.asdict(recipe) | without_words))

    def compute() -> tuple[Any, dict]:
        with _bar(job, f"{at} {name}", recipe.num_epochs) as show:
            key = job.key("refit", CHECKPOINTS.index(at))
            closed = gapjax.close_gap(
                job.vae, params, job.data.train, key, recipe, on_epoch=show
            )  # fmt: skip
        nats = float(_nats(job, vae, closed.params, job.data.validation).mean())
        return closed.params.encoder, {"nats": nats, "recipe": definition}

    like = jax.eval_shape(vae.init, job.key("refit")).encoder
    encoder, record = job.kept(f"{at}_{name}", like, compute)
    if record["recipe"] | without_words != definition:
        raise UsageError(f"{job.place(f'{at}_{name}')} is of another definition of the recipe "
                         f"{name}; give another --out")  # fmt: skip
    return vae, params._replace(encoder=encoder), record["nats"]


class Choice(NamedTuple):
    """The refitted encoders at one checkpoint, and which of equal cost is the best."""

    models: dict[str, tuple[gapjax.VAE, gapjax.VAEParams]]  # by recipe and "learned"
    validation: dict[str, float]  # nats by recipe
    best: str
    refused: dict[str, str]  # by cure, why it does not apply


def choose(job: Job, at: str, params: gapjax.VAEParams) -> Choice:
    """Refits by every recipe, and chooses by validation examples alone."""
    found, validation, refused = {}, {}, {}
    recipes = candidates(job.row)
    for name, recipe in recipes.items():
        *found[name], validation[name] = refitted(job, at, params, name, recipe)
    cheap = [name for name, recipe in recipes.items() if _costs_same(recipe)]
    best = max(cheap, key=validation.__getitem__)
    if job.row.recipes and job.row.refit_epochs:
        learned = dataclasses.replace(recipes[best], refinement_steps=_STEPS)
        try:
            found["learned"] = refitted(job, at, params, "learned", learned)[:2]
        except TypeError as error:
            refused["learned"] = str(error)
    return Choice(found, validation, best, refused)


# ---- with test examples ------------------------------------------------------


def scored(job: Job, at: str, params: gapjax.VAEParams, choice: Choice) -> dict[str, np.ndarray]:
    """Nats of every test example [N], as trained and by cure; `q_star` of some."""
    test, number = job.data.test, min(job.row.num_optimal, count(job.data.test))
    some = take(test, spread(count(test), number))
    nats = {"trained": _nats(job, job.vae, params, test)}
    nats |= {name: _nats(job, *model, test) for name, model in choice.models.items()}
    nats["best"] = nats[choice.best]
    own = lambda examples, posteriors: posterior_bounds(
        job.vae, params, job.key("evaluate"), examples, posteriors,
        num_samples=job.row.num_samples,
    )  # fmt: skip

    def newton() -> np.ndarray:
        refiner = gapjax.Refiner(num_steps=_STEPS)
        refined = gapjax.refine(job.vae, params, job.key("newton"), some, refiner)
        return own(some, refined.posteriors)

    def q_star() -> np.ndarray:
        return own(some, _best(job, params, some, choice))

    searches = {"newton": newton, "q_star": q_star} if job.row.num_optimal else {}
    for name, compute in searches.items():
        try:
            nats[name] = compute()
        except TypeError as error:
            choice.refused[name] = str(error)
    if "q_star" in nats:
        train = take(job.data.train, spread(count(job.data.train), number))
        encoders = {"trained": (job.vae, params), "paper": choice.models["paper"],
                    "best": choice.models[choice.best]}  # fmt: skip
        for kind, each in (("train", train), ("samples", _samples(job, params, number))):
            nats |= {f"{kind}_{name}": _nats(job, *model, each) for name, model in encoders.items()}
            nats[f"{kind}_q_star"] = own(each, _best(job, params, each, choice))
    if job.row.recipes:
        epochs = 10 * (job.row.refit_epochs or RECIPES["paper"].num_epochs)
        with _bar(job, f"{at} optimal", epochs) as show:
            refit = gapjax.optimal_inference(
                job.vae, params, test, job.key("refit", CHECKPOINTS.index(at), 1),
                num_epochs=epochs, batch_size=job.row.batch_size, on_epoch=show,
            )  # fmt: skip
        nats["optimal"] = _nats(job, job.vae, refit.params, test)
    return nats


def _best(job: Job, params: gapjax.VAEParams, examples: Any, choice: Choice) -> Any:
    others = (choice.models[name][1].encoder for name in ("paper", choice.best))
    encoders = [params.encoder, *others]
    key = job.key("search")
    return gapjax.best_posteriors(job.vae, params, key, examples, encoders=encoders).posteriors


def _samples(job: Job, params: gapjax.VAEParams, number: int) -> Any:
    """So many samples of the model, for contexts of the data where it has any."""
    contexts = context_of(job.data.train)
    source = gapjax.model_source(job.vae, params.decoder, number, contexts)
    key = job.key("search", 1)
    keys, places = jax.random.split(key, number), np.arange(number)
    drawn = jax.device_get(jax.jit(draw_examples)(source, source.begin_epoch(key), keys, places))
    # pixels as they are in the data, so that one program does for both
    return drawn.astype(job.data.train.dtype) if job.data.levels else drawn


def _nats(job: Job, vae: gapjax.VAE, params: gapjax.VAEParams, examples: Any) -> np.ndarray:
    """ELBO of every example [N], on noise common to all encoders."""
    key, samples = job.key("evaluate"), job.row.num_samples
    size = max(1, min(500, 10_000 // samples))  # it bounds memory and changes nothing else
    bounds = per_image_bounds(vae, params, key, examples, num_samples=samples, batch_size=size)
    return np.asarray(bounds)


def seconds(job: Job, params: gapjax.VAEParams, choice: Choice) -> dict[str, dict]:
    """What cures cost at a checkpoint: to fit them, and for the posterior of one test example.

    The latter is of a second call, without compilation.
    """

    def each(vae: gapjax.VAE, own: gapjax.VAEParams, steps: int) -> float:
        number = min(job.row.num_optimal, count(job.data.test))
        examples = take(job.data.test, spread(count(job.data.test), number))
        refiner = gapjax.Refiner(num_steps=steps)
        for _ in range(2):
            clock = time.monotonic()
            gapjax.refine(vae, own, job.key("newton"), examples, refiner)
        return (time.monotonic() - clock) / number

    at_test = {"encoder": each(job.vae, params, 0)}
    larger = {name: model for name, model in choice.models.items() if model[0] is not job.vae}
    at_test |= {name: each(*model, 0) for name, model in larger.items()}
    with contextlib.suppress(TypeError):  # where Newton's method does not apply
        at_test["newton"] = each(job.vae, params, _STEPS)
    fit = {
        name: checkpoints.record(job.place(f"late_{name}"), job.seed)["seconds"]
        for name in choice.models
    }
    return {"fit": fit, "example": at_test}


def measured(job: Job) -> dict[str, dict]:
    """By checkpoint what one seed of a row gives: nats of examples, epochs, choice."""
    found = {}
    for place in job.place("refits").parent.glob("*"):
        job.has(place.name)  # what was kept of another definition is refused before any work
    for at, (params, facts) in trained(job).items():
        choice = choose(job, at, params)

        def compute(at=at, params=params, choice=choice) -> tuple[dict, dict]:
            nats = scored(job, at, params, choice)
            sizes = {name: len(values) for name, values in nats.items()}
            mean = float(nats["trained"].mean())
            return nats, {"nats": mean, "sizes": sizes, "refused": choice.refused}

        like = lambda record: {name: np.zeros(n, np.float32) for name, n in record["sizes"].items()}
        nats, record = job.kept(f"{at}_nats", like, compute)
        found[at] = facts | {
            "nats": {name: np.asarray(values, np.float64) for name, values in nats.items()},
            "best": choice.best, "validation_by_recipe": choice.validation,
            "refused": record["refused"], "commit": record["commit"],
        }  # fmt: skip
    if job.row.num_optimal:
        costs = lambda: ({}, {"costs": seconds(job, params, choice)})
        found["late"]["seconds"] = job.kept("late_seconds", {}, costs)[1]["costs"]
    return found


# ---- rows --------------------------------------------------------------------


def row_summary(name: str, row: Row, seeds: Sequence[Mapping[str, Mapping]], data: Data) -> dict:
    """A row of atlas.json, from what `measured` gives of each seed."""
    recipes = candidates(row)
    return {
        "row": name, "data": row.data, "model": row.model,
        "options": dict(row.options), "objective": objective_name(row),
        "refit_epochs": row.refit_epochs, "encoder_parameters": _size(rows.model(row, data)),
        "larger_encoder": [each for each, recipe in recipes.items() if not _costs_same(recipe)],
        "examples": {part: count(getattr(data, part)) for part in ("train", "validation", "test")},
        "entries": math.prod(rows.shape_of(data)), "data_sha256": data.checksum,
        **row_of(seeds, row.num_samples), "note": row.note,
    }  # fmt: skip


def _size(vae: gapjax.VAE) -> int:
    """The number of parameters of an encoder."""
    encoder = jax.eval_shape(vae.init, jax.random.key(0)).encoder
    return sum(leaf.size for leaf in jax.tree.leaves(encoder))


def atlas(values: flags.FlagValues) -> None:
    """Makes the rows, and writes atlas.json after each of them."""
    if values.out is None:
        raise UsageError("--out is not given; name a folder")
    chosen = {name: ROWS[known("rows", name, ROWS)] for name in values.rows or ROWS}
    if values.data:
        stem = Path(values.data).stem
        chosen = {f"{name}_{stem}": row._replace(data=values.data) for name, row in chosen.items()}
    program.use_compilation_cache()
    out = Path(values.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "atlas.json"
    for name, row in chosen.items():
        data = rows.load(row.data, values.data_dir)
        vae = rows.model(row, data)
        seeds = [
            measured(Job(name, row, seed, data, vae, out))
            for seed in range(values.first_seed, values.first_seed + values.seeds)
        ]
        kept = json.loads(path.read_text())["rows"] if path.exists() else []  # of other calls
        found = {each["row"]: each for each in kept} | {name: row_summary(name, row, seeds, data)}
        order = [*filter(found.__contains__, ROWS), *(each for each in found if each not in ROWS)]
        results = {
            "schema": 1, "rows": [found[each] for each in order], "notes": _NOTES,
            "environment": environment(),
        }  # fmt: skip
        write_json(path, results)
    if atlas_rows.shown(results):
        figures.save(figures.atlas(results), out / "atlas")
    for name in chosen:
        if not chosen[name].refit_epochs:
            figures.save(figures.recipes(results, name), out / name)
    if atlas_rows.alphas(results):
        figures.save(figures.alpha(results), out / "alpha")
    print(atlas_rows.table(results))
    print("shares of the gap at the late checkpoint ± standard error over seeds")


if __name__ == "__main__":
    flags.DEFINE_list("rows", None, f"Which of {', '.join(ROWS)}; default: all.")
    flags.DEFINE_integer("seeds", 3, "How many seeds a row has.", lower_bound=1)
    flags.DEFINE_integer("first_seed", 0, "The first of them.", lower_bound=0)
    define_path(
        "data", None, "Other data to train these rows on: an .npz or .h5ad file, or a name as in "
        "experiments/rows.py.",
    )  # fmt: skip
    define_path("data_dir", None, "Folder with a folder for each data set; see docs/atlas.md.")
    define_path("out", None, "Folder for the results, made if needed; the same one resumes.")
    program.run_without_workdir(atlas)
