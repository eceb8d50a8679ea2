"""The house: imports go down only, each outside library has one room, and the code is tidy."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import gapjax

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gapjax"

# A room may import rooms of lower floors. A new file in gapjax/ needs a line here.
FLOORS = {
    "distributions": 1,
    "networks": 1,
    "checkpoints": 1,
    "datasets": 1,
    "plots": 1,
    "devices": 1,
    "vae": 2,
    "sources": 3,
    "optimizers": 3,
    "evaluation": 3,
    "likelihoods": 4,
    "posteriors": 4,
    "training": 4,
    "gaps": 5,
    "__init__": 6,
}
# An outside library, or a name in one, and the only rooms that may name it.
OWNERS = {
    "flax": {"networks"},
    "optax": {"optimizers"},
    "blackjax": {"likelihoods"},
    "orbax": {"checkpoints"},
    "tensorflow_datasets": {"datasets"},
    "tensorflow": {"datasets"},
    "sklearn": {"datasets"},
    "matplotlib": {"plots"},
    "numpyro": {"distributions", "vae"},
    "jax.pmap": {"devices"},
    "jax.distributed": {"devices"},
    "absl": set(),
    "argparse": set(),
    "experiments": set(),
    "tests": set(),
}
# Calls that print or touch the file system, and the rooms that may.
SPEAKS = {"print", "input"}
FILES = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "unlink"}
ON_DISK = {"checkpoints", "datasets", "plots"}

ROOMS = sorted(path.stem for path in PACKAGE.glob("**/*.py"))


def _tree(room):
    return ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8"))


def _names(tree):
    """Every dotted name that a file imports or looks up, e.g. gapjax.vae.VAE and jax.pmap."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = f"gapjax.{node.module or ''}".rstrip(".") if node.level else node.module
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def _calls(tree):
    """The last part of the name of everything that a file calls."""
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {ast.unparse(function).rsplit(".", 1)[-1] for function in functions}


def _upward(room, tree):
    """Rooms that this one imports and that are not below it."""
    names = {name for name in _names(tree) if name.split(".")[0] == "gapjax"}
    if "gapjax" in names:
        names.add("gapjax.__init__.")
    imported = {name.split(".")[1] for name in names if "." in name}
    return {other for other in imported if other in FLOORS and FLOORS[other] >= FLOORS[room]} | {
        other for other in imported if other not in FLOORS
    }


def _foreign(room, tree):
    """Outside libraries that this room names and that belong to another."""
    names = _names(tree)
    return {
        library
        for library, owners in OWNERS.items()
        if room not in owners
        and any(name == library or name.startswith(f"{library}.") for name in names)
    }


def test_every_room_has_a_floor():
    unlisted = set(ROOMS) - set(FLOORS)
    assert not unlisted, f"give {sorted(unlisted)} a floor in FLOORS"
    assert not [path for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] != "_"]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down_only(room):
    assert not _upward(room, _tree(room))


@pytest.mark.parametrize("room", ROOMS)
def test_outside_libraries_are_named_in_their_room_alone(room):
    assert not _foreign(room, _tree(room))


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_print_nothing_and_only_three_touch_files(room):
    calls = _calls(_tree(room))
    assert not calls & SPEAKS
    assert room in ON_DISK or not calls & FILES


@pytest.mark.parametrize(
    "room, line",
    [
        ("distributions", "from gapjax.vae import elbo"),
        ("vae", "import gapjax.training"),
        ("vae", "from gapjax import training"),
        ("evaluation", "def f():\n    from gapjax import sources"),
        ("vae", "import gapjax"),
        ("sources", "from . import training"),
        ("training", "from gapjax.utils import anything"),
    ],
)
def test_an_import_upwards_would_be_seen(room, line):
    assert _upward(room, ast.parse(line))


@pytest.mark.parametrize(
    "room, line",
    [
        ("training", "import optax"),
        ("vae", "from flax import linen"),
        ("networks", "import sklearn.datasets"),
        ("training", "import jax\njax.pmap(f)"),
        ("training", "from jax import pmap"),
        ("datasets", "from absl import flags"),
        ("plots", "from experiments import reproduce"),
    ],
)
def test_a_library_in_the_wrong_room_would_be_seen(room, line):
    assert _foreign(room, ast.parse(line))


def test_every_public_name_exists_and_is_documented():
    assert len(set(gapjax.__all__)) == len(gapjax.__all__)
    for name in gapjax.__all__:
        thing = getattr(gapjax, name)
        if callable(thing):
            assert (thing.__doc__ or "").strip(), f"{name} has no docstring"
            # A NamedTuple or dataclass has one by itself, which says nothing.
            assert not thing.__doc__.startswith(f"{name}("), f"{name} has no docstring of its own"


def test_the_names_that_users_rely_on_are_public():
    fixed = """VAE VAEParams mlp_vae elbo importance_weighted_bound bits_per_dim encoder_only
    data_source model_source mixture_source train refit_encoder optimal_inference self_consistent
    evaluate load_dataset""".split()
    assert set(fixed) <= set(gapjax.__all__)


def test_rooms_are_mirrored_by_tests():
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert set(ROOMS) - {"__init__"} <= tests


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff_has_nothing_to_say(command):
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed; pip install 'gapjax[test]'")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
