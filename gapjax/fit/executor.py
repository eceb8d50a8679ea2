"""How steps run on the devices: one data-parallel run, or the members of a sweep in lockstep.

An `Executor` hides the layout of the arrays. States are packed once, `run` advances the packed
state by one compiled call, and states are unpacked where something looks at them. The packed
state is donated: a call uses up the arrays that it is given.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gapjax import parallel
from gapjax.fit import steps
from gapjax.fit.checks import first_example
from gapjax.fit.sources import Source
from gapjax.fit.steps import Objective, TrainState
from gapjax.model.vae import VAE

SWEEPS = ("auto", "vmap", "map")
# Most steps, and bytes of examples, of all members together in one compiled call.
_CHUNK_STEPS, _CHUNK_BYTES = 512, 2**27
# Compiled programs that are kept. An experiment needs a few for each device that it uses.
_MAX_PROGRAMS = 64

Packed = Any  # a TrainState in the layout of the devices


class Executor(NamedTuple):
    """Runs steps of one run, or of R members of a sweep; see `make_executor`.

    Attributes:
      num_members: R; 1 for one run.
      num_examples: examples in an epoch.
      num_steps: steps in an epoch.
      max_steps: most steps in one call.
      event_shape: of one example.
      pack: `pack(states) -> packed`, from R states.
      unpack: `unpack(packed) -> states`, the inverse.
      run: `run(packed, active, num_steps) -> (packed, sums [R, num_steps], finite [R])`, one
        compiled call: the next steps of every member that is active, the sum of the objective
        over the examples of each step (nats), and whether every parameter is finite.
    """

    num_members: int
    num_examples: int
    num_steps: int
    max_steps: int
    event_shape: tuple[int, ...]
    pack: Callable[[Sequence[TrainState]], Packed]
    unpack: Callable[[Packed], list[TrainState]]
    run: Callable[[Packed, Sequence[bool], int], tuple[Packed, np.ndarray, np.ndarray]]


def make_executor(
    vae: VAE,
    sources: Sequence[Source],
    optimizer: optax.GradientTransformation,
    *,
    batch_size: int,
    objective: Objective,
    devices: parallel.Devices | None,
    sweep: str,
) -> Executor:
    """An executor for as many members as there are sources.

    Args:
      vae: the model.
      sources: one for each member. They differ in the values of their arrays alone; an array that
        all of them share is kept once.
      optimizer: optax transformation over `VAEParams`.
      batch_size: examples in a step.
      objective: per-example objective, in nats.
      devices: on which to run; all by default.
      sweep: how a device computes its members, one of `SWEEPS`.

    Returns:
      An `Executor`.

    Raises:
      ValueError: a size that does not fit, an unknown `sweep`, or sources that differ in more
        than the values of their arrays.
    """
    num_examples = sources[0].num_examples
    steps.check_batch_size(batch_size, num_examples)
    if sweep not in SWEEPS:
        raise ValueError(f"sweep is {sweep!r}; it must be one of {', '.join(SWEEPS)}")
    make = _one_run if len(sources) == 1 else functools.partial(_many_runs, sweep=sweep)
    constants = (vae, optimizer, batch_size, objective)
    pack, unpack, run = make(sources, constants, parallel.all_devices(devices))
    example = jax.eval_shape(first_example, sources[0])
    num_steps = steps.steps_per_epoch(num_examples, batch_size)
    step_bytes = batch_size * example.size * example.dtype.itemsize
    return Executor(
        num_members=len(sources),
        num_examples=num_examples,
        num_steps=num_steps,
        max_steps=_steps_per_call(num_steps, len(sources), step_bytes),
        event_shape=example.shape,
        pack=pack,
        unpack=unpack,
        run=run,
    )


def _one_run(
    sources: Sequence[Source], constants: tuple, devices: tuple[parallel.Device, ...]
) -> tuple:
    """(pack, unpack, run) of one run, whose batches are divided among the devices."""
    source = parallel.replicate(sources[0], devices)

    def run(packed: Packed, active: Sequence[bool], num_steps: int) -> tuple:
        del active  # it is the only one
        program = _one_run_program(*constants, num_steps, devices)
        packed, sums, finite = program(packed, source)
        sums, finite = parallel.unreplicate((sums, finite))
        return packed, np.asarray(sums)[None], np.asarray(finite)[None]

    pack = lambda states: parallel.replicate(states[0], devices)
    unpack = lambda packed: [parallel.unreplicate(packed)]
    return pack, unpack, run


def _many_runs(
    sources: Sequence[Source], constants: tuple, devices: tuple[parallel.Device, ...], *, sweep: str
) -> tuple:
    """(pack, unpack, run) of a sweep, whose members are divided among the devices."""
    devices = parallel.local_devices(devices)  # each of several processes computes all members
    if sweep == "auto":
        sweep = "vmap" if parallel.is_accelerated(devices) else "map"
    varying, shared, treedef = _stack_sources(sources)
    varying = parallel.split_members(varying, devices)
    shared = parallel.replicate(shared, devices)
    num_members = len(sources)

    def pack(states: Sequence[TrainState]) -> Packed:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        return parallel.split_members(stacked, devices)

    def unpack(packed: Packed) -> list[TrainState]:
        stacked = parallel.join_members(packed, num_members, devices)
        member = lambda index: jax.tree.map(lambda leaf: leaf[index], stacked)
        return [member(index) for index in range(num_members)]

    def run(packed: Packed, active: Sequence[bool], num_steps: int) -> tuple:
        program = _many_runs_program(*constants, num_steps, devices, sweep, treedef)
        mask = parallel.split_members(jnp.asarray(active), devices)
        packed, *out = program(packed, (varying, mask), shared)
        sums, finite = parallel.join_members(out, num_members, devices)
        return packed, np.asarray(sums), np.asarray(finite)

    return pack, unpack, run


# The cached programs hold the model and the optimizer for which they were compiled. The bound
# lets those of optimizers that are made anew for every refit be freed.
@functools.lru_cache(_MAX_PROGRAMS)
def _one_run_program(
    vae: VAE,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    objective: Objective,
    num_steps: int,
    devices: tuple[parallel.Device, ...],
) -> Callable[..., Any]:
    """The compiled program of these constants; equal constants give the same one."""
    return parallel.data_parallel(
        _steps_of(vae, optimizer, batch_size, objective, num_steps), devices
    )


@functools.lru_cache(_MAX_PROGRAMS)
def _many_runs_program(
    vae: VAE,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    objective: Objective,
    num_steps: int,
    devices: tuple[parallel.Device, ...],
    sweep: str,
    treedef: Any,
) -> Callable[..., Any]:
    """The same of a sweep; `treedef` is that of its sources."""
    one = _steps_of(vae, optimizer, batch_size, objective, num_steps)

    def member(state, varying, active, shared):
        source = _merge_source(varying, shared, treedef)
        if sweep == "vmap":  # under vmap a cond computes both branches, so it would save nothing
            return one(parallel.WHOLE, state, source)
        skip = lambda state: (state, jnp.zeros(num_steps), jnp.asarray(True))
        return jax.lax.cond(active, lambda state: one(parallel.WHOLE, state, source), skip, state)

    def sweep_steps(states, split, shared):
        varying, active = split
        if sweep == "vmap":
            return jax.vmap(member, in_axes=(0, 0, 0, None))(states, varying, active, shared)
        return jax.lax.map(
            lambda xs: member(xs[0], xs[1], xs[2], shared), (states, varying, active)
        )

    return parallel.member_parallel(sweep_steps, devices)


def _steps_of(vae, optimizer, batch_size, objective, num_steps) -> Callable[..., Any]:
    return functools.partial(
        steps.run_steps, vae=vae, optimizer=optimizer, batch_size=batch_size, objective=objective,
        num_steps=num_steps,
    )  # fmt: skip


def _stack_sources(sources: Sequence[Source]) -> tuple[dict, dict, Any]:
    """The leaves that differ, stacked [R, ...], and those that all share; by leaf number."""
    leaves, treedefs = zip(*map(jax.tree.flatten, sources), strict=True)
    shapes = [[jnp.shape(leaf) for leaf in each] for each in leaves]
    if any(t != treedefs[0] for t in treedefs) or any(s != shapes[0] for s in shapes):
        raise ValueError("the sources of a sweep differ in more than the values of their arrays")
    varying, shared = {}, {}
    for number, each in enumerate(zip(*leaves, strict=True)):
        if all(leaf is each[0] for leaf in each):
            shared[number] = each[0]
        else:
            varying[number] = jnp.stack(each)
    return varying, shared, treedefs[0]


def _merge_source(varying: dict, shared: dict, treedef: Any) -> Source:
    leaves = {**varying, **shared}
    return jax.tree.unflatten(treedef, [leaves[number] for number in range(len(leaves))])


def _steps_per_call(num_steps: int, num_members: int, step_bytes: int) -> int:
    """Steps in a compiled call: a divisor of the epoch's steps where a large one exists."""
    most = max(1, min(_CHUNK_STEPS, _CHUNK_BYTES // step_bytes) // num_members)
    if num_steps <= most:
        return num_steps
    even = max(length for length in range(1, most + 1) if num_steps % length == 0)
    return even if even >= most // 4 else most
