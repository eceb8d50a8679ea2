"""The file: a header, the streams of the chains, and nothing that a stranger could make costly.

    bytes   4  magic, 89 47 41 50
            1  version: 2 where an image's latent is one vector, 3 of a hierarchy
            1  levels - 1
            1  number of axes of an image, then each as an integer
               number of images, number of chains, as integers
            1  method of refinement, then its steps as an integer; if there are any, its
               num_samples and num_judged as integers, and its learning rate as a 32-bit float
            1  of a hierarchy alone: the order of coding, 0 bits-back, 1 Bit-Swap
            8  fingerprint of the model
            4  fingerprint of the arithmetic without refinement
            4  of that with it; zeros where there is none
            8  checksum of the images
            1  words at the bottom of every stream that are left out, see `stack.start`; of a
               hierarchy an integer
               words of each stream, as integers
            4  CRC-32 of the header up to here and of everything after it
               the streams, one after another, in 32-bit words
               zeros, where there is less than a byte for 8 images, or for 256 passes of images
               through the decoder

Integers have 7 bits in a byte, the lowest first; the highest bit says that more follow. All is
little-endian. Fingerprints and checksums are the first bytes of a SHA-256.
"""

import dataclasses
import itertools
import math
import struct
import zlib
from typing import NamedTuple

import numpy as np

from gapjax.codec.schedule import ORDERS
from gapjax.codec.stack import CodecError
from gapjax.infer.newton import METHODS, Refiner

MAX_PIXELS = 2**30  # of all images of a file
MAX_CHAINS = 256
MAX_STEPS = 1000
_MAX_POINTS = 1024  # samples, or pairs of points, of all chains together
# What a byte may ask for. Two Newton steps are about 100 passes, ten of Adam 60.
_IMAGES_PER_BYTE, _PASSES_PER_BYTE = 8, 256
_MAGIC, _VECTOR, _HIERARCHY = b"\x89GAP", 2, 3
_MAX_AXES, _DIGEST = 8, 8


class Header(NamedTuple):
    """What a file says of itself."""

    levels: int  # of pixels, 2 to 256
    event_shape: tuple[int, ...]
    count: int  # type: ignore[assignment]  # number of images, N
    refiner: Refiner  # how the posteriors were refined
    model: bytes  # fingerprint, 8 bytes, as are the next two
    numerics: bytes  # fingerprints of the arithmetic
    images: bytes  # checksum
    left_out: int  # words at the bottom of every stream that are not in the file
    order: str = ""  # of coding the latents of a hierarchy, one of `schedule.ORDERS`


def pack(header: Header, streams: list[np.ndarray]) -> bytes:
    """A file of this header and one stream of uint32 for each chain."""
    _check_sizes(header, len(streams))
    method, steps, samples, judged, learning_rate = dataclasses.astuple(header.refiner)
    version = _HIERARCHY if header.order else _VECTOR
    parts = [_MAGIC, bytes([version, header.levels - 1, len(header.event_shape)])]
    parts += map(_integer, (*header.event_shape, header.count, len(streams)))
    parts += [bytes([METHODS.index(method)]), _integer(steps)]
    if steps:
        parts += [_integer(samples), _integer(judged), struct.pack("<f", learning_rate)]
    order = bytes([ORDERS.index(header.order)]) if header.order else b""
    left_out = (_integer if header.order else lambda value: bytes([value]))(header.left_out)
    parts += [order, header.model, header.numerics, header.images, left_out]
    parts += [_integer(len(stream)) for stream in streams]
    body = b"".join(stream.astype("<u4").tobytes() for stream in streams)
    body += bytes(_padding(header, len(body)))
    head = b"".join(parts)
    return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body


def parse(content: bytes) -> tuple[Header, list[np.ndarray]]:
    """The header and the streams of a file; verified, and within the limits of every file."""
    if content[:4] != _MAGIC[: len(content)] or not content:
        raise CodecError("it is not a file of gapjax's codec")
    if len(content) > 4 and content[4] not in (_VECTOR, _HIERARCHY):
        raise CodecError(
            f"it has version {content[4]} of the format; this gapjax reads {_VECTOR} and "
            f"{_HIERARCHY}"
        )
    reader = _Reader(content)
    try:
        header, lengths, crc = _read(reader)
    except (IndexError, struct.error):
        raise CodecError("the file is truncated") from None
    body = content[reader.place :]
    size = 4 * sum(lengths)
    if len(body) < size:
        raise CodecError("the file is truncated")
    found = zlib.crc32(body, zlib.crc32(content[: reader.place - 4]))
    if len(body) - size != _padding(header, size) or crc != found:
        raise CodecError("the file is damaged (wrong checksum)")
    words = np.frombuffer(body[:size], "<u4")
    ends = np.cumsum([0, *lengths])
    return header, [words[a:b] for a, b in itertools.pairwise(ends)]


class _Reader:
    """A place in a file."""

    def __init__(self, content: bytes):
        self._content, self.place = content, 5
        self.is_hierarchy = content[4:5] == bytes([_HIERARCHY])

    def take(self, number: int) -> bytes:
        """The next bytes; IndexError where the file ends."""
        part = self._content[self.place : self.place + number]
        if len(part) < number:
            raise IndexError
        self.place += number
        return part

    def byte(self) -> int:
        return self.take(1)[0]

    def integer(self) -> int:
        value = 0
        for shift in range(0, 63, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise CodecError("the file is damaged: an integer has too many bytes")


def _read(reader: _Reader) -> tuple[Header, list[int], int]:
    """The header, the number of words of each stream, and the checksum."""
    levels, num_axes = reader.byte() + 1, reader.byte()
    if num_axes > _MAX_AXES:
        raise CodecError(f"the file is damaged: its images have {num_axes} axes")
    event_shape = tuple(reader.integer() for _ in range(num_axes))
    count, chains = reader.integer(), reader.integer()
    method, steps = reader.byte(), reader.integer()
    if method >= len(METHODS):
        raise CodecError(f"the file is damaged: it names the method of refinement {method}")
    refiner = Refiner(METHODS[method], num_steps=steps)
    if steps:
        samples, judged = reader.integer(), reader.integer()
        (learning_rate,) = struct.unpack("<f", reader.take(4))
        refiner = Refiner(METHODS[method], steps, samples, judged, learning_rate)
    number = reader.byte() if reader.is_hierarchy else -1
    if number >= len(ORDERS):
        raise CodecError(f"the file is damaged: it names the order of coding {number}")
    model, numerics, checksum = (reader.take(_DIGEST) for _ in range(3))
    left_out = reader.integer() if reader.is_hierarchy else reader.byte()
    order = ORDERS[number] if reader.is_hierarchy else ""
    header = Header(levels, event_shape, count, refiner, model, numerics, checksum, left_out, order)
    _check_sizes(header, chains)
    lengths = [reader.integer() for _ in range(chains)]
    return header, lengths, struct.unpack("<I", reader.take(4))[0]


def _check_sizes(header: Header, chains: int) -> None:
    """Raises CodecError for what would cost too much, or cannot be."""
    refiner = header.refiner
    pixels = max(1, header.count) * math.prod(header.event_shape)
    limits = {
        f"{header.levels} levels": 2 <= header.levels <= 256,
        f"{header.count} images of shape {header.event_shape}": 1 <= pixels <= MAX_PIXELS,
        f"{refiner.num_steps} steps of refinement": refiner.num_steps <= MAX_STEPS,
        f"refinement with {refiner}": (
            1 <= refiner.num_samples <= _MAX_POINTS
            and 1 <= refiner.num_judged <= _MAX_POINTS
            and 0 < refiner.learning_rate < math.inf
        ),
        f"{chains} chains of {header.count} images, with {refiner}": (
            min(1, header.count) <= chains <= min(most_chains(refiner), header.count)
        ),
    }
    for words, holds in limits.items():
        if not holds:
            raise CodecError(f"a file cannot hold {words}")


def most_chains(refiner: Refiner) -> int:
    """How many chains a file may have whose posteriors are refined like this."""
    points = max(refiner.num_samples, refiner.num_judged) if refiner.num_steps else 1
    return min(MAX_CHAINS, _MAX_POINTS // max(1, points))


def _padding(header: Header, size: int) -> int:
    """Zeros after streams of `size` bytes, so that few bytes cannot ask for much work."""
    refiner, per_image = header.refiner, 1 / _IMAGES_PER_BYTE
    if refiner.num_steps:
        judgements = 8 * (refiner.num_steps if refiner.method == "newton" else 1)
        passes = refiner.num_steps * refiner.num_samples + judgements * refiner.num_judged
        per_image = max(per_image, passes / _PASSES_PER_BYTE)
    return max(0, math.ceil(header.count * per_image) - size)


def _integer(value: int) -> bytes:
    """7 bits in a byte, the lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
