"""Runs of the programs' phases on tiny models, in this process."""

from absl import flags as absl_flags

from experiments import evaluate, options, refit, results_json, train, workdir
from experiments import run as experiment
from experiments.presets import PRESETS
from gapjax import checkpoints

TINY = options.Config(
    **{
        **PRESETS["digits"], "preset": "digits", "binarization": None, "levels": None, "seed": 0,
        "likelihood": None, "num_epochs": 4, "checkpoint_every": 2, "refit_epochs": 1,
        "optimal_epochs": 20, "hidden_sizes": (16,), "latent_dim": 2, "num_eval_samples": 2,
        "batch_size": 200, "validation": 37, "posterior": "diagonal", "uniform_weight": 0.0,
        "refit_batch_size": None, "mixture": "random", "recipe": "paper",
    }
)  # fmt: skip
STORES = ("train", *results_json.REFITS, "evaluation", "effects", "shares")
STEPS = 7  # of an epoch: 1,400 images in batches of 200


def start_run(path, every=0, keep=1, config=TINY, **how):
    prepared = experiment.prepare(config, None)
    saving = options.Saving(every, keep)
    return experiment.start(prepared, workdir.Workdir(path), saving=saving, **how)


def run_phases(path, do=(train.train_phase, refit.refit_phase, evaluate.evaluate_phase), **options):
    """Phases on a workdir, in this process; returns what the last of them does."""
    run = start_run(path, **options)
    try:
        for phase in do:
            result = phase(run)
    finally:
        run.workdir.close()
    return result


def checksums(path, stores=STORES):
    return {
        (name, number): checkpoints.checksum(path / "checkpoints" / name, number)
        for name in stores
        for number in checkpoints.numbers(path / "checkpoints" / name)
    }


def logged(path):
    return sorted((path / "metrics.jsonl").read_text().splitlines())


def parsed(given, *more):
    """Flag values as `experiments.train` defines them, and as each of `more` does."""
    values = absl_flags.FlagValues()
    for define in (options.define_place, options.define_run, *more):
        define(values)
    values(["program", *given])
    return values
