"""The loop over compiled calls, as a generator of immutable progress.

`advance` does the bookkeeping of one run or of a sweep: curves, averages, measurements and
learning rates. Whoever iterates over it decides what to save, to log, and when to stop.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gapjax.fit import plateau
from gapjax.fit.diagnosis import NotFiniteError
from gapjax.fit.executor import Executor, Packed
from gapjax.fit.optimizers import scale_learning_rate
from gapjax.fit.plateau import Convergence, PlateauState
from gapjax.fit.steps import TrainState
from gapjax.model.bounds import bits_per_dim
from gapjax.model.vae import Params, VAEParams

Monitor = Callable[[VAEParams], float]


class Curve(NamedTuple):
    """What a run did, epoch by epoch.

    Attributes:
      epoch: number of epochs done, for each entry of `loss_bpd`.
      loss_bpd: mean of the objective over the examples of that epoch, while it trained, in BPD. In
        a run that went on from a `state` in the midst of an epoch, the first mean is over the
        examples since then.
      monitor_epoch: number of epochs done, for each entry of `monitor_bpd`; the first is the start.
      monitor_bpd: the monitored BPD.
    """

    epoch: tuple[int, ...] = ()
    loss_bpd: tuple[float, ...] = ()
    monitor_epoch: tuple[int, ...] = ()
    monitor_bpd: tuple[float, ...] = ()


class Progress(NamedTuple):
    """Where a run is, at any step of an epoch. Given as `resume`, the run continues bit for bit.

    Nothing in it is changed afterwards, except that the arrays of `state` are donated to the next
    compiled call: save or copy them before the loop goes on.

    Attributes:
      state: the state.
      encoders: encoders that a refit keeps, by name: the "best" by the monitor, and the one
        "averaged" over the ends of its epochs. None in `train`.
      curve: what was done so far.
      epoch_nats: sum of the objective over the examples of the current epoch, nats.
      plateaus: number of plateaus so far, see `Convergence`.
      skipped: number of examples at the beginning of the current epoch that `epoch_nats` lacks:
        those of a `state` that was given to `train` in the midst of an epoch.
    """

    state: TrainState
    encoders: dict[str, Params] | None
    curve: Curve
    epoch_nats: float
    plateaus: int
    skipped: int = 0


class Update(NamedTuple):
    """What one compiled call did.

    Attributes:
      epoch: number of epochs done.
      epoch_bpd: if the call ended an epoch, its mean loss in BPD, averaged over the members that
        ran; otherwise None.
      progress: returns the `Progress` of every member. It reads the packed state, so it must be
        called before the loop goes on.
    """

    epoch: int
    epoch_bpd: float | None
    progress: Callable[[], list[Progress]]


class _Record(NamedTuple):
    """A `Progress` without its state, which is packed with those of the other members."""

    encoders: dict[str, Params] | None
    curve: Curve
    epoch_nats: float
    plateaus: int
    skipped: int


class _Measuring(NamedTuple):
    """When and what to measure; see `refit_encoder`."""

    monitors: Sequence[Monitor | None]
    every: int
    until: Convergence | None
    num_epochs: int


def advance(
    executor: Executor,
    runs: Sequence[Progress],
    num_epochs: int,
    *,
    monitors: Sequence[Monitor | None] | None = None,
    monitor_every: int = 1,
    until: Convergence | None = None,
) -> Iterator[Update]:
    """Runs all members up to `num_epochs` epochs, or to their convergence.

    It is a generator: nothing is computed until the next item is asked for.

    Args:
      executor: knows the model, the sources and the devices.
      runs: where each member is. Their states are donated, and are all at the same step, except
        those of members that have converged.
      num_epochs: epochs in all, those before `runs` counted in.
      monitors: measures a BPD, for each member; or None.
      monitor_every: epochs between two measurements.
      until: end a member by this rule.

    Yields:
      An `Update` before the first compiled call, and one after each.

    Raises:
      ValueError: the members are not at the same step.
      NotFiniteError: the loss or a parameter became NaN or infinite.
    """
    measuring = _Measuring(monitors or [None] * len(runs), monitor_every, until, num_epochs)
    is_active = lambda record: until is None or not plateau.is_finished(until, record.plateaus)
    step = _common_step(runs, list(map(is_active, runs)))
    records = [_start(*pair) for pair in zip(runs, measuring.monitors, strict=True)]
    packed = executor.pack([run.state for run in runs])
    del runs
    yield _update(executor, records, packed, step // executor.num_steps, None)
    while step < num_epochs * executor.num_steps:
        active = list(map(is_active, records))
        if not any(active):
            return
        length = min(executor.max_steps, executor.num_steps - step % executor.num_steps)
        packed, sums, finite = executor.run(packed, active, length)
        check_finite(sums, finite, active, step, executor.num_steps)
        step += length
        records = list(map(_add_nats, records, sums))
        epoch_bpd = None
        if step % executor.num_steps == 0:
            epoch = step // executor.num_steps
            records, packed = _end_epoch(executor, records, packed, active, epoch, measuring)
            losses = [r.curve.loss_bpd[-1] for r, on in zip(records, active, strict=True) if on]
            epoch_bpd = sum(losses) / len(losses)
        yield _update(executor, records, packed, step // executor.num_steps, epoch_bpd)


def check_finite(
    sums: np.ndarray, finite: np.ndarray, active: Sequence[bool], step: int, num_steps: int
) -> None:
    """Raises NotFiniteError where an active member's loss or parameters are not finite.

    Args:
      sums: [R, length], sum of the objective of each step, nats.
      finite: [R], whether all parameters are finite after these steps.
      active: [R], which members to check.
      step: number of steps before these.
      num_steps: steps in an epoch.
    """
    for index, on in enumerate(active):
        if not on:
            continue
        bad = np.flatnonzero(~np.isfinite(sums[index]))
        if not len(bad) and finite[index]:
            continue
        last = step + (int(bad[0]) if len(bad) else len(sums[index]) - 1)
        what = f"the loss is {-sums[index][bad[0]]}" if len(bad) else "a parameter is not finite"
        member = f" of run {index + 1} of the sweep" if len(active) > 1 else ""
        where = f"{what} in epoch {last // num_steps + 1}, step {last % num_steps + 1}{member}"
        raise NotFiniteError(where, index, last)


def _common_step(runs: Sequence[Progress], active: Sequence[bool]) -> int:
    """The step of the members that are still active, or of all where none is."""
    number = lambda run: int(run.state.step)
    found = {number(run) for run, on in zip(runs, active, strict=True) if on or not any(active)}
    if len(found) > 1:
        raise ValueError(f"the runs of a sweep are at steps {sorted(found)}, not at one")
    return found.pop()


def _start(run: Progress, monitor: Monitor | None) -> _Record:
    """The record of a run, with a measurement of its start."""
    curve = Curve(  # JSON gives lists back
        epoch=tuple(run.curve.epoch),
        loss_bpd=tuple(run.curve.loss_bpd),
        monitor_epoch=tuple(run.curve.monitor_epoch),
        monitor_bpd=tuple(run.curve.monitor_bpd),
    )
    record = _Record(run.encoders, curve, run.epoch_nats, run.plateaus, run.skipped)
    if monitor is None or record.curve.monitor_epoch:
        return record
    return record._replace(curve=_measured(record.curve, 0, monitor(run.state.params)))


def _update(
    executor: Executor, records: list[_Record], packed: Packed, epoch: int, epoch_bpd: float | None
) -> Update:
    def progress() -> list[Progress]:
        states = executor.unpack(packed)
        return [Progress(s, *record) for s, record in zip(states, records, strict=True)]

    return Update(epoch, epoch_bpd, progress)


def _add_nats(record: _Record, sums: np.ndarray) -> _Record:
    total = record.epoch_nats
    for value in sums.tolist():  # one by one, so that the length of a call does not change the sum
        total += value
    return record._replace(epoch_nats=total)


def _end_epoch(
    executor: Executor,
    records: list[_Record],
    packed: Packed,
    active: Sequence[bool],
    epoch: int,
    measuring: _Measuring,
) -> tuple[list[_Record], Packed]:
    """The records after an epoch, and the packed state with the learning rates of the rule."""
    states = None  # unpacked only where a refit looks at the parameters
    ended: list[_Record] = []
    factors: list[float] = []
    for record, on, monitor in zip(records, active, measuring.monitors, strict=True):
        factor = 1.0
        if on:
            nats = record.epoch_nats / (executor.num_examples - record.skipped)
            bpd = float(bits_per_dim(nats, executor.event_shape))
            curve = record.curve
            curve = curve._replace(epoch=(*curve.epoch, epoch), loss_bpd=(*curve.loss_bpd, bpd))
            record = record._replace(curve=curve, epoch_nats=0.0, skipped=0)
            if record.encoders is not None:
                states = states or executor.unpack(packed)
                params = states[len(ended)].params
                record, factor = _end_refit_epoch(record, params, monitor, epoch, measuring)
        ended.append(record)
        factors.append(factor)
    if states is not None and any(factor != 1.0 for factor in factors):
        packed = executor.pack(
            [
                state._replace(opt_state=scale_learning_rate(state.opt_state, factor))
                for state, factor in zip(states, factors, strict=True)
            ]
        )
    return ended, packed


def _end_refit_epoch(
    record: _Record, params: VAEParams, monitor: Monitor | None, epoch: int, measuring: _Measuring
) -> tuple[_Record, float]:
    """Averages the encoder and measures where it is due; also returns the rule's factor."""
    assert record.encoders is not None
    encoders = dict(record.encoders)
    encoders["averaged"] = _update_mean(encoders["averaged"], params.encoder, epoch)
    record = record._replace(encoders=encoders)
    due = epoch % measuring.every == 0 or epoch == measuring.num_epochs
    if monitor is None or not due:
        return record, 1.0
    bpd, past = monitor(params), record.curve.monitor_bpd
    record = record._replace(curve=_measured(record.curve, epoch, bpd))
    if measuring.until is None:
        return record, 1.0
    # The rule takes larger values as better; a first measurement is its own best.
    state = PlateauState(-min(past, default=bpd), record.plateaus)
    state, judgement = plateau.judge(measuring.until, state, -bpd)
    if judgement.is_best:
        encoders["best"] = jax.tree.map(jnp.copy, params.encoder)
    return record._replace(plateaus=int(state.num_plateaus)), float(judgement.factor)


def _measured(curve: Curve, epoch: int, bpd: float) -> Curve:
    return curve._replace(
        monitor_epoch=(*curve.monitor_epoch, epoch), monitor_bpd=(*curve.monitor_bpd, bpd)
    )


@jax.jit
def _update_mean(mean: Params, params: Params, count: int) -> Params:
    """The mean of `count` parameters, from that of the first count - 1 and the last."""
    return jax.tree.map(lambda m, p: m + (p - m) / count, mean, params)
