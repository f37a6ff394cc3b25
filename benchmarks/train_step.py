"""One PGD-10 training step: Holdfast against a plain float32 loop on the same network.

Both sides run in one process, interleaved, and medians are compared, because other work on the machine slows both.
The plain loop is what older training code does: ``loss.backward()`` in the attack (weight gradients included), float32,
NCHW. Both include the optimiser's step. Freed memory is kept by the allocator for both sides.

    python benchmarks/train_step.py [--model small_cnn] [--image-size 28] [--channels 1] [--batch 128] [--rounds 15]

prints a table and writes benchmarks/results/train_step-<model>-<device>.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.compilation import compile_in_place
from holdfast.forward import Batch
from holdfast.models.factory import build
from holdfast.recipes import pgd_at
from holdfast.runs.environment import environment, supports_bf16
from holdfast.runs.memory import keep_freed_memory
from holdfast.schedule import Progress
from holdfast.step import AdversarialStep

EPSILON, STEPS = 0.1, 10


def plain_loop(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float]:
    """PGD-10 adversarial training as it is usually written: random start, running statistics in the attack."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> float:
        model.eval()
        x_adv = (x + torch.empty_like(x).uniform_(-EPSILON, EPSILON)).clamp(0, 1)
        for _ in range(STEPS):
            x_adv.requires_grad_(True)
            loss = F.cross_entropy(model(x_adv), y)
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                x_adv = x_adv + EPSILON / 4 * x_adv.grad.sign()
                x_adv = torch.min(torch.max(x_adv, x - EPSILON), x + EPSILON).clamp(0, 1)
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x_adv), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def holdfast_step(model: nn.Module, x: Tensor, y: Tensor, precision: str, compiled: bool) -> Callable[[], float]:
    """The same step by Holdfast, channels-last."""
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    if compiled:
        compile_in_place(model)
    training = AdversarialStep(pgd_at(epsilon=EPSILON), model, precision=precision, check_finite=x.device.type == "cpu")
    (optimizer,) = training.optimizers()
    count = iter(range(10**9))

    def step() -> float:
        loss = training(Batch(x, y), Progress(step=next(count), epochs=10**9))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step, the sides taking turns; three rounds first are not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 3):
        for name, step in sides.items():
            begin = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 3:
                times[name].append(time.perf_counter() - begin)
    return times


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small_cnn")
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="also measure with torch.compile")
    asked = parser.parse_args()
    kept = keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    x = torch.rand(asked.batch, asked.channels, asked.image_size, asked.image_size, device=device)
    y = torch.randint(0, 10, (asked.batch,), device=device)
    size = (asked.image_size, asked.image_size)
    model = build(asked.model, num_classes=10, channels=asked.channels, image_size=size).to(device)
    sides = {"plain loop, float32": plain_loop(copy.deepcopy(model), x, y)}
    sides["holdfast, float32"] = holdfast_step(copy.deepcopy(model), x, y, "fp32", False)
    if supports_bf16(device):
        sides["holdfast, bf16"] = holdfast_step(copy.deepcopy(model), x, y, "bf16", False)
        if asked.compile:
            sides["holdfast, bf16, compiled"] = holdfast_step(copy.deepcopy(model), x, y, "bf16", True)
    times = measure(sides, asked.rounds)
    base = median(times["plain loop, float32"])
    rows = {
        name: {
            "median_ms": round(1000 * median(seconds), 2),
            "fastest_ms": round(1000 * min(seconds), 2),
            "ratio_of_medians": round(base / median(seconds), 3),
        }
        for name, seconds in times.items()
    }
    print(
        f"{asked.model}, {asked.channels}x{asked.image_size}x{asked.image_size}, batch {asked.batch}, PGD-10, {device}"
    )
    print(f"{'':28}{'median ms':>12}{'fastest ms':>12}{'ratio':>8}")
    for name, row in rows.items():
        print(f"{name:28}{row['median_ms']:12.1f}{row['fastest_ms']:12.1f}{row['ratio_of_medians']:8.2f}")
    result = {"arguments": vars(asked), "freed_memory_kept": kept, "environment": environment(), "rows": rows}
    path = Path(__file__).parent / "results" / f"train_step-{asked.model}-{device.type}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path.relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__":
    main()
