"""Numeric arrays out of MATLAB files, versions 5 to 7: headers first, and no more than they declare.

A file is a list of elements, each a tag (type, length) and content. A matrix holds four elements in turn: flags with
its class, lengths, name, values. Matrices may be packed with zlib. Cells, structures and objects, which may lie in each
other without end, are told by their class and not opened.

Source: MathWorks, "MAT-File Format", level 5.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import IO

import numpy as np

from holdfast.data.limits import Room
from holdfast.data.unpacking import DEFLATE_RATIO, Inflated, read_into
from holdfast.errors import HoldfastError
from holdfast.regular_files import open_regular, readable_size

_INT8, _INT32, _UINT32, _MATRIX, _PACKED = 1, 5, 6, 14, 15
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_OTHER_CLASSES = {1: "a cell array", 2: "a structure", 3: "an object", 4: "text", 5: "a sparse matrix"}
_COMPLEX = 0x0800
_LONGEST_HEADER = 4096  # bytes of lengths or of a name
_MOST_ELEMENTS = 1000

Stream = io.BufferedIOBase | IO[bytes]


def read_numeric(file: Path, wanted: Collection[str], room: Room) -> dict[str, np.ndarray]:
    """Return the arrays of the given names, as far as they are there.

    Raises:
        HoldfastError: It is no MATLAB file of these versions, or it is damaged; one of the arrays is not numeric, or
            too large.
    """
    try:
        with open_regular(file) as content:
            return _Reader(file, content, room).arrays(wanted)
    except (EOFError, zlib.error, ValueError, OverflowError) as error:
        if isinstance(error, HoldfastError):
            raise
        raise HoldfastError(f"{file} is not a readable MATLAB file ({error}): download it again") from error


class _Reader:
    def __init__(self, file: Path, content: IO[bytes], room: Room) -> None:
        self.file, self.content, self.room = file, content, room
        self.size = os.fstat(content.fileno()).st_size
        kinds = {b"\0\1IM": "<", b"\1\0MI": ">"}
        version = _exactly(content, 128)[124:]
        if version in (b"\0\2IM", b"\2\0MI"):
            raise HoldfastError(f"{file} is not a readable MATLAB file (it has version 7.3): save it with -v7")
        if version not in kinds:
            raise EOFError("it does not begin like one of version 5")
        self.order = kinds[version]

    def arrays(self, wanted: Collection[str]) -> dict[str, np.ndarray]:
        """Go through the file's elements."""
        arrays: dict[str, np.ndarray] = {}
        for _ in range(_MOST_ELEMENTS):
            if self.content.tell() >= self.size:
                return arrays
            kind, length, _ = self._tag(self.content)
            end = self.content.tell() + length
            if end > self.size:
                raise EOFError("it is cut")
            if kind == _PACKED:
                stream: Stream = io.BufferedReader(Inflated(self.content, length))
                kind, unpacked, _ = self._tag(stream)
                if unpacked > DEFLATE_RATIO * (length + 1):
                    raise EOFError(f"{length} bytes cannot be {readable_size(unpacked)} unpacked")
            else:
                stream = self.content
            if kind == _MATRIX and self._matrix(stream, wanted, arrays) and stream is not self.content:
                padding = stream.read(8)  # at the end, the checksum is compared
                if len(padding) == 8 or stream.read(1):
                    raise EOFError("a matrix goes on after its values")
            self.content.seek(end)
        raise EOFError(f"it has more than {_MOST_ELEMENTS} elements")

    def _matrix(self, stream: Stream, wanted: Collection[str], arrays: dict[str, np.ndarray]) -> bool:
        """Read a matrix, or as much as tells that it is not wanted. Return whether it was."""
        flags = self._small(stream, _UINT32)
        lengths = tuple(int(length) for length in self._small(stream, _INT32))
        name = bytes(self._small(stream, _INT8)).decode("latin1")
        if name not in wanted:
            return False
        if len(flags) != 2 or len(lengths) < 2 or len(lengths) > 8 or min(lengths) < 0:
            raise EOFError(f"the header of {name} is damaged")
        kind = int(flags[0]) & 0xFF
        if kind not in _CLASSES or int(flags[0]) & _COMPLEX:
            what = _OTHER_CLASSES.get(kind, "no array of real numbers")
            raise HoldfastError(f"{self.file}: {name} is {what}: use the published files, or save it as numbers")
        stored, length, inside = self._tag(stream)
        if stored not in _STORED:
            raise EOFError(f"the values of {name} have type {stored}")
        dtype = np.dtype(self.order + _STORED[stored])
        count = math.prod(lengths)
        if length != count * dtype.itemsize or (count == 0 and max(lengths) > 1 << 20):
            raise EOFError(f"{name} has shape {lengths} and {length} bytes")
        self.room.take(count * (dtype.itemsize + np.dtype(_CLASSES[kind]).itemsize), f"{self.file}: {name}")
        raw = np.empty(length, dtype=np.uint8)
        if inside is not None:
            raw[:] = np.frombuffer(inside, dtype=np.uint8)
        elif (there := read_into(stream, raw)) < length:
            raise EOFError(f"{name} ends after {there} of {length} bytes")
        values = raw.view(dtype).astype(_CLASSES[kind], copy=False)
        arrays[name] = values.reshape(lengths, order="F")
        return True

    def _tag(self, stream: Stream) -> tuple[int, int, bytes | None]:
        """Return an element's type and length, and its content where that lies in the tag itself."""
        raw = _exactly(stream, 8)
        first, second = (int(word) for word in np.frombuffer(raw, dtype=f"{self.order}u4"))
        if first >> 16:
            if first >> 16 > 4:
                raise EOFError("a short element is too long")
            return first & 0xFFFF, first >> 16, raw[4 : 4 + (first >> 16)]
        return first, second, None

    def _small(self, stream: Stream, kind: int) -> np.ndarray:
        """Return a whole element of a matrix's header."""
        found, length, inside = self._tag(stream)
        if found != kind or length > _LONGEST_HEADER:
            raise EOFError("the header of a matrix is damaged")
        raw = inside if inside is not None else _exactly(stream, -(-length // 8) * 8)[:length]
        return np.frombuffer(raw, dtype=self.order + _STORED[kind])


def _exactly(stream: Stream, count: int) -> bytes:
    raw = stream.read(count)
    if len(raw) < count:
        raise EOFError("it is cut")
    return raw
