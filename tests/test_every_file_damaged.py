"""A damaged file of a run or an evaluation is noticed, or the outcome is the same: benchmarks/damage.py as a test."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FEW = {
    "finished/metrics.jsonl": ("same", "same", "same"),
    "finished/last/model.safetensors": ("same", "same", "refused"),
    "interrupted/checkpoints/step-0000000014.pt": ("same", "same"),
    "evaluated/examples/000001.safetensors": ("refused", "same", "refused", "same"),
    "partly/units/000000.jsonl": ("same",),
}
"""Files with one byte flipped in the middle, and what becomes of each in the order of the commands."""


@pytest.fixture(scope="module")
def damage() -> ModuleType:
    """benchmarks/damage.py."""
    file = Path(__file__).parents[1] / "benchmarks" / "damage.py"
    spec = importlib.util.spec_from_file_location("damage", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["damage"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_one_flipped_byte(damage: ModuleType, tmp_path: Path) -> None:
    """In a handful of files: as expected, command by command."""
    outcomes = damage.measure(tmp_path, flips=1, wanted=lambda file, how: file in FEW and how.startswith("flipped"))
    found: dict[str, list[str]] = {}
    for each in outcomes:
        found.setdefault(f"{each.subject}/{each.file}", []).append(each.found)
    expected = {file: list(words) for file, words in FEW.items()}
    assert found == expected, [each for each in outcomes if each.found == "WRONG"]


@pytest.mark.slow
def test_every_file_in_every_way(damage: ModuleType, tmp_path: Path) -> None:
    """Halved, emptied, removed, flipped at five places: nothing is silently wrong."""
    outcomes = damage.measure(tmp_path, flips=5, wanted=lambda file, how: True)
    assert len(outcomes) > 1000
    assert [each for each in outcomes if each.found == "WRONG"] == []
