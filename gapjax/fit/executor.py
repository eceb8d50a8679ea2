"""How steps run on the devices: one run on all of them, or members divided among them in lockstep.

States are packed once into the layout of the devices, `run` advances the packed state by one
compiled call, and states are unpacked where something looks at them. The packed state is donated: a
call uses up the arrays that it is given.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gapjax import parallel
from gapjax.fit.sources import Source, first_example
from gapjax.fit.step import (
    Objective,
    TrainState,
    check_batch_size,
    run_steps,
    steps_per_epoch,
)
from gapjax.vae import VAE

SWEEPS = ("auto", "vmap", "map")
# Most steps, and bytes of examples, of all members together in one compiled call.
_CHUNK_STEPS, _CHUNK_BYTES = 512, 2**27

Packed = Any  # a TrainState in the layout of the devices


class Executor:
    """Runs the steps of R members; one run is a member whose batches all devices share.

    The sources differ in the values of their arrays alone; an array that all of them share is kept
    once. `sweep`, one of `SWEEPS`, says how a device computes its members.
    """

    def __init__(
        self,
        vae: VAE,
        sources: Sequence[Source],
        optimizer: optax.GradientTransformation,
        *,
        batch_size: int,
        objective: Objective,
        devices: parallel.Devices | None,
        sweep: str = "auto",
    ):
        if sweep not in SWEEPS:
            raise ValueError(f"sweep is {sweep!r}; it must be one of {', '.join(SWEEPS)}")
        self.vae, self.sources = vae, sources
        self.batch_size, self.objective = batch_size, objective
        self.num_examples = sources[0].num_examples
        check_batch_size(batch_size, self.num_examples)
        self.num_steps = steps_per_epoch(self.num_examples, batch_size)
        example = jax.eval_shape(first_example, sources[0])
        self.event_shape = example.shape
        step_bytes = batch_size * example.size * example.dtype.itemsize
        self.max_steps = _steps_per_call(self.num_steps, len(sources), step_bytes)
        self._static = {
            "vae": vae, "optimizer": optimizer, "batch_size": batch_size, "objective": objective
        }  # fmt: skip
        self._devices = parallel.all_devices(devices)
        if len(sources) == 1:
            self._source = parallel.replicate(sources[0], self._devices)
            return
        # Each of several processes computes all members.
        self._devices = parallel.local_devices(self._devices)
        if sweep == "auto":
            sweep = "vmap" if parallel.is_accelerated(self._devices) else "map"
        varying, shared, treedef = _stack_sources(sources)
        self._varying = parallel.split_members(varying, self._devices)
        self._shared = parallel.replicate(shared, self._devices)
        self._static |= {"sweep": sweep, "treedef": treedef}

    def pack(self, states: Sequence[TrainState]) -> Packed:
        """R states in the layout of the devices."""
        if len(states) == 1:
            return parallel.replicate(states[0], self._devices)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        return parallel.split_members(stacked, self._devices)

    def unpack(self, packed: Packed) -> list[TrainState]:
        """The inverse of `pack`."""
        number = len(self.sources)
        if number == 1:
            return [parallel.unreplicate(packed)]
        stacked = parallel.join_members(packed, number, self._devices)
        return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(number)]

    def run(
        self, packed: Packed, active: Sequence[bool], num_steps: int
    ) -> tuple[Packed, np.ndarray, np.ndarray]:
        """One compiled call: the next steps of every member that is active.

        Returns:
          The packed state; the sum of the objective over the examples of each step [R, num_steps],
          nats; whether every parameter is finite [R].
        """
        if len(self.sources) == 1:
            program = run_steps.on(self._devices, **self._static, num_steps=num_steps)
            packed, sums, finite = program(packed, self._source)
            sums, finite = parallel.unreplicate((sums, finite))
            return packed, np.asarray(sums)[None], np.asarray(finite)[None]
        program = _run_members.on(self._devices, **self._static, num_steps=num_steps)
        mask = parallel.split_members(jnp.asarray(active), self._devices)
        packed, *out = program(packed, (self._varying, mask), self._shared)
        sums, finite = parallel.join_members(out, len(self.sources), self._devices)
        return packed, np.asarray(sums), np.asarray(finite)


@parallel.donating_members
def _run_members(
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


def _steps_per_call(num_steps: int, num_members: int, step_bytes: int) -> int:
    """Steps in a compiled call: a divisor of the epoch's steps where a large one exists."""
    most = max(1, min(_CHUNK_STEPS, _CHUNK_BYTES // step_bytes) // num_members)
    if num_steps <= most:
        return num_steps
    even = max(length for length in range(1, most + 1) if num_steps % length == 0)
    return even if even >= most // 4 else most
