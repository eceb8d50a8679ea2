"""What every program here does around its phases: flags in, one line out where it cannot go on."""

import errno
import io
import logging as standard_logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging

from experiments import cost
from experiments.config import Config, UsageError
from experiments.options import Saving, config_from_flags
from experiments.run import Run, prepare, start
from experiments.workdir import Workdir, WorkdirError
from gapjax import jobs, parallel
from gapjax.checkpoints import CheckpointError, CorruptCheckpointError
from gapjax.codec.stack import CodecError
from gapjax.data import DatasetError, closest_name

_EXPECTED = (
    UsageError, WorkdirError, DatasetError, CheckpointError, CodecError, FloatingPointError,
)  # fmt: skip
# What JAX may be told by the environment that changes the numbers of a run on the same device.
_NUMERICS = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_numpy_dtype_promotion": "standard",
}
# How errors of what processes compute together begin; they are of several types.
_XLA_STATUS = re.compile(
    "(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): "
)
_GOES_ON = "what was done is saved, and the same command goes on"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_program(
    phases: Callable[[Run], None],
    *,
    new_runs: bool,
    check: Callable[[flags.FlagValues, Config], object] | None = None,
) -> None:
    """Runs `phases` on the workdir that the flags name, and ends the process.

    Args:
      phases: what the program does.
      new_runs: whether flags define the run; otherwise the workdir's own configuration does.
      check: raises UsageError where a flag of the program's own cannot be used; it is called
        before any work is done.
    """

    def work(values: flags.FlagValues, hold: Callable[[Workdir], None]) -> None:
        cores = _join(values)
        saving = Saving()
        if new_runs:
            config = config_from_flags(values)
            saving = Saving(values.save_every, values.keep, values.keep_weights_every)
            default = f"runs/{config.preset}_seed{config.seed}"
            workdir = Workdir(Path(values.workdir or default))
        elif values.workdir is None:
            raise UsageError("--workdir is not given; name the folder of a run")
        else:
            workdir = Workdir(Path(values.workdir))
            config = workdir.config()
        if check is not None:
            check(values, config)
        use_compilation_cache()
        # What is not done on each core is done on the first device, which computes with them all.
        with parallel.use_devices(cores[:1]):
            prepared = prepare(config, values.data_dir, workdir)
            if new_runs and values.dry_run:
                config = prepared.config
                costs = cost.estimate(config, prepared.dataset, prepared.vae, len(cores))
                print(cost.describe(config, costs, workdir.path))
                return
            hold(workdir)
            run = start(prepared, workdir, saving=saving, sweep=values.sweep, cores=cores)
            if not sys.stderr.isatty():
                print(_begin_line(run, new_runs), flush=True)
            phases(run)

    _run(work)


def _begin_line(run: Run, new_runs: bool) -> str:
    """What a log begins with: what is done, where, and for how long."""
    config, words = run.config, [f"{Path(sys.argv[0]).stem} in {run.workdir.path}"]
    words.append(f"{run.dataset.name}, {config.num_epochs} epochs, {len(run.epochs)} checkpoints")
    if new_runs:
        costs = cost.estimate(config, run.dataset, run.vae, len(run.cores))
        words.append(f"a whole run, compilation aside, roughly: {cost.describe_time(costs)}")
    return "; ".join(words)


def run_without_workdir(
    work: Callable[[flags.FlagValues], None], *, ends_at_once: bool = False
) -> None:
    """Runs a program that claims no run's folder, and ends the process.

    With `ends_at_once` SIGTERM kills it in the midst of a computation. Otherwise Python raises
    KeyboardInterrupt when XLA returns, which serves programs that save what they have done.
    """

    def with_devices(values: flags.FlagValues, hold: object) -> None:
        _cores("off")
        work(values)

    _run(with_devices, ends_at_once)


def _run(
    work: Callable[[flags.FlagValues, Callable[[Workdir], None]], None], ends_at_once: bool = False
) -> None:
    """Runs `work`, which gives the workdir that it means to claim to the function it is given."""
    name, held = Path(sys.argv[0]).stem, []

    def main(argv: list[str]) -> int:
        if len(argv) > 1:
            return _fail(f"{argv[1]!r} is not a flag; see --help")

        def interrupt(number: int, frame: object) -> None:
            # The chunk at hand is finished first; a second signal does not wait for that.
            if not held or held[0].interrupted:
                raise KeyboardInterrupt
            held[0].interrupted = True

        warnings.formatwarning = lambda message, *_, **__: f"{name}: {message}\n"
        if not flags.FLAGS["verbosity"].present:
            # Orbax and others tell of every step, and of each error that they raise as well.
            logging.set_verbosity(logging.FATAL)
            standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell's & leaves SIGINT ignored
            signal.signal(number, interrupt)
        if ends_at_once:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for stream in (sys.stdout, sys.stderr):  # an ASCII terminal gets ? for the sign ±
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        try:
            _pin_numerics()
            work(flags.FLAGS, held.append)
            sys.stdout.flush()
        except CorruptCheckpointError as error:
            made_by = "the program that made it, experiments.train or experiments.refit"
            return _fail(f"{error}; {made_by}, makes it again")
        except _EXPECTED as error:
            return _fail(_lost_line(error) or " ".join(str(error).split()))
        except BrokenPipeError:
            # The interpreter flushes standard output at its end, which would fail once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _fail(f"standard output was closed; {_GOES_ON}")
        except OSError as error:
            return _fail(_os_error_line(error, held[0] if held else None))
        except KeyboardInterrupt:
            return _fail(f"interrupted; {_GOES_ON}", 130)
        finally:
            for workdir in held:
                workdir.close()
        return 0

    def end(argv: list[str]) -> int:
        try:
            code = main(argv)
        except Exception as error:
            if jobs.process()[1] == 1:
                raise
            code = _fail(_lost_line(error) or traceback.format_exc())
        if code == 1:  # the others may be waiting for this one
            jobs.leave(code)
        return code

    def _fail(line: str, code: int = 1) -> int:
        print(f"{name}: {line}", file=sys.stderr)
        return code

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.UnrecognizedFlagError as error:
            close = closest_name(error.flagname, flags.FLAGS)
            hint = f"; did you mean --{close}?" if close else ";"
            sys.exit(_fail(f"--{error.flagname} is not a flag{hint} see --help", 2))
        except flags.Error as error:
            sys.exit(_fail(" ".join(str(error).split()), 2))

    app.run(end, flags_parser=parse)


def _join(values: flags.FlagValues) -> tuple[jax.Device, ...]:
    """Joins the other processes of the run; all but the first of them say nothing."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        jobs.join_processes(
            values.coordinator, values.num_processes, values.process_id,
            detect=values.detect_processes,
        )  # fmt: skip
    except RuntimeError as error:
        raise UsageError(str(error)) from error
    for number, handler in handlers:  # JAX takes SIGTERM for itself where it joins processes
        signal.signal(number, handler)
    cores = _cores(values.sweep)
    if jobs.process()[0] > 0:
        sys.stdout = Path(os.devnull).open("w")
    return cores


def _cores(sweep: str) -> tuple[jax.Device, ...]:
    """The cores of the CPU to spread over, once it is known that JAX has any device."""
    try:
        cores = parallel.expose_cpu_cores() if sweep in ("auto", "cores") else ()
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second from JAX where a plugin is missing
        raise UsageError(
            f"JAX_PLATFORMS={jax.config.jax_platforms} cannot be had "
            f"({str(error) or 'it is not installed'}); unset it, give cpu, or install JAX for "
            "this device"
        ) from error
    return cores


def _lost_line(error: Exception) -> str | None:
    """What one of several processes says where XLA failed, if that is so: another was lost."""
    reasons = [str(each).partition("\n")[0] for each in (error, error.__cause__)]
    reason = next(filter(_XLA_STATUS.match, reasons), None)
    if reason is None or jobs.process()[1] == 1:
        return None
    return f"another process of the run seems lost ({reason}); {_GOES_ON}"


def _os_error_line(error: OSError, workdir: Workdir | None) -> str:
    file = error.filename or (workdir.path if workdir else "a file")
    line = " ".join(f"{file}: {error.strerror or error}".split())
    if error.errno in _NO_ROOM:
        line += "; what was saved is whole: make room, and the same command goes on"
    return line


def _pin_numerics() -> None:
    """Sets back what of JAX's configuration would give other numbers than the programs' own."""
    changed = {name: own for name, own in _NUMERICS.items() if getattr(jax.config, name) != own}
    for name, value in changed.items():
        jax.config.update(name, value)
    if changed:
        names = ", ".join(f"{name}={value}" for name, value in changed.items())
        print(f"set for this program: {names}; its numbers are defined for these", flush=True)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache, unless JAX was told where to."""
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "gapjax" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
