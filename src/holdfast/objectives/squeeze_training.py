"""STAT: the most and the least certain of clean, collaborative and adversarial predictions are drawn together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from holdfast.attacks.collaborative import pick
from holdfast.forward import Forward
from holdfast.functional import cross_entropy, extremes, symmetric_kl
from holdfast.objectives.base import Objective
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


class SqueezeTraining(Objective):
    r"""STAT: clean cross-entropy, and the divergence between the outermost of three predictions of an image.

    .. math:: \mathrm{CE}(f(x), t) + \frac{\beta}{2}\bigl(\mathrm{KL}(\mathrm{sg}(p_a)\,\|\,p_b)
        + \mathrm{KL}(\mathrm{sg}(p_b)\,\|\,p_a)\bigr)

    a and b are those of the clean, the collaborative and the adversarial prediction with the smallest and the largest
    :math:`p_y`. Its attack is `CollaborativePGD`.

    Args:
        beta: β >= 0, or a schedule; 6 here, since neither the paper's code nor its scripts have a default.

    Shapes:
        clean.logits, collaborative.logits, adv.logits: (B, K) before softmax; labels (B,) or soft (B, K). Terms: (B,).
    Units:
        Nats.
    Raises:
        HoldfastError: beta is negative. Recipes whose attack makes no collaborative image are refused.
    Source: Li et al., ICLR 2023, arXiv:2205.11156. Reference code: qizhangli/ST-AT.
    Differs from the reference: nothing known.

    Example:
        >>> SqueezeTraining().sides(Progress())
        ('collaborative', 'clean', 'adv')
    """

    untracked_sides: Sequence[str] = ("collaborative",)
    needs_others: Sequence[str] = ("collaborative",)

    def __init__(self, *, beta: Scalar = 6.0) -> None:
        super().__init__()
        self.beta = as_scalar("beta", beta, minimum=0)

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("collaborative", "clean", "adv")

    def forward(self, f: Forward) -> dict[str, Tensor]:
        logits = [f.outputs[side].logits for side in ("clean", "collaborative", "adv")]
        low, high = extremes(logits, f.batch.y)
        squeezed = symmetric_kl(pick(logits, low), pick(logits, high), detach=True)
        return {
            "clean_ce": cross_entropy(logits[0], f.batch.labels),
            "squeeze": value_at(self.beta, f.progress) * squeezed,
        }
