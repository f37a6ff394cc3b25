"""A network that is run with other weights keeps its own, whatever names its layers have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from holdfast import AdversarialStep, Batch, Progress, fit
from holdfast.attacks.pgd import PGD
from holdfast.forward import View
from holdfast.models.substitution import called_with
from holdfast.views.split_batchnorm import SplitBatchNorm
from holdfast.views.worst_weights import WorstWeights
from parts import small_recipe
from tiny_runs import FP32, tiny_net, tiny_recipe, toy

X = torch.rand(4, 1, 8, 8)


class Named(nn.Module):
    """Its head is an attribute, and a layer of its body."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_net()
        self.norm, self.head = self.body[1], self.body[5]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Repeated(nn.Module):
    """Runs one layer several times, as ALBERT does."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(64, 64)
        self.layers = nn.ModuleList([layer, layer, layer])
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def tied_twice() -> nn.Module:
    """Two layers hold one weight, and one of them has two names."""
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight = first.weight
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), second, nn.Linear(64, 4))


KINDS: dict[str, Callable[[], nn.Module]] = {"named": Named, "repeated": Repeated, "tied twice": tied_twice}


def held(model: nn.Module) -> list[int]:
    """Which very tensors a network holds."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return [id(tensor) for _, tensor in named]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_with_two_names_keeps_its_own_weights(kind: str) -> None:
    """Torch's own functional_call puts a replacement back."""
    model = KINDS[kind]().eval()
    before = held(model)
    assert torch.equal(View(model).detached()(X).logits, model(X))
    View(model, statistics="batch")(X)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    assert not called_with(model, zeros, X).any()  # by one name of a tensor all of its places are reached
    assert held(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_gets_a_gradient_in_a_step(kind: str) -> None:
    """With a weight search and branches too."""
    model = KINDS[kind]()
    own = dict(model.named_parameters())
    recipe = small_recipe(attack=PGD(steps=1, step_size=0.05), views=(WorstWeights(), SplitBatchNorm()))
    batch = Batch(X, torch.arange(4))
    AdversarialStep(recipe, model)(batch, Progress())["loss"].backward()
    assert [name for name, parameter in own.items() if parameter.grad is None or not parameter.grad.any()] == []


def test_a_run_trains_every_weight(tmp_path: Path) -> None:
    """The weights of a layer with two names move, too."""
    model = Repeated()
    trained = fit(tiny_recipe(epochs=1), toy(), model, out=tmp_path / "run", settings=FP32).model()
    for (name, now), before in zip(trained.named_parameters(), model.parameters(), strict=True):
        assert not torch.equal(now, before), name
