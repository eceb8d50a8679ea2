"""Runs all checks that are no tests: ruff, the type checker and the build of the documentation.

python tests/check.py
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """1 where any of them has something to say; it says it itself."""
    with tempfile.TemporaryDirectory() as site:
        commands = [
            ["ruff", "check", "."],
            ["ruff", "format", "--check", "."],
            ["basedpyright", "--pythonpath", sys.executable],
            ["mkdocs", "build", "--strict", "--quiet", "--site-dir", site],
        ]
        failed = []
        for command in commands:
            print("$", *command, flush=True)
            done = subprocess.run(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
                check=False,
            )
            if done.returncode:
                failed.append(command[0])
    print("failed: " + ", ".join(failed) if failed else "all passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
