"""Independent jobs, each on its own device."""

import functools
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gapjax import jobs, parallel

DEVICES = jax.devices()[:8]
pytestmark = pytest.mark.skipif(
    len(DEVICES) < 8, reason=f"{len(DEVICES)} devices; XLA_FLAGS was set from outside"
)


def test_jobs_are_under_way_at_once_each_on_a_device_that_is_all_it_finds():
    both, found = threading.Barrier(2, timeout=60), []

    def job():
        both.wait()
        (device,) = parallel.all_devices()
        assert jnp.zeros(1).devices() == {device}
        found.append(device)
        both.wait()

    everything = parallel.all_devices()
    jobs.run_concurrently([job] * 6, DEVICES[5:7], pytest.fail)
    assert sorted(found, key=DEVICES.index) == [*DEVICES[5:6] * 3, *DEVICES[6:7] * 3]
    assert parallel.all_devices() == everything


def test_where_a_job_fails_the_others_are_ended_and_the_rest_left():
    stopped, begun, ended = threading.Event(), [], []

    def job(number):
        begun.append(number)
        if number == 1:
            raise FloatingPointError("the first")
        assert stopped.wait(60)
        ended.append(number)
        raise KeyboardInterrupt

    several = [functools.partial(job, number) for number in range(9)]
    with pytest.raises(FloatingPointError, match="the first"):
        jobs.run_concurrently(several, DEVICES[:2], stopped.set)
    assert 0 in ended and set(begun) <= {0, 1, 2}
    assert set(ended) == set(begun) - {1}


def test_one_device_does_its_jobs_in_turn_where_the_caller_is():
    done = []
    several = [lambda n=n: done.append((n, threading.current_thread())) for n in range(3)]
    for used in (DEVICES[3:4], ()):
        done.clear()
        jobs.run_concurrently(several, used, pytest.fail)
        assert done == [(n, threading.main_thread()) for n in range(3)]
    used = []
    jobs.run_concurrently([lambda: used.append(parallel.all_devices())], DEVICES[3:4], pytest.fail)
    assert used == [(DEVICES[3],)]


_LOSES_ITS_PEER = """
import os, signal, sys, threading
from experiments import program
from gapjax import jobs

def work(values):
    jobs.join_processes(sys.argv[1], 2, int(sys.argv[2]))
    jobs.any_process(False)
    if jobs.process()[0] == 1:
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while not jobs.any_process(False):
        pass

sys.argv, arguments = sys.argv[:1], sys.argv[1:]
sys.argv[0] = "program"
program.flags.FLAGS.mark_as_parsed()
program._run(lambda values, hold: (sys.argv.extend(arguments), work(values)))
"""


def test_the_peer_of_a_lost_process_ends_at_once_with_one_line():
    """Without waiting for it as JAX does: for minutes, and then with an abort."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-P", "-c", _LOSES_ITS_PEER, address, str(number)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    )  # fmt: skip
    second.communicate(timeout=300)
    err = first.communicate(timeout=80)[1]
    assert (second.returncode, first.returncode) == (-9, 1), err
    (line,) = (line for line in err.splitlines() if line.startswith("program: "))
    assert "another process of the run seems lost" in line and "same command goes on" in line
    assert "Traceback" not in err
