"""Ctrl-C and SIGTERM as a wish that the loop can honour after the current step."""

from __future__ import annotations

import shlex
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Training stopped because it was asked to, after its state was saved in `path`."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"stopped; go on with: holdfast train --resume --out {shlex.quote(str(path))}")
        self.path = path


class Interruption:
    """While it is entered, the first Ctrl-C or SIGTERM only sets `asked`; a second Ctrl-C stops at once.

    Outside the main thread, where signals cannot be caught, nothing changes.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
