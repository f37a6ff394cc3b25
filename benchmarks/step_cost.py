"""What a training step of each method costs over PGD-AT's, as a ratio of times.

All methods run in one process on one and the same network and batch, interleaved: every round times one step of each,
in an order that rotates, and each method's time is divided by PGD-AT's of the same round; medians are reported. (With a
network for each method one would also measure where its tensors lie, which makes some per cent.) PGD-AT is timed a
second time as a control. A step is forward, backward, optimiser and averages; PIAT's interpolation at an epoch's end is
shared out among 100 steps.

    python benchmarks/step_cost.py [--model small_cnn] [--image-size 28] [--channels 1] [--batch 128] [--rounds 25]

prints a table and writes benchmarks/results/step_cost-<model>-<device>-<precision>.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import nn

from holdfast.compilation import compile_in_place
from holdfast.forward import Batch
from holdfast.models.factory import build
from holdfast.recipes import RECIPES
from holdfast.runs.environment import environment, supports_bf16
from holdfast.runs.memory import keep_freed_memory
from holdfast.schedule import Progress
from holdfast.step import AdversarialStep
from holdfast.views.split_batchnorm import SplitBatchNorm

EPSILON, STEPS_PER_EPOCH = 0.1, 100
LIMITS = {"iseat": 1.25, "trades": 1.2, "ar_at": 1.18, "awp": 1.16, "piat": 1.01}
CONTROL = "pgd_at (again)"
METHODS = ("pgd_at", "piat", "alp", "pgd_at_nmse", "mart", "trades", "awp", "ar_at", "iseat", "trades_awp", "rwp")


def network_and_batch(asked: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Batch]:
    """What all methods are timed on."""
    torch.manual_seed(0)
    size = (asked.image_size, asked.image_size)
    model = build(asked.model, num_classes=10, channels=asked.channels, image_size=size)
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(asked.batch, asked.channels, *size, device=device).to(memory_format=torch.channels_last)
    return model, Batch(x, torch.randint(0, 10, (asked.batch,), device=device))


def timed_step(name: str, model: nn.Module, batch: Batch, device: torch.device, precision: str) -> Callable[[], float]:
    """A function that makes one step of the method and returns its seconds."""
    name = name.partition(" ")[0]
    recipe = RECIPES[name](epsilon=EPSILON)
    recipe.objective.prepare(model, batch.x[:2])
    step = AdversarialStep(recipe, model, precision=precision, check_finite=device.type == "cpu").to(device)
    (optimizer,) = step.optimizers()
    late = Progress(step=99, epochs=100, epoch=99, stage=3, measured={"clean_accuracy": 0.8})
    for average in recipe.averages:
        average.start(model)

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def one() -> float:
        begin = clock()
        step(batch, late)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        for average in recipe.averages:
            average.after_step(model, late)
        middle = clock()
        for average in recipe.averages:
            average.after_epoch(model, late)
        return middle - begin + (clock() - middle) / STEPS_PER_EPOCH

    return one


def passes(name: str) -> float:
    """Forward passes of a step, with all of the method on."""
    return RECIPES[name.partition(" ")[0]](epsilon=EPSILON).passes()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small_cnn")
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(RECIPES))
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="bf16 where the machine computes in it natively")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, help="of torch; its default otherwise")
    asked = parser.parse_args()
    keep_freed_memory()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = asked.precision or ("bf16" if supports_bf16(device) else "fp32")
    methods = list(dict.fromkeys(["pgd_at", CONTROL, *asked.methods]))
    model, batch = network_and_batch(asked, device)
    SplitBatchNorm().prepare(model)  # before any average remembers the network
    if asked.compile:
        compile_in_place(model)
    steps = {name: timed_step(name, model, batch, device, precision) for name in methods}
    for one in steps.values():
        for _ in range(3):
            one()
    ratios: dict[str, list[float]] = {name: [] for name in methods}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(asked.rounds):
        turn = number % len(methods)
        found = {name: steps[name]() for name in (*methods[turn:], *methods[:turn])}
        for name, value in found.items():
            seconds[name].append(value)
            ratios[name].append(value / found["pgd_at"])
    baseline = passes("pgd_at")
    rows = []
    print(f"{'method':<14} {'ratio':>6} {'quartiles':>12} {'passes':>7} {'ms':>8}  at most")
    for name in methods:
        low, _, high = quantiles(ratios[name], n=4)
        row = {
            "method": name,
            "ratio": round(median(ratios[name]), 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "passes_ratio": round(passes(name) / baseline, 3),
            "ms": round(1000 * median(seconds[name]), 2),
        }
        rows.append(row)
        print(
            f"{name:<14} {row['ratio']:>6.3f} {low:>5.2f} - {high:.2f} {row['passes_ratio']:>7.2f} {row['ms']:>8.1f}"
            f"  {LIMITS.get(name, '')}"
        )
    result = {
        "command": f"python benchmarks/step_cost.py --model {asked.model} --image-size {asked.image_size}"
        f" --channels {asked.channels} --batch {asked.batch} --rounds {asked.rounds}",
        "precision": precision,
        "threads": torch.get_num_threads(),
        "environment": environment(),
        "rows": rows,
    }
    how = precision + ("-compiled" if asked.compile else "")
    path = Path(__file__).parent / "results" / f"step_cost-{asked.model}-{device.type}-{how}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
