"""README and docs: their Python runs, their links exist, their numbers are those of the results."""

import ast
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import gapjax
from gapjax.examples import take

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("**/*.md"))]
LINKED = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "experiments/results/README.md"]

# A block that needs a library which gapjax does not depend on stands below such a comment.
_NEEDS = re.compile(r"<!-- needs: (\w+) -->")
_FENCE = re.compile(r"(?:(?P<before>[^\n]*)\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
# Options of other programs than ours.
_FOREIGN_FLAGS = {"help", "strict"}


class Block(NamedTuple):
    """A fenced block of Python: where it is, what it says, and the library that it needs."""

    page: str
    line: int
    code: str
    needs: str | None

    @property
    def can_run(self):
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


def _read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def _blocks(page):
    text = _read(page)
    found = []
    for match in _FENCE.finditer(text):
        needs = _NEEDS.search(match["before"] or "")
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(page, line, match["code"], needs and needs[1]))
    return found


BLOCKS = [block for page in PAGES for block in _blocks(page)]


@pytest.fixture
def small_scale(monkeypatch, tmp_path):
    """The pages' code at a small scale: few images, small networks, a hundredth of the epochs."""
    monkeypatch.chdir(tmp_path)

    def patch(name, **changes):
        function = getattr(gapjax, name)

        def smaller(*args, **options):
            for option, change in changes.items():
                options[option] = change(options.get(option))
            return function(*args, **options)

        monkeypatch.setattr(gapjax, name, smaller)

    epochs = lambda asked: min(3, math.ceil((asked or 100) / 100))
    patch("train", num_epochs=epochs)
    for refit in (
        "refit_encoder",
        "refit_members",
        "self_consistent",
        "optimal_inference",
        "close_gap",
    ):
        patch(refit, num_epochs=epochs)
    patch("mlp_vae", hidden_sizes=lambda asked: asked or (16,))
    search = gapjax.PosteriorSearch(2, max_rounds=1, num_heldout=2, steps_per_round=2)
    patch(
        "ledger", num_images=lambda _: 4, num_samples=lambda _: 2, search=lambda _: search,
        method=lambda _: "importance", num_importance_samples=lambda _: 2,
    )  # fmt: skip
    load = gapjax.load_dataset

    def few(*args, **options):
        data = load(*args, **options)
        return data._replace(train=take(data.train, slice(200)), test=take(data.test, slice(100)))

    monkeypatch.setattr(gapjax, "load_dataset", few)


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS}))
def test_the_python_of_a_page_runs(page, small_scale, capsys):
    """All blocks of a page in order, as one program."""
    names = {"__name__": "__main__"}
    for block in _blocks(page):
        if block.can_run:
            code = "\n" * (block.line - 1) + block.code  # so that a traceback names the page's line
            exec(compile(code, str(ROOT / page), "exec"), names)


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.needs], ids=lambda b: f"{b.page}:{b.line}:{b.needs}"
)
def test_blocks_that_need_other_libraries(block):
    """Says which blocks are left out above; that they are Python is seen in any case."""
    ast.parse(block.code)
    if not block.can_run:
        pytest.skip(f"{block.page}, line {block.line} is not executed: it needs {block.needs}")


def test_only_marked_blocks_are_left_out():
    assert {block.page for block in BLOCKS} >= {"README.md", "docs/measure.md", "docs/close.md"}
    assert {block.needs for block in BLOCKS} == {
        None,
        "anndata",
        "constriction",
        "equinox",
        "haiku",
    }
    for page in PAGES:
        assert len(_blocks(page)) == _read(page).count("```python"), page


def _anchors(path):
    """The ids of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", LINKED)
def test_relative_links_exist(page):
    text = re.sub(r"^```.*?^```$", "", _read(page), flags=re.M | re.S)
    for link in _LINK.findall(text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert target.is_relative_to(ROOT) and target.exists(), f"{page}: {link}"
        assert not anchor or anchor in _anchors(target), f"{page}: {link}"


def test_the_reference_has_every_public_name():
    """And has them first: what is imported from its room comes after."""
    documented = re.findall(r"^::: gapjax\.([\w.]+)$", _read("docs/api.md"), re.M)
    assert len(documented) == len(set(documented))
    missing = sorted(set(gapjax.__all__) - set(documented))
    assert not missing, f"add a line '::: gapjax.NAME' to docs/api.md for {missing}"
    assert set(documented[: len(gapjax.__all__)]) == set(gapjax.__all__)


def test_every_flag_that_a_page_names_is_defined():
    programs = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "experiments").glob("*.py")
    )
    defined = set(re.findall(r'"(\w+)"', programs))
    # The ledger's flags are defined with a prefix.
    defined |= {f"ledger_{name}" for name in defined}
    for page in PAGES:
        flags = set(re.findall(r"(?<![\w-])--([a-z]\w+)", _read(page))) - _FOREIGN_FLAGS
        assert flags <= defined, f"{page}: {sorted(flags - defined)}"


def _results_table():
    """The rows of README's table of results: preset to its cells."""
    rows = {}
    for line in _read("README.md").splitlines():
        cells = [cell.strip() for cell in re.sub(r"<!--.*?-->", "", line).strip(" |").split("|")]
        if len(cells) == 10 and cells[0].startswith("`") and "preset" not in cells[0]:
            rows[re.search(r"`(\w+)`", cells[0])[1]] = cells
    return rows


def _number(text):
    """(value, decimals) of the first number of a cell, a percentage as a share."""
    text = text.replace("−", "-").strip()
    digits = re.match(r"[+-]?\d*\.?\d+", text)[0]
    decimals = len(digits.partition(".")[2])
    return (float(digits) / 100, decimals + 2) if "%" in text else (float(digits), decimals)


@pytest.mark.parametrize("preset", ["digits", "binary_mnist", "grey_mnist"])
def test_the_numbers_of_the_readme_are_the_results(preset):
    cells = _results_table()[preset]
    results = json.loads(_read(f"experiments/results/{preset}/results.json"))
    last = results["checkpoints"][-1]
    bpd = lambda name: last[name]["bpd"]
    expected = [
        last["epoch"], None, bpd("test"), bpd("control"), bpd("self_consistent"), bpd("optimal"),
        last["gap_closed"], (bpd("test") - bpd("control")) / bpd("inference_gap"),
        bpd("gain_over_control"),
    ]  # fmt: skip
    for cell, value in zip(cells[1:], expected, strict=True):
        if value is None:
            continue
        shown, decimals = _number(cell)
        assert abs(shown - value) <= 0.51 * 10**-decimals, f"{cell} is {value}"
    for cell, stderr in ((cells[7], last["gap_closed_stderr"]),
                         (cells[9], last["gain_over_control"]["stderr"])):  # fmt: skip
        percent = "%" if "%" in cell else ""
        shown, decimals = _number(cell.partition("±")[2] + percent)
        assert abs(shown - stderr) <= 0.51 * 10**-decimals, f"{cell} is {stderr}"


_NAMES = {"digits": "digits", "binary MNIST": "binary_mnist", "grey MNIST": "mnist"}


def _closing_table():
    """README's table of recipes: by (data set, epoch), the recipe and the text of every cell."""
    row = r"^\| ([^|\d\n]+), epoch (\d+)[^|\n]*" + 4 * r"\| ([^|\n]+)" + r"\|$"
    for name, epoch, control, paper, *others in re.findall(row, _read("README.md"), re.MULTILINE):
        cells = {"control": control, "paper": paper}
        cells |= {re.search(r"`(\w+)`", cell)[1]: cell for cell in others}
        yield (_NAMES[name], int(epoch)), cells


def test_the_shares_in_the_readme_are_the_results():
    """Of the file with the most seeds, or the shortest name, where several have a recipe."""
    known = {}
    files = (ROOT / "experiments/results/closing").glob("*.json")
    for path in sorted(files, key=lambda path: len(path.name)):
        results = json.loads(path.read_text(encoding="utf-8"))
        place = results["dataset"], results["epoch"]
        for row in results["recipes"]:
            known.setdefault((*place, row["recipe"]), []).append(row)
    table = dict(_closing_table())
    assert {name for name, _ in table} == set(_NAMES.values())
    for place, cells in table.items():
        for recipe, cell in cells.items():
            closed = max(known[*place, recipe], key=lambda row: row["seeds"])["gap_closed"]
            values = closed["mean"], closed["stderr"]
            for text, value in zip(cell.split("±"), values, strict=True):
                shown, decimals = _number(text.split()[0] + "%")
                assert abs(shown - value) <= 0.51 * 10**-decimals, f"{place} {recipe}: {value}"


def test_the_site_builds_without_a_warning(tmp_path):
    for library in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed; pip install '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    assert (tmp_path / "results" / "digits" / "overview.png").is_file()
    reference = (tmp_path / "api.html").read_text(encoding="utf-8")
    missing = [name for name in gapjax.__all__ if f'id="gapjax.{name}"' not in reference]
    assert not missing
