"""Standard output and error that are gone, closed or full: what that may end, and what not."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast import fit
from holdfast.progress_display import LiveDisplay
from holdfast.streams import Lasting, replace_missing, silence, tell
from tiny_runs import FP32, assert_same_run, command, tiny_net, tiny_recipe, toy


@pytest.fixture
def broken() -> Iterator[Any]:
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as stream:
        yield stream
        silence(stream)


def test_silence_ends_what_was_left_to_write(broken: Any) -> None:
    """Python would report it once more when it ends."""
    with pytest.raises(BrokenPipeError):
        print("words", file=broken, flush=True)
    with pytest.raises(BrokenPipeError):
        broken.flush()
    silence(broken)
    broken.flush()
    print("more words", file=broken, flush=True)
    silence(None)


def test_a_lasting_stream_outlives_its_own(broken: Any) -> None:
    """It writes while it can; a closed one and none at all are no errors either."""
    for stream in (broken, None):
        lasting = Lasting(stream)
        assert lasting.write("words\n") == 6
        lasting.flush()
        assert lasting.isatty() is False
        assert lasting.encoding.lower() == "utf-8"
    broken.close()
    assert Lasting(broken).write("words\n") == 6


def test_tell_is_no_error_where_nobody_hears(
    broken: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tell("a line")
    assert capsys.readouterr().err == "a line\n"
    for stream in (broken, None):
        monkeypatch.setattr(sys, "stderr", stream)
        tell("a line")


def test_missing_streams_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `2>&-`; those that are there stay."""
    out = sys.stdout
    monkeypatch.setattr(sys, "stderr", None)
    replace_missing()
    print("words", file=sys.stderr, flush=True)
    assert sys.stdout is out
    sys.stderr.close()


def test_a_run_outlives_its_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The live line is drawn while it is there; then the run goes on, and ends as every other."""
    master, slave = os.openpty()
    os.set_blocking(master, False)
    drawn = b""

    class Watched(LiveDisplay):
        def epoch(self, line: Any, epochs: int) -> None:
            nonlocal drawn
            super().epoch(line, epochs)
            if line["epoch"] == 1:
                with suppress(BlockingIOError):  # nothing more is there
                    while part := os.read(master, 65536):
                        drawn += part
                os.close(master)

    with os.fdopen(slave, "w", buffering=1) as stream, monkeypatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stderr", stream)
        run = fit(tiny_recipe(), toy(), tiny_net(), out=tmp_path / "run", settings=FP32, display=Watched()).path
        silence(stream)
    assert b"epoch 1/2" in drawn
    assert b"\x1b[?25l" in drawn  # the cursor is hidden: the live line was there
    assert_same_run(run, fit(tiny_recipe(), toy(), tiny_net(), out=tmp_path / "other", settings=FP32).path)


@pytest.mark.parametrize("words", [["list", "recipes"], ["--version"], ["--help"]])
def test_output_onto_a_full_disk(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and exit code 2; and Python has nothing left to write when it ends."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert command(*words) == 2
        full.flush()
    told = capsys.readouterr().err
    assert told == "holdfast: no space left to write the output: free some and give the same command again\n"


def test_output_into_a_pipe_that_was_closed(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `holdfast list recipes | head -1`: no error."""
    monkeypatch.setattr(sys, "stdout", broken)
    assert command("list", "recipes") == 0
    broken.flush()


def test_notes_go_through_a_stream_that_may_be_gone() -> None:
    """A bare print to standard error ends the work where nobody reads it, and a broken pipe counts as success."""
    bare = [
        f"{path.name}:{call.lineno}"
        for path in Path(holdfast.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "print"
        and any(word.arg == "file" for word in call.keywords)
    ]
    assert bare == []
