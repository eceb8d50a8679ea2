"""Images to bytes and back: bits-back coding with a VAE (Townsend et al., 2019).

To code an image, its latent is popped from the stack under q(z given x), then the image is pushed
under p(x given z) and the latent under the prior. What it costs, in the mean, is the negative ELBO.
The images of a chain share a stack, so its first latent alone costs bits that carry nothing. A few
chains go side by side, so that networks see more than one image at a time. The latents of a
hierarchy are coded one after another, see `schedule`.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gapjax.codec import container, stack
from gapjax.codec.container import Header
from gapjax.codec.schedule import ORDERS, Step, Steps
from gapjax.codec.stack import WRONG, CodecError, Stack
from gapjax.codec.tables import (
    Latents,
    Model,
    Programs,
    Table,
    block_size,
    describe,
    numerics,
    of_channel,
    programs,
)
from gapjax.infer.newton import Refiner, check
from gapjax.model.checks import check_positive
from gapjax.vae import VAE, Given, VAEParams

ENCODER = Refiner(num_steps=0)
_MOST_CHAINS = 32
_BITS_PER_CHAIN = 2**18  # of the images as they are; a chain's start costs about 100 bits


def compress(
    vae: VAE,
    params: VAEParams,
    images: np.ndarray,
    refiner: Refiner = ENCODER,
    *,
    num_chains: int | None = None,
    order: str | None = None,
) -> bytes:
    """Compresses images without loss by bits-back coding.

    The length is, in the mean over what the latents turn out to be, -sum of ELBO(x) / log 2 bits,
    and some bits for each chain and the header. The ELBO is of the refined q. All probabilities
    are those of the model's own distributions, quantised to 24 bits. Latents lie on a grid of 128
    points for a standard deviation of the prior; in a hierarchy about that of the prior given the
    latents above.

    Args:
      vae: a model whose prior and posterior are diagonal Gaussians, or `Chain`s of them over the
        same latents, and whose likelihood is a Bernoulli, a `DiscretizedLogistic` or a
        `ColourLogistic`.
      params: its parameters; needed again to decompress.
      images: [N, *event] integers 0 .. levels - 1, N >= 0.
      refiner: how the encoder's q is improved first, see `gapjax.refine`; not at all by default.
        Decompressing repeats it, and takes as long. The file is filled up with zeros where it
        would have less than a byte for 256 passes through the decoder.
      num_chains: L, images that are coded side by side; by default one for 32 kB of images, at
        most 32. With a refiner at most 1024 over its samples or pairs of points.
      order: of the latents of a hierarchy. "bits_back" pops all of them before an image is pushed.
        "bit_swap" pops one, pushes the image, pops the next, pushes the one before, and so on. So a
        chain starts from the bits of one latent. It is possible, and the default, where q is a
        Markov chain from the image up and the prior one from the top down.

    Returns:
      The content of a file; `container` describes it.

    Raises:
      CodecError: images of another shape, with other values, or too many; a model that gives
        values which are not finite; too little memory; constriction is not installed.
      TypeError: a distribution of a family that is not coded; a conditional model; a `refiner`
        of a hierarchy.
      ValueError: a `refiner`, number of chains or `order` that cannot be used.

    References:
      Townsend, Bird, Barber, Practical Lossless Compression with Latent Variables using Bits Back
      Coding, 2019; Kingma, Abbeel, Ho, Bit-Swap: Recursive Bits-Back Coding for Lossless
      Compression with Hierarchical Latent Variables, 2019; Duda, Asymmetric Numeral Systems, 2009.
    """
    check(refiner)
    if isinstance(images, Given):
        raise TypeError(
            "images are Given, and a file does not hold their contexts; give the x of one context "
            "with the model vae.at(context)"
        )
    if refiner.num_steps:  # as a file holds it, in 32 bits
        rate = float(np.float32(refiner.learning_rate))
        refiner = dataclasses.replace(refiner, learning_rate=rate)
    else:
        refiner = ENCODER
    model = describe(vae, params)
    order = _order(model, refiner, order)
    images = _checked(images, model)
    if num_chains is None:  # so few that what their starts cost does not show
        bits = images.size * math.log2(model.levels)
        num_chains = int(np.clip(bits // _BITS_PER_CHAIN, 1, _MOST_CHAINS))
    check_positive(num_chains=num_chains)
    num_chains = min(num_chains, len(images), container.most_chains(refiner))
    header = Header(
        model.levels, model.event_shape, len(images), refiner, model.fingerprint, b"\0" * 8,
        _checksum(images), left_out=0, order=order,
    )  # fmt: skip
    empty = container.pack(header, [np.zeros(0, np.uint32)] * num_chains)  # refuses too much
    if not len(images):
        return empty
    starts = [stack.start(chain, model.latent_dim) for chain in range(num_chains)]
    stacks = [Stack(words, model.room) for words in starts]
    with _enough_memory():
        params = jax.device_put(params)
        each = (programs(vae, model, refiner) for refiner in _probed(header))
        found = b"".join(numerics(model, compiled, params, num_chains) for compiled in each)
        header = header._replace(numerics=found.ljust(8, b"\0"))
        coder = _Coder(model, programs(vae, model, refiner), params, stacks)
        _encode(coder, model.orders[order], images)
    streams = [each.words() for each in stacks]
    common = min(map(_common, streams, starts))
    if not order:  # it is one byte of such a file
        common = min(common, 255)
    return container.pack(header._replace(left_out=common), [each[common:] for each in streams])


def decompress(vae: VAE, params: VAEParams, content: bytes) -> np.ndarray:
    """The images of a file that `compress` made with this model.

    Time and memory are bounded by the file's length and the model, see `container`, and no file is
    refined before all that can be compared without is equal. Nothing in it is executed.

    Args:
      vae: the model.
      params: the parameters that it was compressed with.
      content: the file.

    Returns:
      uint8 [N, *event], bit for bit what was compressed.

    Raises:
      CodecError: the file is foreign, truncated or damaged; it was made with another model; or
        this machine's arithmetic is another, or its memory too small. Wrong images are never
        returned.
      TypeError: a distribution of a family that is not coded.
    """
    header, streams = container.parse(content)
    model = describe(vae, params)
    if (header.event_shape, header.levels) != (model.event_shape, model.levels):
        raise CodecError(
            f"the file holds images of shape {header.event_shape} with {header.levels} levels; "
            f"the model is for {model.event_shape} with {model.levels}"
        )
    if header.model != model.fingerprint:
        raise CodecError(
            f"the file was made with another model, {header.model.hex()}; this one is "
            f"{model.fingerprint.hex()}. Take the checkpoint and the encoder that it was made with"
        )
    if header.order not in model.orders or (model.grid and header.refiner.num_steps):
        raise CodecError("the file is damaged: this model cannot have been coded in its way")
    starts = [stack.start(chain, model.latent_dim) for chain in range(len(streams))]
    with _enough_memory():
        params = jax.device_put(params)
        for place, refiner in enumerate(_probed(header)):
            known = header.numerics[4 * place : 4 * place + 4]
            found = numerics(model, programs(vae, model, refiner), params, len(streams))
            if known != found:
                cause = "other versions of JAX or constriction, or another kind of device"
                if known[:2] == found[:2]:
                    cause = "other flags of JAX or XLA, or another kind of CPU"
                raise CodecError(
                    f"the file was made with another arithmetic: {cause}. It can be decoded only "
                    "where these are as they were"
                )
        images = np.zeros((header.count, *model.event_shape), np.uint8)
        if header.count:
            kept = [begin[: header.left_out] for begin in starts]
            both = zip(kept, streams, strict=True)
            stacks = [Stack(np.concatenate(words), model.room) for words in both]
            coder = _Coder(model, programs(vae, model, header.refiner), params, stacks)
            _decode(coder, model.orders[header.order], images)
            streams = [each.words() for each in stacks]
    if header.images != _checksum(images) or not all(map(np.array_equal, streams, starts)):
        raise CodecError(WRONG)
    return images


def _probed(header: Header) -> list[Refiner]:
    """The refinements whose arithmetic a file has a fingerprint of: first none, which is cheap."""
    return list(dict.fromkeys((ENCODER, header.refiner))) if header.count else []


@contextlib.contextmanager
def _enough_memory() -> Iterator[None]:
    """Raises CodecError where Python, NumPy or XLA cannot allocate."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # XLA's is a RuntimeError
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        told = " ".join(str(error).split())
        raise CodecError(f"this machine has too little memory: {told[:200]}") from error


class _Coder(NamedTuple):
    """What the coding of rows of one image for each chain needs."""

    model: Model
    compiled: Programs
    params: VAEParams
    stacks: list[Stack]

    def tables(self, step: Step, images: np.ndarray | None, latents: Latents) -> Table:
        """A step's distributions of a latent."""
        if images is None or not step.sees_x:
            images = np.zeros((len(self.stacks), *self.model.event_shape), np.uint8)
        program = (self.compiled.infer if step.kind == "infer" else self.compiled.prior)[step.name]
        return program(self.params, images, self.seen(step, latents), self.model.grid)

    def likelihoods(self, step: Step, latents: Latents) -> tuple[Any, Any]:
        """p(x given z) of each chain and the tables of its blocks."""
        return self.compiled.blocks(self.params, self.seen(step, latents), self.model.grid)

    def seen(self, step: Step, latents: Latents) -> Latents:
        """The latents that a step depends on, and zeros in place of the others."""
        chains, sizes = len(self.stacks), self.model.sizes
        blank = {name: np.zeros((chains, size), np.int32) for name, size in sizes.items()}
        return blank | {name: latents[name] for name in step.given}


def _encode(coder: _Coder, steps: Steps, images: np.ndarray) -> None:
    """Pushes all images, row by row of one image for each chain."""
    chains = len(coder.stacks)
    rows = [images[start : start + chains] for start in range(0, len(images), chains)]
    first, *others = steps
    ahead = coder.tables(first, _filled(rows[0], chains), {})
    for row, following in itertools.zip_longest(rows, rows[1:]):
        used, filled = coder.stacks[: len(row)], _filled(row, chains)
        tables = list(map(_finite, ahead))
        if following is not None:  # computed while this row is coded
            ahead = coder.tables(first, _filled(following, chains), {})
        latents = {first.name: _each(Stack.pop_latents, used, chains, *tables)}
        for step in others:
            if step.kind == "pixels":
                _push_pixels(coder, used, filled, coder.likelihoods(step, latents))
                continue
            tables = list(map(_finite, coder.tables(step, filled, latents)))
            if step.kind == "infer":
                latents[step.name] = _each(Stack.pop_latents, used, chains, *tables)
            else:
                list(map(Stack.push_prior, used, latents[step.name], *tables))


def _decode(coder: _Coder, steps: Steps, images: np.ndarray) -> None:
    """Pops the images of all rows, the last row first; fills `images`."""
    chains = len(coder.stacks)
    for start in reversed(range(0, len(images), chains)):
        used, row = coder.stacks[: len(images) - start], None
        latents: Latents = {}
        for step in reversed(steps):
            if step.kind == "pixels":
                row = _pop_pixels(coder, used, coder.likelihoods(step, latents))
                images[start : start + chains] = row[: len(used)]
                continue
            tables = list(map(_finite, coder.tables(step, row, latents)))
            if step.kind == "prior":
                latents[step.name] = _each(Stack.pop_prior, used, chains, *tables)
            else:
                list(map(Stack.push_latents, used, latents[step.name], *tables))


def _push_pixels(
    coder: _Coder, used: list[Stack], images: np.ndarray, likelihoods: tuple[Any, Any]
) -> None:
    """Pushes one image on each stack, the last of channels that are coded in turn first."""
    model, compiled, levels = coder.model, coder.compiled, images.astype(np.int32)
    size = block_size(model.levels)
    for channel in reversed(range(model.channels or 1)):
        own, blocks = compiled.channel(*likelihoods, levels, channel)
        chosen, inner = np.divmod(of_channel(levels, channel, model), size)
        if size > 1:
            list(map(Stack.push_levels, used, inner, _finite(compiled.within(own, chosen))))
        list(map(Stack.push_levels, used, chosen, _finite(blocks)))


def _pop_pixels(coder: _Coder, used: list[Stack], likelihoods: tuple[Any, Any]) -> np.ndarray:
    """The image uint8 of each chain; the inverse of `_push_pixels`."""
    model, compiled, chains = coder.model, coder.compiled, len(coder.stacks)
    size = block_size(model.levels)
    images = np.zeros((chains, *model.event_shape), np.int32)
    for channel in range(model.channels or 1):
        own, blocks = compiled.channel(*likelihoods, images, channel)
        levels = _each(Stack.pop_levels, used, chains, _finite(blocks))
        if size > 1:
            finer = _finite(compiled.within(own, levels))
            levels = size * levels + _each(Stack.pop_levels, used, chains, finer)
        of_channel(images, channel, model)[...] = levels
    return images.astype(np.uint8)


def _each(
    pop: Callable[..., np.ndarray], used: list[Stack], chains: int, *tables: np.ndarray
) -> np.ndarray:
    """What is popped from each stack; zeros for the chains that have no image."""
    return _filled(list(map(pop, used, *tables)), chains)


def _order(model: Model, refiner: Refiner, order: str | None) -> str:
    """The order in which a model is coded, the best one by default."""
    if model.grid and refiner.num_steps:
        raise TypeError(
            "a refiner improves one diagonal Gaussian and the posterior is a Chain; leave the "
            "refiner out, or take the hierarchy in its non-centred form"
        )
    if order is None:
        return list(model.orders)[-1]
    if order not in model.orders:
        possible = " or ".join(map(repr, filter(None, model.orders))) or "no other than None"
        raise ValueError(
            f"order is {order!r}; of this model it can be {possible}"
            + ", as q is no Markov chain from the image up" * (order == ORDERS[1])
        )
    return order


def _checked(images: np.ndarray, model: Model) -> np.ndarray:
    """The images as uint8, of the model's shape and levels."""
    images = np.asarray(images)
    if images.shape[1:] != model.event_shape or not images.ndim:
        shape = ", ".join(map(str, ("N", *model.event_shape)))
        raise CodecError(f"images have shape {images.shape}; the model takes [{shape}]")
    if images.dtype.kind not in "uib":
        raise CodecError(f"images have dtype {images.dtype}; give integers 0 to levels - 1")
    if images.size and (images.min() < 0 or images.max() >= model.levels):
        raise CodecError(
            f"images have values from {images.min()} to {images.max()}; the model's pixels have "
            f"the levels 0 to {model.levels - 1}"
        )
    return images.astype(np.uint8)


def _filled(rows: Sequence[np.ndarray] | np.ndarray, chains: int) -> np.ndarray:
    """One row for each chain; zeros for those that have no image, in both directions the same."""
    some = np.asarray(rows)
    return np.concatenate([some, np.zeros((chains - len(some), *some.shape[1:]), some.dtype)])


def _finite(output: jax.Array) -> np.ndarray:
    """What a network gave, once it is computed; refuses what is no number."""
    if not np.isfinite(array := np.asarray(output)).all():
        raise CodecError("the model gives values that are not finite; it cannot code with them")
    return array


def _common(words: np.ndarray, begin: np.ndarray) -> int:
    """How many words at the bottom of a stream are those that it started from, at least one not."""
    size = min(len(words) - 1, len(begin))
    differs = np.flatnonzero(words[:size] != begin[:size])
    return int(differs[0]) if len(differs) else size


def _checksum(images: np.ndarray) -> bytes:
    digest = hashlib.sha256(f"{images.shape}".encode())
    digest.update(np.ascontiguousarray(images).data)
    return digest.digest()[:8]
