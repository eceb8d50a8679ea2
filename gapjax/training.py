"""The one training loop: a pure step, an epoch of them as one compiled scan, and its two uses.

`train` optimises the whole VAE on data. `refit_encoder` optimises the encoder alone on any
source of x; `optimal_inference` and `self_consistent` are two named calls of it.

All randomness is a function of (state.rng_key, epoch, position of the example in the epoch).
Evaluating, stopping and resuming, or the number of devices change nothing in it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gapjax.evaluation import evaluate
from gapjax.optimizers import adam, encoder_only, scale_learning_rate
from gapjax.sources import Source, data_source, mixture_source, model_source
from gapjax.vae import VAE, VAEParams, bits_per_dim, elbo

Objective = Callable[[VAE, VAEParams, jax.Array, jax.Array], jax.Array]
Monitor = Callable[[VAEParams], float]


class TrainState(NamedTuple):
    """All that a run is: save it, restore it, and the run goes on bit for bit.

    Attributes:
      params: the VAE's parameters.
      opt_state: the optimizer's state.
      step: [] int32, optimizer steps taken; says the epoch and the place in it.
      rng_key: [] typed key, the run's; folded with epoch, step and position, never changed.
    """

    params: VAEParams
    opt_state: Any
    step: jax.Array
    rng_key: jax.Array


class Convergence(NamedTuple):
    """When a refit has converged: a documented rule, for use with a monitored BPD.

    Every `monitor_every` epochs the BPD is measured on fixed noise. The best parameters so far
    are kept. Where a measurement does not improve on the best by `tolerance`, the learning rate
    is multiplied by `decay`; where that happens for the (`num_decays` + 1)th time, the refit has
    converged. What is returned are the best parameters, so it is never worse than its start.

    Attributes:
      tolerance: smallest improvement that counts, bits per dimension.
      decay: factor on the learning rate at a plateau.
      num_decays: how many times the learning rate is lowered before the refit ends.
    """

    tolerance: float = 2e-4
    decay: float = 0.3
    num_decays: int = 3


class Curve(NamedTuple):
    """What a run did, epoch by epoch.

    Attributes:
      epoch: epochs done at each entry of `loss_bpd`.
      loss_bpd: mean of the objective over that epoch's examples, as it trained, in BPD.
      monitor_epoch: epochs done at each entry of `monitor_bpd`; starts with the start.
      monitor_bpd: the monitored BPD.
    """

    epoch: list[int]
    loss_bpd: list[float]
    monitor_epoch: list[int]
    monitor_bpd: list[float]


class Refit(NamedTuple):
    """The result of an encoder refit.

    Attributes:
      params: the refitted encoder with the decoder given, bit for bit.
      curve: what the refit did.
      num_steps: optimizer steps taken.
      converged: whether a `Convergence` rule was met; None where none was asked for.
      last_improvement: BPD won by the last measurement over the best before it (negative where
        it was worse); None without a rule.
    """

    params: VAEParams
    curve: Curve
    num_steps: int
    converged: bool | None
    last_improvement: float | None


def init_state(params: VAEParams, rng_key: jax.Array, optimizer: Any) -> TrainState:
    """A fresh state at step 0 around copies of what is given (a run donates its state)."""
    params, rng_key = jax.tree.map(jnp.copy, (params, rng_key))
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), rng_key)


def train(
    vae: VAE,
    source: Source,
    rng_key: jax.Array | None = None,
    *,
    num_epochs: int,
    batch_size: int = 100,
    optimizer: Any = None,
    objective: Objective = elbo,
    state: TrainState | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> tuple[TrainState, Curve]:
    """Trains encoder and decoder together on `source`.

    Args:
      vae: the model.
      source: where x comes from; `data_source(train_images)` for a usual VAE.
      rng_key: of the run; not needed where `state` is given.
      num_epochs: epochs in all, those of a given `state` counted in.
      batch_size: examples in a step; the last step of an epoch takes what is left.
      optimizer: optax transformation over `VAEParams`; Adam at 1e-3 by default.
      objective: per-example objective to maximise, in nats.
      state: goes on from it instead of from new parameters; it is left as it was.
      on_epoch: called with (epochs done, that epoch's mean loss in BPD).

    Returns:
      The state after `num_epochs` epochs, and the curve of the epochs run here.

    Raises:
      ValueError: a size that is not positive or does not fit, or neither key nor state.
      FloatingPointError: the loss became NaN or infinite.
    """
    optimizer = optimizer or adam(1e-3)
    if state is None:
        if rng_key is None:
            raise ValueError("train needs an rng_key, or a state to go on from")
        init_key, run_key = jax.random.split(rng_key)
        state = init_state(vae.init(init_key), run_key, optimizer)
    else:
        state = jax.tree.map(jnp.copy, state)
    run = _Run(vae, source, optimizer, batch_size, objective)
    return run(state, num_epochs, on_epoch)


def refit_encoder(
    vae: VAE,
    params: VAEParams,
    source: Source,
    rng_key: jax.Array,
    *,
    num_epochs: int,
    batch_size: int = 100,
    optimizer: Any = None,
    objective: Objective = elbo,
    monitor: Monitor | None = None,
    monitor_every: int = 5,
    until: Convergence | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Refit:
    """Trains the encoder alone on `source`, from where it is; the decoder is frozen.

    The one operation behind optimal inference (eq. 12: the source is the test set) and
    self-consistent training (eqs. 14-16: the source is a mixture of model and training data).

    Args:
      vae: the model.
      params: where to start.
      source: where x comes from.
      rng_key: of the refit.
      num_epochs: epochs of `source` to run; with `until`, at most.
      batch_size: examples in a step; the last step of an epoch takes what is left.
      optimizer: optax transformation over `VAEParams`; it is restricted to the encoder here.
        Adam at 1e-3 by default.
      objective: per-example objective to maximise, in nats.
      monitor: measures a BPD of the parameters; recorded in the curve. Without `until` it
        changes nothing in the refit.
      monitor_every: epochs between two measurements.
      until: end by this rule on the monitored BPD, and keep the best parameters.
      on_epoch: called with (epochs done, that epoch's mean loss in BPD).

    Returns:
      A `Refit`; its params hold the very decoder given.

    Raises:
      ValueError: a size that is not positive or does not fit, or `until` without `monitor`.
      FloatingPointError: the loss became NaN or infinite.
    """
    if num_epochs < 1 or monitor_every < 1:
        raise ValueError(
            f"num_epochs is {num_epochs} and monitor_every {monitor_every}; both must be positive"
        )
    if until is not None and monitor is None:
        raise ValueError("until is given without monitor; the rule needs a BPD to judge by")
    optimizer = encoder_only(optimizer or adam(1e-3))
    run = _Run(vae, source, optimizer, batch_size, objective)
    state = init_state(params, rng_key, optimizer)
    curve = Curve([], [], [], [])
    if monitor is not None:
        curve.monitor_epoch.append(0)
        curve.monitor_bpd.append(monitor(state.params))

    best_params, plateaus, last_improvement = params, 0, None
    epoch = 0
    while epoch < num_epochs and (until is None or plateaus <= until.num_decays):
        epoch = min(epoch + monitor_every, num_epochs) if monitor is not None else num_epochs
        state, segment = run(state, epoch, on_epoch)
        curve.epoch.extend(segment.epoch)
        curve.loss_bpd.extend(segment.loss_bpd)
        if monitor is None:
            continue
        bpd = monitor(state.params)
        last_improvement = min(curve.monitor_bpd) - bpd
        curve.monitor_epoch.append(epoch)
        curve.monitor_bpd.append(bpd)
        if until is None:
            continue
        if last_improvement > 0:
            best_params = jax.tree.map(jnp.copy, state.params)
        if last_improvement < until.tolerance:
            plateaus += 1
            opt_state = scale_learning_rate(state.opt_state, until.decay)
            state = state._replace(opt_state=opt_state)

    encoder = (state.params if until is None else best_params).encoder
    return Refit(
        params=VAEParams(encoder=encoder, decoder=params.decoder),
        curve=curve,
        num_steps=int(state.step),
        converged=None if until is None else plateaus > until.num_decays,
        last_improvement=last_improvement if until is not None else None,
    )


def optimal_inference(
    vae: VAE,
    params: VAEParams,
    test_images: ArrayLike,
    rng_key: jax.Array,
    *,
    num_epochs: int = 1000,
    until: Convergence | None = Convergence(),  # noqa: B008 (an immutable tuple)
    monitor_every: int = 20,
    num_samples: int = 4,
    **refit_options: Any,
) -> Refit:
    """Optimal inference (eq. 12): refits the encoder on the *test* set until it has converged.

    Not a practical procedure, and its BPD is fitted on test data: it measures how much of the
    test BPD is the encoder's over-fitting. Convergence is judged on the BPD of these images with
    fixed noise; see `Convergence`.

    Args:
      vae: the model.
      params: trained parameters, where the refit starts.
      test_images: [N, *event].
      rng_key: of the refit.
      num_epochs: at most this many.
      until: the rule that ends it; None runs `num_epochs`.
      monitor_every: epochs between two measurements.
      num_samples: posterior samples for each image where convergence is judged.
      **refit_options: as of `refit_encoder`.

    Returns:
      A `Refit`.
    """
    refit_key, monitor_key = jax.random.split(rng_key)
    images = jnp.asarray(test_images)

    def monitor(candidate: VAEParams) -> float:
        return evaluate(vae, candidate, monitor_key, images, num_samples=num_samples).bpd

    return refit_encoder(
        vae, params, data_source(images), refit_key, num_epochs=num_epochs,
        monitor=monitor, monitor_every=monitor_every, until=until, **refit_options,
    )  # fmt: skip


def self_consistent(
    vae: VAE,
    params: VAEParams,
    train_images: ArrayLike,
    rng_key: jax.Array,
    *,
    alpha: ArrayLike = 0.5,
    num_epochs: int = 100,
    **refit_options: Any,
) -> Refit:
    """Self-consistent training (eqs. 14-16): refits the encoder on model samples and data.

    Every x is a fresh sample of the model with probability alpha, and a training image
    otherwise; test data is never seen. alpha = 0 is its control: the same refit, with the same
    noise and order, on training data alone.

    Args:
      vae: the model.
      params: trained parameters, where the refit starts.
      train_images: [N, *event].
      rng_key: of the refit.
      alpha: share of model samples, in [0, 1].
      num_epochs: epochs of N examples.
      **refit_options: as of `refit_encoder`.

    Returns:
      A `Refit`.
    """
    data = data_source(train_images)
    model = model_source(vae, params.decoder, data.num_examples)
    source = mixture_source(model, data, alpha)
    return refit_encoder(vae, params, source, rng_key, num_epochs=num_epochs, **refit_options)


class _Run(NamedTuple):
    """What is constant in a run; calling it runs epochs, one compiled program each."""

    vae: VAE
    source: Source
    optimizer: Any
    batch_size: int
    objective: Objective

    def __call__(
        self, state: TrainState, num_epochs: int, on_epoch: Callable | None
    ) -> tuple[TrainState, Curve]:
        """Runs `state`, which is donated, up to `num_epochs` epochs in all."""
        num_examples = self.source.num_examples
        if num_epochs < 1 or self.batch_size < 1:
            raise ValueError(
                f"num_epochs is {num_epochs} and batch_size {self.batch_size}; both must be "
                "positive"
            )
        if self.batch_size > num_examples:
            raise ValueError(
                f"batch_size is {self.batch_size}, more than the {num_examples} examples of an "
                "epoch"
            )
        curve = Curve([], [], [], [])
        event_shape = jax.eval_shape(self._first_example, self.source).shape
        for epoch in range(int(state.step) // steps_per_epoch(self.source, self.batch_size),
                           num_epochs):  # fmt: skip
            state, mean_bound = run_epoch(
                state, self.source, vae=self.vae, optimizer=self.optimizer,
                batch_size=self.batch_size, objective=self.objective,
            )  # fmt: skip
            loss_bpd = float(bits_per_dim(mean_bound, event_shape))
            if not np.isfinite(loss_bpd):
                raise FloatingPointError(
                    f"the loss is {loss_bpd} in epoch {epoch + 1}; a smaller learning rate may help"
                )
            curve.epoch.append(epoch + 1)
            curve.loss_bpd.append(loss_bpd)
            if on_epoch is not None:
                on_epoch(epoch + 1, loss_bpd)
        return state, curve

    @staticmethod
    def _first_example(source: Source) -> jax.Array:
        rng_key = jax.random.key(0)
        return source.draw(source.begin_epoch(rng_key), rng_key, jnp.zeros((), jnp.int32))


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Steps that see every example of an epoch once; the last may be of fewer examples."""
    return -(-source.num_examples // batch_size)


@functools.partial(
    jax.jit,
    static_argnames=("vae", "optimizer", "batch_size", "objective"),
    donate_argnames="state",
)
def run_epoch(
    state: TrainState,
    source: Source,
    *,
    vae: VAE,
    optimizer: Any,
    batch_size: int,
    objective: Objective,
) -> tuple[TrainState, jax.Array]:
    """One epoch as one compiled scan; `state` is donated.

    Returns:
      The state after the epoch, and the mean objective over its examples, nats.
    """
    num_steps = steps_per_epoch(source, batch_size)
    epoch_key = jax.random.fold_in(state.rng_key, state.step // num_steps)
    plan_key, examples_key = jax.random.split(epoch_key)
    plan = source.begin_epoch(plan_key)
    positions = jnp.arange(num_steps * batch_size).reshape(num_steps, batch_size)
    # One batch of hashes an epoch, not one a step: small kernels are what a CPU is slow at.
    example_keys = _example_keys(examples_key, positions)

    def step(state: TrainState, xs: tuple[jax.Array, ...]) -> tuple[TrainState, jax.Array]:
        return train_step(state, source, plan, *xs, vae, optimizer, objective)

    state, sums = jax.lax.scan(step, state, (positions, *example_keys))
    return state, sums.sum() / source.num_examples


def train_step(
    state: TrainState,
    source: Source,
    plan: Any,
    positions: jax.Array,
    draw_keys: jax.Array,
    objective_keys: jax.Array,
    vae: VAE,
    optimizer: Any,
    objective: Objective,
) -> tuple[TrainState, jax.Array]:
    """One optimizer step on the examples at `positions` [B] of the epoch, with two keys for each.

    The loss is minus the mean objective over those positions that exist; positions past the end
    of the epoch have weight zero. This is the named place where examples are vmapped.

    Returns:
      The next state, and the sum of the objective over the examples, nats.
    """
    x = jax.vmap(functools.partial(source.draw, plan))(draw_keys, positions)
    weights = (positions < source.num_examples).astype(jnp.float32)

    def loss(params: VAEParams) -> jax.Array:
        values = jax.vmap(lambda key, one: objective(vae, params, key, one))(objective_keys, x)
        return -jnp.vdot(weights, values) / weights.sum()

    value, gradients = jax.value_and_grad(loss)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state.params, updates)
    return TrainState(params, opt_state, state.step + 1, state.rng_key), -value * weights.sum()


def _example_keys(rng_key: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two keys for every position of an epoch: one to draw x, one for the objective's noise."""
    flat = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(rng_key, i)))(positions.ravel())
    return flat[:, 0].reshape(positions.shape), flat[:, 1].reshape(positions.shape)
