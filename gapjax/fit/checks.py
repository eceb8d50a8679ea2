"""Checks of what a run is given, made once and before its first step.

Those of the model and of images are in `model/checks`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gapjax.fit.sources import DataSource, MixtureSource, Source
from gapjax.model.arguments import check_concrete, check_key
from gapjax.model.checks import Model, check_images, check_model, check_reparameterized
from gapjax.model.vae import VAE, VAEParams


def check_arguments(function: str, rng_keys: Sequence[Any], **arguments: Any) -> None:
    """Checks the keys of the members, and that nothing is traced.

    Args:
      function: that was called, for the message.
      rng_keys: of the members; None where a member needs none.
      **arguments: pytrees, by name.

    Raises:
      TypeError: a key is none, or an argument is traced.
      ValueError: a key is an array of keys.
    """
    check_concrete(
        function, "there use gapjax.fit.steps.kernel, whose step is a pure function",
        rng_key=list(rng_keys), **arguments,
    )  # fmt: skip
    for rng_key in rng_keys:
        if rng_key is not None:
            check_key(rng_key)


def check_sources(sources: Sequence[Source]) -> None:
    """Raises TypeError for what is no source, such as an array."""
    for source in sources:
        missing = [
            name for name in ("num_examples", "begin_epoch", "draw") if not hasattr(source, name)
        ]
        if not missing:
            continue
        kind = f"source is of type {type(source).__name__}"
        if hasattr(source, "shape"):
            kind = f"source is an array of shape {np.shape(cast(Any, source))}"
        raise TypeError(f"{kind}, not a source; for images use gapjax.data_source(images)")


def check_run(
    vae: VAE, params: VAEParams, sources: Sequence[Source], objective: Callable[..., Any]
) -> None:
    """Checks a model and the data of a run; of the model only shapes are computed.

    Args:
      vae: the model.
      params: where the run starts, arrays or their shapes.
      sources: of its members.
      objective: of one example. Gradients are taken through the samples of q(z given x), unless
        it has an attribute `needs_rsample` that is False.

    Raises:
      TypeError: a distribution is none, a parameter is not a float, or q cannot be
        reparameterized.
      ValueError: a distribution is not of one whole example, or data are not in the support of
        the likelihood.
    """
    model = check_model(vae, params, jax.eval_shape(first_example, sources[0]))
    if needs_rsample(objective):
        check_reparameterized(model)
    check_trainable(params)
    _check_data(sources, model)


def needs_rsample(objective: Callable[..., Any]) -> bool:
    """Whether the gradient of an objective passes through the samples of q(z given x)."""
    while not hasattr(objective, "needs_rsample") and hasattr(objective, "func"):
        objective = getattr(objective, "func")  # noqa: B009 (of functools.partial)
    return bool(getattr(objective, "needs_rsample", True))


def check_trainable(params: VAEParams) -> None:
    """Checks that all parameters can be optimized.

    Integers and keys are refused, and so is the collection `batch_stats` of Flax Linen. Running
    means under another name cannot be told from weights.

    Raises:
      TypeError: a leaf is not a float, or belongs to `batch_stats`.
    """
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


def first_example(source: Source) -> jax.Array:
    """The example at position 0 of an epoch; for its shape and dtype."""
    rng_key = jax.random.key(0)
    return source.draw(source.begin_epoch(rng_key), rng_key, jnp.zeros((), jnp.int32))


def _check_data(sources: Sequence[Source], model: Model) -> None:
    """Checks the images of sources that give them as they are, each array once."""
    arrays = {id(images): images for source in sources for images in _drawn_images(source)}
    for images in arrays.values():
        check_images("the data of source", images, model)


def _drawn_images(source: Source) -> Iterator[jax.Array]:
    """The images that a source draws from as they are, also as a part of a mixture."""
    if isinstance(source, DataSource) and not isinstance(source.images, Tracer):
        yield source.images
    if isinstance(source, MixtureSource):
        if source.only != "data":
            yield from _drawn_images(source.model)
        if source.only != "model":
            yield from _drawn_images(source.data)
