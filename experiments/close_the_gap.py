"""How much of the gap each recipe closes: recipes x seeds on the checkpoints of runs.

python -m experiments.close_the_gap --runs=runs/digits_seed0,runs/digits_seed1 --out=runs/closing

The runs are trained with --validation: the recipe is chosen by the BPD of the images held out.
Where they hold out none, nothing is chosen: the first of --recipes is the one reported as best.
Test images are used after that, once: every recipe is scored beside the paper's and its control,
and the best posterior q* of each test image says how large the gap is. Writes choice.json before
the test set is touched, then closing.json and closing.png. The same command resumes. With --noscore
it refits alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

import gapjax
from experiments import program, stores, studies
from experiments.config import UsageError
from experiments.files import write_json
from experiments.run import Run, environment
from experiments.show import figures
from experiments.show.formatting import text_table
from experiments.show.labels import chosen_note
from experiments.studies import named, over_seeds, over_seeds_and_images, refit, refitted
from gapjax import checkpoints
from gapjax.fit.recipes import RECIPES, recipe_model
from gapjax.measure.bounds import posterior_bounds
from gapjax.measure.statistics import ratio_of_means
from gapjax.vae import Frozen

_NEEDED = ("paper", "control")  # rows that every table has
_OPTIMAL = "q_star"
_NOTES = (
    "Test BPD and shares are means over seeds ± their standard error; of one seed, ± the standard "
    "error over test images. All seeds have the same test images: an error over seeds does not "
    "cover the choice of these.",
    "The gap is that between the encoder as trained and the best posterior q* of each test image. "
    "q* is fitted on test images: it measures, no more. Where it was searched for on the first of "
    "them alone, the share is that of these images. It is the best that a search found, so the gap "
    "is at least, and the share that is closed at most, what is shown.",
    "The cost of an encoder is the number of floating-point operations that it takes for an image, "
    "in those of the trained encoder.",
)

# How the best recipe was found, by where: see `choose`.
_CHOSEN = {
    "validation": "The recipe was chosen by the BPD of validation images, which were held out of "
    "training and of the refits. Test images were scored once, after that.",
    "nothing": "The recipe was named before any was scored: these runs hold out no images to "
    "choose one by.",
}


def score(run: Run, name: str | None, epoch: int, out: Path, images: np.ndarray) -> np.ndarray:
    """BPD of every image [N] after a recipe, or as trained; on noise common to all of them."""
    if name is None:
        vae, params = run.vae, stores.trained_params(run, epoch)
    else:
        vae = recipe_model(named(name), run.vae, run.dataset.train)
        params = refitted(run, name, out)
    return studies.bpd(run, vae, params, images)


def choose(runs: Sequence[Run], names: Sequence[str], epoch: int, out: Path) -> dict:
    """The recipes with the lowest validation BPD: of the trained encoder's cost, and of any.

    Without validation images it is the first name of either kind, but for "paper" and "control".
    "validation_bpd" is by recipe the mean of every seed, or None; "ranking" has the best first.
    """
    bpds: dict[str, list[float]] | None = None
    ranked = sorted(names, key=lambda name: name in _NEEDED)
    if runs[0].validation is not None:
        bpds = {
            name: [float(score(run, name, epoch, out, _held_out(run)).mean()) for run in runs]
            for name in names
        }
        mean = {name: float(np.mean(values)) for name, values in bpds.items()}
        ranked = sorted(names, key=mean.__getitem__)
    return {
        "best": next(name for name in ranked if _cost(runs[0], name) <= 1),
        "best_of_any_size": ranked[0], "ranking": ranked,
        "chosen_on": "nothing" if bpds is None else "validation", "validation_bpd": bpds,
    }  # fmt: skip


def optimal_bpd(
    run: Run, epoch: int, out: Path, start: str, number: int | None = None
) -> np.ndarray:
    """BPD of the first `number` test images [N], each with its own q*, on the noise of `score`.

    The search begins at the better of two encoders, as trained and after the recipe `start`. Its
    result is kept.
    """
    test = run.dataset.test[:number]
    fewer = len(test) if len(test) < len(run.dataset.test) else None

    def compute() -> tuple[dict, Any]:
        params = stores.trained_params(run, epoch)
        encoders = [params.encoder, refitted(run, start, out).encoder]
        found = gapjax.best_posteriors(
            run.vae, params, run.key("ledger", epoch), test, encoders=encoders
        )
        nats = posterior_bounds(
            run.vae, params, run.key("evaluate"), test, found.posteriors,
            num_samples=run.config.num_eval_samples,
        )  # fmt: skip
        return {"nats": nats}, found.converged

    made_with = studies.checkpoint_facts(run, epoch) | {"images": fewer}
    like = {"nats": np.zeros(len(test), np.float32)}
    tree = studies.once(out / "checkpoints" / _OPTIMAL, run, made_with, like, compute)
    return np.asarray(gapjax.bits_per_dim(tree["nats"], test.shape[1:]))


def leaderboard(
    runs: Sequence[Run], epoch: int, out: Path, choice: dict, optimal: np.ndarray
) -> list[dict]:
    """Scores every recipe on the test set; a row for each, in the order of `choose`.

    `optimal` [R, N] is `optimal_bpd` of every run. The share that is closed is that of its images.
    """
    on_test = lambda name: np.stack(
        [score(run, name, epoch, out, run.dataset.test) for run in runs], dtype=np.float64
    )
    trained, tested = on_test(None), {name: on_test(name) for name in choice["ranking"]}
    number = optimal.shape[1]
    rows = []
    for name in choice["ranking"]:
        gain, validation = trained - tested[name], choice["validation_bpd"]
        records = [checkpoints.record(out / "checkpoints" / name, r.config.seed) for r in runs]
        rows.append({
            "recipe": name, "gap_closed": _shares(gain[:, :number], trained[:, :number] - optimal),
            "test_bpd": _summary(tested[name]),
            "validation_bpd": validation and over_seeds(validation[name]), "gain": _summary(gain),
            "gain_over_control": _summary(tested["control"] - tested[name]), "seeds": len(runs),
            "larger_encoder": _cost(runs[0], name) > 1, "cost": _cost(runs[0], name),
            "encoder_parameters": _num_parameters(runs[0], name),
            "chosen": name in (choice["best"], choice["best_of_any_size"]),
            "refit_seconds": float(np.mean([record["seconds"] for record in records])),
            "commits": sorted({str(record["commit"]) for record in records}),
            "definition": studies.plain_recipe(named(name)),
        })  # fmt: skip
    return rows


def _summary(per_image: np.ndarray) -> dict:
    """`over_seeds_and_images` of [R, N] numbers; of one seed, `stderr` is the one over images."""
    summed = over_seeds_and_images(per_image)
    stderr = "stderr_over_images" if summed["stderr"] is None else "stderr"
    return summed | {"stderr": summed[stderr]}


def _shares(gain: np.ndarray, gap: np.ndarray) -> dict:
    """As `_summary`, of the ratio of the means of two [R, N] arrays."""
    ratios = [ratio_of_means(*pair) for pair in zip(gain, gap, strict=True)]
    summed = over_seeds([ratio for ratio, _ in ratios])
    over_images = ratio_of_means(gain.mean(0), gap.mean(0))[1]
    stderr = over_images if len(ratios) == 1 else summed["stderr"]
    return summed | {"stderr": stderr, "stderr_over_images": over_images}


def nats_from_optimal(runs: Sequence[Run], epoch: int, out: Path, best: str, number: int) -> dict:
    """On each kind of images, how far the encoders as trained, "paper" and `best` are from q*."""
    names = list(dict.fromkeys(("paper", best)))
    return studies.amortization_summary({
        kind: [studies.amortization_gaps(run, epoch, kind, names, number, out) for run in runs]
        for kind in studies.KINDS
    })  # fmt: skip


def summary(
    runs: Sequence[Run], epoch: int, out: Path, choice: dict, optimal_images: int | None = None
) -> dict:
    """The contents of closing.json, but for the nats from q* on each kind of images."""
    start, validated = choice["best"], choice["chosen_on"] == "validation"
    optimal = np.stack([optimal_bpd(run, epoch, out, start, optimal_images) for run in runs])
    rows = leaderboard(runs, epoch, out, choice, optimal)
    over = lambda images_of, name: over_seeds(
        [score(run, name, epoch, out, images_of(run)).mean(dtype=np.float64) for run in runs]
    )
    return {
        "schema": 1, "dataset": runs[0].dataset.name, "preset": runs[0].config.preset,
        "epoch": epoch, "seeds": [run.config.seed for run in runs],
        "num_validation": len(_held_out(runs[0])) if validated else 0,
        "num_test": len(runs[0].dataset.test),
        "as_trained": {
            "train_bpd": over(lambda run: run.dataset.train, None),
            "validation_bpd": over(_held_out, None) if validated else None,
            "test_bpd": over(lambda run: run.dataset.test, None),
            "encoder_parameters": _num_parameters(runs[0], None),
        },
        "optimal_posteriors": {
            "test_bpd": _summary(optimal),
            "num_images": optimal.shape[1],
            "fitted_on_test": True,
        },
        "stderr_over": _stderr_over(runs), "chosen_on": choice["chosen_on"], "best": choice["best"],
        "best_of_any_size": choice["best_of_any_size"], "recipes": rows,
        "environment": environment(), "notes": [*_NOTES, _CHOSEN[choice["chosen_on"]]],
    }  # fmt: skip


def table(results: dict) -> str:
    """The leaderboard as plain text; * marks what was chosen."""
    heads = (
        "recipe", "validation BPD", "test BPD", "gain over control", "gap closed", "seconds", "cost"
    )  # fmt: skip
    rows = []
    for row in results["recipes"]:
        bpds = [_cell(row[key]) for key in ("validation_bpd", "test_bpd", "gain_over_control")]
        closed = f"{row['gap_closed']['mean']:.1%} ± {row['gap_closed']['stderr']:.1%}"
        name = row["recipe"] + (" *" if row["chosen"] else "")
        rows.append((name, *bpds, closed, f"{row['refit_seconds']:.0f}", f"{row['cost']:.2f}"))
    return text_table(heads, rows, 24, 20)


def _cell(value: Mapping[str, float | None] | None) -> str:
    if value is None:
        return "–"
    stderr = value["stderr"]
    return f"{value['mean']:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _stderr_over(runs: Sequence[Run]) -> str:
    """What a standard error says the mean varies over."""
    return "seeds" if len(runs) > 1 else "images"


def _held_out(run: Run) -> np.ndarray:
    assert run.validation is not None
    return run.validation


def _encoder(run: Run, name: str | None) -> tuple[gapjax.VAE, Any]:
    """The model after a recipe, or as trained, and the shapes of its encoder's parameters."""
    vae = run.vae if name is None else recipe_model(named(name), run.vae, run.dataset.train)
    return vae, jax.eval_shape(vae.init, jax.random.key(0)).encoder


def _num_parameters(run: Run, name: str | None) -> int:
    """Parameters of the encoder that a refit trains."""
    is_frozen = lambda node: isinstance(node, Frozen)
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
    for name in values.recipes or ():
        named(name)
    needed = _NEEDED if values.score else ()
    names = list(dict.fromkeys((*needed, *(values.recipes or RECIPES))))
    given = None if values.epoch is None else [str(values.epoch)]
    # Where the recipes are named, they may be compared without any choice.
    runs, epochs, out = studies.open_study(
        values, "epoch", given, validation=values.recipes is None
    )
    epoch = epochs[-1]
    for name in names:
        refit(runs, name, epoch, out)
    if not values.score:
        return
    choice = choose(runs, names, epoch, out)
    write_json(out / "choice.json", {"epoch": epoch, **choice})
    results = summary(runs, epoch, out, choice, values.optimal_images)
    if values.gap_images:
        results["nats_from_optimal"] = nats_from_optimal(
            runs, epoch, out, choice["best"], values.gap_images
        )
    write_json(out / "closing.json", results)
    figures.save(figures.closing(results), out / "closing")
    print(table(results))
    print(f"mean ± standard error over {_stderr_over(runs)}; {chosen_note(results)}")
    if values.gap_images:
        print(studies.amortization_table(results["nats_from_optimal"]))
        print("mean ± standard error over images; q* is fitted on them")
    print(f"figure: {out / 'closing.png'}")


if __name__ == "__main__":
    studies.define_flags("the refits and the results")
    flags.DEFINE_list(
        "recipes", None,
        f"Which to try, of {', '.join(RECIPES)}; default: all. Numbers of one can be changed, for "
        "a quick trial: samples:num_epochs=20:learning_rate=1e-3. Runs without validation images "
        "need it: the first is then the one reported as best.",
    )  # fmt: skip
    flags.DEFINE_integer("epoch", None, "Of the checkpoint; default: the last.")
    flags.DEFINE_integer(
        "optimal_images", None, "Test images whose q* says how large the gap is; default: all.",
        lower_bound=1,
    )  # fmt: skip
    flags.DEFINE_integer(
        "gap_images", 200, "Images of each kind whose q* says how far encoders are; 0 for none."
    )
    flags.DEFINE_boolean(
        "score", True,
        "Choose and score after the refits. --noscore leaves that, and the rows that every table "
        "has, to a later call, so that recipes can be refitted side by side.",
    )  # fmt: skip
    program.run_without_workdir(close_the_gap)
