"""Attacks as processes that advance by one pass of the network at a time, every row for itself.

The evaluation makes the passes: it packs rows of many images, targets and restarts into full batches, runs them in low
precision where that is safe, checks every claimed success, and drops what is finished. An attack only says where it
wants to look next and what it does with the answer. It is pure: all that it remembers is in its state, whose tensors
have one row for each row of work, so that rows can be dropped, added and reordered between any two passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.functional import cross_entropy, dlr, logit_difference, margin, targeted_dlr
from holdfast.keyed_random import Key, normal, uniform
from holdfast.threat import ThreatModel

State = dict[str, Tensor]
"""Tensors with a row for every row of work: ``point`` is where the network is to be run next; what else there is, is
the attack's own."""

Loss = Literal["ce", "dlr", "margin", "difference", "targeted_dlr"]


class Rows(NamedTuple):
    """What the rows of work are about.

    Attributes:
        x: (R, C, H, W) clean images.
        y: (R,) labels.
        target: (R,) the class to be reached, -1 where the attack has no targets.
        draw: (R,) identity for keyed draws: of the image, the target and the restart together.
    """

    x: Tensor
    y: Tensor
    target: Tensor
    draw: Tensor

    def take(self, index: Tensor) -> Rows:
        """Some of the rows."""
        return Rows(*(part[index] for part in self))


class Answer(NamedTuple):
    """What the network said at ``state["point"]``.

    Attributes:
        logits: (R, K).
        loss: (R,) the attack's loss.
        gradient: (R, C, H, W) of the loss with respect to the point; (R, K, C, H, W), of every logit, for an attack
            that asks for all; None for one that asks for none. Rows that asked for none hold zeros.
    """

    logits: Tensor
    loss: Tensor
    gradient: Tensor | None


@dataclass(frozen=True, kw_only=True)
class StepwiseAttack:
    """What every stepwise attack has.

    Args:
        restarts: Independent searches of every image (and target).
        targets: Target classes of every image, the most likely wrong ones first; 0 for an untargeted attack. No more
            are tried than there are wrong classes.

    Attributes:
        asks: What it reads at a point: ``"logits"``, ``"gradient"`` of its loss, or ``"gradients"`` of all logits; see
            `needs_gradient` too.
        inside: Every point it visits lies in the ball. If not, the caller measures the distance.
        minimum_norm: It looks for the nearest adversarial image instead of any within epsilon.
        average: Passes averaged for one gradient (expectation over transformation).
    """

    restarts: int = 1
    targets: int = 0

    asks = "gradient"
    inside = True
    minimum_norm = False
    average = 1

    @property
    def name(self) -> str:
        """As it is quoted beside a number."""
        raise NotImplementedError  # every attack states its own

    def require(self, threat: ThreatModel) -> None:
        """Refuse a norm that the attack does not know.

        Raises:
            HoldfastError: says which it knows.
        """

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        """What it maximises, (R,)."""
        raise NotImplementedError  # every attack states its own

    def start(self, rows: Rows, threat: ThreatModel, key: Key) -> State:
        """The state before the first pass."""
        raise NotImplementedError  # every attack states its own

    def advance(self, state: State, rows: Rows, answer: Answer, threat: ThreatModel, key: Key) -> State:
        """The state after a pass at ``state["point"]``."""
        raise NotImplementedError  # every attack states its own

    def passes(self) -> tuple[int, int]:
        """Forwards and backwards that one row of work takes if nothing stops it: after that many forwards it ends."""
        raise NotImplementedError  # every attack states its own

    def needs_gradient(self, number: Tensor) -> Tensor:
        """Whether the pass of that number, from 0, is one whose gradient is read, (R,) bool."""
        return torch.full_like(number, self.asks != "logits", dtype=torch.bool)


LOSSES: dict[str, Callable[[Tensor, Rows], Tensor]] = {
    "ce": lambda logits, rows: cross_entropy(logits, rows.y),
    "dlr": lambda logits, rows: dlr(logits, rows.y),
    "margin": lambda logits, rows: -margin(logits, rows.y),
    "difference": lambda logits, rows: logit_difference(logits, rows.y, rows.target),
    "targeted_dlr": lambda logits, rows: targeted_dlr(logits, rows.y, rows.target),
}
"""Losses by name; the last two want targets."""


RESTARTS, TARGETS, TRIES = 1 << 10, 1 << 12, 1 << 16
"""Room for restarts, targets and tries in the identity of a draw."""


def draw_identity(index: Tensor, rank: Tensor, restart: Tensor) -> Tensor:
    """The identity of a row's draws: of the image's position, the target's rank and the restart together, (R,)."""
    return (index * TARGETS + rank) * RESTARTS + restart


def is_restart(rows: Rows) -> Tensor:
    """Which rows are not the first search of their image and target, so that they broadcast against images."""
    return column(rows.draw % RESTARTS > 0, rows.x)


def try_identity(rows: Rows, number: Tensor) -> Tensor:
    """The identity of a draw that is made anew at every try, (R,)."""
    return rows.draw * TRIES + number


def take(state: State, index: Tensor) -> State:
    """Some rows of a state."""
    return {name: tensor[index] for name, tensor in state.items()}


def join(states: list[State]) -> State:
    """States one below the other."""
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}


def column(values: Tensor, like: Tensor) -> Tensor:
    """(R,) so that it broadcasts against (R, C, H, W)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def choose(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Row by row, one or the other."""
    return torch.where(column(condition, yes), yes, no)


def random_direction(rows: Rows, threat: ThreatModel, key: Key) -> Tensor:
    """A random direction whose length in the threat model's norm is 1, (R, C, H, W)."""
    shape = rows.x.shape[1:]
    if threat.norm == "Linf":
        noise = 2 * uniform(key, rows.draw, shape, dtype=rows.x.dtype) - 1
    else:
        noise = normal(key, rows.draw, shape, dtype=rows.x.dtype)
    return noise / column(threat.length(noise).clamp_min(1e-12), noise)


def likely_targets(logits: Tensor, y: Tensor, count: int) -> Tensor:
    """The most likely classes other than y, in falling order.

    Shapes:
        logits: (B, K); y: (B,). Returns (B, min(count, K - 1)).

    Example:
        >>> likely_targets(torch.tensor([[0.0, 3.0, 2.0]]), torch.tensor([1]), 9).tolist()
        [[2, 0]]
    """
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.argsort(dim=1, descending=True, stable=True)[:, : min(count, logits.shape[1] - 1)]


def require_norm(threat: ThreatModel, attack: str, norms: tuple[str, ...]) -> None:
    """Refuse a norm that an attack does not know.

    Raises:
        HoldfastError: says which it knows.
    """
    if threat.norm not in norms:
        raise HoldfastError(f"{attack} is not defined for {threat.norm}: use {' or '.join(norms)}")


def positive_counts(**values: int) -> None:
    """Refuse whole numbers below 1 (`targets`: below 0).

    Raises:
        HoldfastError: names the setting.
    """
    for name, value in values.items():
        least = 0 if name == "targets" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise HoldfastError(f"{name} is {value!r}: give a whole number of at least {least}")
