"""PGD-AT: cross-entropy on adversarial images."""

from __future__ import annotations

from torch import Tensor

from holdfast.forward import Forward
from holdfast.functional import cross_entropy
from holdfast.objectives.base import Objective


class AdversarialTraining(Objective):
    r"""Cross-entropy on adversarial images (PGD-AT, with PGD as the attack).

    .. math:: \min_\theta \sum_i \max_{x'_i \in B(x_i)} \mathrm{CE}(f_\theta(x'_i), t_i)

    Shapes:
        adv.logits: (B, K) before softmax; labels (B,) or soft (B, K). Terms: (B,).
    Units:
        Nats.
    Raises:
        Nothing of its own.
    Source: Madry et al., ICLR 2018, arXiv:1706.06083, eq. (2.1).
    Differs from the reference: the attack runs under running statistics unless `PGD.statistics` says otherwise.

    Example:
        >>> AdversarialTraining().couples_batch
        False
    """

    def forward(self, f: Forward) -> dict[str, Tensor]:
        return {"adv_ce": cross_entropy(f.outputs["adv"].logits, f.batch.labels)}
