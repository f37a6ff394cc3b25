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
    """Versions, device, threads and processes; no path and no name of a person or a machine."""
    packages = {}
    for package in ("torch", "numpy", "pillow", "pyyaml", "jsonargparse", "safetensors"):
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
    """Whether bfloat16 arithmetic is native, so that it gains speed instead of losing it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe()) if probe is not None and device.type == "cpu" else False
