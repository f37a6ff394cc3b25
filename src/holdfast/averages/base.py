"""What an average is: what happens to the weights after a step or an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.models.extra_state import is_extra
from holdfast.schedule import Progress

Reestimate = Literal["clean", "adversarial"]


class Average:
    """Keeps, moves or averages the classifier's weights. Averages of a recipe apply in their order.

    An average covers the classifier only, not what an objective trains beside it. Constructor arguments are kept under
    their own names.

    Attributes:
        writes_back: The model itself is changed (PIAT); otherwise a shadow is kept (EMA, SWA).
        reestimate: The loop re-estimates BatchNorm's running statistics of what this average wrote or exports, on
            such inputs, at every epoch's end; None where it need not. Where `SplitBatchNorm` gave clean images a branch
            of their own, that one is re-estimated on clean and the main one on adversarial images in any case.
        reestimate_images: How many training images that takes; None for all.
    """

    writes_back: bool = False
    reestimate: Reestimate | None = None
    reestimate_images: int | None = None

    def start(self, model: nn.Module) -> None:
        """Called once before the first step of a run; a resumed run calls `load_state_dict` instead."""

    def after_step(self, model: nn.Module, progress: Progress) -> None:
        """Called after every optimiser step; `progress.step` counts the steps before it."""

    def after_epoch(self, model: nn.Module, progress: Progress) -> None:
        """Called at every epoch's end, when buffers are equal on all processes; `progress` is that of the last step."""

    def exported(self) -> Mapping[str, Tensor] | None:
        """The weights that validation, "best" and export use; None for the model's own."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on after a kill: plain values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state."""


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the classifier's state, without what its modules keep beside parameters and buffers."""
    return {name: tensor for name, tensor in model.state_dict().items() if not is_extra(name)}


def mixed(old: Tensor, new: Tensor, weight: float) -> Tensor:
    """Return ``old + weight * (new - old)``, and `new` where either is infinite: attention masks are, as buffers.

    Args:
        old: Any shape.
        new: The same shape.
        weight: The share of `new`, in [0, 1].
    Example:
        >>> mixed(torch.tensor([0.0, -torch.inf]), torch.tensor([1.0, -torch.inf]), 0.25)
        tensor([0.2500,   -inf])
    """
    return torch.where(old.isfinite() & new.isfinite(), torch.lerp(old, new, weight), new)


def floating_tensors(model: nn.Module, *, buffers: bool) -> Iterator[tuple[str, Tensor]]:
    """The classifier's parameters and, where wanted, its floating-point buffers, by name."""
    yield from model.named_parameters()
    if buffers:
        yield from ((name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point())
