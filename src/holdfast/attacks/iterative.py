"""Iterative gradient attacks as stepwise ones: FGSM, PGD with restarts, and PGD on a margin (CW in papers' tables)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.attacks.base import checked_step_size
from holdfast.attacks.stepwise import (
    LOSSES,
    Answer,
    Loss,
    Rows,
    State,
    StepwiseAttack,
    is_restart,
    positive_counts,
    require_norm,
)
from holdfast.errors import HoldfastError
from holdfast.keyed_random import Key
from holdfast.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class IterativeGradient(StepwiseAttack):
    r"""Repeated steps uphill, each projected back into the ball.

    .. math:: x^{t+1} = \Pi_{B(x)}\bigl(x^t + \alpha\, s(\nabla_{x^t} \ell(f(x^t)))\bigr)

    with :math:`s` the sign for Linf and the gradient divided by its length for L2. One step of length epsilon from the
    image is FGSM; with cross-entropy it is PGD, with the margin the "CW" of the tables in adversarial-training papers.

    Args:
        steps: K.
        step_size: α in pixel scale; None is a quarter of epsilon (2/255 at 8/255), or epsilon where there is one step.
        random_start: Begin at a uniform point of the ball instead of at x. Restarts after the first always do.
        objective: ``"ce"``, ``"margin"`` (z_other - z_y), ``"dlr"``, or with targets ``"difference"`` (z_t - z_y).
        label: What it is called where that is not PGD.

    Shapes:
        point: (R, C, H, W).
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: a setting is out of range, or the norm is L1.
    Source: Goodfellow et al., ICLR 2015, arXiv:1412.6572 (FGSM); Madry et al., ICLR 2018, arXiv:1706.06083 (PGD);
        the margin is that of Carlini and Wagner, S&P 2017, arXiv:1608.04644, with no confidence.
    Differs from the reference: every point that is visited counts, the last one included; noise is keyed by image.

    Example:
        >>> from holdfast.threat import Linf
        >>> rows = Rows(torch.full((1, 1, 1, 2), 0.5), torch.tensor([0]), torch.tensor([-1]), torch.tensor([0]))
        >>> attack = IterativeGradient(steps=1, random_start=False)
        >>> state = attack.start(rows, Linf(0.1), Key(0))
        >>> answer = Answer(torch.zeros(1, 2), torch.zeros(1), torch.tensor([[[[1.0, -1.0]]]]))
        >>> attack.advance(state, rows, answer, Linf(0.1), Key(0))["point"].flatten().tolist()
        [0.6000000238418579, 0.4000000059604645]
    """

    steps: int = 50
    step_size: float | str | None = None
    random_start: bool = True
    objective: Loss = "ce"
    label: str = "PGD"

    def __post_init__(self) -> None:
        positive_counts(steps=self.steps, restarts=self.restarts, targets=self.targets)
        size = checked_step_size(self.step_size)
        if size is not None and not isinstance(size, float):
            raise HoldfastError("step_size is a schedule: an evaluation wants one number")
        object.__setattr__(self, "step_size", size)
        if self.objective not in LOSSES:
            raise HoldfastError(f"objective {self.objective!r} is unknown: use one of {', '.join(LOSSES)}")
        if (self.objective in ("difference", "targeted_dlr")) != (self.targets > 0):
            raise HoldfastError(f"objective {self.objective!r} and targets={self.targets} do not belong together")

    @property
    def name(self) -> str:
        steps = "" if self.label == "FGSM" else f"-{self.steps}"
        targets = f", {self.targets} targets" if self.targets else ""
        return f"{self.label}{steps}{targets}" + (f", {self.restarts} restarts" if self.restarts > 1 else "")

    def require(self, threat: ThreatModel) -> None:
        require_norm(threat, self.label, ("Linf", "L2"))

    def passes(self) -> tuple[int, int]:
        return self.steps + 1, self.steps

    def needs_gradient(self, number: Tensor) -> Tensor:
        return number < self.steps

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        return LOSSES[self.objective](logits, rows)

    def start(self, rows: Rows, threat: ThreatModel, key: Key) -> State:
        first = rows.x
        if self.random_start:
            first = threat.random_point(rows.x, key.fold("start"), rows.draw)
        elif self.restarts > 1:
            first = torch.where(is_restart(rows), threat.random_point(rows.x, key.fold("start"), rows.draw), rows.x)
        return {"point": first}

    def length_of_step(self, threat: ThreatModel) -> float:
        """α."""
        if self.step_size is not None:
            return float(self.step_size)
        return threat.epsilon if self.steps == 1 else threat.epsilon / 4

    def direction(self, state: State, gradient: Tensor, threat: ThreatModel) -> tuple[Tensor, State]:
        """Where to go, and what of the state that changes."""
        return threat.steepest(gradient), {}

    def advance(self, state: State, rows: Rows, answer: Answer, threat: ThreatModel, key: Key) -> State:
        assert answer.gradient is not None  # it is asked for
        direction, changed = self.direction(state, answer.gradient, threat)
        point = threat.project(state["point"] + self.length_of_step(threat) * direction, rows.x)
        return {**state, **changed, "point": point}
