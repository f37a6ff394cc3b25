"""GAIRAT: adversarial cross-entropy weighted by how soon the attack succeeds."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.forward import Forward
from holdfast.functional import cross_entropy
from holdfast.objectives.base import Objective
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


class GeometryWeighted(Objective):
    r"""GAIRAT: images that the attack flips early weigh more than those that hold for all its steps.

    .. math:: \frac{\omega_i}{\bar\omega}\,\mathrm{CE}(f(x'_i), t_i), \qquad
        \omega_i = \frac{1 + \tanh\bigl(\Lambda + 5\,(1 - 2\kappa_i / K)\bigr)}{2}

    with :math:`\kappa_i \in 0 \dots K` the number of iterates, the start included, that are still classified correctly,
    and :math:`\bar\omega` the mean over the batch.

    Args:
        shift: Λ, or a schedule; -1 in the paper.
        begin: Share of the run after which images are weighted; before it all weigh the same.

    Shapes:
        adv.logits: (B, K) before softmax; labels (B,) or soft (B, K). Terms: (B,).
    Units:
        Nats.
    Raises:
        HoldfastError: begin is negative. A recipe whose attack takes one step is refused: κ cannot tell images
            apart.
    Source: Zhang et al., ICLR 2021, arXiv:2010.01736. Reference code:
        zjfheart/Geometry-aware-Instance-reweighted-Adversarial-Training.
    Differs from the reference: K / 2 is not rounded down where K is odd; epochs are counted from 0; ω is not changed by
        a further "piecewise" schedule of Λ, which its code cannot reach. PGD flatters this method: its gradients are
        masked (published: PGD-20 57.8 %, AutoAttack about 40 %).

    Example:
        >>> GeometryWeighted().weights(torch.tensor([0, 10]), 10).round(decimals=2).tolist()
        [2.0, 0.0]
    """

    couples_batch = True
    least_attack_steps = 2

    def __init__(self, *, shift: Scalar = -1.0, begin: float = 0.5) -> None:
        super().__init__()
        self.shift = as_scalar("shift", shift)
        self.begin = float(as_scalar("begin", begin, minimum=0))  # type: ignore[arg-type]  # a number, never a schedule

    def weights(self, survived: Tensor, steps: int, shift: float = -1.0) -> Tensor:
        """ω over its mean, (B,), for the numbers of survived steps."""
        share = survived.double() / max(1, steps)
        weight = torch.sigmoid(2 * (shift + 5 * (1 - 2 * share)))  # (1 + tanh) / 2 without its cancellation
        return weight / weight.mean()

    def forward(self, f: Forward) -> dict[str, Tensor]:
        loss = cross_entropy(f.outputs["adv"].logits, f.batch.labels)
        if f.progress.fraction < self.begin or f.attacked is None:
            return {"adv_ce": loss}
        weight = self.weights(f.attacked.steps_survived, f.attacked.steps, value_at(self.shift, f.progress))
        return {"weighted_ce": weight.to(loss.dtype) * loss}

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("adv",)
