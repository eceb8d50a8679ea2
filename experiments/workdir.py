"""The folder of a run: whose it is, what it logs, and files that are whole or not there."""

import contextlib
import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.config import Config, config_from_json
from experiments.files import write_atomically, write_json
from gapjax import checkpoints, jobs

_LOCK = ".lock"
_OF_THE_DATA = ("dataset", "binarization", "threshold", "binarization_seed", "levels")
_BY_THE_DATA = ("uniform_weight",)  # whose default depends on the data
_SIGNATURE = "sha256"  # the key of config.json under which it has its own checksum


class WorkdirError(RuntimeError):
    """The folder cannot be used; one line says why and what would do."""


class Workdir:
    """A run's folder, held by one program at a time."""

    def __init__(self, path: Path):
        """Names the folder; `claim` takes it."""
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"  # where the stores are
        self.interrupted = False  # set when the run shall end after the chunk of steps at hand
        self.writes = jobs.process()[0] == 0  # of several processes the first does
        self._lock = None
        self._logging = threading.Lock()
        self._events = None

    def claim(self, config: Config, data: dict) -> None:
        """Takes the folder for this configuration and data; makes it where it is not there."""
        problem = None
        try:
            self._take(config, data)
        except WorkdirError as error:
            problem = error
        # All or none of several processes go on; this also has them wait for the first's files.
        if jobs.any_process(problem is not None):
            self.close()
            raise problem or WorkdirError("another process of the run cannot go on, and says why")

    def _error(self, words: str) -> WorkdirError:
        return WorkdirError(f"--workdir={self.path} {words}")

    def _take(self, config: Config, data: dict) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise self._error("is a file; give a folder")
        identity = {"config": _plain(config), "data": data}
        stored = self._stored()
        if stored is not None:
            self._refuse_other(stored, identity)
        try:
            if stored is None:
                self._refuse_files_of_others()
            if not self.writes:
                return
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._tidy()
            if stored is None:
                write_json(self.path / "config.json", {**identity, _SIGNATURE: _sign(identity)})
        except OSError as error:
            words = f"cannot be written ({error.strerror}); give another folder"
            raise self._error(words) from error

    def check_data(self, config: Config, data: dict) -> None:
        """Raises where the same flags give other data than the folder was made with."""
        stored = self._stored()
        same = lambda name: getattr(stored["config"], name) == getattr(config, name)
        if stored is not None and all(map(same, _OF_THE_DATA)):
            self._refuse_other(stored, {"config": _plain(stored["config"]), "data": data})

    def _refuse_other(self, stored: dict, identity: dict) -> None:
        differing = differences(
            _plain(stored["config"]), identity["config"],
            stored["data"].get("sha256"), identity["data"].get("sha256"),
        )  # fmt: skip
        if differing:
            raise self._error(
                f"is of another configuration: {'; '.join(differing)}. Give another --workdir, or "
                "the flags and the data that it was made with"
            )

    def _refuse_files_of_others(self) -> None:
        """Raises where a folder without config.json holds anything that could be the user's."""
        found = self.path.iterdir() if self.path.exists() else ()
        names = sorted(path.name for path in found if not path.name.startswith("."))
        if names:
            raise self._error(
                f"holds {names[0]} but no config.json, so it is not a run's folder; give an empty "
                "or a new one"
            )

    def check_place(self) -> None:
        """Raises WorkdirError where the folder was moved or removed since it was claimed."""
        if self._lock is None:
            return
        in_place = False
        with contextlib.suppress(OSError):
            held, there = os.fstat(self._lock.fileno()), (self.path / _LOCK).stat()
            in_place = os.path.samestat(held, there)
        if not in_place:
            raise self._error(
                "was moved or removed while the program ran; give the place where it is now, and "
                "it goes on from what was saved"
            )

    def _take_lock(self) -> None:
        self._lock = (self.path / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            words = "is in use by another program; wait for it, or give another folder"
            raise self._error(words) from None

    def _tidy(self) -> None:
        """Removes what a killed program left half-written."""
        for ending in ("json", "jsonl", "html", "png", "pdf"):
            for path in self.path.glob(f".*.{ending}.*.tmp"):
                path.unlink()
        if self.checkpoints.is_dir():
            for store in self.checkpoints.iterdir():
                checkpoints.remove_incomplete(store)

    def config(self) -> Config:
        """The configuration that the folder was made with."""
        return self._made_with()["config"]

    def provenance(self) -> dict:
        """The provenance of the data that the folder was made with."""
        return self._made_with()["data"]

    def _made_with(self) -> dict:
        stored = self._stored()
        if stored is None:
            start = f"python -m experiments.train --workdir={self.path}"
            raise self._error(f"is not a run's folder; start with {start}")
        return stored

    def _stored(self) -> dict | None:
        """The "config" and "data" of config.json; None where there is none."""
        path = self.path / "config.json"
        if not path.is_file():
            return None
        problem = "is damaged"
        try:
            stored = json.loads(path.read_text())
            if not isinstance(stored, dict) or not isinstance(stored.get("data"), dict):
                raise ValueError("it does not hold a configuration and its data")
            if stored.pop(_SIGNATURE, None) == _sign(stored):  # as it was written
                problem = "is of another version of gapjax"
            config = config_from_json(stored.get("config"))
            if problem == "is damaged":
                raise ValueError("it was changed after the run began; undo that")
            return {"config": config, "data": stored["data"]}
        except (ValueError, OSError) as error:
            raise WorkdirError(f"{path} {problem} ({error}); give another --workdir") from error

    def forget(self, stale: Callable[[dict], bool]) -> None:
        """Drops the logged lines of work that was interrupted and will be done again."""
        path = self.path / "metrics.jsonl"
        if not (self.writes and path.is_file()):
            return
        old, lines = path.read_bytes(), []
        for line in old.splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the last line of a killed program, or of one that had no room
            is_logged = isinstance(entry, dict) and {"phase", "epoch"} <= set(entry)  # by `log`
            if line.endswith(b"\n") and not (is_logged and stale(entry)):
                lines.append(line)
        new = b"".join(lines)
        if new != old:
            write_atomically(path, new)

    def log(self, phase: str, epoch: int, values: dict[str, float], **where: Any) -> None:
        """Adds a line to metrics.jsonl and TensorBoard's events."""
        if not self.writes:
            return
        self.check_place()
        # Here and not above: where PyTorch is installed it is loaded with it, for seconds.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        entry = {"phase": phase, **where, "epoch": epoch, **values}
        tag = "/".join([phase, *(f"{key}_{value}" for key, value in where.items())])
        with self._logging:  # refits side by side are in threads
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
            if self._events is None:
                folder = self.path / "tensorboard"
                folder.mkdir(exist_ok=True)
                # Not its SummaryWriter, whose thread ends in silence where there is no room.
                self._events = EventsWriter(str(folder / "events"))
            for name, value in values.items():
                summary = scalar(f"{tag}/{name}", value)
                self._events.write_event(Event(wall_time=time.time(), step=epoch, summary=summary))
            self._events.flush()

    def close(self) -> None:
        """Writes what is buffered and lets the folder go."""
        if self._events is not None:
            with contextlib.suppress(OSError):  # it was flushed after every line
                self._events.close()
            self._events = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _sign(identity: dict) -> str:
    """The checksum that config.json holds of itself, so that a change by hand is seen."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _plain(config: Config) -> dict:
    return json.loads(json.dumps(config._asdict()))


def differences(there: dict, here: dict, data_there: str | None, data_here: str | None) -> list:
    """In what a run's fields and its data's checksum differ from another's, a phrase for each.

    Flags are named that were given. Where the data are others, so are the fields that take their
    default from them; and where no flag chose other data, they have changed.
    """
    others = data_there != data_here
    left_out = _BY_THE_DATA if others else ()
    fields = [name for name in there if there[name] != here.get(name) and name not in left_out]
    show = lambda value: ",".join(map(str, value)) if isinstance(value, list) else value
    found = [
        f"--{name} is {show(there[name])} there and {show(here.get(name))} here" for name in fields
    ]
    if others and not set(fields) & set(_OF_THE_DATA):
        sums = f"{str(data_there)[:12]} there and {str(data_here)[:12]} here"
        found.insert(0, f"the data have changed: their checksum is {sums}")
    return found
