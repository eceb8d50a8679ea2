"""The report: one self-contained HTML page of a run.

This module computes what the page shows; `report.html.j2` holds the prose and the markup, and
`report.css` the style. Every number, the title included, is computed from `results` (the
dictionary written as `results.json`), and failed claims are shown as failed. Images are embedded;
the page loads nothing and runs no script. Jinja2 escapes every string.
"""

import base64
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from experiments.claims import sign_test_contradicts_mean
from experiments.files import write_atomically
from experiments.show import Results, tables
from experiments.show.formatting import decimals_of, duration, finite, measured, percent
from experiments.show.tables import Table

__all__ = ["headline", "write_report"]

# Added to the value of a flag in the configuration, unless that is zero.
_CONFIG_NOTES: Mapping[str, str] = {
    "uniform_weight": "the likelihood of a grey pixel is a mixture of a uniform distribution over "
    "all grey levels, with this weight, and the discretized logistic with the rest"
}

_OF_SHARES = ("most images contradict the mean", "of them the BPD is lower")


class Picture(NamedTuple):
    """An embedded image."""

    uri: str  # the PNG file as a data URI
    width: int  # in CSS pixels


class Claim(NamedTuple):
    """A claim and its verdict, as text but for `holds`, which is None where it was not judged."""

    claim: str
    detail: str
    value: str
    threshold: str
    holds: bool | None


class Pair(NamedTuple):
    """A name, its value and a note on it."""

    name: str
    value: str
    note: str = ""


class Ledger(NamedTuple):
    """The section of the ledger."""

    table: Table
    counts: tuple[str, ...]  # what was measured, e.g. "300 of 360 test images", for either set
    seed: str  # of the choice of these images
    notes: tuple[str, ...]


def write_report(
    path: str | os.PathLike[str],
    results: Results,
    figures: Mapping[str, str | os.PathLike[str] | None],
    ledger: Results | None = None,
) -> None:
    """Writes the report of a run as one HTML page, atomically.

    Args:
      path: where to write.
      results: the contents of results.json; without a part of them the page lacks that part.
      figures: name to PNG file. Those without a caption in the template are shown last, under
        their own names. A figure that is None is left out.
      ledger: the contents of ledger.json, if there is one.
    """
    pictures = {name: _picture(Path(file)) for name, file in figures.items() if file is not None}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    template = environment.get_template("report.html.j2")
    html = template.render(_page(results, pictures, ledger))
    write_atomically(Path(path), html.encode())


def headline(results: Results) -> str:
    """The finding of a run in one sentence of plain text, from its last checkpoint.

    It reports a gap only if that is more than two standard errors above zero, and says so if
    self-consistent training widens the gap, or if the standard error is not known.
    """
    if not results.get("checkpoints"):
        return "No checkpoint has been evaluated yet."
    last = max(results["checkpoints"], key=lambda c: c["epoch"])
    gap, error = finite(last["inference_gap"]["bpd"]), finite(last["inference_gap"].get("stderr"))
    if gap is None:
        return f"At epoch {last['epoch']} the gap is not a finite number."
    size = measured(gap, error, None if error is None else decimals_of(error, digits=1))
    if "stderr" in last["inference_gap"] and error is None:
        return f"At epoch {last['epoch']} the gap is {size} BPD; its standard error is not known."
    if gap <= 2 * (error or 0.0):
        return (
            f"At epoch {last['epoch']} no loss due to the encoder can be distinguished from "
            f"zero: the gap is {size} BPD."
        )
    sentence = (
        f"At epoch {last['epoch']} the encoder’s over-fitting costs {size} BPD on unseen images"
    )
    closed = finite(last.get("gap_closed"))
    if closed is None:
        return sentence + "."
    share = percent(abs(closed), finite(last.get("gap_closed_stderr")))
    test, control = finite(last["test"]["bpd"]), finite((last.get("control") or {}).get("bpd"))
    known = test is not None and control is not None
    by_control = (test - control) / gap if known else 0.0
    if closed >= 0:
        beside = f", its control {percent(by_control)}" if known else ""
        if sign_test_contradicts_mean(last.get("gain") or {}):
            beside += f", but on {percent(1 - last['gain']['better'])} of the images it loses"
        return f"{sentence}; self-consistent training wins back {share}{beside}."
    word = "narrows" if by_control >= 0 else "widens"
    beside = f", its control {word} it by {percent(abs(by_control))}" if known else ""
    return f"{sentence}; self-consistent training widens the gap by {share}{beside}."


def _page(
    results: Results, pictures: Mapping[str, Picture], ledger: Results | None
) -> dict[str, Any]:
    """The variables of the template; a table is None, and a sequence empty, where there is none."""
    sentence = headline(results)
    dataset = str(results.get("dataset") or results.get("preset") or "")
    version = (results.get("environment") or {}).get("gapjax")
    kicker = (
        "Generalization gap in amortized inference", dataset, f"gapjax {version}" if version else ""
    )  # fmt: skip
    samples = results.get("num_eval_samples")
    seconds = {name: duration(value) for name, value in (results.get("seconds") or {}).items()}
    return {
        "title": f"{dataset}: {sentence}" if dataset else sentence,  # of the window
        "kicker": " · ".join(word for word in kicker if word),  # the line above the headline
        "headline": sentence,
        "pictures": pictures,  # by name; the template knows where those with a caption go
        "notes": _notes(results),
        "claims": [_claim(claim) for claim in results.get("claims") or ()],
        "checkpoints": tables.checkpoints_table(results),
        "num_samples": str(samples) if samples else None,  # posterior samples per image
        "unconverged": any(tables.unconverged(c) for c in results.get("checkpoints") or ()),
        "by_image": tables.by_image_table(results),
        "measured_with": tables.measured_with(results),  # shares and medians of images
        "convergence": tables.convergence_table(results),  # of optimal inference
        "averaged": tables.averaged_table(results),
        "effects": tables.effects_table(results),
        "ledger": _ledger(ledger) if ledger and ledger.get("checkpoints") else None,
        "data": _pairs(results.get("data")),
        "config": _pairs(results.get("config"), _CONFIG_NOTES),
        "environment": _pairs(results.get("environment")),
        "seconds": _pairs(seconds),
    }


def _notes(results: Results) -> list[str]:
    """The notes of a run, without those on shares of too few posterior samples (older versions)."""
    notes = [str(note) for note in results.get("notes") or ()]
    known = tables.measured_with(results)
    return [note for note in notes if known or not any(words in note for words in _OF_SHARES)]


def _picture(file: Path) -> Picture:
    data = file.read_bytes()
    # Two pixels of the PNG for one of the page, so that it is sharp on screens of high density.
    width = int.from_bytes(data[16:20], "big") // 2
    return Picture(f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}", width)


def _claim(claim: Mapping[str, Any]) -> Claim:
    return Claim(
        claim=str(claim.get("claim")), detail=str(claim.get("detail") or ""),
        value=tables.plain(claim.get("value")), threshold=tables.plain(claim.get("threshold")),
        holds=None if claim.get("holds") is None else claim["holds"] is True,
    )  # fmt: skip


def _ledger(ledger: Results) -> Ledger:
    last = ledger["checkpoints"][-1]
    counts = tuple(
        f"{last[name]['num_images']:,} of {last[name]['num_available']:,} {name} images"
        for name in ("train", "test")
    )
    notes = tuple(str(note) for note in ledger.get("notes") or ())
    return Ledger(tables.ledger_table(ledger), counts, str(ledger.get("subset_seed")), notes)


def _pairs(
    values: Mapping[str, Any] | None, notes: Mapping[str, str] | None = None
) -> tuple[Pair, ...]:
    """Names and values as text; mappings inside are written as name.name."""
    return tuple(
        Pair(name, _text(value), (notes or {}).get(name, "") if value else "")
        for name, value in _flat(values or {})
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: Any) -> str:
    if value is None or value == "":
        return tables.DASH
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) or tables.DASH
    return str(value)
