"""Plain arrays out of NumPy's ``.npz`` archives: nothing is unpickled, no more is read than was declared and allowed.

A small archive can declare any shape, and a megabyte of it can hold a gigabyte of zeros. So headers are read first,
without evaluating them, the sizes they declare are compared with the archive's own, and the content is counted.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from holdfast.data.limits import Room
from holdfast.data.unpacking import DEFLATE_RATIO, read_into
from holdfast.errors import HoldfastError
from holdfast.regular_files import open_regular, readable_size
from holdfast.zip_files import open_zip

_PLAIN_TYPES = re.compile(r"[<>|=]?[?biufcSU][0-9]{0,9}")
_HEADER = 10_000  # bytes; NumPy's own limit
_LONGEST_EMPTY = 1 << 20  # length of an array that has no elements


class ArrayArchive:
    """An open archive.

    Attributes:
        names: Of the arrays in it.
    """

    def __init__(self, archive: zipfile.ZipFile, where: str, room: Room) -> None:
        self._archive, self._where, self._room = archive, where, room
        self.names = frozenset(
            name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy") and "/" not in name
        )

    def require_one_for_each(self, labels: str, images: str) -> None:
        """Refuse labels that are not as many as the images, before either is read; those that are missing are not told.

        Raises:
            HoldfastError: Their numbers differ.
        """
        lengths = []
        for name in (images, labels):
            if name not in self.names:
                return
            with self._archive.open(f"{name}.npy") as stream:
                lengths.append((_header(stream, f"{self._where}: {name}")[2] or (1,))[0])
        if lengths[0] != lengths[1]:
            raise HoldfastError(
                f"{self._where}: {labels} has {lengths[1]} labels, and {images} has {lengths[0]} images: match them"
            )

    def read(self, name: str) -> np.ndarray:
        """Return one of the arrays.

        Raises:
            HoldfastError: It is not plain, its size is not the one that it declares, or it is too large.
        """
        info = self._archive.getinfo(f"{name}.npy")
        where = f"{self._where}: {name}"
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise _unreadable(where, "it is packed or encrypted in a way that numpy.savez does not use")
        if info.file_size > DEFLATE_RATIO * (info.compress_size + 1):
            raise _unreadable(where, f"{info.compress_size} bytes cannot be {readable_size(info.file_size)} unpacked")
        with self._archive.open(info) as stream:
            dtype, is_fortran, shape, header = _header(stream, where)
            size = dtype.itemsize * math.prod(shape)
            if header + size != info.file_size:
                declared = f"{dtype} of shape {_shape_text(shape)} takes {readable_size(size)}"
                raise _unreadable(where, f"{declared}, and there are {readable_size(info.file_size - header)}")
            self._room.take(size, where)
            raw = np.empty(size, dtype=np.uint8)
            count = read_into(stream, raw)  # with the last byte, the checksum is compared
            if count < size or stream.read(1):
                state = "more" if count == size else readable_size(count)
                raise _unreadable(where, f"{readable_size(size)} are declared and there are {state}")
        return raw.view(dtype).reshape(shape, order="F" if is_fortran else "C")


@contextmanager
def open_archive(source: Path | IO[bytes], where: str, room: Room) -> Iterator[ArrayArchive]:
    """Open an archive for reading.

    Args:
        source: Its path, or the open file.
        where: What messages call it.
        room: What its arrays may take.
    Raises:
        HoldfastError: It is no archive, or a part of it is damaged; inside the block too.
    """
    try:
        file = open_regular(source) if isinstance(source, Path) else source
        with file, open_zip(file) as archive:
            yield ArrayArchive(archive, where, room)
    except HoldfastError:
        raise
    except (ValueError, OSError, EOFError, LookupError, zipfile.BadZipFile, zlib.error, struct.error) as error:
        raise _unreadable(where, str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _header(stream: io.BufferedIOBase | IO[bytes], where: str) -> tuple[np.dtype, bool, tuple[int, ...], int]:
    """Return dtype, order and shape, and how many bytes said so. Nothing of the text is evaluated."""
    magic = stream.read(8)
    if len(magic) < 8 or magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise _unreadable(where, "it is no array")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if length > _HEADER:
        raise _unreadable(where, f"its header has {length} bytes")
    text = stream.read(length).decode("utf-8", "replace")
    dtype = re.search(r"['\"]descr['\"]\s*:\s*(['\"][^'\"]*['\"]|\[)", text)
    order = re.search(r"['\"]fortran_order['\"]\s*:\s*(True|False)\b", text)
    shape = re.search(r"['\"]shape['\"]\s*:\s*\(([0-9L, ]*)\)", text)
    if not (dtype and order and shape):
        raise _unreadable(where, "its header does not say type, order and shape")
    kind = dtype[1].strip("'\"")
    if not _PLAIN_TYPES.fullmatch(kind):
        raise _unreadable(where, "it holds objects or records" if kind in ("[", "|O", "O") else f"its type is {kind}")
    lengths = [part.strip(" L") for part in shape[1].split(",") if part.strip()]
    if len(lengths) > 8 or any(len(part) > 18 or not part.isdigit() for part in lengths):
        raise _unreadable(where, f"its shape is ({shape[1][:60]})")
    sizes = tuple(int(part) for part in lengths)
    try:
        found = np.dtype(kind)
    except (TypeError, ValueError) as error:
        raise _unreadable(where, f"its type is {kind}") from error
    if found.itemsize == 0 or (0 in sizes and max(sizes) > _LONGEST_EMPTY):
        raise _unreadable(where, f"it has shape {_shape_text(sizes)} of nothing")
    return found, order[1] == "True", sizes, 8 + width + length


def _shape_text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _unreadable(where: str, reason: str) -> HoldfastError:
    return HoldfastError(f"{where} cannot be read ({reason}): save plain arrays with numpy.savez")
