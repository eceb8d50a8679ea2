"""The tables of atlas.json: plain text for a terminal, Markdown for the pages in docs."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import scipy.stats

from experiments.show.formatting import text_table

CHECKPOINTS = ("early", "late")
CURES = ("control", "paper", "best", "learned", "newton", "optimal")
_REGULARIZERS = ("noise", "codes", "norm")  # in the names of rows

# What may predict how large a gap is: by name, of a row.
_PREDICTORS: Mapping[str, Callable[[Mapping], float]] = {
    "training examples": lambda row: row["examples"]["train"],
    "entries of x": lambda row: row["entries"],
    "epochs": lambda row: row["epochs"][1],
    "encoder parameters": lambda row: row["encoder_parameters"],
    "encoder parameters for each training example": lambda row: (
        row["encoder_parameters"] / row["examples"]["train"]
    ),
    "the gap on training examples": lambda row: row["late"]["train_gap"]["mean"],
}


def shown(results: Mapping) -> list[Mapping]:
    """The rows with a gap, but for those whose training is regularized or that vary recipes."""
    rows = (row for row in results["rows"] if row["gap"] and not is_regularized(row))
    return [row for row in rows if not row["row"].endswith(("_alpha", "_recipes"))]


def alphas(results: Mapping) -> dict[str, dict[str, list[tuple[float, Mapping]]]]:
    """By row and checkpoint, alpha and the nats that a refit with it wins on test examples."""
    known = {"control": 0.0, "paper": 0.5}
    share = lambda name: known[name] if name in known else float(name.removeprefix("alpha_"))
    by_share = lambda at: sorted(
        ((share(name), at["gain"][name]) for name in at["validation_by_recipe"]),
        key=operator.itemgetter(0),
    )
    return {
        row["row"]: {at: by_share(row[at]) for at in CHECKPOINTS}
        for row in results["rows"]
        if row["row"].endswith("_alpha")
    }


def is_regularized(row: Mapping) -> bool:
    """Whether the joint training of a row regularizes the encoder."""
    return any(f"_{kind}_" in row["row"] for kind in _REGULARIZERS)


def table(results: Mapping) -> str:
    """The late checkpoints as plain text."""
    heads = ("row", "test nats", "gap", *CURES)
    lines = []
    for row in results["rows"]:
        closed = row["closed"] or {}
        cells = [_cell(closed.get(name), percent=True) for name in CURES]
        lines.append((row["row"], _cell(row["late"]["test"]), _cell(row["gap"]), *cells))
    return text_table(heads, lines, 26, 16)


def gaps(results: Mapping) -> str:
    """How large the gap is at either checkpoint, and on training examples."""
    heads = (
        "row", "seeds", "early, late epoch", "train ELBO, late", "test ELBO, early",
        "test ELBO, late", "gap, early", "gap, late", "gap on training examples, late",
    )  # fmt: skip
    lines = []
    for row in shown(results):
        early, late = (row[at] for at in CHECKPOINTS)
        epochs = ", ".join(f"{epoch:.0f}" for epoch in row["epochs"])
        cells = map(_cell, (late.get("train"), early["test"], late["test"], early["gap"],
                            late["gap"], late.get("train_gap")))  # fmt: skip
        lines.append((f"`{row['row']}`", row["seeds"], epochs, *cells))
    return _markdown(heads, lines)


def closed(results: Mapping) -> str:
    """The share of the late gap that each cure closes."""
    heads = ("row", "gap", *CURES, "best is", "`paper` over `control`, nats")
    lines = []
    for row in shown(results):
        shares = [_cell(row["closed"].get(name), percent=True) for name in CURES]
        best = ", ".join(f"`{name}`" for name in dict.fromkeys(row["late"]["best"]))
        over = _cell(row["late"]["gain_over_control"])
        lines.append((f"`{row['row']}`", _cell(row["gap"]), *shares, best, over))
    return _markdown(heads, lines)


def shares(results: Mapping) -> str:
    """How many test examples gain, where there were samples enough to tell, and how much."""
    heads = ("row", "checkpoint", "encoder", "nats", "share of examples that gain", "median nats")
    lines = []
    for row in results["rows"]:
        for at in CHECKPOINTS:
            won = row[at]["gain"] | {"paper_over_control": row[at]["gain_over_control"]}
            found = row[at].get("examples_that_gain", {})
            for name in filter(found.__contains__, (*CURES, "paper_over_control")):
                share, median = found[name]["share"], found[name]["median"]
                error = "" if median["stderr"] is None else f" ± {median['stderr']:.2f}"
                title = "`" + name.replace("_over_", "` over `") + "`"
                percent = f"{share['mean']:.1%} ± {share['stderr']:.1%}"
                cells = title, _cell(won[name]), percent, f"{median['mean']:.2f}{error}"
                lines.append((f"`{row['row']}`", at, *cells))
    return _markdown(heads, lines)


def choices(results: Mapping) -> str:
    """Nats over the control on validation examples, by which recipes of equal cost are chosen."""
    names = ("paper", "mixture", "reconstructions", "counts", "thinned")
    lines = []
    for row in shown(results):
        for at in CHECKPOINTS:
            nats = {name: each["mean"] for name, each in row[at]["validation_by_recipe"].items()}
            won = [f"{nats[name] - nats['control']:.2f}" if name in nats else "–" for name in names]
            lines.append((f"`{row['row']}`", at, *won))
    return _markdown(("row", "checkpoint", *(f"`{name}`" for name in names)), lines)


def costs(results: Mapping) -> str:
    """What cures cost beside the nats that they win."""
    heads = (
        "row", "`paper`: seconds to fit", "`paper`: nats", "learned: seconds to fit",
        "learned: ms an example", "learned: nats", "Newton: ms an example", "Newton: nats",
        "encoder: ms an example",
    )  # fmt: skip
    lines = []
    for row in shown(results):
        if seconds := row.get("seconds"):
            fit, example = seconds["fit"], seconds["example"]
            nats = lambda name, row=row: _cell((row["closed"].get(name) or {}).get("nats"))
            number = lambda value, scale: "–" if value is None else f"{scale * value:.3g}"
            lines.append((
                f"`{row['row']}`", number(fit["paper"], 1), nats("paper"),
                number(fit.get("learned"), 1), number(example.get("learned"), 1e3),
                nats("learned"), number(example.get("newton"), 1e3), nats("newton"),
                number(example["encoder"], 1e3),
            ))  # fmt: skip
    return _markdown(heads, lines)


def predictors(results: Mapping) -> str:
    """By predictor the slope ± stderr of log late gap over its logarithm, and the correlation."""
    rows = [row for row in shown(results) if row["gap"]["mean"] > 0]
    gap = np.log([row["gap"]["mean"] for row in rows])
    per_entry = gap - np.log([row["entries"] for row in rows])
    lines = []
    for name, value in _PREDICTORS.items():
        given = np.log([value(row) for row in rows])
        cells = []
        for wanted in (gap, per_entry):
            fit = scipy.stats.linregress(given, wanted)
            cells += [f"{fit.slope:.2f} ± {fit.stderr:.2f}", f"{fit.rvalue:.2f}"]
        lines.append((name, *cells))
    heads = (f"of {len(rows)} rows", "slope", "correlation", "slope, gap an entry", "correlation")
    return _markdown(heads, lines)


def regularization(results: Mapping) -> str:
    """Joint trainings beside the plain one, as docs/regularization.md shows them."""
    heads = ("row", "seeds", "early epoch", *(f"{at}: {what}" for at in CHECKPOINTS for what in (
        "validation", "test", "over plain", "test after `paper`", "gap")))  # fmt: skip
    lines, plain = [], {row["row"]: row for row in results["rows"]}
    for row in results["rows"]:
        name = row["row"]
        if name not in ("digits", "binary_mnist") and not is_regularized(row):
            continue
        other = plain[next(each for each in ("binary_mnist", "digits") if name.startswith(each))]
        cells = [f"`{name}`", row["seeds"], f"{row['epochs'][0]:.0f}"]
        for at in CHECKPOINTS:
            found = row[at]
            after = found["test"]["mean"] + found["gain"]["paper"]["mean"]
            cells += [
                f"{found['validation']['mean']:.2f}", _cell(found["test"]),
                "" if row is other else _paired(found["test"], other[at]["test"]), f"{after:.2f}",
                _cell(found.get("gap")),
            ]  # fmt: skip
        lines.append(cells)
    return _markdown(heads, lines)


def _paired(one: Mapping, other: Mapping) -> str:
    """The mean difference of two numbers of the same seeds, with its error if there are several."""
    number = min(len(one["values"]), len(other["values"]))
    differences = np.subtract(one["values"][:number], other["values"][:number])
    if number == 1:
        return f"{differences[0]:.2f}"
    return f"{differences.mean():.2f} ± {differences.std(ddof=1) / math.sqrt(number):.2f}"


def _markdown(heads: Sequence[str], lines: Iterable[Sequence]) -> str:
    marks = "|---" * len(heads) + "|"
    rows = ["| " + " | ".join(map(str, cells)) + " |" for cells in (heads, *lines)]
    return "\n".join((rows[0], marks, *rows[1:]))


def _cell(value: Mapping | None, *, percent: bool = False) -> str:
    if value is None:
        return "–"
    form = "{:.0%} ± {:.0%}" if percent else "{:.2f} ± {:.2f}"
    return form.format(value["mean"], value["stderr"])
