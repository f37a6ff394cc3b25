"""How much memory a data set may take, decided before it is read: on what its files declare, and on what comes out.

One limit holds for everything that is decoded while one source is read. It is 16 GiB, or three quarters of the
machine's memory if that is less. ``--max-data-gib N``, the environment variable ``HOLDFAST_MAX_DATA_GIB`` and
``load(..., max_gib=N)`` change it. A configuration file cannot, since it may come from the same hand as the data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from holdfast.errors import HoldfastError
from holdfast.regular_files import readable_size

VARIABLE = "HOLDFAST_MAX_DATA_GIB"
DEFAULT_GIB = 16.0

_GIB = 1 << 30
_SHARE_OF_MEMORY = 0.75
_asked: ContextVar[float | None] = ContextVar("limit of a data set in GiB", default=None)


@contextmanager
def at_most(gib: float | None) -> Iterator[None]:
    """Set the limit for what is read inside the block; None leaves it as it is.

    Args:
        gib: The limit.
    Units:
        gib: GiB of decoded data.
    Raises:
        HoldfastError: It is no positive number.
    Example:
        >>> with at_most(2):
        ...     most_bytes()
        2147483648
    """
    token = _asked.set(
        _asked.get() if gib is None else _checked(gib, "the limit of a data set (--max-data-gib, max_gib)")
    )
    try:
        yield
    finally:
        _asked.reset(token)


def most_bytes() -> int:
    """Return the limit in bytes.

    Raises:
        HoldfastError: The environment variable is no positive number.
    """
    asked = _asked.get()
    if asked is None and os.environ.get(VARIABLE):
        asked = _checked(os.environ[VARIABLE], VARIABLE)
    if asked is not None:
        return round(asked * _GIB)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(round(DEFAULT_GIB * _GIB), round(_SHARE_OF_MEMORY * memory))


def most_for_one_image() -> int:
    """Return how many bytes decoding a single image may take: 455 MiB at 16 GiB, enough for 60 million pixels."""
    return most_bytes() // 36


class Room:
    """What is left of the limit while one source is read.

    Example:
        >>> with at_most(1):
        ...     room = Room()
        >>> room.take(1 << 29, "half")
        >>> room.take(1 << 30, "the rest")
        Traceback (most recent call last):
            ...
        holdfast.errors.HoldfastError: the rest would take 1 GiB, 1.5 GiB with the rest of the data, and 1 GiB are \
allowed: if you expect so much, give --max-data-gib 2 (or set HOLDFAST_MAX_DATA_GIB)
    """

    def __init__(self) -> None:
        self.most = most_bytes()
        self.taken = 0

    def take(self, count: int, what: str) -> None:
        """Reserve memory before it is allocated.

        Args:
            count: Bytes.
            what: What is going to be read, for the message.
        Raises:
            HoldfastError: There is not so much left.
        """
        if self.taken + count > self.most:
            whole = self.taken + count
            rest = f", {readable_size(whole)} with the rest of the data" if self.taken else ""
            needed = str(math.ceil(whole / _GIB)) if whole < 1 << 60 else "N"
            raise HoldfastError(
                f"{what} would take {readable_size(count)}{rest}, and {readable_size(self.most)} are allowed: if you"
                f" expect so much, give --max-data-gib {needed} (or set {VARIABLE})"
            )
        self.taken += count


def _checked(value: float | str, name: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number <= 1e6:
        raise HoldfastError(f"{name} is {value!r}: give a positive number of GiB, such as 16")
    return number
