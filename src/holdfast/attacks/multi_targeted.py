"""MultiTargeted: PGD towards every likely class in turn."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.attacks.iterative import IterativeGradient
from holdfast.attacks.stepwise import Loss


@dataclass(frozen=True, kw_only=True)
class MultiTargeted(IterativeGradient):
    r"""PGD on :math:`z_t - z_y`, for one target class t after the other.

    Args:
        steps: K; 200 in the source.
        targets: The most likely wrong classes.
        restarts: From other random points, for every target.

    Shapes:
        point: (R, C, H, W).
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: a setting is out of range, or the norm is L1.
    Source: Gowal et al., arXiv:1910.09338, eq. (4) and algorithm 1.
    Differs from the reference: plain sign (L2: normalised) steps of a quarter of epsilon in place of Adam; an image is
        left as soon as it is broken; nine targets by default instead of all.

    Example:
        >>> MultiTargeted(steps=20, targets=3).name
        'MultiTargeted-20, 3 targets'
    """

    steps: int = 200
    targets: int = 9
    objective: Loss = "difference"
    label: str = "MultiTargeted"
