"""SHA-256 of files, kept beside them or inside them.

A digest shows that a file was damaged or changed by accident: by a disk, a copy that was cut short, an editor. It does
not protect from a person, who can write a new digest as well as a new file.

Three forms are used:

* Beside a file: ``model.safetensors.sha256``, a line as `sha256sum --check` reads it. While a file is replaced, its
  digest file holds two lines, the old digest and the new one, so that a kill at any moment leaves no file refused.
* In a JSON object: its last key ``sha256`` is the digest of everything else in it, however it is laid out.
* In a configuration: the last line, ``# sha256: …``, is the digest of the text above it.

A missing digest is accepted, because older versions wrote none; a wrong one is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from holdfast import distributed
from holdfast.errors import Damaged, HoldfastError
from holdfast.parsing import through_json
from holdfast.regular_files import open_regular, read_regular

KEY = "sha256"
HEAD = "# A run's configuration. Its last line is the SHA-256 of the text above it; `--config` does not check it."
_RECORD_BYTES = 1 << 16
_TAIL = re.compile(rb"^# sha256: ([0-9a-f]{64})\n?\Z", re.MULTILINE)
_LINE = re.compile(rb"^([0-9a-f]{64})(?= [ *])", re.MULTILINE)


class Hashing:
    """A file that is open for writing, and the SHA-256 of what was written to it so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write bytes."""
        self._digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Hand what was written to the system."""
        self.file.flush()

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far."""
        return self._digest.hexdigest()


def of_file(path: Path) -> str:
    """Return the SHA-256 of a file without holding it in memory."""
    found = hashlib.sha256()
    with open_regular(path) as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


# ------------------------------------------------------------------------------------------------ beside a file


def beside(path: Path) -> Path:
    """Return the path of the file that holds a file's digest."""
    return path.with_name(f"{path.name}.sha256")


def recorded(path: Path) -> tuple[str, ...] | None:
    """Return the digests that are recorded beside a file: none if that record is damaged, None if there is none."""
    try:
        return tuple(digest.decode() for digest in _LINE.findall(read_regular(beside(path), most=_RECORD_BYTES)))
    except FileNotFoundError:
        return None
    except HoldfastError:
        return ()


def matches(path: Path, digest: str) -> bool | None:
    """Return whether a digest is among those recorded beside a file; None if none is recorded."""
    known = recorded(path)
    return None if known is None else digest in known


def require(path: Path, digest: str, *, advice: str, unchecked: Callable[[Path], None] | None = None) -> None:
    """Refuse a file whose digest is not the recorded one.

    Args:
        path: The file.
        digest: The SHA-256 of what it holds now.
        advice: How to go on without it.
        unchecked: Called with the path where no digest is recorded; None writes a line to standard error.

    Raises:
        Damaged: it is not as it was written.
    """
    right = matches(path, digest)
    if right is None:
        (unchecked or tell_unchecked)(path)
    elif not right:
        raise Damaged(
            f"{path} was changed or damaged after it was written (its SHA-256 is not the one in {beside(path).name})",
            f"{advice}; to use it as it is, delete {beside(path).name}",
        )


def checked_bytes(
    path: Path, *, advice: str, unchecked: Callable[[Path], None] | None = None, most: int = sys.maxsize - 1
) -> bytes:
    """Read a file of at most `most` bytes and refuse it if its digest is not the recorded one; see `require`.

    Raises:
        Damaged: it is not as it was written.
        HoldfastError: it cannot be read, or is longer.
        FileNotFoundError: there is nothing of this name.
    """
    data = read_regular(path, most=most)
    require(path, hashlib.sha256(data).hexdigest(), advice=advice, unchecked=unchecked)
    return data


def tell_unchecked(path: Path) -> None:
    """Say on standard error, once for all processes, that nothing is known about a file's digest."""
    if distributed.rank() == 0:
        logging.getLogger("holdfast").warning(
            "%s is used unchecked: %s is missing (older versions wrote none)", path, beside(path).name
        )


# ----------------------------------------------------------------------------------- in JSON and in a configuration


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its own digest as the last key.

    Example:
        >>> opened(sealed({"epsilon": 0.1}))
        ({'epsilon': 0.1}, True)
    """
    plain = through_json(value)
    if KEY in plain:
        raise ValueError(f"{KEY!r} is the key of the object's own digest")
    return {**plain, KEY: _of_value(plain)}


def opened(value: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return an object without its digest, and False if the digest was wrong.

    Example:
        >>> opened({"epsilon": 0.1}), opened({**sealed({"epsilon": 0.1}), "epsilon": 0.2})
        (({'epsilon': 0.1}, True), ({'epsilon': 0.2}, False))
    """
    plain = {key: item for key, item in value.items() if key != KEY}
    return plain, KEY not in value or value[KEY] == _of_value(plain)


def _of_value(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def signed(text: str) -> str:
    """Return a configuration's text between a first line that promises a digest and a last line that is one."""
    text = f"{HEAD}\n{text}"
    return f"{text}# {KEY}: {hashlib.sha256(text.encode()).hexdigest()}\n"


def unchanged(text: bytes) -> bool:
    """Return whether a configuration is as `signed` left it; so is one that promises no digest and has none.

    Example:
        >>> text = signed("epochs: 10\\n").encode()
        >>> unchanged(text), unchanged(text.replace(b"10", b"11")), unchanged(text[:-9]), unchanged(b"epochs: 10\\n")
        (True, False, False, True)
    """
    last = _TAIL.search(text)
    if last is None:
        return HEAD.encode() not in text and f"# {KEY}: ".encode() not in text
    return hashlib.sha256(text[: last.start()]).hexdigest() == last[1].decode()
