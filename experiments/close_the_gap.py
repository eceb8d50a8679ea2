"""How much of the gap each recipe closes: recipes x seeds on the checkpoints of runs.

python -m experiments.close_the_gap --runs=runs/digits_seed0,runs/digits_seed1 --out=runs/closing

The runs are trained with --validation: the recipe is chosen by the BPD of the images held out.
Test images are used after that, once: every recipe is scored beside the paper's and its control,
and the best posterior q* of each test image says how large the gap is. Writes choice.json before
the test set is touched, then closing.json and closing.png. The same command resumes.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

import gapjax
from experiments import amortization, options, program, stores
from experiments.config import UsageError
from experiments.files import write_json
from experiments.run import Run, environment, progress_bar
from experiments.show import figures
from experiments.sweeps import checkpoint_facts, is_kept, open_runs, over_seeds, plain_recipe
from gapjax import checkpoints, parallel
from gapjax.fit.recipes import RECIPES, recipe_model

_NEEDED = ("paper", "control")  # rows that every table has
_OPTIMAL = "q_star"
_NOTES = (
    "Test BPD and shares are means over seeds ± their standard error.",
    "The gap is that between the encoder as trained and the best posterior q* of each test image. "
    "q* is fitted on test images: it measures, no more.",
    "The recipe was chosen by the BPD of validation images, which were held out of training and of "
    "the refits. Test images were scored once, after that.",
    "The cost of an encoder is the number of floating-point operations that it takes for an image, "
    "in those of the trained encoder.",
)


def refit(runs: Sequence[Run], name: str, epoch: int, out: Path) -> list[dict]:
    """Refits the checkpoint of every run by one recipe, where that is not done; its records.

    On a GPU or TPU all runs are one compiled sweep. It sees neither validation nor test images.
    """
    recipe, store = RECIPES[name], out / "checkpoints" / name
    made_with = lambda run: {**checkpoint_facts(run, epoch), "recipe": plain_recipe(recipe)}
    missing = [run for run in runs if not is_kept(store, run, made_with(run))]
    together = parallel.is_accelerated(parallel.all_devices())
    for company in [missing] if together and missing else [[run] for run in missing]:
        clock, seeds = time.monotonic(), [run.config.seed for run in company]
        params = [stores.trained_params(run, epoch) for run in company]
        keys = [run.key("refit", epoch) for run in company]
        title = f"{name} seed {','.join(map(str, seeds))}"
        with progress_bar(company[0], title, recipe.num_epochs) as bar:
            closed = gapjax.close_gap(
                runs[0].vae, params, runs[0].dataset.train, keys, recipe, on_epoch=bar
            )
        for run, one in zip(company, closed, strict=True):
            facts = stores.entry_metadata(clock) | made_with(run)
            facts["seconds"] /= len(company)
            checkpoints.save(store, run.config.seed, {"encoder": one.params.encoder}, facts)
    return [checkpoints.record(store, run.config.seed) for run in runs]


def refitted(run: Run, name: str, out: Path) -> gapjax.VAEParams:
    """The parameters after a recipe."""
    vae = recipe_model(RECIPES[name], run.vae, run.dataset.train)
    like = {"encoder": jax.eval_shape(vae.init, jax.random.key(0)).encoder}
    tree, facts = checkpoints.restore(out / "checkpoints" / name, run.config.seed, like)
    return stores.trained_params(run, facts["epoch"])._replace(encoder=tree["encoder"])


def score(run: Run, name: str | None, epoch: int, out: Path, images: np.ndarray) -> np.ndarray:
    """BPD of every image [N] after a recipe, or as trained; on noise common to all of them."""
    if name is None:
        vae, params = run.vae, stores.trained_params(run, epoch)
    else:
        vae = recipe_model(RECIPES[name], run.vae, run.dataset.train)
        params = refitted(run, name, out)
    samples = run.config.num_eval_samples
    return gapjax.evaluate(vae, params, run.key("evaluate"), images, num_samples=samples).per_image


def choose(runs: Sequence[Run], names: Sequence[str], epoch: int, out: Path) -> dict:
    """The recipes with the lowest validation BPD: of the trained encoder's cost, and of any.

    Returns:
      "best", the name of the first, "best_of_any_size", and "validation_bpd": by recipe, the mean
      of every seed.
    """
    bpds = {
        name: [float(score(run, name, epoch, out, _held_out(run)).mean()) for run in runs]
        for name in names
    }
    mean = {name: float(np.mean(values)) for name, values in bpds.items()}
    same_size = [name for name in names if _cost(runs[0], name) <= 1]
    return {
        "best": min(same_size, key=mean.__getitem__),
        "best_of_any_size": min(names, key=mean.__getitem__),
        "validation_bpd": bpds,
    }


def optimal_bpd(run: Run, epoch: int, out: Path, start: str) -> np.ndarray:
    """BPD of every test image [N] with its own q*, on the noise of `score`; kept once computed.

    The search begins at the better of two encoders, as trained and after the recipe `start`.
    """
    store, seed = out / "checkpoints" / _OPTIMAL, run.config.seed
    test = run.dataset.test
    if not is_kept(store, run, checkpoint_facts(run, epoch)):
        clock = time.monotonic()
        params = stores.trained_params(run, epoch)
        encoders = [params.encoder, refitted(run, start, out).encoder]
        found = gapjax.optimal_posteriors(
            run.vae, params, run.key("ledger", epoch), test, encoders=encoders
        )
        nats = gapjax.posterior_bounds(
            run.vae, params, run.key("evaluate"), test, found.posteriors,
            num_samples=run.config.num_eval_samples,
        )  # fmt: skip
        facts = stores.entry_metadata(clock) | checkpoint_facts(run, epoch)
        facts["converged"] = float(found.converged.mean())
        checkpoints.save(store, seed, {"nats": nats}, facts)
    tree, _ = checkpoints.restore(store, seed, {"nats": np.zeros(len(test), np.float32)})
    return np.asarray(gapjax.bits_per_dim(tree["nats"], test.shape[1:]))


def leaderboard(
    runs: Sequence[Run], names: Sequence[str], epoch: int, out: Path, choice: dict
) -> list[dict]:
    """Scores every recipe on the test set; a row for each, best validation BPD first."""
    trained = [score(run, None, epoch, out, run.dataset.test).mean() for run in runs]
    optimal = [optimal_bpd(run, epoch, out, choice["best"]).mean() for run in runs]
    tested = {
        name: [float(score(run, name, epoch, out, run.dataset.test).mean()) for run in runs]
        for name in names
    }
    rows = []
    for name in sorted(names, key=lambda name: np.mean(choice["validation_bpd"][name])):
        test, gap = np.array(tested[name]), np.subtract(trained, optimal)
        records = [checkpoints.record(out / "checkpoints" / name, r.config.seed) for r in runs]
        rows.append(
            {
                "recipe": name,
                "gap_closed": over_seeds((trained - test) / gap),
                "test_bpd": over_seeds(test),
                "validation_bpd": over_seeds(choice["validation_bpd"][name]),
                "gain": over_seeds(trained - test),
                "gain_over_control": over_seeds(np.subtract(tested["control"], test)),
                "seeds": len(runs),
                "larger_encoder": _cost(runs[0], name) > 1,
                "cost": _cost(runs[0], name),
                "encoder_parameters": _num_parameters(runs[0], name),
                "chosen": name in (choice["best"], choice["best_of_any_size"]),
                "refit_seconds": float(np.mean([record["seconds"] for record in records])),
                "commits": sorted({str(record["commit"]) for record in records}),
                "definition": plain_recipe(RECIPES[name]),
            }
        )
    return rows


def nats_from_optimal(runs: Sequence[Run], epoch: int, out: Path, best: str, number: int) -> dict:
    """On each kind of images, how far the encoders as trained, "paper" and `best` are from q*."""
    by_kind = {
        kind: [
            amortization.gaps(
                run, epoch, kind,
                {name: refitted(run, name, out) for name in dict.fromkeys(("paper", best))},
                number, out,
            )
            for run in runs
        ]
        for kind in amortization.KINDS
    }  # fmt: skip
    return amortization.summary(by_kind)


def summary(runs: Sequence[Run], names: Sequence[str], epoch: int, out: Path, choice: dict) -> dict:
    """The contents of closing.json, but for the nats from q* on each kind of images."""
    rows = leaderboard(runs, names, epoch, out, choice)
    over = lambda images_of, name: over_seeds(
        [float(score(run, name, epoch, out, images_of(run)).mean()) for run in runs]
    )
    return {
        "schema": 1,
        "dataset": runs[0].dataset.name,
        "preset": runs[0].config.preset,
        "epoch": epoch,
        "seeds": [run.config.seed for run in runs],
        "num_validation": len(_held_out(runs[0])),
        "num_test": len(runs[0].dataset.test),
        "as_trained": {
            "train_bpd": over(lambda run: run.dataset.train, None),
            "validation_bpd": over(_held_out, None),
            "test_bpd": over(lambda run: run.dataset.test, None),
            "encoder_parameters": _num_parameters(runs[0], None),
        },
        "optimal_posteriors": {
            "test_bpd": over_seeds(
                [float(optimal_bpd(run, epoch, out, choice["best"]).mean()) for run in runs]
            ),
            "fitted_on_test": True,
        },
        "best": choice["best"],
        "best_of_any_size": choice["best_of_any_size"],
        "recipes": rows,
        "environment": environment(),
        "notes": list(_NOTES),
    }


def table(results: dict) -> str:
    """The leaderboard as plain text; * marks what was chosen on the validation images."""
    heads = ("validation BPD", "test BPD", "gain over control", "gap closed", "seconds", "cost")
    lines = [f"{'recipe':24}" + "".join(f"{head:>20}" for head in heads)]
    for row in results["recipes"]:
        bpds = [_cell(row[key]) for key in ("validation_bpd", "test_bpd", "gain_over_control")]
        closed = row["gap_closed"]
        bpds.append(f"{closed['mean']:.1%} ± {closed['stderr']:.1%}")
        bpds += [f"{row['refit_seconds']:.0f}", f"{row['cost']:.2f}"]
        name = row["recipe"] + (" *" if row["chosen"] else "")
        lines.append(f"{name:24}" + "".join(f"{cell:>20}" for cell in bpds))
    return "\n".join(lines)


def _cell(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.4f} ± {value['stderr']:.4f}"


def _held_out(run: Run) -> np.ndarray:
    assert run.validation is not None
    return run.validation


def _encoder(run: Run, name: str | None) -> tuple[gapjax.VAE, Any]:
    """The model after a recipe, or as trained, and the shapes of its encoder's parameters."""
    vae = run.vae if name is None else recipe_model(RECIPES[name], run.vae, run.dataset.train)
    return vae, jax.eval_shape(vae.init, jax.random.key(0)).encoder


def _num_parameters(run: Run, name: str | None) -> int:
    """Parameters of the encoder that a refit trains."""
    is_frozen = lambda node: isinstance(node, gapjax.Frozen)
    leaves = jax.tree.leaves(_encoder(run, name)[1], is_leaf=is_frozen)
    return sum(leaf.size for leaf in leaves if not is_frozen(leaf))


def _cost(run: Run, name: str) -> float:
    """Operations that a recipe's encoder takes for one image, in those of the trained one."""

    def operations(name: str | None) -> float:
        vae, encoder = _encoder(run, name)
        x = jax.ShapeDtypeStruct(run.dataset.event_shape, run.dataset.train.dtype)
        return jax.jit(vae.encode).lower(encoder, x).cost_analysis()["flops"]

    return operations(name) / operations(None)


def close_the_gap(values: flags.FlagValues) -> None:
    """Refits, chooses, then scores; writes closing.json and its figure, and prints the table."""
    if values.out is None:
        raise UsageError("--out is not given; name a folder")
    program.use_compilation_cache()
    unknown = [name for name in values.recipes or () if name not in RECIPES]
    if unknown:
        raise UsageError(f"--recipes: {unknown[0]!r} is not known; there are {', '.join(RECIPES)}")
    names = list(dict.fromkeys((*_NEEDED, *(values.recipes or RECIPES))))
    runs, out = open_runs(values.runs or (), values.data_dir), Path(values.out)
    saved = checkpoints.numbers(runs[0].workdir.checkpoints / "train")
    given = None if values.epoch is None else [str(values.epoch)]
    epoch = options.checkpoints_of("epoch", given, saved)[-1]
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        refit(runs, name, epoch, out)
    choice = choose(runs, names, epoch, out)
    write_json(out / "choice.json", {"epoch": epoch, **choice})
    results = summary(runs, names, epoch, out, choice)
    if values.gap_images:
        results["nats_from_optimal"] = nats_from_optimal(
            runs, epoch, out, choice["best"], values.gap_images
        )
    write_json(out / "closing.json", results)
    figures.save(figures.closing(results), out / "closing")
    print(table(results))
    print("mean ± standard error over seeds; * chosen on validation images")
    if values.gap_images:
        print(amortization.table(results["nats_from_optimal"]))
        print("mean ± standard error over images; q* is fitted on them")
    print(f"figure: {out / 'closing.png'}")


if __name__ == "__main__":
    flags.DEFINE_list("runs", None, "Workdirs of trained runs, one for each seed: a,b,c.")
    flags.DEFINE_string("out", None, "Folder for the refits and the results; made if needed.")
    flags.DEFINE_list("recipes", None, f"Which to try, of {', '.join(RECIPES)}; default: all.")
    flags.DEFINE_integer("epoch", None, "Of the checkpoint; default: the last.")
    flags.DEFINE_integer(
        "gap_images", 200, "Images of each kind whose q* says how far encoders are; 0 for none."
    )
    flags.DEFINE_string("data_dir", None, "Where MNIST is; see experiments.train.")
    program.run_without_workdir(close_the_gap)
