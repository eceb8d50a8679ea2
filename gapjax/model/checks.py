"""Checks of models, images and arguments before the work, and why a bound is not finite.

A model is traced with shapes alone, so that checking computes nothing. Every message names the
argument or the function that is at fault, its value, and what would do.
"""

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gapjax import parallel
from gapjax.vae import VAE, VAEParams, local_inference, log_prob, observed, sample

_ROLES = {
    "prior": "the prior p(z)",
    "posterior": "the posterior q(z given x), which encode returns,",
    "likelihood": "the likelihood p(x given z), which decode returns,",
}
_BLOCK = 2**22  # pixels that are compared with a support at once


class Model(NamedTuple):
    """What `check_model` found."""

    posterior: str  # names of types
    likelihood: str
    has_rsample: bool  # whether q can be reparameterized
    support: Any  # the likelihood's constraint on x; None if it does not say, or depends on z


def check_inputs(
    function: str,
    vae: VAE,
    params: VAEParams,
    rng_key: jax.Array,
    images: Any,
    *,
    posteriors: Any = None,
    gradients: bool = False,
) -> None:
    """Checks what a measurement of images is given; a `vae` of another type is not looked at.

    `posteriors` are a q for every image in place of the encoder's; `gradients` says whether they
    are taken through samples of q.
    """
    instead = "there use jax.vmap over gapjax.elbo, which is a function of one example"
    check_concrete(function, instead, params=params, rng_key=rng_key, images=images)
    check_array("images", images)
    check_key(rng_key)
    if posteriors is not None:
        for leaf in jax.tree.leaves(posteriors):
            if np.shape(leaf)[:1] != images.shape[:1]:
                raise ValueError(
                    f"posteriors has an array of shape {np.shape(leaf)}; each needs a leading axis "
                    f"of {images.shape[0]}, as there are {images.shape[0]} images"
                )
        first = jax.tree.map(lambda leaf: leaf[0], posteriors)
        vae, params = local_inference(vae), VAEParams(first, params.decoder)
    if isinstance(vae, VAE):
        model = check_model(vae, params, jax.ShapeDtypeStruct(images.shape[1:], images.dtype))
        if gradients:
            check_reparameterized(model)
        check_images("images", images, model)


def check_model(vae: VAE, params: VAEParams, x: Any) -> Model:
    """Checks the three distributions of a model on x, one example or its shape and dtype."""
    if not (hasattr(params, "encoder") and hasattr(params, "decoder")):
        hint = "; give its .params" if hasattr(params, "params") else ""
        raise TypeError(f"params is of type {type(params).__name__}, not a VAEParams{hint}")
    shapes = jax.eval_shape(lambda *inputs: inputs, params, x)
    return _inspect(parallel.Static({"vae": vae, "inputs": shapes}))


def check_reparameterized(model: Model) -> None:
    """Raises TypeError where no gradient passes through the samples of q(z given x)."""
    if not model.has_rsample:
        raise TypeError(
            f"the posterior that encode returns, {model.posterior}, cannot be reparameterized: no "
            "gradient passes through its samples. Take another family, or an objective with "
            "another estimator of the gradient that says so by an attribute needs_rsample = False"
        )


def check_images(name: str, images: Any, model: Model) -> None:
    """Raises ValueError where an image is not in the support of the likelihood, if it is known."""
    support, images = model.support, np.asarray(images)
    if support is None:
        return
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support is None:
        return
    block = max(1, _BLOCK // max(1, math.prod(images.shape[1:])))
    for first in range(0, len(images), block):
        part = images[first : first + block]
        try:
            valid = np.asarray(support(part))
        except (NotImplementedError, TypeError, ValueError):
            return  # the support cannot tell
        if valid.shape[:1] != part.shape[:1] or valid.all():
            continue
        place = tuple(map(int, np.argwhere(~valid)[0]))
        what = f"has the value {part[place]} at {place[1:]}" if valid.shape == part.shape else "is"
        raise ValueError(
            f"{name}: image {first + place[0]} {what}, outside of the support of p(x given z): "
            f"{model.likelihood} takes {support}"
        )


def check_trainable(params: VAEParams) -> None:
    """Raises TypeError for a leaf that is no float, or belongs to Linen's `batch_stats`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = f"params{jax.tree_util.keystr(path)}"
        if "batch_stats" in jax.tree_util.keystr(path):
            raise TypeError(
                f"{name} would be trained as a weight; keep batch statistics out of the "
                "parameters: freeze them into encode and decode"
            )
        dtype = getattr(leaf, "dtype", None) or np.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name} is of type {dtype}, and a parameter must be a float; keep counters, keys "
                "and other state out of the parameters: freeze them into encode and decode"
            )


def check_array(name: str, images: Any) -> None:
    """Raises TypeError unless this is an array [N, *event], and ValueError if N is 0."""
    if not (hasattr(images, "shape") and hasattr(images, "dtype")):
        field = next((field for field in ("test", "images") if hasattr(images, field)), None)
        hint = f"; its .{field} is one" if field else ""
        kind = type(images).__name__
        raise TypeError(f"{name} is of type {kind}, not an array [N, *event]{hint}")
    if images.ndim == 0:
        raise TypeError(f"{name} is a scalar, not an array [N, *event]")
    if images.shape[0] == 0:
        raise ValueError(f"{name} is empty; at least one image is needed")


def check_concrete(function: str, instead: str, **arguments: Any) -> None:
    """Raises TypeError where an argument is traced; `instead` says what to use there."""
    for name, tree in arguments.items():
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
            raise TypeError(
                f"{name} is traced: {function} compiles and runs its programs itself and cannot be "
                f"called inside jax.jit, jax.grad or jax.vmap; {instead}"
            )


def check_key(rng_key: Any, name: str = "rng_key") -> None:
    """Raises TypeError unless this is one key, and ValueError where it is an array of keys."""
    dtype = getattr(rng_key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        number = rng_key.shape
    elif dtype == jnp.uint32 and rng_key.ndim:  # of the old kind, an array [2]
        number = rng_key.shape[:-1]
    else:
        kind = f"of type {type(rng_key).__name__}" if dtype is None else f"an array of {dtype}"
        raise TypeError(f"{name} is {kind}, not a key; see jax.random.key")
    if number:
        raise ValueError(f"{name} holds keys of the shape {number}; one key is needed")


def check_integer(name: str, value: Any) -> None:
    """Raises ValueError unless this is an integer, NumPy's among them."""
    try:
        operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; it must be an integer") from None


def check_positive(**numbers: Any) -> None:
    """Raises ValueError for a number that is not a positive integer."""
    for name, number in numbers.items():
        check_integer(name, number)
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be positive")


def check_integers(settings: Any) -> None:
    """Raises ValueError where a `NamedTuple` has no integer in a field whose default is one."""
    for name, default in settings._field_defaults.items():
        if isinstance(default, int):
            check_integer(name, getattr(settings, name))


def one_log_prob(role: str, distribution: Any, value: jax.Array) -> jax.Array:
    """Log-probability of one whole example or latent, checked to be a scalar."""
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


def explain(
    vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array, num_samples: int = 1
) -> str | None:
    """Which part of a bound, of this key and number of samples, is not finite; None if all are."""
    for name in ("encoder", "decoder"):
        if _has_nan(getattr(params, name)):
            return f"params.{name} has a NaN"
    if not jnp.isfinite(x).all():
        return "x has a value that is not finite"
    # One sample takes the key itself, see `bounds`.
    keys = [rng_key] if num_samples == 1 else jax.random.split(rng_key, num_samples)
    doing = "encode"
    try:  # NumPyro raises ValueError for parameters that it takes for invalid, such as a NaN
        posterior = vae.encode(params.encoder, x)
        if _has_nan(posterior):
            return f"encode returns a {type_name(posterior)} whose parameters are NaN"
        for key in keys:
            z = sample(posterior, key)
            if not jnp.isfinite(z).all():
                return f"encode returns a {type_name(posterior)} whose samples are not finite"
            doing = "decode"
            likelihood = vae.decode(params.decoder, z)
            if _has_nan(likelihood):
                return f"decode returns a {type_name(likelihood)} whose parameters are NaN"
            if not jnp.isfinite(log_prob(likelihood, observed(x))):
                return _explain_likelihood(likelihood, observed(x))
            for role, distribution in (("prior", vae.prior), ("posterior", posterior)):
                value = log_prob(distribution, z)
                if not jnp.isfinite(value):
                    return f"log_prob of the {role}, a {type_name(distribution)}, is {float(value)}"
    except ValueError as error:
        return f"{doing} raises: {error}"
    return None


def _has_nan(tree: Any) -> bool:
    """Whether a float array of a tree has a NaN. Infinite parameters may be meant."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    return any(bool(jnp.isnan(x).any()) for x in floats)


def _explain_likelihood(likelihood: Any, x: jax.Array) -> str:
    """Names the first pixel whose log-probability is not finite, where there is one for each."""
    single = innermost(likelihood)
    values = np.asarray(log_prob(single, x))
    if single is likelihood or values.shape != x.shape:
        return f"log p(x given z) is {float(log_prob(likelihood, x))}: {type_name(likelihood)}"
    place = tuple(map(int, np.argwhere(~np.isfinite(values))[0]))
    return (
        f"log p(x given z) is {values[place]} at {place}, where x is {np.asarray(x)[place]}: "
        f"{type_name(likelihood)} has no finite density there"
    )


@functools.lru_cache(64)  # tracing a model takes 25 to 50 ms
def _inspect(static: parallel.Static) -> Model:
    vae, (params, x) = static.values["vae"], static.values["inputs"]
    found: list[Model] = []

    def trace(params: VAEParams, x: jax.Array, rng_key: jax.Array) -> None:
        where = f"one example x of shape {x.shape} and dtype {x.dtype}, without a batch axis"
        posterior = _call("encode", vae.encode, params.encoder, x, where)
        latents = []
        for role, distribution in (("prior", vae.prior), ("posterior", posterior)):
            _check_type(role, distribution, ("sample", "log_prob"))
            latents.append(sample(distribution, rng_key))
            one_log_prob(role, distribution, latents[-1])
        of_prior, z = latents
        if of_prior.shape != z.shape:
            raise ValueError(
                f"latents of the posterior have the shape {z.shape}, those of the prior "
                f"{of_prior.shape}; they must be the same"
            )
        likelihood = _call("decode", vae.decode, params.decoder, z, f"one z of shape {z.shape}")
        _check_type("likelihood", likelihood, ("log_prob",))
        event_shape = getattr(likelihood, "event_shape", None)
        is_whole = not getattr(likelihood, "batch_shape", ())
        if is_whole and event_shape is not None and tuple(event_shape) != x.shape:
            raise ValueError(
                f"{_ROLES['likelihood']} is over an x of shape {tuple(event_shape)}, but an "
                f"example has the shape {x.shape}"
            )
        one_log_prob("likelihood", likelihood, observed(x))
        has_rsample = bool(getattr(posterior, "has_rsample", True))
        names = type_name(posterior), type_name(likelihood)
        found.append(Model(*names, has_rsample, _support(likelihood)))

    jax.eval_shape(trace, params, x, jax.random.key(0))
    return found[-1]


def _call(name: str, function: Any, params: Any, value: jax.Array, where: str) -> Any:
    """`encode` or `decode`; an error in it is told with what it was given."""
    try:
        return function(params, value)
    except Exception as error:
        told = str(error).split("\n")[0]
        raise ValueError(f"{name} fails on {where}: {type(error).__name__}: {told}") from error


def _check_type(role: str, distribution: Any, methods: tuple[str, ...]) -> None:
    missing = [name for name in methods if not callable(getattr(distribution, name, None))]
    if missing:
        kind = type(distribution).__name__
        if hasattr(distribution, "shape") and hasattr(distribution, "dtype"):
            kind = f"array of shape {distribution.shape},"
        raise TypeError(
            f"{_ROLES[role]} must be a distribution, such as those of numpyro.distributions; this "
            f"{kind} has no {' and no '.join(missing)}"
        )


def innermost(distribution: Any) -> Any:
    """The distribution inside NumPyro's `Independent` and `ExpandedDistribution`, or itself."""
    wrappers = {"Independent", "ExpandedDistribution"}
    while wrappers & {kind.__name__ for kind in type(distribution).__mro__}:
        distribution = distribution.base_dist
    return distribution


def type_name(distribution: Any) -> str:
    """The name of a distribution's type; of NumPyro's wrappers that of what they wrap."""
    return type(innermost(distribution)).__name__


def _support(likelihood: Any) -> Any:
    """Its constraint on x, if it holds no traced parameters."""
    try:
        support = getattr(likelihood, "support", None)
    except NotImplementedError:
        return None
    leaves = jax.tree.leaves(support)
    is_known = callable(support) and not any(isinstance(leaf, Tracer) for leaf in leaves)
    return support if is_known else None
