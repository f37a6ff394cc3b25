"""FGSM: the fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.attacks.base import InnerLoss
from holdfast.attacks.pgd import PGD
from holdfast.forward import Attacked, Batch, Statistics, View
from holdfast.schedule import Progress, Scalar
from holdfast.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class FGSM:
    r"""One step uphill.

    .. math:: x' = \Pi_{B(x)}\bigl(x + \alpha\,\mathrm{sign}(\nabla_x \ell(f(x), y))\bigr)

    For L2 the gradient divided by its length takes the sign's place (the fast gradient method).

    Args:
        step_size: α in pixel scale, or a schedule; None is epsilon.
        random_start: Begin at a uniform point of the ball (Fast-AT's first half) instead of at x.
        statistics: How BatchNorm normalises during the search; see `View`.

    Shapes:
        x: (B, C, H, W); steps_survived: (B,) in {0, 1}.
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: a setting is out of range, or the norm is L1.
    Source: Goodfellow et al., ICLR 2015, arXiv:1412.6572, section 4.
    Differs from the reference: nothing known.

    Example:
        >>> FGSM().passes()
        2.0
    """

    step_size: Scalar | str | None = None
    random_start: bool = False
    statistics: Statistics = "eval"

    def __post_init__(self) -> None:
        single = PGD(steps=1, step_size=self.step_size, statistics=self.statistics)  # the same refusals
        object.__setattr__(self, "step_size", single.step_size)

    def passes(self) -> float:
        """One forward and one backward to the input."""
        return 2.0

    def __call__(
        self,
        view: View,
        batch: Batch,
        inner_loss: InnerLoss,
        *,
        threat: ThreatModel,
        progress: Progress | None = None,
    ) -> Attacked:
        step_size = threat.epsilon if self.step_size is None else self.step_size
        single = PGD(
            steps=1,
            step_size=step_size if step_size is self.step_size else f"{step_size:.17f}/1",
            random_start=self.random_start,
            statistics=self.statistics,
        )
        return single(view, batch, inner_loss, threat=threat, progress=progress)
