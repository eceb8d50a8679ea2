"""The loop over compiled calls, of one run or of several members in lockstep.

`run_members` keeps the curves, averages, measurements and learning rates. An `Executor` computes
the steps: of one run on all devices, or of members that are divided among them.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gapjax import parallel
from gapjax.examples import event_shape, num_bytes
from gapjax.fit import step as steps
from gapjax.fit.sources import Source, first_example
from gapjax.fit.step import TrainState, run_steps, steps_per_epoch
from gapjax.fit.streams import streams
from gapjax.model.bounds import bits_per_dim
from gapjax.optimizers import Convergence, PlateauState, is_finished, judge, scale_learning_rate
from gapjax.vae import Params, VAEParams

SWEEPS = ("auto", "vmap", "map")
# Most steps, and bytes of examples, of all members together in one compiled call.
_CHUNK_STEPS, _CHUNK_BYTES = 512, 2**27

Packed = Any  # a TrainState in the layout of the devices
Monitor = Callable[[VAEParams], float]
OnEpoch = Callable[[int, float], None]


class Curve(NamedTuple):
    """What a run did, epoch by epoch."""

    epoch: tuple[int, ...] = ()  # number of epochs done, for each entry of `loss_bpd`
    # mean of the objective over the examples of that epoch, while it trained, in BPD; over those
    # since `state`, if that was in the midst of the epoch
    loss_bpd: tuple[float, ...] = ()
    # number of epochs done, for each entry of `monitor_bpd`; the first is the start
    monitor_epoch: tuple[int, ...] = ()
    monitor_bpd: tuple[float, ...] = ()  # the monitored BPD


class Progress(NamedTuple):
    """Where a run is, at any step of an epoch. Given as `resume`, the run continues bit for bit.

    Nothing in it is changed afterwards, except that the arrays of `state` are donated to the next
    compiled call: save or copy them before the loop goes on.

    Attributes:
      encoders: what a refit keeps: the "best" by the monitor, and the one "averaged" over the ends
        of its epochs. None in `train`.
      curve: what was done so far.
      epoch_nats: sum of the objective over the examples of the current epoch, nats.
      plateaus: number of plateaus so far, see `Convergence`.
      skipped: number of examples at the beginning of the current epoch that `epoch_nats` lacks.
    """

    state: TrainState
    encoders: dict[str, Params] | None
    curve: Curve
    epoch_nats: float
    plateaus: int
    skipped: int = 0


class Measuring(NamedTuple):
    """When and what to measure of each member, and when one ends; see `refit_members`."""

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
    starts = zip(begin, measuring.monitors, strict=True)
    members = [_measured_start(start(), monitor) for start, monitor in starts]
    is_active = lambda member: until is None or not is_finished(until, member.plateaus)
    step = _common_step([member for member in members if is_active(member)])
    packed = executor.pack([member.state for member in members])  # those of `members` are stale now

    def progress() -> list[Progress]:
        pairs = zip(members, executor.unpack(packed), strict=True)
        return [member._replace(state=state) for member, state in pairs]

    while step < num_epochs * num_steps:
        active = list(map(is_active, members))
        if not any(active):
            break
        length = min(executor.max_steps, num_steps - step % num_steps)
        packed, sums, finite = executor.run(packed, active, length, step)
        _check_finite(executor, begin, sums, finite, active, step)
        step += length
        members = [
            # one by one, so that the length of a call does not change the sum
            member._replace(epoch_nats=functools.reduce(operator.add, each, member.epoch_nats))
            for member, each in zip(members, sums.tolist(), strict=True)
        ]
        if step % num_steps == 0:
            epoch = step // num_steps
            due = epoch % measuring.every == 0 or epoch == num_epochs
            monitors = measuring.monitors if due else [None] * len(members)
            members, packed = _end_epoch(executor, members, packed, active, epoch, monitors, until)
            losses = [m.curve.loss_bpd[-1] for m, on in zip(members, active, strict=True) if on]
            if on_epoch is not None:
                on_epoch(epoch, sum(losses) / len(losses))
        if on_chunk is not None:
            on_chunk(progress())
    return progress()


def _common_step(active: Sequence[Progress]) -> int:
    """The step of the members that are still active; 0 where none is."""
    found = {int(member.state.step) for member in active}
    if len(found) > 1:
        raise ValueError(f"resume: the members are at steps {sorted(found)}; resume each by itself")
    return min(found, default=0)


def _measured_start(member: Progress, monitor: Monitor | None) -> Progress:
    """A member with a measurement of its start."""
    member = member._replace(curve=Curve._make(map(tuple, member.curve)))  # JSON gives lists back
    if monitor is None or member.curve.monitor_epoch:
        return member
    return _measured(member, member.state.params, monitor, 0, None)[0]


def _measured(
    member: Progress, params: VAEParams, monitor: Monitor, epoch: int, until: Convergence | None
) -> tuple[Progress, float]:
    """A member with a measurement, and the rule's factor on the learning rate."""
    curve, bpd = member.curve, monitor(params)
    past = curve.monitor_bpd
    curve = curve._replace(monitor_epoch=(*curve.monitor_epoch, epoch), monitor_bpd=(*past, bpd))
    member = member._replace(curve=curve)
    if until is None:
        return member, 1.0
    # The rule takes larger values as better.
    state, judgement = judge(until, PlateauState(-best_bpd(past), member.plateaus), -bpd)
    if judgement.is_best:
        best = parallel.copy(params.encoder)
        member = member._replace(encoders={**(member.encoders or {}), "best": best})
    return member._replace(plateaus=int(state.num_plateaus)), float(judgement.factor)


def _end_epoch(
    executor: Executor,
    members: list[Progress],
    packed: Packed,
    active: Sequence[bool],
    epoch: int,
    monitors: Sequence[Monitor | None],
    until: Convergence | None,
) -> tuple[list[Progress], Packed]:
    """The members after an epoch, and the packed state with the learning rates of the rule."""
    is_refit = members[0].encoders is not None  # which looks at the parameters
    states = executor.unpack(packed) if is_refit else []
    members, factors = list(members), [1.0] * len(members)
    for index in np.flatnonzero(active).tolist():
        member, curve = members[index], members[index].curve
        nats = member.epoch_nats / (executor.num_examples - member.skipped)
        bpd = float(bits_per_dim(nats, executor.event_shape))
        curve = curve._replace(epoch=(*curve.epoch, epoch), loss_bpd=(*curve.loss_bpd, bpd))
        member = member._replace(curve=curve, epoch_nats=0.0, skipped=0)
        if is_refit:
            params, monitor = states[index].params, monitors[index]
            encoders = dict(member.encoders or {})
            mean = _update_mean.on()(encoders["averaged"], params.encoder, epoch)
            member = member._replace(encoders={**encoders, "averaged": mean})
            if monitor is not None:
                member, factors[index] = _measured(member, params, monitor, epoch, until)
        members[index] = member
    if any(factor != 1.0 for factor in factors):
        states = [
            state._replace(opt_state=scale_learning_rate(state.opt_state, factor))
            for state, factor in zip(states, factors, strict=True)
        ]
        packed = executor.pack(states)
    return members, packed


def best_bpd(measured: Sequence[float]) -> float:
    """The lowest of the measurements that are numbers; infinite where none is."""
    return min((bpd for bpd in measured if not math.isnan(bpd)), default=math.inf)


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
            f"run started from, {executor.explain(index, begin[index]().state, last)}"
        )


class Executor:
    """Runs the steps of R members; one alone is a run whose batches all devices share.

    An array that all sources share is kept once. `static` are the constants of `run_steps`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        devices: parallel.Devices | None = None,
        sweep: str = "auto",
        **static: Any,
    ):
        if sweep not in SWEEPS:
            raise ValueError(f"sweep is {sweep!r}; it must be one of {', '.join(SWEEPS)}")
        batch_size = static["batch_size"]
        self.sources = sources
        self.num_examples = sources[0].num_examples
        steps.check_batch_size(batch_size, self.num_examples)
        self.num_steps = steps_per_epoch(self.num_examples, batch_size)
        example = jax.eval_shape(first_example, sources[0])
        self.event_shape = event_shape(example)
        step_bytes = batch_size * num_bytes(example)
        self.max_steps = _steps_per_call(self.num_steps, len(sources), step_bytes)
        self._static = static
        self._devices = parallel.all_devices(devices)
        if len(sources) > 1:  # each of several processes computes all members
            self._devices = parallel.local_devices(self._devices)
            auto = "vmap" if parallel.is_accelerated(self._devices) else "map"
            self._static["sweep"] = auto if sweep == "auto" else sweep
        self._placed = None if streams(sources) else self._place(sources)

    def _place(self, sources: Sequence[Source]) -> tuple[Any, Any, Any]:
        """What varies of the sources and what they share, on the devices; of one, that alone."""
        if len(sources) == 1:
            return parallel.replicate(sources[0], self._devices), None, None
        varying, shared, treedef = _stack_sources(sources)
        varying = parallel.split_members(varying, self._devices)
        return varying, parallel.replicate(shared, self._devices), treedef

    def pack(self, states: Sequence[TrainState]) -> Packed:
        """R states in the layout of the devices."""
        if len(states) == 1:
            return parallel.replicate(states[0], self._devices)
        _check_alike("states", states)
        return parallel.split_members(parallel.stack.on()(*states), self._devices)

    def unpack(self, packed: Packed) -> list[TrainState]:
        """The inverse of `pack`."""
        number = len(self.sources)
        if number == 1:
            return [parallel.unreplicate(packed)]
        return list(parallel.unstack.on()(parallel.join_members(packed, number, self._devices)))

    def run(
        self, packed: Packed, active: Sequence[bool], num_steps: int, step: int
    ) -> tuple[Packed, np.ndarray, np.ndarray]:
        """One compiled call: the steps after `step` of every member that is active.

        Also returns the sum of the objective over the examples of each step [R, num_steps], nats,
        and whether every parameter is finite [R].
        """
        size = self._static["batch_size"]
        load = lambda *pair: steps.load_steps(pair[0], pair[1], step, num_steps, size)
        placed = self._placed or self._place(list(map(load, self.sources, self.unpack(packed))))
        varying, shared, treedef = placed
        if len(self.sources) == 1:
            program = run_steps.on(self._devices, **self._static, num_steps=num_steps)
            packed, sums, finite = program(packed, varying)
            sums, finite = parallel.unreplicate((sums, finite))
            return packed, np.asarray(sums)[None], np.asarray(finite)[None]
        static = {**self._static, "treedef": treedef, "num_steps": num_steps}
        program = _steps_of_members.on(self._devices, **static)
        mask = parallel.split_members(jnp.asarray(active), self._devices)
        packed, *out = program(packed, (varying, mask), shared)
        sums, finite = parallel.join_members(out, len(self.sources), self._devices)
        return packed, np.asarray(sums), np.asarray(finite)

    def explain(self, member: int, state: TrainState, step: int) -> str:
        """What is not finite of a member's batch at a step, with the parameters of `state`."""
        state = state._replace(step=jnp.asarray(step, jnp.int32))
        static, source = self._static, self.sources[member]
        return steps.explain_step(
            static["vae"], static["objective"], source, state, static["batch_size"]
        )


@parallel.donating_members
def _steps_of_members(
    states: TrainState, split: tuple, shared: dict, *, sweep: str, treedef: Any, num_steps: int,
    **static: Any,
) -> tuple:  # fmt: skip
    """`run_steps` of stacked members; `split` is what varies of their sources, and who is on."""

    def one(state: TrainState, varying: dict) -> tuple:
        leaves = {**varying, **shared}
        source = jax.tree.unflatten(treedef, [leaves[number] for number in range(len(leaves))])
        return run_steps.function(parallel.WHOLE, state, source, num_steps=num_steps, **static)

    def unless_converged(xs: tuple) -> tuple:
        state, varying, active = xs
        skip = lambda state: (state, jnp.zeros(num_steps), jnp.asarray(True))
        return jax.lax.cond(active, lambda state: one(state, varying), skip, state)

    varying, active = split
    if sweep == "vmap":  # under vmap a cond computes both branches, so it would save nothing
        return jax.vmap(one)(states, varying)
    return jax.lax.map(unless_converged, (states, varying, active))


def _stack_sources(sources: Sequence[Source]) -> tuple[dict, dict, Any]:
    """The leaves that differ, stacked [R, ...], and those that all share; by leaf number."""
    _check_alike("sources", sources)
    leaves, treedefs = zip(*map(jax.tree.flatten, sources), strict=True)
    columns = enumerate(zip(*leaves, strict=True))
    shared = {n: each[0] for n, each in columns if all(leaf is each[0] for leaf in each)}
    varying = [{n: leaf for n, leaf in enumerate(own) if n not in shared} for own in leaves]
    return parallel.stack.on()(*varying), shared, treedefs[0]


def _check_alike(name: str, trees: Sequence[Any]) -> None:
    """Raises ValueError where trees differ in more than the values of their arrays."""
    kind = lambda leaf: (jnp.shape(leaf), getattr(leaf, "dtype", None))
    kinds = [(treedef, list(map(kind, each))) for each, treedef in map(jax.tree.flatten, trees)]
    if any(each != kinds[0] for each in kinds):
        raise ValueError(f"the {name} of a sweep differ in more than the values of their arrays")


def _steps_per_call(num_steps: int, num_members: int, step_bytes: int) -> int:
    """Steps in a compiled call: a divisor of the epoch's steps where a large one exists."""
    most = max(1, min(_CHUNK_STEPS, _CHUNK_BYTES // step_bytes) // num_members)
    even = max(length for length in range(1, most + 1) if num_steps % length == 0)
    return even if even >= most // 4 else most
