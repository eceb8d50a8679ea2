"""The report: the numbers of results, failures shown as such, one page that loads nothing."""

import copy
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from experiments import results_json
from experiments.show import report, tables

_COMMITTED = Path(__file__).parent.parent / "experiments" / "results"
_EPOCHS = list(range(50, 501, 50))
# A picture of one white pixel.
_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000"
    "3a7e9b550000000a49444154789c63f80f00010101"
    "001bb6ee560000000049454e44ae426082"
)


def _results(epochs=_EPOCHS):
    checkpoints = []
    for epoch in epochs:
        test = 0.42 + abs(epoch - 150) * (1.16e-4 if epoch > 150 else 2e-4)
        gap = test - 0.4102
        checkpoints.append(
            {
                "epoch": epoch,
                "train": {"bpd": 0.5 - 0.14 * (epoch / 500) ** 0.6, "stderr": 0.0021},
                "test": {"bpd": test, "stderr": 0.0062},
                "optimal": {"bpd": 0.4102, "stderr": 0.0051},
                "self_consistent": {"bpd": test - 0.23 * gap, "stderr": 0.0058},
                "control": {"bpd": test - 0.01 * gap, "stderr": 0.0061},
                "inference_gap": {"bpd": gap, "stderr": 0.0029},
                "gain": {"bpd": 0.23 * gap, "stderr": 0.0011},
                "gain_over_control": {"bpd": 0.22 * gap, "stderr": 0.0012},
                "gap_closed": 0.23,
                "gap_closed_stderr": 0.021,
                "refits": {
                    "optimal": {
                        "steps": 4321,
                        "converged": epoch != 300,
                        "last_improvement": 3.1e-6,
                        "curve": {"epoch": [0, 1], "bpd": [0.5, 0.4]},
                    }
                },
            }
        )
    results = {
        "schema": results_json.VERSION,
        "preset": "digits",
        "dataset": "digits",
        "event_shape": [8, 8],
        "config": {"alpha": 0.5, "hidden_sizes": [500, 500], "data_dir": None},
        "environment": {"gapjax": "0.1.0", "jax": "0.10.2", "device_count": 1},
        "checkpoints": checkpoints,
        "claims": [
            {"claim": "Test BPD rises.", "value": 0.0406, "threshold": 0.01, "holds": True},
            {
                "claim": "Better than the control everywhere.",
                "value": -0.0003,
                "threshold": 0.0,
                "holds": False,
                "detail": "Worse at epoch 50.",
            },
        ],
        "seconds": {"train": 62.3, "total": 3725.0},
        "data": {"source": "scikit-learn", "num_test": 360, "sha256": "9f" * 32},
        "num_eval_samples": 100,
        "best": {"epoch": 150, "bpd": 0.42, "stderr": 0.0062, "chosen_on": "test"},
        "notes": ["A note to the reader."],
    }
    return results_json.loads(results_json.dumps(results))


class _Page(HTMLParser):
    """Rows of cells, texts by class, and whatever a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.badges, self.loads, self.tags, self.open = [], [], [], [], []
        self._in_cell = self._in_badge = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.loads += [attrs[name] for name in ("src", "srcset", "data", "action") if name in attrs]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True
        elif "badge" in attrs.get("class", ""):
            self.badges.append("")
            self._in_badge = True

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self._in_cell = False
        self._in_badge &= tag != "span"

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1][-1] += data
        if self._in_badge:
            self.badges[-1] += data


def _write(tmp_path, results, figures=None):
    path = tmp_path / "report.html"
    report.write_report(path, results, figures or {})
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    assert page.open == []  # every tag is closed
    return text, page


def _checkpoint_rows(page):
    """The rows of the table of checkpoints, the report's first, its head among them."""
    head = next(row for row in page.rows if row[0] == "epoch")
    return [row for row in page.rows if len(row) == len(head)]


def test_the_table_holds_the_numbers_of_every_checkpoint(tmp_path):
    results = _results()
    _, page = _write(tmp_path, results)
    rows = {row[0]: row for row in _checkpoint_rows(page)}
    for checkpoint in results["checkpoints"]:
        row = [cell.rstrip("†") for cell in rows[str(checkpoint["epoch"])]]
        keys = ["train", "test", "control", "self_consistent", "optimal"]
        for key, cell in zip(keys, row[1:6], strict=True):
            bpd, error = checkpoint[key]["bpd"], checkpoint[key]["stderr"]
            assert cell == f"{bpd:.3f}\xa0±\xa0{error:.3f}"
        keys = ["inference_gap", "gain", "gain_over_control"]
        for key, cell in zip(keys, row[6:9], strict=True):
            bpd, error = checkpoint[key]["bpd"], checkpoint[key]["stderr"]
            assert cell == f"{bpd:.4f}\xa0±\xa0{error:.4f}"
        assert row[9] == "23\xa0±\xa02\xa0%"
    assert "fitted on the test set" in rows["epoch"][5]
    daggers = [epoch for epoch, row in rows.items() if row[5].endswith("†")]
    assert daggers == ["300"]


def test_the_surest_column_says_how_many_decimals_all_have(tmp_path):
    results = _results()
    for checkpoint in results["checkpoints"]:
        checkpoint["test"]["stderr"] = checkpoint["control"]["stderr"] = 0.034
        checkpoint["optimal"]["stderr"] = checkpoint["self_consistent"]["stderr"] = 0.051
        checkpoint["gain"]["stderr"] = checkpoint["gain_over_control"]["stderr"] = 0.012
    _, page = _write(tmp_path, results)
    (row,) = (row for row in _checkpoint_rows(page) if row[0] == "500")
    assert row[1:3] == ["0.360\xa0±\xa00.002", "0.461\xa0±\xa00.034"]
    assert row[6] == "0.050\xa0±\xa00.003"  # of differences the typical one decides


def test_headline_says_what_the_last_checkpoint_found():
    results = _results()
    results["checkpoints"].reverse()  # the last is the one of the highest epoch
    words = report.headline(results).replace("\xa0", " ")
    assert words == (
        "At epoch 500 the encoder’s over-fitting costs 0.050 ± 0.003 BPD on unseen images; "
        "self-consistent training wins back 23 ± 2 %, its control 1 %."
    )


def test_headline_hides_no_failure():
    results = _results()
    last = results["checkpoints"][-1]
    last["gap_closed"] = -0.4
    assert "widens the gap by 40\xa0±" in report.headline(results)
    last["inference_gap"] = {"bpd": 0.002, "stderr": 0.003}
    assert "no loss due to the encoder can be distinguished from zero" in report.headline(results)
    last["inference_gap"] = {"bpd": float("nan"), "stderr": 0.0}
    assert "not a finite number" in report.headline(results)


def _by_image(bpd, better, bias=-0.011):
    by_image = {
        "num_images": 1000, "num_samples": 100, "better_interval": [better - 0.01, better + 0.012],
        "better_bias": bias, "median_bias": -0.0002, "sign_test": 0.04 if better != 0.495 else 0.3,
    }  # fmt: skip
    return {
        "bpd": bpd, "stderr": 0.0011, "median": -0.0033, "better": better, "better_stderr": 0.005,
        "num_effective": 12.4, "by_image": by_image,
    }  # fmt: skip


@pytest.mark.parametrize("better, loses", [(0.45, True), (0.495, False), (0.55, False)])
def test_headline_says_where_most_images_contradict_the_mean(better, loses):
    results = _results()
    results["checkpoints"][-1]["gain"] = _by_image(0.01, better)
    words = report.headline(results).replace("\xa0", " ")
    assert words.endswith("1 %, but on 55 % of the images it loses.") == loses
    assert ("loses" in words) == loses
    results["checkpoints"][-1]["gain"] = _by_image(0.01, better, bias=-0.06)  # it may be all noise
    assert "loses" not in report.headline(results)


def test_what_most_images_say_is_shown_where_it_is_known(tmp_path):
    results = _results()
    question = "speak for most images"
    assert question not in _write(tmp_path, results)[0]
    for checkpoint in results["checkpoints"]:
        checkpoint["gain"] = _by_image(0.01, 0.45)
    text, page = _write(tmp_path, results)
    assert text.index("Every checkpoint") < text.index(question) < text.index("The refits")
    assert "first 1,000 images with\n100 posterior samples" in text
    shown = ["−0.0033 −0.0002", "45.0\xa0% 44.0 to 46.2, −1.1", "12"]
    rows = [row for row in page.rows if row[1:] == shown]
    assert [row[0] for row in rows] == [str(epoch) for epoch in _EPOCHS]


def test_shares_of_too_few_samples_are_not_shown(tmp_path):
    """Files of older versions have them, and notes on them."""
    results = _results()
    for checkpoint in results["checkpoints"]:
        checkpoint["gain"] = _by_image(0.01, 0.45)
        checkpoint["effects"] = {
            "model": {
                "as_trained": {"bpd": 0.3, "stderr": 0.01},
                "control": _by_image(0.01, 0.45), "self_consistent": _by_image(0.01, 0.45),
            }
        }  # fmt: skip
    results["notes"] = ["Against it: most images contradict the mean at epoch 5.", "Kept."]
    text, _ = _write(tmp_path, results)
    assert "45.0\xa0%" in text and results["notes"][0] in text
    for checkpoint in results["checkpoints"]:
        effects = checkpoint["effects"]["model"]
        for difference in (checkpoint["gain"], effects["control"], effects["self_consistent"]):
            del difference["by_image"]
    text, page = _write(tmp_path, results)
    assert "45.0\xa0%" not in text and "−0.0033" not in text and results["notes"][0] not in text
    assert "Kept." in text and "did not measure medians" in text
    assert ["50", "12"] in page.rows  # what the error rests on is known
    assert not [words for words in ("loses", "None") if words in report.headline(results)]


def test_what_the_refits_did_to_each_kind_of_image_is_shown_where_it_is_known(tmp_path):
    results = _results()
    title = "What the refits win, and on which images"
    assert title not in _write(tmp_path, results)[0]
    for i, kind in enumerate(("model", "train", "test"), start=1):
        own = results["checkpoints"][-1].setdefault("effects", {})
        trained = {"bpd": i / 10, "stderr": 0.002}
        own[kind] = {
            "as_trained": trained, "control": _by_image(i / 100, 0.6),
            "self_consistent": _by_image(-i / 100, 0.4),
        }  # fmt: skip
    own["model"]["gradient"] = {"num_examples": 1000, "num_effective": 3.4}
    text, page = _write(tmp_path, results)
    assert text.index("The refits") < text.index(title)
    for i, kind in enumerate(("model samples", "training", "test"), start=1):
        (row,) = (row for row in page.rows if row[:2] == ["500", kind])
        assert [cell.replace("\xa0", " ") for cell in row[2:]] == [
            f"{i / 10:.3f} ± 0.002", f"{i / 100:.4f} ± 0.0011", "−0.0033 −0.0002",
            "60.0 % 59.0 to 61.2, −1.1",
            f"−{i / 100:.4f} ± 0.0011", "−0.0033 −0.0002",
            "40.0 % 39.0 to 41.2, −1.1", "3 of 1,000" if i == 1 else "–",
        ]  # fmt: skip


def test_a_failed_claim_is_shown_as_failed(tmp_path):
    text, page = _write(tmp_path, _results())
    assert page.badges == ["✓ holds", "✗ does not hold"]
    assert "Claims: 1 of 2 hold" in text
    failed = [row for row in page.rows if row[0] == "✗ does not hold"]
    assert failed == [
        ["✗ does not hold", "Better than the control everywhere.Worse at epoch 50.", "−0.0003", "0"]
    ]


@pytest.mark.parametrize("holds", [False, "yes", 1])
def test_only_true_holds(tmp_path, holds):
    results = _results([50])
    results["claims"] = [{"claim": "c", "value": float("nan"), "threshold": None, "holds": holds}]
    assert _write(tmp_path, results)[1].badges == ["✗ does not hold"]


def test_what_cannot_be_judged_is_shown_as_such(tmp_path):
    """One test image: its standard errors are null."""
    results = _results([50])
    claim = {"claim": "c", "value": None, "threshold": 3.0, "holds": None, "detail": "why"}
    results["claims"] = [claim]
    for value in results["checkpoints"][0].values():
        if isinstance(value, dict):
            value |= {key: None for key in ("stderr", "better_stderr") if key in value}
    text, page = _write(tmp_path, results)
    assert page.badges == ["? cannot be judged"]
    assert "Claims: 0 of 1 hold, 1 cannot be judged" in text
    assert "does not hold" not in text and "\xa0nan" not in text
    assert report.headline(results).endswith("its standard error is not known.")


def test_the_page_loads_nothing_and_embeds_the_figures(tmp_path):
    names = ["overview", "figure1a", "figure2", "refit_curves", "samples", "reconstructions"]
    names += ["costliest"]
    figures = {}
    for name in [*names, "my_own"]:
        figures[name] = tmp_path / f"{name}.png"
        figures[name].write_bytes(_PNG)
    text, page = _write(tmp_path, _results(), figures)
    assert len(page.loads) == len(names) + 1
    assert all(source.startswith("data:image/png;base64,") for source in page.loads)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert not re.search(r"url\(|@import", text)
    assert text.index("<figure>") < text.index("Claims:") < text.index("Every checkpoint")
    assert text.index("Every checkpoint") < text.index("The refits") < text.index("Samples and")
    assert "my own" in text


def test_everything_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>\"&"
    results = _results([50, 100])
    results["dataset"] = evil
    results["config"][evil] = {"inner": [evil]}
    results["environment"]["gapjax"] = evil
    results["data"]["source"] = evil
    results["seconds"] = {evil: evil}
    results["notes"] = [evil]
    results["num_eval_samples"] = evil
    results["config"]["alpha"] = evil
    results["checkpoints"][0]["refits"]["optimal"]["steps"] = evil
    results["claims"][0].update(claim=evil, detail=evil, value=evil, threshold=evil)
    figures = {evil: tmp_path / "picture.png"}
    figures[evil].write_bytes(_PNG)
    text, page = _write(tmp_path, results, figures)
    assert "script" not in page.tags
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 12


def test_what_is_not_known_is_a_dash(tmp_path, monkeypatch):
    results = _results([50])
    results["notes"], results["claims"] = [], []
    row = results["checkpoints"][0]
    del row["refits"]
    row |= {"gap_closed": None, "gap_closed_stderr": None, "control": {"bpd": None, "stderr": None}}
    row["gain"]["stderr"] = None
    monkeypatch.setitem(tables.PAIRED, "newer", tables.Head("a number that older files lack"))
    text, page = _write(tmp_path, results)
    (row,) = [row for row in page.rows if row[0] == "50"]
    assert row[3] == "–" and row[9:] == ["–", "–"]
    assert "None" not in text and "Claims" not in text


def test_small_errors_get_more_decimals(tmp_path):
    results = _results([100, 200])
    for checkpoint in results["checkpoints"]:
        for value in checkpoint.values():
            if isinstance(value, dict) and "stderr" in value:
                value["stderr"] = 0.00042
    _, page = _write(tmp_path, results)
    (row,) = (row for row in _checkpoint_rows(page) if row[0] == "100")
    assert row[5] == "0.4102\xa0±\xa00.0004"
    assert row[6].endswith("\xa0±\xa00.00042")


def test_a_page_that_cannot_be_made_leaves_the_older_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("older")
    results = _results([50])
    before = copy.deepcopy(results)
    with pytest.raises(FileNotFoundError):
        report.write_report(path, results, {"overview": tmp_path / "missing.png"})

    def fail(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "replace", fail)
        report.write_report(path, results, {})
    assert path.read_text() == "older"
    assert os.listdir(tmp_path) == ["report.html"]
    assert results == before
    report.write_report(path, results, {})
    assert os.listdir(tmp_path) == ["report.html"]


def test_the_ledger_is_shown_where_there_is_one(tmp_path):
    entry = lambda nats, fitted=False: {"nats": nats, "stderr": 0.1, "fitted_on_test": fitted}
    encoder = {
        "elbo": entry(-24.25), "bound_gap": entry(4.25), "amortization_gap": entry(3.125, True),
        "inference_gap_by_refit": None, "capacity_gap": entry(float("nan")),
    }  # fmt: skip
    account = {
        "num_images": 300, "num_available": 1437, "log_prob": entry(-20.0),
        "optimal": entry(-21.0, True), "approximation_gap": entry(1.0),
        "encoders": {"as_trained": encoder},
    }  # fmt: skip
    row = {"epoch": 500, "train": account, "test": account, "model_gap": entry(2.5)}
    ledger = {"checkpoints": [row], "subset_seed": 7, "notes": ["Nats per image."]}
    path = tmp_path / "report.html"
    report.write_report(path, _results(), {}, ledger)
    text = path.read_text()
    page = _Page(text)
    (cells,) = [row for row in page.rows if row[:3] == ["500", "test", "as trained"]]
    assert [cell.split("\N{NO-BREAK SPACE}")[0] for cell in cells[3:]] == [
        "2.500", "−20.000", "−21.000", "1.000", "−24.250", "4.250", "3.125", "–", "–"
    ]  # fmt: skip
    assert cells[5].endswith("*") and cells[9].endswith("*") and not cells[4].endswith("*")
    assert "300 of 1,437 test images" in text and "seed 7" in text and "Nats per image." in text
    assert "The ledger" not in _write(tmp_path, _results())[0]


def _hostile(value):
    """The same with every string, and every key of the free-form parts, turned into markup."""
    if isinstance(value, dict):
        return {key: _hostile(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_hostile(inner) for inner in value]
    return f"<script>{value}</script>\"'&" if isinstance(value, str) else value


def test_every_string_of_a_run_is_escaped(tmp_path):
    """Also of the ledger."""
    folder = _COMMITTED / "digits"
    results, ledger = (
        _hostile(json.loads((folder / f"{name}.json").read_text()))
        for name in ("results", "ledger")
    )
    for name in ("config", "environment", "data", "seconds"):
        results[name] |= {_hostile(key): value for key, value in results[name].items()}
    account = ledger["checkpoints"][0]["test"]
    account["encoders"] = {"<script>own": account["encoders"]["as_trained"]}
    picture = tmp_path / "picture.png"
    picture.write_bytes(_PNG)
    path = tmp_path / "report.html"
    report.write_report(path, results, {"overview": picture, "<script>": picture}, ledger)
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    assert page.open == [] and "script" not in page.tags and "<script" not in text
    assert "<title>&lt;script&gt;digits&lt;/script&gt;" in text
    assert "&lt;script&gt;own" in text and "&amp;" in text


def test_results_of_older_versions_are_read(tmp_path):
    """Without effects, averaged weights, medians and the newer flags: their parts are left out."""
    results = json.loads((_COMMITTED / "digits" / "results.json").read_text())
    text, page = _write(tmp_path, results)
    parts = ("averaged weights", "speak for most images", "What the refits win")
    assert all(part in text for part in parts)
    rows = _checkpoint_rows(page)
    for checkpoint in results["checkpoints"]:
        for key in [key for key in checkpoint if "averaged" in key or key == "effects"]:
            del checkpoint[key]
        for key in ("inference_gap", "gain", "gain_over_control"):
            checkpoint[key] = {name: checkpoint[key][name] for name in ("bpd", "stderr")}
    del results["best"], results["config"]["validation"], results["config"]["posterior"]
    text, page = _write(tmp_path, results)
    assert not any(part in text for part in parts)
    shown = _checkpoint_rows(page)
    assert len(shown) == 1 + len(results["checkpoints"]) and shown == rows[: len(shown)]


@pytest.mark.parametrize("weight, explained", [(2.56e-5, True), (0.0, False), (None, False)])
def test_the_uniform_of_the_grey_likelihood_is_explained(tmp_path, weight, explained):
    results = _results([50])
    results["config"]["uniform_weight"] = weight
    text, _ = _write(tmp_path, results)
    (shown,) = re.findall(r"<dt>uniform_weight</dt><dd>(.*?)</dd>", text)
    assert shown.startswith("–" if weight is None else str(weight))
    assert ("mixture of a uniform distribution over all grey levels" in shown) == explained


def test_a_table_of_hundreds_of_checkpoints_is_folded_and_whole(tmp_path):
    text, page = _write(tmp_path, _results(range(1, 401)))
    assert text.count("<summary>400 rows</summary>") == text.count("<details>") == 2
    for epoch in (1, 200, 400):
        assert any(row[0] == str(epoch) for row in page.rows if row)
    assert "<details>" not in _write(tmp_path, _results())[0]
