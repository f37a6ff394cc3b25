"""OVR-style: images with a small margin get a one-vs-the-rest loss. Our reading; see the docstring."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.forward import Forward
from holdfast.functional import cross_entropy, margin
from holdfast.objectives.base import Objective
from holdfast.schedule import Scalar, as_scalar, value_at


class OneVsRest(Objective):
    r"""OVR-style, our own reading of SOVR: one-vs-the-rest loss for the smallest margins of a batch.

    .. math:: \ell_i = \begin{cases} \lambda\,\bigl(\log(1 + e^{-f_y}) + \sum_{k \ne y} \log(1 + e^{f_k})\bigr)
        & i \text{ among the smallest margins} \\ \mathrm{CE}(f(x'_i), t_i) & \text{otherwise} \end{cases}

    with margins :math:`f_y - \max_{k \ne y} f_k` of the adversarial logits.

    Args:
        share: Share of the batch, 0 … 1, or a schedule, that gets the one-vs-the-rest loss.
        strength: λ >= 0, or a schedule.

    Shapes:
        adv.logits: (B, K) before softmax; labels (B,) or soft (B, K), which the one-vs-the-rest loss reads too. Terms:
        (B,); each is zero in the other's rows.
    Units:
        Nats.
    Raises:
        HoldfastError: share lies outside 0 … 1, or strength is negative.
    Source: idea of Kanai et al., ICML 2023, arXiv:2207.10283 (SOVR). No formula could be verified, so this is not their
        method but what its abstract says: small margins get one-vs-the-rest, all others cross-entropy.
    Differs from the reference: unknown; share and λ are ours.

    Example:
        >>> OneVsRest().couples_batch
        True
    """

    couples_batch = True

    def __init__(self, *, share: Scalar = 0.4, strength: Scalar = 0.5) -> None:
        super().__init__()
        self.share = as_scalar("share", share, minimum=0)
        self.strength = as_scalar("strength", strength, minimum=0)

    def forward(self, f: Forward) -> dict[str, Tensor]:
        logits, labels = f.outputs["adv"].logits, f.batch.labels
        count = round(min(1.0, value_at(self.share, f.progress)) * len(logits))
        order = margin(logits.detach(), f.batch.y).argsort(stable=True)
        small = torch.zeros(len(logits), dtype=torch.bool, device=logits.device).index_fill(0, order[:count], True)
        target = labels if labels.dim() > 1 else F.one_hot(labels, logits.shape[1])
        target = target.to(logits.dtype)
        one_vs_rest = (target * F.softplus(-logits) + (1 - target) * F.softplus(logits)).sum(1)
        zero = torch.zeros_like(one_vs_rest)
        return {
            "adv_ce": torch.where(small, zero, cross_entropy(logits, labels)),
            "one_vs_rest": torch.where(small, value_at(self.strength, f.progress) * one_vs_rest, zero),
        }
