"""Networks that answer in another way when they can tell that they are searched, and the honest one inside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import Linf, evaluate, load_data
from holdfast.attacks.iterative import IterativeGradient
from holdfast.data.loader import to_pixels
from holdfast.evaluation.protocols import Protocol, of_attacks
from holdfast.evaluation.result import Result

BALL = Linf(0.2)
PGD = of_attacks([IterativeGradient(steps=20, step_size=0.02)])


class _Replaced(torch.autograd.Function):
    """The same forward, another backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.replacement = backward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.replacement(gradients[0]), None


def cut(inner: nn.Module, x: Tensor) -> Tensor:
    return inner(x.detach())


def zero(inner: nn.Module, x: Tensor) -> Tensor:
    return inner(_Replaced.apply(x, torch.zeros_like))


def scramble(inner: nn.Module, x: Tensor) -> Tensor:
    return inner(_Replaced.apply(x, lambda gradient: -gradient.flip(-1).flip(-2)))


def other(inner: nn.Module, x: Tensor) -> Tensor:
    return inner(x.flip(-1))


def refuse(inner: nn.Module, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        raise KeyError("no such thing")
    return inner(x)


ACTIONS = {each.__name__: each for each in (cut, zero, scramble, other, refuse)}

CONDITIONS: dict[str, Callable[[Odd, Tensor], bool]] = {
    "never": lambda model, x: False,
    "copied": lambda model, x: model.copied,
    "not copied": lambda model, x: not model.copied and torch.is_grad_enabled(),
    "no leaf": lambda model, x: x.grad_fn is not None,
    "leaf": lambda model, x: x.requires_grad and x.is_leaf,
    "graph": lambda model, x: torch.is_grad_enabled(),
    "pixels want a gradient": lambda model, x: x.requires_grad,
    "frozen": lambda model, x: not any(p.requires_grad for p in model.inner.parameters()),
    "trainable": lambda model, x: all(p.requires_grad for p in model.inner.parameters()),
    "large batch": lambda model, x: len(x) > 16,
    "small batch": lambda model, x: len(x) <= 16,
    "odd batch": lambda model, x: len(x) % 2 == 1,
    "late": lambda model, x: model.calls > 150,
    "late by a buffer": lambda model, x: float(model.seen) > 100,
    "early": lambda model, x: model.calls < 40,
    "perturbed": lambda model, x: bool(((255 * x - (255 * x).round()).abs() > 1e-3).any()),
    "clean": lambda model, x: bool(((255 * x - (255 * x).round()).abs() < 1e-3).all()),
    "autocast": lambda model, x: torch.is_autocast_enabled("cpu"),
}


class Odd(nn.Module):
    """Acts oddly when a condition holds.

    Args:
        inner: The honest network.
        when: A key of `CONDITIONS`, or a condition.
        action: A key of `ACTIONS`.
    """

    seen: Tensor

    def __init__(self, inner: nn.Module, when: str | Callable[[Odd, Tensor], bool], action: str) -> None:
        super().__init__()
        self.inner, self.when, self.action = inner, when, action
        self.copied, self.calls = False, 0
        self.register_buffer("seen", torch.zeros(()))
        self.eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> Odd:
        new = Odd(copy.deepcopy(self.inner, memo), self.when, self.action)
        new.copied, new.calls = True, self.calls
        return new

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        holds = CONDITIONS[self.when] if isinstance(self.when, str) else self.when
        return ACTIONS[self.action](self.inner, x) if holds(self, x) else self.inner(x)


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Test digits and their labels."""
    test = load_data("digits").test
    return to_pixels(test.pixels[:count], torch.float32), test.labels[:count].long()


def cnn(norm: Callable[[int], nn.Module] = nn.BatchNorm2d, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """An untrained network of two convolutions."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), norm(8), activation()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), activation(), nn.Flatten(), nn.Linear(256, 10)),
    )


def trained(network: nn.Module, *, epochs: int = 3, within: float = 0.15, rate: float = 5e-3) -> nn.Module:
    """A network after a little adversarial training with one step."""
    train = load_data("digits").train
    x, y = to_pixels(train.pixels, torch.float32), train.labels.long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(network.parameters(), rate)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(128):
                point = x[rows].requires_grad_(True)
                (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(network(point), y[rows]), point)
                moved = (x[rows] + within * gradient.sign()).clamp(0, 1)
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(moved), y[rows]).backward()
                optimizer.step()
    optimizer.zero_grad()
    return network.eval()


@cache
def honest() -> nn.Module:
    """A small trained network. Copy it before changing it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return trained(cnn(), epochs=5)


def serious(found: Result) -> list[str]:
    """Names of the serious flags."""
    return [flag.name for flag in found.flags if flag.serious]


def attacked(model: nn.Module, attack: str | Protocol = PGD, *, n: int = 40, **own: Any) -> Result:
    """A short evaluation."""
    return evaluate(model, *digits(n), threat=BALL, attack=attack, **own)
