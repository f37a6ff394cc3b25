"""Signals: the first asks, the second ends, and nothing of a program that is interrupted is left changed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast import interruption as module
from holdfast.interruption import SIGNALS, Interrupted, Interruption, Stopped

TOLD = "stopping after this step; once more ends at once\n"


@pytest.fixture(autouse=True)
def _every_signal_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals that follow each other closely are told apart, and no other test's torchrun is about."""
    monkeypatch.setattr(module, "COPIES", 0.0)
    monkeypatch.setattr(module, "GRACE", 60.0)  # a thread must not end the tests
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """The signals that reach whoever listens outside."""
    numbers: list[int] = []
    before = {number: signal.signal(number, lambda got, frame: numbers.append(got)) for number in SIGNALS}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_first_asks_and_a_second_of_any_kind_ends(first: int, second: int) -> None:
    """The number is that of the first where it is honoured, and of the second where that ends the work."""
    with pytest.raises(Stopped) as stopped, Interruption() as interruption, interruption.finishing("this step"):  # noqa: PT012
        signal.raise_signal(first)
        assert interruption.asked
        assert interruption.number == first
        signal.raise_signal(second)
    assert stopped.value.number == second
    assert isinstance(stopped.value, KeyboardInterrupt)


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_what_is_finished_the_first_ends(number: int) -> None:
    """Such as while data is read."""
    with pytest.raises(Stopped) as stopped, Interruption() as interruption:  # noqa: PT012
        with interruption.finishing("this step"):
            pass
        signal.raise_signal(number)
    assert stopped.value.number == number
    assert not interruption.asked


def test_copies_of_one_signal_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `timeout`, and of a launcher that passes on what every process already has."""
    monkeypatch.setattr(module, "COPIES", 0.2)
    with pytest.raises(Stopped), Interruption() as interruption, interruption.finishing("this step"):  # noqa: PT012
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert interruption.asked
        time.sleep(0.21)
        signal.raise_signal(signal.SIGTERM)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(module, "LAUNCHED_COPIES", 60.0)
    with Interruption() as interruption, interruption.finishing("this step"):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.21)
        signal.raise_signal(signal.SIGINT)
        interruption.asked = False  # honoured


def test_it_is_said_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    """On standard error, while the work still goes on; nothing where the signal already ends it."""
    with Interruption() as interruption, interruption.finishing("this step"):
        signal.raise_signal(signal.SIGINT)
        limit = time.monotonic() + 30
        told = ""
        while not told and time.monotonic() < limit:
            told += capfd.readouterr().err
        assert told == TOLD
        interruption.asked = False
    with pytest.raises(Stopped), Interruption():
        signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_one_of_several_processes_speaks(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The first."""
    for rank, told in (("1", ""), ("0", TOLD)):
        monkeypatch.setenv("RANK", rank)
        with Interruption() as interruption, interruption.finishing("this step"):
            signal.raise_signal(signal.SIGINT)
            interruption.asked = False
        assert capfd.readouterr().err == told


@pytest.mark.parametrize("how", ["closed pipe", "closed file", "none"])
def test_a_terminal_that_is_gone(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After SIGHUP nobody can be told, and that is no error."""
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    if how == "closed file":
        stream.close()
    monkeypatch.setattr(sys, "__stderr__", None if how == "none" else stream)
    with Interruption() as interruption, interruption.finishing("this step"):
        signal.raise_signal(signal.SIGHUP)
        assert interruption.asked
        interruption.asked = False
    stream.close()


def test_ignored_signals_stay_ignored() -> None:
    """`nohup` ignores SIGHUP, and a shell the Ctrl-C of what it runs in the background."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        with Interruption() as interruption, interruption.finishing("this step"):
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGINT)
            assert not interruption.asked
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_everything_is_put_back() -> None:
    """Handlers, the wake-up file and threads, also where one is inside another and where work fails."""

    def state() -> Any:
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        return [signal.getsignal(number) for number in SIGNALS], wakeup, threading.active_count()

    before = state()
    with Interruption():
        between = state()
        with pytest.raises(ZeroDivisionError), Interruption():
            assert 1 / (state() == between)
        assert state() == between
    assert state() == before


def test_other_threads_change_nothing() -> None:
    """Signals can only be caught in the main one."""
    seen: list[Any] = []

    def work() -> None:
        with Interruption() as interruption, interruption.finishing("this step"):
            seen.append([signal.getsignal(number) for number in SIGNALS])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [[signal.getsignal(number) for number in SIGNALS]]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_came_too_late_is_handed_on(number: int, heard: list[int]) -> None:
    """The work was done before it looked: what was around it hears of it. One that was honoured is not repeated."""
    with Interruption() as interruption, interruption.finishing("this step"):
        signal.raise_signal(number)
    assert heard == [number]
    with pytest.raises(Interrupted), Interruption() as interruption, interruption.finishing("this step"):  # noqa: PT012
        signal.raise_signal(number)
        raise Interrupted(Path("run"), interruption.number)
    assert heard == [number]


def test_a_signal_while_handlers_are_set_or_put_back(monkeypatch: pytest.MonkeyPatch, heard: list[int]) -> None:
    """Neither is cut short: before the work it ends it, after it what is around hears of it."""
    getsignal, put_back = signal.getsignal, Interruption._put_back
    before = [getsignal(number) for number in SIGNALS]

    def asked(number: int) -> Any:
        if number == signal.SIGTERM:
            signal.raise_signal(signal.SIGINT)  # for which the handler is set by now
        return getsignal(number)

    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", asked)
        with pytest.raises(Stopped) as stopped, Interruption():
            pytest.fail("the work was begun")
    assert stopped.value.number == signal.SIGINT
    assert [getsignal(number) for number in SIGNALS] == before

    def late(self: Interruption, wakeup: int) -> None:
        signal.raise_signal(signal.SIGHUP)
        put_back(self, wakeup)

    monkeypatch.setattr(Interruption, "_put_back", late)
    with Interruption():
        pass
    assert heard == [signal.SIGHUP]
    assert [getsignal(number) for number in SIGNALS] == before


def test_the_message_names_the_command() -> None:
    """Also after a second signal, with the path as a shell takes it."""
    assert str(Interrupted(Path("a run"))) == "stopped; go on with: holdfast train --resume --out 'a run'"
    at_once = str(Interrupted(Path("run"), signal.SIGTERM, at_once=True))
    assert at_once == "stopped at once; go on from the last checkpoint with: holdfast train --resume --out run"


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own, which knows nothing of torch."""
    begin = (
        "import ctypes, os, signal, sys, time\nfrom holdfast import interruption\n"
        "from holdfast.interruption import Interruption\ninterruption.COPIES, interruption.GRACE = 0.0, 0.1\n"
    )
    words = [sys.executable, "-W", "ignore", "-c", begin + code]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


BLOCKED = """
libc = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(128)
libc.pthread_mutex_lock(mutex)
for number in {numbers}:
    if os.fork() == 0:
        time.sleep(0.2 * (1 + {numbers}.index(number)))
        os.kill(os.getppid(), number)
        os._exit(0)
with Interruption() as interruption, interruption.finishing("this step"):
    libc.pthread_mutex_lock(mutex)  # never returns, and no handler can run
"""


@pytest.mark.skipif(sys.platform != "linux", reason="uses the C library's mutex")
def test_a_call_that_does_not_return_is_ended_by_the_second_signal() -> None:
    """A collective that waits for a process that has gone, for example. The first is answered all the same."""
    done = python(BLOCKED.format(numbers=[int(signal.SIGINT), int(signal.SIGTERM)]))
    assert done.stderr == TOLD
    assert done.returncode == 128 + signal.SIGTERM


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_ends_as_before() -> None:
    """A data loader's worker that is told to end must, and its signals are no signals of its parent."""
    done = python(
        "with Interruption() as interruption, interruption.finishing('this step'):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        time.sleep(30)\n"
        "        os._exit(1)\n"
        "    time.sleep(0.1)\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), interruption.asked)\n"
    )
    assert (done.stdout, done.stderr) == (f"{-signal.SIGTERM} False\n", "")
