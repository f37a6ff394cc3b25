"""LOAT: MART with a term on clean probabilities in the first and the last epochs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.forward import Forward
from holdfast.functional import correct
from holdfast.objectives.base import Objective, require_word
from holdfast.objectives.mart import MART
from holdfast.schedule import Progress, Scalar, as_scalar, value_at

DISTANCES = ("mse", "kl")


class FisherRaoMART(Objective):
    r"""LOAT (LORE, SLORE) on MART: where clean predictions are right and where wrong, the rest of their mass is shaped.

    In the run's first epochs, with C the clean images of the batch that are classified correctly and W the others,

    .. math:: L_\mathrm{MART} + \theta\,(R_C - R_W) + \gamma A_W, \qquad
        R_S = \frac1{|S|} \sum_{i \in S} \sum_{k \ne y} \Bigl(p_k - \frac{1 - p_y}{K - 1}\Bigr)^2, \quad
        A_S = \frac1{|S|} \sum_{i \in S} \|p(x') - p(x)\|_2^2

    in its last ones :math:`\theta\,(R_W - R_C) + \gamma A_C`, and MART alone in between. With ``"kl"``
    :math:`R` averages :math:`-\log(1 - \max_{k \ne y} p_k)` and :math:`A` averages :math:`-\log(1 - |p'_j - p_j|)`,
    j the class that the adversarial logits favour.

    Args:
        beta: β of MART >= 0, or a schedule.
        strength: θ >= 0, or a schedule.
        pairing: γ >= 0, or a schedule; 0 leaves the pairing A out.
        distance: ``"mse"`` or ``"kl"``.
        early: Share of the run, from its beginning, in which the first form acts: one epoch of 110.
        late: Share of the run from which the second form acts.

    Shapes:
        clean.logits, adv.logits: (B, K) before softmax; labels (B,) or soft (B, K). Terms: (B,).
    Units:
        Nats and squared probabilities.
    Raises:
        HoldfastError: a number is negative, or the word unknown.
    Source: Yin and Ruan, CVPR 2024, arXiv:2403.17520. Reference code: TrustAI/LOAT.
    Differs from the reference: a batch without a wrong (or right) image has R = A = 0 there, where the code divides by
        zero; any number of classes; any number of rows at once. The code as published does not run: an argument is
        missing.

    Example:
        >>> FisherRaoMART().sides(Progress())
        ('clean', 'adv')
    """

    couples_batch = True
    takes_mixed_images = False

    def __init__(
        self,
        *,
        beta: Scalar = 6.0,
        strength: Scalar = 0.1,
        pairing: Scalar = 0.05,
        distance: str = "mse",
        early: float = 1 / 110,
        late: float = 99 / 110,
    ) -> None:
        super().__init__()
        require_word("distance", distance, DISTANCES)
        self.mart = MART(beta=beta)
        self.beta = self.mart.beta
        self.strength = as_scalar("strength", strength, minimum=0)
        self.pairing = as_scalar("pairing", pairing, minimum=0)
        self.distance = distance
        self.early, self.late = float(early), float(late)

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("clean", "adv")

    def forward(self, f: Forward) -> dict[str, Tensor]:
        terms = self.mart(f)
        first, last = f.progress.fraction < self.early, f.progress.fraction >= self.late
        if not first and not last:
            return terms
        clean, adv, y = f.outputs["clean"].logits, f.outputs["adv"].logits, f.batch.y
        right = correct(clean, y).to(clean.dtype)
        wrong = 1 - right
        spread = _mean_over(right, self.spread(clean, y)) - _mean_over(wrong, self.spread(clean, y))
        spread = value_at(self.strength, f.progress) * (spread if first else -spread)
        paired = _mean_over(wrong if first else right, self.change(clean, adv))
        return {**terms, "spread": spread, "pairing": value_at(self.pairing, f.progress) * paired}

    def spread(self, logits: Tensor, y: Tensor) -> Tensor:
        """r of every image, (B,): how unequal the probabilities of the wrong classes are."""
        p = logits.softmax(1)
        true_class = F.one_hot(y, logits.shape[1]).bool()
        if self.distance == "kl":
            return -torch.log1p(-p.masked_fill(true_class, 0.0).amax(1).clamp(max=1 - 1e-6))
        own = p.gather(1, y[:, None])
        return (p - (1 - own) / (logits.shape[1] - 1)).masked_fill(true_class, 0.0).pow(2).sum(1)

    def change(self, clean: Tensor, adv: Tensor) -> Tensor:
        """The distance of adversarial from clean probabilities, (B,)."""
        difference = adv.softmax(1) - clean.softmax(1)
        if self.distance == "kl":
            favoured = difference.gather(1, adv.argmax(1)[:, None])[:, 0].abs()
            return -torch.log1p(-favoured.clamp(max=1 - 1e-6))
        return difference.pow(2).sum(1)


def _mean_over(chosen: Tensor, values: Tensor) -> Tensor:
    """Rows whose mean over the batch is the mean of the values over the chosen rows (0 where none is chosen)."""
    return chosen * values * len(values) / chosen.sum().clamp_min(1)
