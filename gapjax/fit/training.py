"""Training of the whole VAE.

A sweep is several runs in one compiled program. If `rng_key` is a list of keys (or a tuple, or an
array [R]), a list of results is returned. Any other argument is then either shared by all members
or a list with one entry for each.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Unpack, cast, overload

import jax
import jax.numpy as jnp
import optax

from gapjax import parallel
from gapjax.fit.arguments import OnChunk, OnEpoch, TrainOptions, is_sweep, members
from gapjax.fit.checks import check_arguments, check_run, check_sources
from gapjax.fit.diagnosis import explained
from gapjax.fit.executor import make_executor
from gapjax.fit.loop import Curve, Progress, Update, advance
from gapjax.fit.optimizers import adam
from gapjax.fit.sources import Source
from gapjax.fit.steps import Objective, TrainState, init_state, steps_per_epoch
from gapjax.model.arguments import check_integer
from gapjax.model.bounds import elbo
from gapjax.model.vae import VAE


@overload
def train(
    vae: VAE,
    source: Source,
    rng_key: jax.Array | None = None,
    *,
    num_epochs: int,
    **options: Unpack[TrainOptions],
) -> tuple[TrainState, Curve]: ...


@overload
def train(
    vae: VAE,
    source: Source | Sequence[Source],
    rng_key: Sequence[jax.Array],
    *,
    num_epochs: int,
    **options: Unpack[TrainOptions],
) -> list[tuple[TrainState, Curve]]: ...


def train(
    vae: VAE,
    source: Source | Sequence[Source],
    rng_key: jax.Array | Sequence[jax.Array] | None = None,
    *,
    num_epochs: int,
    batch_size: int = 100,
    optimizer: optax.GradientTransformation | None = None,
    objective: Objective = elbo,
    state: TrainState | Sequence[TrainState] | None = None,
    resume: Progress | Sequence[Progress] | None = None,
    on_epoch: OnEpoch | None = None,
    on_chunk: OnChunk | None = None,
    devices: parallel.Devices | None = None,
    sweep: str = "auto",
) -> tuple[TrainState, Curve] | list[tuple[TrainState, Curve]]:
    """Trains encoder and decoder together on `source`.

    Args:
      vae: the model.
      source: where x comes from; `data_source(train_images)` for a usual VAE.
      rng_key: of the run; not needed where `state` or `resume` is given. A list of keys is a
        sweep: then `source`, `state` and `resume` may be lists too, and a list is returned.
      num_epochs: epochs in all, those of a given `state` counted in.
      batch_size: examples in a step; the last step of an epoch takes the examples that are left.
      optimizer: optax transformation over `VAEParams`; Adam at 1e-3 by default.
      objective: per-example objective to maximise, in nats.
      state: continue from it instead of from new parameters; it is not changed. In the midst of
        an epoch the loss of that epoch is the mean over its remaining examples; with `resume` it
        is the mean over all.
      resume: continue from a `Progress` that `on_chunk` was given, at any step of an epoch.
      on_epoch: called with (epochs done, mean loss of that epoch in BPD; of a sweep the mean over
        its members).
      on_chunk: called after every compiled call with the `Progress` (of a sweep a list of them).
        The arrays of its state are donated to the next call: save or copy them. It may raise to
        end the run.
      devices: to run on; all by default. One run is data-parallel; the members of a sweep are
        divided among the devices.
      sweep: how one device computes its members: "vmap" together, "map" one after another, or
        "auto", which is "vmap" on GPUs and TPUs and "map" on a CPU.

    Returns:
      The state after `num_epochs` epochs, and the curve of the epochs run here.

    Raises:
      ValueError: a size that is not a positive integer or does not fit, neither key nor state, a
        distribution that is not of one whole example, or data outside of the support of the
        likelihood.
      TypeError: an argument of another type or one that is traced, or a q that cannot be
        reparameterized, unless the objective has `needs_rsample = False`.
      FloatingPointError: the loss or a parameter became NaN or infinite; the message says whether
        that is so from the start.
    """
    optimizer = optimizer or adam(1e-3)
    if rng_key is None and state is None and resume is None:
        raise ValueError("train needs an rng_key, or a state to go on from")
    check_integer("num_epochs", num_epochs)
    if num_epochs < 1:
        raise ValueError(f"num_epochs is {num_epochs}; it must be positive")

    def begin(key: jax.Array, state: TrainState | None, resume: Progress | None) -> Progress:
        if resume is not None:
            return resume._replace(state=jax.tree.map(jnp.copy, resume.state))
        if state is not None:
            num_steps = steps_per_epoch(sources[0].num_examples, batch_size)
            skipped = int(state.step) % num_steps * batch_size
            return Progress(jax.tree.map(jnp.copy, state), None, Curve(), 0.0, 0, skipped)
        assert key is not None
        init_key, run_key = jax.random.split(key)
        fresh = init_state(jax.jit(vae.init)(init_key), run_key, optimizer)
        return Progress(fresh, None, Curve(), 0.0, 0)

    keys, sources, states, resumes = members(rng_key, source=source, state=state, resume=resume)
    check_arguments(
        "train", keys, source=sources, state=states, resume=[r and r.state for r in resumes]
    )
    check_sources(sources)
    params = jax.eval_shape(lambda: begin(keys[0], states[0], resumes[0]).state.params)
    check_run(vae, params, sources, objective)
    executor = make_executor(
        vae, sources, optimizer, batch_size=batch_size, objective=objective, devices=devices,
        sweep=sweep,
    )  # fmt: skip
    runs = list(map(begin, keys, states, resumes))
    start = lambda member: begin(keys[member], states[member], resumes[member]).state
    with explained(vae, objective, sources, batch_size, start):
        done = drive(advance(executor, runs, num_epochs), on_epoch, on_chunk)
    results = [(progress.state, progress.curve) for progress in done]
    return results if is_sweep(rng_key) else results[0]


def drive(
    updates: Iterator[Update], on_epoch: OnEpoch | None, on_chunk: OnChunk | None
) -> list[Progress]:
    """Iterates to the end, calls the callbacks on the way, and returns the last progress."""
    update = next(updates)
    for update in updates:
        if on_epoch is not None and update.epoch_bpd is not None:
            on_epoch(update.epoch, update.epoch_bpd)
        if on_chunk is not None:
            progress = update.progress()
            cast(Any, on_chunk)(progress if len(progress) > 1 else progress[0])
    return update.progress()
