"""Images to bytes and back: bits-back coding with a VAE (Townsend et al., 2019).

To code an image, its latent is popped from the stack under q(z given x), then the image is pushed
under p(x given z) and the latent under the prior. What it costs, in the mean, is the negative ELBO.
The images of a chain share a stack, so its first latent alone costs bits that carry nothing. A few
chains go side by side, so that networks see more than one image at a time.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from gapjax.codec import container, stack
from gapjax.codec.container import Header
from gapjax.codec.stack import WRONG, CodecError, Stack
from gapjax.codec.tables import Model, Programs, block_size, describe, numerics, programs
from gapjax.infer.newton import Refiner, check
from gapjax.model.checks import check_positive
from gapjax.vae import VAE, VAEParams

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
) -> bytes:
    """Compresses images without loss by bits-back coding.

    The length is, in the mean over what the latents turn out to be, -sum of ELBO(x) / log 2 bits,
    and some bits for each chain and the header. The ELBO is of the refined q. All probabilities
    are those of the model's own distributions, quantised to 24 bits. Latents lie on a grid of 128
    points for a standard deviation of the prior.

    Args:
      vae: a model with a diagonal Gaussian prior and posterior, and a likelihood that is a
        Bernoulli or a `DiscretizedLogistic`.
      params: its parameters; needed again to decompress.
      images: [N, *event] integers 0 .. levels - 1, N >= 0.
      refiner: how the encoder's q is improved first, see `gapjax.refine`; not at all by default.
        Decompressing repeats it, and takes as long. The file is filled up with zeros where it
        would have less than a byte for 256 passes through the decoder.
      num_chains: L, images that are coded side by side; by default one for 32 kB of images, at
        most 32. With a refiner at most 1024 over its samples or pairs of points.

    Returns:
      The content of a file; `container` describes it.

    Raises:
      CodecError: images of another shape, with other values, or too many; a model that gives
        values which are not finite; too little memory; constriction is not installed.
      TypeError: a distribution of a family that is not coded.
      ValueError: a `refiner` or number of chains that cannot be used.

    References:
      Townsend, Bird, Barber, Practical Lossless Compression with Latent Variables using Bits Back
      Coding, 2019; Duda, Asymmetric Numeral Systems, 2009.
    """
    check(refiner)
    if refiner.num_steps:  # as a file holds it, in 32 bits
        rate = float(np.float32(refiner.learning_rate))
        refiner = dataclasses.replace(refiner, learning_rate=rate)
    else:
        refiner = ENCODER
    model = describe(vae, params)
    images = _checked(images, model)
    if num_chains is None:  # so few that what their starts cost does not show
        bits = images.size * math.log2(model.levels)
        num_chains = int(np.clip(bits // _BITS_PER_CHAIN, 1, _MOST_CHAINS))
    check_positive(num_chains=num_chains)
    num_chains = min(num_chains, len(images), container.most_chains(refiner))
    header = Header(
        model.levels, model.event_shape, len(images), refiner, model.fingerprint, b"\0" * 8,
        _checksum(images), left_out=0,
    )  # fmt: skip
    empty = container.pack(header, [np.zeros(0, np.uint32)] * num_chains)  # refuses too much
    if not len(images):
        return empty
    starts = [stack.start(chain, model.latent_dim) for chain in range(num_chains)]
    stacks = [Stack(words) for words in starts]
    with _enough_memory():
        params = jax.device_put(params)
        each = (programs(vae, refiner) for refiner in _probed(header))
        found = b"".join(numerics(model, compiled, params, num_chains) for compiled in each)
        header = header._replace(numerics=found.ljust(8, b"\0"))
        _encode(model, programs(vae, refiner), params, stacks, images)
    streams = [each.words() for each in stacks]
    common = min(map(_common, streams, starts))
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
    starts = [stack.start(chain, model.latent_dim) for chain in range(len(streams))]
    with _enough_memory():
        params = jax.device_put(params)
        for place, refiner in enumerate(_probed(header)):
            known = header.numerics[4 * place : 4 * place + 4]
            found = numerics(model, programs(vae, refiner), params, len(streams))
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
            stacks = [Stack(np.concatenate(words)) for words in zip(kept, streams, strict=True)]
            _decode(model, programs(vae, header.refiner), params, stacks, images)
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


def _encode(
    model: Model, compiled: Programs, params: VAEParams, stacks: list[Stack], images: np.ndarray
) -> None:
    """Pushes all images, row by row of one image for each chain."""
    size, chains = block_size(model.levels), len(stacks)
    rows = [images[start : start + chains] for start in range(0, len(images), chains)]
    ahead = compiled.infer(params, _filled(rows[0], chains))
    for row, following in itertools.zip_longest(rows, rows[1:]):
        used = stacks[: len(row)]
        loc, scale = map(_finite, ahead)
        if following is not None:  # computed while this row is coded
            ahead = compiled.infer(params, _filled(following, chains))
        latents = _filled(list(map(Stack.pop_latents, used, loc, scale)), chains)
        likelihoods, blocks = compiled.blocks(params, latents)
        levels = _filled(row, chains).reshape(chains, -1).astype(np.int32)
        chosen, inner = np.divmod(levels, size)
        if size > 1:
            finer = _finite(compiled.within(likelihoods, chosen))
            for each, *coded in zip(used, inner, finer, strict=False):
                each.push_levels(*coded)
        for each, latent, *coded in zip(used, latents, chosen, _finite(blocks), strict=False):
            each.push_levels(*coded)
            each.push_prior(latent)


def _decode(
    model: Model, compiled: Programs, params: VAEParams, stacks: list[Stack], images: np.ndarray
) -> None:
    """Pops the images of all rows, the last row first; fills `images`."""
    size, chains = block_size(model.levels), len(stacks)
    for start in reversed(range(0, len(images), chains)):
        used = stacks[: len(images) - start]
        latents = _filled([each.pop_prior(model.latent_dim) for each in used], chains)
        likelihoods, blocks = compiled.blocks(params, latents)
        levels = _filled(list(map(Stack.pop_levels, used, _finite(blocks))), chains)
        if size > 1:
            finer = _finite(compiled.within(likelihoods, levels))
            levels = size * levels + _filled(list(map(Stack.pop_levels, used, finer)), chains)
        row = levels[: len(used)].astype(np.uint8).reshape(len(used), *model.event_shape)
        images[start : start + chains] = row
        loc, scale = map(_finite, compiled.infer(params, _filled(row, chains)))
        for each, *coded in zip(used, latents, loc, scale, strict=False):
            each.push_latents(*coded)


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
    """How many words at the bottom of a stream are those that it started from, at most 255."""
    size = min(len(words) - 1, len(begin), 255)
    differs = np.flatnonzero(words[:size] != begin[:size])
    return int(differs[0]) if len(differs) else size


def _checksum(images: np.ndarray) -> bytes:
    digest = hashlib.sha256(f"{images.shape}".encode())
    digest.update(np.ascontiguousarray(images).data)
    return digest.digest()[:8]
