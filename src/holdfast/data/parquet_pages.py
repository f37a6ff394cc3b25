"""The page headers of a Parquet file, read to see that they declare no more than the file's metadata.

Arrow allocates what a page's header says, and a page of a few kilobytes may be packed two gigabytes of zeros. Headers
are written in Thrift's compact protocol, of which this reads as much as it takes to find three numbers.

Source: the Apache Parquet format, ``parquet.thrift``, `PageHeader`; Thrift compact protocol encoding.
"""

from __future__ import annotations

from typing import IO, Any

_MOST_HEADER = 1 << 20  # bytes; it may hold the smallest and largest value of the page
_MOST_DEPTH = 8
_UNPACKED_SIZE, _PACKED_SIZE = 2, 3  # numbers of the fields
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_PADDING = 100  # bytes by which writers before parquet-mr 1.2.9 understated a column


def require_honest_pages(file: IO[bytes], chunk: Any) -> None:
    """Compare what the pages of a column chunk declare with what the metadata declares.

    Args:
        file: The open Parquet file.
        chunk: A `pyarrow.parquet.ColumnChunkMetaData`.
    Raises:
        EOFError: The pages take more than the metadata says, or their headers are damaged.
    """
    place = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < place:
        place = chunk.dictionary_page_offset
    end, left = place + chunk.total_compressed_size, chunk.total_uncompressed_size
    if place < 0 or end < place:
        raise EOFError("it declares places outside the file")
    while place < end:
        file.seek(place)
        header = _PageHeader(file.read(min(_MOST_HEADER, end - place + _PADDING)))
        unpacked, packed = header.sizes()
        left -= unpacked
        if left < 0 or unpacked < 0 or packed < 0:
            raise EOFError("its pages take more than it declares")
        place += header.place + packed


class _PageHeader:
    """A reader of one header.

    Attributes:
        place: How much of it has been read.
    """

    def __init__(self, raw: bytes) -> None:
        self.raw, self.place = raw, 0

    def sizes(self) -> tuple[int, int]:
        """Read the header. Return the page's unpacked and packed size."""
        found: dict[int, int] = {}
        self._struct(found, 0)
        if not found.keys() >= {_UNPACKED_SIZE, _PACKED_SIZE}:
            raise EOFError("a page has no size")
        return found[_UNPACKED_SIZE], found[_PACKED_SIZE]

    def _struct(self, found: dict[int, int] | None, depth: int) -> None:
        """Read a structure's fields; keep the whole numbers of the outermost one."""
        number = 0
        while (first := self._byte()) != 0:
            kind, step = first & 15, first >> 4
            number = number + step if step else self._whole()
            if kind in (_I16, _I32, _I64):
                value = self._whole()
                if found is not None:
                    found[number] = value
            elif kind not in (_TRUE, _FALSE):
                self._pass_over(kind, depth + 1)

    def _pass_over(self, kind: int, depth: int) -> None:
        """Read a value and forget it."""
        if depth > _MOST_DEPTH:
            raise EOFError("a page's header is nested too deep")
        if kind in (_TRUE, _FALSE, _BYTE):
            self._bytes(1)
        elif kind in (_I16, _I32, _I64):
            self._varint()
        elif kind == _DOUBLE:
            self._bytes(8)
        elif kind == _BINARY:
            self._bytes(self._varint())
        elif kind == _STRUCT:
            self._struct(None, depth)
        elif kind in (_LIST, _SET):
            first = self._byte()
            for _ in range(first >> 4 if first >> 4 < 15 else self._varint()):
                self._pass_over(first & 15, depth + 1)
        else:
            raise EOFError("a page's header is damaged")

    def _byte(self) -> int:
        self._bytes(1)
        return self.raw[self.place - 1]

    def _bytes(self, count: int) -> None:
        self.place += count
        if self.place > len(self.raw):
            raise EOFError("a page's header does not end")

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise EOFError("a page's header is damaged")

    def _whole(self) -> int:
        """A signed whole number, which zigzag makes unsigned."""
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
