"""The best posterior of every single image: what an encoder without limits would give.

The mathematics is that of one example; `_walk` and `_judge` are where images are vmapped. All
randomness is a function of (rng_key, image, step): not of the batch size, nor of when other
images were finished.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gapjax.fit.optimizers import adam, scale_learning_rate
from gapjax.model.bounds import elbo
from gapjax.model.distributions import from_free, to_free
from gapjax.model.vae import VAE, VAEParams, local_inference

Params = Any


class PosteriorSearch(NamedTuple):
    """How the best posterior of an image is looked for, and when it is found.

    Adam with `num_samples` fresh posterior samples for each gradient, in rounds. After a round
    the mean of its iterates is judged by the ELBO on held-out noise, the same at every round.
    Where that does not improve on the best so far by `tolerance`, the learning rate of the image
    is multiplied by `decay`; where it happens for the (`num_decays` + 1)th time, the image is
    finished and costs no more. Where it is worse than the best, the image goes back to that. The
    best is kept, and the start counts as one.

    Attributes:
      num_samples: S, posterior samples in each gradient.
      learning_rate: of Adam on the free parameters of q (see `distributions.to_free`).
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


class OptimalPosteriors(NamedTuple):
    """The best posteriors of N images, and what it took.

    Attributes:
      posteriors: a pytree as `encode` returns it, every leaf with a leading axis [N].
      kept_start: [N] bool, no round was better than the start, which was kept.
      converged: [N] bool, the image was finished before `max_rounds`.
      num_steps: [N] int, optimizer steps taken.
    """

    posteriors: Any
    kept_start: np.ndarray
    converged: np.ndarray
    num_steps: np.ndarray


class _Search(NamedTuple):
    """The search of N images; every leaf has a leading axis [N].

    Attributes:
      free: free parameters of q, where the optimizer is.
      opt_state: the optimizer's state.
      candidate: what is to be judged: a start, or the mean of a round's iterates.
      best: the best candidate so far.
      best_value: its ELBO on held-out noise, nats.
      num_steps: optimizer steps taken.
      plateaus: judgements without an improvement that counts.
      improved: whether any round was better than the start.
    """

    free: list[jax.Array]
    opt_state: Any
    candidate: list[jax.Array]
    best: list[jax.Array]
    best_value: jax.Array
    num_steps: jax.Array
    plateaus: jax.Array
    improved: jax.Array


def optimal_posteriors(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    images: ArrayLike,
    *,
    encoders: Sequence[Params] | None = None,
    search: PosteriorSearch = PosteriorSearch(),  # noqa: B008 (an immutable tuple)
    batch_size: int = 50,
    on_progress: Callable[[int], None] | None = None,
) -> OptimalPosteriors:
    """The q of the encoder's family with the highest ELBO, for every image by itself (eq. 10).

        q*(z given x) = argmax over q of E_q[log p(x, z) - log q(z)]

    The family is whatever `vae.encode` returns. On unseen images this is fitted to them: it
    measures what the encoder loses, as optimal inference does, but with no limit of capacity.

    Args:
      vae: the model.
      params: trained parameters; the decoder is not changed.
      rng_key: of the search; folded with each image's index.
      images: [N, *event].
      encoders: parameters of encoders to start from, the best of them for each image, judged on
        held-out noise; that of `params` alone by default.
      search: how to look and when to stop.
      batch_size: images at work at once; bounds memory, changes nothing else.
      on_progress: called with the number of images that are finished.

    Returns:
      `OptimalPosteriors`; none is worse than its start on the held-out noise. What they are worth
      is to be measured on fresh noise: see `posterior_bounds`.

    Raises:
      ValueError: no images, or a size that is not positive.
      TypeError: what `encode` returns cannot be optimised; the message says why.

    References:
      Cremer, Li, Duvenaud, Inference Suboptimality in Variational Autoencoders, 2018.
    """
    if len(images) == 0:
        raise ValueError("images is empty; there is no posterior to look for")
    if batch_size < 1 or search.num_decays < 0 or min(search._replace(num_decays=1)) <= 0:
        raise ValueError(f"batch_size is {batch_size} and {search}; all must be positive")
    images = jnp.asarray(images)
    encoders = tuple(encoders) if encoders is not None else (params.encoder,)
    batch_size = min(batch_size, len(images))
    active = np.arange(len(images))

    def advance(state: _Search, steps: int) -> _Search:
        for batch in _batches(active, batch_size):
            if steps:
                keys = _keys(rng_key, batch, state.num_steps, steps, search.num_samples)
                state = _walk(
                    state, encoders[0], params.decoder, keys, images, batch, vae=vae, search=search
                )
            keys = _keys(rng_key, batch, None, 1, search.num_heldout)
            state = _judge(
                state, encoders[0], params.decoder, keys, images, batch, vae=vae, search=search
            )
        return state

    state = None
    for encoder in encoders:
        state = advance(_place(state, _encode(encoder, images, vae=vae), search), 0)
    state = _place(None, state.best, search)._replace(best_value=state.best_value)
    for _ in range(search.max_rounds):
        state = advance(state, search.steps_per_round)
        active = np.flatnonzero(np.asarray(state.plateaus) <= search.num_decays)
        if on_progress is not None:
            on_progress(len(images) - len(active))
        if not len(active):
            break
    return OptimalPosteriors(
        posteriors=_finish(state.best, encoders[0], images, vae=vae),
        kept_start=~np.asarray(state.improved),
        converged=np.asarray(state.plateaus) > search.num_decays,
        num_steps=np.asarray(state.num_steps),
    )


def posterior_bounds(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    images: ArrayLike,
    posteriors: Any,
    *,
    num_samples: int = 20,
    batch_size: int = 50,
) -> np.ndarray:
    """The ELBO of every image with a posterior of its own.

    With the key that `evaluate` had the noise is that of `evaluate`, so that a q and an encoder
    are compared on common noise.

    Args:
      vae: the model.
      params: its parameters; the encoder is not used.
      rng_key: folded with each image's index.
      images: [N, *event].
      posteriors: a q for every image, a pytree with a leading axis [N].
      num_samples: S, posterior samples for each image.
      batch_size: images at once; bounds memory, changes nothing else.

    Returns:
      [N] float32, nats.
    """
    return np.asarray(
        _own_bounds(
            params.decoder, rng_key, jnp.asarray(images), posteriors,
            vae=vae, num_samples=num_samples, batch_size=min(batch_size, len(images)),
        )
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("vae", "num_samples", "batch_size"))
def _own_bounds(decoder, rng_key, images, posteriors, *, vae, num_samples, batch_size):
    """The ELBO [N] of every image with its own posterior, nats."""

    def one(xs: tuple) -> jax.Array:
        index, x, posterior = xs
        key = jax.random.fold_in(rng_key, index)
        return elbo(local_inference(vae), VAEParams(posterior, decoder), key, x, num_samples)

    xs = jnp.arange(len(images)), images, posteriors
    return jax.lax.map(one, xs, batch_size=batch_size)


def _batches(indices: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches [B] of these indices; the last is filled with its own last index."""
    missing = -len(indices) % batch_size
    return list(np.append(indices, np.full(missing, indices[-1])).reshape(-1, batch_size))


def _place(state: _Search | None, free: list[jax.Array], search: PosteriorSearch) -> _Search:
    """Puts the candidates at `free`; without a state, a search that sets out from there."""
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


@functools.partial(jax.jit, static_argnames=("steps", "count"))
def _keys(rng_key, batch, num_steps, steps, count) -> jax.Array:
    """Keys [B, steps, count]: of the steps that follow, or of the held-out noise.

    They are made apart from the draws, which makes the programs that draw quick to compile.
    """

    def one(index: jax.Array, first: jax.Array) -> jax.Array:
        image_key = jax.random.fold_in(rng_key, index)
        step_keys = jax.vmap(lambda step: jax.random.fold_in(image_key, first + step))
        return jax.vmap(lambda key: jax.random.split(key, count))(step_keys(jnp.arange(steps)))

    # 0 is the number of the held-out noise, that of the first step is 1.
    return jax.vmap(one)(batch, 1 + num_steps[batch] if num_steps is not None else 0 * batch)


@functools.partial(jax.jit, static_argnames="vae")
def _encode(encoder, images, *, vae) -> list[jax.Array]:
    """The free parameters of what an encoder gives for every image."""
    return jax.vmap(lambda x: to_free(vae.encode(encoder, x)))(images)


@functools.partial(jax.jit, static_argnames=("vae", "search"), donate_argnames="state")
def _walk(state, encoder, decoder, keys, images, batch, *, vae, search) -> _Search:
    """A round of optimizer steps for the images of `batch`; the others stay where they are."""
    optimizer = adam(search.learning_rate)

    def one(step_keys: jax.Array, x: jax.Array, free: list[jax.Array], opt_state: Any) -> tuple:
        like = vae.encode(encoder, x)

        def step(carry: tuple, sample_keys: jax.Array) -> tuple[tuple, list[jax.Array]]:
            free, opt_state = carry
            loss = lambda free: -_value(vae, decoder, sample_keys, x, like, free)
            updates, opt_state = optimizer.update(jax.grad(loss)(free), opt_state, free)
            free = jax.tree.map(jnp.add, free, updates)
            return (free, opt_state), free

        (free, opt_state), path = jax.lax.scan(step, (free, opt_state), step_keys)
        return free, opt_state, jax.tree.map(lambda leaf: leaf.mean(0), path)

    chosen = jax.tree.map(lambda leaf: leaf[batch], state)
    free, opt_state, mean = jax.vmap(one)(keys, images[batch], chosen.free, chosen.opt_state)
    num_steps = chosen.num_steps + search.steps_per_round
    new = chosen._replace(free=free, opt_state=opt_state, candidate=mean, num_steps=num_steps)
    return jax.tree.map(lambda leaf, part: leaf.at[batch].set(part), state, new)


@functools.partial(jax.jit, static_argnames=("vae", "search"), donate_argnames="state")
def _judge(state, encoder, decoder, keys, images, batch, *, vae, search) -> _Search:
    """Compares the candidates of `batch` with their best; the others stay as they are."""

    def one(heldout_keys: jax.Array, x: jax.Array, state: _Search) -> _Search:
        like = vae.encode(encoder, x)
        value = _value(vae, decoder, heldout_keys[0], x, like, state.candidate)
        better = value > state.best_value  # never where the value is NaN
        plateau = ~(value - state.best_value >= search.tolerance)
        pick = lambda new, old: jnp.where(better, new, old)
        best = jax.tree.map(pick, state.candidate, state.best)
        factor = jnp.where(plateau, search.decay, 1.0)
        return state._replace(
            free=jax.tree.map(pick, state.free, best),
            opt_state=scale_learning_rate(state.opt_state, factor),
            best=best,
            best_value=pick(value, state.best_value),
            plateaus=state.plateaus + plateau,
            improved=state.improved | better,
        )

    chosen = jax.tree.map(lambda leaf: leaf[batch], state)
    new = jax.vmap(one)(keys, images[batch], chosen)
    return jax.tree.map(lambda leaf, part: leaf.at[batch].set(part), state, new)


@functools.partial(jax.jit, static_argnames="vae")
def _finish(best, encoder, images, *, vae) -> Any:
    """The distributions of the free parameters found."""
    return jax.vmap(lambda x, free: from_free(vae.encode(encoder, x), free))(images, best)


def _value(
    vae: VAE, decoder: Params, keys: jax.Array, x: jax.Array, like: Any, free: list[jax.Array]
) -> jax.Array:
    """The ELBO of one example with the posterior of these free parameters, nats; keys [S]."""
    own = VAEParams(from_free(like, free), decoder)
    return jax.vmap(lambda key: elbo(local_inference(vae), own, key, x))(keys).mean()
