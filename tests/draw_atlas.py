"""Writes the tables of the atlas into pages of docs, and draws its figures, from atlas.json.

python tests/draw_atlas.py         of the committed results
python tests/draw_atlas.py FOLDER  takes atlas.json of a run of experiments.atlas in their place
"""

import json
import math
import operator
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.stats

from experiments.show import figures
from experiments.show.atlas_rows import CHECKPOINTS, CURES, alphas, cell, is_regularized, shown

_ROOT = Path(__file__).resolve().parent.parent
RESULTS = _ROOT / "experiments" / "results" / "atlas" / "atlas.json"

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
        cells = map(cell, (late.get("train"), early["test"], late["test"], early["gap"],
                            late["gap"], late.get("train_gap")))  # fmt: skip
        lines.append((f"`{row['row']}`", row["seeds"], epochs, *cells))
    return _markdown(heads, lines)


def closed(results: Mapping) -> str:
    """The share of the late gap that each cure closes."""
    heads = ("row", "gap", *CURES, "best is", "`paper` over `control`, nats")
    lines = []
    for row in shown(results):
        shares = [cell(row["closed"].get(name), percent=True) for name in CURES]
        best = ", ".join(f"`{name}`" for name in dict.fromkeys(row["late"]["best"]))
        over = cell(row["late"]["gain_over_control"])
        lines.append((f"`{row['row']}`", cell(row["gap"]), *shares, best, over))
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
                cells = title, cell(won[name]), percent, f"{median['mean']:.2f}{error}"
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
            nats = lambda name, row=row: cell((row["closed"].get(name) or {}).get("nats"))
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


def samples_win(results: Mapping) -> str:
    """By the ratio of the gaps on test and training examples, what the model's samples win."""
    found = []
    for row in shown(results):
        for at in CHECKPOINTS:
            if "train_gap" in row[at]:
                gap, over = row[at]["gap"]["mean"], row[at]["gain_over_control"]
                ratio = gap / row[at]["train_gap"]["mean"]
                found.append((ratio, f"`{row['row']}`", at, over, over["mean"] / gap))
    lines = [
        (f"{ratio:.1f}", name, at, cell(over), f"{share:.0%}")
        for ratio, name, at, over, share in sorted(found, key=operator.itemgetter(0))
    ]
    late = [(math.log(ratio), 100 * share) for ratio, _, at, _, share in found if at == "late"]
    fit = scipy.stats.linregress(*zip(*late, strict=True))
    heads = ("ratio", "row", "checkpoint", "`paper` over `control`, nats", "of the gap")
    text = (
        f"Of the {len(late)} late checkpoints the share of the gap has the slope "
        f"{fit.slope:.0f} ± {fit.stderr:.0f} percentage\npoints over the logarithm of the ratio, "
        f"and the correlation {fit.rvalue:.2f}."
    )
    return f"{_markdown(heads, lines)}\n\n{text}"


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
                f"{found['validation']['mean']:.2f}", cell(found["test"]),
                "" if row is other else _paired(found["test"], other[at]["test"]), f"{after:.2f}",
                cell(found.get("gap")),
            ]  # fmt: skip
        lines.append(cells)
    return _markdown(heads, lines)


def shares_of_samples(results: Mapping) -> str:
    """Nats that a refit wins on a test example, over the share of model samples alpha."""
    rows = alphas(results)
    every = dict.fromkeys(alpha for row in rows.values() for at in row.values() for alpha, _ in at)
    lines = [
        (f"`{name}`", at, *(cell(dict(row[at]).get(alpha)) for alpha in every))
        for name, row in rows.items()
        for at in CHECKPOINTS
    ]
    return _markdown(("row", "checkpoint", *(f"{alpha:g}" for alpha in every)), lines)


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


# By page the tables on it, each between two comments with its name.
PAGES = {
    "atlas": (gaps, closed, shares, predictors, samples_win),
    "close": (shares_of_samples,),
    "cures": (costs, choices),
    "regularization": (regularization,),
}


def written(page: str, results: Mapping) -> str:
    """The text of a page with the tables of these results."""
    text = (_ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for table in PAGES[page]:
        begin, end = f"<!-- {table.__name__} -->", f"<!-- /{table.__name__} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"docs/{page}.md lacks {begin} or {end}")
        text = f"{before}{begin}\n\n{table(results)}\n\n{end}{after}"
    return text


def main():
    if len(sys.argv) > 1:
        shutil.copy(Path(sys.argv[1]) / "atlas.json", RESULTS)
    results = json.loads(RESULTS.read_text())
    for page in PAGES:
        (_ROOT / "docs" / f"{page}.md").write_text(written(page, results), encoding="utf-8")
    for draw in (figures.atlas, figures.alpha):
        png, pdf = figures.save(draw(results), RESULTS.with_name(draw.__name__))
        pdf.unlink()
        print(png)


if __name__ == "__main__":
    main()
