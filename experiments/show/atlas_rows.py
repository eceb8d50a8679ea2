"""What is shown of atlas.json: which rows, and a table of them for a terminal."""

import operator
from collections.abc import Mapping

from experiments.show.formatting import text_table

CHECKPOINTS = ("early", "late")
CURES = ("control", "paper", "best", "learned", "newton", "optimal")
_REGULARIZERS = ("noise", "codes", "norm")  # in the names of rows


def shown(results: Mapping) -> list[Mapping]:
    """The rows with a gap, but for those whose training is regularized or another row's."""
    rows = (row for row in results["rows"] if row["gap"] and not is_regularized(row))
    return [row for row in rows if not row["row"].endswith(("_alpha", "_recipes", "_refits"))]


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
        cells = [cell(closed.get(name), percent=True) for name in CURES]
        lines.append((row["row"], cell(row["late"]["test"]), cell(row["gap"]), *cells))
    return text_table(heads, lines, 26, 16)


def cell(value: Mapping | None, *, percent: bool = False) -> str:
    """A mean ± its standard error; a dash where there is none."""
    if value is None:
        return "–"
    form = "{:.0%} ± {:.0%}" if percent else "{:.2f} ± {:.2f}"
    return form.format(value["mean"], value["stderr"])
