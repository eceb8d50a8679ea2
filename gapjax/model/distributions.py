"""The discretized logistic, the layer of a flow, and the values and dtypes of any likelihood."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.flows import InverseAutoregressiveTransform
from numpyro.distributions.util import promote_shapes, validate_sample

from gapjax import vae

# Beyond these (in units of one bin) float32 cannot hold the gradient (x - loc) / scale^2.
_MAX_LOC = 1e12
_MIN_SCALE, _MAX_SCALE = 1e-9, 1e12
MIN_UNIFORM_WEIGHT = 1e-30  # a smaller one, over many levels, is 0 in float32
_BEYOND = 1e30  # the outer edge of an end bin, in scales: farther than any other edge can be


class DiscretizedLogistic(Distribution):
    r"""A logistic variable rounded to one of `levels` equally spaced levels.

    Level k of K sits at k/(K-1) in [0, 1]. One bin per level, centred on it; the two end bins take
    the tails:

        P(k) = sigma((k + 1/2 - m) / s) - sigma((k - 1/2 - m) / s),   0 < k < K-1,
        P(0) = sigma((1/2 - m) / s),   P(K-1) = sigma((m - K + 3/2) / s),

    with m = (K-1) loc and s = (K-1) scale. These sum to 1, and `sample` draws from them. With
    a = (k + 1/2 - m)/s and b = (k - 1/2 - m)/s the interior is computed as

        log P(k) = log sigma(a) + log sigma(-b) + log(1 - exp(b - a)),   b - a = -1/s,

    which is exact in log space: no epsilon is added and no two near-equal numbers are
    subtracted. Values and gradients are finite for every finite float32 `loc` and positive `scale`:
    |m| is clipped to 1e12 and s to [1e-9, 1e12].

    With `uniform_weight` u the distribution is the mixture

        P'(k) = (1 - u) P(k) + u / K,

    and no pixel costs more than log(K/u) nats. For u > 0 the sum cannot underflow.

    Args:
      loc: mean of the logistic variable, any real, in units where the levels span [0, 1].
      scale: its scale, positive, same units. Standard deviation is scale * pi / sqrt(3).
      levels: number of levels K >= 2.
      uniform_weight: u, 0 or in [1e-30, 1].
      validate_args: as NumPyro's: whether `log_prob` of what is no level is -inf. On by default.

    References:
      Kingma et al., Improved Variational Inference with Inverse Autoregressive Flow, 2016
      (section 5); Salimans et al., PixelCNN++, 2017 (section 2.1).
    """

    # NumPyro's own subclasses differ from its base class in the types of these, too.
    arg_constraints: ClassVar = {  # pyright: ignore[reportIncompatibleVariableOverride]
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    pytree_data_fields = ("loc", "scale")
    pytree_aux_fields = ("levels", "uniform_weight")
    has_enumerate_support = True

    def __init__(
        self,
        loc: ArrayLike,
        scale: ArrayLike,
        levels: int = 256,
        *,
        uniform_weight: float = 0.0,
        validate_args: bool | None = None,
    ):
        if levels < 2:
            raise ValueError(f"levels is {levels}; a discretized logistic needs at least 2")
        if not (uniform_weight == 0 or MIN_UNIFORM_WEIGHT <= uniform_weight <= 1):
            raise ValueError(
                f"uniform_weight is {uniform_weight}; it must be 0, or between "
                f"{MIN_UNIFORM_WEIGHT:g} and 1"
            )
        self.loc, self.scale = promote_shapes(loc, scale)  # pyright: ignore[reportGeneralTypeIssues]
        self.levels = levels
        self.uniform_weight = uniform_weight
        batch_shape = jnp.broadcast_shapes(jnp.shape(loc), jnp.shape(scale))
        super().__init__(batch_shape=batch_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)  # pyright: ignore[reportArgumentType]
    def support(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        """The integers 0 .. levels - 1."""
        return constraints.integer_interval(0, self.levels - 1)

    def in_bins(self) -> tuple[jax.Array, jax.Array]:
        """Mean and scale in units of one bin, within what float32 gradients can hold."""
        bins = self.levels - 1
        loc = jnp.clip(jnp.asarray(self.loc) * bins, -_MAX_LOC, _MAX_LOC)
        scale = jnp.clip(jnp.asarray(self.scale) * bins, _MIN_SCALE, _MAX_SCALE)
        return loc, scale

    @validate_sample
    def log_prob(self, value: ArrayLike, intermediates: list | None = None) -> jax.Array:
        """Log P(value) in nats, of levels 0 .. levels - 1 as integers or floats."""
        loc, scale = self.in_bins()
        value = jnp.asarray(value).astype(loc.dtype)
        given = map(jnp.asarray, promote_shapes(value, loc, scale))
        return _log_prob(self.levels, self.uniform_weight, *given)

    def log_prob_between(self, first: ArrayLike, last: ArrayLike) -> jax.Array:
        """Log P(first <= level <= last) in nats, as exact as `log_prob` in both tails.

        With n = last - first + 1 levels, a = (last + 1/2 - m)/s and b = (first - 1/2 - m)/s it is
        `log_prob` with exp(-n/s) in place of exp(-1/s), and n u/K in place of u/K.
        """
        ends = (jnp.asarray(level).astype(jnp.float32) for level in (first, last))
        low, high, loc, scale = map(jnp.asarray, promote_shapes(*ends, *self.in_bins()))
        number = high - low + 1.0
        width, above, below = _edges(self.levels, (low, high), loc, 1.0 / scale, number)
        if self.uniform_weight == 0:
            return jnp.log(width) + (jax.nn.log_sigmoid(above) + jax.nn.log_sigmoid(-below))
        logistic = width * jax.nn.sigmoid(above) * jax.nn.sigmoid(-below)
        share = self.uniform_weight / self.levels * number
        return jnp.log((1.0 - self.uniform_weight) * logistic + share)

    def sample(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key: jax.Array, sample_shape: tuple[int, ...] = ()
    ) -> jax.Array:
        """Draws levels as int32, shape `sample_shape + batch_shape`."""
        loc, scale = self.in_bins()
        noise = jax.random.logistic(key, (*sample_shape, *self.batch_shape), loc.dtype)
        loc, scale = (jnp.broadcast_to(x, noise.shape) for x in (loc, scale))
        level = jnp.floor(loc + scale * noise + 0.5)
        level = jnp.clip(level, 0, self.levels - 1).astype(jnp.int32)
        # One random word decides both: whether it is among the first `count` of the 2^32, and
        # if so which part of these it falls in. Other levels are those of weight 0.
        count = round(self.uniform_weight * 2**32)
        if count == 0:
            return level
        word = jax.random.bits(jax.random.fold_in(key, 1), noise.shape, jnp.uint32)
        uniform = jnp.floor(word.astype(jnp.float32) * (self.levels / count)).astype(jnp.int32)
        uniform = jnp.minimum(uniform, self.levels - 1)
        return jnp.where(word <= jnp.uint32(count - 1), uniform, level)

    @property
    def mean(self) -> jax.Array:
        """E[k] in levels: the sum over k >= 1 of P(level >= k), shape `batch_shape`."""
        loc, scale = (x[..., None] for x in self.in_bins())
        edges = jnp.arange(1, self.levels, dtype=loc.dtype) - 0.5
        edges = jnp.expand_dims(edges, range(loc.ndim - 1))  # strict promotion of ranks allows it
        mean = jax.nn.sigmoid((loc - edges) / scale).sum(axis=-1)
        return mean + self.uniform_weight * ((self.levels - 1) / 2 - mean)

    @property
    def variance(self) -> jax.Array:
        """E[(k - E[k])^2] in levels squared, shape `batch_shape`."""
        levels = self.enumerate_support(expand=False)
        return (jnp.exp(self.log_prob(levels)) * (levels - self.mean[None]) ** 2).sum(axis=0)

    def cdf(self, value: ArrayLike) -> jax.Array:
        """P(level <= value), of any real value."""
        last = jnp.floor(jnp.asarray(value, self.in_bins()[0].dtype))
        until = jnp.exp(self.log_prob_between(0.0, jnp.maximum(last, 0.0)))
        return jnp.where(last < 0, 0.0, jnp.minimum(until, 1.0))

    def icdf(self, q: ArrayLike) -> jax.Array:
        """The least level, as a float, whose `cdf` is q or more, up to rounding; else NaN."""
        shape = jnp.broadcast_shapes(jnp.shape(q), self.batch_shape)
        q = jnp.broadcast_to(jnp.asarray(q, self.in_bins()[0].dtype), shape)
        below = jnp.arange(self.levels - 1, dtype=q.dtype).reshape(-1, *(1 for _ in shape))
        reached = q[None] * (
            1.0 - 8 * jnp.finfo(q.dtype).eps
        )  # a program may round `cdf` otherwise
        level = (self.cdf(below) < reached).sum(axis=0, dtype=q.dtype)
        return jnp.where((q >= 0) & (q <= 1), level, jnp.nan)

    def enumerate_support(self, expand: bool = True) -> jax.Array:
        """The levels as int32, [levels, *batch_shape]; without `expand` all axes but one are 1."""
        levels = jnp.arange(self.levels).reshape(-1, *(1 for _ in self.batch_shape))
        return jnp.broadcast_to(levels, (self.levels, *self.batch_shape)) if expand else levels


def innermost(distribution: Any) -> Any:
    """The distribution inside NumPyro's `Independent` and `ExpandedDistribution`, or itself."""
    wrappers = {"Independent", "ExpandedDistribution"}
    while wrappers & {kind.__name__ for kind in type(distribution).__mro__}:
        distribution = distribution.base_dist
    return distribution


def type_name(distribution: Any) -> str:
    """The name of a distribution's type; of NumPyro's wrappers that of what they wrap."""
    return type(innermost(distribution)).__name__


def support_of(distribution: Any) -> Any:
    """The constraint on each value; None where it does not say, or holds traced parameters."""
    try:
        support: Any = getattr(distribution, "support", None)
    except NotImplementedError:
        return None
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    is_traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(support))
    return support if callable(support) and not is_traced else None


def sample_beside(likelihood: vae.Distribution, rng_key: jax.Array, beside: Any) -> Any:
    """One sample of x in dtypes that hold it and the values of `beside`, the dtypes of an x."""
    known = integer_range(likelihood)

    def widened(x: jax.Array, dtype: np.dtype) -> jax.Array:
        needed = x.dtype if known is None else np.result_type(*map(np.min_scalar_type, known))
        return x.astype(common_dtype(needed, dtype))

    return jax.tree.map(widened, vae.sample(likelihood, rng_key), beside)


def common_dtype(*dtypes: np.dtype) -> np.dtype:
    """The dtype that holds the values of two; integers go with floats of 32 bits."""
    is_half = lambda dtype: jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    if len(set(dtypes)) == 1:
        return dtypes[0]
    exact = np.result_type(*(np.float32 if is_half(dtype) else dtype for dtype in dtypes))
    dtype = jax.dtypes.canonicalize_dtype(exact)
    if dtype != exact and not np.issubdtype(exact, np.floating):
        raise TypeError("no dtype holds both {} and {}; give the data in another".format(*dtypes))
    return dtype


def integer_range(distribution: Any) -> tuple[int, int] | None:
    """The least and the greatest value of a distribution over integers; None where not known."""
    support = support_of(distribution)
    if support is constraints.boolean:
        return 0, 1
    bounds: Any = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    is_known = getattr(support, "is_discrete", False) and all(map(np.isscalar, bounds))
    return (int(bounds[0]), int(bounds[1])) if is_known else None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _log_prob(
    levels: int, uniform_weight: float, value: jax.Array, loc: jax.Array, scale: jax.Array
) -> jax.Array:
    """Log-probability of the level `value`; everything in units of one bin."""
    if uniform_weight == 0:
        return _log_prob_and_slopes(levels, uniform_weight, value, loc, scale)[0]
    width, above, below = _edges(levels, (value, value), loc, 1.0 / scale)
    # Where an exponential overflows, P is 0 and the uniform remains. Only values may take this
    # path: its derivative there is not a number.
    logistic = width / ((1.0 + jnp.exp(-above)) * (1.0 + jnp.exp(below)))
    return jnp.log((1.0 - uniform_weight) * logistic + uniform_weight / levels)


@_log_prob.defjvp
def _log_prob_jvp(
    levels: int, uniform_weight: float, primals: tuple, tangents: tuple
) -> tuple[jax.Array, jax.Array]:
    log_prob, by_loc, by_scale = _log_prob_and_slopes(levels, uniform_weight, *primals)
    value_dot, loc_dot, scale_dot = tangents
    return log_prob, by_loc * (loc_dot - value_dot) + by_scale * scale_dot


def _log_prob_and_slopes(
    levels: int, uniform_weight: float, value: jax.Array, loc: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`_log_prob` and its derivatives by loc and by scale, from one set of exponentials.

    With A = exp(-|a|) and B = exp(-|b|), both in [0, 1], and w = 1 - exp(-1/s),

        log P = log w + min(a, 0) - max(b, 0) - log(1 + A + B + A B),

    where a = inf in the last bin and b = -inf in the first, and w = 1 in either. Further

        d log P/da = sigma(-a),   d log P/db = -sigma(b),   d log w/d(1/s) = (1 - w)/w.

    With a uniform of weight u > 0 the factors of P are multiplied instead of their logarithms
    added, which takes one logarithm for two:

        log P' = log((1 - u) P + u/K),   d log P' = (1 - u) P / P' d log P.
    """
    inverse = 1.0 / scale
    width, above, below = _edges(levels, (value, value), loc, inverse)
    exp_above, exp_below = jnp.exp(-jnp.abs(above)), jnp.exp(-jnp.abs(below))
    excess = exp_above + exp_below + exp_above * exp_below
    share = 1.0 / (1.0 + excess)
    by_above = jnp.where(above >= 0, exp_above, 1.0) * (1.0 + exp_below) * share
    by_below = -jnp.where(below >= 0, 1.0, exp_below) * (1.0 + exp_above) * share
    by_inverse = above * by_above + below * by_below + (1.0 - width) / width * inverse
    by_loc, by_scale = -(by_above + by_below) * inverse, -by_inverse * inverse
    if uniform_weight == 0:
        log_prob = (
            jnp.log(width) + jnp.minimum(above, 0.0) - jnp.maximum(below, 0.0) - jnp.log1p(excess)
        )
        return log_prob, by_loc, by_scale
    outer = jnp.where(above < 0, exp_above, 1.0) * jnp.where(below > 0, exp_below, 1.0)
    logistic = (1.0 - uniform_weight) * width * outer * share
    total = logistic + uniform_weight / levels
    responsibility = logistic / total
    return jnp.log(total), responsibility * by_loc, responsibility * by_scale


def _edges(
    levels: int, ends: tuple, loc: jax.Array, inverse: jax.Array, number: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """w, a and b of the `number` bins between two levels, `ends`, where `inverse` is 1/s."""
    first, last = ends[0] <= 0, ends[1] >= levels - 1
    above = jnp.where(last, _BEYOND, (ends[1] + 0.5 - loc) * inverse)
    below = jnp.where(first, -_BEYOND, (ends[0] - 0.5 - loc) * inverse)
    return jnp.where(first | last, 1.0, -jnp.expm1(-number * inverse)), above, below


class AutoregressiveFlow(InverseAutoregressiveTransform):
    """NumPyro's inverse autoregressive flow, with its network's parameters as leaves of a pytree.

        y = exp(log_scale) * z + shift,   (shift, log_scale) = network(z)

    Args:
      arn: the network as a `jax.tree_util.Partial`, whose bound arguments are its parameters;
        entry i of its outputs depends on z_j for j < i alone.

    References:
      Kingma et al., Improved Variational Inference with Inverse Autoregressive Flow, 2016.
    """

    def tree_flatten(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        """The network is data; the clips of the log scale are not."""
        clips = ("log_scale_min_clip", "log_scale_max_clip")
        return (self.arn,), (("arn",), {name: getattr(self, name) for name in clips})
