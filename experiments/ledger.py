"""Where every nat goes: the ledger of a workdir's checkpoints; writes ledger.json and ledger.png.

python -m experiments.ledger --workdir=runs/digits --ledger_epochs=50,500

The same command resumes: what was measured of a checkpoint is kept. `experiments.reproduce
--ledger` does this too, and its report shows it.
"""

import functools
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

import gapjax
from experiments import options, program, stores
from experiments.config import Config
from experiments.config import epochs as config_epochs
from experiments.draw import draw_phase
from experiments.files import write_json
from experiments.results_json import REFITS, plain
from experiments.run import Run, environment, progress_bar
from experiments.show import figures
from experiments.show.formatting import text_table
from experiments.stores import encoders
from gapjax import checkpoints
from gapjax.measure.log_likelihood import sandwich
from gapjax.results import ledger as results_ledger
from gapjax.results import measurements

_STORE = "ledger"
_FROM_BELOW = (
    "The ELBO with q* is from below, as log p(x) is: q* is the best of its family that a search "
    "found. So the loss by the encoder's capacity is at least what is shown, and as far as q* goes "
    "that by the posterior's family at most."
)
_NOTES = (
    "Nats per image. An ELBO is a mean over images; a loss is a difference of two, paired image by "
    "image; ± is one standard error over images.",
    "Numbers marked * are of a posterior or an encoder that was fitted to the test images: they "
    "measure, no more.",
    _FROM_BELOW,
    "log p(x) is estimated from below by annealed importance sampling from q*; it is a number of "
    "the decoder, and no parameter of the model was fitted for it.",
)


class Settings(NamedTuple):
    """What a ledger is measured with; its flags say more."""

    epochs: tuple[int, ...] | None = None  # None takes the first, the middle and the last
    num_images: int = 360  # most of each set
    num_samples: int = 50  # for every ELBO
    num_simulated: int = 0
    batch_size: int = 50  # images at once; bounds memory, changes nothing else


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of `Settings`; they are no part of what a run computes."""
    default, number = Settings(), functools.partial(flags.DEFINE_integer, flag_values=values)
    flags.DEFINE_list(
        "ledger_epochs", None,
        "Checkpoints of the ledger, e.g. 50,500; default: the first, the middle and the last.",
        flag_values=values,
    )  # fmt: skip
    number("ledger_images", default.num_images, "Most images of each set in the ledger, a random "
           "subset by --seed.", lower_bound=2)  # fmt: skip
    number("ledger_samples", default.num_samples, "Posterior samples for every ELBO of it.",
           lower_bound=1)  # fmt: skip
    number("ledger_simulated", default.num_simulated, "Images simulated from each model, on which "
           "log p(x) is bounded from both sides: how well is it known? 0: none.",
           lower_bound=0)  # fmt: skip
    number("ledger_batch_size", default.batch_size, "Images at once in it; bounds memory.",
           lower_bound=1)  # fmt: skip


def settings_from_flags(values: flags.FlagValues) -> Settings:
    """The flags, checked."""
    epochs = values.ledger_epochs
    if epochs is not None:
        epochs = tuple(sorted(set(options.integers("ledger_epochs", epochs))))
    return Settings(
        epochs, values.ledger_images, values.ledger_samples, values.ledger_simulated,
        values.ledger_batch_size,
    )  # fmt: skip


def check_flags(values: flags.FlagValues, config: Config) -> None:
    """Checks the flags before there are any checkpoints."""
    epochs = settings_from_flags(values).epochs
    if epochs is not None:
        options.checkpoints_of("ledger_epochs", map(str, epochs), config_epochs(config))


def ledger_phase(run: Run, settings: Settings) -> dict:
    """Measures the checkpoints that are not measured yet; writes ledger.json and ledger.png."""
    rows, seconds = [], 0.0
    methods = {
        "search": gapjax.PosteriorSearch()._asdict(),
        "annealing": gapjax.Annealing()._asdict(),
    }
    for epoch in _epochs(run, settings):
        stored = lambda kind: checkpoints.numbers(run.workdir.checkpoints / kind)
        kinds = [kind for kind in REFITS if epoch in stored(kind)]
        # The batch size is no part of what is measured.
        measured_with = {**settings._asdict(), "epochs": None, "batch_size": None}
        measured_with |= {"refits": kinds, **methods}
        if stores.kept(run, _STORE, epoch).get("settings") != measured_with:
            clock = time.monotonic()
            model = encoders(run, epoch, kinds)
            tree = _measure(run, settings, epoch, *model)
            between = _sandwich(run, settings, epoch, *model) if settings.num_simulated else None
            stores.save(
                run, _STORE, epoch, tree, clock, settings=measured_with, sandwich=between,
                made_from=[(name, epoch) for name in ("train", *kinds)],
            )  # fmt: skip
        tree, record = stores.load(run, _STORE, epoch, _like(run, settings, kinds))
        book = plain(results_ledger.balance(
            tree["train"], tree["test"], refit="optimal" if "optimal" in kinds else None,
            num_available=(len(run.dataset.train), len(run.dataset.test)),
        ))  # fmt: skip
        for name in ("train", "test"):  # eq. 11 with q*, of the test set
            for account in book[name]["encoders"].values():
                gap = account["amortization_gap"] if name == "test" else None
                account["inference_gap_by_posteriors"] = gap
        seconds += record["seconds"]
        others = {name: record.get(name) for name in ("sandwich", "seconds")}
        paths = [run.workdir.checkpoints / name for name in ("train", *kinds, _STORE)]
        made_by = {path.name: checkpoints.record(path, epoch).get("commit") for path in paths}
        rows.append({"epoch": epoch, **book, **plain(others), "commits": made_by})
    results = {
        "schema": 1, "unit": "nats per image", "dataset": run.dataset.name,
        "preset": run.config.preset, "subset_seed": run.config.seed,
        "num_samples": settings.num_samples, **methods, "environment": environment(),
        "checkpoints": rows, "notes": [*_NOTES, *_own_notes(rows)], "seconds": seconds,
    }  # fmt: skip
    if run.workdir.writes:
        write_json(run.workdir.path / "ledger.json", results)
        figures.save(figures.ledger(results), run.workdir.path / "ledger")
    return results


def table(results: dict) -> str:
    """The test ledger of the encoder as trained, a line for each checkpoint; plain text."""
    heads = {
        "log p train": lambda row: row["train"]["log_prob"],
        "decoder": lambda row: row["model_gap"],
        "log p test": lambda row: row["test"]["log_prob"],
        "family": lambda row: row["test"]["approximation_gap"],
        "capacity": lambda row: row["test"]["encoders"]["as_trained"]["capacity_gap"],
        "over-fitting": lambda row: row["test"]["encoders"]["as_trained"]["inference_gap_by_refit"],
        "ELBO test": lambda row: row["test"]["encoders"]["as_trained"]["elbo"],
    }
    rows = [
        (str(row["epoch"]), *(_cell(find(row)) for find in heads.values()))
        for row in results["checkpoints"]
    ]
    return text_table(("epoch", *heads), rows, 5, 18)


def _cell(entry: dict | None) -> str:
    if entry is None:
        return "-"
    return _number(entry["nats"], entry["stderr"]) + ("*" if entry["fitted_on_test"] else " ")


def _number(nats: float, stderr: float | None) -> str:
    """A number with its standard error, where that is known: of one image it is not."""
    return f"{nats:.3f}" if stderr is None else f"{nats:.3f} ± {stderr:.3f}"


def _epochs(run: Run, settings: Settings) -> list[int]:
    trained = checkpoints.numbers(run.workdir.checkpoints / "train")
    trained = [epoch for epoch in trained if epoch in run.epochs]
    wanted = settings.epochs
    if wanted is None:
        wanted = sorted({trained[0], trained[len(trained) // 2], trained[-1]}) if trained else []
    return options.checkpoints_of("ledger_epochs", wanted, trained)


def _measure(
    run: Run, settings: Settings, epoch: int, params: gapjax.VAEParams, by_name: dict[str, Any]
) -> dict:
    """The measurements of every image of both sets."""
    measured, sets = {}, _images(run, settings)
    for key, name in zip(jax.random.split(run.key("ledger", epoch)), sets, strict=True):
        with _bars(run, f"ledger {epoch} {name}", len(sets[name])) as on_progress:
            measured[name] = measurements.measure(
                run.vae, params, key, sets[name], by_name, num_samples=settings.num_samples,
                batch_size=settings.batch_size, on_progress=on_progress,
            )  # fmt: skip
    return measured


def _sandwich(
    run: Run, settings: Settings, epoch: int, params: gapjax.VAEParams, by_name: dict[str, Any]
) -> dict:
    """How far apart the two bounds of log p(x) are on simulated images."""
    # It was made for such images: a better place for the chains to start from.
    start = by_name.get("self_consistent", params.encoder)
    with _bars(run, f"ledger {epoch} simulated", settings.num_simulated) as on_progress:
        between = sandwich(
            run.vae, params._replace(encoder=start), run.key("simulated", epoch),
            settings.num_simulated, batch_size=settings.batch_size,
            on_progress=functools.partial(on_progress, "log p(x)"),
        )  # fmt: skip
    return {
        "num_images": settings.num_simulated, "lower": float(between.lower.mean()),
        "upper": float(between.upper.mean()), "gap": between.gap, "gap_stderr": between.gap_stderr,
        "ess": float(between.ess.mean()), "acceptance": float(between.acceptance.mean()),
    }  # fmt: skip


def _own_notes(rows: list[dict]) -> list[str]:
    """Notes on these rows: the gap of the sandwich, and searches that found nothing."""
    notes = []
    for row in rows:
        epoch, between = row["epoch"], row["sandwich"]
        if between:
            notes.append(
                f"How good that estimate is, at epoch {epoch}: on {between['num_images']} images "
                "simulated from the model, where annealing gives a bound from above too, the two "
                f"bounds are {_number(between['gap'], between['gap_stderr'])} nats apart."
            )
        kept = row["test"]["quality"]["kept_start"] or 0
        if kept > 0.5:
            notes.append(
                f"At epoch {epoch} the search for q* found nothing better than an encoder's "
                f"posterior for {kept:.0%} of the test images: the loss of the posterior's family "
                "may be smaller than shown, and that of the encoder's capacity larger."
            )
    return notes


def _images(run: Run, settings: Settings) -> dict[str, np.ndarray]:
    return {
        name: measurements.subset(images, settings.num_images, run.config.seed)
        for name, images in (("train", run.dataset.train), ("test", run.dataset.test))
    }


def _like(run: Run, settings: Settings, kinds: list[str]) -> dict:
    """The shapes of what `_measure` gives."""

    def measured(images: np.ndarray) -> measurements.Measured:
        number = np.zeros(len(images), np.float32)
        flag, count = np.zeros(len(images), bool), np.zeros(len(images), np.int32)
        elbo = dict.fromkeys(("as_trained", *kinds), number)
        return measurements.Measured(elbo, number, number, number, number, flag, flag, count)

    return {name: measured(images) for name, images in _images(run, settings).items()}


@contextmanager
def _bars(run: Run, name: str, total: int) -> Iterator[Any]:
    """A progress bar for each thing that is done with the images."""
    bars = {}
    with ExitStack() as stack:

        def show(what: str, done: int) -> None:
            if what not in bars:
                bar = progress_bar(run, f"{name} {what}", total, images=1, unit="images")
                bars[what] = stack.enter_context(bar)
            bars[what](done)
            if run.interrupted():
                raise KeyboardInterrupt

        yield show


def ledger(run: Run) -> None:
    """The ledger alone; the report too, where the run has one."""
    results = ledger_phase(run, settings_from_flags(flags.FLAGS))
    print(table(results))
    print("* fitted on the test images")
    print(_FROM_BELOW)
    for note in results["notes"][len(_NOTES) :]:
        print(note)
    evaluated = run.workdir.path / "results.json"
    if evaluated.is_file():
        print(f"report: {draw_phase(run, json.loads(evaluated.read_text()))}")


if __name__ == "__main__":
    options.define_place()
    define_flags()
    program.run_program(ledger, new_runs=False, check=lambda values, _: settings_from_flags(values))
