"""The record of a run's environment, and the question whether bfloat16 is native."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from holdfast.runs.environment import environment, supports_bf16

CPU = torch.device("cpu")


def test_torchs_build_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's metadata may lack the build: a CUDA wheel is 2.13.0 there and 2.13.0+cu130 in torch itself."""
    monkeypatch.setattr(torch, "__version__", "9.8.7+cu130")
    assert environment()["packages"]["torch"] == "9.8.7+cu130"


@pytest.mark.parametrize(("instructions", "used"), [(True, True), (True, False), (False, True), (False, False)])
def test_bf16_is_native_where_the_processor_has_it_and_onednn_uses_it(
    instructions: bool, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: used)
    assert supports_bf16(CPU) == (instructions and used)
    assert not supports_bf16(torch.device("meta"))


def test_bf16_is_not_native_where_torch_cannot_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert not supports_bf16(CPU)


@pytest.mark.slow
def test_bf16_is_not_native_under_a_limit_to_avx2() -> None:
    """The variable is read once a process, when oneDNN is first used."""
    code = "import torch; from holdfast.runs import environment as e; print(e.supports_bf16(torch.device('cpu')))"
    limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    ended = subprocess.run([sys.executable, "-c", code], env=limited, capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"
