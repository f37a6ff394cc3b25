"""Reading streams by count: never more is unpacked than was asked for, whatever the file says."""

from __future__ import annotations

import io
import zlib
from typing import BinaryIO

import numpy as np

DEFLATE_RATIO = 1032
"""How many bytes one byte of deflate, which gzip and zip use, can become at most."""

_CHUNK = 1 << 16
_PART = 1 << 20
_MEMBERS = 1000  # a gzip file may be several after each other; a few bytes can hold an empty one
_HEADER = 1 << 20  # bytes that may pass before the first one comes out


def read_into(stream: io.BufferedIOBase | BinaryIO, array: np.ndarray) -> int:
    """Fill an array of bytes from a stream. Return how many there were.

    Example:
        >>> read_into(io.BytesIO(b"12"), np.empty(3, dtype=np.uint8))
        2
    """
    done = 0
    while done < len(array):
        part = stream.read(min(_PART, len(array) - done))
        if not part:
            break
        array[done : done + len(part)] = np.frombuffer(part, dtype=np.uint8)
        done += len(part)
    return done


class GzipDamage(ValueError):
    """The file is no whole gzip file; the message says why."""


class Gunzip(io.RawIOBase):
    """The unpacked content of a gzip file, to be read forwards.

    Args:
        packed: The open file.
    Raises:
        GzipDamage: While reading, where the file is damaged or ends too early.
    """

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._rest = b""
        self._members = 0
        self._position = 0
        self._silent = 0
        self._inflate: zlib._Decompress | None = None

    def readable(self) -> bool:
        """Whether it can be read: yes."""
        return True

    def tell(self) -> int:
        """Return how many bytes have come out."""
        return self._position

    def readinto(self, buffer: bytearray | memoryview, /) -> int:
        """Fill as much of a buffer as one step of unpacking gives; 0 at the end."""
        part = self._some(len(buffer))
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _some(self, most: int) -> bytes:
        """Return some bytes, at most so many, or none at the end."""
        while most > 0:
            if self._inflate is None and self._members > 0:
                self._rest = self._rest.lstrip(b"\0")  # zeros may follow a member
            self._rest = self._rest or self._packed.read(_CHUNK)
            if self._inflate is None:
                if not self._rest and self._members > 0:
                    return b""
                if not self._rest.strip(b"\0") and self._members > 0:
                    continue
                self._members += 1
                if self._members > _MEMBERS:
                    raise GzipDamage(f"it has more than {_MEMBERS} parts")
                self._inflate = zlib.decompressobj(wbits=31)
            elif not self._rest:
                raise GzipDamage("it ends too early")
            before = len(self._rest)
            try:
                part = self._inflate.decompress(self._rest, most)
            except zlib.error as error:
                raise GzipDamage(str(error)) from None
            self._rest = self._inflate.unconsumed_tail
            if self._inflate.eof:
                self._rest, self._inflate = self._inflate.unused_data, None
            if part:
                self._silent = 0
                return part
            self._silent += before - len(self._rest)
            if self._silent > _HEADER:
                raise GzipDamage("its header does not end")
        return b""
