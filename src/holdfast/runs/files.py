"""Writing files so that a kill, a crash or a full disk never leaves half of one in place of a whole one."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from holdfast.errors import Damaged, HoldfastError
from holdfast.parsing import JSON_BYTES, parse_json
from holdfast.regular_files import read_regular
from holdfast.runs import digests


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


def write_whole(path: Path, write: Callable[[Any], object], *, hashed: bool = False) -> None:
    """Write a file beside its place, force it to the disk, then rename it into place.

    Args:
        path: Where.
        write: Gets something that is written to like a file.
        hashed: Keep the file's SHA-256 beside it; see `holdfast.runs.digests`.

    Raises:
        HoldfastError: the disk is full or the folder may not be written. What was there before is untouched.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with full_disk_told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)  # it may be a link to another file, or a pipe
            with part.open("xb") as file:
                hashing = digests.Hashing(file)
                write(hashing)
                file.flush()
                os.fsync(file.fileno())
        with _recorded(path, hashing.hexdigest()) if hashed else nullcontext(), full_disk_told(path):
            part.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the rename itself
            finally:
                os.close(folder)
    finally:
        with suppress(OSError):  # what stopped the write may stop this too, and is the error to be told
            part.unlink()


def remove_halves(*folders: Path) -> None:
    """Remove what killed writers have left of files that they did not finish. Only for who holds the folder's lock."""
    for folder in folders:
        for half in folder.glob(".*.part"):
            with suppress(OSError):
                half.unlink()


@contextmanager
def _recorded(path: Path, digest: str) -> Iterator[None]:
    """Keep the record of a file's digest right at every moment of the file's replacement within this block."""
    earlier: tuple[str, ...] = ()
    if path.exists():
        known = digests.recorded(path)
        earlier = (digests.of_file(path),) if known is None else known
    either = tuple(dict.fromkeys((*earlier, digest)))
    _record(path, either)
    yield
    if either != (digest,):
        _record(path, (digest,))


def _record(path: Path, known: tuple[str, ...]) -> None:
    if digests.recorded(path) != known:
        write_text(digests.beside(path), "".join(f"{digest}  {path.name}\n" for digest in known))


def remove_hashed(path: Path) -> None:
    """Remove a file, then the record of its digest."""
    path.unlink(missing_ok=True)
    digests.beside(path).unlink(missing_ok=True)


def write_text(path: Path, text: str, *, hashed: bool = False) -> None:
    """Write a text file whole; `hashed` as in `write_whole`."""
    write_whole(path, lambda file: file.write(text.encode()), hashed=hashed)


def write_json(path: Path, value: Mapping[str, Any], *, sealed: bool = True) -> None:
    """Write a JSON object whole. Unless it is a format of others (`sealed` false), its own digest is its last key."""
    write_text(path, json.dumps(digests.sealed(value) if sealed else value, indent=2) + "\n")


def read_json(path: Path, *, advice: str = "restore it, or make it anew") -> dict[str, Any]:
    """Read a JSON object. Its digest, if it holds one, is checked and taken out.

    Args:
        path: The file.
        advice: How to go on without it.

    Raises:
        HoldfastError: the file is missing or damaged (`Damaged`).
    """
    try:
        value = parse_json(read_regular(path, most=JSON_BYTES), str(path), advice=advice)
    except FileNotFoundError:
        raise HoldfastError(f"{path} is missing: is {path.parent} a folder that holdfast wrote?") from None
    if not isinstance(value, dict):
        raise Damaged(f"{path} is damaged: it holds no JSON object", advice)
    plain, right = digests.opened(value)
    if not right:
        raise Damaged(f"{path} was changed or damaged after it was written", advice)
    return plain
