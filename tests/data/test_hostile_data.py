"""Bombs, absurd headers and odd entries given as data: one line that says what to do, little memory, no waiting."""

from __future__ import annotations

import json
import os
import re
import resource
import time
from pathlib import Path

import pytest

from holdfast.data import inert_pickle
from holdfast.data.limits import at_most
from holdfast.data.sources import load
from holdfast.errors import HoldfastError
from hostile_files import HOSTILE_DATA


def refusal(path: Path, gib: float) -> str:
    """How a source is refused."""
    with at_most(gib), pytest.raises(HoldfastError) as told:
        load(str(path))
    return str(told.value)


@pytest.mark.parametrize("name", HOSTILE_DATA)
def test_hostile_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by name, with what to do; under a limit so small that small bombs will do."""
    monkeypatch.setattr(inert_pickle._Instructions, "left", 300_000)
    build, message = HOSTILE_DATA[name]
    told = refusal(build(tmp_path, 20 << 20), 1 / 64)
    assert any(part in told for part in message.split("|")), told
    assert "\n" not in told
    assert len(told) < 1000
    assert re.search(r": \w", told)


def measured(path: Path, gib: float) -> tuple[str, float, float]:
    """How a source is refused in a process of its own, in how many seconds, and at how many MB above its start."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        try:
            told = refusal(path, gib)
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        os.write(writing, json.dumps([told, time.perf_counter() - start, peak]).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        return tuple(json.loads(pipe.read()))


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE_DATA)
def test_memory_and_time(name: str, tmp_path: Path) -> None:
    """A gigabyte and a quarter where one is allowed takes less than half of one, and seconds."""
    build, message = HOSTILE_DATA[name]
    told, seconds, peak = measured(build(tmp_path, 5 << 28), 1.0)
    assert any(part in told for part in message.split("|")), told
    assert peak < 500
    assert seconds < 20
