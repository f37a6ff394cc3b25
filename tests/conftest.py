"""What all tests share: one thread a process, small networks, small batches."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two test processes share two cores

import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from holdfast.forward import Batch
from holdfast.models import trust
from holdfast.runs.environment import device_name, supports_bf16

natively = pytest.mark.skipif(
    not supports_bf16(torch.device("cpu")), reason=f"bfloat16 is emulated on this processor: {device_name()}"
)
"""A test in bfloat16 that others stand for where it is emulated, which takes ten times as long as float32."""

_STATE = tempfile.TemporaryDirectory(prefix="holdfast-state-")
os.environ["HOLDFAST_STATE_DIR"] = _STATE.name  # tests trust nothing in, and add nothing to, the developer's own store

# `nohup` ignores SIGHUP, and a shell the Ctrl-C of what it runs in the background; tests and their processes would too.
for _number, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _default)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_devices_for_data_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are accelerators, it would move the tests' networks to them."""
    module = sys.modules["torch.nn.parallel.data_parallel"]  # by attributes the name leads to a function
    monkeypatch.setattr(module, "_get_available_device_type", lambda: None)


def small_network(*, norm: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Two convolutions with BatchNorm between them, for 8x8 grey images and five classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.ReLU()]
        layers += [nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 5)).to(dtype)


def small_batch(*, rows: int = 12, dtype: torch.dtype = torch.float32, seed: int = 1) -> Batch:
    """Random images of five classes, with positions far apart in the data set."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 5, (rows,), generator=generator)
    return Batch(x, y, None, torch.arange(rows) * 17 + 3, x.flip(3))


@pytest.fixture
def network() -> nn.Module:
    """A small network with BatchNorm."""
    return small_network()


@pytest.fixture
def batch() -> Batch:
    """A small batch for it."""
    return small_batch()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty trust store, and a process in which nobody has named anything yet."""
    monkeypatch.setenv(trust.STATE_VARIABLE, str(tmp_path / "state"))
    monkeypatch.delenv(trust.HASH_VARIABLE, raising=False)
    monkeypatch.setattr(trust, "_named", set())
    monkeypatch.setattr(trust, "_told", set())
    return tmp_path / "state"
