"""Sources of x: pytrees of arrays with a pure function that draws one example.

A source is any object with

    num_examples              examples in an epoch, static
    begin_epoch(rng_key)      -> plan, what has to be decided at the start of an epoch
    draw(plan, rng_key, i)    -> x [*event], the example at position i < num_examples of the epoch

that is registered as a pytree. Its arrays (images, decoder parameters, alpha) are then traced:
they are arguments of a compiled program, not constants in it, and several sources can be vmapped.
`draw` is written for one example; `draw_examples` draws many. No source changes a value: where two
are mixed, x has a dtype that holds the values of both.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from gapjax import parallel
from gapjax.examples import count, dtypes_of, on_device, take, with_x, x_of
from gapjax.fit.streams import StreamSource
from gapjax.fit.streams import stream_source as stream_source
from gapjax.measure.bounds import Images
from gapjax.model.checks import check_array, check_positive
from gapjax.model.distributions import common_dtype, sample_beside
from gapjax.vae import VAE, Given, Params, bind, prior_of, sample, sample_model

Plan = Any
_STATIC = {"static": True}
_BLOCK = 250  # examples drawn together: enough for a matrix product, few enough for the cache


class Source(Protocol):
    """The protocol of a source; see the docstring of this module."""

    @property
    def num_examples(self) -> int:
        """Examples in one epoch."""
        ...

    def begin_epoch(self, rng_key: jax.Array) -> Plan:
        """Returns the plan of an epoch."""
        ...

    def draw(self, plan: Plan, rng_key: jax.Array, position: jax.Array) -> jax.Array:
        """Draws the example [*event] at `position` of the epoch."""
        ...


def data_source(images: Images) -> "DataSource":
    """The empirical distribution of `images`: each once per epoch, in a new random order.

    Args:
      images: [N, *event], kept on the device in their dtype (uint8 levels, or floats).
    """
    check_array("images", images)
    return DataSource(on_device(images))


def model_source(
    vae: VAE, decoder_params: Params, num_examples: int, contexts: Any = None
) -> "ModelSource":
    """Samples of the model, new at every draw: z ~ p(z), x ~ p_theta(x given z).

    Args:
      decoder_params: theta.
      num_examples: number of draws that count as an epoch.
      contexts: of a conditional model, those of the data, with a leading axis [N]; a draw takes
        one, every one as often as any other, in a new random order each epoch.
    """
    check_positive(num_examples=num_examples)
    contexts = on_device(contexts)
    return ModelSource(decoder_params, contexts, parallel.Static({"vae": vae}), num_examples)


def mixture_source(
    model: Source, data: Source, alpha: ArrayLike, *, stratified: bool = False
) -> "MixtureSource":
    """The mixture of eq. 14: m(x) = alpha p_theta(x) + (1 - alpha) p_data(x).

    Each example is drawn from `model` with probability alpha and from `data` otherwise. Both
    ends are exact: alpha = 0 draws from `data` alone and alpha = 1 from `model` alone. The draw
    at a position is the same for every alpha that takes it from the same source.

    A stratified mixture has the same expectation with less variance: of the first n examples of
    an epoch, floor(alpha n) are drawn from `model`, for every n. At alpha = 0.5 every second
    example is, so half of each batch of an even size, as in the authors' code.

    x has the dtype of the data where samples of the model are known to fit in it, as levels do in
    uint8, else one that holds both: float32 for a Gaussian likelihood of uint8 images.

    Args:
      model: the source that is used with probability alpha.
      data: the source that is used otherwise; the mixture has its number of examples.
      alpha: in [0, 1]; a number, or an array that may be traced. If it is the Python number 0 or
        1, the other source is not computed.
      stratified: take a fixed share of every batch from `model`, instead of deciding for each
        example at random.

    Raises:
      ValueError: alpha is a concrete number outside [0, 1], or not one number.
      TypeError: alpha is no number, no dtype holds the draws of both sources, or a gradient by
        alpha is taken through the draws. They are discrete choices, so there is none.
    """
    only = None
    if np.shape(alpha) != ():
        raise ValueError(
            f"alpha is an array of shape {np.shape(alpha)}; a mixture needs one number. For "
            "several give refit_members a mixture for each"
        )
    if not isinstance(alpha, Tracer):
        if not np.issubdtype(np.asarray(alpha).dtype, np.number):
            raise TypeError(f"alpha is {alpha!r}; a mixture needs a number in [0, 1]")
        if not 0 <= np.asarray(alpha) <= 1:
            raise ValueError(f"alpha is {alpha}; a mixture needs a number in [0, 1]")
        if isinstance(alpha, int | float):
            only = {0.0: "data", 1.0: "model"}.get(float(alpha))
    return MixtureSource(model, data, jnp.asarray(alpha, jnp.float32), only, stratified)


def weighted_source(sources: Sequence[Source], weights: Sequence[ArrayLike]) -> Source:
    """A mixture of any number of sources: m(x) = sum_k w_k p_k(x), the weights scaled to sum 1.

    It is a `mixture_source` of the first source and the mixture of the others. Of two sources with
    weights alpha and 1 - alpha it is `mixture_source(*sources, alpha)`, draw by draw. Put the
    cheapest last: its draws are made for every example. A source whose weight is the Python number
    0 is not computed; other weights may be traced.

    Raises:
      ValueError: another number of weights than of sources, one below zero, none above, or
        sources with different numbers of examples.
    """
    if not sources or len(sources) != len(weights):
        raise ValueError(f"{len(sources)} sources cannot have {len(weights)} weights")
    concrete = [weight for weight in weights if not isinstance(weight, Tracer)]
    if not all(np.all(np.asarray(weight) >= 0) for weight in concrete):
        raise ValueError(f"weights are {list(weights)}; none may be below 0")
    if len(concrete) == len(weights) and not np.any(sum(map(np.asarray, weights)) > 0):
        raise ValueError(f"weights are {list(weights)}; at least one must be above 0")
    sizes = sorted({source.num_examples for source in sources})
    if len(sizes) > 1:
        raise ValueError(f"the sources have {sizes} examples in an epoch; all must have as many")
    mixture, rest = sources[-1], weights[-1]
    for source, weight in zip(reversed(sources[:-1]), reversed(weights[:-1]), strict=True):
        rest = weight + rest
        if isinstance(rest, int | float):
            share = weight / rest if rest > 0 else 0
        else:
            whole = jnp.asarray(rest, jnp.float32)
            share = jnp.where(whole > 0, weight / jnp.where(whole > 0, whole, 1.0), 0.0)
        mixture = mixture_source(source, mixture, share)
    return mixture


def check_source(source: Any) -> None:
    """Raises TypeError for what is no source, such as an array."""
    if all(hasattr(source, name) for name in ("num_examples", "begin_epoch", "draw")):
        return
    is_array, kind = hasattr(source, "shape"), type(source).__name__
    kind = f"an array of shape {np.shape(source)}" if is_array else f"of type {kind}"
    raise TypeError(f"source is {kind}, not a source; for images use gapjax.data_source(images)")


def first_example(source: Source) -> jax.Array:
    """The example at position 0 of an epoch; for its shape and dtype."""
    rng_key = jax.random.key(0)
    return source.draw(source.begin_epoch(rng_key), rng_key, jnp.zeros((), jnp.int32))


def drawn_images(source: Source) -> Iterator[jax.Array]:
    """The images that a source draws from as they are, also as a part of a mixture."""
    if isinstance(source, DataSource) and not isinstance(source.images, Tracer):
        yield source.images
    if isinstance(source, StreamSource):
        yield source.few
    if isinstance(source, MixtureSource):
        if source.only != "data":
            yield from drawn_images(source.model)
        if source.only != "model":
            yield from drawn_images(source.data)


def draw_examples(source: Source, plan: Plan, rng_keys: jax.Array, positions: jax.Array) -> Any:
    """Many draws [M, *event] at once: `source.draw(plan, rng_keys[i], positions[i])` for every i.

    For a mixture, samples of the model are made only for the examples that use them.
    """
    rows = _draw_rows(source, plan, rng_keys, positions)
    shapes = jax.eval_shape(functools.partial(source.draw, plan), rng_keys[0], positions[0])
    return jax.tree.map(lambda x, one: x.reshape(-1, *one.shape), rows, shapes)


def _draw_rows(source: Source, plan: Plan, rng_keys: jax.Array, positions: jax.Array) -> Any:
    """See `draw_examples`; every example as a row, as a TPU would pad the axes of an event."""
    if isinstance(source, MixtureSource):
        return _draw_mixture(source, plan, rng_keys, positions)
    if isinstance(source, DataSource):  # outside a loop, in which a TPU would copy all images
        return jax.tree.map(lambda x: x.reshape(len(x), -1)[plan[positions]], source.images)
    draw = lambda xs: jax.tree.map(jnp.ravel, source.draw(plan, *xs))
    return jax.lax.map(draw, (rng_keys, positions), batch_size=_BLOCK)


def _draw_mixture(source: Any, plan: Plan, rng_keys: jax.Array, positions: jax.Array) -> Any:
    """See `_draw_rows`. The samples of the model are made in blocks, as many as needed."""
    is_of_model, model_plan, data_plan = plan
    keys, dtype = jax.vmap(jax.random.split)(rng_keys), draw_dtypes(source)
    model_keys, data_keys = keys[:, 0], keys[:, 1]
    if source.only == "model":
        return _cast(_draw_rows(source.model, model_plan, model_keys, positions), dtype)
    from_data = _cast(_draw_rows(source.data, data_plan, data_keys, positions), dtype)
    if source.only == "data":
        return from_data
    chosen = is_of_model[positions]
    first_chosen = jnp.argsort(~chosen, stable=True)
    number, size = len(positions), min(_BLOCK, len(positions))

    def draw_block(state: tuple[Any, Any]) -> tuple[Any, Any]:
        start, drawn = state
        these = first_chosen[jnp.minimum(start + jnp.arange(size), number - 1)]
        draw = lambda *xs: jax.tree.map(jnp.ravel, source.model.draw(model_plan, *xs))
        block = _cast(jax.vmap(draw)(model_keys[these], positions[these]), dtype)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return start + size, jax.tree.map(put, drawn, block)

    rows = -(-number // size) * size
    room = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), from_data)
    enough = chosen.sum()
    _, drawn = jax.lax.while_loop(lambda state: state[0] < enough, draw_block, (0, room))
    from_model = take(drawn, jnp.cumsum(chosen) - 1)
    return jax.tree.map(functools.partial(jnp.where, chosen[:, None]), from_model, from_data)


def draw_dtypes(source: Source) -> Any:
    """The dtypes of a source's draws, a pytree as a draw is one."""
    if not isinstance(source, MixtureSource):
        return dtypes_of(jax.eval_shape(first_example, source))
    of_data, model = draw_dtypes(source.data), source.model
    if not isinstance(model, ModelSource):
        return jax.tree.map(common_dtype, draw_dtypes(model), of_data)

    def draw(rng_key: jax.Array, model: ModelSource) -> Any:
        example = model.draw(model.begin_epoch(rng_key), rng_key, jnp.zeros((), jnp.int32))
        given, _ = bind(model.vae, example)
        z = sample(prior_of(given, model.decoder_params), rng_key)
        return sample_beside(given.decode(model.decoder_params, z), rng_key, x_of(of_data))

    return with_x(of_data, dtypes_of(jax.eval_shape(draw, jax.random.key(0), model)))


def _cast(examples: Any, dtypes: Any) -> Any:
    return jax.tree.map(lambda x, dtype: x.astype(dtype), examples, dtypes)


@jax.custom_jvp
def _without_gradient(alpha: jax.Array) -> jax.Array:
    """Alpha itself; taking a derivative by it is an error instead of zero."""
    return alpha


@_without_gradient.defjvp
def _raise_no_gradient(primals: tuple, tangents: tuple) -> Any:
    del primals, tangents
    raise TypeError(
        "alpha has no gradient: it decides from which source each example is drawn, a discrete "
        "choice. Compare refits with several alphas instead"
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DataSource:
    """See `data_source`. The plan is the order of the epoch, a permutation [N]."""

    images: jax.Array

    @property
    def num_examples(self) -> int:
        """N."""
        return count(self.images)

    def begin_epoch(self, rng_key: jax.Array) -> jax.Array:
        """A random order, computed on the device."""
        return jax.random.permutation(rng_key, self.num_examples)

    def draw(self, plan: jax.Array, rng_key: jax.Array, position: jax.Array) -> jax.Array:
        """The image at `position` of the order."""
        del rng_key
        return take(self.images, plan[position])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelSource:
    """See `model_source`. The plan is the order of the contexts, if there are any."""

    decoder_params: Params
    contexts: Any
    static: parallel.Static = dataclasses.field(metadata=_STATIC)
    num_examples: int = dataclasses.field(metadata=_STATIC)
    vae = property(lambda self: self.static.values["vae"])

    def begin_epoch(self, rng_key: jax.Array) -> jax.Array | None:
        """A random order of the contexts."""
        has_contexts = bool(jax.tree.leaves(self.contexts))
        return jax.random.permutation(rng_key, count(self.contexts)) if has_contexts else None

    def draw(self, plan: jax.Array | None, rng_key: jax.Array, position: jax.Array) -> Any:
        """One ancestral sample, with its context if there are any."""
        if plan is None:
            return sample_model(self.vae, self.decoder_params, rng_key)
        context = take(self.contexts, plan[position % len(plan)])
        return Given(sample_model(self.vae.at(context), self.decoder_params, rng_key), context)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixtureSource:
    """See `mixture_source`. The plan is the choice for each position, and the two plans."""

    model: Source
    data: Source
    alpha: jax.Array
    only: str | None = dataclasses.field(default=None, metadata=_STATIC)
    stratified: bool = dataclasses.field(default=False, metadata=_STATIC)

    @property
    def num_examples(self) -> int:
        """Number of examples of `data`."""
        return self.data.num_examples

    def begin_epoch(self, rng_key: jax.Array) -> tuple[jax.Array, Plan, Plan]:
        """Which positions use the model [N] bool, and the plans of both sources."""
        choice_key, model_key, data_key = jax.random.split(rng_key, 3)
        alpha = _without_gradient(self.alpha)
        if self.stratified:
            from_model = _strata(alpha, self.num_examples)
        else:
            from_model = jax.random.uniform(choice_key, (self.num_examples,)) < alpha
        return from_model, self.model.begin_epoch(model_key), self.data.begin_epoch(data_key)

    def draw(
        self, plan: tuple[jax.Array, Plan, Plan], rng_key: jax.Array, position: jax.Array
    ) -> Any:
        """One example of the mixture."""
        is_of_model, model_plan, data_plan = plan
        model_key, data_key = jax.random.split(rng_key)
        dtypes = draw_dtypes(self)
        draw_model = lambda: _cast(self.model.draw(model_plan, model_key, position), dtypes)
        draw_data = lambda: _cast(self.data.draw(data_plan, data_key, position), dtypes)
        if self.only is not None:
            return draw_model() if self.only == "model" else draw_data()
        pick = functools.partial(jnp.where, is_of_model[position])
        return jax.tree.map(pick, draw_model(), draw_data())


def _strata(alpha: jax.Array, number: int) -> jax.Array:
    """Whether floor(alpha (n + 1)) > floor(alpha n), for each n below `number`, exactly.

    Alpha is the first convergent p / q of its continued fraction that is alpha in float32.
    """

    def following(state: tuple) -> tuple:
        (a, b), (p, q), (r, s) = state
        whole = a // b
        return (b, a % b), (r, s), (whole * r + p, whole * s + q)

    is_apart = lambda state: (state[0][1] > 0) & (state[2][0] / state[2][1] != alpha)
    one, zero, scale = map(jnp.int32, (1, 0, 2**30))
    start = ((alpha * 2**30).astype(jnp.int32), scale), (zero, one), (one, zero)
    p, q = jax.lax.while_loop(is_apart, following, start)[2]
    # p n modulo q, whose products would not fit in 32 bits; it wraps where the floor rises
    left = jax.lax.associative_scan(lambda m, n: (m + n) % q, jnp.full(number, p))
    return (left % q) < p
