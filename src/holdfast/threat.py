"""Threat models: which changes of an image an attacker may make."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.keyed_random import Key, normal, uniform
from holdfast.setting_types import shown

_FRACTION = re.compile(r"\s*([-+]?\d+(?:\.\d*)?|[-+]?\.\d+)\s*/\s*(\d+(?:\.\d*)?|\.\d+)\s*")


TOLERANCE = 1e-6
"""By how much rounding may lead a point out of the ball or the bounds."""

SHORT = 1e-12
"""A length below which nothing is divided by it as it is."""


def parse_fraction(text: str) -> float | None:
    """The value of text such as ``8/255``, or None where the text is no fraction.

    Example:
        >>> parse_fraction("8/255") == 8 / 255
        True
    """
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    if float(match.group(2)) == 0:
        raise HoldfastError(f"{text!r} divides by zero: write a fraction of the pixel scale such as 8/255")
    return float(match.group(1)) / float(match.group(2))


def parse_epsilon(value: float | str) -> float:
    """Epsilon in pixel scale from what a person types.

    A fraction says its own unit, so it may exceed 1 (``3/1`` for L2). A bare number above 1 is refused, because
    nearly always it was meant in 0 … 255.

    Raises:
        HoldfastError: not a number, negative, not finite, or a bare number above 1.

    Example:
        >>> parse_epsilon("8/255") == 8 / 255
        True
    """
    advice = "write it in pixel scale [0, 1], for example 8/255"
    number = parse_fraction(value) if isinstance(value, str) else None
    if number is not None and 0 <= number < float("inf"):
        return number
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value) if number is None else number
    except (TypeError, ValueError):
        raise HoldfastError(f"epsilon {shown(value)} is not a number: {advice}") from None
    if not 0 <= number < float("inf"):
        raise HoldfastError(f"epsilon {shown(value)} is negative or not finite: {advice}")
    if number > 1:
        raise HoldfastError(
            f"epsilon {number:g} is above 1, but pixels lie in [0, 1]: write {number:g}/255 if that was meant,"
            f' or the fraction "{number:g}/1" for an L2 or L1 radius of that length'
        )
    return number


def _per_row(radius: float | Tensor, like: Tensor) -> float | Tensor:
    """A radius that broadcasts against (B, …)."""
    if isinstance(radius, Tensor) and radius.dim() == 1:
        return radius.to(like.dtype).view(-1, *[1] * (like.dim() - 1))
    return radius


@dataclass(frozen=True)
class ThreatModel:
    r"""All images inside the pixel bounds whose distance from the clean image is at most epsilon.

    .. math:: B(x) = \{x' : \|x' - x\|_p \le \epsilon,\; \text{lower} \le x' \le \text{upper}\}

    Use one of its kinds: `Linf`, `L2` or `L1`.

    Args:
        epsilon: Radius in pixel scale [0, 1]; text such as ``"8/255"`` is understood.
        lower: Smallest pixel value.
        upper: Largest pixel value.

    Shapes:
        x, x_adv: (B, C, H, W). A radius per row, where a method asks for one: (B,).
    Units:
        Pixels lie in [0, 1].
    Raises:
        HoldfastError: epsilon is negative, not a number, or a bare number above 1; the bounds are crossed.
    """

    epsilon: float
    lower: float = 0.0
    upper: float = 1.0
    norm: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not self.norm:
            raise HoldfastError("ThreatModel is abstract: use Linf, L2 or L1")
        object.__setattr__(self, "epsilon", parse_epsilon(self.epsilon))
        if not self.lower < self.upper:
            raise HoldfastError(f"lower {self.lower} is not below upper {self.upper}: use 0 and 1")

    def __str__(self) -> str:
        return f"{self.norm}({readable(self.epsilon)})"

    def with_epsilon(self, epsilon: float) -> ThreatModel:
        """The same threat model with another radius."""
        copy = replace(self, epsilon=0.0)
        object.__setattr__(copy, "epsilon", float(epsilon))  # computed, not typed: no advice about its unit
        return copy

    def length(self, delta: Tensor) -> Tensor:
        """The norm of every row's change, (B,)."""
        raise NotImplementedError  # each norm states its own

    def steepest(self, gradient: Tensor) -> Tensor:
        """The direction of length 1 in which a linear loss with this gradient grows fastest."""
        raise NotImplementedError  # each norm states its own

    def project(self, x_adv: Tensor, x: Tensor, radius: float | Tensor | None = None) -> Tensor:
        """A point of the ball near `x_adv` (the nearest one for Linf and L1; see `L2`).

        Args:
            x_adv: Any point.
            x: The clean image at the centre, inside the bounds.
            radius: In place of epsilon: a number, or one a row.
        """
        raise NotImplementedError  # each norm states its own

    def random_point(self, x: Tensor, key: Key, index: Tensor) -> Tensor:
        """A point drawn uniformly from the norm ball around `x`, then clamped to the pixel bounds.

        Args:
            x: Clean images.
            key: What the draw is for.
            index: (B,) identity of each image; equal identities draw equal points.
        """
        raise NotImplementedError  # each norm states its own

    def contains(self, x_adv: Tensor, x: Tensor, tolerance: float = TOLERANCE) -> Tensor:
        """Whether each row lies in the ball and in the bounds, (B,) bool."""
        flat = x_adv.flatten(1)
        inside = (flat >= self.lower - tolerance).all(1) & (flat <= self.upper + tolerance).all(1)
        return inside & (self.length(x_adv - x) <= self.epsilon + tolerance)

    def clamp(self, x: Tensor) -> Tensor:
        """Clamp to the pixel bounds."""
        return x.clamp(self.lower, self.upper)


@dataclass(frozen=True)
class Linf(ThreatModel):
    """Every pixel may change by at most epsilon.

    Example:
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> Linf(epsilon="1/4").project(x + torch.tensor([0.1, 0.9]), x).flatten().tolist()
        [0.6000000238418579, 0.75]
    """

    norm: ClassVar[str] = "Linf"

    def length(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).abs().amax(1)

    def steepest(self, gradient: Tensor) -> Tensor:
        return torch.where(gradient.isnan(), gradient, gradient.sign())  # torch may call the sign of NaN 0, hiding it

    def project(self, x_adv: Tensor, x: Tensor, radius: float | Tensor | None = None) -> Tensor:
        radius = _per_row(self.epsilon if radius is None else radius, x)
        low, high = self.clamp(x - radius), self.clamp(x + radius)
        return torch.maximum(torch.minimum(x_adv, high), low)

    def random_point(self, x: Tensor, key: Key, index: Tensor) -> Tensor:
        noise = uniform(key, index, x.shape[1:], dtype=x.dtype) * 2 - 1
        return self.clamp(x + self.epsilon * noise)


@dataclass(frozen=True)
class L2(ThreatModel):
    """The Euclidean length of the change is at most epsilon.

    Projection scales the change to the ball and then clamps to the bounds, as is customary. The result lies in both
    sets, because clamping moves every pixel towards the clean image; it is not always the nearest such point.

    Example:
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> L2(epsilon=0.5).project(x + torch.tensor([0.6, 0.8]), x).flatten().round(decimals=2).tolist()
        [0.800000011920929, 0.8999999761581421]
    """

    norm: ClassVar[str] = "L2"

    def length(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).norm(dim=1)

    def steepest(self, gradient: Tensor) -> Tensor:
        wide = (-1, *[1] * (gradient.dim() - 1))
        length = self.length(gradient)
        # squares of 1e-25 or 1e25 do not fit float32: such rows are brought to a largest element of 1 first
        odd = (length < SHORT) | length.isinf()
        largest = gradient.flatten(1).abs().amax(1)
        scale = torch.where(odd & (largest > 0), largest, 1.0)
        scaled = gradient / scale.view(wide)
        return scaled / torch.where(odd, self.length(scaled), length).clamp_min(SHORT).view(wide)

    def project(self, x_adv: Tensor, x: Tensor, radius: float | Tensor | None = None) -> Tensor:
        radius = _per_row(self.epsilon if radius is None else radius, x)
        delta = x_adv - x
        length = self.length(delta).view(-1, *[1] * (x.dim() - 1))
        return self.clamp(x + delta * (radius / length.clamp_min(1e-12)).clamp_max(1.0))

    def random_point(self, x: Tensor, key: Key, index: Tensor) -> Tensor:
        direction = self.steepest(normal(key.fold("direction"), index, x.shape[1:], dtype=x.dtype))
        share = uniform(key.fold("radius"), index, (1,), dtype=x.dtype) ** (1.0 / x[0].numel())
        return self.clamp(x + self.epsilon * share.view(-1, *[1] * (x.dim() - 1)) * direction)


@dataclass(frozen=True)
class L1(ThreatModel):
    r"""The sum of all pixels' changes is at most epsilon.

    Projection finds the nearest point of ball and bounds together: pixels move by
    :math:`\mathrm{clip}(\mathrm{sign}(d)\,(|d| - \lambda)_+)` with the smallest :math:`\lambda \ge 0` that fits, found
    by bisection (the clipped length falls monotonically in :math:`\lambda`). Points end inside the ball by a hair,
    eight units of rounding of its radius, so that rounding the sum of an image and its change does not lead outside.

    Source: Croce and Hein, ICML 2021, arXiv:2103.01208, on why ball and bounds must be projected on together.

    Example:
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> L1(epsilon=0.25).project(x + torch.tensor([0.1, 0.3]), x).flatten().round(decimals=4).tolist()
        [0.5249999761581421, 0.7250000238418579]
    """

    norm: ClassVar[str] = "L1"

    def length(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).abs().sum(1)

    def steepest(self, gradient: Tensor) -> Tensor:
        flat = gradient.flatten(1)
        best = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, best, flat.gather(1, best).sign()).view_as(gradient)

    def project(self, x_adv: Tensor, x: Tensor, radius: float | Tensor | None = None) -> Tensor:
        radius = self.epsilon if radius is None else radius
        flat, delta = x.flatten(1), (x_adv - x).flatten(1)
        low, high = self.lower - flat, self.upper - flat

        def shrink(threshold: Tensor) -> Tensor:
            moved = delta.sign() * (delta.abs() - threshold).clamp_min(0)
            return torch.maximum(torch.minimum(moved, high), low)

        below = torch.zeros_like(delta[:, :1])
        above = delta.abs().amax(1, keepdim=True)
        limit = radius.view(-1, 1) if isinstance(radius, Tensor) else radius
        limit = limit * (1 - 8 * torch.finfo(x.dtype).eps)  # else rounding leaves some rows outside
        fits = shrink(below).abs().sum(1, keepdim=True) <= limit
        for _ in range(60 if x.dtype == torch.float64 else 32):
            middle = (below + above) / 2
            small = shrink(middle).abs().sum(1, keepdim=True) <= limit
            above, below = torch.where(small, middle, above), torch.where(small, below, middle)
        return (flat + shrink(torch.where(fits, torch.zeros_like(above), above))).view_as(x)

    def random_point(self, x: Tensor, key: Key, index: Tensor) -> Tensor:
        # d + 1 exponentials divided by their sum are uniform on the simplex; dropping one makes the ball uniform
        count = x[0].numel()
        draws = -torch.log1p(-uniform(key.fold("size"), index, (count + 1,), dtype=x.dtype))
        sign = (uniform(key.fold("sign"), index, (count,), dtype=x.dtype) < 0.5).to(x.dtype) * 2 - 1
        return self.clamp(x + (self.epsilon * sign * draws[:, 1:] / draws.sum(1, keepdim=True)).view_as(x))


THREATS: dict[str, type[ThreatModel]] = {"Linf": Linf, "L2": L2, "L1": L1}


def build_threat(norm: str, epsilon: Any, bounds: Sequence[float] = (0.0, 1.0)) -> ThreatModel:
    """The threat model of that norm; upper and lower case are one.

    Raises:
        HoldfastError: the norm is none of Linf, L2, L1.
    """
    for name, kind in THREATS.items():
        if name.lower() == str(norm).lower():
            return kind(epsilon, *bounds)
    raise HoldfastError(f"threat norm {norm!r} is unknown: use one of {', '.join(THREATS)}")


def readable(epsilon: float) -> str:
    """Epsilon as a person writes it: n/255 where that is exact, else a short decimal.

    Example:
        >>> readable(8 / 255), readable(0.2)
        ('8/255', '0.2')
    """
    scaled = epsilon * 255
    if 0 < scaled < 50 and abs(scaled - round(scaled)) < 1e-9:
        return f"{round(scaled)}/255"
    return f"{epsilon:.6g}"
