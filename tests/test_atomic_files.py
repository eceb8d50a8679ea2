"""Files of a run: complete or absent, and written by one function."""

import ast
import os
import stat
from pathlib import Path

import pytest

from experiments import files
from experiments.config import UsageError

EXPERIMENTS = Path(files.__file__).parent


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path):
    path = tmp_path / "results.json"
    files.write_atomically(path, b"older")

    def fail():
        with files.replacing(path) as temporary:
            temporary.write_bytes(b"half")
            assert path.read_bytes() == b"older"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"older"
    with files.replacing(path) as temporary:
        temporary.write_bytes(b"newer")
        # The name that `Workdir` looks for when it removes what a killed program left.
        assert temporary.match(".results.json.*.tmp") and temporary.parent == tmp_path
    assert path.read_bytes() == b"newer"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_is_no_regular_file_is_not_replaced(tmp_path, kind):
    path, target = tmp_path / "out", tmp_path / "target"
    target.write_bytes(b"of others")
    {"pipe": os.mkfifo, "link": lambda at: at.symlink_to(target), "folder": Path.mkdir}[kind](path)
    before = os.lstat(path)
    with pytest.raises(UsageError, match="out is no regular file and is not replaced"):
        files.write_atomically(path, b"ours")
    assert os.path.samestat(before, os.lstat(path)) and target.read_bytes() == b"of others"
    assert sorted(tmp_path.iterdir()) == [path, target]


def test_a_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.write_json(tmp_path / "none" / "results.json", {})


def test_one_module_of_experiments_renames_files():
    """Every other writer of whole files uses it."""
    renaming = {"os.replace", "os.rename", "tempfile.NamedTemporaryFile", "tempfile.mkstemp"}
    found = {
        str(path.relative_to(EXPERIMENTS))
        for path in EXPERIMENTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in renaming
    }
    assert found == {"files.py"}
