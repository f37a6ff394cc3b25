"""The time of an evaluation against torchattacks' classes at the same protocol.

    python benchmarks/evaluate.py RUN --data SOURCE --epsilon 8/255 [--protocol autoattack] [--n 60] [--repeats 3]

Both sides attack the same network on the same images in one process, in turn, several times; the table gives medians.
torchattacks' AutoAttack class runs ten steps: here its APGD, APGDT, FAB and Square are made with 100 steps, nine
targets and 5,000 queries without rescaled schedule, and run one after the other on what is left, as AutoAttack does.

`torchattacks` must be importable (an environment of its own, or PYTHONPATH); it is no dependency of Holdfast.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import load_data, load_model
from holdfast.evaluation.inputs import as_inputs, chosen
from holdfast.evaluation.networks import Speed
from holdfast.evaluation.protocols import Options, named
from holdfast.evaluation.robustness import Plan
from holdfast.runs.environment import environment, supports_bf16
from holdfast.runs.memory import keep_freed_memory
from holdfast.threat import Linf


class Counted(nn.Module):
    """Counts the rows that go through a network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        out = self.model(x)
        if out.requires_grad:
            out.register_hook(self._count)
        return out

    def _count(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def theirs(model: nn.Module, epsilon: float, protocol: str, x: Tensor, y: Tensor) -> tuple[int, list[bool]]:
    """torchattacks: how many images stay correct, and which."""
    import torchattacks

    if protocol == "pgd":
        attacks = [torchattacks.PGD(model, eps=epsilon, alpha=epsilon / 4, steps=50)]
    else:
        own = {"eps": epsilon, "norm": "Linf", "seed": 0, "n_restarts": 1}
        attacks = [
            torchattacks.APGD(model, steps=100, loss="ce", **own),
            torchattacks.APGDT(model, steps=100, n_classes=10, **own),
            torchattacks.FAB(model, steps=100, multi_targeted=True, n_classes=10, **own),
            torchattacks.Square(model, n_queries=5000, resc_schedule=False, **own),
        ]
    with torch.no_grad():
        robust = model(x).argmax(1) == y
    for attack in attacks:
        # its PGD attacks every image, its AutoAttack only what is left
        left = robust.nonzero()[:, 0] if protocol == "autoattack" else torch.arange(len(y))
        if len(left) == 0:
            break
        found = attack(x[left], y[left])
        with torch.no_grad():
            robust[left] &= model(found).argmax(1) == y[left]
    return int(robust.sum()), robust.tolist()


def ours(model: nn.Module, epsilon: float, protocol: str, inputs: Any, speed: Speed) -> tuple[int, list[bool]]:
    """Holdfast: the same."""
    threat = Linf(f"{epsilon:.17f}/1")
    options = Options(steps=50) if protocol == "pgd" else None
    plan = Plan(
        model=model,
        inputs=inputs,
        threat=threat,
        protocol=named(protocol, threat, options),
        unit=len(inputs.y),
        speed=speed,
        probe=False,
    )
    robust = [row["verdict"] == "robust" for row in plan.run().rows]
    return sum(robust), robust


def measured(run: Callable[[], tuple[int, list[bool]]]) -> dict[str, Any]:
    """Seconds on the clock and of the processor, and what came out."""
    wall, processor = time.perf_counter(), time.process_time()
    robust, which = run()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - processor,
        "robust": robust,
        "which": which,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", required=True)
    parser.add_argument("--epsilon", default="8/255")
    parser.add_argument("--protocol", choices=("autoattack", "pgd"), default="autoattack")
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="network", help="what the network is called in the results")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    keep_freed_memory()
    model = load_model(asked.run).requires_grad_(True)  # as torchattacks gets it from a user
    data = load_data(asked.data)
    inputs = chosen(as_inputs(model, data.test), asked.n)
    x, y, _ = inputs.part(slice(None))
    epsilon = Linf(asked.epsilon).epsilon
    sides: dict[str, Callable[[], tuple[int, list[bool]]]] = {
        "torchattacks": lambda: theirs(model, epsilon, asked.protocol, x, y),
        "holdfast fp32": lambda: ours(model, epsilon, asked.protocol, inputs, Speed(precision="fp32")),
    }
    if supports_bf16(torch.device("cpu")):
        sides["holdfast bf16"] = lambda: ours(model, epsilon, asked.protocol, inputs, Speed(precision="bf16"))
    counted = Counted(model).eval()
    theirs(counted, epsilon, asked.protocol, x, y)
    passes = [counted.forwards / len(y), counted.backwards / len(y)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(asked.repeats):
        for name, side in sides.items():
            found[name].append(measured(side))
            print(name, {k: v for k, v in found[name][-1].items() if k != "which"}, flush=True)
    clean = int((model(x).argmax(1) == y).sum())
    report(asked, found, passes, clean)


def report(asked: argparse.Namespace, found: dict[str, list[dict[str, Any]]], passes: list[float], clean: int) -> None:
    """The table, and the JSON file."""
    median = {
        name: {key: statistics.median(each[key] for each in runs) for key in ("seconds", "cpu_seconds")}
        for name, runs in found.items()
    }
    base = median["torchattacks"]
    print(f"\n{asked.protocol}, Linf {asked.epsilon}, {asked.n} images, clean {clean}, {asked.threads} thread(s)")
    print("| side | seconds | ratio | processor seconds | ratio | robust |")
    print("|---|---|---|---|---|---|")
    for name, one in median.items():
        robust = sorted({each["robust"] for each in found[name]})
        print(
            f"| {name} | {one['seconds']:.1f} | {base['seconds'] / one['seconds']:.2f} | {one['cpu_seconds']:.1f}"
            f" | {base['cpu_seconds'] / one['cpu_seconds']:.2f} | {', '.join(map(str, robust))} |"
        )
    first = found["torchattacks"][0]["which"]
    for name, runs in found.items():
        held = [place for place, (a, b) in enumerate(zip(first, runs[0]["which"], strict=True)) if a != b]
        print(f"{name}: verdict differs from torchattacks' on {len(held)} images")
    print("torchattacks' forward and backward passes an image:", *(f"{each:.0f}" for each in passes))
    if asked.name != "network":
        whole = {
            "name": asked.name,
            "protocol": asked.protocol,
            "epsilon": asked.epsilon,
            "n": asked.n,
            "clean": clean,
            "threads": asked.threads,
            "median": median,
            "runs": {
                k: [{key: v for key, v in r.items() if key != "which"} for r in runs] for k, runs in found.items()
            },
            "passes_an_image_of_torchattacks": passes,
            "environment": environment(),
        }
        file = f"evaluate-{asked.protocol}-{re.sub(r'[^0-9A-Za-z]+', '_', asked.name).strip('_')}.json"
        (Path(__file__).parent / "results" / file).write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
