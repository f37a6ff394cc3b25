"""NMSE: squared distance between normalised clean and adversarial logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from holdfast.forward import Forward
from holdfast.functional import cross_entropy, probability_of
from holdfast.objectives.base import Objective
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


class NormalizedMSE(Objective):
    r"""NMSE: adversarial cross-entropy, and alignment of the direction of clean and adversarial logits.

    .. math::
        \mathrm{CE}(f(x'), t) + \mu\,(1 - p_y(x))
        \left\| \frac{f(x)}{\|f(x)\|_2} - \frac{f(x')}{\|f(x')\|_2} \right\|_2^2

    The squared distance is :math:`2(1 - \cos(f(x), f(x')))`: it lies in [0, 4] and ignores the scale of the logits.

    Args:
        strength: μ >= 0, or a schedule; the paper uses 5.
        detach_weight: Let no gradient through the weight :math:`1 - p_y(x)`.

    Shapes:
        clean.logits, adv.logits: (B, K) before softmax; labels (B,) or soft (B, K). Terms: (B,).
    Units:
        Nats for the cross-entropy; the distance has none.
    Raises:
        HoldfastError: strength is negative.
    Source: PIAT, ICML 2023 workshop, arXiv:2303.13955, eq. (5) and (6). No public code of the authors is known.
    Differs from the reference: the paper's p_clean is read as the probability of the true class; gradient flows
        through both sides and through the weight, as the formula stands; norms below 1e-12 are raised to it.

    Example:
        >>> NormalizedMSE(strength=5.0).sides(Progress())
        ('clean', 'adv')
    """

    zero_at_equality = ("nmse",)

    def __init__(self, *, strength: Scalar = 5.0, detach_weight: bool = False) -> None:
        super().__init__()
        self.strength = as_scalar("strength", strength, minimum=0)
        self.detach_weight = detach_weight

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("clean", "adv") if value_at(self.strength, progress) > 0 else ("adv",)

    def forward(self, f: Forward) -> dict[str, Tensor]:
        adv = f.outputs["adv"].logits
        terms = {"adv_ce": cross_entropy(adv, f.batch.labels)}
        if "clean" not in f.outputs:
            return terms
        clean = f.outputs["clean"].logits
        weight = 1 - probability_of(clean, f.batch.y)
        if self.detach_weight:
            weight = weight.detach()
        distance = (F.normalize(clean, dim=1) - F.normalize(adv, dim=1)).pow(2).sum(1)
        return {**terms, "nmse": value_at(self.strength, f.progress) * weight * distance}
