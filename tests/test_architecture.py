"""Imports go down only, each outside library has its own modules, and ruff is content."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gapjax

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gapjax"

# A room may import rooms of lower floors, and of its own folder where no circle comes of it. A
# new folder of gapjax/, or a new file beside the folders, needs a line here.
FLOORS = {
    "checkpoints": 1,
    "parallel": 1,
    "vae": 1,
    "data": 2,
    "examples": 2,
    "jobs": 2,
    "model": 3,
    "optimizers": 3,
    "measure": 4,
    "models": 4,
    "infer": 5,
    "fit": 6,
    "codec": 7,
    "results": 7,
    "__init__": 8,
}
# An outside library, or a name in one, and the only rooms or folders that may name it.
OWNERS = {
    "flax": {"model/networks", "models/convolution"},
    "optax": {"optimizers", "fit"},
    "blackjax": {"measure/annealing"},
    "constriction": {"codec/stack"},
    "orbax": {"checkpoints"},
    "tensorflow_datasets": {"data/tfds"},
    "tensorflow": {"data/tfds"},
    "sklearn": {"data/readers"},
    "PIL": {"data/files", "data/tfds"},
    "scipy": {"data/files"},
    "anndata": {"data/cells"},
    "h5py": {"data/cells"},
    "numpyro": {
        "model/bounds",
        "model/distributions",
        "model/free",
        "model/mlp",
        "models",
        "infer/newton",
        "codec/tables",
    },
    "jax.pmap": {"parallel"},
    "jax.distributed": {"jobs", "parallel"},
    "lazy_loader": {"__init__", "fit/__init__"},
    "matplotlib": set(),
    "absl": set(),
    "argparse": set(),
    "experiments": set(),
    "tests": set(),
}
# Libraries that no public name of gapjax imports before it is called.
_LATE = {
    "orbax",
    "sklearn",
    "matplotlib",
    "tensorflow_datasets",
    "PIL",
    "blackjax",
    "tensorboardX",
    "constriction",
    "anndata",
    "h5py",
}
# Calls that print or touch the file system, and the rooms that may.
SPEAKS = {"print", "input"}
FILES = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "unlink"}
ON_DISK = {"checkpoints", "data/cells", "data/files", "data/mnist", "data/tfds"}
# What is kept is kept by one cache, or was measured to be slow: the comment says how slow.
_CACHES = {"functools.lru_cache", "functools.cache", "functools.cached_property"}
_MEASURED = re.compile(r"#.*\d+(\.\d+)? (ms|s|seconds)\b")
_MOST_LINES, _MOST_NAMES = 380, 42

ROOMS = sorted(str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.glob("**/*.py"))


def _source(room):
    return (PACKAGE / f"{room}.py").read_text(encoding="utf-8")


def _tree(room):
    return ast.parse(_source(room))


def _names(tree):
    """Every dotted name that a file imports or looks up, e.g. gapjax.fit and jax.pmap."""
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


def _imported(tree, rooms=tuple(ROOMS)):
    """The rooms that a file imports; "__init__" where it imports the package's own names."""
    found = set()
    for name in _names(tree):
        parts = name.split(".")
        if parts[0] != "gapjax":
            continue
        paths = ["/".join(parts[1:end]) for end in range(len(parts), 1, -1)]
        found.add(next((path for path in paths if path in rooms), "/".join(parts[1:2])))
    return {room or "__init__" for room in found}


def _floor(room):
    return FLOORS.get(room.split("/")[0])


def _upward(room, tree):
    """Rooms that this one imports and that are neither below it nor in its folder."""
    folder = room.split("/")[0]
    return {
        other
        for other in _imported(tree)
        if (other.split("/")[0] != folder or "/" not in room)
        and (_floor(other) is None or _floor(other) >= _floor(room))
    }


def _circle(imports):
    """Rooms that import each other around a circle; none where there is an order."""
    left = dict(imports)
    while free := {room for room, others in left.items() if not others & set(left)}:
        left = {room: others for room, others in left.items() if room not in free}
    return set(left)


def _foreign(room, tree):
    """Outside libraries that this room names and that belong to another."""
    names = _names(tree)
    return {
        library
        for library, owners in OWNERS.items()
        if not {room, room.split("/")[0]} & owners
        and any(name == library or name.startswith(f"{library}.") for name in names)
    }


def test_every_room_has_a_floor():
    unlisted = {room for room in ROOMS if _floor(room) is None}
    assert not unlisted, f"give {sorted(unlisted)} a floor in FLOORS"


def test_no_rooms_import_each_other():
    imports = {room: _imported(_tree(room)) - {room} for room in ROOMS if room != "__init__"}
    assert not _circle(imports)
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {"a", "b", "c", "d"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down_only(room):
    assert not _upward(room, _tree(room))


@pytest.mark.parametrize("room", ROOMS)
def test_outside_libraries_are_named_in_their_room_alone(room):
    assert not _foreign(room, _tree(room))


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_print_nothing_and_only_some_touch_files(room):
    calls = _calls(_tree(room))
    assert not calls & SPEAKS
    assert room in ON_DISK or not calls & FILES


@pytest.mark.parametrize(
    "room, line",
    [
        ("model/distributions", "from gapjax.measure.bounds import bounds"),
        ("vae", "import gapjax.fit.api"),
        ("vae", "from gapjax.fit import api"),
        ("measure/bounds", "def f():\n    from gapjax.fit import sources"),
        ("vae", "import gapjax"),
        ("vae", "from gapjax import parallel"),
        ("parallel", "from gapjax import jobs"),
        ("fit/api", "from gapjax import elbo"),
        ("fit/api", "from gapjax.utils import anything"),
    ],
)
def test_an_import_upwards_would_be_seen(room, line):
    assert _upward(room, ast.parse(line))


@pytest.mark.parametrize(
    "room, line",
    [
        ("measure/bounds", "import optax"),
        ("vae", "from flax import linen"),
        ("model/networks", "import sklearn.datasets"),
        ("fit/loop", "import jax\njax.pmap(f)"),
        ("fit/loop", "from jax import pmap"),
        ("data/dataset", "from absl import flags"),
        ("results/estimates", "from experiments import reproduce"),
    ],
)
def test_a_library_in_the_wrong_room_would_be_seen(room, line):
    assert _foreign(room, ast.parse(line))


def _caches(text):
    """Lines of a file that keep results, without a measurement that says why."""
    lines, found = text.splitlines(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in _CACHES:
            found.add(node.lineno)
        if isinstance(node, ast.ImportFrom):
            if {f"{node.module}.{alias.name}" for alias in node.names} & _CACHES:
                found.add(node.lineno)
    measured = lambda number: any(map(_MEASURED.search, lines[max(0, number - 2) : number]))
    return [lines[number - 1] for number in sorted(found) if not measured(number)]


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "parallel"])
def test_what_is_kept_is_kept_in_one_place(room):
    """Where a comment on the line or before it gives its time, something else may be."""
    assert not _caches(_source(room))


def test_a_second_cache_would_be_seen():
    text = "import functools\n\n\n@functools.lru_cache(64)  # {}\ndef slow(x): ...\n"
    assert _caches(text.format("of models"))
    assert not _caches(text.format("tracing takes 25 to 50 ms"))
    assert _caches("from functools import cache")
    (cache,) = [line for line in _caches(_source("parallel")) if "lru_cache" in line]
    assert "_MAX_PROGRAMS" in cache


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_short_and_functions_have_one_signature(room):
    assert len(_source(room).splitlines()) <= _MOST_LINES
    assert not {name for name in _names(_tree(room)) if name.endswith("overload")}


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


def test_public_names_are_those_of_the_stub():
    """Each is written once there, with the room that has it."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    rooms = {
        alias.name: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert set(gapjax.__all__) == set(rooms) and len(rooms) <= _MOST_NAMES
    assert set(gapjax.__all__) <= set(dir(gapjax))
    for name, room in rooms.items():
        module = importlib.import_module(f"gapjax.{room}" if room else "gapjax")
        assert getattr(gapjax, name) is getattr(module, name)
    with pytest.raises(AttributeError, match="elbow"):
        gapjax.elbow  # noqa: B018


def test_importing_is_quick():
    """By what is imported and not by the clock, which depends on the machine."""
    program = f"""
import sys
import gapjax
print(sorted({{"jax", "numpy", "numpyro", "flax", "optax", "chex"}} & set(sys.modules)))
for name in set(gapjax.__all__) - {{"checkpoints"}}:  # which is Orbax's room
    getattr(gapjax, name)
print(sorted({_LATE} & set(sys.modules)))
assert gapjax.checkpoints
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["[]", "[]"]


def test_every_room_has_tests():
    """In a file of its name, or in one whose first line names it."""
    tests = {path.stem.removeprefix("test_"): path for path in (ROOT / "tests").glob("test_*.py")}
    heads = "\n".join(path.read_text(encoding="utf-8").splitlines()[0] for path in tests.values())
    for room in ROOMS:
        name = room.rsplit("/", 1)[-1]
        assert name == "__init__" or name in tests or f"`{room}`" in heads, room


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
