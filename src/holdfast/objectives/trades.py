"""TRADES: clean cross-entropy, and a KL pull of adversarial predictions towards clean ones."""

from __future__ import annotations

from torch import Tensor

from holdfast.attacks.base import InnerLoss
from holdfast.forward import Batch, Forward, View
from holdfast.functional import cross_entropy, kl
from holdfast.objectives.base import Objective, kl_to_clean
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


class TRADES(Objective):
    r"""Cross-entropy on clean images, plus the divergence of adversarial predictions from clean ones.

    .. math:: \mathrm{CE}(f(x), t) + \beta\,\mathrm{KL}(p(x)\,\|\,p(x')), \qquad
        x' = \arg\max_{B(x)} \mathrm{KL}(p(x)\,\|\,p(x'))

    Args:
        beta: β >= 0, or a schedule; the paper uses 6 on CIFAR-10.

    Shapes:
        clean.logits, adv.logits: (B, K) before softmax; labels (B,) or soft (B, K). Terms: (B,).
    Units:
        Nats.
    Raises:
        HoldfastError: beta is negative.
    Source: Zhang et al., ICML 2019, arXiv:1901.08573, eq. (5). Reference code: yaodongyu/TRADES.
    Differs from the reference: one clean forward in the outer step (there two, and BatchNorm sees clean images twice);
        the clean prediction of the attack is computed once, not at every step, which is the same number wherever the
        attack's statistics do not move and nothing is drawn (there ten times).

    Example:
        >>> TRADES(beta=6.0).sides(Progress())
        ('clean', 'adv')
    """

    zero_at_equality = ("kl",)
    needs_random_start = True

    def __init__(self, *, beta: Scalar = 6.0) -> None:
        super().__init__()
        self.beta = as_scalar("beta", beta, minimum=0)

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("clean", "adv") if value_at(self.beta, progress) > 0 else ("clean",)

    def inner_loss(self, view: View, batch: Batch, progress: Progress) -> InnerLoss:
        return kl_to_clean(view, batch)

    def inner_passes(self, progress: Progress) -> float:
        return 1.0

    def forward(self, f: Forward) -> dict[str, Tensor]:
        clean = f.outputs["clean"].logits
        terms = {"clean_ce": cross_entropy(clean, f.batch.labels)}
        if "adv" not in f.outputs:
            return terms
        return {**terms, "kl": value_at(self.beta, f.progress) * kl(clean, f.outputs["adv"].logits)}
