"""Which modules stay in evaluation mode while a network is trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from holdfast.models.modes import kept_in_evaluation, with_added


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))


def network() -> nn.Sequential:
    return nn.Sequential(block(), nn.Sequential(block(), nn.Flatten(), nn.Linear(4 * 64, 5)))


class OwnTrain(nn.Sequential):
    """Keeps BatchNorm in evaluation mode, as is usual in fine-tuning."""

    def train(self, mode: bool = True) -> OwnTrain:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def freeze(module: nn.Module) -> None:
    module.eval().requires_grad_(False)


def own_train_patched(model: nn.Sequential) -> None:
    """A `train` that is set on the object."""

    def train(mode: bool = True) -> nn.Module:
        nn.Module.train(model, mode)
        model[0].eval()
        return model

    model.train = train


STATES: dict[str, tuple[Callable[[nn.Sequential], object], set[str]]] = {
    "new": (lambda m: None, set()),
    "loaded: wholly in evaluation mode": (lambda m: m.eval(), set()),
    "one BatchNorm frozen": (lambda m: freeze(m[0][1]), {"0.1"}),
    "one BatchNorm frozen in a loaded network": (lambda m: (m.eval(), freeze(m[0][1])), {"0.1"}),
    "weights frozen alone": (lambda m: m[0][1].requires_grad_(False), set()),
    "statistics frozen, weights trained": (lambda m: m[0][1].eval(), {"0.1"}),
    "dropout switched off": (lambda m: m[0][3].eval(), {"0.3"}),
    "a frozen backbone": (lambda m: freeze(m[0]), {"0", "0.0", "0.1", "0.2", "0.3"}),
    "a frozen backbone, its BatchNorm trained": (lambda m: (freeze(m[0]), m[0][1].train()), {"0", "0.0", "0.2", "0.3"}),
    "a frozen backbone in a loaded network": (lambda m: (m.eval(), freeze(m[0])), {"0.1"}),
    "a part that was loaded": (lambda m: m[0].eval(), set()),
    "parts that were loaded, in a new container": (lambda m: [part.eval() for part in m], set()),
}


@pytest.mark.parametrize("state", STATES)
def test_what_the_flags_say(state: str) -> None:
    prepare, expected = STATES[state]
    model = network()
    prepare(model)
    flags = [module.training for module in model.modules()]
    assert kept_in_evaluation(model) == expected
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("given", ["train", "eval", "new"])
def test_a_train_of_the_networks_own(given: str) -> None:
    model = OwnTrain(*network())
    if given != "new":
        getattr(model, given)()
    flags = [module.training for module in model.modules()]
    assert kept_in_evaluation(model) == {"0.1", "1.0.1"}
    assert [module.training for module in model.modules()] == flags


def test_a_train_of_a_part_and_of_an_object() -> None:
    model = nn.Sequential(OwnTrain(*block()), block(), block())
    own_train_patched(model[2])
    assert kept_in_evaluation(model.eval()) == {"0.1", "2.0"}


def test_normalisation_without_weights_is_frozen_with_what_it_belongs_to() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False)), nn.Flatten(), nn.Linear(4, 5)
    )
    assert kept_in_evaluation(model.eval()) == set()
    model[0].requires_grad_(False)
    assert kept_in_evaluation(model) == {"0.1"}


def test_what_was_added_below_follows() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU()))
    before = [name for name, _ in model.named_modules()]
    for part in model:
        part.add_module("aux", nn.ReLU())
    assert with_added(frozenset({"1"}), before, model) == {"1", "1.aux"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript() -> None:
    example = torch.rand(2, 1, 8, 8)
    traced = torch.jit.trace(block().eval(), example)
    assert kept_in_evaluation(traced) == set()
    assert kept_in_evaluation(torch.jit.freeze(traced)) == set()
