"""LIET: one-step adversarial cross-entropy against randomly smoothed labels, and predictions held along the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.attacks.base import InnerLoss
from holdfast.errors import HoldfastError
from holdfast.forward import Batch, Forward, View
from holdfast.functional import cross_entropy, jensen_shannon
from holdfast.keyed_random import Key, uniform
from holdfast.objectives.base import Objective
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


class StartConsistency(Objective):
    r"""LIET: cross-entropy after the attack's step, and the divergence from the prediction at its start.

    .. math:: \mathrm{CE}(f(x'), \tilde t) + \lambda\,\mathrm{JS}\bigl(p(x_0)\,\|\,p(x')\bigr)

    :math:`\tilde t` gives the true class 1 - s and shares s among the others by weights drawn anew in every step; the
    attack climbs cross-entropy against such labels too. Its attack is `ClassStartFGSM`.

    Args:
        strength: λ >= 0, or a schedule; it grows from 0 to 100 in the paper's code (200 on CIFAR-100).
        smoothing: s in [0, 1); 0.6 in the paper's code (0.8 on CIFAR-100).

    Shapes:
        adv.logits, adv_start.logits: (B, K) before softmax; labels (B,) or soft (B, K), which take the place of the
        random ones. Terms: (B,).
    Units:
        Nats.
    Raises:
        HoldfastError: strength is negative, or smoothing lies outside [0, 1).
    Source: LIET, ICCV 2025. Reference code: fzjcdt/LIET.
    Differs from the reference: λ grows with every step, there once an epoch; the start is run again for the loss.

    Example:
        >>> StartConsistency().sides(Progress())
        ('adv_start', 'adv')
    """

    needs_others: Sequence[str] = ("adv_start",)

    def __init__(self, *, strength: Scalar = 100.0, smoothing: float = 0.6) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise HoldfastError(f"smoothing is {smoothing}: it is a share, give a number in [0, 1)")
        self.strength = as_scalar("strength", strength, minimum=0)
        self.smoothing = float(smoothing)

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("adv_start", "adv") if value_at(self.strength, progress) > 0 else ("adv",)

    def labels(self, batch: Batch, like: Tensor, key: Key) -> Tensor:
        """The batch's labels, (B, K): its own soft ones, or the true class and random shares for the others."""
        if batch.target is not None:
            return batch.target
        own = F.one_hot(batch.y, like.shape[1]).to(like.dtype)
        share = uniform(key, batch.rows, (like.shape[1],), dtype=like.dtype) * (1 - own)
        share = share / share.sum(1, keepdim=True).clamp_min(torch.finfo(like.dtype).tiny)
        return (1 - self.smoothing) * own + self.smoothing * share

    def inner_loss(self, view: View, batch: Batch, progress: Progress) -> InnerLoss:
        key = progress.key("attacked labels").fold(progress.step)
        return lambda logits: cross_entropy(logits, self.labels(batch, logits, key))

    def forward(self, f: Forward) -> dict[str, Tensor]:
        adv = f.outputs["adv"].logits
        key = f.progress.key("smoothed labels").fold(f.progress.step)
        terms = {"adv_ce": cross_entropy(adv, self.labels(f.batch, adv, key))}
        if "adv_start" in f.outputs:
            divergence = jensen_shannon(f.outputs["adv_start"].logits.softmax(1), adv.softmax(1))
            terms["divergence"] = value_at(self.strength, f.progress) * divergence
        return terms
