"""The one training loop: a pure step, a chunk of them as one compiled scan, and its two uses.

`train` optimises the whole VAE on data. `refit_encoder` optimises the encoder alone on any
source of x; `optimal_inference` and `self_consistent` are two named calls of it.

All randomness is a function of (state.rng_key, epoch, position of the example in the epoch).
Evaluating, stopping and resuming, the number of devices, or being one of many in a sweep change
nothing in it.

A sweep is many runs at once. Where `rng_key` is a list, so is what comes back: every run has a
key of its own, and every other argument is either shared by all or a list of as many.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gapjax import parallel
from gapjax.fit.optimizers import adam, encoder_only, scale_learning_rate
from gapjax.fit.sources import Source, data_source, draw_examples, mixture_source, model_source
from gapjax.measure.per_image import per_image_bounds
from gapjax.measure.statistics import mean_and_stderr
from gapjax.model.bounds import bits_per_dim, elbo
from gapjax.model.vae import VAE, Params, VAEParams

Objective = Callable[[VAE, VAEParams, jax.Array, jax.Array], jax.Array]
Monitor = Callable[[VAEParams], float]

SWEEPS = ("auto", "vmap", "map")
# At most so many steps, and bytes of examples, of all members together, in one compiled call.
_CHUNK_STEPS, _CHUNK_BYTES = 512, 2**27


class TrainState(NamedTuple):
    """All that the next step depends on: save it, restore it, and the run goes on bit for bit.

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


class Progress(NamedTuple):
    """Where a run is, at any step of an epoch: given back as `resume`, it goes on bit for bit.

    Attributes:
      state: the state.
      encoders: what a refit keeps of the past, a dict: the "best" by the monitor, and the one
        "averaged" over the ends of its epochs; None in `train`.
      curve: what was done so far.
      epoch_nats: sum of the objective over the examples of the epoch at hand, nats.
      plateaus: of the `Convergence` rule, so far.
    """

    state: TrainState
    encoders: dict[str, Params] | None
    curve: Curve
    epoch_nats: float
    plateaus: int


class Refit(NamedTuple):
    """The result of an encoder refit.

    Attributes:
      params: the refitted encoder with the decoder given, bit for bit.
      averaged_params: the same with the encoder's weights averaged over the ends of all epochs of
        the refit (Izmailov et al., Averaging Weights Leads to Wider Optima, 2018): without the
        noise of the last steps at a constant learning rate.
      curve: what the refit did.
      num_steps: optimizer steps taken.
      converged: whether a `Convergence` rule was met; None where none was asked for.
      last_improvement: BPD won by the last measurement over the best before it (negative where
        it was worse); None without a rule.
    """

    params: VAEParams
    averaged_params: VAEParams
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
    rng_key: jax.Array | Sequence[jax.Array] | None = None,
    *,
    num_epochs: int,
    batch_size: int = 100,
    optimizer: Any = None,
    objective: Objective = elbo,
    state: TrainState | None = None,
    resume: Progress | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    on_chunk: Callable[[Any], None] | None = None,
    devices: parallel.Devices | None = None,
    sweep: str = "auto",
) -> tuple[TrainState, Curve]:
    """Trains encoder and decoder together on `source`.

    Args:
      vae: the model.
      source: where x comes from; `data_source(train_images)` for a usual VAE.
      rng_key: of the run; not needed where `state` or `resume` is given. A list of keys is a
        sweep: then `source`, `state` and `resume` may be lists too, and a list comes back.
      num_epochs: epochs in all, those of a given `state` counted in.
      batch_size: examples in a step; the last step of an epoch takes what is left.
      optimizer: optax transformation over `VAEParams`; Adam at 1e-3 by default.
      objective: per-example objective to maximise, in nats.
      state: goes on from it instead of from new parameters; it is left as it was.
      resume: goes on from what `on_chunk` was shown, in the midst of an epoch or not.
      on_epoch: called with (epochs done, that epoch's mean loss in BPD, of a sweep its mean).
      on_chunk: called after every compiled call with the `Progress` (of a sweep a list of them).
        Its arrays are used up by the next: save them or copy them. It may raise to end the run.
      devices: to run on; all by default. One run is data-parallel, a sweep's are spread.
      sweep: how one device computes its members: "vmap" side by side, "map" one after another,
        "auto" side by side on GPUs and TPUs alone.

    Returns:
      The state after `num_epochs` epochs, and the curve of the epochs run here.

    Raises:
      ValueError: a size that is not positive or does not fit, or neither key nor state.
      FloatingPointError: the loss or a parameter became NaN or infinite.
    """
    optimizer = optimizer or adam(1e-3)
    if rng_key is None and state is None and resume is None:
        raise ValueError("train needs an rng_key, or a state to go on from")

    def begin(key: jax.Array | None, state: TrainState | None, resume: Progress | None):
        if resume is not None:
            return resume._replace(state=jax.tree.map(jnp.copy, resume.state))
        if state is None:
            init_key, run_key = jax.random.split(key)
            state = init_state(jax.jit(vae.init)(init_key), run_key, optimizer)
        else:
            state = jax.tree.map(jnp.copy, state)
        return Progress(state, None, Curve([], [], [], []), 0.0, 0)

    keys, sources, states, resumes = _members(rng_key, source, state, resume)
    runs = _Runs(vae, sources, optimizer, batch_size, objective, devices, sweep)
    done = runs.advance(
        list(map(begin, keys, states, resumes)), num_epochs, on_epoch=on_epoch, on_chunk=on_chunk
    )
    results = [(progress.state, progress.curve) for progress in done]
    return results if isinstance(rng_key, list) else results[0]


def refit_encoder(
    vae: VAE,
    params: VAEParams | Sequence[VAEParams],
    source: Source | Sequence[Source],
    rng_key: jax.Array | Sequence[jax.Array],
    *,
    num_epochs: int,
    batch_size: int = 100,
    optimizer: Any = None,
    objective: Objective = elbo,
    monitor: Monitor | Sequence[Monitor] | None = None,
    monitor_every: int = 5,
    until: Convergence | None = None,
    resume: Progress | Sequence[Progress] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    on_chunk: Callable[[Any], None] | None = None,
    devices: parallel.Devices | None = None,
    sweep: str = "auto",
) -> Refit | list[Refit]:
    """Trains the encoder alone on `source`, from where it is; the decoder is frozen.

    The one operation behind optimal inference (eq. 12: the source is the test set) and
    self-consistent training (eqs. 14-16: the source is a mixture of model and training data).

    Args:
      vae: the model.
      params: where to start.
      source: where x comes from.
      rng_key: of the refit. A list of keys is a sweep of refits in one compiled program: then
        `params`, `source`, `monitor` and `resume` may be lists too, and a list comes back. The
        sources of a sweep differ in their arrays alone; arrays that they share are kept once.
      num_epochs: epochs of `source` to run; with `until`, at most.
      batch_size: examples in a step; the last step of an epoch takes what is left.
      optimizer: optax transformation over `VAEParams`; it is restricted to the encoder here.
        Adam at 1e-3 by default.
      objective: per-example objective to maximise, in nats.
      monitor: measures a BPD of the parameters; recorded in the curve. Without `until` it
        changes nothing in the refit.
      monitor_every: epochs between two measurements.
      until: end by this rule on the monitored BPD, and keep the best parameters.
      resume: goes on from what `on_chunk` was shown.
      on_epoch: as of `train`.
      on_chunk: as of `train`.
      devices: as of `train`.
      sweep: as of `train`.

    Returns:
      A `Refit`, or a list of them; the params hold the very decoder given.

    Raises:
      ValueError: a size that is not positive or does not fit, `until` without `monitor`, or
        sources that cannot be swept together.
      FloatingPointError: the loss or a parameter became NaN or infinite.
    """
    if num_epochs < 1 or monitor_every < 1:
        raise ValueError(
            f"num_epochs is {num_epochs} and monitor_every {monitor_every}; both must be positive"
        )
    if until is not None and monitor is None:
        raise ValueError("until is given without monitor; the rule needs a BPD to judge by")
    optimizer = encoder_only(optimizer or adam(1e-3))

    def begin(params: VAEParams, key: jax.Array, resume: Progress | None) -> Progress:
        if resume is not None:
            state, encoders = jax.tree.map(jnp.copy, (resume.state, resume.encoders))
            return resume._replace(state=state, encoders=encoders)
        state = init_state(params, key, optimizer)
        encoders = {name: jax.tree.map(jnp.copy, params.encoder) for name in ("best", "averaged")}
        return Progress(state, encoders, Curve([], [], [], []), 0.0, 0)

    keys, params, sources, monitors, resumes = _members(rng_key, params, source, monitor, resume)
    runs = _Runs(vae, sources, optimizer, batch_size, objective, devices, sweep)
    done = runs.advance(
        list(map(begin, params, keys, resumes)), num_epochs, monitors=monitors,
        monitor_every=monitor_every, until=until, on_epoch=on_epoch, on_chunk=on_chunk,
    )  # fmt: skip
    results = [_refit(*member, until, runs) for member in zip(done, params, strict=True)]
    return results if isinstance(rng_key, list) else results[0]


def optimal_inference(
    vae: VAE,
    params: VAEParams | Sequence[VAEParams],
    test_images: ArrayLike,
    rng_key: jax.Array | Sequence[jax.Array],
    *,
    num_epochs: int = 1000,
    until: Convergence | None = Convergence(),  # noqa: B008 (an immutable tuple)
    monitor_every: int = 20,
    num_samples: int = 4,
    **refit_options: Any,
) -> Refit | list[Refit]:
    """Optimal inference (eq. 12): refits the encoder on the *test* set until it has converged.

    Not a practical procedure, and its BPD is fitted on test data: it measures how much of the
    test BPD is the encoder's over-fitting. Convergence is judged on the BPD of these images with
    fixed noise; see `Convergence`.

    Args:
      vae: the model.
      params: trained parameters, where the refit starts; a list in a sweep.
      test_images: [N, *event].
      rng_key: of the refit; a list of keys is a sweep.
      num_epochs: at most this many.
      until: the rule that ends it; None runs `num_epochs`.
      monitor_every: epochs between two measurements.
      num_samples: posterior samples for each image where convergence is judged.
      **refit_options: as of `refit_encoder`.

    Returns:
      A `Refit`; a list of them in a sweep.
    """
    images = jnp.asarray(test_images)

    def monitor_of(monitor_key: jax.Array) -> Monitor:
        def bpd(candidate: VAEParams) -> float:
            nats = per_image_bounds(
                vae, candidate, monitor_key, images, num_samples=num_samples,
                devices=refit_options.get("devices"),
            )  # fmt: skip
            return mean_and_stderr(np.asarray(bits_per_dim(nats, images.shape[1:])))[0]

        return bpd

    pairs = [jax.random.split(key) for key in _members(rng_key)[0]]
    refit_keys, monitors = [pair[0] for pair in pairs], [monitor_of(pair[1]) for pair in pairs]
    alone = not isinstance(rng_key, list)
    return refit_encoder(
        vae, params, data_source(images), refit_keys[0] if alone else refit_keys,
        num_epochs=num_epochs, monitor=monitors[0] if alone else monitors,
        monitor_every=monitor_every, until=until, **refit_options,
    )  # fmt: skip


def self_consistent(
    vae: VAE,
    params: VAEParams | Sequence[VAEParams],
    train_images: ArrayLike,
    rng_key: jax.Array | Sequence[jax.Array],
    *,
    alpha: ArrayLike | Sequence[ArrayLike] = 0.5,
    stratified: bool = False,
    num_epochs: int = 100,
    **refit_options: Any,
) -> Refit | list[Refit]:
    """Self-consistent training (eqs. 14-16): refits the encoder on model samples and data.

    Every x is a fresh sample of the model with probability alpha, and a training image
    otherwise; test data is never seen. alpha = 0 is its control: the same refit, with the same
    noise and order, on training data alone.

    Args:
      vae: the model.
      params: trained parameters, where the refit starts; a list in a sweep.
      train_images: [N, *event].
      rng_key: of the refit; a list of keys is a sweep.
      alpha: share of model samples, in [0, 1]; a list in a sweep.
      stratified: give every batch that share, instead of deciding for each example at random;
        see `mixture_source`. The authors' code takes 100 training images and 100 samples in each
        step: that is `stratified=True, batch_size=200` for twice as many epochs.
      num_epochs: epochs of N examples.
      **refit_options: as of `refit_encoder`.

    Returns:
      A `Refit`; a list of them in a sweep.
    """
    data = data_source(train_images)
    _, all_params, alphas = _members(rng_key, params, alpha)
    if len({alpha for alpha in alphas if isinstance(alpha, int | float)}) > 1:
        alphas = [jnp.asarray(alpha, jnp.float32) for alpha in alphas]  # one program for them all
    sources = [
        mixture_source(
            model_source(vae, each.decoder, data.num_examples), data, alpha, stratified=stratified
        )
        for each, alpha in zip(all_params, alphas, strict=True)
    ]
    source = sources if isinstance(rng_key, list) else sources[0]
    return refit_encoder(vae, params, source, rng_key, num_epochs=num_epochs, **refit_options)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Steps that see every example of an epoch once; the last may be of fewer examples."""
    return -(-num_examples // batch_size)


def run_steps(
    shard: parallel.Shard,
    state: TrainState,
    source: Source,
    *,
    vae: VAE,
    optimizer: Any,
    batch_size: int,
    objective: Objective,
    num_steps: int,
) -> tuple[TrainState, jax.Array, jax.Array]:
    """The next `num_steps` steps of an epoch as one scan; they do not go beyond its end.

    Each device takes its share of the positions of every batch. Where the shares are not even,
    and at the end of an epoch, a share is filled up with positions that do not exist.

    Returns:
      The state after them; the sum of the objective over each step's examples [num_steps], nats;
      whether every parameter is finite.
    """
    epoch, first_step = jnp.divmod(state.step, steps_per_epoch(source.num_examples, batch_size))
    epoch_key = jax.random.fold_in(state.rng_key, epoch)
    plan_key, examples_key = jax.random.split(epoch_key)
    plan = source.begin_epoch(plan_key)
    share = -(-batch_size // shard.count)
    slots = shard.index * share + jnp.arange(share)
    first_positions = (first_step + jnp.arange(num_steps)) * batch_size
    positions = first_positions[:, None] + slots[None]
    positions = jnp.where(slots[None] < batch_size, positions, source.num_examples)
    # Hashes and draws for the whole chunk, not step by step: many at once are cheaper.
    draw_keys, objective_keys = _example_keys(examples_key, positions.ravel())
    x = draw_examples(source, plan, draw_keys, positions.ravel())
    x, objective_keys = (a.reshape(*positions.shape, *a.shape[1:]) for a in (x, objective_keys))
    weights = (positions < source.num_examples).astype(jnp.float32)
    num_examples = jnp.clip(source.num_examples - first_positions, 1, batch_size)

    def step(state: TrainState, xs: tuple[jax.Array, ...]) -> tuple[TrainState, jax.Array]:
        return train_step(shard, state, *xs, vae, optimizer, objective)

    state, sums = jax.lax.scan(step, state, (x, objective_keys, weights, num_examples))
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)])
    return state, sums, finite.all()


def train_step(
    shard: parallel.Shard,
    state: TrainState,
    x: jax.Array,
    rng_keys: jax.Array,
    weights: jax.Array,
    num_examples: jax.Array,
    vae: VAE,
    optimizer: Any,
    objective: Objective,
) -> tuple[TrainState, jax.Array]:
    """One optimizer step on examples x [B, *event], with a key [B] for the objective of each.

    The loss is minus the weighted sum of the objective over the examples of all shards, divided
    by `num_examples`; weights [B] are 1, and 0 for what only fills a batch up. This is the named
    place where examples are vmapped, and where shards meet.

    Returns:
      The next state, and the sum of the objective over the examples, nats.
    """

    def loss(params: VAEParams) -> jax.Array:
        values = jax.vmap(lambda key, one: objective(vae, params, key, one))(rng_keys, x)
        return -jnp.vdot(weights, values) / num_examples

    value, gradients = shard.sum(jax.value_and_grad(loss)(state.params))
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state.params, updates)
    return TrainState(params, opt_state, state.step + 1, state.rng_key), -value * num_examples


def _example_keys(rng_key: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two keys for every position [M] of an epoch: to draw x, and for the objective's noise."""
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(rng_key, i)))(positions)
    return keys[:, 0], keys[:, 1]


class _Runs:
    """One run, or the members of a sweep in lockstep: what is constant in them, and the loop."""

    def __init__(self, vae, sources, optimizer, batch_size, objective, devices, sweep):
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is not positive")
        num_examples = sources[0].num_examples
        if batch_size > num_examples:
            raise ValueError(
                f"batch_size is {batch_size}, more than the {num_examples} examples of an epoch"
            )
        if sweep not in SWEEPS:
            raise ValueError(f"sweep is {sweep!r}; it must be one of {', '.join(SWEEPS)}")
        self.devices = parallel.all_devices(devices)
        self.num_members = len(sources)
        self.num_examples = num_examples
        self.num_steps = steps_per_epoch(num_examples, batch_size)
        example = jax.eval_shape(_first_example, sources[0])
        self.event_shape = example.shape
        step_bytes = batch_size * example.size * example.dtype.itemsize
        self.chunk = _chunk(self.num_steps, self.num_members, step_bytes)
        self.static = (vae, optimizer, batch_size, objective)
        if self.num_members == 1:
            self.treedef, self.sweep = None, None
            self.source = parallel.replicate(sources[0], self.devices)
            return
        self.devices = parallel.local_devices(self.devices)  # of several processes each does it all
        accelerated = parallel.is_accelerated(self.devices)
        self.sweep = {"auto": "vmap" if accelerated else "map"}.get(sweep, sweep)
        varying, shared, self.treedef = _stack_sources(sources)
        self.varying = parallel.split_members(varying, self.devices)
        self.shared = parallel.replicate(shared, self.devices)

    def advance(
        self, runs: list[Progress], num_epochs: int, *, monitors: Sequence[Monitor | None] = (),
        monitor_every: int = 1, until: Convergence | None = None,
        on_epoch: Callable | None = None, on_chunk: Callable | None = None,
    ) -> list[Progress]:  # fmt: skip
        """Runs all up to `num_epochs` epochs, or to their convergence."""
        if num_epochs < 1:
            raise ValueError(f"num_epochs is {num_epochs}; it must be positive")
        monitors = list(monitors) or [None] * len(runs)
        is_running = lambda run: until is None or run.plateaus <= until.num_decays
        steps = {int(run.state.step) for run in filter(is_running, runs)}
        steps = steps or {int(run.state.step) for run in runs}
        if len(steps) > 1:
            raise ValueError(f"the runs of a sweep are at steps {sorted(steps)}, not at one")
        step = steps.pop()
        runs = [
            run._replace(curve=Curve(*map(list, run.curve))) for run in runs
        ]  # a resumed curve is the caller's
        for run, monitor in zip(runs, monitors, strict=True):
            if monitor is not None and not run.curve.monitor_epoch:
                _measure(run, monitor, 0)
        state = self._pack([run.state for run in runs])
        runs = [run._replace(state=None) for run in runs]

        def unpacked() -> list[Progress]:
            states = self._unpack(state)
            return [r._replace(state=s) for r, s in zip(runs, states, strict=True)]

        while step < num_epochs * self.num_steps:
            running = list(map(is_running, runs))
            if not any(running):
                break
            length = min(self.chunk, self.num_steps - step % self.num_steps)
            state, sums, finite = self._call(state, running, length)
            sums, finite = np.asarray(sums).reshape(len(runs), -1), np.ravel(finite)
            _refuse_non_finite(sums, finite, running, step, self.num_steps)
            step += length
            for index, values in enumerate(sums):
                total = runs[index].epoch_nats
                for value in values.tolist():  # one by one: the chunks' lengths change nothing
                    total += value
                runs[index] = runs[index]._replace(epoch_nats=total)
            if step % self.num_steps == 0:
                runs, state = self._end_epoch(
                    runs, state, running, step // self.num_steps, num_epochs,
                    monitors, monitor_every, until, on_epoch,
                )  # fmt: skip
            if on_chunk is not None:
                on_chunk(unpacked() if self.num_members > 1 else unpacked()[0])
        return unpacked()

    def _end_epoch(
        self, runs, state, running, epoch, num_epochs, monitors, monitor_every, until, on_epoch
    ):
        """The books of an epoch that has ended: curves, means, measurements, learning rates."""
        members = None  # unpacked only where something looks at them
        factors = [1.0] * len(runs)
        for index, run in enumerate(runs):
            if not running[index]:
                continue
            curve, loss_bpd = run.curve, float(bits_per_dim(
                run.epoch_nats / self.num_examples, self.event_shape
            ))  # fmt: skip
            curve.epoch.append(epoch)
            curve.loss_bpd.append(loss_bpd)
            runs[index] = run = run._replace(epoch_nats=0.0)
            if run.encoders is None:
                continue
            members = members or self._unpack(state)
            params = members[index].params
            averaged = _update_mean(run.encoders["averaged"], params.encoder, epoch)
            run.encoders["averaged"] = averaged
            due = epoch % monitor_every == 0 or epoch == num_epochs
            if monitors[index] is None or not due:
                continue
            improvement = _measure(run, monitors[index], epoch, params)
            if until is None:
                continue
            if improvement > 0:
                run.encoders["best"] = jax.tree.map(jnp.copy, params.encoder)
            if improvement < until.tolerance:
                runs[index] = run._replace(plateaus=run.plateaus + 1)
                factors[index] = until.decay
        if any(factor != 1.0 for factor in factors):
            members = [
                member._replace(opt_state=scale_learning_rate(member.opt_state, factor))
                for member, factor in zip(members, factors, strict=True)
            ]
            state = self._pack(members)
        if on_epoch is not None:
            losses = [run.curve.loss_bpd[-1] for run, on in zip(runs, running, strict=True) if on]
            on_epoch(epoch, sum(losses) / len(losses))
        return runs, state

    def _call(self, state: Any, running: list[bool], length: int) -> tuple[Any, Any, Any]:
        """One compiled call: `length` steps of every member that is running."""
        program = _program(*self.static, length, self.devices, self.sweep, self.treedef)
        if self.num_members == 1:
            state, sums, finite = program(state, self.source)
            return state, *parallel.collect((sums, finite))
        running = parallel.split_members(jnp.asarray(running), self.devices)
        state, *out = program(state, (self.varying, running), self.shared)
        return state, *parallel.join_members(out, self.num_members, self.devices)

    def _pack(self, states: list[TrainState]) -> Any:
        if self.num_members == 1:
            return parallel.replicate(states[0], self.devices)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        return parallel.split_members(stacked, self.devices)

    def _unpack(self, state: Any) -> list[TrainState]:
        if self.num_members == 1:
            return [parallel.collect(state)]
        stacked = parallel.join_members(state, self.num_members, self.devices)
        member = lambda index: jax.tree.map(lambda leaf: leaf[index], stacked)
        return [member(index) for index in range(self.num_members)]


@functools.cache
def _program(vae, optimizer, batch_size, objective, num_steps, devices, sweep, treedef):
    """The compiled program of these constants; equal constants give the same one."""
    one = functools.partial(
        run_steps, vae=vae, optimizer=optimizer, batch_size=batch_size, objective=objective,
        num_steps=num_steps,
    )  # fmt: skip
    if sweep is None:
        return parallel.data_parallel(one, devices)

    def member(state, varying, running, shared):
        source = _merge_source(varying, shared, treedef)
        if sweep == "vmap":  # where members go side by side, leaving one out saves nothing
            return one(parallel.WHOLE, state, source)
        skip = lambda state: (state, jnp.zeros(num_steps), jnp.asarray(True))
        return jax.lax.cond(running, lambda state: one(parallel.WHOLE, state, source), skip, state)

    def sweep_steps(states, split, shared):
        varying, running = split
        if sweep == "vmap":
            return jax.vmap(member, in_axes=(0, 0, 0, None))(states, varying, running, shared)
        return jax.lax.map(lambda xs: member(*xs, shared), (states, varying, running))

    return parallel.member_parallel(sweep_steps, devices)


def _members(rng_key: Any, *others: Any) -> list[list]:
    """Each argument as a list with an entry for every member of the sweep, or for the one run."""
    if not isinstance(rng_key, list):
        return [[rng_key], *([other] for other in others)]
    if not rng_key:
        raise ValueError("rng_key is an empty list; a sweep needs at least one key")
    lists = [rng_key]
    for other in others:
        if isinstance(other, list) and len(other) != len(rng_key):
            raise ValueError(
                f"a list of {len(other)} beside {len(rng_key)} keys; a sweep needs one for each"
            )
        lists.append(other if isinstance(other, list) else [other] * len(rng_key))
    return lists


def _stack_sources(sources: list[Source]) -> tuple[dict, dict, Any]:
    """The leaves that differ, stacked [R, ...], and those that all share; by their number."""
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


def _first_example(source: Source) -> jax.Array:
    rng_key = jax.random.key(0)
    return source.draw(source.begin_epoch(rng_key), rng_key, jnp.zeros((), jnp.int32))


def _chunk(num_steps: int, num_members: int, step_bytes: int) -> int:
    """Steps in a compiled call: an even part of the epoch where there is one that serves."""
    most = max(1, min(_CHUNK_STEPS, _CHUNK_BYTES // step_bytes) // num_members)
    if num_steps <= most:
        return num_steps
    even = max(length for length in range(1, most + 1) if num_steps % length == 0)
    return even if even >= most // 4 else most


@jax.jit
def _update_mean(mean: Params, params: Params, count: int) -> Params:
    """The mean of `count` parameters, from that of the first count - 1 and the last."""
    return jax.tree.map(lambda m, p: m + (p - m) / count, mean, params)


def _measure(run: Progress, monitor: Monitor, epoch: int, params: VAEParams | None = None) -> float:
    """Adds a measurement to the curve; returns what it improved on the best before it."""
    bpd = monitor(run.state.params if params is None else params)
    improvement = min(run.curve.monitor_bpd, default=bpd) - bpd
    run.curve.monitor_epoch.append(epoch)
    run.curve.monitor_bpd.append(bpd)
    return improvement


def _refuse_non_finite(sums, finite, running, step: int, num_steps: int) -> None:
    """Raises where a running member's loss or parameters are not finite, naming the step."""
    for index, on in enumerate(running):
        if not on:
            continue
        bad = np.flatnonzero(~np.isfinite(sums[index]))
        if not len(bad) and finite[index]:
            continue
        last = step + (int(bad[0]) if len(bad) else len(sums[index]) - 1)
        what = f"the loss is {-sums[index][bad[0]]}" if len(bad) else "a parameter is not finite"
        member = f" of run {index + 1} of the sweep" if len(running) > 1 else ""
        raise FloatingPointError(
            f"{what} in epoch {last // num_steps + 1}, step {last % num_steps + 1}{member}; "
            "a smaller learning rate may help"
        )


def _refit(progress: Progress, params: VAEParams, until: Convergence | None, runs: _Runs) -> Refit:
    curve, encoders = progress.curve, progress.encoders
    encoder = progress.state.params.encoder if until is None else encoders["best"]
    measured = curve.monitor_bpd
    return Refit(
        params=VAEParams(encoder=encoder, decoder=params.decoder),
        averaged_params=VAEParams(encoder=encoders["averaged"], decoder=params.decoder),
        curve=curve,
        num_steps=curve.epoch[-1] * runs.num_steps,
        converged=None if until is None else progress.plateaus > until.num_decays,
        last_improvement=min(measured[:-1]) - measured[-1] if until is not None else None,
    )
