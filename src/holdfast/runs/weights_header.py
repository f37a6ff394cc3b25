"""The header of a safetensors file: names and shapes of its tensors, before any is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from holdfast.errors import Damaged
from holdfast.parsing import parse_json
from holdfast.regular_files import open_regular, require_regular

_MOST_HEADER = 8 << 20  # bytes; a network of 1,000 tensors has 0.1 MB
_MOST_DIMENSIONS = 16
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


def weight_shapes(file: Path, *, advice: str = "restore it or train anew") -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a file by their names, after checking that the file holds just these.

    Args:
        file: The file.
        advice: How to go on without it.

    Raises:
        HoldfastError: it is no regular file.
        Damaged: its header is damaged or absurd, or the sizes do not add up.
        FileNotFoundError: it is missing.
    """
    try:
        size = require_regular(file)
        with open_regular(file) as content:
            length = int.from_bytes(content.read(8), "little")
            if size < 8 or length > min(_MOST_HEADER, size - 8):
                raise _Absurd(f"its header of {length} bytes does not fit")
            header = parse_json(content.read(length), f"the header of {file}", advice=advice)
        if not isinstance(header, dict):
            raise _Absurd("its header names no tensors")
        shapes, total = {}, 0
        for name, entry in header.items():
            if name != "__metadata__":
                shapes[name] = _shape(name, entry, size - 8 - length)
                total += math.prod(shapes[name]) * _SIZES[entry["dtype"]]
        if total != size - 8 - length:
            raise _Absurd(f"its tensors take {total} bytes and there are {size - 8 - length}")
        return shapes
    except _Absurd as reason:
        raise Damaged(f"{file} is damaged ({reason})", advice) from None


def _shape(name: str, entry: Any, room: int) -> tuple[int, ...]:
    """Return the shape of one tensor, whose place in the file must have its size."""
    if not isinstance(entry, dict) or entry.get("dtype") not in _SIZES:
        raise _Absurd(f"tensor {name[:60]!r} has no known type")
    shape, place = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(_is_count(one) for one in shape):
        raise _Absurd(f"tensor {name[:60]!r} has no shape")
    if not isinstance(place, list) or len(place) != 2 or not all(_is_count(one) for one in place):
        raise _Absurd(f"tensor {name[:60]!r} has no place")
    if place[1] > room or place[1] - place[0] != math.prod(shape) * _SIZES[entry["dtype"]]:
        raise _Absurd(f"tensor {name[:60]!r} does not have the size of its shape")
    return tuple(shape)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


class _Absurd(ValueError):
    """What is wrong with a header."""
