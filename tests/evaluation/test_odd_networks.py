"""Odd networks get the bare number or a serious flag; honest ones of every kind are never called different."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from odd_networks import BALL, CONDITIONS, Odd, attacked, cnn, digits, honest, serious, trained
from torch import Tensor, nn

from holdfast import L1, evaluate
from holdfast.evaluation.networks import Searching, Speed


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("action", ["cut", "zero", "scramble", "other", "refuse"])
def test_every_odd_network_gets_the_bare_number_or_a_serious_flag(action: str, precision: str) -> None:
    speed = Speed(precision=precision)
    bare = attacked(honest(), "quick", n=60, speed=speed)
    assert 0.1 < bare.robust_accuracy < 0.6 < bare.clean_accuracy
    assert serious(bare) == []
    for when in CONDITIONS:
        found = attacked(Odd(copy.deepcopy(honest()), when, action), "quick", n=60, speed=speed)
        near = found.robust_accuracy <= bare.robust_accuracy + 0.02  # less is an attack that found more, and verified
        assert near or serious(found), (when, found.robust_accuracy)
        if when == "never":
            assert serious(found) == []


class Around(nn.Module):
    """A function before the network and one after it."""

    def __init__(self, inner: nn.Module, after: Callable[[Tensor], Tensor], *, halves: bool = False) -> None:
        super().__init__()
        self.inner, self.after, self.halves = inner, after, halves

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16) if self.halves else nullcontext():
            return self.after(self.inner(x)).to(x.dtype)


class Mean(nn.Module):
    """An ensemble."""

    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)


class SmallTransformer(nn.Module):
    """A vision transformer of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 2, 2)
        self.place = nn.Parameter(torch.randn(1, 16, 32) * 0.02)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, "gelu", batch_first=True, norm_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.patches(x).flatten(2).transpose(1, 2) + self.place).mean(1))


def pooled() -> nn.Module:
    """Max-pooling has ties wherever the background is plain."""
    layers = (nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(128, 10))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def scaled(scale: float) -> nn.Module:
    return Around(honest(), lambda logits: scale * logits)


HONEST: dict[str, Callable[[], nn.Module]] = {
    "cnn": honest,
    "group norm": lambda: trained(cnn(norm=lambda channels: nn.GroupNorm(4, channels))),
    "gelu": lambda: trained(cnn(activation=nn.GELU)),
    "mlp": lambda: trained(mlp(), epochs=6),
    "max-pooling": lambda: trained(pooled()),
    "transformer": lambda: trained(SmallTransformer(), epochs=10, rate=3e-3, within=0.05),
    "ensemble": lambda: Mean(honest(), trained(mlp())),
    "float64": lambda: copy.deepcopy(honest()).double(),
    "bfloat16 inside": lambda: Around(honest(), lambda logits: logits, halves=True),
    "bfloat16": lambda: copy.deepcopy(honest()).bfloat16(),
    "untrained": lambda: cnn().eval(),
    "frozen": lambda: copy.deepcopy(honest()).requires_grad_(False),
    **{f"logits times {scale:g}": (lambda scale=scale: scaled(scale)) for scale in (1e-6, 1e-3, 10.0, 100.0)},
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", HONEST)
def test_honest_networks_are_searched_as_a_copy_and_never_called_different(name: str, precision: str) -> None:
    torch.manual_seed(0)
    model = HONEST[name]().eval()
    searching = Searching(model, digits(8)[0], Speed(precision=precision))
    assert "copy" in searching.precise.name
    assert searching.low == (precision == "bf16" and name not in ("float64", "bfloat16"))
    for threat in (BALL, L1("2/1")):
        found = evaluate(model, *digits(40), threat=threat, attack="quick", speed=Speed(precision=precision))
        known = {"logits times 100": {"saturated-cross-entropy"}, "untrained": {"constant-predictions"}}
        assert set(serious(found)) <= known.get(name, set())
        assert {"search-differs", "no-gradients", "batch-dependent"}.isdisjoint(flag.name for flag in found.flags)
