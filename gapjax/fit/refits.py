"""Refits of the encoder alone, on any source of x, by the same loop as `train`.

`fit/paper_refits` and `fit/recipes` have the named calls of `refit_encoder`.

A sweep is several runs in one compiled program. If `rng_key` is a list of keys (or a tuple, or an
array [R]), a list of results is returned. Any other argument is then either shared by all members
or a list with one entry for each.
"""

from collections.abc import Sequence
from typing import NamedTuple, Unpack, overload

import jax
import jax.numpy as jnp
import optax

from gapjax import parallel
from gapjax.fit import plateau
from gapjax.fit.arguments import (
    OnChunk,
    OnEpoch,
    RefitOptions,
    is_sweep,
    members,
)
from gapjax.fit.checks import check_arguments, check_run, check_sources
from gapjax.fit.diagnosis import explained
from gapjax.fit.executor import make_executor
from gapjax.fit.loop import Curve, Monitor, Progress, advance
from gapjax.fit.optimizers import adam, check_learning_rate, encoder_only
from gapjax.fit.plateau import Convergence
from gapjax.fit.sources import Source
from gapjax.fit.steps import Objective, init_state
from gapjax.fit.training import drive
from gapjax.model.arguments import check_integer, check_key
from gapjax.model.bounds import elbo
from gapjax.model.vae import VAE, VAEParams


class Refit(NamedTuple):
    """The result of an encoder refit.

    Attributes:
      params: the refitted encoder, with the decoder given, bit for bit.
      averaged_params: the same with the mean of the encoder's weights at the ends of all epochs of
        the refit, which removes the noise of the last steps at a constant learning rate
        (Izmailov et al., Averaging Weights Leads to Wider Optima, 2018).
      curve: what the refit did.
      num_steps: number of optimizer steps taken.
      converged: whether a `Convergence` rule was met; None without a rule.
      last_improvement: improvement of the last measurement on the best before it, BPD (negative
        where it was worse); None without a rule.
    """

    params: VAEParams
    averaged_params: VAEParams
    curve: Curve
    num_steps: int
    converged: bool | None
    last_improvement: float | None


@overload
def refit_encoder(
    vae: VAE,
    params: VAEParams,
    source: Source,
    rng_key: jax.Array,
    *,
    num_epochs: int,
    **options: Unpack[RefitOptions],
) -> Refit: ...


@overload
def refit_encoder(
    vae: VAE,
    params: VAEParams | Sequence[VAEParams],
    source: Source | Sequence[Source],
    rng_key: Sequence[jax.Array],
    *,
    num_epochs: int,
    **options: Unpack[RefitOptions],
) -> list[Refit]: ...


def refit_encoder(
    vae: VAE,
    params: VAEParams | Sequence[VAEParams],
    source: Source | Sequence[Source],
    rng_key: jax.Array | Sequence[jax.Array],
    *,
    num_epochs: int,
    batch_size: int = 100,
    optimizer: optax.GradientTransformation | None = None,
    objective: Objective = elbo,
    monitor: Monitor | Sequence[Monitor] | None = None,
    monitor_every: int = 5,
    until: Convergence | None = None,
    resume: Progress | Sequence[Progress] | None = None,
    on_epoch: OnEpoch | None = None,
    on_chunk: OnChunk | None = None,
    devices: parallel.Devices | None = None,
    sweep: str = "auto",
) -> Refit | list[Refit]:
    """Trains the encoder alone on `source`, from given parameters; the decoder is frozen.

    The one operation behind optimal inference (eq. 12: the source is the test set) and
    self-consistent training (eqs. 14-16: the source is a mixture of model and training data).

    Args:
      vae: the model.
      params: where to start.
      source: where x comes from.
      rng_key: of the refit. A list of keys is a sweep of refits in one compiled program: then
        `params`, `source`, `monitor` and `resume` may be lists too, and a list is returned. The
        sources of a sweep differ in their arrays alone; arrays that they share are kept once.
      num_epochs: epochs of `source` to run; with `until`, at most.
      batch_size: examples in a step; the last step of an epoch takes the examples that are left.
      optimizer: optax transformation over `VAEParams`; it is restricted to the encoder here.
        Adam at 1e-3 by default.
      objective: per-example objective to maximise, in nats.
      monitor: measures a BPD of the parameters, for the curve. Without `until` it does not
        influence the refit.
      monitor_every: epochs between two measurements.
      until: end by this rule on the monitored BPD, and keep the best parameters.
      resume: continue from a `Progress` that `on_chunk` was given.
      on_epoch: see `train`.
      on_chunk: see `train`.
      devices: see `train`.
      sweep: see `train`.

    Returns:
      A `Refit`, or a list of them; their decoder is the one given, bit for bit.

    Raises:
      ValueError: a size that is not a positive integer or does not fit, `until` without `monitor`
        or with an optimizer whose learning rate cannot be lowered, sources that cannot be swept
        together, or as of `train`.
      TypeError: as of `train`.
      FloatingPointError: as of `train`.
    """
    check_integer("num_epochs", num_epochs)
    check_integer("monitor_every", monitor_every)
    if num_epochs < 1 or monitor_every < 1:
        raise ValueError(
            f"num_epochs is {num_epochs} and monitor_every {monitor_every}; both must be positive"
        )
    if until is not None and monitor is None:
        raise ValueError("until is given without monitor; the rule needs a BPD to judge by")
    optimizer = encoder_only(optimizer or adam(1e-3))
    keys, starts, sources, monitors, resumes = members(
        rng_key, params=params, source=source, monitor=monitor, resume=resume
    )
    if until is not None:
        check_learning_rate(optimizer, starts[0])

    def begin(params: VAEParams, key: jax.Array, resume: Progress | None) -> Progress:
        if resume is not None:
            state, encoders = jax.tree.map(jnp.copy, (resume.state, resume.encoders))
            return resume._replace(state=state, encoders=encoders)
        state = init_state(params, key, optimizer)
        encoders = {name: jax.tree.map(jnp.copy, params.encoder) for name in ("best", "averaged")}
        return Progress(state, encoders, Curve(), 0.0, 0)

    check_arguments("refit_encoder", keys, params=starts, source=sources)
    for key, progress in zip(keys, resumes, strict=True):
        if progress is None:
            check_key(key)
    check_sources(sources)
    check_run(vae, starts[0], sources, objective)
    executor = make_executor(
        vae, sources, optimizer, batch_size=batch_size, objective=objective, devices=devices,
        sweep=sweep,
    )  # fmt: skip
    runs = list(map(begin, starts, keys, resumes))
    updates = advance(
        executor, runs, num_epochs, monitors=monitors, monitor_every=monitor_every, until=until
    )
    start = lambda member: begin(starts[member], keys[member], resumes[member]).state
    with explained(vae, objective, sources, batch_size, start):
        done = drive(updates, on_epoch, on_chunk)
    results = [
        _refit(progress, start, until, executor.num_steps)
        for progress, start in zip(done, starts, strict=True)
    ]
    return results if is_sweep(rng_key) else results[0]


def _refit(
    progress: Progress, start: VAEParams, until: Convergence | None, num_steps: int
) -> Refit:
    """The result of a refit whose epochs have `num_steps` steps."""
    curve, encoders = progress.curve, progress.encoders
    assert encoders is not None
    encoder = progress.state.params.encoder if until is None else encoders["best"]
    measured = curve.monitor_bpd
    return Refit(
        params=VAEParams(encoder=encoder, decoder=start.decoder),
        averaged_params=VAEParams(encoder=encoders["averaged"], decoder=start.decoder),
        curve=curve,
        num_steps=curve.epoch[-1] * num_steps,
        converged=None if until is None else bool(plateau.is_finished(until, progress.plateaus)),
        last_improvement=min(measured[:-1]) - measured[-1] if until is not None else None,
    )
