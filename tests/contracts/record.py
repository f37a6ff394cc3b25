"""What one version of the package computes, for `against_base.py`, which imports this file once for each version.

By recipe: the loss terms of every step and the exported weights of a whole run shrunk to four epochs of five steps.
By evaluation: its ledger without times.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from holdfast import Linf, evaluate, fit, load_data
from holdfast.evaluation.networks import Speed
from holdfast.further_network import FurtherNetwork
from holdfast.models.factory import build
from holdfast.progress_display import Display
from holdfast.recipes import RECIPES
from holdfast.settings import Settings

SETTINGS = Settings(precision="fp32", device="cpu", validation_steps=2, test_steps=2, test_images=20)
EPSILON = 0.1
TIMES = ("seconds",)


class Terms(Display):
    """Keeps the loss terms of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, float]] = []

    def step(self, epoch: int, terms: Any) -> None:
        self.steps.append(dict(terms))


def small(width: int = 8) -> nn.Module:
    """The network of all runs."""
    return build("small_cnn", num_classes=10, channels=1, image_size=(8, 8), width=width)


def trained(name: str, precision: str) -> dict[str, Any]:
    """A whole run of a recipe: warm-up, decays, averages and ends of epochs all occur."""
    torch.manual_seed(0)
    recipe = RECIPES[name](epsilon=EPSILON)
    networks = {
        key: small().requires_grad_(False) if isinstance(network, FurtherNetwork) and not network.trained else network
        for key, network in recipe.networks.items()
    }
    recipe = replace(recipe, networks=networks, epochs=4, batch_size=16)
    whole = load_data("digits")
    digits = replace(whole, train=whole.train.subset(torch.arange(89)), test=whole.test.subset(torch.arange(20)))
    settings = replace(SETTINGS, precision=precision, extra_data="digits" if recipe.extra_share else None)
    display = Terms()
    with tempfile.TemporaryDirectory() as folder:
        run = fit(
            recipe,
            digits,
            "small_cnn",
            out=Path(folder) / "run",
            settings=settings,
            model_options={"width": 8},
            display=display,
        )
        weights = {part: load_file(run.path / part / "model.safetensors") for part in ("model", "last")}
    return {"terms": display.steps, "weights": weights}


def evaluated(name: str, precision: str) -> list[dict[str, Any]]:
    """The ledger of AutoAttack-standard on 40 digits."""
    torch.manual_seed(0)
    digits = load_data("digits")
    x = digits.train.pixels.permute(0, 3, 1, 2).float() / 255
    y = digits.train.labels.long()
    networks = {
        "cnn": small,
        "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    }
    network = networks[name]()
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        noisy = (x[:512] + 0.1 * torch.randn_like(x[:512])).clamp(0, 1)
        nn.functional.cross_entropy(network(noisy), y[:512]).backward()
        optimizer.step()
    speed = Speed(precision=precision)
    found = evaluate(network.eval(), x[-40:], y[-40:], threat=Linf(0.08), attack="autoattack", speed=speed)
    flags = [flag.name for flag in found.flags]
    return [*({key: value for key, value in row.items() if key not in TIMES} for row in found.rows), {"flags": flags}]


def records(names: Sequence[str] = ()) -> dict[str, Any]:
    """Everything, or what is named: recipes, and "evaluation"."""
    kept: dict[str, Any] = {}
    for name in names or [*RECIPES, "evaluation"]:
        for precision in ("fp32", "bf16"):
            if name == "evaluation":
                for network in ("cnn", "mlp"):
                    kept[f"AutoAttack-standard on {network}, {precision}"] = evaluated(network, precision)
            else:
                kept[f"{name}, {precision}"] = trained(name, precision)
        print(name, flush=True)
    return kept


def same(one: Any, other: Any) -> bool:
    """Whether two records are equal bit for bit; NaN equals NaN."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor) and one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
        )
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)
