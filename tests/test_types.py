"""Types: a checker has nothing to say about the library, nor about README's example."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("basedpyright") is None,
    reason="basedpyright is not installed; pip install 'gapjax[test]'",
)


def _errors(*paths, cwd=ROOT):
    """What pyright, in its standard mode, reports for these files."""
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run([*command, *paths], cwd=cwd, capture_output=True, text=True, timeout=600)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] > 0, done.stdout
    return [f"{d['file']}:{d['range']['start']['line'] + 1}: {d['message']}"
            for d in report["generalDiagnostics"] if d["severity"] == "error"]  # fmt: skip


@pytest.mark.slow
def test_the_library_and_the_examples_have_no_type_errors(tmp_path):
    """The example of README, and an error that the checker must see."""
    example = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    assert "gapjax.self_consistent" in example
    wrong = "import gapjax\n\ngapjax.bits_per_dim('nats', (8, 8))\n"
    for name, text in (("readme.py", example), ("wrong.py", wrong)):
        (tmp_path / name).write_text(text)
    settings = json.loads((ROOT / "pyrightconfig.json").read_text())
    include = [str(ROOT / "gapjax"), str(tmp_path)]
    settings |= {"include": include, "extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    errors = _errors("-p", str(tmp_path / "pyrightconfig.json"))
    assert [error for error in errors if "wrong.py:3" in error]
    assert [error for error in errors if "wrong.py" not in error] == []
