"""Runs the suite with the oldest versions that setup.cfg allows.

    python tests/oldest_versions.py [--environment=FOLDER] [pytest arguments]

Makes a virtual environment, by default in a temporary folder that is deleted afterwards, installs
exactly the lower bounds of `install_requires` and of the extra `test` with all extras that it
names, and runs pytest there, without the check of types: the code is written for the types of the
newest versions. It needs a network, a few minutes, and a Python that those versions
have wheels for (3.11 or 3.12). The exit code is pytest's.
"""

import argparse
import configparser
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Tools: the newest versions check the code as it is written today.
NEWEST = ("ruff", "setuptools")


def lower_bounds() -> list[str]:
    """The requirements of setup.cfg with >= replaced by ==."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"]

    def expand(text: str) -> Iterator[str]:
        for line in filter(None, map(str.strip, text.splitlines())):
            if extra := re.fullmatch(r"gapjax\[(\w+)\]", line):
                yield from expand(extras[extra[1]])
            elif not line.startswith("#"):
                yield line

    found = expand(config["options"]["install_requires"] + extras["test"])
    return [line if line.startswith(NEWEST) else line.replace(">=", "==") for line in found]


def run(environment: Path, arguments: list[str]) -> int:
    """Installs the lower bounds in an environment and runs pytest; returns its exit code."""
    if not (environment / "bin" / "python").exists():
        venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    bounds = lower_bounds()
    print("\n".join(bounds), flush=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *bounds], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-e", ROOT], check=True)
    # Programs compiled by another version of JAX are not to be reused.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(environment / "jax")}
    command = [python, "-m", "pytest", "--ignore=tests/test_types.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **cache}, check=False).returncode


def main() -> int:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, help="where to make or find the environment")
    known, arguments = parser.parse_known_args()
    if known.environment:
        return run(known.environment.resolve(), arguments)
    with tempfile.TemporaryDirectory(prefix="gapjax-oldest-") as folder:
        return run(Path(folder), arguments)


if __name__ == "__main__":
    sys.exit(main())
