"""The report: one self-contained HTML page of a run.

This module computes what the page shows; `report.html.j2` holds the prose and the markup, and
`report.css` the style. Every number, the title included, is computed from `results` (the
dictionary written as `results.json`), and failed claims are shown as failed. Images are embedded;
the page loads nothing and runs no script. Jinja2 escapes every string.
"""

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from experiments.claims import sign_test_contradicts_mean
from experiments.files import write_atomically
from experiments.show import Results, tables
from experiments.show.formatting import decimals_of, duration, finite, measured, percent

__all__ = ["headline", "write_report"]

# In notes on shares of images; files of older versions have these of too few posterior samples.
_OF_SHARES = ("most images contradict the mean", "of them the BPD is lower")


def write_report(
    path: str | os.PathLike[str],
    results: Results,
    figures: Mapping[str, str | os.PathLike[str]],
    ledger: Results | None = None,
) -> None:
    """Writes the report of a run as one HTML page, atomically.

    Args:
      path: where to write.
      results: the contents of results.json.
      figures: name to PNG file. Those without a caption in the template are shown last, under
        their own names.
      ledger: the contents of ledger.json, if there is one.
    """
    pictures = {name: _picture(Path(file)) for name, file in figures.items()}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["plain"] = tables.plain
    template = environment.get_template("report.html.j2")
    html = template.render(_page(results, pictures, ledger))
    write_atomically(Path(path), html.encode())


def headline(results: Results) -> str:
    """The finding of a run in one sentence of plain text, from its last checkpoint.

    It reports a gap only if that is more than two standard errors above zero, and says so if
    self-consistent training widens the gap, or if the standard error is not known.
    """
    last = max(results["checkpoints"], key=lambda c: c["epoch"])
    at = f"At epoch {last['epoch']}"
    gap, error = (finite(last["inference_gap"][key]) for key in ("bpd", "stderr"))
    if gap is None:
        return f"{at} the gap is not a finite number."
    size = measured(gap, error, 4 if error is None else decimals_of(error, digits=1))
    if error is None:
        return f"{at} the gap is {size} BPD; its standard error is not known."
    if gap <= 2 * error:
        nothing = "no loss due to the encoder can be distinguished from zero"
        return f"{at} {nothing}: the gap is {size} BPD."
    sentence = f"{at} the encoder’s over-fitting costs {size} BPD on unseen images"
    closed, closed_error = (finite(last[f"gap_closed{end}"]) for end in ("", "_stderr"))
    if closed is None:
        return sentence + "."
    share, control = percent(abs(closed), closed_error), finite(last["control"]["bpd"])
    by_control = None if control is None else (last["test"]["bpd"] - control) / gap
    if closed >= 0:
        beside = "" if by_control is None else f", its control {percent(by_control)}"
        if sign_test_contradicts_mean(last["gain"]):
            beside += f", but on {percent(1 - last['gain']['better'])} of the images it loses"
        return f"{sentence}; self-consistent training wins back {share}{beside}."
    beside = ""
    if by_control is not None:
        word = "narrows" if by_control >= 0 else "widens"
        beside = f", its control {word} it by {percent(abs(by_control))}"
    return f"{sentence}; self-consistent training widens the gap by {share}{beside}."


def _page(
    results: Results, pictures: Mapping[str, Mapping], ledger: Results | None
) -> dict[str, Any]:
    """The variables of the template; a table is None where there is none."""
    sentence, dataset = headline(results), results["dataset"]
    measured_with = tables.measured_with(results)
    doubtful = lambda note: not measured_with and any(words in note for words in _OF_SHARES)
    version = results["environment"].get("gapjax")
    kicker = ("Generalization gap in amortized inference", dataset, version and f"gapjax {version}")
    return {
        "title": f"{dataset}: {sentence}",  # of the window
        "kicker": " · ".join(filter(None, kicker)),  # the line above the headline
        "headline": sentence,
        "pictures": pictures,  # by name; the template knows where those with a caption go
        "notes": [note for note in results["notes"] if not doubtful(note)],
        "claims": results["claims"],
        "checkpoints": tables.checkpoints_table(results),
        "num_samples": results["num_eval_samples"],  # posterior samples per image
        "unconverged": any(map(tables.unconverged, results["checkpoints"])),
        "by_image": tables.by_image_table(results),
        "measured_with": measured_with,  # shares and medians of images
        "convergence": tables.convergence_table(results),  # of optimal inference
        "averaged": tables.averaged_table(results),
        "effects": tables.effects_table(results),
        "ledger": ledger,
        "ledger_table": tables.ledger_table(ledger) if ledger else None,
        "data": _texts(results["data"]),
        "config": _texts(results["config"]),
        "environment": _texts(results["environment"]),
        "seconds": {name: duration(value) for name, value in results["seconds"].items()},
    }


def _picture(file: Path) -> dict[str, Any]:
    """A PNG file as a data URI, and its width in CSS pixels."""
    data = file.read_bytes()
    # Two pixels of the PNG for one of the page, so that it is sharp on screens of high density.
    width = int.from_bytes(data[16:20], "big") // 2
    encoded = base64.b64encode(data).decode("ascii")
    return {"uri": f"data:image/png;base64,{encoded}", "width": width}


def _texts(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Names and values as text; mappings inside are written as name.name."""
    found = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _texts(value, f"{prefix}{name}.")
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        found[f"{prefix}{name}"] = tables.DASH if text in (None, "") else str(text)
    return found
