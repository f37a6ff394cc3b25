"""Bombs, absurd headers and odd entries given as data: one line that says what to do, little memory, no waiting."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from holdfast.data.limits import at_most
from holdfast.data.sources import load
from holdfast.errors import HoldfastError
from hostile_files import HOSTILE_DATA

LIMIT = 1 / 64  # GiB: 16 MiB, so that small bombs will do
BOMB = 20 << 20


@pytest.mark.parametrize("name", HOSTILE_DATA)
def test_hostile_data(name: str, tmp_path: Path) -> None:
    """Refused by name, with what to do."""
    build, message = HOSTILE_DATA[name]
    path = build(tmp_path, BOMB)
    with at_most(LIMIT), pytest.raises(HoldfastError) as refusal:
        load(str(path))
    told = str(refusal.value)
    assert any(part in told for part in message.split("|")), told
    assert "\n" not in told
    assert len(told) < 1000
    assert re.search(r": \w", told)
