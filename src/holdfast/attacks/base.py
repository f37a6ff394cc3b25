"""What an attack is: the search for an image in the ball at which the network's loss is large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.forward import Attacked, Batch, Statistics, View
from holdfast.schedule import Progress
from holdfast.threat import ThreatModel

InnerLoss = Callable[[Tensor], Tensor]
"""Logits (B, K) to the loss (B,) that the attack maximises."""


@runtime_checkable
class Attack(Protocol):
    """Finds adversarial images.

    The design's order of arguments (view, batch, inner loss) is kept; the ball and the progress follow, because steps
    are measured by the ball and keyed noise and scheduled steps by the progress.
    """

    @property
    def statistics(self) -> Statistics:
        """How BatchNorm normalises during the search."""
        ...

    def __call__(
        self, view: View, batch: Batch, inner_loss: InnerLoss, *, threat: ThreatModel, progress: Progress
    ) -> Attacked: ...

    def passes(self) -> float:
        """Cost of one search in forward passes (a backward to the input costs one)."""
        ...


def input_gradient(view: View, x: Tensor, inner_loss: InnerLoss) -> tuple[Tensor, Tensor]:
    """The gradient of the loss with respect to the pixels alone, and the logits.

    The view's weights must carry no gradient (`View.detached`): then the engine computes none for them, and no
    ``.grad`` is written.

    Shapes:
        x: (B, C, H, W). Returns that shape, and (B, K).
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = view(x).logits
        (gradient,) = torch.autograd.grad(inner_loss(logits).sum(), x)
    return gradient, logits.detach()


def require_steepest(threat: ThreatModel, attack: str) -> None:
    """Refuse a norm for which the attack's step is not meant."""
    if threat.norm == "L1":
        raise HoldfastError(f"{attack} has no step for L1: use Linf or L2")
