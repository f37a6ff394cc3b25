"""`holdfast doctor`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import metadata
from statistics import median
from typing import Any

from holdfast.cli.arguments import Parser, print_json
from holdfast.streams import tell as to_stderr

EXTRAS = {"datasets": "data", "pyarrow": "data", "huggingface_hub": "hub"}


def run(argv: Sequence[str]) -> int:
    """Print versions, device, what is missing, and the speed of one step."""
    parser = Parser(prog="holdfast doctor", description="Check the environment and time one PGD-10 step here.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.read(argv)
    from holdfast.runs.environment import environment

    found: dict[str, Any] = {**environment(), "extras": extras(), "step": step_times()}
    found.pop("command")
    if asked.json:
        print_json(found)
        return 0
    print(
        f"holdfast {found['holdfast']}, Python {found['python']}, torch {found['packages']['torch']}, {found['system']}"
    )
    native = "native" if found["bf16"] else "not native"
    print(f"device   {found['device']}, {found['threads']} of {found['cores']} cores, bf16 {native}")
    for name, there in found["extras"].items():
        missing = f"missing: pip install 'holdfast[{EXTRAS[name]}]'"
        print(f"extra    {name} {there or missing}")
    for precision, speed in found["step"].items():
        rate = f"{speed['ms']:.0f} ms, {speed['images_per_second']:.0f} images/s"
        print(f"step     small_cnn, 28x28, batch 128, PGD-10, {precision}: {rate}")
    return 0


def extras() -> dict[str, str | None]:
    """Versions of the packages that only some readers need."""
    versions: dict[str, str | None] = {}
    for name in EXTRAS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def step_times() -> dict[str, dict[str, float]]:
    """The median of a few training steps in each precision that makes sense here."""
    import torch

    from holdfast.forward import Batch
    from holdfast.models.factory import build
    from holdfast.recipes import pgd_at
    from holdfast.runs.environment import supports_bf16
    from holdfast.runs.memory import keep_freed_memory
    from holdfast.schedule import Progress
    from holdfast.setup import choose_device
    from holdfast.step import AdversarialStep

    keep_freed_memory()
    device = choose_device("auto")
    x = torch.rand(128, 1, 28, 28, device=device).to(memory_format=torch.channels_last)
    y = torch.arange(128, device=device) % 10
    found = {}
    for precision in ("bf16", "fp32") if supports_bf16(device) else ("fp32",):
        to_stderr(f"timing {precision} …")
        model = build("small_cnn", num_classes=10, channels=1, image_size=(28, 28)).to(device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        step = AdversarialStep(pgd_at(epsilon=0.1), model, precision=precision)
        times = []
        for number in range(7):
            begin = time.perf_counter()
            step(Batch(x, y), Progress(step=number))["loss"].backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        middle = median(times[2:])
        found[precision] = {"ms": 1000 * middle, "images_per_second": 128 / middle}
    return found
