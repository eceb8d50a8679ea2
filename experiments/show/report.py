"""The report: one self-contained HTML page of a run, the thing that a person opens first.

Everything that is said on the page is computed from `results` (the dictionary written as
`results.json`), the title included; a claim that failed is shown as failed. Images are embedded,
nothing is loaded from elsewhere, and no script runs.
"""

from __future__ import annotations

import base64
import html
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from experiments.effects import COMPARED
from experiments.files import write_atomically
from experiments.show.formatting import (
    BESIDE,
    decimals_of,
    duration,
    finite,
    measured,
    percent,
    signed,
)
from gapjax.results.claims import against_most

__all__ = ["headline", "write_report"]

Results = Mapping[str, Any]

_DASH = "–"

# name: (title, what a reader should see)
_FIGURES: Mapping[str, tuple[str, str]] = {
    "overview": (
        "The three figures of the paper",
        "Left (1a): train and test BPD of every checkpoint. Middle (1b): the test curve beside the "
        "one after optimal inference; the area between them is lost by the encoder, not by the "
        "decoder. Right (2): how much of it self-consistent training wins back without seeing test "
        "data, beside its control. Optimal inference was fitted on the test set: it measures the "
        "gap and is not a method to use.",
    ),
    "figure1a": ("Figure 1a", "Train and test BPD of every checkpoint."),
    "figure1b": (
        "Figure 1b",
        "Test BPD beside that after optimal inference, which was fitted on the test set.",
    ),
    "figure2": (
        "Figure 2",
        "Test BPD by amortized, control, self-consistent and optimal inference; the last was "
        "fitted on the test set.",
    ),
    "refit_curves": (
        "Test BPD over the refits",
        "What each epoch of a refit did to the test BPD. The control goes on training the encoder "
        "on training data alone; only what lies below it is owed to the samples of the model. "
        "Optimal inference was fitted on the test set.",
    ),
    "ledger": (
        "Where every nat goes",
        "A bar is the log-likelihood of training images minus the ELBO of test images with the "
        "encoder as trained, in nats per image; its parts say who loses it. Parts marked * were "
        "measured with posteriors or an encoder fitted on the test set.",
    ),
    "costliest": (
        "The test images that cost the most",
        "Those of the highest BPD at the last checkpoint, with their BPD as trained, and the "
        "number of pixels that hold 90 % of the cost. Below, what every pixel costs by each "
        "encoder, as dark as it is costly, on the scale of the costliest as trained. The encoder "
        "of optimal inference was fitted on the test set.",
    ),
    "effects": (
        "Won on each kind of image",
        "BPD as trained minus BPD after the refit, paired. The refits are made of training images "
        "(the control) or of these and samples of the model (self-consistent); the samples shown "
        "here are fresh ones, and test images are seen by neither.",
    ),
    "samples": ("Samples", "Images drawn from the model of the last checkpoint."),
    "reconstructions": (
        "Reconstructions",
        "Test images, and what the decoder makes of the latent codes that each encoder gives "
        "them. The encoder of optimal inference was fitted on the test set.",
    ),
}
_SINGLE_FIGURES = ("figure1a", "figure1b", "figure2")

# key: (heading, note below it)
_ABSOLUTE: Mapping[str, tuple[str, str]] = {
    "train": ("train", ""),
    "test": ("test, amortized", "encoder as trained"),
    "control": ("control", "α = 0, test"),
    "self_consistent": ("self-consistent", "test"),
    "optimal": ("optimal", "fitted on the test set"),
}
_PAIRED: Mapping[str, tuple[str, str]] = {
    "inference_gap": ("gap", "test − optimal"),
    "gain": ("gain", "test − self-consistent"),
    "gain_over_control": ("gain over control", "control − self-consistent"),
}

_AVERAGED: Mapping[str, tuple[str, str]] = {
    "control_averaged": ("control", "α = 0, averaged"),
    "self_consistent_averaged": ("self-consistent", "averaged"),
    "gain_averaged": ("gain", "test − self-consistent"),
    "gain_over_control": ("gain over control", "last weights"),
    "gain_over_control_averaged": ("gain over control", "averaged weights"),
}

# Paired differences, looked at image by image: key: (heading, note below it)
_BY_IMAGE: Mapping[str, tuple[str, str]] = {
    **_PAIRED,
    "gain_over_control_averaged": _AVERAGED["gain_over_control_averaged"],
}

# Of the effects: kind of image: in words
_KINDS: Mapping[str, str] = {
    "model": "model samples",
    "train": "training",
    "test": "test",
}

# Of the ledger: key: (heading, note below it)
_OF_ENCODER: Mapping[str, tuple[str, str]] = {
    "bound_gap": ("bound gap", "log p − ELBO"),
    "amortization_gap": ("amortization gap", "on test: eq. 11 by q*"),
    "inference_gap_by_refit": ("inference gap", "eq. 11 by the refit"),
    "capacity_gap": ("capacity gap", "ELBO, q* − refit"),
}

_DEFINITIONS: Sequence[tuple[str, str]] = (
    (
        "Bits per dimension (BPD)",
        "The negative evidence lower bound in bits, divided by the number of pixels: what one "
        "pixel costs to describe with the model. Lower is better.",
    ),
    (
        "Amortized inference",
        "One network, the encoder, looks at an image and gives the approximate posterior over its "
        "latent code. It is fitted to the training images and then used on all others.",
    ),
    (
        "Optimal inference",
        "The decoder frozen, the encoder trained further on the test set itself. Not a method to "
        "use, as it was fitted on the test set: it is a ruler. What it gains, the encoder as "
        "trained had lost.",
    ),
    (
        "Inference generalization gap",
        "Test BPD with the encoder as trained, minus test BPD after optimal inference (equation "
        "11): the part of the loss on unseen data that is owed to the encoder.",
    ),
    (
        "Self-consistent training",
        "The decoder frozen, the encoder trained further on images of which a share α was drawn "
        "from the model itself and the rest from the training set. It never sees test data.",
    ),
    (
        "Control",
        "The same refit with α = 0, so on training data alone. Further training changes the test "
        "BPD by itself; only the difference from the control is what the model's samples did.",
    ),
    ("Gap closed", "The gain of self-consistent training as a share of the gap."),
    (
        "±",
        "One standard error over images. Differences are paired, taken image by image with the "
        "same noise, and so are far more certain than the errors of the two numbers suggest.",
    ),
)

_CITATION = """@inproceedings{zhang2022generalization,
  title     = {Generalization Gap in Amortized Inference},
  author    = {Zhang, Mingtian and Hayes, Peter and Barber, David},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022},
  note      = {arXiv:2205.11640}
}"""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$css
</style>
</head>
<body>
<header>
<p class="kicker">$kicker</p>
<h1>$headline</h1>
</header>
<main>
$body
</main>
</body>
</html>
""")

_CSS = """
:root { color-scheme: light dark; --paper: #fff; --text: #222; --muted: #666; --line: #e2e2e2;
  --soft: #f6f6f4; --link: #0067a5; --good: #00664b; --good-soft: #e0f2ec; --bad: #a32d00;
  --bad-soft: #fde8df; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --text: #e6e6e3; --muted: #a2a4a6;
  --line: #33373b; --soft: #1f2226; --link: #6db6e8; --good: #7fd6b8; --good-soft: #12352b;
  --bad: #ffa582; --bad-soft: #43200f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 74rem; background: var(--paper);
  color: var(--text); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "DejaVu Sans", sans-serif; }
header { max-width: 56rem; }
.kicker { margin: 0 0 .5rem; color: var(--muted); }
h1 { margin: 0 0 1.75rem; font-size: 1.7rem; line-height: 1.3; font-weight: 650;
  text-wrap: balance; }
h2 { margin: 3rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line);
  font-size: 1.2rem; font-weight: 650; }
h3 { margin: 1.75rem 0 .5rem; font-size: 1rem; font-weight: 650; }
p { margin: .5rem 0; max-width: 56rem; }
a { color: var(--link); }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .86em; }
pre { padding: 1rem; overflow-x: auto; background: var(--soft); border-radius: 6px; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; padding: .75rem; background: #fff;
  border: 1px solid var(--line); border-radius: 6px; }
figcaption, .note { margin: .6rem 0 0; max-width: 56rem; color: var(--muted); font-size: .9rem; }
figcaption b { color: var(--text); font-weight: 600; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--link); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
.wide { width: 100%; font-size: .79rem; }
th, td { padding: .38rem .5rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: baseline; white-space: nowrap; }
.wide th, .wide td { padding: .38rem .3rem; }
th { font-weight: 600; vertical-align: bottom; }
thead th { white-space: normal; }
thead small { display: block; color: var(--muted); font-weight: 400; line-height: 1.3; }
th.group { text-align: left; color: var(--muted); font-weight: 400; }
td.text, th.text { text-align: left; white-space: normal; }
td.claim { min-width: 16rem; }
td small { display: block; color: var(--muted); font-size: .85rem; }
td .mark { position: absolute; padding-left: .1rem; }
.error { color: var(--muted); }
.start { border-left: 1px solid var(--line); }
tr.lowest td { background: var(--soft); }
.badge { display: inline-block; padding: .05rem .6rem; border-radius: 1rem; font-size: .82rem;
  font-weight: 600; white-space: nowrap; }
.holds { color: var(--good); background: var(--good-soft); }
.fails { color: var(--bad); background: var(--bad-soft); }
dl.pairs { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.5rem; margin: 0;
  font-size: .9rem; }
dl.pairs dt { color: var(--muted); }
dl.pairs dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
dl.terms dt { margin-top: .75rem; font-weight: 600; }
dl.terms dd { margin: 0; max-width: 56rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
  gap: 0 3rem; }
@media print {
  :root { color-scheme: light; --paper: #fff; --text: #000; --muted: #444; --line: #ccc;
    --soft: #f4f4f4; --good: #00664b; --good-soft: #fff; --bad: #a32d00; --bad-soft: #fff; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  figure, tr, dl.pairs { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  figure img { border: 0; padding: 0; }
  .badge { border: 1px solid currentColor; }
  .scroll { overflow: visible; }
  table.wide { font-size: 7pt; }
  table.wide th, table.wide td { padding: .2rem .3rem; }
  summary { display: none; }
}
""".strip()


def write_report(
    path: str | os.PathLike[str],
    results: Results,
    figures: Mapping[str, str | os.PathLike[str] | None],
    ledger: Results | None = None,
) -> None:
    """Writes the report of a run as one HTML page, whole or not at all.

    Args:
      path: where to write.
      results: what the main program writes as results.json.
      figures: name to PNG file. Those that the page has a place for are "overview", "figure1a",
        "figure1b", "figure2", "refit_curves", "effects", "ledger", "costliest", "samples" and
        "reconstructions"; others follow at the end under their own names. Names that are missing
        or None are left out.
      ledger: what the ledger program writes as ledger.json, where there is one.

    Raises:
      OSError: a figure could not be read or the page not written; an older page is still there.
    """
    shown = {name: Path(file) for name, file in figures.items() if file is not None}
    page = _page(results, shown, ledger)
    write_atomically(Path(path), page.encode())


def headline(results: Results) -> str:
    """The finding of a run in one sentence of plain text, from its last checkpoint.

    Args:
      results: what the main program writes as results.json.

    Returns:
      A sentence. A gap within two standard errors of zero is not called one, and a refit that
      makes things worse is said to.
    """
    if not results.get("checkpoints"):
        return "No checkpoint has been evaluated yet."
    last = max(results["checkpoints"], key=lambda c: c["epoch"])
    gap, error = finite(last["inference_gap"]["bpd"]), finite(last["inference_gap"].get("stderr"))
    if gap is None:
        return f"At epoch {last['epoch']} the gap is not a finite number."
    size = measured(gap, error, None if error is None else decimals_of(error, digits=1))
    if gap <= 2 * (error or 0.0):
        return (
            f"At epoch {last['epoch']} no loss that is owed to the encoder can be told from "
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
        if against_most(last.get("gain") or {}):
            beside += f", but on {percent(1 - last['gain']['better'])} of the images it loses"
        return f"{sentence}; self-consistent training wins back {share}{beside}."
    word = "narrows" if by_control >= 0 else "widens"
    beside = f", its control {word} it by {percent(abs(by_control))}" if known else ""
    return f"{sentence}; self-consistent training widens the gap by {share}{beside}."


def _page(results: Results, figures: Mapping[str, Path], ledger: Results | None = None) -> str:
    sentence = headline(results)
    dataset = str(results.get("dataset") or results.get("preset") or "")
    environment = results.get("environment") or {}
    kicker = [
        "Generalization gap in amortized inference",
        dataset,
        f"gapjax {environment['gapjax']}" if environment.get("gapjax") else "",
    ]
    sections = [
        _figure(figures, "overview"),
        _single_figures(figures),
        _notes(results),
        _claims(results),
        _checkpoints(results),
        _by_image(results),
        _figure(figures, "costliest"),
        _refits(results, figures),
        _effects(results, figures),
        _ledger(ledger, figures),
        _pictures(figures),
        _pairs("Data", results.get("data")),
        '<div class="columns">',
        _pairs("Configuration", results.get("config")),
        "<div>",
        _pairs("Environment", results.get("environment")),
        _seconds(results.get("seconds")),
        "</div>",
        "</div>",
        _terms(),
        _cite(),
    ]
    return _PAGE.substitute(
        title=_escape(f"{dataset}: {sentence}" if dataset else sentence),
        kicker=_escape(" · ".join(word for word in kicker if word)),
        headline=_escape(sentence),
        css=_CSS,
        body="\n".join(section for section in sections if section),
    )


def _figure(figures: Mapping[str, Path], name: str) -> str:
    if name not in figures:
        return ""
    title, caption = _FIGURES.get(name, (name.replace("_", " "), ""))
    data = figures[name].read_bytes()
    # Two pixels of the file to one of the page: sharp on every screen, and all texts of one size.
    width = int.from_bytes(data[16:20], "big") // 2
    encoded = base64.b64encode(data).decode("ascii")
    alt = _escape(f"{title}. {caption}")
    image = f'<img width="{width}" src="data:image/png;base64,{encoded}" alt="{alt}">'
    words = f"<b>{_escape(title)}.</b> {_escape(caption)}"
    return f"<figure>\n{image}\n<figcaption>{words}</figcaption>\n</figure>"


def _single_figures(figures: Mapping[str, Path]) -> str:
    """Figures 1a, 1b and 2: folded away where the overview has shown them already."""
    shown = "\n".join(_figure(figures, name) for name in _SINGLE_FIGURES if name in figures)
    if not shown or "overview" not in figures:
        return shown
    return f"<details>\n<summary>Each figure by itself</summary>\n{shown}\n</details>"


def _notes(results: Results) -> str:
    return "\n".join(f'<p class="note">{_escape(note)}</p>' for note in results.get("notes") or ())


def _claims(results: Results) -> str:
    claims = results.get("claims") or ()
    if not claims:
        return ""
    rows = []
    for claim in claims:
        holds = claim.get("holds") is True
        badge = ("holds", "✓ holds") if holds else ("fails", "✗ does not hold")
        detail = f"<small>{_escape(claim['detail'])}</small>" if claim.get("detail") else ""
        rows.append(
            "<tr>"
            f'<td class="text"><span class="badge {badge[0]}">{badge[1]}</span></td>'
            f'<td class="text claim">{_escape(claim.get("claim"))}{detail}</td>'
            f"<td>{_plain(claim.get('value'))}</td><td>{_plain(claim.get('threshold'))}</td>"
            "</tr>"
        )
    count = sum(claim.get("holds") is True for claim in claims)
    head = (
        '<th class="text">verdict</th><th class="text">claim</th><th>value</th><th>threshold</th>'
    )
    return (
        f"<h2>Claims: {count} of {len(claims)} hold</h2>\n"
        "<p>Each is computed from the numbers of this run, and may fail.</p>\n"
        + _table([f"<tr>{head}</tr>"], rows)
    )


def _checkpoints(results: Results) -> str:
    checkpoints = results.get("checkpoints") or ()
    if not checkpoints:
        return ""
    columns = {
        **_columns(checkpoints, _ABSOLUTE, digits=1, by=min),
        **_columns(checkpoints, _PAIRED, digits=2),
    }
    tests = [finite((c.get("test") or {}).get("bpd")) for c in checkpoints]
    lowest = min((bpd for bpd in tests if bpd is not None), default=None)
    unfinished = False
    rows = []
    for i, checkpoint in enumerate(checkpoints):
        refit = (checkpoint.get("refits") or {}).get("optimal") or {}
        stopped = refit.get("converged") is False
        unfinished |= stopped
        cells = [f"<td>{_escape(checkpoint['epoch'])}</td>"]
        for key, values in columns.items():
            mark = (
                '<span class="mark">†</span>'
                if stopped and key in ("optimal", "inference_gap")
                else ""
            )
            start = ' class="start"' if key in ("train", "inference_gap") else ""
            cells.append(f"<td{start}>{values[i]}{mark}</td>")
        closed = finite(checkpoint.get("gap_closed"))
        error = finite(checkpoint.get("gap_closed_stderr"))
        share = _DASH if closed is None else _escape(percent(closed, error))
        cells.append(f"<td>{_dim_error(share)}</td>")
        mark = ' class="lowest"' if lowest is not None and tests[i] == lowest else ""
        rows.append(f"<tr{mark}>{''.join(cells)}</tr>")
    heads = ["<th>epoch</th>"]
    for key, (title, note) in {**_ABSOLUTE, **_PAIRED}.items():
        start = ' class="start"' if key in ("train", "inference_gap") else ""
        alpha = (results.get("config") or {}).get("alpha")
        if key == "self_consistent" and alpha is not None:
            note = f"α = {_escape(alpha)}, test"
        heads.append(f"<th{start}>{title}<small>{note}</small></th>")
    heads.append("<th>gap closed<small>gain / gap</small></th>")
    groups = (
        f'<tr><th></th><th class="group start" colspan="{len(_ABSOLUTE)}">BPD, lower is better'
        f'</th><th class="group start" colspan="{len(_PAIRED) + 1}">paired differences of test '
        "BPD</th></tr>"
    )
    samples = results.get("num_eval_samples")
    words = "± is one standard error over images. "
    if samples:
        words += f"Every image was evaluated with {_escape(samples)} posterior samples. "
    words += "The shaded row has the lowest test BPD. Optimal inference was fitted on the test set."
    if unfinished:
        words += " † Optimal inference had not converged here, so the gap may be larger."
    return (
        "<h2>Every checkpoint</h2>\n"
        + _table([groups, f"<tr>{''.join(heads)}</tr>"], rows, "wide")
        + f'\n<p class="note">{words}</p>'
    )


def _by_image(results: Results) -> str:
    """Medians and shares of the images: whether the means above speak for most of them."""
    known = lambda row: [key for key in _BY_IMAGE if (row.get(key) or {}).get("better") is not None]
    checkpoints = [row for row in results.get("checkpoints") or () if known(row)]
    if not checkpoints:
        return ""
    keys = [key for key in _BY_IMAGE if all(key in known(row) for row in checkpoints)]
    heads = "".join(
        f'<th class="group start" colspan="3">{_BY_IMAGE[key][0]}<small>{_BY_IMAGE[key][1]}</small>'
        "</th>"
        for key in keys
    )
    each = '<th class="start">median</th><th>better on</th><th>error rests on</th>'
    rows = []
    for row in checkpoints:
        cells = [f"<td>{_escape(row['epoch'])}</td>"]
        for difference in (row[key] for key in keys):
            cells += [
                _most(difference, ' class="start"'),
                f"<td>{_plain(round(difference['num_effective']))}</td>",
            ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        "<h3>Do these differences speak for most images?</h3>\n"
        + _table([f"<tr><th></th>{heads}</tr>", f"<tr><th>epoch</th>{each * len(keys)}</tr>"], rows)
        + '\n<p class="note">The median over images, BPD; the share of images on which what is '
        "subtracted is the better; and how many images the standard error of the mean rests on, "
        "(Σd²)²/Σd⁴ of the deviations d from the mean: a third of all where differences are "
        "normal. Where these are few, a handful of images decides the mean.</p>"
    )


def _averaged(results: Results) -> str:
    """The refits with their weights averaged, beside the last weights, which the paper uses."""
    checkpoints = [c for c in results.get("checkpoints") or () if "gain_averaged" in c]
    if not checkpoints:
        return ""
    columns = _columns(checkpoints, _AVERAGED, digits=2)
    rows = [
        f"<tr><td>{_escape(checkpoint['epoch'])}</td>"
        + "".join(f"<td>{values[i]}</td>" for values in columns.values())
        + "</tr>"
        for i, checkpoint in enumerate(checkpoints)
    ]
    heads = "".join(f"<th>{title}<small>{note}</small></th>" for title, note in _AVERAGED.values())
    return (
        "<h3>The same refits with their weights averaged</h3>\n"
        + _table([f"<tr><th>epoch</th>{heads}</tr>"], rows)
        + '\n<p class="note">Test BPD of the mean of the encoder\u2019s weights over the ends of '
        "all epochs of a refit. The last weights carry the noise of the last steps at a constant "
        "learning rate; their mean does not. It is no part of the paper\u2019s recipe.</p>"
    )


def _refits(results: Results, figures: Mapping[str, Path]) -> str:
    rows = []
    for checkpoint in results.get("checkpoints") or ():
        refit = (checkpoint.get("refits") or {}).get("optimal") or {}
        if not refit:
            continue
        converged = {True: "yes", False: "no"}.get(refit.get("converged"), _DASH)
        cells = (refit.get("steps"), converged, refit.get("last_improvement"))
        rows.append(
            f"<tr><td>{_escape(checkpoint['epoch'])}</td>"
            + "".join(f"<td>{_plain(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    parts = [_figure(figures, "refit_curves")]
    if rows:
        head = "<th>epoch</th><th>steps</th><th>converged</th><th>last improvement, BPD</th>"
        parts.append("<h3>Optimal inference (fitted on the test set): did it converge?</h3>")
        parts.append(_table([f"<tr>{head}</tr>"], rows))
    parts.append(_averaged(results))
    parts = [part for part in parts if part]
    return "\n".join(["<h2>The refits</h2>", *parts]) if parts else ""


def _effects(results: Results, figures: Mapping[str, Path]) -> str:
    """What the refits won and lost on each kind of image, at every checkpoint."""
    rows = []
    for checkpoint in results.get("checkpoints") or ():
        for kind, own in (checkpoint.get("effects") or {}).items():
            trained, pull = own["as_trained"], own.get("gradient")
            rests = f"{pull['num_effective']:,.0f} of {pull['num_examples']:,}" if pull else _DASH
            cells = [
                f'<td>{_escape(checkpoint["epoch"])}</td><td class="text">{_KINDS[kind]}</td>',
                f"<td>{_cell(trained, 3)}</td>",
                *(_won(own[refit]) for refit in COMPARED),
                f'<td class="start">{rests}</td>',
            ]
            rows.append(f"<tr>{''.join(cells)}</tr>")
    if not rows:
        return ""
    groups = "".join(
        f'<th class="group start" colspan="3">{_ABSOLUTE[refit][0]}</th>' for refit in COMPARED
    )
    each = '<th class="start">mean</th><th>median</th><th>better on</th>'
    heads = (
        '<th>epoch</th><th class="text">images</th><th>as trained<small>BPD</small></th>'
        f"{each * len(COMPARED)}"
        '<th class="start">gradient rests on<small>encoder as trained</small></th>'
    )
    groups = f'<tr><th colspan="3"></th>{groups}<th class="start"></th></tr>'
    return (
        "<h2>What the refits win, and on which images</h2>\n"
        + _figure(figures, "effects")
        + _table([groups, f"<tr>{heads}</tr>"], rows)
        + '\n<p class="note">BPD as trained minus BPD after the refit, paired: its mean, median '
        "and the share of images on which the refit is the better. The samples of the model are "
        "fresh ones, and test images are seen by neither refit. The last column says how many of "
        "the images the squared gradient of the encoder rests on: (Σg²)²/Σg⁴ of the norms g of "
        "the images’ own gradients. Where these are few, they rule the steps of a refit.</p>"
    )


def _won(difference: Mapping[str, Any]) -> str:
    """The cells of a paired difference: its mean, and what most images say."""
    return f'<td class="start">{_cell(difference, 4)}</td>{_most(difference)}'


def _most(difference: Mapping[str, Any], mark: str = "") -> str:
    """The cells of what most images say of a paired difference: median, and share of the images."""
    share = percent(difference["better"], difference["better_stderr"], decimals=1)
    median = signed(difference["median"], 4)
    return f"<td{mark}>{median}</td><td>{_dim_error(share)}</td>"


def _ledger(ledger: Results | None, figures: Mapping[str, Path]) -> str:
    """The figure of the ledger, and its numbers for every checkpoint, set and encoder."""
    if not ledger or not ledger.get("checkpoints"):
        return ""
    rows = []
    for checkpoint in ledger["checkpoints"]:
        for name in ("train", "test"):
            account = checkpoint[name]
            for encoder, entries in account["encoders"].items():
                shared = (checkpoint["model_gap"], account["log_prob"], account["optimal"])
                own = [entries[key] for key in ("elbo", *_OF_ENCODER)]
                cells = (*shared, account["approximation_gap"], *own)
                text = f'<td class="text">{_escape(encoder.replace("_", " "))}</td>'
                rows.append(
                    f'<tr><td>{_escape(checkpoint["epoch"])}</td><td class="text">{name}</td>'
                    + text + "".join(f"<td>{_nats(cell)}</td>" for cell in cells) + "</tr>"
                )  # fmt: skip
    heads = (
        "<th>epoch</th>", '<th class="text">images</th>', '<th class="text">encoder</th>',
        "<th>model gap<small>log p, train − test</small></th>", "<th>log p(x)</th>",
        "<th>ELBO, q*<small>best q per image</small></th>",
        "<th>approximation gap<small>log p − ELBO, q*</small></th>", "<th>ELBO</th>",
        *(f"<th>{title}<small>{note}</small></th>" for title, note in _OF_ENCODER.values()),
    )  # fmt: skip
    notes = "\n".join(f'<p class="note">{_escape(note)}</p>' for note in ledger.get("notes") or ())
    last = ledger["checkpoints"][-1]
    counts = " and ".join(
        f"{last[name]['num_images']:,} of {last[name]['num_available']:,} {name} images"
        for name in ("train", "test")
    )
    words = f"Measured on {counts}, random subsets by seed {_escape(ledger.get('subset_seed'))}."
    return (
        f"<h2>The ledger</h2>\n{_figure(figures, 'ledger')}\n<p>{words}</p>\n"
        + _table([f"<tr>{''.join(heads)}</tr>"], rows, "wide")
        + f"\n{notes}"
    )


def _nats(entry: Mapping[str, Any] | None) -> str:
    """A cell of the ledger, marked where it was fitted on the test set."""
    nats = finite((entry or {}).get("nats"))
    if nats is None:
        return _DASH
    mark = '<span class="mark">*</span>' if entry.get("fitted_on_test") else ""
    return _dim_error(measured(nats, finite(entry.get("stderr")), 3)) + mark


def _pictures(figures: Mapping[str, Path]) -> str:
    placed = {"overview", "refit_curves", "effects", "ledger", "costliest", *_SINGLE_FIGURES}
    names = [name for name in ("samples", "reconstructions") if name in figures]
    names += [name for name in figures if name not in placed and name not in names]
    shown = [_figure(figures, name) for name in names]
    return "\n".join(["<h2>Samples and reconstructions</h2>", *shown]) if shown else ""


def _pairs(title: str, values: Mapping[str, Any] | None) -> str:
    """A section of names and values; mappings inside are written as name.name."""
    if not values:
        return ""
    rows = "\n".join(
        f"<dt>{_escape(name)}</dt><dd>{_value(value)}</dd>" for name, value in _flat(values)
    )
    return f'<section>\n<h2>{_escape(title)}</h2>\n<dl class="pairs">\n{rows}\n</dl>\n</section>'


def _seconds(seconds: Mapping[str, Any] | None) -> str:
    durations = {name: duration(value) for name, value in (seconds or {}).items()}
    return _pairs("Time, summed over refits that went side by side", durations)


def _terms() -> str:
    rows = "\n".join(
        f"<dt>{_escape(term)}</dt><dd>{_escape(words)}</dd>" for term, words in _DEFINITIONS
    )
    return f'<h2>What the words mean</h2>\n<dl class="terms">\n{rows}\n</dl>'


def _cite() -> str:
    return (
        "<h2>The paper</h2>\n<p>Mingtian Zhang, Peter Hayes and David Barber: Generalization Gap "
        "in Amortized Inference. NeurIPS 2022. "
        '<a href="https://arxiv.org/abs/2205.11640">arXiv:2205.11640</a></p>\n'
        f"<pre>{_escape(_CITATION)}</pre>"
    )


def _table(heads: Iterable[str], rows: Iterable[str], kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll"><table{mark}>\n<thead>\n'
        + "\n".join(heads)
        + "\n</thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody>\n</table></div>"
    )


def _columns(
    checkpoints: Sequence[Results],
    keys: Iterable[str],
    digits: int,
    by: Callable[[list[float]], float] = statistics.median,
) -> dict[str, list[str]]:
    """The cells of columns of {"bpd", "stderr"}, all with the same number of decimals.

    Args:
      checkpoints: the rows.
      keys: of the columns.
      digits: how many of the standard error are shown, where it is such as `by` finds it.
      by: of the columns' median errors, the one that decides.
    """
    entries = {key: [c.get(key) or {} for c in checkpoints] for key in keys}
    errors = [
        [error for entry in column if (error := finite(entry.get("stderr")))]
        for column in entries.values()
    ]
    medians = [statistics.median(known) for known in errors if known]
    decimals = decimals_of(by(medians), digits) if medians else 4
    return {key: [_cell(entry, decimals) for entry in column] for key, column in entries.items()}


def _cell(entry: Mapping[str, Any], decimals: int) -> str:
    bpd, error = finite(entry.get("bpd")), finite(entry.get("stderr"))
    return _DASH if bpd is None else _dim_error(measured(bpd, error, decimals))


def _dim_error(text: str) -> str:
    number, sign, error = text.partition(BESIDE)
    return f'{number}<span class="error">{sign}{error}</span>' if sign else text


def _plain(value: Any) -> str:
    """A single value for a table cell, escaped: numbers short, nothing as a dash."""
    if value is None:
        return _DASH
    if isinstance(value, float) and finite(value) is not None:
        return _escape(f"{value:.3g}".replace("-", "−"))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}".replace("-", "−")
    return _escape(value)


def _value(value: Any) -> str:
    if value is None or value == "":
        return _DASH
    if isinstance(value, list | tuple):
        return _escape(", ".join(str(item) for item in value)) or _DASH
    return _escape(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _escape(value: Any) -> str:
    return html.escape(str(value), quote=True)
