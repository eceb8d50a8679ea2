"""The discretized logistic distribution: a likelihood for integer pixel levels."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.util import promote_shapes

# Beyond these (in units of one bin) float32 cannot hold the gradient (x - loc) / scale^2.
_MAX_LOC = 1e12
_MIN_SCALE, _MAX_SCALE = 1e-9, 1e12


class DiscretizedLogistic(Distribution):
    r"""A logistic variable rounded to one of `levels` equally spaced levels.

    The continuous variable lives where a network puts it: level k of K sits at k/(K-1) in
    [0, 1]. One bin per level, centred on it; the two end bins take the tails:

        P(k) = sigma((k + 1/2 - m) / s) - sigma((k - 1/2 - m) / s),   0 < k < K-1,
        P(0) = sigma((1/2 - m) / s),   P(K-1) = sigma((m - K + 3/2) / s),

    with m = (K-1) loc and s = (K-1) scale. The probabilities sum to 1 exactly, and `sample`
    draws from exactly these bins. With a = (k + 1/2 - m)/s and b = (k - 1/2 - m)/s the interior
    is computed as

        log P(k) = log sigma(a) + log sigma(-b) + log(1 - exp(b - a)),   b - a = -1/s,

    which is exact in log space: no epsilon is added and no two near-equal numbers are
    subtracted. Values and gradients are finite for every finite float32 `loc` and positive
    `scale`; in units of one bin, |m| is clipped to 1e12 and s to [1e-9, 1e12].

    Args:
      loc: mean of the logistic variable, any real, in units where the levels span [0, 1].
      scale: its scale, positive, same units. Standard deviation is scale * pi / sqrt(3).
      levels: number of levels K >= 2.

    Raises:
      ValueError: `levels` is less than 2.

    References:
      Kingma et al., Improved Variational Inference with Inverse Autoregressive Flow, 2016
      (section 5); Salimans et al., PixelCNN++, 2017 (section 2.1).
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}
    pytree_data_fields = ("loc", "scale")
    pytree_aux_fields = ("levels",)

    def __init__(
        self,
        loc: ArrayLike,
        scale: ArrayLike,
        levels: int = 256,
        *,
        validate_args: bool | None = None,
    ):
        if levels < 2:
            raise ValueError(f"levels is {levels}; a discretized logistic needs at least 2")
        self.loc, self.scale = promote_shapes(loc, scale)
        self.levels = levels
        batch_shape = jnp.broadcast_shapes(jnp.shape(loc), jnp.shape(scale))
        super().__init__(batch_shape=batch_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        """The integers 0 .. levels - 1."""
        return constraints.integer_interval(0, self.levels - 1)

    def _in_bins(self) -> tuple[jax.Array, jax.Array]:
        """Mean and scale in units of one bin, within what float32 gradients can hold."""
        bins = self.levels - 1
        loc = jnp.clip(jnp.asarray(self.loc) * bins, -_MAX_LOC, _MAX_LOC)
        scale = jnp.clip(jnp.asarray(self.scale) * bins, _MIN_SCALE, _MAX_SCALE)
        return loc, scale

    def log_prob(self, value: ArrayLike) -> jax.Array:
        """Log P(value) in nats.

        Args:
          value: levels 0 .. levels - 1 as integers or floats, broadcastable to the batch shape.

        Returns:
          The log-probability of each, shape of the broadcast.
        """
        loc, scale = self._in_bins()
        value = jnp.asarray(value).astype(loc.dtype)
        above = (value + 0.5 - loc) / scale
        below = (value - 0.5 - loc) / scale
        log_width = jnp.log(-jnp.expm1(-1.0 / scale))
        left = jnp.where(value >= self.levels - 1, 0.0, jax.nn.log_sigmoid(above))
        right = jnp.where(value <= 0, 0.0, jax.nn.log_sigmoid(-below))
        interior = (value > 0) & (value < self.levels - 1)
        return left + right + jnp.where(interior, log_width, 0.0)

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draws levels as int32, shape `sample_shape + batch_shape`."""
        loc, scale = self._in_bins()
        noise = jax.random.logistic(key, (*sample_shape, *self.batch_shape), loc.dtype)
        loc, scale = (jnp.broadcast_to(x, noise.shape) for x in (loc, scale))
        level = jnp.floor(loc + scale * noise + 0.5)
        return jnp.clip(level, 0, self.levels - 1).astype(jnp.int32)

    @property
    def mean(self) -> jax.Array:
        """E[k] in levels: the sum over k >= 1 of P(level >= k), shape `batch_shape`."""
        loc, scale = (x[..., None] for x in self._in_bins())
        edges = (jnp.arange(1, self.levels, dtype=loc.dtype) - 0.5).reshape(
            (1,) * (loc.ndim - 1) + (-1,)
        )
        return jax.nn.sigmoid((loc - edges) / scale).sum(axis=-1)
