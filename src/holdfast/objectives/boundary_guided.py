"""LBGAT: adversarial logits are drawn to those of a network that learns from clean images only."""

from __future__ import annotations

from torch import Tensor

from holdfast.attacks.base import InnerLoss
from holdfast.forward import Batch, Forward, View
from holdfast.functional import cross_entropy, kl
from holdfast.objectives.base import Objective, kl_to_clean
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


class BoundaryGuided(Objective):
    r"""LBGAT: a guide g, trained on clean images beside the classifier, shows it where boundaries should lie.

    .. math:: \tfrac1K \|f(x') - g(x)\|_2^2 + \mathrm{CE}(g(x), t) + \beta\,\mathrm{KL}(p(x)\,\|\,p(x')), \qquad
        x' = \arg\max_{B(x)} \mathrm{KL}(p(x)\,\|\,p(x'))

    The classifier itself sees no label. The guide feels both of its terms.

    Args:
        beta: β >= 0, or a schedule; 0 (LBGAT0) and 6 (LBGAT6) in the paper.

    Shapes:
        clean.logits, adv.logits, guide.logits: (B, K) before softmax; labels (B,) or soft (B, K). Terms: (B,).
    Units:
        Squared logits, and nats.
    Raises:
        HoldfastError: beta is negative. Recipes without a network "guide", and with MixUp or CutMix, are refused.
    Source: Cui et al., ICCV 2021, arXiv:2011.11164. Reference code: dvlab-research/LBGAT.
    Differs from the reference: the attack's clean prediction is computed once; the guide stands in no attack, so that
        its BatchNorm statistics move once a step, as there; without β the classifier does not run on clean images,
        there it does, which moves its statistics.

    Example:
        >>> BoundaryGuided(beta=0.0).sides(Progress())
        ('adv', 'guide')
    """

    needs_random_start = True
    needs_networks = ("guide",)
    takes_mixed_images = False
    zero_at_equality = ("kl",)

    def __init__(self, *, beta: Scalar = 0.0) -> None:
        super().__init__()
        self.beta = as_scalar("beta", beta, minimum=0)

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("adv", "clean", "guide") if value_at(self.beta, progress) > 0 else ("adv", "guide")

    def inner_loss(self, view: View, batch: Batch, progress: Progress) -> InnerLoss:
        return kl_to_clean(view, batch)

    def inner_passes(self, progress: Progress) -> float:
        return 1.0

    def forward(self, f: Forward) -> dict[str, Tensor]:
        adv, guide = f.outputs["adv"].logits, f.outputs["guide"].logits
        terms = {
            "boundary": (adv - guide).pow(2).mean(1),
            "guide_ce": cross_entropy(guide, f.batch.labels),
        }
        if "clean" in f.outputs:
            terms["kl"] = value_at(self.beta, f.progress) * kl(f.outputs["clean"].logits, adv)
        return terms
