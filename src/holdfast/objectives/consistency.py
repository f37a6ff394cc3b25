"""Consistency regularisation: two augmentations of an image must be attacked into the same prediction."""

from __future__ import annotations

from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.forward import Forward
from holdfast.functional import cross_entropy, jensen_shannon
from holdfast.objectives.base import Objective
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


class Consistency(Objective):
    r"""Adversarial cross-entropy of two views of an image, each attacked by itself, and their divergence.

    .. math:: \tfrac12 \bigl(\mathrm{CE}(f(x'_1), t) + \mathrm{CE}(f(x'_2), t)\bigr)
        + \lambda\,\mathrm{JS}\bigl(\mathrm{softmax}(f(x'_1) / T)\,\|\,\mathrm{softmax}(f(x'_2) / T)\bigr)

    Args:
        strength: λ >= 0, or a schedule; 1 in the paper.
        temperature: T > 0; 0.5 in the paper.

    Shapes:
        adv.logits, adv2.logits: (B, K) before softmax; labels (B,) or soft (B, K). Terms: (B,).
    Units:
        Nats.
    Raises:
        HoldfastError: strength is negative, or temperature is not positive.
    Source: Tack et al., AAAI 2022, arXiv:2103.04623. Reference code: alinlab/consistency-adversarial.
    Differs from the reference: two forwards of B images instead of one of 2B, so that BatchNorm sees the views apart.

    Example:
        >>> Consistency().sides(Progress())
        ('adv', 'adv2')
    """

    def __init__(self, *, strength: Scalar = 1.0, temperature: float = 0.5) -> None:
        super().__init__()
        if not temperature > 0:
            raise HoldfastError(f"temperature is {temperature}: give a positive number, for example 0.5")
        self.strength = as_scalar("strength", strength, minimum=0)
        self.temperature = float(temperature)

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("adv", "adv2")

    def forward(self, f: Forward) -> dict[str, Tensor]:
        one, two = f.outputs["adv"].logits, f.outputs["adv2"].logits
        labels = f.batch.labels
        divergence = jensen_shannon((one / self.temperature).softmax(1), (two / self.temperature).softmax(1))
        return {
            "adv_ce": (cross_entropy(one, labels) + cross_entropy(two, labels)) / 2,
            "divergence": value_at(self.strength, f.progress) * divergence,
        }
