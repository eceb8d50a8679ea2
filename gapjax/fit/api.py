"""What a user calls: training, refits of the encoder alone, and several refits at once.

Optimal inference and self-consistent training are a `refit_encoder`, which is a `refit_members` of
one member. Training runs the same loop on the whole VAE.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from gapjax import parallel
from gapjax.examples import context_of, event_shape, on_device, shape_of_one
from gapjax.fit import loop
from gapjax.fit.loop import Curve, Executor, Measuring, Monitor, OnEpoch, Progress, run_members
from gapjax.fit.objectives import as_bound
from gapjax.fit.sources import Source, data_source, mixture_source, model_source
from gapjax.fit.step import Objective, TrainState, check_run, init_state, steps_per_epoch
from gapjax.measure.bounds import Bound, Images, per_image_bounds
from gapjax.measure.statistics import mean_and_stderr
from gapjax.model.bounds import bits_per_dim, elbo
from gapjax.model.checks import check_array, check_concrete, check_key, check_positive
from gapjax.optimizers import Convergence, adam, check_learning_rate, encoder_only, is_finished
from gapjax.vae import VAE, VAEParams

_INSTEAD = "there use gapjax.kernel, whose step is a pure function"


class Member(NamedTuple):
    """One refit among several; see `refit_members`.

    A monitor measures a BPD of the parameters, for the curve; without `until` it does not influence
    the refit. With `resume` it continues from a `Progress` that `on_chunk` was given.
    """

    params: VAEParams  # where it starts
    source: Source  # where x comes from
    rng_key: jax.Array
    monitor: Monitor | None = None
    resume: Progress | None = None


class Refit(NamedTuple):
    """The result of an encoder refit.

    Attributes:
      params: the refitted encoder, with the decoder given, bit for bit.
      averaged_params: the same with the mean of the encoder's weights at the ends of all epochs,
        without the noise of the last steps (Izmailov et al., Averaging Weights Leads to Wider
        Optima, 2018).
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


def train(
    vae: VAE,
    source: Source,
    rng_key: jax.Array | None = None,
    *,
    num_epochs: int,
    batch_size: int = 100,
    optimizer: optax.GradientTransformation | None = None,
    objective: Objective = elbo,
    state: TrainState | None = None,
    resume: Progress | None = None,
    on_epoch: OnEpoch | None = None,
    on_chunk: Callable[[Progress], None] | None = None,
    devices: parallel.Devices | None = None,
) -> tuple[TrainState, Curve]:
    """Trains encoder and decoder together on `source`.

    Args:
      source: where x comes from; `data_source(train_images)` for a usual VAE.
      rng_key: of the run; not needed where `state` or `resume` is given.
      num_epochs: epochs in all, those of a given `state` counted in.
      batch_size: examples in a step; the last step of an epoch takes the examples that are left.
      optimizer: optax transformation over `VAEParams`; Adam at 1e-3 by default.
      state: continue from it instead of from new parameters; it is not changed.
      resume: continue from a `Progress` that `on_chunk` was given, at any step of an epoch.
      on_epoch: called with (epochs done, mean loss of that epoch in BPD).
      on_chunk: called after every compiled call with the `Progress`; it may raise to end the run.

    Returns:
      The state after `num_epochs` epochs, and the curve of the epochs run here.

    Raises:
      ValueError: a size that is not a positive integer or does not fit, neither key nor state, a
        distribution not of one whole example, or data outside of the likelihood's support.
      TypeError: an argument of another type or one that is traced, or a q that cannot be
        reparameterized, unless the objective has `needs_rsample = False`.
      FloatingPointError: the loss or a parameter became NaN or infinite.
    """
    optimizer = optimizer or adam(1e-3)
    if rng_key is None and state is None and resume is None:
        raise ValueError("train needs an rng_key, or a state to go on from")
    check_positive(num_epochs=num_epochs)
    check_concrete("train", _INSTEAD, rng_key=rng_key, source=source, state=state, resume=resume)
    if rng_key is not None:
        check_key(rng_key)

    def begin() -> Progress:
        if resume is not None:
            return resume._replace(state=parallel.copy(resume.state))
        if state is not None:
            num_steps = steps_per_epoch(source.num_examples, batch_size)
            skipped = int(state.step) % num_steps * batch_size
            return Progress(parallel.copy(state), None, Curve(), 0.0, 0, skipped)
        assert rng_key is not None
        init_key, run_key = jax.random.split(rng_key)
        fresh = init_state(init_params.on(vae=vae)(init_key), run_key, optimizer)
        return Progress(fresh, None, Curve(), 0.0, 0)

    given = state if resume is None else resume.state
    params = given.params if given else jax.eval_shape(vae.init, rng_key)
    check_run(vae, params, [source], objective)
    executor = Executor(
        [source], devices, vae=vae, optimizer=optimizer, batch_size=batch_size, objective=objective
    )
    each = None if on_chunk is None else (lambda members: on_chunk(members[0]))
    (done,) = run_members(executor, [begin], num_epochs, Measuring([None]), on_epoch, each)
    return done.state, done.curve


@parallel.on_one_device
def init_params(rng_key: jax.Array, *, vae: VAE) -> VAEParams:
    """New parameters."""
    return vae.init(rng_key)


def refit_encoder(
    vae: VAE,
    params: VAEParams,
    source: Source,
    rng_key: jax.Array,
    *,
    num_epochs: int,
    monitor: Monitor | None = None,
    resume: Progress | None = None,
    on_chunk: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Refit:
    """Trains the encoder alone on `source`, from given parameters; the decoder is frozen.

    The one operation behind optimal inference (eq. 12: the source is the test set) and
    self-consistent training (eqs. 14-16: the source is a mixture of model and training data). The
    decoder that is returned is the one given, bit for bit.

    Args:
      num_epochs: epochs of `source` to run; with `until`, at most.
      monitor: see `Member`, as `resume`.
      **options: see `refit_members`.
    """
    member = Member(params, source, rng_key, monitor, resume)
    each = None if on_chunk is None else (lambda members: on_chunk(members[0]))
    return refit_members(vae, [member], num_epochs=num_epochs, on_chunk=each, **options)[0]


def refit_members(
    vae: VAE,
    members: Sequence[Member],
    *,
    num_epochs: int,
    batch_size: int = 100,
    optimizer: optax.GradientTransformation | None = None,
    objective: Objective = elbo,
    monitor_every: int = 5,
    until: Convergence | None = None,
    on_epoch: OnEpoch | None = None,
    on_chunk: Callable[[list[Progress]], None] | None = None,
    devices: parallel.Devices | None = None,
    sweep: str = "auto",
) -> list[Refit]:
    """Several refits of one model in one compiled program; of one member it is `refit_encoder`.

    What is not named here is as in `train`.

    Args:
      members: the refits. Their sources differ in their arrays alone; arrays that they share are
        kept once.
      num_epochs: epochs of each source to run; with `until`, at most.
      optimizer: as in `train`; it is restricted to the encoder here.
      monitor_every: epochs between two measurements.
      until: end each by this rule on its monitored BPD, and keep its best parameters.
      on_epoch: called with (epochs done, mean loss of that epoch in BPD over the members).
      on_chunk: called with the `Progress` of every member.
      devices: among which the members are divided; all by default. One member is data-parallel.
      sweep: how one device computes its members: "vmap" together, "map" one after another, or
        "auto", which is "vmap" on GPUs and TPUs and "map" on a CPU.

    Raises:
      ValueError: as `train`; `until` without a monitor or with an optimizer whose learning rate
        cannot be lowered; sources that differ in more than the values of their arrays.
    """
    check_positive(num_epochs=num_epochs, monitor_every=monitor_every)
    if not members:
        raise ValueError("members is empty; at least one is needed")
    optimizer = encoder_only(optimizer or adam(1e-3))
    for params, source, rng_key, monitor, resume in members:
        if until is not None and monitor is None:
            raise ValueError("until is given without monitor; the rule needs a BPD to judge by")
        check_concrete("refit_encoder", _INSTEAD, rng_key=rng_key, params=params, source=source)
        if resume is None:
            check_key(rng_key)
    sources = [member.source for member in members]
    check_run(vae, members[0].params, sources, objective)
    if until is not None:
        check_learning_rate(optimizer, members[0].params)

    def begin(member: Member) -> Progress:
        if member.resume is not None:
            state, encoders = parallel.copy((member.resume.state, member.resume.encoders))
            return member.resume._replace(state=state, encoders=encoders)
        state = init_state(member.params, member.rng_key, optimizer)
        copy = lambda: parallel.copy(member.params.encoder)
        return Progress(state, {"best": copy(), "averaged": copy()}, Curve(), 0.0, 0)

    executor = Executor(
        sources, devices, sweep, vae=vae, optimizer=optimizer, batch_size=batch_size,
        objective=objective,
    )  # fmt: skip
    done = run_members(
        executor,
        [functools.partial(begin, member) for member in members],
        num_epochs,
        Measuring([member.monitor for member in members], monitor_every, until),
        on_epoch,
        on_chunk,
    )
    decoders = [member.params.decoder for member in members]
    return [_refit(*pair, until, executor.num_steps) for pair in zip(done, decoders, strict=True)]


OPTIMAL_EVERY = 20  # epochs between two measurements of an optimal inference


def optimal_inference(
    vae: VAE,
    params: VAEParams,
    test_images: Images,
    rng_key: jax.Array,
    *,
    num_epochs: int = 1000,
    until: Convergence | None = Convergence(),  # noqa: B008 (an immutable tuple)
    monitor_every: int = OPTIMAL_EVERY,
    num_samples: int = 4,
    objective: Objective = elbo,
    bound: Bound | None = None,
    **options: Any,
) -> Refit:
    """Optimal inference (eq. 12): refits the encoder on the *test* set until it has converged.

    Diagnostic only, because it is fitted on test data: it measures how much of the test BPD is
    due to the over-fitting of the encoder. Convergence is judged by the BPD of these images on
    fixed noise; see `Convergence`.

    Args:
      until: the rule that ends it; None runs `num_epochs`.
      num_samples: samples for each image where convergence is judged.
      bound: what it is judged by; by default the objective.
      **options: see `refit_encoder`.
    """
    member = optimal_member(
        vae, params, test_images, rng_key, num_samples=num_samples,
        bound=bound or as_bound(objective), devices=options.get("devices"),
    )  # fmt: skip
    return refit_encoder(
        vae, *member[:3], monitor=member.monitor, num_epochs=num_epochs, until=until,
        monitor_every=monitor_every, objective=objective, **options,
    )  # fmt: skip


def optimal_member(
    vae: VAE,
    params: VAEParams,
    test_images: Images,
    rng_key: jax.Array,
    *,
    num_samples: int = 4,
    bound: Bound = elbo,
    devices: parallel.Devices | None = None,
) -> Member:
    """What `optimal_inference` refits, for `refit_members`."""
    check_array("test_images", test_images)
    check_concrete("optimal_inference", _INSTEAD, rng_key=rng_key, test_images=test_images)
    check_key(rng_key)
    images = on_device(test_images)
    refit_key, monitor_key = jax.random.split(rng_key)

    def monitor(candidate: VAEParams) -> float:
        nats = per_image_bounds(
            vae, candidate, monitor_key, images, num_samples=num_samples, bound=bound,
            devices=devices,
        )  # fmt: skip
        return mean_and_stderr(np.asarray(bits_per_dim(nats, event_shape(shape_of_one(images)))))[0]

    return Member(params, data_source(images), refit_key, monitor)


def self_consistent(
    vae: VAE,
    params: VAEParams,
    train_images: Images,
    rng_key: jax.Array,
    *,
    alpha: ArrayLike = 0.5,
    stratified: bool = False,
    num_epochs: int = 100,
    **options: Any,
) -> Refit:
    """Self-consistent training (eqs. 14-16): refits the encoder on model samples and data.

    Every x is a fresh sample of the model with probability alpha, and a training image
    otherwise. Test data is never used. alpha = 0 is the control: the same refit, with the same
    noise and order, on training data alone.

    Args:
      alpha: share of model samples, in [0, 1].
      stratified: give every batch that share, instead of deciding for each example at random;
        see `mixture_source`. The authors' code takes 100 training images and 100 samples in each
        step: that is `stratified=True, batch_size=200` for twice as many epochs.
      **options: see `refit_encoder`.
    """
    source = self_consistent_source(vae, params, train_images, alpha, stratified)
    return refit_encoder(vae, params, source, rng_key, num_epochs=num_epochs, **options)


def self_consistent_source(
    vae: VAE, params: VAEParams, train_images: Images, alpha: ArrayLike, stratified: bool
) -> Source:
    """The source of `self_consistent`; for members that differ in alpha give alphas as arrays."""
    check_concrete("self_consistent", "alpha has no gradient", alpha=alpha)
    check_array("train_images", train_images)
    data = data_source(train_images)
    model = model_source(vae, params.decoder, data.num_examples, context_of(train_images))
    return mixture_source(model, data, alpha, stratified=stratified)


def _refit(done: Progress, decoder: Any, until: Convergence | None, num_steps: int) -> Refit:
    """The result of a refit whose epochs have `num_steps` steps."""
    curve, encoders, best = done.curve, done.encoders, loop.best_bpd
    assert encoders is not None
    measured = curve.monitor_bpd
    return Refit(
        params=VAEParams(done.state.params.encoder if until is None else encoders["best"], decoder),
        averaged_params=VAEParams(encoders["averaged"], decoder),
        curve=curve,
        num_steps=curve.epoch[-1] * num_steps,
        converged=until and bool(is_finished(until, done.plateaus) and best(measured) < np.inf),
        last_improvement=until and best(measured[:-1]) - measured[-1],
    )
