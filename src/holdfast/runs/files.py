"""Writing files so that a kill, a crash or a full disk never leaves half of one in place of a whole one."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from holdfast.errors import HoldfastError


@contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Turn 'no space', 'too large', 'not permitted' and other errors of a disk into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise HoldfastError(
                f"no space left to write {path.name}: free some in {path.parent} and go on with --resume (evaluate:"
                " with the same command); what was whole before is kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise HoldfastError(f"{path} cannot be written ({error.strerror}): choose another --out") from error
        raise HoldfastError(
            f"{path} cannot be written ({error.strerror or error}): look after the disk, or choose another --out"
        ) from error


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its place, force it to the disk, then rename it into place.

    Raises:
        HoldfastError: the disk is full or the folder may not be written. What was there before is untouched.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        with full_disk_told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the rename itself
            finally:
                os.close(folder)
    finally:
        with suppress(OSError):  # what stopped the write may stop this too, and is the error to be told
            beside.unlink()


def remove_halves(*folders: Path) -> None:
    """Remove what killed writers have left of files that they did not finish. Only for who holds the folder's lock."""
    for folder in folders:
        for half in folder.glob(".*.part"):
            with suppress(OSError):
                half.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        HoldfastError: the file is missing or damaged.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise HoldfastError(f"{path} is missing: is {path.parent} a folder that holdfast wrote?") from None
    except ValueError:
        raise HoldfastError(f"{path} is damaged: it holds no JSON; restore it, or make it anew") from None
    if not isinstance(value, dict):
        raise HoldfastError(f"{path} is damaged: it holds no JSON object; restore it, or make it anew")
    return value
