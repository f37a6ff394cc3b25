"""Read the pickles that CIFAR is published in without running anything that a pickle can name.

A pickle is a program: it may name any function and call it. This reader admits the five names by which NumPy writes
an array of bytes, and answers each with a stand-in of its own that does nothing but keep a shape and bytes. Every
other name is refused before it is looked up, so nothing is imported and nothing of NumPy's is called.

A pickle can also ask for any amount of memory in a few bytes. So the reader is the one that is written in Python, whose
memo grows only with what is put into it (one instruction of six bytes makes the faster one fill 32 GB); it has a limit
of instructions; and what it copies is counted.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from holdfast.errors import HoldfastError

_MOST_INSTRUCTIONS = 1_000_000  # CIFAR-100's training file has 250,000


def load_inert(raw: bytes, where: str) -> object:
    """Unpickle plain values and arrays of unsigned bytes; Python 2's strings come back as bytes.

    Args:
        raw: The whole pickle.
        where: What the pickle is called in messages.
    Raises:
        HoldfastError: The pickle names anything else, or is damaged.
    Example:
        >>> import pickle
        >>> load_inert(pickle.dumps({"labels": [3, 1]}, protocol=2), "batch")
        {'labels': [3, 1]}
    """
    reader = _InertUnpickler(raw)
    try:
        return _with_arrays(reader.load())
    except HoldfastError as error:
        raise HoldfastError(f"{where}: {error}") from error
    # A damaged pickle can fail in any of the machine's operations, each with its own built-in error.
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        OverflowError,
        MemoryError,
        AssertionError,
        struct.error,
        RecursionError,
    ) as error:
        raise HoldfastError(
            f"{where} is not a readable pickle ({str(error)[:200] or type(error).__name__}): download it again"
        ) from error


class _ByteType:
    """Stands for numpy.dtype; unsigned bytes are the only type admitted."""

    def __init__(self, code: object = None, *_: object) -> None:
        if code not in ("u1", b"u1", "uint8", b"uint8"):
            kind = repr(code[:20]) if isinstance(code, str | bytes) else "unknown"
            raise HoldfastError(f"array of type {kind}, only unsigned bytes are read: use the published files")

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and flags: a byte has none."""


class _ByteArray:
    """Stands for numpy.ndarray while the pickle is read; keeps what the array is made of."""

    array: np.ndarray | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise HoldfastError("array state of an unknown form: use the published files")
        _, shape, dtype, is_fortran, raw = state
        if not isinstance(dtype, _ByteType) or not isinstance(raw, bytes) or not isinstance(shape, tuple):
            raise HoldfastError("array state of an unknown form: use the published files")
        self.array = np.frombuffer(raw, dtype=np.uint8).reshape(shape, order="F" if is_fortran else "C")


def _reconstruct(kind: object, *_: object) -> _ByteArray:
    if kind is not _ByteArray:
        raise HoldfastError("array of an unknown kind: use the published files")
    return _ByteArray()


class _Call:
    """Calls one of the functions above. A pickle could set attributes of a bare function; of this it cannot."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise HoldfastError("the pickle tries to change a function, and nothing was run: do not trust this file")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Call(_reconstruct),
    ("numpy._core.multiarray", "_reconstruct"): _Call(_reconstruct),
    ("numpy", "ndarray"): _ByteArray,
    ("numpy", "dtype"): _ByteType,
}


class _Instructions(dict[int, Callable[[Any], None]]):
    """The instructions that image data needs, counted as they are looked up."""

    left = _MOST_INSTRUCTIONS

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise HoldfastError(f"it has more than {_MOST_INSTRUCTIONS} instructions: use the published files")
        if code not in self:
            raise pickle.UnpicklingError(f"instruction {bytes([code])!r}, which image data does not need")
        return super().__getitem__(code)


class _InertUnpickler(pickle._Unpickler):
    """The reader, for one pickle."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw), encoding="bytes")
        self.dispatch = _Instructions(_NEEDED)  # type: ignore[misc]  # each pickle is counted for itself
        self._may_copy = 2 * len(raw)

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("_codecs", "encode"):
            return _Call(self._encode)
        stand_in = _STAND_INS.get((module_name, global_name))
        if stand_in is None:
            raise HoldfastError(
                f"the pickle asks for {module_name[:60]}.{global_name[:60]}, which image data does not need, and"
                " nothing was run: do not trust this file, take it from its publisher"
            )
        return stand_in

    def _encode(self, text: object, encoding: object = None) -> bytes:
        """As Python 3 writes bytes for Python 2."""
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise HoldfastError("bytes encoded in an unknown way: use the published files")
        self._may_copy -= len(text)
        if self._may_copy < 0:
            raise HoldfastError("the same bytes over and over again: use the published files")
        return text.encode("latin1")


def _with_plain_keys(load: Callable[[Any], None], first: int) -> Callable[[Any], None]:
    """Refuse keys that are no text: those that lie deep in each other would end the interpreter when compared."""

    def load_checked(reader: Any) -> None:
        keys = reader.stack[first::2]
        if not all(isinstance(key, str | bytes) for key in keys):
            raise HoldfastError("a dictionary whose keys are no text: use the published files")
        load(reader)

    return load_checked


_UNNEEDED = (
    pickle.PERSID, pickle.BINPERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.LONG4,
    pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET,
)  # fmt: skip
_NEEDED = {code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in _UNNEEDED}
for _code, _first in ((pickle.SETITEM, -2), (pickle.SETITEMS, 0), (pickle.DICT, 0)):
    _NEEDED[_code[0]] = _with_plain_keys(_NEEDED[_code[0]], _first)


def _with_arrays(value: object) -> object:
    """Replace array stand-ins, at the top and one level down, where CIFAR has them."""
    if isinstance(value, dict):
        return {key: _with_arrays(item) if isinstance(item, _ByteArray) else item for key, item in value.items()}
    if isinstance(value, _ByteArray):
        if value.array is None:
            raise HoldfastError("array without content: download the file again")
        return value.array
    return value
