"""Small networks trained on the built-in digits within a second, and the images they are judged on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from holdfast import Linf, load_data

BALL = Linf(0.15)


@cache
def _pixels(split: str) -> tuple[Tensor, Tensor]:
    images = getattr(load_data("digits"), split)
    return images.pixels.permute(0, 3, 1, 2).float() / 255, images.labels.long()


def train_digits() -> tuple[Tensor, Tensor]:
    """Return all training images (1437, 1, 8, 8) in [0, 1] and their labels."""
    return _pixels("train")


def digits(count: int = 100) -> tuple[Tensor, Tensor]:
    """Return the first test images (count, 1, 8, 8) in [0, 1] and their labels."""
    x, y = _pixels("test")
    return x[:count].clone(), y[:count].clone()


def trained(
    make: Callable[[], nn.Module],
    *,
    epochs: int = 4,
    learning_rate: float = 1e-2,
    seed: int = 0,
    within: float = 0.0,
) -> nn.Module:
    """Return the network after a few epochs of Adam, in evaluation mode; `within` > 0 trains on FGSM images."""
    x, y = train_digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make()
        optimizer = torch.optim.Adam(network.parameters(), learning_rate)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(100):
                seen = x[rows]
                if within:
                    seen = (seen + within * _sign(network, seen, y[rows])).clamp(0, 1)
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(seen), y[rows]).backward()
                optimizer.step()
    optimizer.zero_grad()
    return network.eval()


def _sign(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(nn.functional.cross_entropy(network(x), y), x)[0].sign()


def mlp() -> nn.Sequential:
    """Return 64 hidden units between the pixels and the classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Sequential:
    """Return two convolutions, each with BatchNorm and ReLU, and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3, padding=1, stride=2), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(192, 10)),
    )
