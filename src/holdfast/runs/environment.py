"""What a run was made with."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch

from holdfast import __version__, distributed


def environment() -> dict[str, Any]:
    """Return versions, device, threads and processes; no path and no name of a person or a machine."""
    packages: dict[str, str | None] = {"torch": str(torch.__version__)}  # with its build, such as 2.13.0+cu130
    for package in ("numpy", "pillow", "pyyaml", "jsonargparse", "safetensors"):
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            packages[package] = None
    return {
        "holdfast": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "device": device_name(),
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "bf16": supports_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "command": ["holdfast", *sys.argv[1:]] if sys.argv[0].endswith("holdfast") else None,
    }


def device_name() -> str:
    """The accelerator's name, or the processor's instruction set as torch sees it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {torch.backends.cpu.get_cpu_capability()}"


def supports_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 arithmetic is native, so that it gains speed instead of losing it.

    On a processor two questions count: does it have the instructions, and does oneDNN, which computes convolutions and
    linear layers, use them? Limited by ``ONEDNN_MAX_CPU_ISA=AVX2``, it emulates bfloat16 and takes many times as long.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    probes = (
        getattr(torch.cpu, "_is_avx512_bf16_supported", None),
        getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None),
    )
    return all(probe is not None and bool(probe()) for probe in probes)
