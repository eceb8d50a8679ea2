"""Kills the main program at random moments and checks that nothing is lost. Not run by pytest.

python tests/kill_trials.py --kills=20

Two runs are left alone. Others are killed (kill -9) three times each, at random moments of the
time that the second one took, are started again each time, and in the end compared with the first.
Two runs are equal where every entry of every store and all numbers of results.json are, bit
for bit, and where metrics.jsonl has the same lines.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gapjax import checkpoints

_ROOT = Path(__file__).resolve().parent.parent
_STORES = ("train", "self_consistent", "control", "optimal", "evaluation")
_FLAGS = (
    "--num_epochs=6", "--checkpoint_every=3", "--save_every=1", "--refit_epochs=2",
    "--optimal_epochs=20", "--hidden_sizes=16", "--latent_dim=2", "--num_eval_samples=2",
    "--batch_size=200",
)  # fmt: skip


def _start(workdir: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "experiments.reproduce", *_FLAGS, f"--workdir={workdir}"],
        env={**os.environ, "PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _what_counts(workdir: Path) -> dict:
    """All that must be the same in two runs."""
    results = json.loads((workdir / "results.json").read_text())
    sums = {
        f"{name} {number}": checkpoints.checksum(workdir / "checkpoints" / name, number)
        for name in _STORES
        for number in checkpoints.numbers(workdir / "checkpoints" / name)
    }
    lines = sorted((workdir / "metrics.jsonl").read_text().splitlines())
    return {"sums": sums, "lines": lines, **{k: results[k] for k in ("checkpoints", "claims")}}


def _leftovers(workdir: Path) -> list[str]:
    inside = [path for path in workdir.glob("checkpoints/*/*") if not path.name.isdigit()]
    return [str(path.relative_to(workdir)) for path in [*workdir.glob(".*.tmp"), *inside]]


def _state(workdir: Path) -> str:
    """Where a run was killed, in words."""
    if not workdir.exists():
        return "nothing written yet"
    stores = {p.name: checkpoints.numbers(p) for p in sorted(workdir.glob("checkpoints/*"))}
    entries = sum(map(len, stores.values()))
    drawn = len([*workdir.glob("*.png")])
    return f"{entries} entries, {drawn} figures, half-written: {_leftovers(workdir) or 'nothing'}"


def _finish(workdir: Path) -> None:
    process = _start(workdir)
    out, _ = process.communicate()
    if process.returncode:
        sys.exit(f"a start ended with {process.returncode}: {out}")


def _check(workdir: Path, expected: dict) -> None:
    have = _what_counts(workdir)
    wrong = [key for key in expected if have[key] != expected[key]]
    if wrong or _leftovers(workdir):
        sys.exit(f"{workdir} differs in {wrong}; left over: {_leftovers(workdir)}")


def main() -> None:
    """Runs the trials; ends with 1 and says why where one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="gapjax_kills_"))
    _finish(folder / "undisturbed")  # it fills the compilation cache; the next one is as the others
    expected = _what_counts(folder / "undisturbed")
    clock = time.monotonic()
    _finish(folder / "timed")
    longest = time.monotonic() - clock
    _check(folder / "timed", expected)
    killed, runs = 0, 0
    while killed < arguments.kills:
        workdir = folder / f"run{runs}"
        for _ in range(min(3, arguments.kills - killed)):
            process = _start(workdir)
            try:
                out, _ = process.communicate(timeout=moments.uniform(0, longest))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed += 1
                print(f"kill {killed:3}, run {runs}: {_state(workdir)}", flush=True)
                continue
            if process.returncode:
                sys.exit(f"a start after a kill ended with {process.returncode}: {out}")
            break
        _finish(workdir)
        _check(workdir, expected)
        runs += 1
    print(f"{killed} kills in {runs} runs: every run ended as the undisturbed one, bit for bit")


if __name__ == "__main__":
    main()
