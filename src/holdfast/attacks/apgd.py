"""APGD: Auto-PGD, without a step size to choose (Linf and L2; for L1 see `apgd_l1`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from holdfast.attacks.stepwise import (
    LOSSES,
    Answer,
    Loss,
    Rows,
    State,
    StepwiseAttack,
    choose,
    column,
    positive_counts,
    random_direction,
    require_norm,
)
from holdfast.errors import HoldfastError
from holdfast.keyed_random import Key
from holdfast.threat import ThreatModel

LABELS = {"ce": "APGD-CE", "dlr": "APGD-DLR", "targeted_dlr": "APGD-T"}


def checkpoints(steps: int) -> list[int]:
    """The steps after which APGD looks back: 22 % of all, then 3 % less each time, but at least 6 %.

    Example:
        >>> checkpoints(100)
        [22, 41, 57, 70, 80, 87, 93, 99]
    """
    window, shrink, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    found, at = [], window
    while at <= steps:
        found.append(at)
        window = max(window - shrink, least)
        at += window
    return found


@cache
def checkpoint_windows(steps: int, device: torch.device) -> Tensor:
    """By the number of steps taken: how many since the last checkpoint, at a checkpoint, else 0; (steps + 2,)."""
    windows, before = torch.zeros(steps + 2), 0
    for at in checkpoints(steps):
        windows[at], before = at - before, at
    return windows.to(device)


@dataclass(frozen=True, kw_only=True)
class APGD(StepwiseAttack):
    r"""Projected gradient ascent with momentum that halves its step where the loss stops growing.

    .. math:: z = \Pi(x^k + \eta\, s(\nabla \ell)), \qquad
        x^{k+1} = \Pi\bigl(x^k + \alpha (z - x^k) + (1 - \alpha)(x^k - x^{k-1})\bigr)

    with α = 0.75 (1 in the first step) and η = 2ε at first. At a checkpoint η is halved, and the search goes back to
    its best point, where the loss grew in no more than ρ of the steps since the last one, or where η was kept last time
    and the best loss did not change.

    Args:
        steps: Iterations.
        objective: ``"ce"``, ``"dlr"``, or with targets ``"targeted_dlr"``.
        rho: ρ.
        average: Passes averaged for each gradient (`rand`).

    Shapes:
        point: (R, C, H, W).
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: a setting is out of range, or the norm is L1.
    Source: Croce and Hein, ICML 2020, arXiv:2003.01690, algorithm 1 and section 4. Reference code: fra31/auto-attack.
    Differs from the reference: starts are keyed by image; a row stops at its first verified success; two and three
        classes have losses of their own (`holdfast.functional.dlr`). The first step counts as a growth where its loss
        is above 0, as there.

    Example:
        >>> APGD(objective="ce").name, APGD(objective="targeted_dlr", targets=9).name
        ('APGD-CE', 'APGD-T, 9 targets')
    """

    steps: int = 100
    objective: Loss = "ce"
    rho: float = 0.75
    average: int = 1  # type: ignore[misc]  # a setting here, a constant of the others

    def __post_init__(self) -> None:
        positive_counts(steps=self.steps, restarts=self.restarts, targets=self.targets, average=self.average)
        if self.objective not in LABELS:
            raise HoldfastError(f"objective {self.objective!r} is unknown: use one of {', '.join(LABELS)}")
        if (self.objective == "targeted_dlr") != (self.targets > 0):
            raise HoldfastError(f"objective {self.objective!r} and targets={self.targets} do not belong together")

    @property
    def name(self) -> str:
        parts = [LABELS[self.objective] + ("" if self.steps == 100 else f"-{self.steps}")]
        parts += [f"{self.targets} targets"] if self.targets else []
        parts += [f"{self.restarts} restarts"] if self.restarts > 1 else []
        parts += [f"{self.average} passes a gradient"] if self.average > 1 else []
        return ", ".join(parts)

    def require(self, threat: ThreatModel) -> None:
        require_norm(threat, "APGD", ("Linf", "L2"))

    def passes(self) -> tuple[int, int]:
        return (self.steps + 1) * self.average, (self.steps + 1) * self.average

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        return LOSSES[self.objective](logits, rows)

    def start(self, rows: Rows, threat: ThreatModel, key: Key) -> State:
        point = threat.clamp(rows.x + threat.epsilon * random_direction(rows, threat, key.fold("start")))
        nothing = torch.zeros_like(rows.x)
        zero = rows.x.new_zeros(len(rows.y))
        return {
            "point": point,
            "step": torch.zeros_like(rows.y),
            "previous": point,  # the point that the last step was taken from
            "best": point,
            "best_gradient": nothing,
            "best_loss": torch.full_like(zero, -torch.inf),
            "best_loss_before": torch.full_like(zero, -torch.inf),  # at the last checkpoint
            "last_loss": zero,
            "growths": zero,
            "kept": torch.zeros_like(rows.y, dtype=torch.bool),  # whether the last checkpoint left the step alone
            "size": torch.full_like(zero, 2 * threat.epsilon),
        }

    def advance(self, state: State, rows: Rows, answer: Answer, threat: ThreatModel, key: Key) -> State:
        assert answer.gradient is not None  # it is asked for
        done = state["step"]  # steps taken so far; the answer is about the point that the last of them led to
        first = done == 0
        better = answer.loss > state["best_loss"]
        best_loss = torch.where(better, answer.loss, state["best_loss"])
        seen = {
            "best": choose(better, state["point"], state["best"]),
            "best_gradient": choose(better, answer.gradient, state["best_gradient"]),
            "best_loss": best_loss,
            "best_loss_before": torch.where(first, best_loss, state["best_loss_before"]),
            "growths": torch.where(first, 0.0, state["growths"] + (answer.loss > state["last_loss"])),
            "last_loss": torch.where(first, 0.0, answer.loss),
        }
        looked, back = self._look_back({**state, **seen}, done)
        here = choose(back, seen["best"], state["point"])
        gradient = choose(back, seen["best_gradient"], answer.gradient)
        following = self._step(here, state["previous"], gradient, looked["size"], first, rows.x, threat)
        return {
            **seen,
            **looked,
            "point": following,
            "previous": here,
            "step": done + 1,
        }

    def _look_back(self, state: State, done: Tensor) -> tuple[State, Tensor]:
        """What a checkpoint changes in the rows that are at one, and which of them go back to their best point."""
        window = checkpoint_windows(self.steps, done.device)[done.clamp_max(self.steps + 1)]
        here = window > 0
        stuck = state["growths"] <= self.rho * window
        stuck |= state["kept"] & (state["best_loss_before"] >= state["best_loss"])
        back = here & stuck
        return {
            "kept": torch.where(here, ~stuck, state["kept"]),
            "best_loss_before": torch.where(here, state["best_loss"], state["best_loss_before"]),
            "growths": torch.where(here, 0.0, state["growths"]),
            "size": torch.where(back, state["size"] / 2, state["size"]),
        }, back

    def _step(
        self,
        here: Tensor,
        previous: Tensor,
        gradient: Tensor,
        size: Tensor,
        first: Tensor,
        x: Tensor,
        threat: ThreatModel,
    ) -> Tensor:
        """The next point."""
        alpha = column(torch.where(first, 1.0, 0.75), x)
        upward = threat.project(here + column(size, x) * threat.steepest(gradient), x)
        return threat.project(here + alpha * (upward - here) + (1 - alpha) * (here - previous), x)
