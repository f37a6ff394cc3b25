"""Opening files that somebody else may have made: regular files only, and never more of one than is expected.

A path may lead to a pipe, on which reading waits forever, or to a device that never ends. Every reader of this package
opens its files here, or asks `require_regular` before it hands a path to a library.
"""

from __future__ import annotations

import errno
import math
import os
import stat
from pathlib import Path
from typing import IO

from holdfast.errors import HoldfastError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def require_regular(path: Path) -> int:
    """Return the size in bytes of a regular file; links are followed.

    Args:
        path: The file.
    Raises:
        HoldfastError: The path leads to a folder, a pipe, a socket or a device, or it is a broken or circular link,
            or the file may not be read.
        FileNotFoundError: There is nothing of this name.
    Example:
        >>> require_regular(Path("/"))
        Traceback (most recent call last):
            ...
        holdfast.errors.HoldfastError: / is a folder, not a file: put a regular file there
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise _refusal(path, error) from None
    _refuse_other_kinds(path, found.st_mode)
    return found.st_size


def is_regular(path: Path) -> bool:
    """Whether there is a regular file; a path that cannot be looked at is none."""
    try:
        require_regular(path)
    except (HoldfastError, FileNotFoundError):
        return False
    return True


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file for reading bytes; never waits.

    Raises:
        HoldfastError: As `require_regular`.
        FileNotFoundError: There is nothing of this name.
    """
    require_regular(path)  # opening a device can already have an effect
    try:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise _refusal(path, error) from None
    try:
        _refuse_other_kinds(path, os.fstat(number).st_mode)  # it may have been replaced since
    except HoldfastError:
        os.close(number)
        raise
    return os.fdopen(number, "rb")


def read_regular(path: Path, *, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes.

    Raises:
        HoldfastError: As `require_regular`, or the file is longer.
        FileNotFoundError: There is nothing of this name.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(min(size, most) + 1) if size > 0 else b""
    if len(content) > most:
        raise HoldfastError(
            f"{path} has {readable_size(max(size, len(content)))}, more than the {readable_size(most)} that such a file"
            " can need: it is not what its name says, replace it"
        )
    return content


def readable_size(count: int) -> str:
    """Return a number of bytes as a person reads it.

    Example:
        >>> readable_size(4 << 20), readable_size(999), readable_size(5 * 10**18)
        ('4 MiB', '999 bytes', '4.34 EiB')
    """
    if count < 1024:
        return f"{count} bytes"
    if count >= 1 << 70:
        return f"about 10^{int(math.log10(count))} bytes"
    power = min(6, int(math.log(count, 1000)))
    return f"{count / 1024**power:.3g} {'KMGTPE'[power - 1]}iB"


def _refuse_other_kinds(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise HoldfastError(f"{path} is {kind}, not a file: put a regular file there")


def _refusal(path: Path, error: OSError | ValueError) -> Exception:
    """Return what to raise where the system refuses a path; a file that is simply missing is the caller's to tell."""
    if isinstance(error, ValueError):
        return HoldfastError(f"{str(path)!r} is no path ({error}): give the name of a file")
    if error.errno == errno.ENOENT and path.is_symlink():
        return HoldfastError(f"{path} is a link to something that is missing: mend or remove it")
    if error.errno == errno.ELOOP:
        return HoldfastError(f"{path} is a link that leads back to itself: mend or remove it")
    if error.errno == errno.ENOENT:
        return error
    return HoldfastError(f"{path} cannot be read ({error.strerror}): give a file that you may read")
