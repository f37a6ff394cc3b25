"""FAB: the fast adaptive boundary attack, which looks for the nearest adversarial image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.attacks.hyperplane import step_to_hyperplane
from holdfast.attacks.stepwise import (
    Answer,
    Rows,
    State,
    StepwiseAttack,
    choose,
    is_restart,
    positive_counts,
    random_direction,
)
from holdfast.functional import logit_difference, margin, misclassified
from holdfast.keyed_random import Key
from holdfast.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class FAB(StepwiseAttack):
    r"""Steps onto the linearised decision boundary, biased towards the clean image.

    .. math:: x' = (1 - \alpha)\,(x^k + \eta\,d_1) + \alpha\,(x + \eta\,d_2), \qquad
        \alpha = \min\bigl(\tfrac{\|d_1\|}{\|d_1\| + \|d_2\|}, \alpha_{max}\bigr)

    :math:`d_1` and :math:`d_2` lead from :math:`x^k` and from the clean image to the hyperplane on which the linearised
    difference of logits is zero, inside the pixel bounds. Where x' is misclassified, the search goes back towards the
    clean image: :math:`x^{k+1} = x + \beta (x' - x)`.

    Args:
        steps: Iterations; two forwards and one backward each.
        targets: 0 linearises all differences at every step and takes the nearest hyperplane (FAB); more aims at one
            class after the other (FAB-T).
        restarts: After the first they begin at a random point half way to epsilon.
        alpha_max: α_max.
        overshoot: η.
        back: β.

    Shapes:
        point: (R, C, H, W).
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: a setting is out of range.
    Source: Croce and Hein, ICML 2020, arXiv:1907.02044, algorithm 1. Reference code: fra31/auto-attack.
    Differs from the reference: input gradients only; every point at which the network is run counts, the ones after
        the step back too; within a budget a row stops at its first verified success inside epsilon, where the
        reference spends all its steps; starts are keyed by image.

    Example:
        >>> FAB(targets=9).name, FAB(targets=9).passes()
        ('FAB-T, 9 targets', (200, 100))
    """

    steps: int = 100
    alpha_max: float = 0.1
    overshoot: float = 1.05
    back: float = 0.9

    inside = False
    minimum_norm = True

    def __post_init__(self) -> None:
        positive_counts(steps=self.steps, restarts=self.restarts, targets=self.targets)

    @property
    def asks(self) -> str:  # type: ignore[override]  # it depends on the targets
        """One gradient where there is a target, else those of all logits."""
        return "gradient" if self.targets else "gradients"

    @property
    def name(self) -> str:
        parts = [("FAB-T" if self.targets else "FAB") + ("" if self.steps == 100 else f"-{self.steps}")]
        parts += [f"{self.targets} targets"] if self.targets else []
        return ", ".join(parts + ([f"{self.restarts} restarts"] if self.restarts > 1 else []))

    def passes(self) -> tuple[int, int]:
        return 2 * self.steps, self.steps

    def needs_gradient(self, number: Tensor) -> Tensor:
        return number % 2 == 0

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        return logit_difference(logits, rows.y, rows.target) if self.targets else -margin(logits, rows.y)

    def start(self, rows: Rows, threat: ThreatModel, key: Key) -> State:
        point = rows.x
        if self.restarts > 1:
            noise = random_direction(rows, threat, key.fold("start"))
            point = torch.where(is_restart(rows), threat.clamp(rows.x + 0.5 * threat.epsilon * noise), rows.x)
        return {"point": point, "linearises": torch.ones_like(rows.y, dtype=torch.bool)}

    def advance(self, state: State, rows: Rows, answer: Answer, threat: ThreatModel, key: Key) -> State:
        assert answer.gradient is not None  # it is asked for
        at_start = state["linearises"]  # the answer is a linearisation; else it says where the last step led
        point = state["point"]
        some = at_start.nonzero()[:, 0] if point.device.type == "cpu" else torch.arange(len(point), device=point.device)
        moved = point.index_copy(0, some, self._step(point[some], rows.take(some), _part(answer, some), threat))
        wrong = misclassified(answer.logits, rows.y)
        returned = choose(wrong, rows.x + self.back * (point - rows.x), point)
        return {"point": choose(at_start, moved, returned), "linearises": ~at_start}

    def _step(self, point: Tensor, rows: Rows, answer: Answer, threat: ThreatModel) -> Tensor:
        """x'."""
        if len(point) == 0:
            return point
        difference, gradient = self._nearest(rows, answer, threat)
        here, origin, normal_ = point.flatten(1), rows.x.flatten(1), gradient.flatten(1)
        from_origin = -difference - ((origin - here) * normal_).sum(1)
        both = step_to_hyperplane(
            torch.cat([here, origin]), torch.cat([normal_, normal_]), torch.cat([-difference, from_origin]), threat.norm
        )
        length = threat.length(both).clamp_min(1e-8)
        d1, d2 = both.chunk(2)
        a1, a2 = length.chunk(2)
        alpha = (a1 / (a1 + a2)).clamp(0, self.alpha_max).unsqueeze(1)
        new = (1 - alpha) * (here + self.overshoot * d1) + alpha * (origin + self.overshoot * d2)
        return threat.clamp(new).view_as(point)

    def _nearest(self, rows: Rows, answer: Answer, threat: ThreatModel) -> tuple[Tensor, Tensor]:
        """The difference of logits to be brought to zero, and its gradient."""
        assert answer.gradient is not None  # it is asked for
        if self.targets:
            return answer.loss, answer.gradient
        own = rows.y.view(-1, 1)
        difference = answer.logits - answer.logits.gather(1, own)
        each = torch.arange(len(own), device=own.device)
        gradient = answer.gradient - answer.gradient[each, rows.y].unsqueeze(1)
        flat = gradient.flatten(2)
        dual = {"Linf": flat.abs().sum(2), "L2": flat.norm(dim=2), "L1": flat.abs().amax(2)}[threat.norm]
        distance = (difference.abs() / (dual + 1e-12)).scatter(1, own, torch.inf)
        nearest = distance.argmin(1)
        return difference[each, nearest], gradient[each, nearest]


def _part(answer: Answer, some: Tensor) -> Answer:
    """The answer about some rows."""
    assert answer.gradient is not None  # it is asked for
    return Answer(answer.logits[some], answer.loss[some], answer.gradient[some])
