"""What alpha does: test BPD after self-consistent training over the share of model samples.

python -m experiments.alpha --runs=runs/digits_seed0,runs/digits_seed1 --out=runs/alpha

The checkpoints of each run are refitted with every alpha as the run's flags say, and scored on the
test images. It chooses nothing: an alpha of this figure was seen with test images. Writes
alpha.json and alpha.png. The same command resumes.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags

import gapjax
from experiments import program, stores, studies
from experiments.config import UsageError
from experiments.files import write_json
from experiments.run import Run, environment, progress_bar
from experiments.show import figures
from experiments.studies import over_seeds_and_images
from gapjax import checkpoints
from gapjax.fit.api import self_consistent_source

_ALPHAS = tuple(f"{tenth / 10:g}" for tenth in range(11))
_SETTINGS = ("refit_epochs", "batch_size", "refit_batch_size", "mixture", "learning_rate")
_NOTES = (
    "Values are means over seeds with their standard error over seeds. stderr_over_images is that "
    "of the mean over seeds of each test image, and of the gain that of the paired difference. All "
    "seeds have the same test images, so neither error covers both.",
    "The alpha that is best here was found with test images: choose one by validation images.",
)


def refit(runs: Sequence[Run], epoch: int, alphas: Sequence[float], out: Path) -> None:
    """Refits the checkpoint of every run with every alpha and scores it, where that is not done."""
    missing = [
        (run, alpha)
        for alpha in alphas
        for run in runs
        if not studies.is_kept(_store(out, epoch, alpha), run, _made_with(run, epoch))
    ]
    for pairs in studies.side_by_side(missing):
        _refit(pairs, epoch, out)


def _refit(pairs: Sequence[tuple[Run, float]], epoch: int, out: Path) -> None:
    """Refits and scores pairs of a run and an alpha, in one sweep."""
    clock, (first, _) = time.monotonic(), pairs[0]
    config, train = first.config, jnp.asarray(first.dataset.train)
    stratified = config.mixture == "stratified"

    def member(run: Run, alpha: float) -> gapjax.Member:
        params = stores.trained_params(run, epoch)
        share = jnp.asarray(alpha, jnp.float32)  # an array, so that all are one program
        source = self_consistent_source(run.vae, params, train, share, stratified)
        return gapjax.Member(params, source, run.key("refit", epoch))

    title = f"alpha {','.join(f'{alpha:g}' for _, alpha in pairs)} epoch {epoch}"
    images = len(train) * len(pairs)
    with progress_bar(first, title, config.refit_epochs, images=images) as bar:
        refits = gapjax.refit_members(
            first.vae, [member(*pair) for pair in pairs], num_epochs=config.refit_epochs,
            batch_size=config.refit_batch_size or config.batch_size,
            optimizer=gapjax.adam(config.learning_rate), on_epoch=bar,
        )  # fmt: skip
    for (run, alpha), one in zip(pairs, refits, strict=True):
        tree = {"test": _score(run, one.params), "averaged": _score(run, one.averaged_params)}
        made = _made_with(run, epoch)
        studies.save_share(_store(out, epoch, alpha), run, tree, made, clock, len(pairs))


def _score(run: Run, params: gapjax.VAEParams) -> np.ndarray:
    """BPD of every test image [N]."""
    return studies.bpd(run, run.vae, params, run.dataset.test)


def summary(runs: Sequence[Run], epochs: Sequence[int], alphas: Sequence[float], out: Path) -> dict:
    """The contents of alpha.json."""
    return {
        "schema": 1, "dataset": runs[0].dataset.name, "preset": runs[0].config.preset,
        "seeds": [run.config.seed for run in runs], "num_test": len(runs[0].dataset.test),
        "refit": {name: getattr(runs[0].config, name) for name in _SETTINGS},
        "checkpoints": [_checkpoint(runs, epoch, alphas, out) for epoch in epochs],
        "environment": environment(), "notes": list(_NOTES),
    }  # fmt: skip


def _checkpoint(runs: Sequence[Run], epoch: int, alphas: Sequence[float], out: Path) -> dict:
    """What alpha does to the checkpoints of one epoch; [R, N] is BPD by run and test image."""
    trained = np.stack([_score(run, stores.trained_params(run, epoch)) for run in runs])
    like = {name: np.zeros_like(trained[0]) for name in ("test", "averaged")}
    rows, commits = [], set()
    for alpha in alphas:
        store = _store(out, epoch, alpha)
        entries = [checkpoints.restore(store, run.config.seed, like) for run in runs]
        commits |= {str(facts["commit"]) for _, facts in entries}
        after, averaged = (np.stack([tree[name] for tree, _ in entries]) for name in like)
        rows.append({
            "alpha": alpha, "test_bpd": over_seeds_and_images(after),
            "gain": over_seeds_and_images(trained - after),
            "averaged_test_bpd": over_seeds_and_images(averaged),
            "averaged_gain": over_seeds_and_images(trained - averaged),
        })  # fmt: skip
    return {
        "epoch": epoch, "as_trained": over_seeds_and_images(trained), "alphas": rows,
        "commits": sorted(commits),
    }  # fmt: skip


def _store(out: Path, epoch: int, alpha: float) -> Path:
    return out / "checkpoints" / f"epoch_{epoch}_alpha_{alpha:g}"


def _made_with(run: Run, epoch: int) -> dict:
    """What an entry records of how it was made."""
    settings = {name: getattr(run.config, name) for name in _SETTINGS}
    return studies.checkpoint_facts(run, epoch) | settings


def table(results: dict) -> str:
    """The results as plain text, a line for each checkpoint and alpha."""
    lines = [f"{'epoch':>5}{'alpha':>7}{'test BPD':>10}{'gain':>20}{'averaged':>10}"]
    for checkpoint in results["checkpoints"]:
        for row in checkpoint["alphas"]:
            gain = f"{row['gain']['mean']:.4f} ± {row['gain']['stderr_over_images']:.4f}"
            lines.append(
                f"{checkpoint['epoch']:5}{row['alpha']:7g}{row['test_bpd']['mean']:10.4f}"
                f"{gain:>20}{row['averaged_test_bpd']['mean']:10.4f}"
            )
    return "\n".join(lines)


def numbers(given: Sequence[str]) -> list[float]:
    """The values of --alphas, ascending; UsageError if one is no number in [0, 1]."""
    try:
        alphas = sorted({float(text) for text in given})
    except ValueError as error:
        raise UsageError(f"--alphas: {error}") from None
    if not alphas or not 0 <= alphas[0] <= alphas[-1] <= 1:
        raise UsageError(f"--alphas={','.join(given)}: give numbers in [0, 1]")
    return alphas


def alpha(values: flags.FlagValues) -> None:
    """Refits, scores, writes alpha.json and its figure, and prints the table."""
    if values.out is None:
        raise UsageError("--out is not given; name a folder")
    alphas = numbers(values.alphas)
    runs, epochs, out = studies.open_study(
        values, "checkpoints", values.checkpoints, validation=False
    )
    for epoch in epochs:
        refit(runs, epoch, alphas, out)
    results = summary(runs, epochs, alphas, out)
    write_json(out / "alpha.json", results)
    figures.save(figures.alpha(results), out / "alpha")
    print(table(results))
    print("gain ± its paired standard error over test images")
    print(f"figure: {out / 'alpha.png'}")


if __name__ == "__main__":
    studies.define_flags("the results")
    flags.DEFINE_list("alphas", list(_ALPHAS), "Shares of model samples, in [0, 1].")
    flags.DEFINE_list("checkpoints", None, "Epochs of the checkpoints; default: all.")
    program.run_without_workdir(alpha)
