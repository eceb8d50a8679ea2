"""The tables of the report page: from results to cells of text. `report.html.j2` draws them.

To add a column, add its key and its heading to the mapping of its table, `ABSOLUTE`, `PAIRED`,
`AVERAGED` or `OF_ENCODER`.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.effects import COMPARED
from experiments.show import Results
from experiments.show.formatting import BESIDE, decimals_of, finite, measured, percent, signed

DASH = "–"


class Cell(NamedTuple):
    """One cell of a table."""

    text: str  # the value, or a dash if there is none
    error: str = ""  # the standard error with its ± sign; shown in grey
    mark: str = ""  # of a footnote
    kind: str = ""  # CSS classes


class Head(NamedTuple):
    """One cell of a table's heading."""

    title: str = ""
    note: str = ""  # small print below the title
    kind: str = ""  # CSS classes; "start" draws a line to the left
    span: int = 1  # how many columns it covers


class Row(NamedTuple):
    """One row of a table, with its CSS classes."""

    cells: Sequence[Cell]
    kind: str = ""


class Table(NamedTuple):
    """A table: rows of headings, rows of cells, and its CSS classes."""

    heads: Sequence[Sequence[Head]]
    rows: Sequence[Row]
    kind: str = ""


ABSOLUTE: Mapping[str, Head] = {
    "train": Head("train", kind="start"),
    "test": Head("test, amortized", "encoder as trained"),
    "control": Head("control", "α = 0, test"),
    "self_consistent": Head("self-consistent", "test"),
    "optimal": Head("optimal", "fitted on the test set"),
}
PAIRED: Mapping[str, Head] = {
    "inference_gap": Head("gap", "test − optimal", "start"),
    "gain": Head("gain", "test − self-consistent"),
    "gain_over_control": Head("gain over control", "control − self-consistent"),
}
AVERAGED: Mapping[str, Head] = {
    "control_averaged": Head("control", "α = 0, averaged"),
    "self_consistent_averaged": Head("self-consistent", "averaged"),
    "gain_averaged": Head("gain", "test − self-consistent"),
    "gain_over_control": Head("gain over control", "last weights"),
    "gain_over_control_averaged": Head("gain over control", "averaged weights"),
}
# Of the ledger, one for each encoder.
OF_ENCODER: Mapping[str, Head] = {
    "bound_gap": Head("bound gap", "log p − ELBO"),
    "amortization_gap": Head("amortization gap", "at least; on test: eq. 11 by q*"),
    "inference_gap_by_refit": Head("inference gap", "eq. 11 by the refit"),
    "capacity_gap": Head("capacity gap", "at least: ELBO, q* − refit"),
}
_BY_IMAGE = {**PAIRED, "gain_over_control_averaged": AVERAGED["gain_over_control_averaged"]}
_OF_IMAGES = (Head("median", "its bias", kind="start"), Head("images improved", "95 %, bias"))
_KINDS: Mapping[str, str] = {"model": "model samples", "train": "training", "test": "test"}


def unconverged(checkpoint: Results) -> bool:
    """Whether optimal inference is known to have ended before it converged."""
    return _optimal(checkpoint).get("converged") is False


def checkpoints_table(results: Results) -> Table:
    """BPD of every checkpoint by each encoder, and the paired differences."""
    checkpoints, alpha = results["checkpoints"], results["config"]["alpha"]
    columns = {
        **_columns(checkpoints, ABSOLUTE, digits=1, by=min),
        **_columns(checkpoints, PAIRED, digits=2),
    }
    own = ABSOLUTE["self_consistent"]._replace(note=f"α = {alpha}, test")
    heads = {**ABSOLUTE, "self_consistent": own, **PAIRED}
    tests = [finite(checkpoint["test"]["bpd"]) for checkpoint in checkpoints]
    lowest = min((bpd for bpd in tests if bpd is not None), default=math.nan)
    rows = []
    for i, checkpoint in enumerate(checkpoints):
        marked = ("optimal", "inference_gap") if unconverged(checkpoint) else ()
        cells = [Cell(str(checkpoint["epoch"]))]
        for key, head in heads.items():
            mark = "†" if key in marked else ""
            cells.append(columns[key][i]._replace(kind=head.kind, mark=mark))
        closed, error = (finite(checkpoint[f"gap_closed{end}"]) for end in ("", "_stderr"))
        cells.append(Cell(DASH) if closed is None else _split(percent(closed, error)))
        rows.append(Row(cells, "lowest" if tests[i] == lowest else ""))
    groups = [
        Head(),
        Head("BPD, lower is better", kind="group start", span=len(ABSOLUTE)),
        Head("paired differences of test BPD", kind="group start", span=len(PAIRED) + 1),
    ]
    titles = [Head("epoch"), *heads.values(), Head("gap closed", "gain / gap")]
    return Table([groups, titles], rows, "wide")


def by_image_table(results: Results) -> Table | None:
    """Of each paired difference the median, the images improved and the effective number."""
    checkpoints = results["checkpoints"]
    is_known = lambda key: all(row.get(key, {}).get("num_effective") for row in checkpoints)
    keys = list(filter(is_known, _BY_IMAGE))
    if not keys:
        return None
    of_images = _OF_IMAGES if measured_with(results) else ()
    effective = Head("effective images", kind="" if of_images else "start")
    titles = [*of_images, effective]
    groups = [_BY_IMAGE[key]._replace(kind="group start", span=len(titles)) for key in keys]
    rows = []
    for row in checkpoints:
        cells = [Cell(str(row["epoch"]))]
        for difference in (row[key] for key in keys):
            cells += _by_image(difference, "start") if of_images else []
            cells.append(Cell(plain(round(difference["num_effective"])), kind=effective.kind))
        rows.append(Row(cells))
    return Table([[Head(), *groups], [Head("epoch"), *titles * len(keys)]], rows)


def measured_with(results: Results) -> Mapping[str, Any] | None:
    """How many images and posterior samples shares and medians are of, or None."""
    last = results["checkpoints"][-1]
    effects = last.get("effects", {}).values()
    differences = [last.get(key, {}) for key in _BY_IMAGE]
    differences += [effect[refit] for effect in effects for refit in COMPARED]
    return next((each["by_image"] for each in differences if "by_image" in each), None)


def averaged_table(results: Results) -> Table | None:
    """BPD of the refits with averaged weights, and the gains over the control of both."""
    checkpoints = [c for c in results["checkpoints"] if "gain_averaged" in c]
    if not checkpoints:
        return None
    columns = _columns(checkpoints, AVERAGED, digits=2)
    rows = [
        Row([Cell(str(checkpoint["epoch"])), *(column[i] for column in columns.values())])
        for i, checkpoint in enumerate(checkpoints)
    ]
    return Table([[Head("epoch"), *AVERAGED.values()]], rows)


def convergence_table(results: Results) -> Table | None:
    """How optimal inference ended at every checkpoint."""
    rows = []
    for checkpoint in results["checkpoints"]:
        if refit := _optimal(checkpoint):
            ended = {True: "yes", False: "no"}[refit["converged"]]
            values = plain(refit["steps"]), ended, plain(refit["last_improvement"])
            rows.append(Row([Cell(text) for text in (str(checkpoint["epoch"]), *values)]))
    if not rows:
        return None
    titles = ("epoch", "steps", "converged", "last improvement, BPD")
    return Table([[Head(title) for title in titles]], rows)


def effects_table(results: Results) -> Table | None:
    """What the refits gain on each kind of image at every checkpoint."""
    of_images = _OF_IMAGES if measured_with(results) else ()
    rows = []
    for checkpoint in results["checkpoints"]:
        for kind, effect in checkpoint.get("effects", {}).items():
            norms, effective = effect.get("gradient"), DASH
            if norms:
                effective = f"{norms['num_effective']:,.0f} of {norms['num_examples']:,}"
            cells = [Cell(str(checkpoint["epoch"])), Cell(_KINDS[kind], kind="text")]
            cells.append(_cell(effect["as_trained"], 3))
            for refit in COMPARED:
                cells.append(_cell(effect[refit], 4)._replace(kind="start"))
                cells += _by_image(effect[refit]) if of_images else []
            rows.append(Row([*cells, Cell(effective, kind="start")]))
    if not rows:
        return None
    span = 1 + len(of_images)
    of_refits = [Head(ABSOLUTE[refit].title, kind="group start", span=span) for refit in COMPARED]
    groups = [Head(span=3), *of_refits, Head(kind="start")]
    titles = [
        Head("epoch"), Head("images", kind="text"), Head("as trained", "BPD"),
        *[Head("mean", kind="start"), *(head._replace(kind="") for head in of_images)]
        * len(COMPARED),
        Head("effective images", "gradient, encoder as trained", "start"),
    ]  # fmt: skip
    return Table([groups, titles], rows)


def ledger_table(ledger: Results) -> Table:
    """The estimates of ledger.json for every checkpoint, set of images and encoder, in nats."""
    rows = []
    for checkpoint, images in itertools.product(ledger["checkpoints"], ("train", "test")):
        account, epoch = checkpoint[images], Cell(str(checkpoint["epoch"]))
        of_all = [account[key] for key in ("log_prob", "optimal", "approximation_gap")]
        for encoder, own in account["encoders"].items():
            names = [Cell(name, kind="text") for name in (images, encoder.replace("_", " "))]
            of_encoder = [own[key] for key in ("elbo", *OF_ENCODER)]
            estimates = map(_nats, (checkpoint["model_gap"], *of_all, *of_encoder))
            rows.append(Row([epoch, *names, *estimates]))
    titles = [
        Head("epoch"), Head("images", kind="text"), Head("encoder", kind="text"),
        Head("model gap", "log p, train − test"), Head("log p(x)", "from below"),
        Head("ELBO, q*", "from below: best q found"),
        Head("approximation gap", "log p − ELBO, q*; both from below"),
        Head("ELBO"), *OF_ENCODER.values(),
    ]  # fmt: skip
    return Table([titles], rows, "wide")


def plain(value: Any) -> str:
    """A single value as text: numbers short, None as a dash."""
    if value is None:
        return DASH
    if isinstance(value, float) and finite(value) is not None:
        return f"{value:.3g}".replace("-", "−")
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}".replace("-", "−")
    return str(value)


def _optimal(checkpoint: Results) -> Mapping[str, Any]:
    """What optimal inference did; empty where that is not known."""
    return checkpoint.get("refits", {}).get("optimal", {})


def _columns(
    checkpoints: Sequence[Results],
    keys: Iterable[str],
    digits: int,
    by: Callable = statistics.median,
) -> dict[str, list[Cell]]:
    """Columns of {"bpd", "stderr"}, all with the same number of decimals.

    `by` chooses from the columns' median standard errors the one of which `digits` are shown.
    """
    columns = {key: [row.get(key, {}) for row in checkpoints] for key in keys}
    errors = [
        [estimate["stderr"] for estimate in column if finite(estimate.get("stderr"))]
        for column in columns.values()
    ]
    medians = [statistics.median(known) for known in errors if known]
    decimals = decimals_of(by(medians), digits) if medians else 4
    return {
        key: [_cell(estimate, decimals) for estimate in column] for key, column in columns.items()
    }


def _cell(estimate: Mapping[str, Any], decimals: int) -> Cell:
    bpd, error = finite(estimate.get("bpd")), finite(estimate.get("stderr"))
    return Cell(DASH) if bpd is None else _split(measured(bpd, error, decimals))


def _by_image(difference: Mapping[str, Any], kind: str = "") -> list[Cell]:
    """The median of a paired difference and the share of images that improve, with their biases.

    Dashes where their posterior samples were too few, as in files of older versions.
    """
    known = difference.get("by_image")
    if not known:
        return [Cell(DASH, kind=kind), Cell(DASH)]
    median_bias = signed(known["median_bias"], 4, plus=True)
    better_bias = signed(100 * known["better_bias"], 1, plus=True)
    between = ""
    if None not in known["better_interval"]:
        between = " {} to {},".format(*(signed(100 * end, 1) for end in known["better_interval"]))
    better = percent(difference["better"], decimals=1)
    return [
        Cell(signed(difference["median"], 4), f" {median_bias}", kind=kind),
        Cell(better, f"{between} {better_bias}"),
    ]


def _nats(estimate: Mapping[str, Any] | None) -> Cell:
    """An estimate of the ledger, marked if it was fitted on the test set."""
    if estimate is None or finite(estimate["nats"]) is None:
        return Cell(DASH)
    cell = _split(measured(estimate["nats"], finite(estimate["stderr"]), 3))
    return cell._replace(mark="*" if estimate["fitted_on_test"] else "")


def _split(text: str) -> Cell:
    """A cell of text by `measured` or `percent`, with the standard error apart."""
    number, sign, error = text.partition(BESIDE)
    return Cell(number, sign + error)
