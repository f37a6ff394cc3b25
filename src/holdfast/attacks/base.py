"""What an attack is: the search for an image in the ball at which the network's loss is large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.forward import STATISTICS, Attacked, Batch, Statistics, View
from holdfast.keyed_random import Key
from holdfast.schedule import Progress, Scalar, as_scalar
from holdfast.threat import ThreatModel, parse_epsilon

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


class AttackWithMemory(nn.Module):
    """An attack that remembers something from step to step, in buffers: they are checkpointed with the run.

    It writes to its memory in training mode only (`nn.Module.eval` makes it read alone). Constructor arguments are kept
    under their own names.

    Attributes:
        statistics: How BatchNorm normalises during the search.
        makes: Sides for which it makes images beside x_adv, in `Attacked.others`.
    """

    statistics: Statistics = "eval"
    makes: Sequence[str] = ()

    def prepare(self, model: nn.Module, x: Tensor, images: int) -> None:
        """Called once before training, with a few images and the number of training images: make the memory."""

    def after_epoch(self, progress: Progress) -> None:
        """Called at every epoch's end on all processes: make the memory equal on them."""

    def passes(self) -> float:
        """Cost of one search in forward passes (a backward to the input costs one)."""
        raise NotImplementedError  # every attack states its own

    def forward(
        self, view: View, batch: Batch, inner_loss: InnerLoss, *, threat: ThreatModel, progress: Progress
    ) -> Attacked:
        """The search; see `Attack`."""
        raise NotImplementedError  # every attack states its own


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


def draw_key(purpose: str, batch: Batch, progress: Progress) -> Key:
    """The key of an attack's draw; rows without identity draw anew at least in every step."""
    key = progress.key(purpose)
    return key.fold(progress.step) if batch.index is None else key


def loss_of_rows(inner_loss: InnerLoss, rows: Tensor, count: int) -> InnerLoss:
    """The loss of some of the batch's rows: their logits are laid among constants, which carry no gradient."""

    def loss(logits: Tensor) -> Tensor:
        everyone = logits.new_zeros(count, logits.shape[1]).index_copy(0, rows, logits)
        return inner_loss(everyone)[rows]

    return loss


def checked_step_size(value: Scalar | str | None) -> Scalar | None:
    """A step size as a number or a schedule; text such as ``2/255`` is read, None is left for the attack's own.

    Raises:
        HoldfastError: negative, no number, or a bare number above 1.
    """
    if isinstance(value, str):
        value = parse_epsilon(value)
    if value is None:
        return None
    checked = as_scalar("step_size", value, minimum=0)
    if isinstance(checked, float):
        parse_epsilon(checked)
    return checked


def checked_statistics(value: Statistics) -> Statistics:
    """The word itself.

    Raises:
        HoldfastError: it is none of `STATISTICS`.
    """
    if value not in STATISTICS:
        raise HoldfastError(f"statistics {value!r} is unknown: use one of {', '.join(STATISTICS)}")
    return value


def require_steepest(threat: ThreatModel, attack: str) -> None:
    """Refuse a norm for which the attack's step is not meant."""
    if threat.norm == "L1":
        raise HoldfastError(f"{attack} has no step for L1: use Linf or L2")
