"""Standard output and error that may be gone: a closed pipe, a closed terminal, a full disk."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO


def silence(stream: TextIO | None) -> None:
    """Send everything that is still to be written to a stream nowhere.

    Python writes what is left in its buffers when it ends, and would report the same error a second time.
    """
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]  # None has no fileno: suppressed
        finally:
            os.close(nowhere)


def tell(text: str) -> None:
    """Print a line on standard error, if there is one to print it on."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        silence(sys.stderr)


class Lasting(io.TextIOBase):
    """Standard error as it is at each write; when it fails, nothing more is written and nothing is raised.

    A run must not end because the terminal that it was started from was closed.
    """

    def write(self, text: str) -> int:
        try:
            sys.stderr.write(text)
        except (OSError, ValueError):
            silence(sys.stderr)
        return len(text)

    def flush(self) -> None:
        try:
            sys.stderr.flush()
        except (OSError, ValueError):
            silence(sys.stderr)

    def isatty(self) -> bool:
        return sys.stderr.isatty()

    def fileno(self) -> int:
        return sys.stderr.fileno()

    @property
    def encoding(self) -> Any:  # rich asks for it to choose its characters
        return sys.stderr.encoding
