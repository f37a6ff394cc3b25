"""Reading streams by count: never more is unpacked than was asked for, whatever the file says."""

from __future__ import annotations

import io
import zlib
from typing import IO

import numpy as np

DEFLATE_RATIO = 1032
"""How many bytes one byte of deflate, which gzip and zip use, can become at most."""

_CHUNK = 1 << 16
_PART = 1 << 20
_MEMBERS = 1000  # a gzip file may be several after each other; a few bytes can hold an empty one


def read_into(stream: io.BufferedIOBase | IO[bytes], array: np.ndarray) -> int:
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


class Inflated(io.RawIOBase):
    """The unpacked content of a zlib stream, to be read forwards.

    Args:
        packed: The open file, where the stream begins.
        length: How many bytes of the file it has.
    Raises:
        zlib.error: While reading, where the stream is damaged.
    """

    def __init__(self, packed: IO[bytes], length: int) -> None:
        self._packed, self._left = packed, length
        self._rest = b""
        self._inflate = zlib.decompressobj()

    def readable(self) -> bool:
        """Whether it can be read: yes."""
        return True

    def readinto(self, buffer: bytearray | memoryview, /) -> int:
        """Fill as much of a buffer as one step of unpacking gives; 0 at the end."""
        part = b""
        while not part and not self._inflate.eof:
            if not self._rest:
                self._rest = self._packed.read(min(_CHUNK, self._left))
                self._left -= len(self._rest)
                if not self._rest:
                    break
            part = self._inflate.decompress(self._rest, len(buffer))
            self._rest = self._inflate.unconsumed_tail
        buffer[: len(part)] = part
        return len(part)


class Gunzip(io.RawIOBase):
    """The unpacked content of a gzip file, to be read forwards.

    Args:
        packed: The open file, at its beginning.
    Raises:
        GzipDamage: While reading, where the file is damaged or ends too early.
    """

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed = packed
        self._rest = b""
        self._members = 0
        self._inflate: zlib._Decompress | None = None

    def readable(self) -> bool:
        """Whether it can be read: yes."""
        return True

    def readinto(self, buffer: bytearray | memoryview, /) -> int:
        """Fill as much of a buffer as one step of unpacking gives; 0 at the end."""
        part = b""
        while not part and (self._inflate is not None or self._next_member()):
            part = self._step(len(buffer))
        buffer[: len(part)] = part
        return len(part)

    def _next_member(self) -> bool:
        """Begin the next of the files that a gzip file consists of; zeros may lie between them."""
        while True:
            self._rest = self._rest.lstrip(b"\0") if self._members else self._rest
            if self._rest:
                break
            self._rest = self._packed.read(_CHUNK)
            if not self._rest and self._members:
                return False
            if not self._rest:
                raise GzipDamage("it is empty")
        self._members += 1
        if self._members > _MEMBERS:
            raise GzipDamage(f"it has more than {_MEMBERS} parts")
        self._inflate = zlib.decompressobj(wbits=31)
        return True

    def _step(self, most: int) -> bytes:
        """Unpack a little, at most so many bytes."""
        assert self._inflate is not None
        self._rest = self._rest or self._packed.read(_CHUNK)
        if not self._rest:
            raise GzipDamage("it ends too early")
        try:
            part = self._inflate.decompress(self._rest, most)
        except zlib.error as error:
            raise GzipDamage(str(error)) from None
        self._rest = self._inflate.unconsumed_tail
        if self._inflate.eof:
            self._rest, self._inflate = self._inflate.unused_data, None
        return part
