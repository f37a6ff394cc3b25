"""Standard training: cross-entropy on clean images."""

from __future__ import annotations

from torch import Tensor

from holdfast.forward import Forward
from holdfast.functional import cross_entropy
from holdfast.objectives.base import Objective
from holdfast.schedule import Progress


class StandardTraining(Objective):
    r"""Cross-entropy on clean images; no attack is run.

    .. math:: \mathrm{CE}(f(x), t)

    Shapes:
        clean.logits: (B, K) before softmax; labels (B,) or soft (B, K). Terms: (B,).
    Units:
        Nats.
    Raises:
        Nothing of its own.
    Source: the baseline of every table; also the clean warm-up of PIAT, arXiv:2303.13955, section A.
    Differs from the reference: nothing known.

    Example:
        >>> StandardTraining().sides(Progress())
        ('clean',)
    """

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("clean",)

    def forward(self, f: Forward) -> dict[str, Tensor]:
        return {"clean_ce": cross_entropy(f.outputs["clean"].logits, f.batch.labels)}
