"""A stack of bits for one chain of images: asymmetric numeral systems, by constriction.

What is pushed last is popped first. Popping a symbol under a distribution from bits that hold
something else draws a sample of that distribution; pushing the sample back restores the bits. That
is what bits-back coding rests on.

An interleaved coder in NumPy needs many stacks to be fast, and each has bits to start from.
constriction is fast on one.
"""

import hashlib
import importlib
import importlib.metadata
from typing import Any

import numpy as np

# Latents are coded on a grid, 128 points for each standard deviation of the prior. A posterior's
# mean lies within 8 of these, its scale is at most 2, and a latent is within 8 of its mean. Where
# the stack has room for more, these are that many times as large.
GRID = 128
MAX_LOC, MAX_SCALE = 8 * GRID, 2 * GRID
_MAX_BITS = 24  # constriction's precision: a symbol costs no more
_WINDOW = 6.0  # scales on each side of a posterior's mean that can be coded, at least
_EXPONENTS = 2, 10  # of two; half the points of a window

WRONG = (
    "the file does not decode to the images that it was made from: it is damaged, or this "
    "machine's arithmetic is not the same from one run to the next"
)


class CodecError(ValueError):
    """Images that cannot be coded, or a file that cannot be decoded; one line says why."""


class Stack:
    """The bits of one chain of images."""

    def __init__(self, words: np.ndarray, room: int = 1):
        """Starts from these words, uint32, of which the last is not zero."""
        if len(words) and not words[-1]:
            raise CodecError("the file is damaged: a stream ends in a zero")
        self._room = room  # a power of two
        self._coder = _library().stream.stack.AnsCoder(np.array(words, np.uint32))

    def push_prior(self, indices: np.ndarray, loc: np.ndarray, scale: np.ndarray) -> None:
        """Codes grid indices int32 [Z] under a prior; loc and scale float32 [Z], in steps.

        All points of the grid can be coded, as a posterior may be anywhere on it.
        """
        self._coder.encode_reverse(indices, _gaussian(2 * MAX_LOC * self._room), loc, scale)

    def pop_prior(self, loc: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The grid indices int32 [Z] on top; the inverse of `push_prior`."""
        return self._coder.decode(_gaussian(2 * MAX_LOC * self._room), loc, scale)

    def push_latents(self, indices: np.ndarray, loc: np.ndarray, scale: np.ndarray) -> None:
        """Codes grid indices int32 [Z] that `pop_latents` gives for this posterior; its inverse."""
        middle = np.rint(loc)
        for half, part in reversed(_windows(scale, self._room)):
            offsets = indices[part] - middle[part].astype(np.int32)
            if offsets.min() < -half or offsets.max() >= half:
                raise CodecError(WRONG)
            self._coder.encode_reverse(offsets, _gaussian(half), (loc - middle)[part], scale[part])

    def pop_latents(self, loc: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Grid indices int32 [Z] under a posterior; loc and scale float32 [Z], in steps.

        Every point that can be coded has a probability of 2^-24 at least. So the points are those
        of a window about the mean, as a rule 6 to 12 scales on each side. With all points of the
        grid, one image in 1,000 would get a latent that has nothing to do with it, which costs
        thousands of bits.
        """
        middle = np.rint(loc)
        indices = middle.astype(np.int32)
        for half, part in _windows(scale, self._room):
            indices[part] += self._coder.decode(_gaussian(half), (loc - middle)[part], scale[part])
        return indices

    def push_levels(self, levels: np.ndarray, probs: np.ndarray) -> None:
        """Codes int32 [D] by tables float32 [D, K], which are quantised to 24 bits."""
        self._coder.encode_reverse(levels, _categorical(), probs)

    def pop_levels(self, probs: np.ndarray) -> np.ndarray:
        """The levels int32 [D] on top; the inverse of `push_levels`."""
        return self._coder.decode(_categorical(), probs)

    def words(self) -> np.ndarray:
        """All bits as uint32, those at the bottom first."""
        return self._coder.get_compressed()


def start(chain: int, latent_dim: int) -> np.ndarray:
    """The bits that a chain starts from, always the same: enough for the latents of an image."""
    number = -(-_MAX_BITS * latent_dim // 32) + 2
    digest = hashlib.shake_128(f"gapjax chain {chain}".encode()).digest(4 * number)
    words = np.frombuffer(digest, "<u4").astype(np.uint32)
    words[-1] |= 1
    return words


def library_version() -> str:
    """The version of constriction, whose arithmetic is part of the format."""
    _library()
    return importlib.metadata.version("constriction")


def _library() -> Any:
    try:
        return importlib.import_module("constriction")
    except ImportError as error:
        raise CodecError(
            "the codec needs constriction; install gapjax with its extra 'codec', "
            "pip install 'gapjax[codec]'"
        ) from error


def _gaussian(half: int) -> Any:
    """Gaussians on the integers from -half to half - 1."""
    return _library().stream.model.QuantizedGaussian(-half, half - 1)


def _categorical() -> Any:
    return _library().stream.model.Categorical(perfect=False)


def _windows(scale: np.ndarray, room: int) -> list[tuple[int, np.ndarray]]:
    """Half the size of each window, and which latents have it."""
    most = _EXPONENTS[-1] + room.bit_length() - 1
    exponents = np.clip(np.frexp(_WINDOW * scale)[1], _EXPONENTS[0], most)
    return [(1 << int(e), np.flatnonzero(exponents == e)) for e in np.unique(exponents)]
