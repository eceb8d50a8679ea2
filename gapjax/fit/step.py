"""One optimizer step of one run, and the compiled scan of many of them.

`run_steps` is what `train` and the refits compile: it plans and draws for many steps at once and
scans over them.

All randomness is a function of (state.rng_key, epoch, position of the example in the epoch).
Evaluating, interrupting and resuming, the number of devices, and being one run of a sweep do not
change it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from gapjax import parallel
from gapjax.examples import take
from gapjax.fit.objectives import needs_rsample
from gapjax.fit.sources import Source, check_source, draw_examples, drawn_images, first_example
from gapjax.fit.streams import loaded, streams
from gapjax.model.bounds import elbo
from gapjax.model.checks import (
    check_images,
    check_model,
    check_positive,
    check_reparameterized,
    check_trainable,
    explain,
)
from gapjax.optimizers import adam
from gapjax.vae import VAE, VAEParams, bind

Objective = Callable[[VAE, VAEParams, jax.Array, jax.Array], jax.Array]


class TrainState(NamedTuple):
    """Everything that the next step depends on. A run that is saved and restored is unchanged."""

    params: VAEParams  # the VAE's parameters
    opt_state: optax.OptState  # the optimizer's state
    # [] int32, number of optimizer steps taken. It determines the epoch and the batch
    step: jax.Array
    # [] typed key of the run. It is folded with epoch and position, and never changes
    rng_key: jax.Array


class StepInfo(NamedTuple):
    """What a step reports; nothing later depends on it.

    The sum of the objective over the examples of the step, in nats; their number [] int32, of which
    the last step of an epoch may have fewer; and whether every parameter is finite after it.
    """

    objective: jax.Array
    num_examples: jax.Array
    is_finite: jax.Array


class Kernel(NamedTuple):
    """The pair `init(params, rng_key) -> TrainState` and `step(state) -> (state, StepInfo)`."""

    init: Callable[[VAEParams, jax.Array], TrainState]
    step: Callable[[TrainState], tuple[TrainState, StepInfo]]


def kernel(
    vae: VAE,
    source: Source,
    optimizer: optax.GradientTransformation,
    *,
    batch_size: int,
    objective: Objective = elbo,
) -> Kernel:
    """The pure step of one run, for a loop of your own.

    A step draws its batch, takes the gradient of the mean objective and updates the parameters.
    Driven from the same state it computes what `gapjax.train` computes, up to the rounding of
    differently compiled programs; with `encoder_only(optimizer)` it is the step of a refit.

    `step` is compiled at its first call and takes the arrays of `source` as arguments. It may be
    used inside `jax.jit`, `jax.lax.scan` and `jax.vmap`; there the arrays of `source` become
    constants of the program. Every call plans the epoch anew (`source.begin_epoch`), which for a
    `data_source` is a permutation of the data.

    Args:
      batch_size: examples in a step; the last step of an epoch takes the examples that are left.
    """
    check_batch_size(batch_size, source.num_examples)
    step = _one_step.on(vae=vae, optimizer=optimizer, batch_size=batch_size, objective=objective)

    def init(params: VAEParams, rng_key: jax.Array) -> TrainState:
        check_run(vae, params, [source], objective)
        return init_state(params, rng_key, optimizer)

    return Kernel(init=init, step=lambda state: step(state, source))


@parallel.on_one_device
def _one_step(
    state: TrainState, source: Source, *, batch_size: int, **static: Any
) -> tuple[TrainState, StepInfo]:
    """The step of `kernel`."""
    number = source.num_examples
    first = state.step % steps_per_epoch(number, batch_size) * batch_size
    state, sums, is_finite = run_steps.function(
        parallel.WHOLE, state, source, batch_size=batch_size, num_steps=1, **static
    )
    return state, StepInfo(sums[0], jnp.minimum(batch_size, number - first), is_finite)


def check_run(vae: VAE, params: VAEParams, sources: Sequence[Source], objective: Objective) -> None:
    """Checks the model and the data of a run; an objective may say `needs_rsample = False`."""
    for source in sources:
        check_source(source)
    model = check_model(vae, params, jax.eval_shape(first_example, sources[0]))
    if needs_rsample(objective):
        check_reparameterized(model)
    check_trainable(params)
    arrays = {id(images): images for source in sources for images in drawn_images(source)}
    for images in arrays.values():
        check_images("the data of source", images, model)


def init_state(
    params: VAEParams, rng_key: jax.Array, optimizer: optax.GradientTransformation | None = None
) -> TrainState:
    """A state at step 0, from which `train` starts with `state=`.

    It has the structure and the shapes of every later state of the run, and copies of the
    arguments, because a run donates its state. Adam at 1e-3 by default.
    """
    opt_state = (optimizer or adam(1e-3)).init(params)  # its arrays may be one, as those of lbfgs
    state = TrainState(params, opt_state, jnp.zeros((), jnp.int32), rng_key)
    return parallel.copy(state)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Number of steps that see every example once; the last may have fewer examples."""
    check_positive(batch_size=batch_size)
    return -(-num_examples // batch_size)


def check_batch_size(batch_size: int, num_examples: int) -> None:
    """Raises ValueError unless 1 <= batch_size <= num_examples."""
    check_positive(batch_size=batch_size)
    if batch_size > num_examples:
        raise ValueError(
            f"batch_size is {batch_size}, more than the {num_examples} examples of an epoch"
        )


@parallel.donating
def run_steps(
    shard: parallel.Shard,
    state: TrainState,
    source: Source,
    *,
    vae: VAE,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    objective: Objective,
    num_steps: int,
) -> tuple[TrainState, jax.Array, jax.Array]:
    """The next `num_steps` steps of an epoch as one scan. They must not cross its end.

        loss = -(sum_b weights_b objective(x_b)) / num_examples

    This is where examples are vmapped and where the gradients of the devices are summed. Returns
    the state after the steps; the sum of the objective over each step's examples [num_steps], nats;
    and whether every parameter is finite.
    """

    def step(state: TrainState, batch: tuple) -> tuple[TrainState, jax.Array]:
        x, rng_keys, weights, num_examples = batch

        def loss(params: VAEParams) -> jax.Array:
            values = _objectives(vae, objective, params, rng_keys, x)
            return -jnp.vdot(weights, values) / num_examples.astype(values.dtype)

        value, gradients = shard.sum(jax.value_and_grad(loss)(state.params))
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state.params, updates)
        state = TrainState(params, opt_state, state.step + 1, state.rng_key)
        return state, -value * num_examples.astype(value.dtype)

    state, sums = jax.lax.scan(step, state, _batches(shard, state, source, batch_size, num_steps))
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)])
    return state, sums, finite.all()


def _batches(
    shard: parallel.Shard, state: TrainState, source: Source, batch_size: int, num_steps: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The x, the keys and the weights of a device's share, and the size, of the next batches.

    Where a batch does not divide evenly among the devices, and at the end of an epoch, a share is
    padded with copies of the epoch's last example, key and all, of weight zero: 0 times what is
    finite where the examples are. All is drawn together: one large program is cheaper than many
    small ones inside the scan.
    """
    if streams(source):
        raise TypeError(
            "source holds a stream, which `train` and the refits alone load; give what fits the "
            "device, such as gapjax.data_source(images)"
        )
    number = source.num_examples
    epoch, first_step = jnp.divmod(state.step, steps_per_epoch(number, batch_size))
    first_positions = (first_step + jnp.arange(num_steps)) * batch_size
    plan_key, examples_key = _epoch_keys(state, epoch)
    share = -(-batch_size // shard.count)
    slots = shard.index * share + jnp.arange(share)
    positions = first_positions[:, None] + slots[None]
    is_padding = (slots[None] >= batch_size) | (positions >= number)
    positions = jnp.where(is_padding, number - 1, positions)
    keys_at = lambda i: jax.random.split(jax.random.fold_in(examples_key, i))
    keys = jax.vmap(keys_at)(positions.ravel())  # to draw x, and for the objective's noise
    x = draw_examples(source, source.begin_epoch(plan_key), keys[:, 0], positions.ravel())
    by_step = lambda a: a.reshape(*positions.shape, *a.shape[1:])
    x, keys = jax.tree.map(by_step, (x, keys[:, 1]))
    sizes = jnp.clip(number - first_positions, 1, batch_size)
    return x, keys, jnp.where(is_padding, 0.0, 1.0), sizes


def _epoch_keys(state: TrainState, epoch: ArrayLike) -> jax.Array:
    """The keys of an epoch's plan and of its examples."""
    return jax.random.split(jax.random.fold_in(state.rng_key, epoch))


def load_steps(
    source: Source, state: TrainState, step: int, num_steps: int, batch_size: int
) -> Source:
    """The source with what its streams hold for the steps of an epoch after `step`."""
    epoch, step = divmod(step, steps_per_epoch(source.num_examples, batch_size))
    first = step * batch_size
    number = min(num_steps * batch_size, source.num_examples - first)
    return loaded(source, _epoch_keys(state, epoch)[0], first, number)


def _objectives(
    vae: VAE, objective: Objective, params: VAEParams, rng_keys: jax.Array, examples: Any
) -> jax.Array:
    """The objective of every example [B], of the model at its context."""

    def one(rng_key: jax.Array, example: Any) -> jax.Array:
        model, x = bind(vae, example)
        return objective(model, params, rng_key, x)

    return jax.vmap(one)(rng_keys, examples)


def explain_step(
    vae: VAE, objective: Objective, source: Source, state: TrainState, batch_size: int
) -> str:
    """What is not finite of the objective on the batch that follows this state, in words."""
    source = load_steps(source, state, int(state.step), 1, batch_size)
    draw = jax.jit(lambda state, source: _batches(parallel.WHOLE, state, source, batch_size, 1))
    x, (keys,), *_ = draw(state, source)
    x = take(x, 0)
    of_all = jax.jit(lambda params: _objectives(vae, objective, params, keys, x))
    bad = np.flatnonzero(~np.isfinite(np.asarray(of_all(state.params))))
    if len(bad):
        index = int(bad[0])
        found = explain(vae, state.params, keys[index], take(x, index))
        first = int(state.step) % steps_per_epoch(source.num_examples, batch_size) * batch_size
        return (
            f"the objective of example {first + index} of the epoch is not finite: "
            f"{found or 'no part of the bound is at fault'}"
        )
    gradient = jax.jit(jax.grad(lambda params: of_all(params).sum()))(state.params)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)):
        return "the gradient of the objective is not finite on this batch"
    return "this batch is finite"
