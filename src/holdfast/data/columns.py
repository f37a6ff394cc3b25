"""Tables out of Parquet and Arrow files, as far as they have columns of use, and no larger than allowed.

Parquet's metadata declares how much each column takes, but the pages it is made of declare their own sizes, and Arrow
allocates what the pages say. So their headers are read first, and compared. What comes out can still be more than what
the pages take: a column may repeat a few long values. So it is counted while it comes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.data.limits import Room
from holdfast.data.parquet_pages import require_honest_pages
from holdfast.errors import HoldfastError
from holdfast.regular_files import open_regular, readable_size, require_regular

_REPEATED = 16  # times that a column's values may be repeated on average
_SLACK = 64 << 20  # bytes that they may be repeated anyhow
_BATCH = 32  # rows read at a time, so that long values are counted early
_METADATA = 100_000  # parts that a file's metadata may consist of
_RECORDS, _PACKING = 3, 3  # Arrow's number of a batch of records, and of the field in it that says how it is packed


@dataclass(frozen=True)
class Columns:
    """The two columns of use of a file.

    Attributes:
        table: A pyarrow table with the images' bytes and the labels; the file's metadata is in its schema.
        image: Name of the column with images.
        label: Name of the column with labels.
        names: Of all columns of the file.
    """

    table: Any
    image: str
    label: str
    names: tuple[str, ...]


def read_columns(file: Path, images: Sequence[str], labels: Sequence[str], room: Room) -> Columns:
    """Read a file's images and labels.

    Args:
        file: With ``.parquet`` at its end, else an Arrow stream.
        images: What the column of images may be called; of a structure only its ``bytes`` are read.
        labels: What the column of labels may be called.
        room: What the data may take.
    Raises:
        HoldfastError: pyarrow is missing, the file is damaged, a column is missing or of another type, or it holds or
            declares too much.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise HoldfastError('reading Parquet needs pyarrow: pip install "holdfast[data]"') from error
    try:
        require_regular(file)
        read = _from_parquet if file.suffix == ".parquet" else _from_stream
        return read(file, images, labels, room)
    except HoldfastError:
        raise
    except (pa.ArrowException, OSError, EOFError, ValueError, LookupError, struct.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HoldfastError(f"{file} cannot be read ({reason[:300]}): download it again") from error


def _from_parquet(file: Path, images: Sequence[str], labels: Sequence[str], room: Room) -> Columns:
    import pyarrow as pa
    from pyarrow import parquet

    with parquet.ParquetFile(file, thrift_container_size_limit=_METADATA) as content:
        schema, metadata = content.schema_arrow, content.metadata
        image, label = _choose(file, schema, images), _choose(file, schema, labels)
        wanted = [_path_of_bytes(file, schema.field(image)), label]
        _require_whole_numbers(file, schema.field(label))
        places = {metadata.schema.column(place).path: place for place in range(metadata.num_columns)}
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        chunks = [group.column(places[path]) for group in groups for path in wanted]
        if metadata.num_rows < 0 or any(chunk.total_uncompressed_size < 0 for chunk in chunks):
            raise EOFError("it declares negative sizes")
        declared = sum(chunk.total_uncompressed_size for chunk in chunks) + 16 * metadata.num_rows
        room.take(declared, str(file))
        with open_regular(file) as raw:
            for chunk in chunks:
                require_honest_pages(raw, chunk)
        batches, count, taken = [], 0, declared
        for batch in content.iter_batches(batch_size=_BATCH, columns=wanted, use_threads=False):
            batches.append(batch)
            count += batch.nbytes
            if count > _REPEATED * declared + _SLACK:
                raise HoldfastError(
                    f"{file} declares {readable_size(declared)} and gives more than {readable_size(count)}: it repeats"
                    " a few images over and over; take another"
                )
            if count > taken:
                room.take(count - taken, str(file))
                taken = count
        names = [image, label]
        table = pa.Table.from_batches(batches) if batches else schema.empty_table().select(names)
        return Columns(table.replace_schema_metadata(schema.metadata), image, label, tuple(schema.names))


def _from_stream(file: Path, images: Sequence[str], labels: Sequence[str], room: Room) -> Columns:
    import pyarrow as pa
    from pyarrow import ipc

    with pa.memory_map(str(file)) as source:
        for message in ipc.MessageReader.open_stream(source):
            _require_plain_message(message)
    room.take(require_regular(file), str(file))
    with pa.memory_map(str(file)) as source:
        schema = ipc.open_stream(source).schema
        image, label = _choose(file, schema, images), _choose(file, schema, labels)
        _path_of_bytes(file, schema.field(image))
        _require_whole_numbers(file, schema.field(label))
        source.seek(0)
        fields = [schema.get_field_index(name) for name in (image, label)]
        table = ipc.open_stream(source, options=ipc.IpcReadOptions(included_fields=fields)).read_all()
        table.validate(full=True)  # without it, offsets beyond the file would be followed
    return Columns(table, image, label, tuple(schema.names))


def _choose(file: Path, schema: Any, names: Sequence[str]) -> str:
    for name in names:
        if name in schema.names:
            return name
    there = ", ".join(schema.names[:10]) or "none"
    raise HoldfastError(f"{file} has no column {' or '.join(names)} (its columns: {there}): rename the column")


def _path_of_bytes(file: Path, field: Any) -> str:
    """Return where encoded images lie in a column."""
    import pyarrow.types as types

    kind = field.type
    if types.is_struct(kind) and (place := kind.get_field_index("bytes")) >= 0:
        path, kind = f"{field.name}.bytes", kind.field(place).type
    else:
        path = field.name
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise HoldfastError(
            f"{file}: column {field.name} is {str(field.type)[:80]}, encoded image bytes are expected: save those"
        )
    return path


def _require_whole_numbers(file: Path, field: Any) -> None:
    import pyarrow.types as types

    if not types.is_integer(field.type):
        raise HoldfastError(
            f"{file}: column {field.name} is {str(field.type)[:80]}: store class numbers as integers from 0"
        )


def _require_plain_message(message: Any) -> None:
    """Refuse packed parts of an Arrow stream: how much comes out of them is known only when it has come out.

    A message's header is a FlatBuffers table, which Arrow has checked: it begins with the distance to its list of
    fields, where each is found by its number.
    """
    if message.type not in ("schema", "record batch"):
        raise EOFError(f"it holds a {message.type}: save it without")
    raw = memoryview(message.metadata)

    def field(table: int, number: int) -> int:
        fields = table - struct.unpack_from("<i", raw, table)[0]
        length = struct.unpack_from("<H", raw, fields)[0]
        place = 4 + 2 * number
        offset = struct.unpack_from("<H", raw, fields + place)[0] if place < length else 0
        return table + offset if offset else 0

    root = struct.unpack_from("<I", raw, 0)[0]
    kind, header = field(root, 1), field(root, 2)
    if kind == 0 or header == 0:
        raise EOFError("a part of it has no header")
    if raw[kind] == _RECORDS:
        records = header + struct.unpack_from("<I", raw, header)[0]
        if field(records, _PACKING):
            raise EOFError("its parts are packed: save it without compression")
