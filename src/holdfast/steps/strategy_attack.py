"""The attack whose settings a strategy network chooses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.attacks.base import InnerLoss, draw_key
from holdfast.attacks.rowwise_pgd import rowwise_pgd
from holdfast.forward import Attacked, Batch, Statistics, View
from holdfast.schedule import Progress
from holdfast.steps.strategy_network import StrategyNetwork, draw
from holdfast.threat import ThreatModel


class StrategyAttack:
    r"""PGD whose radius, number of steps and step size the strategy network draws for every image.

    .. math:: (\epsilon_i, K_i, \alpha_i) \sim p_w(\cdot \mid x_i)

    Args:
        strategy: The network.
        epsilons: Radii of its first head, as multiples of the threat model's epsilon.
        steps: Numbers of steps of its second head.
        step_sizes: Step sizes of its third, as multiples of the same.

    Shapes:
        As `rowwise_pgd`.
    Units:
        Multiples of a radius in pixel scale.
    Raises:
        HoldfastError: the norm is L1.
    Source: Jia et al., CVPR 2022, arXiv:2203.06616.
    Differs from the reference: the draw is keyed by seed, epoch and image. See also `rowwise_pgd`.

    Example:
        >>> StrategyAttack(StrategyNetwork((1, 2, 1), width=2), [1.0], [4, 6], [0.25]).passes()
        10.0
    """

    statistics: Statistics = "eval"

    def __init__(
        self, strategy: StrategyNetwork, epsilons: Sequence[float], steps: Sequence[int], step_sizes: Sequence[float]
    ) -> None:
        self.strategy = strategy
        self.epsilons, self.steps, self.step_sizes = tuple(epsilons), tuple(steps), tuple(step_sizes)

    def passes(self) -> float:
        """As if all numbers of steps were equally likely: a forward and a backward to the input for each."""
        return 2.0 * sum(self.steps) / len(self.steps)

    def logits(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the strategy network says of these images, always in its weights' own precision."""
        with torch.autocast(batch.x.device.type, enabled=False):
            return self.strategy(batch.x.detach())

    def chosen(self, logits: Sequence[Tensor], batch: Batch, progress: Progress) -> Tensor:
        """The places (B, 3) of what is chosen; equal arguments choose the same."""
        return draw(logits, draw_key("attack strategy", batch, progress), batch.rows)

    def meant(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Radii as multiples, numbers of steps, and step sizes as multiples, (B,) each."""
        of, device = torch.float64, chosen.device
        return (
            torch.tensor(self.epsilons, dtype=of, device=device)[chosen[:, 0]],
            torch.tensor(self.steps, device=device)[chosen[:, 1]],
            torch.tensor(self.step_sizes, dtype=of, device=device)[chosen[:, 2]],
        )

    def __call__(
        self, view: View, batch: Batch, inner_loss: InnerLoss, *, threat: ThreatModel, progress: Progress
    ) -> Attacked:
        with torch.no_grad():
            radius, steps, step_size = self.meant(self.chosen(self.logits(batch), batch, progress))
        return rowwise_pgd(
            view,
            batch,
            inner_loss,
            threat=threat,
            radius=threat.epsilon * radius,
            steps=steps,
            step_size=threat.epsilon * step_size,
            key=draw_key("attack start", batch, progress),
        )
