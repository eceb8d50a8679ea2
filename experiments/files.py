"""Files that are either complete or absent: written under a temporary name, then renamed."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments import results_json
from experiments.config import UsageError


def check_replaceable(path: Path, *inputs: Path) -> None:
    """Raises UsageError where a file of this name must not be replaced.

    That is where a pipe, a device, a link or a folder has the name, or one of the `inputs`.
    """
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise UsageError(f"{path} is no regular file and is not replaced; give another name")
    for source in inputs:
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise UsageError(f"{path} is the input, {source}; give another name for the output")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to, which replaces `path` when the block succeeds.

    A reader of `path` sees the old file or the new one, never a part of it. If the block or the
    renaming fails, the old file stays. A program that is killed leaves a file named `path` with a
    dot before and a random part and ".tmp" after it; `Workdir` removes such files.

    Raises:
      UsageError: what has the name is no regular file; see `check_replaceable`.
    """
    path = Path(path)
    check_replaceable(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        os.close(descriptor)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file as a whole; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON as a whole; see `replacing` and `experiments.results_json.dumps`."""
    write_atomically(path, results_json.dumps(value).encode())
