"""Checks of a model and of its data, made once and before the work.

`check_model` traces the functions of a model with shapes alone, so that it computes nothing.
`check_images` compares images with the support of the likelihood. Why a bound is not finite is
told by `model/explanation`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gapjax.model.arguments import check_array, check_concrete, check_key
from gapjax.model.vae import VAE, Params, VAEParams, local_inference, log_prob, observed, sample

_ROLES = {
    "prior": "the prior p(z)",
    "posterior": "the posterior q(z given x), which encode returns,",
    "likelihood": "the likelihood p(x given z), which decode returns,",
}
_BLOCK = 2**22  # pixels that are compared with a support at once


class Model(NamedTuple):
    """What `check_model` found.

    Attributes:
      posterior: name of the type of q(z given x).
      has_rsample: whether its samples can be differentiated. Distributions that do not say so
        (NumPyro's have an attribute `has_rsample`) are taken to be.
      likelihood: name of the type of p(x given z).
      support: the constraint on x of the likelihood; None where it does not say, or where it
        depends on z.
    """

    posterior: str
    has_rsample: bool
    likelihood: str
    support: Any


def check_model(vae: VAE, params: VAEParams, x: Any) -> Model:
    """Checks the three distributions of a model; nothing is computed.

    Each must be a distribution of one whole example: its `log_prob` is a scalar. Latents of q
    have the shape of those of the prior, and p(x given z) is over an x of the shape given.

    Args:
      vae: the model.
      params: its parameters, arrays or their shapes.
      x: one example [*event], or its shape and dtype.

    Returns:
      A `Model`.

    Raises:
      TypeError: `params` has no encoder and decoder, or a distribution is none.
      ValueError: a distribution is not of one whole example or latent, shapes do not agree, or
        `encode` or `decode` fails on one example. The message names the culprit.
    """
    if not (hasattr(params, "encoder") and hasattr(params, "decoder")):
        hint = "; give its .params" if hasattr(params, "params") else ""
        raise TypeError(f"params is of type {type(params).__name__}, not a VAEParams{hint}")
    leaves, treedef = jax.tree.flatten((params, x))
    specs = tuple(jax.tree.map(_spec, leaves))
    try:
        return _inspect(vae, treedef, specs)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return _inspect.__wrapped__(vae, treedef, specs)


def check_reparameterized(model: Model) -> None:
    """Raises TypeError where gradients do not pass through the samples of q(z given x)."""
    if not model.has_rsample:
        raise TypeError(
            f"the posterior that encode returns, {model.posterior}, cannot be reparameterized: no "
            "gradient passes through its samples. Take another family, or an objective with "
            "another estimator of the gradient that says so by an attribute needs_rsample = False"
        )


def check_images(name: str, images: Any, model: Model) -> None:
    """Checks that images are in the support of the likelihood, where that is known.

    Args:
      name: of the argument, for the message.
      images: [N, *event].
      model: of `check_model`.

    Raises:
      ValueError: an image has a value outside the support (a NaN is outside of every one).
    """
    if model.support is None:
        return
    images = np.asarray(images)
    block = max(1, _BLOCK // max(1, math.prod(images.shape[1:])))
    for first in range(0, len(images), block):
        part = images[first : first + block]
        valid = _is_valid(model.support, part)
        if valid is None or valid.all():
            continue
        index = first + int(np.argmin(valid))
        raise ValueError(
            f"{name}: image {index} {_outside(model.support, images[index])}, outside of the "
            f"support of p(x given z): {model.likelihood} takes {_innermost(model.support)}"
        )


def check_inputs(
    function: str, vae: VAE, params: VAEParams, rng_key: jax.Array, images: Any
) -> Model | None:
    """Checks what a measurement of images is given: the model, the key and the images.

    Args:
      function: that was called, for the message.
      vae: the model; anything else is not looked at, as a bound of one's own may not need one.
      params: its parameters.
      rng_key: one key.
      images: [N, *event].

    Returns:
      What is known of the model.

    Raises:
      TypeError: see `check_array`, `check_key`, `check_concrete` and `check_model`.
      ValueError: see `check_array`, `check_key`, `check_model` and `check_images`.
    """
    check_concrete(
        function, "there use jax.vmap over gapjax.elbo, which is a function of one example",
        params=params, rng_key=rng_key, images=images,
    )  # fmt: skip
    check_array("images", images)
    check_key(rng_key)
    if not isinstance(vae, VAE):
        return None
    model = check_model(vae, params, jax.ShapeDtypeStruct(images.shape[1:], images.dtype))
    check_images("images", images, model)
    return model


def check_local(
    function: str, vae: VAE, params: VAEParams, rng_key: jax.Array, images: Any, posteriors: Any
) -> None:
    """The checks of `check_inputs` where every image has a posterior of its own.

    Args:
      function: that was called, for the message.
      vae: the model.
      params: its parameters.
      rng_key: one key.
      images: [N, *event].
      posteriors: a q for every image, a pytree with a leading axis [N]; None takes the encoder's.

    Raises:
      TypeError: as of `check_inputs`.
      ValueError: as of `check_inputs`, or there is not a posterior for each image.
    """
    if posteriors is None:
        check_inputs(function, vae, params, rng_key, images)
        return
    check_array("images", images)
    for leaf in jax.tree.leaves(posteriors):
        if np.shape(leaf)[:1] != images.shape[:1]:
            raise ValueError(
                f"posteriors has an array of shape {np.shape(leaf)}; each needs a leading axis of "
                f"{images.shape[0]}, as there are {images.shape[0]} images"
            )
    first = jax.tree.map(lambda leaf: leaf[0], posteriors)
    check_inputs(function, local_inference(vae), VAEParams(first, params.decoder), rng_key, images)


def one_log_prob(role: str, distribution: Any, value: jax.Array) -> jax.Array:
    """Log-probability of one whole example or latent, checked to be a scalar.

    Args:
      role: "prior", "posterior" or "likelihood".
      distribution: in that role.
      value: one example or latent.

    Raises:
      ValueError: the log-probability is not a scalar.
    """
    result = log_prob(distribution, value)
    check_scalar(role, distribution, jnp.shape(result))
    return result


def check_scalar(role: str, distribution: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the log-probability of one value has the shape ()."""
    if shape != ():
        raise ValueError(
            f"{_ROLES[role]} is not a distribution of one whole "
            f"{'example' if role == 'likelihood' else 'latent'}: log_prob of "
            f"{type_name(distribution)} has the shape {shape} where a scalar is needed; with "
            f"NumPyro declare its axes as one event by .to_event({len(shape)})"
        )


@functools.lru_cache(64)
def _inspect(vae: VAE, treedef: Any, specs: tuple) -> Model:
    """See `check_model`; of equal models and shapes the result is known."""
    params, x = jax.tree.unflatten(treedef, specs)
    found: dict[str, Any] = {}

    def trace(params: VAEParams, x: jax.Array, rng_key: jax.Array) -> None:
        where = f"one example x of shape {x.shape} and dtype {x.dtype}, without a batch axis"
        posterior = _call("encode", vae.encode, params.encoder, x, where)
        latents = {}
        for role, distribution in (("prior", vae.prior), ("posterior", posterior)):
            _check_type(role, distribution, ("sample", "log_prob"))
            z = sample(distribution, rng_key)
            one_log_prob(role, distribution, z)
            latents[role] = z
        if latents["prior"].shape != latents["posterior"].shape:
            raise ValueError(
                f"latents of the posterior have the shape {latents['posterior'].shape}, those of "
                f"the prior {latents['prior'].shape}; they must be the same"
            )
        z = latents["posterior"]
        likelihood = _call("decode", vae.decode, params.decoder, z, f"one z of shape {z.shape}")
        _check_type("likelihood", likelihood, ("log_prob",))
        event_shape = getattr(likelihood, "event_shape", None)
        if event_shape is not None and tuple(event_shape) != x.shape and not _batch(likelihood):
            raise ValueError(
                f"the likelihood p(x given z), which decode returns, is over an x of shape "
                f"{tuple(event_shape)}, but an example has the shape {x.shape}"
            )
        one_log_prob("likelihood", likelihood, observed(x))
        found.update(
            posterior=type_name(posterior),
            has_rsample=bool(getattr(posterior, "has_rsample", True)),
            likelihood=type_name(likelihood),
            support=_support(likelihood),
        )

    jax.eval_shape(trace, params, x, jax.random.key(0))
    return Model(**found)


def _call(name: str, function: Any, params: Params, value: jax.Array, where: str) -> Any:
    """`encode` or `decode`; an error in it is told with what it was given."""
    try:
        return function(params, value)
    except Exception as error:
        raise ValueError(
            f"{name} fails on {where}: {type(error).__name__}: {str(error).splitlines()[0]}"
            if str(error)
            else f"{name} fails on {where}: {type(error).__name__}"
        ) from error


def _check_type(role: str, distribution: Any, methods: Sequence[str]) -> None:
    missing = [name for name in methods if not callable(getattr(distribution, name, None))]
    if missing:
        kind = type(distribution).__name__
        if hasattr(distribution, "shape") and hasattr(distribution, "dtype"):
            kind = f"array of shape {distribution.shape},"
        raise TypeError(
            f"{_ROLES[role]} must be a distribution, such as those of numpyro.distributions; this "
            f"{kind} has no {' and no '.join(missing)}"
        )


def _spec(leaf: Any) -> Any:
    """Shape and dtype of a leaf, with a hash; what is no array stays."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return leaf
    weak = bool(getattr(leaf, "weak_type", False))
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, weak_type=weak)


def _batch(distribution: Any) -> tuple[int, ...]:
    return tuple(getattr(distribution, "batch_shape", ()))


def type_name(distribution: Any) -> str:
    """The name of a distribution's type; of NumPyro's wrappers that of what they wrap."""
    while type(distribution).__name__ in ("Independent", "ExpandedDistribution"):
        distribution = distribution.base_dist
    return type(distribution).__name__


def _support(likelihood: Any) -> Any:
    """Its constraint on x, if it holds no traced parameters."""
    try:
        support = getattr(likelihood, "support", None)
    except NotImplementedError:
        return None
    leaves = jax.tree.leaves(support)
    is_known = callable(support) and not any(isinstance(leaf, Tracer) for leaf in leaves)
    return support if is_known else None


def _is_valid(support: Any, images: np.ndarray) -> np.ndarray | None:
    """Which images [N] are in the support; None where the support cannot tell."""
    try:
        valid = np.asarray(support(images))
    except (NotImplementedError, TypeError, ValueError):
        return None
    if valid.shape[:1] != images.shape[:1]:
        return None
    return np.asarray(valid.reshape(len(images), -1).all(axis=1))


def _innermost(support: Any) -> Any:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def _outside(support: Any, image: np.ndarray) -> str:
    """Which value of an image is outside, where the support is one of single values."""
    valid = _is_valid(_innermost(support), image.reshape(-1))
    if valid is None or valid.all():
        return "is"
    place = int(np.argmin(valid))
    where = tuple(map(int, np.unravel_index(place, image.shape)))
    return f"has the value {image.reshape(-1)[place]} at {where}"
