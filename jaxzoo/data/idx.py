"""Reader of the idx format (MNIST and its kin), plain or gzip."""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from os import PathLike
from pathlib import Path

import numpy as np

__all__ = ["read_idx"]

_UBYTE = 0x08
# DEFLATE packs at most 1032 to 1: a header that asks for more is a lie, and must not
# make us allocate what it asks for.
_MAX_RATIO = 1040


def read_idx(path: str | PathLike[str], *, ndim: int) -> np.ndarray:
    """Reads one idx file of unsigned bytes; the content decides whether it is gzip.

    The file is two zero bytes, the type 0x08, the number of dimensions, each
    dimension as a big-endian uint32, then the bytes in row-major order.

    Args:
      path: the file.
      ndim: number of dimensions expected: 3 for images, 1 for labels.

    Returns:
      uint8 array with `ndim` dimensions, read-only.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: magic, dimensions, length or gzip checksum are wrong; the message
        names the file.
    """
    path = Path(path)
    packed = path.read_bytes()
    is_gzip = packed[:2] == b"\x1f\x8b"
    header = 4 + 4 * ndim
    try:
        raw = _unpack(packed, header) if is_gzip else packed[:header]
        if len(raw) < header:
            raise ValueError(f"it ends within its header of {header} bytes")
        magic = bytes((0, 0, _UBYTE, ndim))
        if raw[:4] != magic:
            raise ValueError(f"its magic is {raw[:4].hex()}, expected {magic.hex()}")
        shape = struct.unpack(f">{ndim}I", raw[4:])
        length = header + math.prod(shape)
        if is_gzip and length > len(packed) * _MAX_RATIO:
            raise ValueError(f"its dimensions {shape} ask for more than it can hold")
        raw = _unpack(packed, length + 1) if is_gzip else packed
        if len(raw) != length:
            found = "more" if len(raw) > length else f"only {len(raw)}"
            raise ValueError(f"its dimensions {shape} need {length} bytes, not {found}")
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{path} is not a whole idx file: {error}; fetch or copy it again."
        ) from None
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _unpack(packed: bytes, limit: int) -> bytes:
    """At most `limit` bytes of gzip data; reading to its end checks its CRC-32."""
    with gzip.open(io.BytesIO(packed)) as stream:
        return stream.read(limit)
