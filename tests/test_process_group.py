"""How a process leaves its group: waiting for the others, or not, where it ends before them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from holdfast import HoldfastError, distributed, fit
from tiny_runs import FP32, tiny_net, tiny_recipe, toy


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends whose group was left in order. No process is started."""
    groups: list[str] = []
    monkeypatch.setattr(distributed, "start_from_environment", lambda: True)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: groups.append(dist.get_backend()))
    return groups


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_leaving_a_group(backend: str, left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a refusal NCCL's group is left alone: leaving it would wait for processes that wait for this one."""
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    fit(tiny_recipe(epochs=1), toy(), tiny_net(), out=tmp_path / "run", settings=FP32)
    assert left == [backend]
    with pytest.raises(HoldfastError, match="already holds a run"):
        fit(tiny_recipe(epochs=1), toy(), tiny_net(), out=tmp_path / "run", settings=FP32)
    assert left == ([backend] if backend == "nccl" else [backend, backend])
