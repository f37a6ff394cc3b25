"""Where training stands, and hyper-parameters that follow it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from holdfast.errors import HoldfastError
from holdfast.keyed_random import Key


@dataclass(frozen=True)
class Progress:
    """Where training stands. Every scalar hyper-parameter may be a function of it.

    Attributes:
        epoch: Epochs finished before this step, from 0.
        step: Optimiser steps finished before this one, from 0; replays count.
        steps_per_epoch: Optimiser steps an epoch.
        epochs: Length of the whole run.
        warmup_steps: The first so many steps train on clean images only.
        stage: How often the learning rate has dropped so far; None lets `AdversarialStep` ask the recipe's schedule.
        replay: Which replay of the same batch this is (Free-AT), from 0.
        measured: What the objective asked to be measured at the epoch's start.
        seed: The run's seed; all keyed randomness starts from it.
    """

    epoch: int = 0
    step: int = 0
    steps_per_epoch: int = 1
    epochs: int = 1
    warmup_steps: int = 0
    stage: int | None = None
    replay: int = 0
    measured: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def fraction(self) -> float:
        """Share of the run that is finished, 0 … 1."""
        return min(1.0, self.step / max(1, self.total_steps))

    @property
    def warming_up(self) -> bool:
        """Whether this step still trains on clean images only."""
        return self.step < self.warmup_steps

    @property
    def adversarial_epochs(self) -> int:
        """Epochs, this one included, that held at least one adversarial step (0 while all was warm-up)."""
        clean_epochs = self.warmup_steps // max(1, self.steps_per_epoch)
        return max(0, self.epoch + 1 - clean_epochs)

    def key(self, purpose: str) -> Key:
        """The key for this purpose in this epoch and replay; fold in what else the draw depends on."""
        return Key(self.seed).fold(purpose, self.epoch, self.replay)


@dataclass(frozen=True)
class Schedule:
    """A scalar that follows `Progress` through knots.

    Args:
        knots: (position, value) pairs in rising position; before the first and after the last the value is constant.
        interpolation: ``"step"`` keeps each knot's value until the next, ``"linear"`` and ``"cosine"`` go over.
        by: What the position counts: the ``"fraction"`` of the run (0 … 1), the ``"epoch"``, or the learning-rate
            ``"stage"``.

    Raises:
        HoldfastError: no knots, positions that fall, or a word that is none of the above.

    Example:
        >>> halved = Schedule(knots=((0, 0.1), (0.5, 0.01)), interpolation="step")
        >>> halved(Progress(step=49, epochs=100)), halved(Progress(step=50, epochs=100))
        (0.1, 0.01)
    """

    knots: Sequence[Sequence[float]]
    interpolation: Literal["step", "linear", "cosine"] = "linear"
    by: Literal["fraction", "epoch", "stage"] = "fraction"

    def __post_init__(self) -> None:
        try:
            knots = tuple((float(position), float(value)) for position, value in self.knots)
        except (TypeError, ValueError):
            raise HoldfastError(f"schedule knots {self.knots!r} are not pairs: write [[0, 1], [0.5, 0.1]]") from None
        if not knots or any(later[0] < earlier[0] for earlier, later in pairwise(knots)):
            raise HoldfastError(f"schedule knots {self.knots!r} must be a list with rising positions")
        if self.by == "fraction" and not all(0 <= position <= 1 for position, _ in knots):
            raise HoldfastError(f"schedule knots {self.knots!r} are fractions of the run: positions lie in [0, 1]")
        for word, allowed in (
            (self.interpolation, ("step", "linear", "cosine")),
            (self.by, ("fraction", "epoch", "stage")),
        ):
            if word not in allowed:
                raise HoldfastError(f"schedule word {word!r} is unknown: use one of {', '.join(allowed)}")
        object.__setattr__(self, "knots", knots)

    def at(self, position: float) -> float:
        """The value at a position."""
        knots = self.knots
        if position < knots[0][0]:
            return knots[0][1]
        for (begin, start), (end, goal) in pairwise(knots):
            if position < end:
                if self.interpolation == "step" or end == begin:
                    return start
                share = (position - begin) / (end - begin)
                if self.interpolation == "cosine":
                    share = (1 - math.cos(math.pi * share)) / 2
                return start + (goal - start) * share
        return knots[-1][1]

    def __call__(self, progress: Progress) -> float:
        return self.at(getattr(progress, self.by) or 0)

    def stage(self, fraction: float) -> int:
        """How often the value has started to drop by this fraction of the run: a learning-rate schedule's stages."""
        drops = 0
        for (begin, start), (end, goal) in pairwise(self.knots):
            if goal < start:
                drops += fraction >= (end if self.interpolation == "step" else begin)
        return drops

    def as_config(self) -> dict[str, Any]:
        """Plain values from which the schedule can be built again."""
        return {"knots": [list(knot) for knot in self.knots], "interpolation": self.interpolation, "by": self.by}


Scalar = float | Mapping[str, Any] | Callable[[Progress], float]
"""A number, a function of `Progress`, or a schedule's configuration ``{"knots": …}``."""


def as_scalar(name: str, value: Scalar, *, minimum: float | None = None) -> float | Callable[[Progress], float]:
    """Check a hyper-parameter once, at the border, and turn a schedule's configuration into the schedule.

    Raises:
        HoldfastError: it is no finite number and no schedule, or it falls below the minimum.
    """
    if isinstance(value, Mapping):
        try:
            value = Schedule(**value)
        except TypeError:
            raise HoldfastError(
                f"{name}: {dict(value)!r} is no schedule: write {{knots: [[0, 1], [1, 0]], interpolation: linear}}"
            ) from None
    if callable(value):
        values = [knot[1] for knot in value.knots] if isinstance(value, Schedule) else []
    elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise HoldfastError(f"{name} is {value!r}: give a finite number or a schedule")
    else:
        values = [value]
    if minimum is not None and any(number < minimum for number in values):
        raise HoldfastError(f"{name} is {value!r}: it must be at least {minimum:g}")
    return value if callable(value) else float(value)


def value_at(scalar: Scalar, progress: Progress) -> float:
    """The value of a hyper-parameter now."""
    if isinstance(scalar, Mapping):
        scalar = Schedule(**scalar)
    return float(scalar(progress)) if callable(scalar) else float(scalar)


def constant(value: float) -> Schedule:
    """The same value throughout."""
    return Schedule(((0.0, value),), "step")


def linear(start: float, end: float, *, begin: float = 0.0, until: float = 1.0) -> Schedule:
    """From `start` to `end` between two fractions of the run.

    Example:
        >>> linear(0, 1)(Progress(step=25, epochs=100))
        0.25
    """
    return Schedule(((begin, start), (until, end)), "linear")


def piecewise(*knots: tuple[float, float]) -> Schedule:
    """Keeps each knot's value until the next position."""
    return Schedule(knots, "step")


def piecewise_linear(*knots: tuple[float, float]) -> Schedule:
    """Straight lines between the knots."""
    return Schedule(knots, "linear")


def one_cycle(*, rise: float = 0.3, start: float = 1 / 25, end: float = 1 / 250_000) -> Schedule:
    """Up to 1 and down again along half cosines, as a factor of the peak learning rate.

    Source: Smith and Topin, 2018, arXiv:1708.07120; the proportions are those of PyTorch's `OneCycleLR`.
    Differs from the reference: evaluated at every step, not once an epoch.
    """
    return Schedule(((0.0, start), (rise, 1.0), (1.0, end)), "cosine")


def after_first_decay(value: float) -> Schedule:
    """0 until the learning rate has dropped for the first time, then `value`."""
    return Schedule(((0, 0.0), (1, value)), "step", "stage")


def piat_lambda(n: float, coefficients: Sequence[float] = (1, 1, 1, 10)) -> float:
    r"""The share of the previous parameters that PIAT keeps at its n-th interpolation.

    .. math:: \lambda = g(n) = \frac{a n + b}{c n + d}

    Source: PIAT, arXiv:2303.13955, eq. (4); a = b = c = 1, d = 10.

    Example:
        >>> round(piat_lambda(1), 3), round(piat_lambda(120), 3)
        (0.182, 0.931)
    """
    a, b, c, d = coefficients
    return (a * n + b) / (c * n + d)
