"""A few points of the ball that the deciding network is asked about before anything else, and again at the end.

A network can answer otherwise after some calls or some time; and its gradient can be wrong wherever it is asked, so
that no comparison of two ways of asking shows it. Differences of its own answers show both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from holdfast.evaluation.agreement import logits_apart
from holdfast.keyed_random import Key, normal, uniform
from holdfast.threat import ThreatModel

DIRECTIONS = 6
STEPS = (0.003, 0.00003, 0.01)  # of the pixel range, until one convinces: kinks want short ones, 16 bits long ones
SHORT = 0.001  # shorter steps begin so far aside, where no pixels are tied
CONVINCING = 0.9
ENOUGH = 2  # rows with a change: of fewer nothing is said
INSIDE = 0.001  # of the pixel range
ROUNDING = 4 * 2.0**-20  # of the largest logit, in float32: a smaller change is not one
ROUNDING_IN_HALVES = 4 * 2.0**-8

Network = Callable[[Tensor], Tensor]
"""Images (R, C, H, W) to logits (R, K)."""


class Slopes(NamedTuple):
    """How well a gradient tells what the deciding network does.

    Attributes:
        cosine: Between the changes that the gradient promises and those that are seen, over all rows and directions; 1
            where nothing can be said.
        rows: In how many rows a change was seen; 0 where in fewer than two.
        forward: Passes made, of one image each.
    """

    cosine: float
    rows: int
    forward: int


class Landmarks:
    """Points in the ball with the deciding network's first answers.

    Args:
        deciding: The network that decides.
        x: A few real images.
        threat: The ball.
        key: Of the draws.

    Attributes:
        points: One of the ball around each image, in Linf every second one on its surface, where attacks end.
        weights: Of the logits, drawn; a gradient is asked of their weighted sum, which no kink of a margin disturbs.
        logits: What the network answered first.

    Shapes:
        x, points: (n, C, H, W); weights, logits: (n, K).
    """

    def __init__(self, deciding: Network, x: Tensor, threat: ThreatModel, key: Key) -> None:
        self.key, self.rows = key, torch.arange(len(x), device=x.device)
        self.points = threat.random_point(x, key.fold("points"), self.rows)
        if threat.norm == "Linf":  # in other norms random points lie near the surface
            away = threat.steepest(normal(key.fold("surface"), self.rows, x.shape[1:], dtype=x.dtype))
            self.points[1::2] = threat.clamp(x + threat.epsilon * away)[1::2]
        self.logits = deciding(self.points)
        self.weights = normal(key.fold("weights"), self.rows, self.logits.shape[1:], dtype=x.dtype)

    def changed(self, deciding: Network, tolerance: float) -> Tensor:
        """Which points are answered otherwise than at first, (n,) bool."""
        return logits_apart(deciding(self.points), self.logits) > tolerance

    def slopes(self, deciding: Network, gradient: Network, *, halves: bool) -> Slopes:
        r"""Compare a gradient g with central differences of the deciding network f, in directions u of random signs.

        .. math:: \frac{w \cdot f(x + h u) - w \cdot f(x - h u)}{2 h} \approx g \cdot u

        Every row counts alike; rows whose change is within rounding do not count. Of a few lengths h the one that
        agrees best is taken: a max-pooling on a black background has its kinks close together, and wants a short one
        from a point where no pixels are tied; 16 bits round short ones away.

        Args:
            deciding: f.
            gradient: Points to g, the gradient of :math:`w \cdot f`.
            halves: The network computes in 16 bits.
        """
        best, forward = Slopes(1.0, 0, 0), 0
        for step in STEPS:
            point = (self.points if step > SHORT else self._aside()).clamp(step, 1 - step)
            found = self._at(point, deciding, gradient(point), step, ROUNDING_IN_HALVES if halves else ROUNDING)
            forward += found.forward
            if found.rows >= ENOUGH and (best.rows == 0 or found.cosine > best.cosine):
                best = found
            if best.rows and best.cosine >= CONVINCING:
                break
        return best._replace(forward=forward)

    def edges(self, gradient: Network) -> Tensor:
        """How much of the gradient a little inside the pixel range is exactly zero at pixels of 0 or 1, (n,).

        A first layer that is flat below 0 or above 1 leaves black or white pixels without a gradient.
        """
        inside = gradient(INSIDE + (1 - 2 * INSIDE) * self.points).double()  # in the same order, for poolings
        lost = inside * (gradient(self.points) == 0) * ((self.points <= 0) | (self.points >= 1))
        return lost.flatten(1).norm(dim=1) / inside.flatten(1).norm(dim=1).clamp_min(1e-300)

    def _aside(self) -> Tensor:
        """The points a little moved, each of its pixels by another length."""
        noise = uniform(self.key.fold("aside"), self.rows, self.points.shape[1:], dtype=self.points.dtype)
        return self.points + SHORT * (noise - self.points)

    def _at(self, point: Tensor, deciding: Network, gradient: Tensor, step: float, rounding: float) -> Slopes:
        """With one length of step."""
        seen, promised, largest = [], [], torch.zeros_like(self.rows, dtype=torch.float64)
        for number in range(DIRECTIONS):
            draw = uniform(self.key.fold("direction", number), self.rows, point.shape[1:], dtype=point.dtype)
            move = torch.where(draw < 0.5, -1.0, 1.0).to(point.dtype)
            up, down = deciding(point + step * move).double(), deciding(point - step * move).double()
            seen.append(((up - down) * self.weights).sum(1) / (2 * step))
            promised.append((gradient.double() * move).flatten(1).sum(1))
            largest = torch.maximum(largest, up.abs().amax(1) * self.weights.double().norm(dim=1))
        real, told = torch.stack(seen, 1), torch.stack(promised, 1)
        counts = real.isfinite().all(1) & told.isfinite().all(1)
        counts &= real.norm(dim=1) * step > rounding * largest
        real, told = real[counts], told[counts]
        scale = torch.maximum(real.norm(dim=1), told.norm(dim=1)).clamp_min(1e-300)[:, None]
        real, told = (real / scale).flatten(), (told / scale).flatten()
        cosine = (real @ told) / (real.norm() * told.norm()).clamp_min(1e-300) if len(real) else torch.ones(())
        return Slopes(float(cosine), int(counts.sum()), 2 * DIRECTIONS * len(point))
