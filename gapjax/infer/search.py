"""The best posterior of each image by itself, as an encoder of unlimited capacity would give it.

`_walk` and `_judge` are where images are vmapped and divided among the devices. All randomness is
a function of (rng_key, image, step), whenever other images are finished.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gapjax import optimizers, parallel
from gapjax.examples import count, on_device, own, take, with_shared
from gapjax.infer.newton import Refiner, refine
from gapjax.measure.bounds import Images, check_finite
from gapjax.model.bounds import elbo
from gapjax.model.checks import check_inputs, check_positive
from gapjax.model.free import from_free, to_free
from gapjax.vae import VAE, Params, VAEParams, bind, local_inference

_REFINER = 2**32 - 1  # folded into the key of the refiner; no image has this index


class PosteriorSearch(NamedTuple):
    """How the best posterior of an image is searched for, and when the search ends.

    Adam on the free parameters of q (see `model.free`), with `num_samples` fresh posterior samples
    for each gradient, in at most `max_rounds` rounds of `steps_per_round` steps. After a round the
    mean of its iterates is judged by the ELBO on `num_heldout` samples whose noise is the same in
    every round. If it does not improve on the best so far by `tolerance` nats, the learning rate of
    the image is multiplied by `decay`, and at the (`num_decays` + 1)th time the image is finished.
    If it is worse than the best, the image continues from the best. The result is the best
    candidate, the start included.
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
    """The best posteriors of N images, with statistics of the search."""

    # a pytree as `encode` returns it, every leaf with a leading axis [N] but what is `Frozen`
    posteriors: Any
    kept_start: np.ndarray  # [N] bool, whether no round was better than the start
    converged: np.ndarray  # [N] bool, whether the image was finished before `max_rounds`
    num_steps: np.ndarray  # [N] int, optimizer steps taken


class _Search(NamedTuple):
    """The search of N images: every leaf has a leading axis [N]."""

    free: list[jax.Array]
    opt_state: Any
    candidate: list[jax.Array]
    best: list[jax.Array]
    best_value: optimizers.Value  # nats
    num_steps: jax.Array
    plateaus: optimizers.Value
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

    The family is that of the distributions which `vae.encode` returns. Like optimal inference it
    measures the loss due to the encoder, but for an encoder of unlimited capacity.

    All float parameters of that distribution are the image's own, but what it has in a
    `gapjax.vae.Frozen`. So of a `Chain` whose links are functions these keep their weights, of the
    first encoder: an image has its own first link, and its own of what the functions hold beside.

    Args:
      encoders: parameters of encoders to start from, by default that of `params` alone. Each
        image starts from the best of them, judged on held-out noise.
      refiner: what it makes of each encoder's posterior is another start (see `gapjax.refine`).
      batch_size: images at once, on all devices; bounds memory and changes nothing else.
      on_progress: called after every round with the number of images that are finished.

    Returns:
      `BestPosteriors`; none is worse than its start on the held-out noise. Measure them on
      fresh noise, see `gapjax.measure.bounds.posterior_bounds`.

    Raises:
      FloatingPointError: of an image neither a start nor a round has a finite bound.

    References:
      Cremer, Li, Duvenaud, Inference Suboptimality in Variational Autoencoders, 2018.
    """
    check_inputs("best_posteriors", vae, params, rng_key, images, gradients=True)
    starts: tuple[Params, ...] = (params.encoder,) if encoders is None else tuple(encoders)
    if not starts:
        raise ValueError("encoders is empty; give at least one to start from, or None")
    check_positive(search, zeros=("num_decays",), batch_size=batch_size)
    devices = parallel.all_devices(devices)
    place = functools.partial(parallel.replicate, devices=devices, commit=False)
    on_all = place((rng_key, starts, params.decoder, on_device(images)))
    rng_key, starts, _, images = parallel.unreplicate(on_all)
    _, (encoder, *_), decoder, all_images = on_all
    number = count(images)
    batch_size = min(batch_size, number)
    candidates = [_encode.on(vae=vae)(start, images) for start in starts]
    if refiner is not None:
        key = jax.random.fold_in(rng_key, _REFINER)
        for start in starts:
            refined = refine(
                vae, params._replace(encoder=start), key, images, refiner,
                batch_size=batch_size, devices=devices,
            ).posteriors  # fmt: skip
            candidates.append(_free(refined))
    walk, compare = (step.on(devices, vae=vae, search=search) for step in (_walk, _judge))
    active, rule = np.arange(number), _rule(search)

    def advance(state: _Search, steps: int) -> _Search:
        filling = np.full(-len(active) % batch_size, active[-1])
        for batch in np.append(active, filling).reshape(-1, batch_size):
            if steps:
                num_steps = parallel.unreplicate(state.num_steps)
                keys = _keys.on(steps=steps, count=search.num_samples)(rng_key, batch, num_steps)
                keys, where = place((keys, batch))
                state = walk(state, encoder, decoder, keys, all_images, where)
            keys = _keys.on(steps=1, count=search.num_heldout)(rng_key, batch, None)
            keys, where = place((keys, batch))
            state = compare(state, encoder, decoder, keys, all_images, where)
        return state

    state = place(_begin(candidates[0], search))
    for candidate in candidates:
        state = advance(state._replace(candidate=place(candidate)), 0)
    best: _Search = parallel.unreplicate(state)
    state = place(_begin(best.best, search)._replace(best_value=best.best_value))
    for _ in range(search.max_rounds):
        state = advance(state, search.steps_per_round)
        plateaus = np.asarray(parallel.unreplicate(state.plateaus))
        active = np.flatnonzero(np.logical_not(optimizers.is_finished(rule, plateaus)))
        if on_progress is not None:
            on_progress(number - len(active))
        if not len(active):
            break
    state = parallel.unreplicate(state)
    check_finite(
        vae, params._replace(encoder=starts[0]), rng_key, images, np.asarray(state.best_value)
    )
    return BestPosteriors(
        posteriors=_finish.on(vae=vae)(state.best, starts[0], images),
        kept_start=~np.asarray(state.improved),
        converged=np.asarray(optimizers.is_finished(rule, state.plateaus)),
        num_steps=np.asarray(state.num_steps),
    )


def _rule(search: PosteriorSearch) -> optimizers.Convergence:
    return optimizers.Convergence(search.tolerance, search.decay, search.num_decays)


def _begin(free: list[jax.Array], search: PosteriorSearch) -> _Search:
    """A search that starts at `free`. Its arrays are copies, as it is donated."""
    count = len(free[0])
    state = _Search(
        free=free,
        opt_state=jax.vmap(optimizers.adam(search.learning_rate).init)(free),
        candidate=free,
        best=free,
        best_value=jnp.full(count, -jnp.inf),
        num_steps=jnp.zeros(count, jnp.int32),
        plateaus=jnp.zeros(count, jnp.int32),
        improved=jnp.zeros(count, bool),
    )
    return parallel.copy(state)


@parallel.on_one_device
def _keys(rng_key, batch, num_steps, *, steps, count) -> jax.Array:
    """Keys [B, steps, count]: of the next steps, or of the held-out noise.

    Hashing within the other programs would slow their compilation.
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
    return jax.vmap(lambda example: to_free(_posterior(vae, encoder, example)))(images)


def _free(posteriors: Any) -> list[jax.Array]:
    """The free parameters of the posterior of each image."""
    return jax.vmap(lambda q: to_free(with_shared(q, posteriors)))(own(posteriors))


def _posterior(vae: VAE, encoder: Params, example: Any) -> Any:
    model, x = bind(vae, example)
    return model.encode(encoder, x)


@parallel.donating
def _walk(shard, state, encoder, decoder, keys, images, batch, *, vae, search) -> _Search:
    """A round of optimizer steps for the images of `batch`."""
    optimizer = optimizers.adam(search.learning_rate)

    def one(state: _Search, step_keys: jax.Array, example: Any) -> _Search:
        model, x = bind(vae, example)
        like = model.encode(encoder, x)

        def step(carry: tuple, sample_keys: jax.Array) -> tuple[tuple, list[jax.Array]]:
            free, opt_state = carry
            loss = lambda free: -_value(model, decoder, sample_keys, x, like, free)
            updates, opt_state = optimizer.update(jax.grad(loss)(free), opt_state, free)
            free = jax.tree.map(jnp.add, free, updates)
            return (free, opt_state), free

        (free, opt_state), path = jax.lax.scan(step, (state.free, state.opt_state), step_keys)
        return state._replace(
            free=free,
            opt_state=opt_state,
            candidate=jax.tree.map(lambda leaf: leaf.mean(0), path),
            num_steps=state.num_steps + search.steps_per_round,
        )

    return _replace(shard, state, batch, one, keys, images)


@parallel.donating
def _judge(shard, state, encoder, decoder, keys, images, batch, *, vae, search) -> _Search:
    """Compares the candidates of `batch` with their best."""

    def one(state: _Search, heldout_keys: jax.Array, example: Any) -> _Search:
        model, x = bind(vae, example)
        like = model.encode(encoder, x)
        value = _value(model, decoder, heldout_keys[0], x, like, state.candidate)
        seen = optimizers.PlateauState(state.best_value, state.plateaus)
        seen, judgement = optimizers.judge(_rule(search), seen, value)
        pick = lambda new, old: jnp.where(judgement.is_best, new, old)
        best = jax.tree.map(pick, state.candidate, state.best)
        return state._replace(
            free=jax.tree.map(pick, state.free, best),
            opt_state=optimizers.scale_learning_rate(state.opt_state, judgement.factor),
            best=best,
            best_value=seen.best,
            plateaus=seen.num_plateaus,
            improved=state.improved | judgement.is_best,
        )

    return _replace(shard, state, batch, one, keys, images)


def _replace(shard: parallel.Shard, state, batch, one: Callable, keys, images) -> _Search:
    """The state with `one(its own, keys, x)` for the images of `batch`; others do not change."""
    part, keys = shard.split((batch, keys))
    chosen = jax.tree.map(lambda leaf: leaf[part], state)
    new = shard.merge(jax.vmap(one)(chosen, keys, take(images, part)), len(batch))
    return jax.tree.map(lambda leaf, new: leaf.at[batch].set(new), state, new)


@parallel.on_one_device
def _finish(best, encoder, images, *, vae) -> Any:
    """The distributions that have these free parameters; weights that all share are there once."""
    one = lambda example, free: own(from_free(_posterior(vae, encoder, example), free))
    return with_shared(jax.vmap(one)(images, best), _posterior(vae, encoder, take(images, 0)))


def _value(
    vae: VAE, decoder: Params, keys: jax.Array, x: jax.Array, like: Any, free: list[jax.Array]
) -> jax.Array:
    """The ELBO of one example with the posterior of these free parameters, nats; keys [S]."""
    own = VAEParams(from_free(like, free), decoder)
    return jax.vmap(lambda key: elbo(local_inference(vae), own, key, x))(keys).mean()
