"""The best posterior of each image by itself, as an encoder of unlimited capacity would give it.

The mathematics is written for one example; `_walk` and `_judge` are where images are vmapped and
divided among the devices. All randomness is a function of (rng_key, image, step). It does not
depend on the batch size, the devices, or when other images were finished.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gapjax import parallel
from gapjax.infer.newton import Refiner, refine
from gapjax.measure.bounds import Images
from gapjax.model.bounds import elbo
from gapjax.model.checks import check_inputs
from gapjax.model.free import from_free, to_free
from gapjax.optimizers import (
    Convergence,
    PlateauState,
    Value,
    adam,
    is_finished,
    judge,
    scale_learning_rate,
)
from gapjax.vae import VAE, Params, VAEParams, local_inference

_REFINER = 2**32 - 1  # folded into the key of the refiner; no image has this index


class PosteriorSearch(NamedTuple):
    """How the best posterior of an image is searched for, and when the search ends.

    Adam with `num_samples` fresh posterior samples for each gradient, in rounds. After a round
    the mean of its iterates is judged by the ELBO on held-out noise, which is the same in every
    round. If it does not improve on the best so far by `tolerance`, that is a plateau: the
    learning rate of the image is multiplied by `decay`, and at the (`num_decays` + 1)th plateau
    the image is finished and takes part in no more rounds. If it is worse than the best, the
    image continues from the best. The result is the best candidate, the start included.

    Attributes:
      num_samples: S, posterior samples in each gradient.
      learning_rate: of Adam on the free parameters of q (see `model.free`).
      steps_per_round: optimizer steps between two judgements.
      max_rounds: most rounds for an image.
      num_heldout: posterior samples in a judgement.
      tolerance: smallest improvement that counts, nats.
      decay: factor on the learning rate where there was none.
      num_decays: how many times the learning rate is lowered before an image is finished.
    """

    num_samples: int = 8
    learning_rate: float = 0.05
    steps_per_round: int = 40
    max_rounds: int = 40
    num_heldout: int = 200
    tolerance: float = 0.01
    decay: float = 0.3
    num_decays: int = 3


class BestPosteriors(NamedTuple):
    """The best posteriors of N images, with statistics of the search.

    Attributes:
      posteriors: a pytree as `encode` returns it, every leaf with a leading axis [N].
      kept_start: [N] bool, whether no round was better than the start.
      converged: [N] bool, whether the image was finished before `max_rounds`.
      num_steps: [N] int, optimizer steps taken.
    """

    posteriors: Any
    kept_start: np.ndarray
    converged: np.ndarray
    num_steps: np.ndarray


class _Search(NamedTuple):
    """The search of N images: every leaf has a leading axis [N], and values are in nats."""

    free: list[jax.Array]
    opt_state: Any
    candidate: list[jax.Array]
    best: list[jax.Array]
    best_value: Value
    num_steps: jax.Array
    plateaus: Value
    improved: jax.Array


def best_posteriors(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    images: Images,
    *,
    encoders: Sequence[Params] | None = None,
    refiner: Refiner | None = None,
    search: PosteriorSearch = PosteriorSearch(),  # noqa: B008 (an immutable tuple)
    batch_size: int = 50,
    devices: parallel.Devices | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> BestPosteriors:
    """The q of the encoder's family with the highest ELBO, for each image by itself (eq. 10).

        q*(z given x) = argmax over q of E_q[log p(x, z) - log q(z)]

    The family is that of the distributions which `vae.encode` returns. On unseen images q is
    fitted to them. So this measures the loss due to the encoder, like optimal inference, but for
    an encoder of unlimited capacity.

    Args:
      params: trained parameters; the decoder is not changed.
      rng_key: of the search; folded with each image's index.
      encoders: parameters of encoders to start from, by default that of `params` alone. Each
        image starts from the best of them, judged on held-out noise.
      refiner: what it makes of each encoder's posterior is another start (see `gapjax.refine`);
        None for the encoders alone.
      search: how to search and when to stop.
      batch_size: images that are searched for together, on all devices; bounds memory and changes
        nothing else.

    Returns:
      `BestPosteriors`; none is worse than its start on the held-out noise. Measure them on
      fresh noise, see `gapjax.measure.bounds.posterior_bounds`.

    Raises:
      ValueError: no images, no encoders, a size that is not positive, or as of `evaluate`.
      TypeError: as of `evaluate`, or the distribution that `encode` returns cannot be optimised;
        the message says why.

    References:
      Cremer, Li, Duvenaud, Inference Suboptimality in Variational Autoencoders, 2018.
    """
    check_inputs("best_posteriors", vae, params, rng_key, images, gradients=True)
    if encoders is not None and not len(encoders):
        raise ValueError("encoders is empty; give at least one to start from, or None")
    if batch_size < 1 or search.num_decays < 0 or min(search._replace(num_decays=1)) <= 0:
        raise ValueError(f"batch_size is {batch_size} and {search}; all must be positive")
    devices = parallel.all_devices(devices)
    starts: tuple[Any, ...] = tuple(encoders) if encoders is not None else (params.encoder,)
    arrays = (rng_key, starts, params.decoder, jnp.asarray(images))
    on_all = parallel.replicate(arrays, devices, commit=False)
    rng_key, starts, _, images = parallel.unreplicate(on_all)
    _, (encoder, *_), decoder, all_images = on_all
    batch_size = min(batch_size, len(images))
    free = [_encode.on(vae=vae)(each, images) for each in starts]
    if refiner is not None:
        key = jax.random.fold_in(rng_key, _REFINER)
        for encoder in encoders or (params.encoder,):
            refined = refine(
                vae, params._replace(encoder=encoder), key, images, refiner,
                batch_size=batch_size, devices=devices,
            )  # fmt: skip
            free.append(jax.vmap(to_free)(refined.posteriors))
    walk, compare = (step.on(devices, vae=vae, search=search) for step in (_walk, _judge))
    active, rule = np.arange(len(images)), _rule(search)

    def advance(state: _Search, steps: int) -> _Search:
        for batch in _batches(active, batch_size):
            if steps:
                num_steps = parallel.unreplicate(state.num_steps)
                keys = _keys.on(steps=steps, count=search.num_samples)(rng_key, batch, num_steps)
                keys, where = parallel.replicate((keys, batch), devices, commit=False)
                state = walk(state, encoder, decoder, keys, all_images, where)
            keys = _keys.on(steps=1, count=search.num_heldout)(rng_key, batch, None)
            keys, where = parallel.replicate((keys, batch), devices, commit=False)
            state = compare(state, encoder, decoder, keys, all_images, where)
        return state

    state: Any = None
    for start in free:
        placed = _place(parallel.unreplicate(state), start, search)
        state = advance(parallel.replicate(placed, devices, commit=False), 0)
    best: _Search = parallel.unreplicate(state)
    placed = _place(None, best.best, search)._replace(best_value=best.best_value)
    state = parallel.replicate(placed, devices, commit=False)
    for _ in range(search.max_rounds):
        state = advance(state, search.steps_per_round)
        plateaus = np.asarray(parallel.unreplicate(state.plateaus))
        active = np.flatnonzero(np.logical_not(is_finished(rule, plateaus)))
        if on_progress is not None:
            on_progress(len(images) - len(active))
        if not len(active):
            break
    state = parallel.unreplicate(state)
    return BestPosteriors(
        posteriors=_finish.on(vae=vae)(state.best, starts[0], images),
        kept_start=~np.asarray(state.improved),
        converged=np.asarray(is_finished(rule, state.plateaus)),
        num_steps=np.asarray(state.num_steps),
    )


def _rule(search: PosteriorSearch) -> Convergence:
    return Convergence(search.tolerance, search.decay, search.num_decays)


def _batches(indices: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches [B] of these indices; the last is filled with its own last index."""
    missing = -len(indices) % batch_size
    return list(np.append(indices, np.full(missing, indices[-1])).reshape(-1, batch_size))


def _place(state: _Search | None, free: list[jax.Array], search: PosteriorSearch) -> _Search:
    """Replaces the candidates by `free`; without a state, a new search that starts there."""
    if state is not None:
        return state._replace(candidate=free)
    count = len(free[0])
    copies = [[jnp.copy(leaf) for leaf in free] for _ in range(3)]  # the state is donated
    return _Search(
        free=copies[0],
        opt_state=jax.tree.map(jnp.copy, jax.vmap(adam(search.learning_rate).init)(free)),
        candidate=copies[1],
        best=copies[2],
        best_value=jnp.full(count, -jnp.inf),
        num_steps=jnp.zeros(count, jnp.int32),
        plateaus=jnp.zeros(count, jnp.int32),
        improved=jnp.zeros(count, bool),
    )


@parallel.on_one_device
def _keys(rng_key, batch, num_steps, *, steps, count) -> jax.Array:
    """Keys [B, steps, count]: of the next steps, or of the held-out noise.

    They are made by a program of their own, because hashing slows the compilation of the others.
    """

    def one(index: jax.Array, first: jax.Array) -> jax.Array:
        image_key = jax.random.fold_in(rng_key, index)
        step_keys = jax.vmap(lambda step: jax.random.fold_in(image_key, first + step))
        return jax.vmap(lambda key: jax.random.split(key, count))(step_keys(jnp.arange(steps)))

    # The held-out noise has the number 0, the first step has 1.
    return jax.vmap(one)(batch, 1 + num_steps[batch] if num_steps is not None else 0 * batch)


@parallel.on_one_device
def _encode(encoder, images, *, vae) -> list[jax.Array]:
    """The free parameters of the posterior that an encoder gives for each image."""
    return jax.vmap(lambda x: to_free(vae.encode(encoder, x)))(images)


@parallel.donating
def _walk(shard, state, encoder, decoder, keys, images, batch, *, vae, search) -> _Search:
    """A round of optimizer steps for the images of `batch`; the others are not changed."""
    optimizer = adam(search.learning_rate)

    def one(step_keys: jax.Array, x: jax.Array, free: list[jax.Array], opt_state: Any) -> tuple:
        like = vae.encode(encoder, x)

        def step(carry: tuple, sample_keys: jax.Array) -> tuple[tuple, list[jax.Array]]:
            free, opt_state = carry
            loss = lambda free: -_value(vae, decoder, sample_keys, x, like, free)
            gradient = jax.grad(loss)(free)
            updates, opt_state = optimizer.update(gradient, opt_state, free)
            free = jax.tree.map(jnp.add, free, updates)
            return (free, opt_state), free

        (free, opt_state), path = jax.lax.scan(step, (free, opt_state), step_keys)
        return free, opt_state, jax.tree.map(lambda leaf: leaf.mean(0), path)

    part, keys = shard.split((batch, keys))
    chosen = jax.tree.map(lambda leaf: leaf[part], state)
    free, opt_state, mean = jax.vmap(one)(keys, images[part], chosen.free, chosen.opt_state)
    num_steps = chosen.num_steps + search.steps_per_round
    new = chosen._replace(free=free, opt_state=opt_state, candidate=mean, num_steps=num_steps)
    return _put(shard, state, batch, new)


@parallel.donating
def _judge(shard, state, encoder, decoder, keys, images, batch, *, vae, search) -> _Search:
    """Compares the candidates of `batch` with their best; the others are not changed."""

    def one(heldout_keys: jax.Array, x: jax.Array, state: _Search) -> _Search:
        like = vae.encode(encoder, x)
        value = _value(vae, decoder, heldout_keys[0], x, like, state.candidate)
        seen = PlateauState(state.best_value, state.plateaus)
        seen, judgement = judge(_rule(search), seen, value)
        pick = lambda new, old: jnp.where(judgement.is_best, new, old)
        best = jax.tree.map(pick, state.candidate, state.best)
        return state._replace(
            free=jax.tree.map(pick, state.free, best),
            opt_state=scale_learning_rate(state.opt_state, judgement.factor),
            best=best,
            best_value=seen.best,
            plateaus=seen.num_plateaus,
            improved=state.improved | judgement.is_best,
        )

    part, keys = shard.split((batch, keys))
    chosen = jax.tree.map(lambda leaf: leaf[part], state)
    new = jax.vmap(one)(keys, images[part], chosen)
    return _put(shard, state, batch, new)


def _put(shard: parallel.Shard, state: _Search, batch: jax.Array, part: _Search) -> _Search:
    """The state with the images of `batch` replaced, from the parts of all shares."""
    new = shard.merge(part, len(batch))
    return jax.tree.map(lambda leaf, new: leaf.at[batch].set(new), state, new)


@parallel.on_one_device
def _finish(best, encoder, images, *, vae) -> Any:
    """The distributions that have these free parameters."""
    return jax.vmap(lambda x, free: from_free(vae.encode(encoder, x), free))(images, best)


def _value(
    vae: VAE, decoder: Params, keys: jax.Array, x: jax.Array, like: Any, free: list[jax.Array]
) -> jax.Array:
    """The ELBO of one example with the posterior of these free parameters, nats; keys [S]."""
    own = VAEParams(from_free(like, free), decoder)
    return jax.vmap(lambda key: elbo(local_inference(vae), own, key, x))(keys).mean()
