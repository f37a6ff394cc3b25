"""Honest networks of many kinds, each trained on the digits within a second: none of them deserves a flag."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import cast

import torch
from digit_networks import cnn, mlp, trained
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class After(nn.Module):
    """A network and a function of its logits."""

    def __init__(self, network: nn.Module, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.after = network, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.network(x))


class Block(nn.Module):
    """Two convolutions with BatchNorm beside a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.second, self.second_norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.second_norm(self.second(self.first_norm(self.first(x)).relu()))).relu()


def resnet() -> nn.Sequential:
    """A small ResNet."""
    first = (nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    return nn.Sequential(*first, Block(8), Block(8), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))


class ViT(nn.Module):
    """Sixteen patches of 2 × 2 pixels, positions, one encoder layer with attention, GELU and LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 24, 2, stride=2)
        self.positions = nn.Parameter(0.1 * torch.randn(1, 16, 24))
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(3))
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.hidden = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Dropout(0.1), nn.Linear(48, 24))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        seen = self.norms[0](x)
        x = x + self.attention(seen, seen, seen, need_weights=False)[0]
        x = x + self.hidden(self.norms[1](x))
        return self.head(self.norms[2](x).mean(1))


class Normalized(nn.Module):
    """Subtracts the mean and divides by the deviation, as data pipelines do, in front of a network."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor([0.3]).view(1, 1, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.35]).view(1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - self.mean) / self.deviation)


class InPlace(nn.Module):
    """Subtracts the mean in place in front of a network: what it was given is overwritten."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.sub_(0.0))


class InDouble(nn.Module):
    """A network in float64 for pixels in float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.double())


class Bfloat16Inside(nn.Module):
    """The first half in bfloat16, the second in float32."""

    def __init__(self, network: nn.Sequential, half: int) -> None:
        super().__init__()
        self.first, self.second = network[:half].bfloat16(), network[half:]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.bfloat16()).float())


class Ensemble(nn.Module):
    """The mean of the logits, or of the log-probabilities, of several networks."""

    def __init__(self, networks: list[nn.Module], *, probabilities: bool = False) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.probabilities = probabilities

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.stack([network(x) for network in self.networks])
        return (logits.log_softmax(2) if self.probabilities else logits).mean(0)


class Tied(nn.Module):
    """One layer used twice, then its transpose: three places with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(64, 48), nn.Linear(48, 48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.first(x.flatten(1)).relu()).relu()
        x = nn.functional.linear(self.shared(x).relu(), self.shared.weight.t())
        return self.last(x.relu())


def widened(*layers: nn.Module, width: int = 12) -> nn.Sequential:
    """A convolution, these layers, and a linear layer."""
    return nn.Sequential(nn.Conv2d(1, width, 3, stride=2, padding=1), *layers, nn.Flatten(), nn.Linear(width * 16, 10))


def depthwise() -> nn.Sequential:
    """A depthwise and a pointwise convolution with BatchNorm."""
    separated = (nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12), nn.ReLU())
    return widened(nn.ReLU(), *separated)


def pooled() -> nn.Sequential:
    """Convolutions and max-pooling."""
    convolutions = (nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 16, 3, padding=1))
    return nn.Sequential(*convolutions, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def spectral() -> nn.Sequential:
    """An MLP with spectral normalisation, whose parametrisation runs at every call."""
    first, last = nn.Linear(64, 64), nn.Linear(64, 10)
    return nn.Sequential(
        nn.Flatten(), parametrizations.spectral_norm(first), nn.ReLU(), parametrizations.spectral_norm(last)
    )


def weight_norm() -> nn.Sequential:
    """A convolution with weight normalisation before BatchNorm."""
    return widened(nn.ReLU(), parametrizations.weight_norm(nn.Conv2d(12, 12, 3, padding=1)), nn.BatchNorm2d(12))


def gelu_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))


def dropout() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Dropout(0.4), nn.Linear(96, 10))


def in_place_first(network: nn.Module) -> nn.Sequential:
    """A leaky ReLU in place in front of a network; a ReLU would take the gradient from black pixels."""
    return nn.Sequential(nn.LeakyReLU(0.1, inplace=True), network)


@cache
def _bare(name: str) -> nn.Module:
    return {
        "mlp": lambda: trained(mlp),
        "cnn": lambda: trained(cnn),
        "other mlp": lambda: trained(mlp, seed=1),
        "third mlp": lambda: trained(mlp, seed=2),
    }[name]()


def bare(name: str) -> nn.Module:
    """Return a copy of a trained network of one's own."""
    return copy.deepcopy(_bare(name))


def frozen(name: str) -> nn.Module:
    """Return the network without a parameter that requires a gradient."""
    return bare(name).requires_grad_(False)


def ensemble(*, probabilities: bool) -> nn.Module:
    """Return three MLPs as one."""
    return Ensemble([bare("mlp"), bare("other mlp"), bare("third mlp")], probabilities=probabilities)


@dataclass(frozen=True)
class Honest:
    """One of the zoo.

    Attributes:
        make: The trained network in evaluation mode.
        like: A plain network that computes the same, if there is one.
    """

    make: Callable[[], nn.Module]
    like: str | None = None


def traced() -> nn.Module:
    """Return an MLP as `torch.jit.trace` makes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch would rather export
        return cast(nn.Module, torch.jit.trace(bare("mlp"), torch.zeros(2, 1, 8, 8)))


def scaled(factor: float, name: str = "mlp") -> Honest:
    return Honest(lambda: After(bare(name), lambda logits: factor * logits).eval(), name)


ZOO: dict[str, Honest] = {
    "MLP": Honest(partial(bare, "mlp")),
    "MLP with GELU": Honest(lambda: trained(gelu_mlp)),
    "MLP, ten epochs": Honest(lambda: trained(mlp, epochs=10)),
    "MLP, barely trained": Honest(lambda: trained(mlp, epochs=1, learning_rate=3e-3)),
    "MLP, adversarially trained": Honest(lambda: trained(mlp, epochs=8, within=0.15)),
    "CNN with BatchNorm": Honest(partial(bare, "cnn")),
    "CNN with BatchNorm, adversarially trained": Honest(lambda: trained(cnn, epochs=5, within=0.15)),
    "CNN without BatchNorm": Honest(lambda: trained(lambda: widened(nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1)))),
    "CNN with max-pooling": Honest(lambda: trained(pooled)),
    "CNN with GroupNorm": Honest(lambda: trained(lambda: widened(nn.GroupNorm(3, 12), nn.ReLU()))),
    "CNN with InstanceNorm": Honest(lambda: trained(lambda: widened(nn.InstanceNorm2d(12), nn.ReLU()))),
    "CNN with SiLU": Honest(lambda: trained(lambda: widened(nn.SiLU(), nn.Conv2d(12, 12, 3, padding=1), nn.SiLU()))),
    "CNN with tanh": Honest(lambda: trained(lambda: widened(nn.Tanh(), nn.Conv2d(12, 12, 3, padding=1), nn.Tanh()))),
    "CNN with leaky ReLU": Honest(lambda: trained(lambda: widened(nn.BatchNorm2d(12), nn.LeakyReLU(0.1)))),
    "CNN with separated convolutions": Honest(lambda: trained(depthwise)),
    "CNN with weight normalisation": Honest(lambda: trained(weight_norm)),
    "ResNet": Honest(lambda: trained(resnet)),
    "ViT": Honest(lambda: trained(ViT, epochs=5)),
    "linear": Honest(lambda: trained(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))),
    "spectral normalisation": Honest(lambda: trained(spectral)),
    "dropout, switched off": Honest(lambda: trained(dropout)),
    "normalised pixels": Honest(lambda: trained(lambda: Normalized(cnn()))),
    "tied weights": Honest(lambda: trained(Tied)),
    "in-place first layer": Honest(lambda: in_place_first(bare("mlp")), "mlp"),
    "in-place first layer, trained": Honest(lambda: trained(lambda: in_place_first(mlp()))),
    "in-place subtraction in front": Honest(lambda: InPlace(bare("cnn")), "cnn"),
    "frozen MLP": Honest(partial(frozen, "mlp"), "mlp"),
    "frozen CNN": Honest(partial(frozen, "cnn"), "cnn"),
    "ensemble of logits": Honest(partial(ensemble, probabilities=False)),
    "ensemble of log-probabilities": Honest(partial(ensemble, probabilities=True)),
    "log-probabilities": Honest(lambda: After(bare("mlp"), lambda logits: logits.log_softmax(1)), "mlp"),
    "float64 inside": Honest(lambda: InDouble(bare("mlp")), "mlp"),
    "float64 inside, CNN": Honest(lambda: InDouble(bare("cnn")), "cnn"),
    "bfloat16 in the first half": Honest(lambda: Bfloat16Inside(nn.Sequential(*bare("mlp").children()), 3)),
    "bfloat16 in the first half, CNN": Honest(lambda: Bfloat16Inside(nn.Sequential(*bare("cnn").children()), 3)),
    "logits × 1e-6": scaled(1e-6),
    "logits × 1e-6, CNN": scaled(1e-6, "cnn"),
    "logits × 0.01": scaled(0.01),
    "logits × 10": scaled(10.0),
    "logits × 100": scaled(100.0),
    "logits × 100, CNN": scaled(100.0, "cnn"),
    "logits + 1000": Honest(lambda: After(bare("mlp"), lambda logits: logits + 1000), "mlp"),
    "traced": Honest(traced, "mlp"),
}
