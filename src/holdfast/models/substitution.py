"""Running a network with other weights than its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def called_with(model: nn.Module, state: Mapping[str, Tensor], x: Tensor) -> Any:
    """Return what a network computes with other parameters and buffers in place of its own, which stay as they are.

    `torch.func.functional_call` alone is not enough. Where one layer has two names (``self.fc`` and ``self.net[3]``),
    torch replaces its weights twice, takes the first replacement for the layer's own, and puts that back: from then on
    the layer holds tensors that no optimiser knows.

    Args:
        model: Any network.
        state: Tensors by name. One name is enough for a tensor or a layer that has several.
        x: What the network is called with.
    Shapes:
        x: (B, C, H, W).
    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> called_with(model, {"1.bias": torch.ones(2), "1.weight": torch.zeros(2, 4)}, torch.rand(1, 1, 2, 2))
        tensor([[1., 1.]])
    """
    return torch.func.functional_call(model, _each_place_once(model, state), (x,), tie_weights=False)


def _each_place_once(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state by names of which each stands for another place, for all places that hold a tensor that it replaces."""
    held: dict[str, int] = {}  # by every name
    places: dict[int, dict[tuple[int, str], str]] = {}  # by tensor: where it is held, and the first name of that place
    for prefix, module in model.named_modules(remove_duplicate=False):
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    name = f"{prefix}.{key}" if prefix else key
                    held[name] = id(tensor)
                    places.setdefault(id(tensor), {}).setdefault((id(module), key), name)
    once: dict[str, Tensor] = {}
    for name, tensor in state.items():
        names = places[held[name]].values() if name in held else (name,)
        once.update(dict.fromkeys(names, tensor))
    return once
