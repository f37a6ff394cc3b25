"""Standard output and error that may be gone: a closed pipe, a closed terminal, a full disk."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

_GONE = (OSError, ValueError, AttributeError)  # closed; the last where Python was started without it and it is None


def silence(stream: TextIO | None) -> None:
    """Send everything that is still to be written to a stream nowhere.

    Python writes what is left in its buffers when it ends, and would report the same error a second time.
    """
    with suppress(*_GONE):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]  # None has no fileno: suppressed
        finally:
            os.close(nowhere)


def replace_missing() -> None:
    """Give Python the streams that it was started without (`2>&-`); what is written to them goes nowhere.

    Else the next file that is opened would get their number, and whatever a library prints would be written into it.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for as long as the process lives


def tell(text: str) -> None:
    """Print a line on standard error, if there is one to print it on."""
    try:
        sys.stderr.write(f"{text}\n")  # in one go: other processes may write too
        sys.stderr.flush()
    except _GONE:
        silence(sys.stderr)


class Lasting(io.TextIOBase):
    """A stream that writes to another one until that fails; then nothing more is written and nothing is raised.

    A run must not end because the terminal that it was started from was closed.

    Args:
        stream: Such as `sys.stderr`; None writes nowhere.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            if self.stream is not None:
                self.stream.write(text)
        except _GONE:
            silence(self.stream)
        return len(text)

    def flush(self) -> None:
        try:
            if self.stream is not None:
                self.stream.flush()
        except _GONE:
            silence(self.stream)

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        if self.stream is None:
            raise io.UnsupportedOperation("fileno")
        return self.stream.fileno()

    @property
    def encoding(self) -> Any:  # rich asks for it to choose its characters
        return getattr(self.stream, "encoding", None) or "utf-8"
