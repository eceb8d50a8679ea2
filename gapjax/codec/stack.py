"""A stack of bits for one chain of images: asymmetric numeral systems, by constriction.

What is pushed last is popped first. Popping a symbol under a distribution from bits that hold
something else draws a sample of that distribution; pushing the sample back restores the bits. That
is what bits-back coding rests on.

Measured on one core against an interleaved coder in NumPy, with 784 pixels an image: constriction
took 0.01 ms to push and 0.08 ms to pop the pixels of a binary image, and 0.08 and 0.12 ms for a
table of 16 entries a pixel, on one stack. NumPy took 0.12 ms to push with 64 interleaved stacks,
each of which has bits to start from, and 0.80 ms with 16.
"""

import functools
import hashlib
import importlib
import importlib.metadata
from typing import Any

import numpy as np

# Latents are coded on a grid: 128 points for each standard deviation of the prior, up to 8 of them.
GRID = 128
HALF = 8 * GRID
_MAX_BITS = 24  # constriction's precision: a symbol costs no more


class CodecError(ValueError):
    """Images that cannot be coded, or a file that cannot be decoded; one line says why."""


class Stack:
    """The bits of one chain of images."""

    def __init__(self, words: np.ndarray):
        """Starts from these words, uint32, of which the last is not zero.

        Raises:
          CodecError: the last word is zero, or constriction is not installed.
        """
        if len(words) and not words[-1]:
            raise CodecError("the file is damaged: a stream ends in a zero")
        self._coder = _library().stream.stack.AnsCoder(np.array(words, np.uint32))

    def push_latents(self, indices: np.ndarray, loc: np.ndarray, scale: np.ndarray) -> None:
        """Codes grid indices int32 [Z] under Gaussians; loc and scale float32 [Z], in steps."""
        self._coder.encode_reverse(indices, _gaussian(), loc, scale)

    def pop_latents(self, loc: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The grid indices int32 [Z] on top; the inverse of `push_latents`."""
        return self._coder.decode(_gaussian(), loc, scale)

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
    """The bits that a chain starts from: enough to pop the latents of one image, always the same.

    Args:
      chain: its number.
      latent_dim: Z.
    """
    number = -(-_MAX_BITS * latent_dim // 32) + 2
    digest = hashlib.shake_128(f"gapjax chain {chain}".encode()).digest(4 * number)
    words = np.frombuffer(digest, "<u4").astype(np.uint32)
    words[-1] |= 1
    return words


def library_version() -> str:
    """The version of constriction, whose arithmetic is part of the format."""
    _library()
    return importlib.metadata.version("constriction")


@functools.cache
def _library() -> Any:
    try:
        return importlib.import_module("constriction")
    except ImportError as error:
        raise CodecError(
            "the codec needs constriction; install gapjax with its extra 'codec', "
            "pip install 'gapjax[codec]'"
        ) from error


@functools.cache
def _gaussian() -> Any:
    return _library().stream.model.QuantizedGaussian(-HALF, HALF - 1)


@functools.cache
def _categorical() -> Any:
    return _library().stream.model.Categorical(perfect=False)
