"""The attack of STAT: one image is made less certain and another more certain, each against the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.attacks.base import InnerLoss, checked_statistics, checked_step_size, draw_key, require_steepest
from holdfast.attacks.pgd import NORMAL_START
from holdfast.errors import HoldfastError
from holdfast.forward import Attacked, Batch, Statistics, View
from holdfast.functional import correct, extremes, symmetric_kl
from holdfast.keyed_random import normal
from holdfast.schedule import Progress, Scalar, value_at
from holdfast.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class CollaborativePGD:
    r"""STAT's search: adversarial and collaborative image climb their own symmetric KL divergence together.

    In every step, of the image x, the collaborative point and the adversarial one, the point with the smallest
    :math:`p_y` becomes the adversarial one and the point with the largest the collaborative one (x itself may become
    either). Both then take a step that raises

    .. math:: \tfrac12 \mathrm{KL}(\mathrm{sg}(p_a)\,\|\,p_c) + \tfrac12 \mathrm{KL}(\mathrm{sg}(p_c)\,\|\,p_a)

    and are projected into the ball. The inner loss of the objective is not used.

    Args:
        steps: K >= 1.
        step_size: α in pixel scale, or a schedule; None is a quarter of epsilon.
        statistics: How BatchNorm normalises during the search; see `View`.

    Shapes:
        x: (B, C, H, W); steps_survived: (B,) of the adversarial point. `Attacked.others` holds "collaborative".
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: a setting is out of range, or the norm is L1.
    Source: Li et al., ICLR 2023 (Squeeze Training for Adversarial Robustness), arXiv:2205.11156. Reference code:
        qizhangli/ST-AT.
    Differs from the reference: running statistics of BatchNorm by default (``"batch"`` repeats its code); noise is
        keyed; points and gradients always change roles together, which its code forgets where x plays none.

    Example:
        >>> CollaborativePGD(steps=10).passes()
        60.0
    """

    steps: int = 10
    step_size: Scalar | str | None = None
    statistics: Statistics = "eval"

    makes = ("collaborative",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", checked_step_size(self.step_size))
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise HoldfastError(f"steps is {self.steps!r}: give a whole number of at least 1")
        checked_statistics(self.statistics)

    def passes(self) -> float:
        """Three forwards and three backwards to the input a step."""
        return 6.0 * self.steps

    def __call__(
        self,
        view: View,
        batch: Batch,
        inner_loss: InnerLoss,
        *,
        threat: ThreatModel,
        progress: Progress | None = None,
    ) -> Attacked:
        require_steepest(threat, "CollaborativePGD")
        progress = progress or Progress()
        view = view.running(self.statistics).detached()
        step_size = threat.epsilon / 4 if self.step_size is None else value_at(self.step_size, progress)  # type: ignore[arg-type]  # no text
        x, y = batch.x.detach(), batch.y
        key = draw_key("attack start", batch, progress)
        starts = [
            threat.project(x + NORMAL_START * normal(key.fold(name), batch.rows, x.shape[1:], dtype=x.dtype), x)
            for name in ("collaborative", "adversarial")
        ]
        collaborative, adversarial = starts
        survived = torch.zeros_like(y)
        for _ in range(self.steps):
            points, gradients, logits = self.climb(view, (x, collaborative, adversarial), y)
            survived += correct(logits[2], y)
            adversarial, collaborative = (
                threat.project(point + step_size * threat.steepest(gradient), x)
                for point, gradient in zip(points, gradients, strict=True)
            )
        return Attacked(adversarial.detach(), survived, self.steps, {"collaborative": collaborative.detach()})

    def climb(
        self, view: View, points: tuple[Tensor, ...], y: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The points of smallest and of largest p_y, the gradients of their divergence there, and all logits."""
        with torch.enable_grad():
            leaves = [point.detach().requires_grad_(True) for point in points]
            logits = [view(leaf).logits for leaf in leaves]
            low, high = extremes(logits, y)
            value = symmetric_kl(pick(logits, low), pick(logits, high), detach=True).sum()
            gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        found = [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(leaves, gradients, strict=True)
        ]
        chosen = [pick([leaf.detach() for leaf in leaves], which) for which in (low, high)]
        return chosen, [pick(found, which) for which in (low, high)], [each.detach() for each in logits]


def pick(choices: list[Tensor], which: Tensor) -> Tensor:
    """Row by row, one of several tensors of one shape.

    Shapes:
        which: (B,) position among the choices, each (B, ...). Returns (B, ...).
    """
    mask = which.view(-1, *[1] * (choices[0].dim() - 1))
    result = choices[0]
    for number, choice in enumerate(choices[1:], 1):
        result = torch.where(mask == number, choice, result)
    return result
