"""ALP: adversarial logit pairing."""

from __future__ import annotations

from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.forward import Forward
from holdfast.functional import cross_entropy
from holdfast.objectives.base import Objective
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


class LogitPairing(Objective):
    r"""ALP: cross-entropy on clean and adversarial images, and equal logits for both.

    .. math:: c\,\mathrm{CE}(f(x), t) + (1 - c)\,\mathrm{CE}(f(x'), t) + \beta\,\frac1K \|f(x) - f(x')\|_2^2

    Args:
        strength: β >= 0, or a schedule.
        clean_weight: c in [0, 1], the clean share of the cross-entropy.

    Shapes:
        clean.logits, adv.logits: (B, K) before softmax; labels (B,) or soft (B, K). Terms: (B,).
    Units:
        Nats; squared logits.
    Raises:
        HoldfastError: strength is negative, or clean_weight is no share.
    Source: Kannan et al., 2018, arXiv:1803.06373, section 3. Reference code: gone; read in ShawnXYang/AT_HE.
    Differs from the reference: nothing known. The distance is a mean over classes, as there.

    Example:
        >>> LogitPairing().sides(Progress())
        ('clean', 'adv')
    """

    zero_at_equality = ("pairing",)

    def __init__(self, *, strength: Scalar = 1.0, clean_weight: float = 0.5) -> None:
        super().__init__()
        self.strength = as_scalar("strength", strength, minimum=0)
        if not 0 <= clean_weight <= 1:
            raise HoldfastError(f"clean_weight is {clean_weight}: it is a share, give a number in [0, 1]")
        self.clean_weight = float(clean_weight)

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("clean", "adv")

    def forward(self, f: Forward) -> dict[str, Tensor]:
        clean, adv = f.outputs["clean"].logits, f.outputs["adv"].logits
        return {
            "clean_ce": self.clean_weight * cross_entropy(clean, f.batch.labels),
            "adv_ce": (1 - self.clean_weight) * cross_entropy(adv, f.batch.labels),
            "pairing": value_at(self.strength, f.progress) * (clean - adv).pow(2).mean(1),
        }
