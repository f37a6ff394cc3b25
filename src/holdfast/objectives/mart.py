"""MART: boosted cross-entropy, and a KL term weighted by how wrong the clean prediction is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.forward import Forward
from holdfast.functional import cross_entropy, kl, probability_of
from holdfast.objectives.base import Objective
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


class MART(Objective):
    r"""Misclassification-aware adversarial training: boosted cross-entropy, and KL weighted by clean mistakes.

    .. math:: \mathrm{CE}(f(x'), t) - \log\Bigl(1 - \max_{k \ne y} p_k(x')\Bigr)
        + \beta\,\mathrm{KL}(p(x)\,\|\,p(x'))\,(1 - p_y(x))

    Args:
        beta: β >= 0, or a schedule; 5 for ResNet-18, 6 for wide networks.

    Shapes:
        clean.logits, adv.logits: (B, K) before softmax; labels (B,) or soft (B, K). Terms: (B,).
    Units:
        Nats.
    Raises:
        HoldfastError: beta is negative.
    Source: Wang et al., ICLR 2020, eq. (8) to (11). Reference code: YisenWang/MART.
    Differs from the reference: KL by log-softmax, where the code adds 1e-12 to probabilities, which bounds it. Like it,
        the logarithm reads 1.0001 - p + 1e-12 and the weight 1.0000001 - p. Soft labels enter the cross-entropy alone.

    Example:
        >>> MART(beta=5.0).sides(Progress())
        ('clean', 'adv')
    """

    zero_at_equality = ("weighted_kl",)

    def __init__(self, *, beta: Scalar = 5.0) -> None:
        super().__init__()
        self.beta = as_scalar("beta", beta, minimum=0)

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("clean", "adv") if value_at(self.beta, progress) > 0 else ("adv",)

    def forward(self, f: Forward) -> dict[str, Tensor]:
        adv, y = f.outputs["adv"].logits, f.batch.y
        true_class = F.one_hot(y, adv.shape[1]).bool()
        runner_up = adv.softmax(1).masked_fill(true_class, 0.0).amax(1)
        boosted = cross_entropy(adv, f.batch.labels) - torch.log(1.0001 - runner_up + 1e-12)
        if "clean" not in f.outputs:
            return {"boosted_ce": boosted}
        clean = f.outputs["clean"].logits
        weight = 1.0000001 - probability_of(clean, y)
        return {"boosted_ce": boosted, "weighted_kl": value_at(self.beta, f.progress) * weight * kl(clean, adv)}
