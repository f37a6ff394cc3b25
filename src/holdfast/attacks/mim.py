"""MIM: the momentum iterative method (MI-FGSM)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.attacks.iterative import IterativeGradient
from holdfast.attacks.stepwise import Rows, State, column
from holdfast.keyed_random import Key
from holdfast.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class MIM(IterativeGradient):
    r"""Steps along a momentum of gradients that are first divided by their L1 length.

    .. math:: g^{t+1} = \mu g^t + \frac{\nabla \ell}{\|\nabla \ell\|_1}, \qquad
        x^{t+1} = \Pi\bigl(x^t + \alpha\, s(g^{t+1})\bigr)

    Args:
        momentum: μ >= 0; the paper uses 1.
        steps: T; the paper uses 10.
        step_size: α; None is ε / T, as in the paper.

    Shapes:
        point, velocity: (R, C, H, W).
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: a setting is out of range, or the norm is L1.
    Source: Dong et al., CVPR 2018, arXiv:1710.06081, eq. (6) and (7).
    Differs from the reference: every point that is visited counts.

    Example:
        >>> MIM(steps=20).name
        'MIM-20'
    """

    momentum: float = 1.0
    steps: int = 10
    random_start: bool = False
    label: str = "MIM"

    def start(self, rows: Rows, threat: ThreatModel, key: Key) -> State:
        state = super().start(rows, threat, key)
        return {**state, "velocity": torch.zeros_like(rows.x)}

    def length_of_step(self, threat: ThreatModel) -> float:
        return threat.epsilon / self.steps if self.step_size is None else float(self.step_size)

    def direction(self, state: State, gradient: Tensor, threat: ThreatModel) -> tuple[Tensor, State]:
        length = gradient.flatten(1).abs().sum(1).clamp_min(1e-30)
        velocity = self.momentum * state["velocity"] + gradient / column(length, gradient)
        return threat.steepest(velocity), {"velocity": velocity}
