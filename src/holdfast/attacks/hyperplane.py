"""The shortest way from a point to a hyperplane that stays inside the pixel bounds."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 50


def step_to_hyperplane(point: Tensor, normal: Tensor, residual: Tensor, norm: str) -> Tensor:
    r"""The smallest d with :math:`\langle w, d \rangle = c` and :math:`0 \le t + d \le 1`.

    .. math:: \min_d \|d\|_p \quad \text{s.t.} \quad \langle w, d \rangle = c,\; t + d \in [0, 1]^D

    Every entry moves in the direction of c w. For Linf and L2 it moves by min(λ a_i, cap_i), with a_i = 1 (Linf) or
    |w_i| (L2), and λ solves the piecewise-linear, concave equation :math:`\sum_i |w_i| \min(\lambda a_i, cap_i) = |c|`:
    Newton's method from 0 rises to its root monotonically and in finitely many rounds. For L1 the entries with the
    largest |w_i| are spent first. Where no point of the box reaches the hyperplane, the nearest corner is returned.

    Args:
        point: t.
        normal: w.
        residual: c, the hyperplane's value minus that of the point.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Shapes:
        point, normal: (R, D); residual: (R,). Returns (R, D).
    Units:
        Pixels in [0, 1].
    Source: Croce and Hein, ICML 2020 (FAB), arXiv:1907.02044, section 3.1.
    Differs from the reference: Newton's method in place of sorting and bisection (Linf, L2).

    Example:
        >>> t, w = torch.tensor([[0.5, 0.9]]), torch.tensor([[1.0, 1.0]])
        >>> [round(v, 4) for v in step_to_hyperplane(t, w, torch.tensor([0.4]), "Linf")[0].tolist()]
        [0.3, 0.1]
    """
    direction = normal.sign() * residual.sign().unsqueeze(1)
    weight = normal.abs()
    room = torch.where(direction > 0, 1 - point, point)
    wanted = residual.abs()
    if norm == "L1":
        moved = _spend_largest_first(weight, room, wanted)
    else:
        moved = _rise(weight, room, wanted, squared=norm == "L2")
    return direction * moved


def _rise(weight: Tensor, room: Tensor, wanted: Tensor, *, squared: bool) -> Tensor:
    """How far every entry moves, by Newton's method on λ."""
    pace = weight if squared else torch.ones_like(weight)
    gain = weight * pace  # per unit of λ, while the entry is free
    most = weight * room
    total = most.sum(1)
    free = gain.sum(1)
    level = torch.where(free > 0, wanted / free.clamp_min(1e-30), 0)
    # entries whose way ends at λ = limit; those that weigh nothing are never in the way
    limit = torch.where(gain > 0, room / pace.clamp_min(1e-30), torch.inf) if squared else room
    for _ in range(ROUNDS):
        open_ = (limit > level.unsqueeze(1)).to(weight.dtype)
        free = (gain * open_).sum(1)
        spent = total - (most * open_).sum(1)
        following = torch.where(free > 0, (wanted - spent) / free.clamp_min(1e-30), torch.inf)
        grown = following > level * (1 + 1e-7)
        level = torch.where(grown, following, level)
        if level.device.type == "cpu" and not bool((grown & level.isfinite()).any()):
            break
    return torch.minimum(level.unsqueeze(1) * pace, room) if not squared else _product(level, pace, room)


def _product(level: Tensor, pace: Tensor, room: Tensor) -> Tensor:
    """min(λ a, cap), where an infinite λ times an a of 0 is 0."""
    far = torch.where(pace > 0, level.unsqueeze(1) * pace, torch.zeros_like(pace))
    return torch.minimum(far, room)


def _spend_largest_first(weight: Tensor, room: Tensor, wanted: Tensor) -> Tensor:
    """How far every entry moves, those with the largest weight first and to their end."""
    order = weight.argsort(dim=1, descending=True, stable=True)
    most = (weight * room).gather(1, order)
    before = most.cumsum(1) - most
    left = (wanted.unsqueeze(1) - before).clamp_min(0)
    sorted_weight = weight.gather(1, order)
    moved = torch.minimum(left / sorted_weight.clamp_min(1e-30), room.gather(1, order))
    return torch.zeros_like(weight).scatter(1, order, torch.where(sorted_weight > 0, moved, 0))
