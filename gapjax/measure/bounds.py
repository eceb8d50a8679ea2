"""A bound of every image of a set, in nats, with the noise that belongs to each image."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gapjax import parallel
from gapjax.examples import count, on_device, own, take, with_shared
from gapjax.model.bounds import elbo
from gapjax.model.checks import check_inputs, check_positive, explain
from gapjax.model.free import of_images
from gapjax.vae import VAE, VAEParams, bind, local_inference

Images = Any  # [N, *event], or a dict or `Given` of such arrays
Bound = Callable[[VAE, VAEParams, jax.Array, jax.Array, int], jax.Array]

_GRADIENTS = 10  # held at once, each as large as the encoder


def per_image_bounds(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    images: Images,
    *,
    num_samples: int = 1,
    batch_size: int = 500,
    bound: Bound = elbo,
    devices: parallel.Devices | None = None,
) -> jax.Array:
    """The bound [N] of every image in nats, averaged over S posterior samples; see `evaluate`."""
    check_positive(num_samples=num_samples, batch_size=batch_size)
    check_inputs("this evaluation", vae, params, rng_key, images)
    return bounds(
        params, rng_key, on_device(images), devices=devices, vae=vae, num_samples=num_samples,
        batch_size=min(batch_size, count(images)), bound=bound,
    )  # fmt: skip


def encoder_gradient_norms(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    images: Images,
    *,
    num_samples: int = 1,
    devices: parallel.Devices | None = None,
) -> np.ndarray:
    """Norms [N] of the ELBO's gradient, in nats per unit of the encoder's parameters.

        g(x) = || grad_phi ELBO(x, theta, phi) ||

    A step of a refit takes the mean of such gradients, of one sample, over a batch.
    `statistics.effective_number` of the squares estimates how many images dominate it.
    """
    check_inputs("encoder_gradient_norms", vae, params, rng_key, images, gradients=True)
    norms = np.asarray(per_image_bounds(
        vae, params, rng_key, images, num_samples=num_samples, batch_size=_GRADIENTS,
        bound=_encoder_gradient_norm, devices=devices,
    ))  # fmt: skip
    check_finite(vae, params, rng_key, images, norms, num_samples, what="the gradient's norm")
    return norms


def posterior_bounds(
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    images: Images,
    posteriors: Any,
    *,
    num_samples: int = 20,
    batch_size: int = 50,
    bound: Bound = elbo,
    devices: parallel.Devices | None = None,
) -> np.ndarray:
    """The bound [N] of every image with a posterior of its own, in nats.

    With the key that `evaluate` was given the noise is that of `evaluate`, so that a q and an
    encoder are compared on common noise.

    Args:
      posteriors: a q for every image, a pytree with a leading axis [N] but for what is `Frozen`, in
        place of the encoder's.

    Raises:
      FloatingPointError: as in `evaluate`.
    """
    posteriors = of_images(posteriors, images)
    check_inputs("posterior_bounds", vae, params, rng_key, images, posteriors=posteriors)
    nats = np.asarray(_posterior_bounds(
        params.decoder, rng_key, on_device(images), posteriors, devices=devices, vae=vae,
        num_samples=num_samples, batch_size=min(batch_size, count(images)), bound=bound,
    ))  # fmt: skip
    check_finite(vae, params, rng_key, images, nats, num_samples, posteriors=posteriors)
    return nats


def check_finite(
    vae: VAE, params: VAEParams, rng_key: jax.Array, images: Images, nats: np.ndarray,
    num_samples: int = 1, *, posteriors: Any = None, what: str = "the bound",
) -> None:  # fmt: skip
    """Raises FloatingPointError where one of the values [N] is NaN or infinite, and says why."""
    bad = np.flatnonzero(~np.isfinite(nats))
    if not len(bad):
        return
    index, reason = int(bad[0]), None
    if isinstance(vae, VAE):
        x, key = on_device(take(images, index)), jax.random.fold_in(rng_key, index)
        if posteriors is not None:
            what += " with its own posterior"
            vae, params = local_inference(vae), VAEParams(take(posteriors, index), params.decoder)
        reason = explain(vae, params, key, x, num_samples)
        if posteriors is not None and reason:
            reason = reason.replace("params.encoder", "that posterior")
    raise FloatingPointError(
        f"{what} of image {index} is {nats[index]} nats, and that of {len(bad)} of "
        f"{len(nats)} images is not finite" + (f": {reason}" if reason else "")
    )


@functools.partial(parallel.program, commit=True)
def bounds(
    shard: parallel.Shard, params: VAEParams, rng_key: jax.Array, images: jax.Array,
    *, vae: VAE, num_samples: int, batch_size: int, bound: Bound,
) -> jax.Array:  # fmt: skip
    """The bound of every image [N], in nats; each device computes its share of every batch."""
    num_images = count(images)

    def one(index: jax.Array) -> jax.Array:
        model, x = bind(vae, take(images, jnp.minimum(index, num_images - 1)))
        return bound(model, params, jax.random.fold_in(rng_key, index), x, num_samples)

    share = -(-batch_size // shard.count)
    num_batches = -(-num_images // (share * shard.count))
    first = shard.index * num_batches * share
    indices = (first + jnp.arange(num_batches * share)).reshape(num_batches, share)
    nats = jax.lax.map(jax.vmap(one), indices).reshape(-1)
    return shard.concatenate(nats)[:num_images]


def _encoder_gradient_norm(
    vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array, num_samples: int
) -> jax.Array:
    """See `encoder_gradient_norms`; of one image, in the form of a bound."""
    bound = lambda encoder: elbo(vae, params._replace(encoder=encoder), rng_key, x, num_samples)
    gradient = jax.tree.leaves(jax.grad(bound)(params.encoder))
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in gradient))


@parallel.program
def _posterior_bounds(
    shard, decoder, rng_key, images, posteriors, *, vae, num_samples, batch_size, bound
) -> jax.Array:
    """See `posterior_bounds`."""

    def one(xs: tuple) -> jax.Array:
        index, example, posterior = xs
        model, x = bind(vae, example)
        posterior = with_shared(posterior, posteriors)
        key = jax.random.fold_in(rng_key, index)
        return bound(local_inference(model), VAEParams(posterior, decoder), key, x, num_samples)

    xs = shard.split((jnp.arange(count(images)), images, own(posteriors)))
    nats = jax.lax.map(one, xs, batch_size=-(-batch_size // shard.count))
    return shard.merge(nats, count(images))
