"""The loop over compiled calls: curves, averages, measurements and learning rates of each run.

`run_members` drives one run or several in lockstep; an `Executor` computes their steps.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gapjax import parallel
from gapjax.fit.executor import Executor, Packed
from gapjax.fit.sources import draw_examples
from gapjax.fit.step import TrainState, batch_keys
from gapjax.model.bounds import bits_per_dim
from gapjax.model.checks import explain
from gapjax.optimizers import Convergence, PlateauState, is_finished, judge, scale_learning_rate
from gapjax.vae import Params, VAEParams

Monitor = Callable[[VAEParams], float]
OnEpoch = Callable[[int, float], None]


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


class Measuring(NamedTuple):
    """When and what to measure of each member, and when one ends; see `refit_encoder`."""

    monitors: Sequence[Monitor | None]
    every: int = 1
    until: Convergence | None = None


def run_members(
    executor: Executor,
    begin: Sequence[Callable[[], Progress]],
    num_epochs: int,
    measuring: Measuring,
    on_epoch: OnEpoch | None = None,
    on_chunk: Callable[[list[Progress]], None] | None = None,
) -> list[Progress]:
    """Runs all members up to `num_epochs` epochs, or to their convergence.

    `begin` makes the progress that each starts from, all at one step, except those that have
    converged. It is called again where a loss is not finite, to find out why.
    """
    until, num_steps = measuring.until, executor.num_steps
    members = [
        _measured(start(), mon) for start, mon in zip(begin, measuring.monitors, strict=True)
    ]
    is_active = lambda member: until is None or not is_finished(until, member.plateaus)
    step = _common_step(members, list(map(is_active, members)))
    packed = executor.pack([member.state for member in members])  # those of `members` are stale now
    while step < num_epochs * num_steps:
        active = list(map(is_active, members))
        if not any(active):
            break
        length = min(executor.max_steps, num_steps - step % num_steps)
        packed, sums, finite = executor.run(packed, active, length)
        _check_finite(executor, begin, sums, finite, active, step)
        step += length
        members = list(map(_add_nats, members, sums))
        if step % num_steps == 0:
            epoch = step // num_steps
            due = epoch % measuring.every == 0 or epoch == num_epochs
            members, packed = _end_epoch(executor, members, packed, active, epoch, measuring, due)
            losses = [m.curve.loss_bpd[-1] for m, on in zip(members, active, strict=True) if on]
            if on_epoch is not None:
                on_epoch(epoch, sum(losses) / len(losses))
        if on_chunk is not None:
            on_chunk(_unpacked(executor, members, packed))
    return _unpacked(executor, members, packed)


def _unpacked(executor: Executor, members: list[Progress], packed: Packed) -> list[Progress]:
    states = executor.unpack(packed)
    return [member._replace(state=state) for member, state in zip(members, states, strict=True)]


def _common_step(members: Sequence[Progress], active: Sequence[bool]) -> int:
    """The step of the members that are still active, or of all where none is."""
    step = lambda member: int(member.state.step)
    found = {step(m) for m, on in zip(members, active, strict=True) if on or not any(active)}
    if len(found) > 1:
        raise ValueError(f"the runs of a sweep are at steps {sorted(found)}, not at one")
    return found.pop()


def _measured(member: Progress, monitor: Monitor | None) -> Progress:
    """A member with a measurement of its start."""
    curve = Curve._make(map(tuple, member.curve))  # JSON gives lists back
    if monitor is not None and not curve.monitor_epoch:
        curve = _add_measurement(curve, 0, monitor(member.state.params))
    return member._replace(curve=curve)


def _add_nats(member: Progress, sums: np.ndarray) -> Progress:
    total = member.epoch_nats
    for value in sums.tolist():  # one by one, so that the length of a call does not change the sum
        total += value
    return member._replace(epoch_nats=total)


def _end_epoch(
    executor: Executor,
    members: list[Progress],
    packed: Packed,
    active: Sequence[bool],
    epoch: int,
    measuring: Measuring,
    due: bool,
) -> tuple[list[Progress], Packed]:
    """The members after an epoch, and the packed state with the learning rates of the rule."""
    states = None  # unpacked only where a refit looks at the parameters
    ended: list[Progress] = []
    factors: list[float] = []
    for member, on, monitor in zip(members, active, measuring.monitors, strict=True):
        factor = 1.0
        if on:
            nats = member.epoch_nats / (executor.num_examples - member.skipped)
            bpd = float(bits_per_dim(nats, executor.event_shape))
            curve = member.curve
            curve = curve._replace(epoch=(*curve.epoch, epoch), loss_bpd=(*curve.loss_bpd, bpd))
            member = member._replace(curve=curve, epoch_nats=0.0, skipped=0)
            if member.encoders is not None:
                states = states or executor.unpack(packed)
                params = states[len(ended)].params
                monitor = monitor if due else None
                member, factor = _end_refit_epoch(member, params, monitor, epoch, measuring.until)
        ended.append(member)
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
    member: Progress,
    params: VAEParams,
    monitor: Monitor | None,
    epoch: int,
    until: Convergence | None,
) -> tuple[Progress, float]:
    """Averages the encoder and measures; also returns the rule's factor on the learning rate."""
    encoders = dict(member.encoders or {})
    encoders["averaged"] = _update_mean.on()(encoders["averaged"], params.encoder, epoch)
    member = member._replace(encoders=encoders)
    if monitor is None:
        return member, 1.0
    bpd, past = monitor(params), member.curve.monitor_bpd
    member = member._replace(curve=_add_measurement(member.curve, epoch, bpd))
    if until is None:
        return member, 1.0
    # The rule takes larger values as better; a first measurement is its own best.
    state, judgement = judge(until, PlateauState(-min(past, default=bpd), member.plateaus), -bpd)
    if judgement.is_best:
        encoders["best"] = jax.tree.map(jnp.copy, params.encoder)
    return member._replace(plateaus=int(state.num_plateaus)), float(judgement.factor)


def _add_measurement(curve: Curve, epoch: int, bpd: float) -> Curve:
    return curve._replace(
        monitor_epoch=(*curve.monitor_epoch, epoch), monitor_bpd=(*curve.monitor_bpd, bpd)
    )


@parallel.on_one_device
def _update_mean(mean: Params, params: Params, count: int) -> Params:
    """The mean of `count` parameters, from that of the first count - 1 and the last."""
    return jax.tree.map(lambda m, p: m + (p - m) / count, mean, params)


def _check_finite(
    executor: Executor,
    begin: Sequence[Callable[[], Progress]],
    sums: np.ndarray,
    finite: np.ndarray,
    active: Sequence[bool],
    step: int,
) -> None:
    """Raises FloatingPointError where an active member's loss or parameters are not finite.

    `sums` [R, length] are those of the objective of each step after `step`, nats; `finite` [R]
    whether all parameters are finite after these.
    """
    for index, on in enumerate(active):
        bad = np.flatnonzero(~np.isfinite(sums[index]))
        if not on or (not len(bad) and finite[index]):
            continue
        last = step + (int(bad[0]) if len(bad) else len(sums[index]) - 1)
        what = f"the loss is {-sums[index][bad[0]]}" if len(bad) else "a parameter is not finite"
        member = f" of run {index + 1} of the sweep" if len(active) > 1 else ""
        epoch, number = divmod(last, executor.num_steps)
        raise FloatingPointError(
            f"{what} in epoch {epoch + 1}, step {number + 1}{member}; with the parameters that the "
            f"run started from, {_reason(executor, index, begin[index]().state, last)}"
        )


def _reason(executor: Executor, member: int, state: TrainState, step: int) -> str:
    """What is not finite of the batch of a step, with the parameters of this state."""
    source, vae, objective = executor.sources[member], executor.vae, executor.objective
    plan_key, positions, draw_keys, objective_keys = batch_keys(
        state._replace(step=jnp.asarray(step, jnp.int32)), executor.num_examples,
        executor.batch_size,
    )  # fmt: skip
    x = draw_examples(source, source.begin_epoch(plan_key), draw_keys, positions)
    of_all = lambda params: jax.vmap(
        lambda key, one: objective(vae, params, key, one)
    )(objective_keys, x)  # fmt: skip
    bad = np.flatnonzero(~np.isfinite(np.asarray(of_all(state.params))))
    if len(bad):
        index = int(bad[0])
        found = explain(vae, state.params, objective_keys[index], x[index])
        return (
            f"the objective of example {positions[index]} of the epoch is not finite: "
            f"{found or 'no part of the bound is at fault'}"
        )
    gradient = jax.grad(lambda params: of_all(params).sum())(state.params)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)):
        return "the gradient of the objective is not finite on this batch"
    return "this batch is finite"
