"""FGSM-PGI: one-step adversarial cross-entropy, and logits held still between the attack's start and its end."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from holdfast.attacks.base import InnerLoss
from holdfast.forward import Batch, Forward, View
from holdfast.functional import cross_entropy
from holdfast.objectives.base import Objective
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


class PriorGuided(Objective):
    r"""FGSM-PGI: cross-entropy after the step, and the squared distance from the logits before it.

    .. math:: \mathrm{CE}(f(x'), t) + \frac{\lambda}{K}\,\|f(x') - f(x + \eta)\|_2^2

    with :math:`\eta` the perturbation remembered from earlier epochs, at which `PriorGuidedFGSM` starts.

    Args:
        strength: λ >= 0, or a schedule; 10 in the paper.

    Shapes:
        adv.logits, adv_prior.logits: (B, K) before softmax; labels (B,) or soft (B, K), which the attack climbs too.
        Terms: (B,).
    Units:
        Nats and squared logits.
    Raises:
        HoldfastError: strength is negative. Recipes whose attack remembers nothing are refused.
    Source: Jia et al., ECCV 2022, arXiv:2207.08859. Reference code: jiaxiaojunQAQ/FGSM-PGI.
    Differs from the reference: the start is run again for the loss, not kept from the attack.

    Example:
        >>> PriorGuided().sides(Progress())
        ('adv_prior', 'adv')
    """

    attacks_soft_labels = True
    needs_others: Sequence[str] = ("adv_prior",)

    def __init__(self, *, strength: Scalar = 10.0) -> None:
        super().__init__()
        self.strength = as_scalar("strength", strength, minimum=0)

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("adv_prior", "adv") if value_at(self.strength, progress) > 0 else ("adv",)

    def inner_loss(self, view: View, batch: Batch, progress: Progress) -> InnerLoss:
        return lambda logits: cross_entropy(logits, batch.labels)

    def forward(self, f: Forward) -> dict[str, Tensor]:
        adv = f.outputs["adv"].logits
        terms = {"adv_ce": cross_entropy(adv, f.batch.labels)}
        if "adv_prior" in f.outputs:
            change = adv - f.outputs["adv_prior"].logits
            terms["stability"] = value_at(self.strength, f.progress) * change.pow(2).mean(1)
        return terms
