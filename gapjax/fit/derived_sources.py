"""Sources that are made from another: decoded codes of its images, moved images, noisy ones.

None sees test data, and none needs a label: the decoder is frozen, and says which z belongs to an
image that it was never trained on. The encoder and decoder that they are given stay as they are
during a refit, so a source is the same from its first epoch to its last.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jax.typing import ArrayLike

from gapjax import parallel
from gapjax.examples import context_of, dtypes_of, with_x, x_of
from gapjax.fit.sources import Plan, Source, data_source
from gapjax.measure.bounds import Images
from gapjax.model.distributions import sample_beside
from gapjax.vae import VAE, VAEParams, bind, prior_of, sample

_STATIC = {"static": True}


def reconstruction_source(vae: VAE, params: VAEParams, images: Images | Source) -> "DerivedSource":
    """Reconstructions: z ~ q(z given x_0), x ~ p(x given z), with x_0 a training image.

    A step from the training data towards the model's own samples: with the exact posterior in
    place of q it would leave p(x) as it is.

    Args:
      params: encoder and decoder that make the reconstructions.
      images: training images [N, *event], or a source of them, whose number they have.
    """
    return _derived(_reconstruct, images, params, vae=vae)


def interpolation_source(
    vae: VAE,
    params: VAEParams,
    images: Images | Source,
    *,
    partner: str = "data",
    max_angle: ArrayLike = math.pi / 4,
) -> "DerivedSource":
    """Decoded codes between a training image's and another code.

        z = cos(t) z_1 + sin(t) z_2,   t ~ U(0, max_angle),   x ~ p(x given z)

    z_1 ~ q(z given x) of a training image. z_2 is the code of another training image, or a sample
    of the prior. At t = 0 this is a reconstruction. With a standard Gaussian prior and the
    partner "prior" it is a widened posterior for small t and a sample of the model at
    t = pi / 2; where the codes of the data follow the prior, so does z for every t.

    Args:
      params: encoder and decoder that make the images; z is a vector.
      images: training images [N, *event], or a source of them, whose number they have.
      partner: what z_2 is, "data" or "prior".
      max_angle: largest t, in radians; a number, or an array that may be traced.
    """
    if partner not in ("data", "prior"):
        raise ValueError(f"partner is {partner!r}; it must be one of data, prior")
    angle = jnp.asarray(max_angle, jnp.float32)
    return _derived(_interpolate, images, params, angle, vae=vae, partner=partner)


def augmented_source(
    source: Source,
    *,
    max_shift: int = 1,
    max_rotation: ArrayLike = 0.0,
    max_scale: ArrayLike = 0.0,
    max_shear: ArrayLike = 0.0,
) -> "DerivedSource":
    """Images [H, W] or [H, W, C] of another source, each moved by a random small affine map.

    Every image is rotated by at most so many radians, scaled by at most e^max_scale along either
    axis, sheared, and shifted by whole pixels, each uniformly within its limits. Pixels in between
    are interpolated linearly; what comes in from outside is 0. Integer levels are rounded, so
    binary images stay binary. With the shift alone no pixel is interpolated.
    """
    if max_shift < 0:
        raise ValueError(f"max_shift is {max_shift}; it must be at least 0")
    limits = (jnp.asarray(limit, jnp.float32) for limit in (max_rotation, max_scale, max_shear))
    return _derived(_augment, source, *limits, max_shift=max_shift)


def noisy_source(source: Source, rate: ArrayLike) -> "DerivedSource":
    """Images of another source, some of whose pixels are those of another of its images.

    Each pixel is replaced with probability `rate`, which may be traced, by the pixel at the same
    place of a second image, drawn anew. So every pixel keeps its distribution, and only what holds
    between pixels is disturbed. On binary images it flips pixels, the more often the more they
    differ between images.
    """
    return _derived(_add_noise, source, jnp.asarray(rate, jnp.float32))


def thinned_source(source: Source, max_rate: ArrayLike) -> "DerivedSource":
    """Counts of another source, each of whose events is left out with probability r.

        x' ~ Binomial(x, 1 - r),   r ~ U(0, max_rate)

    Thinned Poisson counts are Poisson with (1 - r) times the mean, and negative binomial ones
    negative binomial with the same concentration. A context's "library" becomes the sum of x'.
    """
    return _derived(_thin, source, jnp.asarray(max_rate, jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DerivedSource:
    """Draws that `make` makes of those of another source, whose number and whose plan it has."""

    source: Source
    arrays: tuple  # arguments of `make`, which the members of a sweep may differ in
    make: Callable[..., jax.Array] = dataclasses.field(metadata=_STATIC)
    static: parallel.Static = dataclasses.field(metadata=_STATIC)  # its further arguments

    @property
    def num_examples(self) -> int:
        """Those of the other source."""
        return self.source.num_examples

    def begin_epoch(self, rng_key: jax.Array) -> Plan:
        """The plan of the other source."""
        return self.source.begin_epoch(rng_key)

    def draw(self, plan: Plan, rng_key: jax.Array, position: jax.Array) -> jax.Array:
        """`make(source, plan, rng_key, position, *arrays, **static)`."""
        made = functools.partial(self.make, self.source, plan, rng_key, position)
        return made(*self.arrays, **self.static.values)


def _derived(
    make: Callable[..., jax.Array], images: Images | Source, *arrays: Any, **static: Any
) -> DerivedSource:
    source = cast(Any, images) if hasattr(images, "begin_epoch") else data_source(cast(Any, images))
    return DerivedSource(source, arrays, make, parallel.Static(static))


# What `make` is, for each of the sources above.


def _reconstruct(source, plan, rng_key, position, params, *, vae: VAE) -> jax.Array:
    source_key, chain_key = jax.random.split(rng_key)
    example = source.draw(plan, source_key, position)
    model, x = bind(vae, example)
    latent_key, pixel_key = jax.random.split(jax.random.split(chain_key, 1)[0])
    z = sample(model.encode(params.encoder, x), latent_key)
    return with_x(example, sample_beside(model.decode(params.decoder, z), pixel_key, dtypes_of(x)))


def _interpolate(
    source, plan, rng_key, position, params, max_angle, *, vae: VAE, partner: str
) -> jax.Array:
    first_key, second_key, angle_key, pixel_key = jax.random.split(rng_key, 4)

    def code(rng_key: jax.Array, position: jax.Array) -> tuple[Any, Any]:
        source_key, latent_key = jax.random.split(rng_key)
        example = source.draw(plan, source_key, position)
        model, x = bind(vae, example)
        return sample(model.encode(params.encoder, x), latent_key), example

    z_1, example = code(first_key, position)
    model, x = bind(vae, example)
    if partner == "prior":
        z_2 = sample(prior_of(model, params.decoder), second_key)
    else:
        other_key, second_key = jax.random.split(second_key)
        other = jax.random.randint(other_key, (), 0, source.num_examples)
        z_2, _ = code(second_key, other)
    angle = max_angle * jax.random.uniform(angle_key)
    between = lambda first, second: jnp.cos(angle) * first + jnp.sin(angle) * second
    z = jax.tree.map(between, z_1, z_2)
    return with_x(example, sample_beside(model.decode(params.decoder, z), pixel_key, dtypes_of(x)))


def _augment(source, plan, rng_key, position, rotation, scale, shear, *, max_shift) -> jax.Array:
    source_key, shift_key, map_key = jax.random.split(rng_key, 3)
    example = source.draw(plan, source_key, position)
    shift = jax.random.randint(shift_key, (2,), -max_shift, max_shift + 1).astype(jnp.float32)
    turned, sheared, *logs = jax.random.uniform(map_key, (4,), minval=-1.0, maxval=1.0)
    angle = rotation * turned
    turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    stretch = jnp.diag(jnp.exp(scale * jnp.stack(logs)))
    matrix = turn @ stretch @ jnp.eye(2).at[0, 1].set(shear * sheared)
    return with_x(example, affine(x_of(example), matrix, shift))


def _add_noise(source, plan, rng_key, position, rate: jax.Array) -> jax.Array:
    first_key, second_key, other_key, mask_key = jax.random.split(rng_key, 4)
    example = source.draw(plan, first_key, position)
    other = jax.random.randint(other_key, (), 0, source.num_examples)
    x, of_other = x_of(example), x_of(source.draw(plan, second_key, other))
    replaced = jax.random.bernoulli(mask_key, rate, x.shape)
    return with_x(example, jnp.where(replaced, of_other, x))


def _thin(source, plan, rng_key, position, max_rate: jax.Array) -> Any:
    source_key, rate_key, count_key = jax.random.split(rng_key, 3)
    example = source.draw(plan, source_key, position)
    x, kept = x_of(example), 1 - max_rate * jax.random.uniform(rate_key)
    thinned = jax.random.binomial(count_key, x.astype(jnp.float32), kept).astype(x.dtype)
    context = context_of(example)
    if isinstance(context, dict) and "library" in context:
        library = thinned.sum().astype(context["library"].dtype)
        example = example._replace(context=context | {"library": library})
    return with_x(example, thinned)


def affine(x: jax.Array, matrix: jax.Array, shift: jax.Array) -> jax.Array:
    """One image [H, W] or [H, W, C], mapped about its centre c by A [2, 2] and moved by s [2].

    Output pixel u is the input's at A (u - c - s) + c, interpolated linearly; 0 where it ends.
    """
    if x.ndim not in (2, 3):
        raise ValueError(
            f"an image is [H, W] or [H, W, C], not {x.shape}; noisy_source takes any shape"
        )
    height, width = x.shape[:2]
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    places = jnp.stack(jnp.mgrid[:height, :width]).astype(jnp.float32)
    places = jnp.einsum("ij,jhw->ihw", matrix, places - centre - shift[:, None, None]) + centre

    def moved(channel: jax.Array) -> jax.Array:
        return map_coordinates(channel.astype(jnp.float32), list(places), order=1)

    out = moved(x) if x.ndim == 2 else jax.vmap(moved, in_axes=-1, out_axes=-1)(x)
    return (out if jnp.issubdtype(x.dtype, jnp.floating) else jnp.round(out)).astype(x.dtype)
