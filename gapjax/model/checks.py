"""Checks of models, images and arguments before the work, and why a bound is not finite."""

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.interpreters.partial_eval import dce_jaxpr
from jax.tree_util import keystr, tree_leaves_with_path

from gapjax import parallel
from gapjax.examples import count, own, shape_of_one, take
from gapjax.model.distributions import innermost, support_of, type_name
from gapjax.vae import (
    VAE,
    Given,
    VAEParams,
    bind,
    local_inference,
    log_prob,
    observed,
    prior_of,
    sample,
)

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
    unused: tuple[str, ...]  # what encode and decode do not depend on: parameters, x, z


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

    `posteriors` replace the encoder's; `gradients` says whether they pass through samples of q.
    """
    instead = "there use jax.vmap over gapjax.elbo, which is a function of one example"
    check_concrete(function, instead, params=params, rng_key=rng_key, images=images)
    check_array("images", images)
    check_key(rng_key)
    if posteriors is not None:
        for shape in map(np.shape, jax.tree.leaves(own(posteriors))):
            if shape[:1] != (count(images),):
                wanted = f"a leading axis of {count(images)}, one for each image"
                raise ValueError(f"posteriors has an array of shape {shape}; it needs {wanted}")
        vae, params = local_inference(vae), VAEParams(take(posteriors, 0), params.decoder)
    if isinstance(vae, VAE):
        model = check_model(vae, params, shape_of_one(images))
        if gradients:
            check_reparameterized(model)
        check_images("images", images, model)


def check_model(vae: VAE, params: VAEParams, x: Any) -> Model:
    """Checks the distributions of a model on x, one example, by shapes and dtypes alone."""
    if not (hasattr(params, "encoder") and hasattr(params, "decoder")):
        hint = "; give its .params" if hasattr(params, "params") else ""
        raise TypeError(f"params is of type {type(params).__name__}, not a VAEParams{hint}")
    for path, leaf in tree_leaves_with_path(params):
        if not (_is_array(leaf) or type(leaf) in (int, float)):
            raise TypeError(
                f"params{keystr(path)} is of type {type(leaf).__name__}, not an array; convert "
                "tensors by np.asarray, and keep what is no array in encode and decode (with "
                "Equinox by eqx.partition(module, eqx.is_inexact_array))"
            )
    shapes = jax.eval_shape(lambda *inputs: inputs, params, x)
    return _inspect(parallel.Static({"vae": vae, "inputs": shapes}))


def check_reparameterized(model: Model) -> None:
    """Raises TypeError where no gradient passes through the samples of q(z given x)."""
    if not model.has_rsample:
        raise TypeError(
            f"the posterior that encode returns, {model.posterior}, cannot be reparameterized; "
            "take another, or an objective with its own gradient that says needs_rsample = False"
        )


def check_images(name: str, images: Any, model: Model) -> None:
    """Raises ValueError where an image is not in the support of the likelihood, if it is known."""
    support, images = model.support, images.x if isinstance(images, Given) else images
    if support is None or isinstance(images, dict):
        return
    images = np.asarray(images)
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
    """Raises TypeError for a leaf that is no float, or is state and not a weight in Flax."""
    kinds = lambda node: {kind.__name__ for kind in type(node).__mro__}
    is_variable = lambda node: "Variable" in kinds(node)
    for path, leaf in tree_leaves_with_path(params, is_leaf=is_variable):
        name = keystr(path)
        dtype = getattr(leaf, "dtype", None) or np.result_type(leaf)
        is_state = is_variable(leaf) and "Param" not in kinds(leaf)
        if is_state or "batch_stats" in name or not jnp.issubdtype(dtype, jnp.floating):
            what = f"a {type(leaf).__name__} of Flax NNX" if is_state else f"of type {dtype}"
            raise TypeError(
                f"params{name} is {what} and would be trained as a weight; freeze what is state "
                "into encode and decode (with NNX by nnx.split(module, nnx.Param, ...))"
            )


def check_array(name: str, images: Any) -> None:
    """Raises TypeError unless this is a set of examples [N, *event], and ValueError if N is 0."""
    if isinstance(images, Given | dict):
        leaves = jax.tree.leaves(images)
        shapes = [np.shape(leaf) for leaf in leaves]
        if not all(map(_is_array, leaves)) or len({shape[:1] for shape in shapes}) != 1:
            raise TypeError(
                f"{name} has the shapes {shapes}; give arrays with one leading axis [N]"
            )
        images = leaves[0]
    if not _is_array(images):
        field = next((field for field in ("test", "images") if hasattr(images, field)), None)
        hint = f"; its .{field} is one" if field else ""
        hint = f"; try np.asarray({name}, np.uint8)" if hasattr(images, "dtype") else hint
        kind = type(images).__name__
        raise TypeError(f"{name} is of type {kind}, not an array [N, *event]{hint}")
    if images.ndim == 0:
        raise TypeError(f"{name} is a scalar, not an array [N, *event]")
    if images.shape[0] == 0:
        raise ValueError(f"{name} is empty; at least one image is needed")


def _is_array(value: Any) -> bool:
    """Whether this has the shape and the type of an array that JAX takes, of numbers or of keys."""
    if isinstance(value, jax.Array | jax.ShapeDtypeStruct):
        return True
    dtype = getattr(value, "dtype", None)
    return hasattr(value, "shape") and isinstance(dtype, np.dtype) and dtype.kind not in "OSUMm"


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
    dtype = rng_key.dtype if _is_array(rng_key) else None
    is_old = dtype == jnp.uint32 and rng_key.ndim > 0  # an array [2]
    if dtype is None or not (is_old or jnp.issubdtype(dtype, jax.dtypes.prng_key)):
        kind = f"of type {type(rng_key).__name__}" if dtype is None else f"an array of {dtype}"
        raise TypeError(f"{name} is {kind}, not a key; see jax.random.key")
    if shape := rng_key.shape[: rng_key.ndim - is_old]:
        raise ValueError(f"{name} holds keys of the shape {shape}; one key is needed")


def check_integer(name: str, value: Any) -> None:
    """Raises ValueError unless this is an integer, NumPy's among them."""
    try:
        operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; it must be an integer") from None


def check_positive(settings: Any = None, *, zeros: tuple[str, ...] = (), **numbers: Any) -> None:
    """Raises ValueError for what is no positive integer, nor several; or 0, where `zeros` has it.

    What a `NamedTuple` of settings has is a float where its default is one.
    """
    defaults = {} if settings is None else settings._field_defaults
    numbers |= {name: getattr(settings, name) for name in defaults}
    for name, number in numbers.items():
        for each in number if isinstance(number, tuple | list) else (number,):
            if not isinstance(defaults.get(name), float):
                check_integer(name, each)
            if not (each > 0 or (each == 0 and name in zeros)):
                raise ValueError(f"{name} is {number}; it must be positive")


def one_log_prob(role: str, distribution: Any, value: Any) -> jax.Array:
    """Log-probability of one whole example or latent, checked to be a scalar."""
    result = log_prob(distribution, value)
    check_scalar(role, distribution, jnp.shape(result))
    return result


def check_scalar(role: str, distribution: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the log-probability of one value has the shape ()."""
    if shape != ():
        one = "example" if role == "likelihood" else "latent"
        raise ValueError(
            f"{_ROLES[role]} is not over one {one}: log_prob of {type_name(distribution)} has the "
            f"shape {shape} and not (); with NumPyro declare its axes by .to_event({len(shape)})"
        )


def explain(
    vae: VAE, params: VAEParams, rng_key: jax.Array, x: jax.Array, num_samples: int = 1
) -> str | None:
    """Which part of a bound, of this key and number of samples, is not finite; None if all are."""
    inputs = {"params.encoder": params.encoder, "params.decoder": params.decoder, "x": x}
    for name, tree in inputs.items():
        if _has_nan(tree):
            return f"{name} has a NaN"
    # One sample takes the key itself, see `bounds`.
    keys = [rng_key] if num_samples == 1 else jax.random.split(rng_key, num_samples)
    doing, (vae, x) = "encode", bind(vae, x)
    try:  # NumPyro raises ValueError for parameters that it takes for invalid, such as a NaN
        prior = prior_of(vae, params.decoder)
        posterior = vae.encode(params.encoder, x)
        for key in keys:
            z = sample(posterior, key)
            if not all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(z)):
                return f"encode returns a {type_name(posterior)} whose samples are not finite"
            doing = "decode"
            likelihood = vae.decode(params.decoder, z)
            if _has_nan(likelihood):
                return f"decode returns a {type_name(likelihood)} whose parameters are NaN"
            if not np.isfinite(log_prob(likelihood, observed(x))):
                return _explain_likelihood(likelihood, observed(x))
            for role, distribution in (("prior", prior), ("posterior", posterior)):
                if not np.isfinite(value := log_prob(distribution, z)):
                    return f"log_prob of the {role}, a {type_name(distribution)}, is {float(value)}"
    except ValueError as error:
        return f"{doing} raises: {error}"
    return None


def _has_nan(tree: Any) -> bool:
    """Whether a float array of a tree has a NaN. Infinite parameters may be meant."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    return any(bool(np.isnan(x).any()) for x in floats)  # by NumPy, which compiles nothing


def _explain_likelihood(likelihood: Any, x: jax.Array) -> str:
    """Names the first pixel whose log-probability is not finite, where there is one for each."""
    single = innermost(likelihood)
    values = np.asarray(log_prob(single, x))
    if not values.shape or values.shape != x.shape:
        return f"log p(x given z) is {float(log_prob(likelihood, x))}: {type_name(likelihood)}"
    place = tuple(map(int, np.argwhere(~np.isfinite(values))[0]))
    return (
        f"log p(x given z) is {values[place]} at {place}, where x is {np.asarray(x)[place]}: "
        f"{type_name(likelihood)} has no finite density there"
    )


@functools.lru_cache(64)  # tracing a model takes 25 to 50 ms
def _inspect(static: parallel.Static) -> Model:
    vae, (params, example) = static.values["vae"], static.values["inputs"]
    found: dict[str, Any] = {}

    def infer(both: VAEParams, example: Any, rng_key: jax.Array) -> tuple[Any, ...]:
        model, x = bind(vae, example)
        where = f"one example x of {_shapes(x, True)}, without a batch axis"
        posterior = _call("encode", model.encode, both.encoder, x, where)
        prior = prior_of(model, both.decoder)
        found["posterior"] = type_name(posterior)
        found["has_rsample"] = bool(getattr(posterior, "has_rsample", True))
        out = []
        for role, distribution in (("prior", prior), ("posterior", posterior)):
            _check_type(role, distribution, "sample", "log_prob")
            out.append(sample(distribution, rng_key))
            out.append(one_log_prob(role, distribution, out[-1]))
        if _shapes(out[0]) != _shapes(out[2]):
            raise ValueError(
                f"latents of the posterior have the {_shapes(out[2])}, those of the prior the "
                f"{_shapes(out[0])}; they must be the same"
            )
        return out[2], out[3], out[1]

    def generate(decoder: Any, z: Any, example: Any) -> jax.Array:
        model, x = bind(vae, example)
        likelihood = _call("decode", model.decode, decoder, z, f"one z of {_shapes(z)}")
        _check_type("likelihood", likelihood, "log_prob")
        shape = getattr(likelihood, "event_shape", getattr(x, "shape", ()))
        is_whole = hasattr(x, "shape") and not getattr(likelihood, "batch_shape", ())
        if is_whole and tuple(shape) != x.shape:
            raise ValueError(
                f"{_ROLES['likelihood']} has an x of shape {shape}, but an example has {x.shape}"
            )
        found.update(likelihood=type_name(likelihood), support=support_of(likelihood))
        return one_log_prob("likelihood", likelihood, observed(x))

    (z, *_), uses = _dependence(infer, params, example, jax.random.key(0))
    if not all(use[-1] for use in uses[:-2]):
        raise ValueError(
            f"{_ROLES['posterior']} is a point mass: samples of {found['posterior']} do not depend "
            "on the key; take one with a density, such as dist.Normal(loc, scale)"
        )
    _, (by_p,) = _dependence(generate, params.decoder, z, example)
    names = ["params" + keystr(path) for path, _ in tree_leaves_with_path(params)]
    by_any, by_q = (list(map(any, zip(*some, strict=True))) for some in (uses, uses[:-1]))
    of_encoder, of_decoder, of_z = (len(jax.tree.leaves(each)) for each in (*params, z))
    by_decoder = map(operator.or_, by_any[of_encoder:], by_p[:of_decoder])
    by_x, by_z = by_q[of_encoder + of_decoder : -1], by_p[of_decoder : of_decoder + of_z]
    is_used = [*by_any[:of_encoder], *by_decoder, any(by_x), any(by_z)]
    unused = (name for name, used in zip([*names, "x", "z"], is_used, strict=True) if not used)
    return Model(**found, unused=tuple(unused))


def _dependence(function: Any, params: Any, *inputs: Any) -> tuple[Any, list[list[bool]]]:
    """What one example gives, as shapes; and of each output which leaves of the inputs it uses.

    It is traced under vmap as in every program, where a module that changes its state fails.
    """
    of_one = lambda params, *inputs: jax.vmap(functools.partial(function, params))(
        *jax.tree.map(lambda x: x[None], inputs)
    )
    closed, shapes = jax.make_jaxpr(of_one, return_shape=True)(params, *inputs)
    each = np.eye(len(closed.jaxpr.outvars), dtype=bool).tolist()
    used = [dce_jaxpr(closed.jaxpr, output)[1] for output in each]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes), used


def _shapes(tree: Any, with_dtypes: bool = False) -> str:
    """The shape of an array, or those of the arrays in a tree by their paths; also the dtypes."""
    one = lambda leaf: f"shape {leaf.shape}" + f" and dtype {leaf.dtype}" * with_dtypes
    return ", ".join(f"{keystr(at)} {one(x)}".strip() for at, x in tree_leaves_with_path(tree))


def _call(name: str, function: Any, params: Any, value: Any, where: str) -> Any:
    """`encode` or `decode`; an error in it is told with what it was given."""
    try:
        return function(params, value)
    except Exception as error:
        told = str(error).split("\n")[0]
        raise ValueError(f"{name} fails on {where}: {type(error).__name__}: {told}") from error


def _check_type(role: str, distribution: Any, *methods: str) -> None:
    missing = [name for name in methods if not callable(getattr(distribution, name, None))]
    if missing:
        kind = type(distribution).__name__
        if _is_array(distribution):
            kind = f"array of shape {distribution.shape},"
        raise TypeError(
            f"{_ROLES[role]} must be a distribution, such as those of numpyro.distributions; this "
            f"{kind} has no {' and no '.join(missing)}"
        )
