"""CW: the attack of Carlini and Wagner, for L2 as they wrote it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.attacks.stepwise import Answer, Rows, State, StepwiseAttack, choose, column, positive_counts, require_norm
from holdfast.errors import HoldfastError
from holdfast.functional import logit_difference, margin
from holdfast.keyed_random import Key
from holdfast.threat import ThreatModel

MOMENTS = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True)
class CarliniWagnerL2(StepwiseAttack):
    r"""The nearest misclassified image in L2, by Adam on a variable that the bounds cannot stop.

    .. math:: \min_w \|x' - x\|_2^2 + c \max(z_y(x') - \max_{k \ne y} z_k(x') + \kappa,\, 0), \qquad
        x' = \tfrac12 (\tanh w + 1)

    with c found by bisection for every image. With targets, z_t takes the place of the largest other logit.

    For the "CW" of adversarial-training papers, PGD on the margin in an Linf ball, use
    ``IterativeGradient(objective="margin", label="CW")``.

    Args:
        steps: Adam steps for each c.
        searches: Values of c.
        step_size: Adam's learning rate, in w.
        first: c at first.
        confidence: κ.

    Shapes:
        point: (R, C, H, W).
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: a setting is out of range, or the norm is not L2.
    Source: Carlini and Wagner, S&P 2017, arXiv:1608.04644, section VI-A, with its f_6.
    Differs from the reference: bounds [0, 1] instead of [-0.5, 0.5]; fewer steps by default; no abort when the loss
        stalls.

    Example:
        >>> CarliniWagnerL2(steps=100, searches=5).passes()
        (500, 500)
    """

    steps: int = 200
    searches: int = 9
    step_size: float = 0.01
    first: float = 1e-3
    confidence: float = 0.0

    inside = False
    minimum_norm = True

    def __post_init__(self) -> None:
        positive_counts(steps=self.steps, searches=self.searches, targets=self.targets, restarts=self.restarts)
        if min(self.step_size, self.first) <= 0 or self.confidence < 0:
            raise HoldfastError("step_size and first must be above 0, confidence at least 0")

    @property
    def name(self) -> str:
        return f"CW-L2, {self.searches} x {self.steps} steps" + (f", {self.targets} targets" if self.targets else "")

    def require(self, threat: ThreatModel) -> None:
        require_norm(threat, "CW-L2", ("L2",))

    def passes(self) -> tuple[int, int]:
        both = self.steps * self.searches
        return both, both

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        return logit_difference(logits, rows.y, rows.target) if self.targets else -margin(logits, rows.y)

    def start(self, rows: Rows, threat: ThreatModel, key: Key) -> State:
        w = torch.atanh((2 * rows.x - 1) * (1 - 1e-6))
        zero = rows.x.new_zeros(len(rows.y))
        nothing = torch.zeros_like(w)
        return {
            "point": (torch.tanh(w) + 1) / 2,
            "w": w,
            "first_moment": nothing,
            "second_moment": nothing,
            "step": torch.zeros_like(rows.y),
            "constant": torch.full_like(zero, self.first),
            "lower": zero,
            "upper": torch.full_like(zero, torch.inf),
            "succeeded": torch.zeros_like(rows.y, dtype=torch.bool),
        }

    def advance(self, state: State, rows: Rows, answer: Answer, threat: ThreatModel, key: Key) -> State:
        assert answer.gradient is not None  # it is asked for
        step = state["step"] + 1
        succeeded = state["succeeded"] | (answer.loss > self.confidence)
        ended = step >= self.steps
        moved = self._adam(state, rows.x, answer, step)
        again = self.start(rows, threat, key)
        searched = self._bisected(state, succeeded, ended)
        w = choose(ended, again["w"], moved["w"])
        return {
            "point": (torch.tanh(w) + 1) / 2,
            "w": w,
            "first_moment": choose(ended, again["first_moment"], moved["first_moment"]),
            "second_moment": choose(ended, again["second_moment"], moved["second_moment"]),
            "step": torch.where(ended, 0, step),
            "succeeded": succeeded & ~ended,
            **searched,
        }

    def _adam(self, state: State, x: Tensor, answer: Answer, step: Tensor) -> State:
        """One step of Adam on w."""
        assert answer.gradient is not None  # it is asked for
        active = column((answer.loss < self.confidence) * state["constant"], x)
        along = 2 * (state["point"] - x) - active * answer.gradient
        gradient = along * (1 - torch.tanh(state["w"]) ** 2) / 2
        first = MOMENTS[0] * state["first_moment"] + (1 - MOMENTS[0]) * gradient
        second = MOMENTS[1] * state["second_moment"] + (1 - MOMENTS[1]) * gradient**2
        unbiased = [column(1 - moment ** step.to(x.dtype), x) for moment in MOMENTS]
        change = self.step_size * (first / unbiased[0]) / ((second / unbiased[1]).sqrt() + 1e-8)
        return {"w": state["w"] - change, "first_moment": first, "second_moment": second}

    def _bisected(self, state: State, succeeded: Tensor, ended: Tensor) -> State:
        """The next c, where a search has ended: between the bounds, or ten times as large while nothing succeeded."""
        upper = torch.where(ended & succeeded, torch.minimum(state["upper"], state["constant"]), state["upper"])
        lower = torch.where(ended & ~succeeded, torch.maximum(state["lower"], state["constant"]), state["lower"])
        between = torch.where(upper.isinf(), state["constant"] * 10, (lower + upper) / 2)
        return {"upper": upper, "lower": lower, "constant": torch.where(ended, between, state["constant"])}
