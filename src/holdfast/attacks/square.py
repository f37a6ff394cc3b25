"""Square: random search by windows, from logits alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.attacks.square_windows import bumps, corners, signs, tiles, window_sides
from holdfast.attacks.stepwise import Answer, Rows, State, StepwiseAttack, choose, column, positive_counts, try_identity
from holdfast.errors import HoldfastError
from holdfast.functional import margin
from holdfast.keyed_random import Key
from holdfast.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Square(StepwiseAttack):
    r"""Tries a change inside one random square at a time, and keeps it where the margin falls.

    Linf: a square is moved by ±2ε in every channel and projected, after a start of vertical stripes of ±ε. L2 and L1:
    the length that is spent in one window, and what the budget has left, goes into another window in the shape of two
    bumps of opposite sign; the start is a grid of such bumps. The side of the window is
    :math:`s = \mathrm{round}\sqrt{p H W}`, p falling from `first_share` by halves after 10, 50, 200, 500, 1,000, 2,000,
    4,000, 6,000 and 8,000 queries.

    Args:
        queries: Tries after the start.
        first_share: p at first.
        rescale: Stretch the schedule of p, made for 10,000 queries, to this number. AutoAttack does not.

    Shapes:
        point: (R, C, H, W).
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: a setting is out of range.
    Source: Andriushchenko et al., ECCV 2020, arXiv:1912.00049, algorithms 1 to 3; L1 as in fra31/auto-attack.
    Differs from the reference: every row draws its own window and signs, keyed by image, where the reference draws one
        window for the whole batch; images need not be square, and windows are no larger than they are.

    Example:
        >>> Square().name, Square().passes()
        ('Square-5000', (5001, 0))
    """

    queries: int = 5000
    first_share: float = 0.8
    rescale: bool = False
    asks = "logits"

    def __post_init__(self) -> None:
        positive_counts(queries=self.queries, restarts=self.restarts)
        if not 0 < self.first_share <= 1:
            raise HoldfastError(f"first_share is {self.first_share}: it is a share of the image, above 0 and at most 1")

    @property
    def name(self) -> str:
        return f"Square-{self.queries}" + (f", {self.restarts} restarts" if self.restarts > 1 else "")

    def passes(self) -> tuple[int, int]:
        return self.queries + 1, 0

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        return -margin(logits, rows.y)

    def start(self, rows: Rows, threat: ThreatModel, key: Key) -> State:
        x = rows.x
        if threat.norm == "Linf":
            stripes = signs(key.fold("stripes"), rows.draw, x.shape[1] * x.shape[3], x.dtype).view(
                len(x), x.shape[1], 1, -1
            )
            point = threat.clamp(x + threat.epsilon * stripes)
        else:
            point = _of_length(x, tiles(key, rows.draw, x, _power(threat)), threat)
        fresh = torch.zeros_like(rows.y)
        return {
            "point": point,
            "best": point,
            "best_loss": torch.full_like(fresh, -torch.inf, dtype=x.dtype),
            "step": fresh,
        }

    def advance(self, state: State, rows: Rows, answer: Answer, threat: ThreatModel, key: Key) -> State:
        better = answer.loss > state["best_loss"]
        best = choose(better, state["point"], state["best"])
        point = self._try(best, rows.x, state["step"], try_identity(rows, state["step"]), threat, key)
        return {
            "point": point,
            "best": best,
            "best_loss": torch.where(better, answer.loss, state["best_loss"]),
            "step": state["step"] + 1,
        }

    def _sides(self, step: Tensor, x: Tensor, *, odd: bool) -> Tensor:
        """The window's side, (R,)."""
        queries = 10000 if self.rescale else self.queries
        table = window_sides(queries, self.first_share, x.shape[2], x.shape[3], odd=odd, device=step.device)
        place = (step * 10000) // self.queries if self.rescale else step
        return table[place.clamp_max(len(table) - 1)]

    def _try(self, best: Tensor, x: Tensor, step: Tensor, identity: Tensor, threat: ThreatModel, key: Key) -> Tensor:
        """The next point."""
        if threat.norm == "Linf":
            side = self._sides(step, x, odd=False)
            window = corners(key.fold("window"), identity, side, x)
            change = 2 * threat.epsilon * signs(key.fold("signs"), identity, x.shape[1], x.dtype)
            moved = best + change.view(*change.shape, 1, 1)
            return threat.project(torch.where(window, moved, best), x)
        side = self._sides(step, x, odd=True)
        return _moved_mass(best - x, x, side, identity, threat, key)


def _moved_mass(delta: Tensor, x: Tensor, side: Tensor, identity: Tensor, threat: ThreatModel, key: Key) -> Tensor:
    """L2 and L1: window 2's length, and what is left of epsilon, goes into window 1."""
    one = corners(key.fold("window"), identity, side, x)
    two = corners(key.fold("second window"), identity, side, x)
    power = _power(threat)

    def spent(part: Tensor, mask: Tensor) -> Tensor:
        """The length inside a window, by channel, (R, C, 1, 1)."""
        inside = torch.where(mask, part, 0).abs()
        total = (inside**power).sum((2, 3), keepdim=True)
        return total.sqrt() if power == 2 else total

    channels = x.shape[1]
    left = (threat.epsilon**power - column(threat.length(delta) ** power, x)).clamp_min(0)
    budget = left / channels + spent(delta, one | two) ** power
    budget = budget.sqrt() if power == 2 else budget * channels
    random_signs = signs(key.fold("signs"), identity, channels, x.dtype)[..., None, None]
    shape = bumps(key.fold("bump"), identity, side, one, power) * random_signs
    shape = torch.where(one, shape + delta / (spent(delta, one) + 1e-12), 0)
    new = shape / (spent(shape, one) + 1e-12) * budget
    return _of_length(x, torch.where(one, new, torch.where(two, 0, delta)), threat)


def _power(threat: ThreatModel) -> int:
    """Of the norm: 2 or 1."""
    return 2 if threat.norm == "L2" else 1


def _of_length(x: Tensor, delta: Tensor, threat: ThreatModel) -> Tensor:
    """The point of the ball in this direction."""
    if threat.norm == "L1":
        return threat.project(x + delta, x, threat.epsilon * (1 - 1e-6))
    return threat.clamp(x + threat.epsilon * delta / column(threat.length(delta) + 1e-12, x))
