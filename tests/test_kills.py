"""Kills from outside: SIGKILL at random moments and inside file writes, and a terminal that is closed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from holdfast.runs.checkpoint import checkpoints
from tiny_runs import NET, write_toy

pytestmark = pytest.mark.slow  # every kill is a process of its own, and every resumption another
SLOW_NET = NET.replace("return self.body", "__import__('time').sleep(0.01); return self.body")
KILLS = Path(__file__).parent.parent / "benchmarks" / "kills.py"


def test_killed_anywhere_it_ends_the_same(tmp_path: Path) -> None:
    """The benchmark with a few kills: all of them happen, and all folders end as the undisturbed ones."""
    words = ["--random", 2, "--writes", 4, "--evaluation", 1, "--seed", 7, "--out", tmp_path / "kills.json"]
    done = subprocess.run([sys.executable, KILLS, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "kills.json").read_text())["found"]
    assert [counts["kills"] for counts in found.values()] == [2, 4, 1, 1]
    assert all(counts["identical"] == counts["runs"] > 0 for counts in found.values())


ON_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # whoever closes it sends SIGHUP
os.execv(sys.executable, [sys.executable, "-m", "holdfast", *sys.argv[1:]])
"""


def on_a_terminal(words: list[object]) -> tuple[subprocess.Popen[bytes], int]:
    """The command on a terminal of its own, and the terminal's other end."""
    master, slave = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, *map(str, words)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
    )
    os.close(slave)
    os.set_blocking(master, False)
    return process, master


def drained(master: int) -> bytes:
    """What there is to read."""
    try:
        return os.read(master, 65536)
    except OSError:  # nothing there now, or the other end is closed
        return b""


@pytest.mark.parametrize("how", ["closed", "ctrl-c"])
def test_a_terminal(how: str, tmp_path: Path) -> None:
    """Closed, it is SIGHUP, and nothing can be written any more: 129. Ctrl-C is answered over the live line: 130."""
    (tmp_path / "net.py").write_text(
        NET.replace("return self.body", "__import__('time').sleep(0.01); return self.body")
    )
    words: list[object] = ["train", "pgd_at", "--data", write_toy(tmp_path / "toy.npz"), "--threat.epsilon", 0.1]
    words += ["--model", f"{tmp_path / 'net.py'}:make", "--epochs", 200, "--batch-size", 8, "--precision", "fp32"]
    words += ["--training.device", "cpu", "--training.checkpoint_minutes", 0, "--out", tmp_path / "run"]
    process, master = on_a_terminal(words)
    shown, limit = b"", time.monotonic() + 120
    try:
        while not checkpoints(tmp_path / "run") or b"\x1b[?25l" not in shown:  # the cursor is hidden: the live line
            assert process.poll() is None, shown
            assert time.monotonic() < limit
            shown += drained(master)
            time.sleep(0.01)
        if how == "closed":
            os.close(master)
        else:
            os.write(master, b"\x03")
        while process.poll() is None:
            assert time.monotonic() < limit
            shown += drained(master) if how == "ctrl-c" else b""
            time.sleep(0.01)
        if how == "ctrl-c":
            shown += drained(master)
            os.close(master)
            after = shown.partition(b"\r\x1b[Kstopping after this step; once more ends at once\r\n")[2]
            assert b"\x1b[?25h" in after  # the cursor is shown again
            assert b"holdfast: stopped; go on with: holdfast train --resume --out" in after
    finally:
        process.kill()
        process.wait()
    assert process.returncode == (129 if how == "closed" else 130)
    assert not (tmp_path / "run" / "summary.json").exists()
