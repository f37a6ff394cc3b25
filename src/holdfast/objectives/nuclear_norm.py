"""NuAT: one-step training with the nuclear norm of the batch's logit changes."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.attacks.base import InnerLoss
from holdfast.forward import Batch, Forward, View
from holdfast.functional import cross_entropy
from holdfast.objectives.base import Objective
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


class NuclearNorm(Objective):
    r"""NuAT: clean cross-entropy, and the nuclear norm of the matrix of logit changes over the batch.

    .. math:: \mathrm{CE}(f(x), t) + \frac{\lambda}{B}\,\|F(X') - F(X)\|_*

    with F(X) the (B, K) logits of the batch and :math:`\|\cdot\|_*` the sum of singular values. Every second step's
    attack climbs cross-entropy plus the same norm, the others the cross-entropy alone.

    Args:
        strength: λ >= 0, or a schedule; it grows from 0 to 4.5 in the paper.

    Shapes:
        clean.logits, adv.logits: (B, K) before softmax; labels (B,) or soft (B, K). Terms: (B,); the norm is the same
        in every row.
    Units:
        Nats and logits.
    Raises:
        HoldfastError: strength is negative.
    Source: Sriramanan et al., NeurIPS 2021 (Towards Efficient and Effective Adversarial Training). Reference code:
        val-iisc/NuAT.
    Differs from the reference: divided by the rows there are, not by the batch size that was asked for; the attack's
        clean logits are those of the attack's own view; every second step is counted over the run, there anew in
        every epoch; where λ is 0 nothing is attacked. Under several processes the norm is each process's own.

    Example:
        >>> NuclearNorm().couples_batch
        True
    """

    couples_batch = True
    zero_at_equality = ("nuclear_norm",)

    def __init__(self, *, strength: Scalar = 4.0) -> None:
        super().__init__()
        self.strength = as_scalar("strength", strength, minimum=0)

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("adv", "clean") if value_at(self.strength, progress) > 0 else ("clean",)

    def guides(self, progress: Progress) -> bool:
        """Whether this step's attack climbs the norm too."""
        return progress.step % 2 == 1 and value_at(self.strength, progress) > 0

    def inner_loss(self, view: View, batch: Batch, progress: Progress) -> InnerLoss:
        if not self.guides(progress):
            return super().inner_loss(view, batch, progress)
        with torch.no_grad():
            clean = view(batch.x).logits
        strength = value_at(self.strength, progress)
        return lambda logits: cross_entropy(logits, batch.attacked_labels) + strength * per_row(logits - clean)

    def inner_passes(self, progress: Progress) -> float:
        return float(self.guides(progress))

    def forward(self, f: Forward) -> dict[str, Tensor]:
        clean = f.outputs["clean"].logits
        terms = {"clean_ce": cross_entropy(clean, f.batch.labels)}
        if "adv" not in f.outputs:
            return terms
        change = f.outputs["adv"].logits - clean
        return {**terms, "nuclear_norm": value_at(self.strength, f.progress) * per_row(change)}


def per_row(change: Tensor) -> Tensor:
    """The nuclear norm over the number of rows, in every row."""
    return (torch.linalg.matrix_norm(change, "nuc") / len(change)).expand(len(change))
