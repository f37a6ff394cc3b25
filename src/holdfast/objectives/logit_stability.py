"""ISEAT: logits that stay put under input and weight perturbation, most of all where an image is vulnerable."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.forward import Forward
from holdfast.functional import cross_entropy, kl, rank_weight
from holdfast.objectives.base import Objective, require_word
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


class LogitStability(Objective):
    r"""ISEAT's loss; with `WorstWeights` on the adversarial side, f(x') is taken at θ + ν (LSIW).

    .. math:: \mathrm{CE}(f(x'), t) + \lambda\,w_i\,\|f(x') - f(x)\|_2^2, \qquad
        w_i = 1 - \frac{r(\mathrm{AV}_i)}{m}, \quad \mathrm{AV}_i = \mathrm{CE}(f(x'), t)_i - \mathrm{CE}(f(x), t)_i

    r ranks from 0 for the most vulnerable of the m rows. Without weight perturbation it is the paper's input loss
    smoothing; ``weights="top"`` without it is eq. (7); with `WorstWeights` on both sides it is the paper's TRADES-AWP.

    Args:
        strength: λ >= 0, or a schedule (in the paper 0 until the learning rate first drops).
        weights: ``"linear"`` by rank; ``"top"``, 1 for the most vulnerable `top_share`, else 0; ``"uniform"``, 1.
        top_share: Share in (0, 1] of the rows that count under ``"top"``, rounded up.
        distance: ``"squared_l2"`` between logits, or ``"kl"``, KL(p(x) || p(x')).
        compared: The side whose logits are held to the clean ones: ``"adv"``, or ``"adv_unperturbed"``, adversarial
            images at θ while the cross-entropy stays at θ + ν (the paper's LSI, as we infer it).

    Shapes:
        Logits: (B, K) before softmax; labels (B,) or soft (B, K). Terms: (B,). Rows are ranked within the batch.
    Units:
        Nats; squared logits.
    Raises:
        HoldfastError: a setting is out of range.
    Source: Li and Spratling (ISEAT), eq. (7), (13) to (15), tables 8 and 9. Reference code: TreeLLi/ISEAT.
    Differs from the reference: clean logits are taken at x, as the paper says (the code adds noise on request).

    Example:
        >>> LogitStability(strength=0.1).sides(Progress())
        ('clean', 'adv')
    """

    couples_batch = True
    zero_at_equality = ("stability",)

    def __init__(
        self,
        *,
        strength: Scalar = 0.1,
        weights: Literal["linear", "top", "uniform"] = "linear",
        top_share: float = 0.1,
        distance: Literal["squared_l2", "kl"] = "squared_l2",
        compared: Literal["adv", "adv_unperturbed"] = "adv",
    ) -> None:
        super().__init__()
        self.strength = as_scalar("strength", strength, minimum=0)
        require_word("weights", weights, ("linear", "top", "uniform"))
        require_word("distance", distance, ("squared_l2", "kl"))
        require_word("compared", compared, ("adv", "adv_unperturbed"))
        if not 0 < top_share <= 1:
            raise HoldfastError(f"top_share is {top_share}: it is a share of the batch, give a number in (0, 1]")
        self.weights, self.top_share, self.distance, self.compared = weights, top_share, distance, compared

    def sides(self, progress: Progress) -> tuple[str, ...]:
        if value_at(self.strength, progress) == 0:
            return ("adv",)
        return ("clean", "adv") if self.compared == "adv" else ("clean", "adv", "adv_unperturbed")

    def forward(self, f: Forward) -> dict[str, Tensor]:
        adv_ce = cross_entropy(f.outputs["adv"].logits, f.batch.labels)
        if "clean" not in f.outputs:
            return {"adv_ce": adv_ce}
        clean, compared = f.outputs["clean"].logits, f.outputs[self.compared].logits
        weight = self.weight((adv_ce - cross_entropy(clean, f.batch.labels)).detach())
        distance = kl(clean, compared) if self.distance == "kl" else (compared - clean).pow(2).sum(1)
        return {"adv_ce": adv_ce, "stability": value_at(self.strength, f.progress) * weight * distance}

    def weight(self, vulnerability: Tensor) -> Tensor:
        """w of every row, (B,), from its adversarial vulnerability."""
        if self.weights == "uniform":
            return torch.ones_like(vulnerability)
        linear = rank_weight(vulnerability)
        if self.weights == "linear":
            return linear
        rows = len(vulnerability)
        count = math.ceil(self.top_share * rows - 1e-9)  # 0.07 of 100 rows are 7, whatever binary fractions say
        return (linear > 1 - (count - 0.5) / max(1, rows)).to(linear.dtype)
