"""SCORE: squared distances of probabilities in place of cross-entropy and KL."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.attacks.base import InnerLoss
from holdfast.forward import Batch, Forward, View
from holdfast.objectives.base import Objective
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


class SquaredProbabilities(Objective):
    r"""SCORE: the Brier score on clean images, and the squared distance between clean and adversarial probabilities.

    .. math:: \|p(x) - t\|_2^2 + \beta\,\max\bigl(0, \|p(x') - p(x)\|_2^2 - c\bigr), \qquad
        x' = \arg\max_{B(x)} \|p(x') - p(x)\|_2^2

    Args:
        beta: β >= 0, or a schedule; 3 to 4 in the paper's scripts.
        clip: c >= 0, or a schedule: distances up to it are free.

    Shapes:
        clean.logits, adv.logits: (B, K) before softmax; labels (B,) or soft (B, K). Terms: (B,).
    Units:
        Squared probabilities; each distance lies in [0, 2].
    Raises:
        HoldfastError: beta or clip is negative.
    Source: Pang et al., ICML 2022, arXiv:2202.10103. Reference code: P2333/SCORE.
    Differs from the reference: any number of classes; the attack's clean prediction is computed once.

    Example:
        >>> SquaredProbabilities(beta=4.0).sides(Progress())
        ('clean', 'adv')
    """

    zero_at_equality = ("distance",)
    needs_random_start = True

    def __init__(self, *, beta: Scalar = 4.0, clip: Scalar = 0.0) -> None:
        super().__init__()
        self.beta = as_scalar("beta", beta, minimum=0)
        self.clip = as_scalar("clip", clip, minimum=0)

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("clean", "adv") if value_at(self.beta, progress) > 0 else ("clean",)

    def inner_loss(self, view: View, batch: Batch, progress: Progress) -> InnerLoss:
        with torch.no_grad():
            clean = view(batch.x).logits.softmax(1)
        return lambda logits: (logits.softmax(1) - clean).pow(2).sum(1)

    def inner_passes(self, progress: Progress) -> float:
        return 1.0

    def forward(self, f: Forward) -> dict[str, Tensor]:
        p = f.outputs["clean"].logits.softmax(1)
        target = f.batch.labels if f.batch.target is not None else F.one_hot(f.batch.y, p.shape[1]).to(p.dtype)
        terms = {"brier": (p - target).pow(2).sum(1)}
        if "adv" not in f.outputs:
            return terms
        distance = (f.outputs["adv"].logits.softmax(1) - p).pow(2).sum(1) - value_at(self.clip, f.progress)
        return {**terms, "distance": value_at(self.beta, f.progress) * distance.relu()}
