"""What the wheel and the sdist hold, and what the library needs when it is installed alone."""

import ast
import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from small_data import load_error

ROOT = Path(__file__).resolve().parents[1]
# Without these, `pip install .` gives a library that works. chex imports absl; NumPyro needs tqdm.
EXPERIMENTS_ONLY = {
    "constriction",
    "jinja2",
    "matplotlib",
    "PIL",
    "sklearn",
    "tensorboardX",
    "tensorflow_datasets",
    "importlib_resources",
    "anndata",
    "h5py",
}


def _tracked():
    """The repository's files, or None where this is no checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    listed = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0")
    return {name for name in names if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The names in the sdist and the wheel of a copy that has the rest of an older build."""
    version = importlib.metadata.version("setuptools") if _has("setuptools") else "0"
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"needs setuptools 77 or newer, not {version}; pip install 'setuptools>=77'")
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "copy"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", "runs")
    shutil.copytree(ROOT, copy, ignore=ignored)
    for stale in ("gapjax/stale.py", "experiments/__init__.py"):
        (copy / "build/lib" / stale).parent.mkdir(parents=True, exist_ok=True)
        (copy / "build/lib" / stale).write_text("")
    program = (
        "import sys\n"
        "from setuptools import build_meta\n"
        "folder = sys.argv[1]\n"  # setuptools changes sys.argv
        "build_meta.build_sdist(folder)\n"
        "build_meta.build_wheel(folder)\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(folder / "installed")
    return source, names, folder / "installed"


def _has(distribution):
    try:
        return bool(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return False


def test_the_wheel_holds_gapjax_alone_and_nothing_of_an_older_build(built):
    _, names, _ = built
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "gapjax").rglob("*.py*")}
    files = {file for file in files if not file.endswith(".pyc")}
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == files | {"gapjax/py.typed"}


def test_the_sdist_holds_every_file_of_the_repository(built):
    source, _, _ = built
    assert {"gapjax/py.typed", "tests/conftest.py", "experiments/reproduce.py"} <= source
    tracked = _tracked()
    if tracked is None:
        pytest.skip("this is no git checkout, so that there is no list to compare with")
    assert tracked <= source
    assert not any(name.endswith(".pyc") for name in source)


def test_the_wheel_works_without_what_only_experiments_need(built):
    program = f"""
import sys
sys.path.insert(0, sys.argv[1])
sys.modules.update(dict.fromkeys({sorted(EXPERIMENTS_ONLY)}))  # importing these fails
import gapjax
assert gapjax.__file__.startswith(sys.argv[1]), gapjax.__file__
for name in gapjax.__all__:
    getattr(gapjax, name)
import gapjax.checkpoints
from gapjax.data import DatasetError
try:
    gapjax.load_dataset("digits")
except DatasetError as error:
    print(error)
"""
    command = [sys.executable, "-P", "-c", program, str(built[2])]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "extra 'experiments'" in done.stdout


def _requirements(section, key):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [line.strip() for line in config[section][key].splitlines()]
    return {line.partition(">=")[0] for line in lines if line and not line.startswith("#")}


def _with_extras(name):
    """The distributions of an extra, and of those that it names."""
    found = set()
    for requirement in _requirements("options.extras_require", name):
        other = re.fullmatch(r"gapjax\[(\w+)\]", requirement)
        found |= _with_extras(other[1]) if other else {requirement.partition("[")[0]}
    return found


def _imported(path):
    """The top-level modules that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


def test_what_launch_installs_is_all_that_the_programs_import():
    """But for what has an extra of its own: downloads, comparisons, forms of files, examples."""
    optional = {
        name for extra in ("tfds", "benchmark", "cells", "test") for name in _with_extras(extra)
    }
    own = {"tensorflow", "torch", "anndata", "h5py", "equinox", "haiku"}
    needed = _requirements("options", "install_requires") | _with_extras("experiments")
    needed = {name.lower() for name in needed}
    distributions = importlib.metadata.packages_distributions()
    files = [*(ROOT / "experiments").rglob("*.py"), *(ROOT / "gapjax").rglob("*.py")]
    modules = {name.split(".")[0] for path in files for name in _imported(path)}
    assert {"constriction", "zstandard", "matplotlib", "sklearn"} <= modules
    modules -= {*sys.stdlib_module_names, "gapjax", "experiments", "jaxlib"}  # JAX requires jaxlib
    has = lambda name: needed & {found.lower() for found in distributions.get(name, [name])}
    missing = {name for name in modules - own if not has(name)}
    assert not missing, f"add these to the extra 'experiments' of setup.cfg: {sorted(missing)}"
    assert own - {"haiku"} | {"dm-haiku"} <= optional - needed


def test_a_missing_library_is_named_with_the_extra_that_has_it(monkeypatch, tmp_path):
    extra = _requirements("options.extras_require", "experiments")
    assert {"scikit-learn", "tensorflow-datasets", "pillow", "importlib_resources"} <= extra
    assert not extra & _requirements("options", "install_requires")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    message = load_error("digits")
    assert "scikit-learn" in message and "extra 'experiments'" in message
    prepared = tmp_path / "mnist" / "3.0.1"
    prepared.mkdir(parents=True)
    (prepared / "dataset_info.json").write_text("{}")
    message = load_error("mnist", data_dir=tmp_path)
    assert "tensorflow-datasets" in message and "extra 'experiments'" in message


@pytest.mark.parametrize("words", [["--seed=3"], ["test", "-k", "x"]], ids=["program", "tests"])
def test_launch_installs_an_extra_and_runs_the_programs_from_the_checkout(tmp_path, words):
    """With a Python that only writes down how it was called."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    calls = tmp_path / "calls"
    python.write_text(f'#!/bin/sh\necho "$PYTHONPATH: $*" >>"{calls}"\n')
    python.chmod(0o755)
    environment = {
        **os.environ,
        "VIRTUAL_ENV": str(tmp_path / "venv"),
        "GAPJAX_ACCELERATOR": "cpu",
        "PYTHONPATH": "/mine",
    }
    command = [str(ROOT / "launch.sh"), *words]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    lines = calls.read_text().splitlines()
    extra = "test" if words[0] == "test" else "experiments"
    assert any(line.endswith(f"-e {ROOT}[{extra}]") for line in lines), lines
    if words[0] == "test":
        assert lines[-1] == "/mine: -m pytest -k x"
    else:
        assert lines[-1] == f"{ROOT}:/mine: -P -m experiments.reproduce --seed=3"


def test_launch_ends_the_others_where_one_process_is_lost(tmp_path):
    """The second, which it does not wait for first. With a Python that only waits."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "*socket*) echo 1234 ;;\n"
        f"*process_id=0*) trap 'echo ended >{tmp_path}/first; exit 1' TERM; touch {tmp_path}/up\n"
        "  while :; do sleep 0.1; done ;;\n"
        f"*process_id=1*) until [ -e {tmp_path}/up ]; do sleep 0.1; done; kill -9 $$ ;;\n"
        "esac\n"
    )
    python.chmod(0o755)
    environment = {
        **os.environ,
        "VIRTUAL_ENV": str(tmp_path / "venv"),
        "GAPJAX_ACCELERATOR": "cpu",
        "NUM_PROCESSES": "2",
    }
    done = subprocess.run(
        [ROOT / "launch.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 137
    assert (tmp_path / "first").read_text() == "ended\n"
    assert done.stderr.splitlines()[-1] == (
        "launch.sh: one of 2 processes was lost (signal 9); the others are ended, and the same "
        "command goes on"
    )
    assert "Killed" not in done.stderr
