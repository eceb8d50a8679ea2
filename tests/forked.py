"""Programs of experiments/ in forks of one process that has imported what they import.

To import it takes a process longer than most of what the tests ask of a program.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SERVER = """
import gc, json, os, runpy, signal, sys
import experiments.ledger, matplotlib.backends.backend_agg, sklearn.datasets
from experiments import draw

gc.freeze()  # a fork that ends need not look at what was imported
gc.set_threshold(20_000, 20, 20)  # as in conftest.py
for line in sys.stdin:
    module, flags, cwd, files, drawn = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(300)
        os.chdir(cwd)
        for number, file in enumerate((os.devnull, *files)):
            os.dup2(os.open(file, os.O_RDWR), number)
        sys.argv[1:] = flags
        if not drawn:
            draw.draw_phase = lambda run, results: run.workdir.path
        sys.modules.pop(module, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.exit()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server():
    """It has no device of JAX's yet. It ends where its standard input does, with this process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-P", "-W", "ignore", "-c", _SERVER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


class Forked:
    """`python -m module flags`, of which one runs at a time; `drawn`: with figures and a report."""

    def __init__(self, module, *flags, cwd=None, drawn=True):
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("out", "err")]
        for file in self._files:
            file.touch()
        files = [str(file) for file in self._files]
        asked = module, flags, os.fspath(cwd or Path.cwd()), files, drawn
        server = _server()
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        self._pid = int(server.stdout.readline())

    def signal_when(self, is_time, number=signal.SIGKILL):
        """Sends the signal as soon as `is_time(what was printed)`; the program must live then."""
        while not is_time(self._files[0].read_text(encoding="utf-8")):
            try:
                os.kill(self._pid, 0)
            except ProcessLookupError:
                raise AssertionError(self.end()) from None
            time.sleep(0.001)
        os.kill(self._pid, number)

    def end(self):
        """Waits; returns the exit code, standard output and standard error."""
        code = int(_server().stdout.readline())
        with self._folder:
            return code, *(file.read_text(encoding="utf-8") for file in self._files)
