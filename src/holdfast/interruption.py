"""Ctrl-C, SIGTERM and SIGHUP: the first one asks work to stop at its next good moment, a second one ends it at once."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
COPIES = 0.25
"""Seconds in which signals count as one: `timeout`, for example, sends its signal to the child and to its group."""
LAUNCHED_COPIES = 2.0
"""The same under torchrun, which passes on what a batch system has already sent to every process."""
GRACE = 2.0
"""Seconds that a process has to clean up after a signal that ends it at once."""


class Stopped(KeyboardInterrupt):
    """Work ended because a signal asked for it.

    Attributes:
        number: The signal. The command exits with 128 + number: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """

    def __init__(self, message: str = "stopped", number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = int(number)


def resuming(run: Path) -> str:
    """Return the command that goes on with a run.

    Example:
        >>> resuming(Path("my runs/one"))
        "holdfast train --resume --out 'my runs/one'"
    """
    return f"holdfast train --resume --out {shlex.quote(str(run))}"


class Interrupted(Stopped):
    """Training stopped because it was asked to. The run in `path` can go on from its last checkpoint."""

    def __init__(self, path: Path, number: int = signal.SIGINT, *, at_once: bool = False) -> None:
        how = "stopped at once; go on from the last checkpoint" if at_once else "stopped; go on"
        super().__init__(f"{how} with: {resuming(path)}", number)
        self.path = path


class Interruption:
    """While it is entered, signals stop work in an orderly way.

    Inside `finishing`, the first signal sets `asked`, and the work stops when it next looks. Outside, and for every
    further signal, `Stopped` is raised where the program stands. Where that does not end the process within a few
    seconds, because a call in C does not return, a thread ends it.

    Ignored signals stay ignored, as under `nohup`. Outside the main thread, where signals cannot be caught, nothing
    changes. A signal that came too late to be noticed is handed on when this is left.

    Attributes:
        asked: Whether the work should stop.
        number: The signal that asked.
    """

    def __init__(self) -> None:
        self.asked = False
        self.number = int(signal.SIGINT)
        self._what = ""  # what is being finished; nothing: the first signal already ends
        self._finished = ""  # what was being finished when the first signal came
        self._first: float | None = None  # when the first signal came
        self._busy = False  # handlers are being set or put back, and must not be interrupted
        self._late: int | None = None  # a signal that came meanwhile
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup = -1
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None
        self._copies = LAUNCHED_COPIES if "TORCHELASTIC_RUN_ID" in os.environ else COPIES

    @contextmanager
    def finishing(self, what: str) -> Iterator[None]:
        """Let the first signal only ask.

        Args:
            what: What is finished before the work stops, for the message: "this step".
        """
        self._what = what
        try:
            yield
        finally:
            self._what = ""

    def _hear(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal, in the main thread."""
        now = time.monotonic()
        if self._busy:
            if self._first is None or now - self._first >= self._copies:
                self._late = number
        elif self._first is None:
            self._first, self.number = now, int(number)
            if not self._what:
                raise Stopped(number=number)
            self.asked, self._finished = True, self._what
        elif now - self._first >= self._copies:
            raise Stopped(number=number)

    def _watch(self, pipe: int) -> None:
        """Read the signals as they come, also while the main thread is inside a call that does not return.

        The message is written here: a signal handler may not write where it has interrupted a write.
        """
        first: float | None = None
        while number := int.from_bytes(os.read(pipe, 1), "big"):  # an empty read: the other end was closed
            if number not in SIGNALS:  # Python reports every signal that it handles
                continue
            if first is None:
                first = time.monotonic()
                if what := self._what or self._finished:
                    _announce(f"stopping after {what}; once more ends at once")
                    continue
            elif time.monotonic() - first < self._copies:
                continue
            if not self._ended.wait(GRACE):
                _end_process(number)

    def __enter__(self) -> Interruption:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._busy = True
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._watcher = threading.Thread(target=self._watch, args=(self._pipe[0],), name="signals", daemon=True)
        self._watcher.start()
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        _entered.append(self)
        for number in SIGNALS:
            before = signal.getsignal(number)
            if before in (signal.SIG_IGN, None):  # None: not set by Python, so that it could not be put back
                continue
            self._before[number] = before
            signal.signal(number, self._hear)
        self._busy = False
        if self._late is not None:
            self.__exit__(Stopped)
            raise Stopped(number=self._late)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._pipe is None or self._watcher is None:
            return
        self._busy = True
        self._put_back(self._wakeup)
        if self in _entered:  # it is not in a forked process
            _entered.remove(self)
        self._ended.set()
        os.close(self._pipe[1])
        self._watcher.join(timeout=1)
        os.close(self._pipe[0])
        self._pipe = None
        unanswered = self.number if self.asked and kind is None else self._late
        answered = kind is not None and issubclass(kind, Stopped)
        if unanswered is not None and not answered:
            signal.raise_signal(unanswered)

    def _put_back(self, wakeup: int) -> None:
        signal.set_wakeup_fd(wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


_entered: list[Interruption] = []
"""Those that are entered, outermost first."""


def _forget_in_child() -> None:
    """Put back in a forked process what was there before: a data loader's worker ends when it is told to."""
    while _entered:
        _entered.pop()._put_back(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _announce(text: str) -> None:
    """Write a line to the standard error of the first process, over a live line that may be there."""
    if os.environ.get("RANK", "0") != "0" or sys.__stderr__ is None:
        return
    with suppress(OSError, ValueError):  # the terminal may be gone
        place = sys.__stderr__.fileno()
        clear = "\r\x1b[K" if os.isatty(place) else ""
        os.write(place, f"{clear}{text}\n".encode())


def _end_process(number: int) -> None:
    """End the process where it stands, with its cursor visible again."""
    with suppress(OSError, ValueError, AttributeError):
        place = sys.__stderr__.fileno()  # type: ignore[union-attr]  # None has no fileno: suppressed
        if os.isatty(place):
            os.write(place, b"\x1b[?25h\n")
    os._exit(128 + number)
