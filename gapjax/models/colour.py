"""A likelihood for pixels of several channels, each of which depends on those before it."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from numpyro.distributions import Distribution, constraints

from gapjax.model.distributions import DiscretizedLogistic


class ColourLogistic(Distribution):
    """Discretized logistics of the channels of a pixel, with linear autoregression between them.

    Channel c of a pixel is a `DiscretizedLogistic` whose mean sees the channels before it,

        m_c = loc_c + sum_(d < c) coefficient_cd (x_d / (K - 1) - 1/2),

    so that the joint distribution of the channels is normalised, and `sample` draws channel by
    channel from exactly it, the uniform floor included.

    Args:
      loc: [*batch, C], the means where every channel before is at 1/2.
      scale: [*batch, C].
      coefficients: [*batch, C (C - 1) / 2], row by row of the lower triangle: 2-1, 3-1, 3-2.
      levels: see `DiscretizedLogistic`.
      uniform_weight: see `DiscretizedLogistic`.

    References:
      Salimans, Karpathy, Chen, Kingma, PixelCNN++, 2017 (section 2.2).
    """

    arg_constraints: ClassVar = {  # pyright: ignore[reportIncompatibleVariableOverride]
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "coefficients": constraints.real_vector,
    }
    pytree_data_fields = ("loc", "scale", "coefficients")
    pytree_aux_fields = ("levels", "uniform_weight")

    def __init__(
        self,
        loc: ArrayLike,
        scale: ArrayLike,
        coefficients: ArrayLike,
        levels: int = 256,
        *,
        uniform_weight: float = 0.0,
        validate_args: bool | None = None,
    ):
        self.loc, self.scale, self.coefficients = map(jnp.asarray, (loc, scale, coefficients))
        self.levels, self.uniform_weight = levels, uniform_weight
        channels = self.loc.shape[-1]
        if self.coefficients.shape[-1] != channels * (channels - 1) // 2:
            raise ValueError(
                f"coefficients have the shape {self.coefficients.shape}; {channels} channels need "
                f"{channels * (channels - 1) // 2} on the last axis"
            )
        shapes = [array.shape[:-1] for array in (self.loc, self.scale, self.coefficients)]
        super().__init__(jnp.broadcast_shapes(*shapes), (channels,), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)  # pyright: ignore[reportArgumentType]
    def support(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        """The integers 0 .. levels - 1 in every channel."""
        return constraints.independent(constraints.integer_interval(0, self.levels - 1), 1)

    def given(self, value: ArrayLike) -> DiscretizedLogistic:
        """Every channel [*batch, C] given those before it in `value`; the others are not seen."""
        value = jnp.asarray(value)
        shape = jnp.broadcast_shapes(value.shape[:-1], self.batch_shape)
        spread = lambda array: jnp.broadcast_to(array, (*shape, array.shape[-1]))
        loc, scale, coefficients = map(spread, (self.loc, self.scale, self.coefficients))
        centred = spread(value.astype(loc.dtype)) / (self.levels - 1) - 0.5
        shifts, first = [jnp.zeros(shape, loc.dtype)], 0
        for channel in range(1, self.event_shape[0]):
            row = coefficients[..., first : first + channel]
            shifts.append((row * centred[..., :channel]).sum(-1))
            first += channel
        loc = loc + jnp.stack(shifts, -1)
        return DiscretizedLogistic(
            loc, scale, self.levels, uniform_weight=self.uniform_weight, validate_args=False
        )

    def log_prob(self, value: ArrayLike) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Log P(value) of whole pixels [*batch], in nats."""
        levels = self.given(value)
        return levels.log_prob(jnp.broadcast_to(value, levels.batch_shape)).sum(-1)

    def sample(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key: jax.Array, sample_shape: tuple[int, ...] = ()
    ) -> jax.Array:
        """Draws levels as int32, shape `sample_shape + batch_shape + (C,)`."""
        return self._in_turn(sample_shape, lambda level, channel: level.sample(channel), key)

    @property
    def mean(self) -> jax.Array:
        """The mean level of each channel where those before it are at their means."""
        return self._in_turn((), lambda level, channel: level.mean, jax.random.key(0))

    def _in_turn(self, sample_shape: tuple[int, ...], choose, key: jax.Array) -> jax.Array:
        """The channels one after another, each chosen from its distribution given the others."""
        shape = *sample_shape, *self.batch_shape, *self.event_shape
        value = None
        for channel, channel_key in enumerate(jax.random.split(key, self.event_shape[0])):
            seen = jnp.zeros(shape) if value is None else value
            levels = choose(self.given(seen), channel_key)
            value = levels if value is None else value.at[..., channel].set(levels[..., channel])
        assert value is not None
        return value
