"""GAT: one-step training guided by the distance of probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.attacks.base import InnerLoss
from holdfast.forward import Batch, Forward, View
from holdfast.functional import cross_entropy
from holdfast.objectives.base import Objective
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


class GuidedAdversarial(Objective):
    r"""GAT: clean cross-entropy, and the squared distance of adversarial from clean probabilities.

    .. math:: \mathrm{CE}(f(x), t) + \lambda\,\|p(x') - p(x)\|_2^2

    Every second step's attack climbs :math:`\mathrm{CE}(f(\cdot), y) + \lambda\,\|p(\cdot) - p(x)\|_2^2`, the others
    the cross-entropy alone.

    Args:
        strength: λ >= 0, or a schedule; 10, and 40 for the last 15 % of the run, on CIFAR-10.

    Shapes:
        clean.logits, adv.logits: (B, K) before softmax; labels (B,) or soft (B, K). Terms: (B,).
    Units:
        Nats and squared probabilities.
    Raises:
        HoldfastError: strength is negative.
    Source: Sriramanan et al., NeurIPS 2020, arXiv:2011.14969. Reference code: val-iisc/GAMA-GAT.
    Differs from the reference: the attack's clean probabilities are those of the attack's own view (evaluation
        statistics), a forward of their own in every second step; there they are those of the training forward. Every
        second step is counted over the run, there anew in every epoch.

    Example:
        >>> GuidedAdversarial().sides(Progress())
        ('adv', 'clean')
    """

    zero_at_equality = ("distance",)

    def __init__(self, *, strength: Scalar = 10.0) -> None:
        super().__init__()
        self.strength = as_scalar("strength", strength, minimum=0)

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("adv", "clean")

    def guides(self, progress: Progress) -> bool:
        """Whether this step's attack is guided."""
        return progress.step % 2 == 1 and value_at(self.strength, progress) > 0

    def inner_loss(self, view: View, batch: Batch, progress: Progress) -> InnerLoss:
        if not self.guides(progress):
            return super().inner_loss(view, batch, progress)
        with torch.no_grad():
            clean = view(batch.x).logits.softmax(1)
        strength = value_at(self.strength, progress)

        def guided(logits: Tensor) -> Tensor:
            return cross_entropy(logits, batch.attacked_labels) + strength * (logits.softmax(1) - clean).pow(2).sum(1)

        return guided

    def inner_passes(self, progress: Progress) -> float:
        return float(self.guides(progress))

    def forward(self, f: Forward) -> dict[str, Tensor]:
        clean, adv = f.outputs["clean"].logits, f.outputs["adv"].logits
        distance = (adv.softmax(1) - clean.softmax(1)).pow(2).sum(1)
        return {
            "clean_ce": cross_entropy(clean, f.batch.labels),
            "distance": value_at(self.strength, f.progress) * distance,
        }
