"""What a module keeps beside its tensors: what can be saved, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast import HoldfastError
from holdfast.models.extra_state import parted, require_savable, with_extra


class Keeps(nn.Module):
    """A linear layer that keeps a value."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 4)
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


@pytest.mark.parametrize("value", [None, True, 3, 2.5, "text", [1, [2.0, None]], {"a": {"b": [1]}}, {}])
def test_plain_values_can_be_saved(value: Any) -> None:
    """They are parted from the tensors."""
    model = nn.Sequential(Keeps(value))
    require_savable(model)
    tensors, values = parted(model.state_dict())
    assert values == {"0._extra_state": value}
    assert list(tensors) == ["0.layer.weight", "0.layer.bias"]


def test_a_tensor_is_saved_with_the_weights() -> None:
    """However many numbers it has."""
    tensors, values = parted(Keeps(torch.ones(3)).state_dict())
    assert "_extra_state" in tensors
    assert values == {}


@pytest.mark.parametrize(
    "value",
    [(1, 2), {1: 2}, [(1,)], {"a": torch.ones(1)}, object(), float("nan"), [float("inf")], b"x", 10**50, "x" * 2**21],
)
def test_other_values_are_refused(value: Any) -> None:
    """As soon as JSON would not give back the very same."""
    with pytest.raises(HoldfastError, match=r"^get_extra_state of body returns a \w+ that a run cannot save: return"):
        require_savable(_named(Keeps(value)))


def _named(inside: nn.Module) -> nn.Module:
    model = nn.Module()
    model.body = inside
    return model


def test_both_functions_are_needed() -> None:
    """Saved without a way back it would be lost."""

    class Half(Keeps):
        set_extra_state = nn.Module.set_extra_state

    with pytest.raises(HoldfastError, match=r"^the model \(Half\) has get_extra_state but no set_extra_state"):
        require_savable(Half(1))


def test_an_average_gets_the_models_own() -> None:
    """As a copy: a module may keep the very object that it is given."""
    model = Keeps({"count": [1]})
    average = {name: torch.zeros_like(tensor) for name, tensor in parted(model.state_dict())[0].items()}
    whole = with_extra(average, model)
    assert whole["_extra_state"] == {"count": [1]}
    assert whole["_extra_state"] is not model.kept
    assert whole["layer.bias"] is average["layer.bias"]
    assert with_extra({**average, "_extra_state": 5}, model)["_extra_state"] == 5
