"""Uniform noise: the control that no honest defence should fall to more than to an attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.attacks.stepwise import Answer, Rows, State, StepwiseAttack, positive_counts, try_identity
from holdfast.functional import margin
from holdfast.keyed_random import Key
from holdfast.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class UniformNoise(StepwiseAttack):
    """Points drawn uniformly from the ball, each tried once.

    Args:
        draws: How many points an image.

    Shapes:
        point: (R, C, H, W).
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: draws is below 1.
    Source: a control; Carlini et al., arXiv:1902.06705, section 5.3 (compare against random search).
    Differs from the reference: nothing known.

    Example:
        >>> UniformNoise(draws=10).passes()
        (10, 0)
    """

    draws: int = 100
    asks = "logits"

    def __post_init__(self) -> None:
        positive_counts(draws=self.draws, restarts=self.restarts)

    @property
    def name(self) -> str:
        return f"uniform noise, {self.draws} draws"

    def passes(self) -> tuple[int, int]:
        return self.draws, 0

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        return -margin(logits, rows.y)

    def start(self, rows: Rows, threat: ThreatModel, key: Key) -> State:
        step = torch.zeros_like(rows.y)
        return {"point": threat.random_point(rows.x, key.fold("noise"), try_identity(rows, step)), "step": step}

    def advance(self, state: State, rows: Rows, answer: Answer, threat: ThreatModel, key: Key) -> State:
        step = state["step"] + 1
        return {"point": threat.random_point(rows.x, key.fold("noise"), try_identity(rows, step)), "step": step}
