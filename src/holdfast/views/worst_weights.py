"""AWP, RWP, and ISEAT's ν: weights perturbed in the direction in which the loss rises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from holdfast import distributed
from holdfast.errors import HoldfastError
from holdfast.forward import Views
from holdfast.schedule import Progress, Scalar, as_scalar, value_at
from holdfast.views.base import Ascended, Search, ViewTransform

_TINY = 1e-20  # keeps a zero gradient from dividing by zero


class WorstWeights(ViewTransform):
    r"""Adversarial weight perturbation: the named sides run at θ + ν, with ν uphill and as long as γ times the weights.

    .. math:: \nu_l = \gamma\,\frac{\|\theta_l\|}{\|v_l\|}\,v_l, \qquad v = \sum_{s=1}^{S} \eta\,\nabla_\theta
        \frac1B \sum_i \mathcal{L}_i(\theta + v^{(s-1)})

    for every trained parameter l of two or more dimensions; frozen ones (``requires_grad=False``) stay as they are and
    do not count in a global scale. ν is a constant of the step: the gradient with respect to θ is the
    gradient at θ + ν, and θ itself is never changed. AWP takes one step; RWP ten, a global scale, and only rows whose
    loss is `below` 1.7.

    Args:
        gamma: γ >= 0, or a schedule; 0 costs nothing.
        sides: Sides that run at θ + ν.
        ascend: What is climbed: ``"adversarial_ce"`` on the side ``"adv"``, or the whole ``"objective"``.
        steps: S >= 1.
        step_size: η > 0; without effect where one step is taken.
        scale: γ is relative to each parameter ``"tensor"``, or to all of them together (``"global"``).
        below: Climb only rows whose loss is below this; None for all. The mean is still over all rows.

    Shapes:
        Weights keep theirs.
    Units:
        γ is a share of the weights' length.
    Raises:
        HoldfastError: a setting is out of range.
    Source: AWP, Wu et al., NeurIPS 2020, arXiv:2004.05884, eq. (7) to (10); RWP, Yu et al., IJCAI 2022,
        arXiv:2205.14826; ISEAT, eq. (10) and (11).
    Differs from the reference: the reference takes the optimiser's step at θ + ν, so that weight decay sees ν; here it
        sees θ. Statistics of the search are those of the batch and never tracked.

    Example:
        >>> WorstWeights(gamma=0.01).passes(Progress(), ("adv",))
        3.0
    """

    def __init__(
        self,
        *,
        gamma: Scalar = 0.01,
        sides: Sequence[str] = ("adv",),
        ascend: Ascended = "adversarial_ce",
        steps: int = 1,
        step_size: float = 0.01,
        scale: Literal["tensor", "global"] = "tensor",
        below: float | None = None,
    ) -> None:
        self.gamma = as_scalar("gamma", gamma, minimum=0)
        if isinstance(sides, str) or not sides:
            raise HoldfastError(f"sides is {sides!r}: give a list of sides, for example [adv] or [clean, adv]")
        if ascend not in ("adversarial_ce", "objective"):
            raise HoldfastError(f"ascend {ascend!r} is unknown: use adversarial_ce or objective")
        if scale not in ("tensor", "global"):
            raise HoldfastError(f"scale {scale!r} is unknown: use tensor or global")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise HoldfastError(f"steps is {steps!r}: give a whole number of at least 1")
        if not step_size > 0:
            raise HoldfastError(f"step_size is {step_size}: give a positive number")
        self.perturbs = tuple(sides)
        self.sides, self.steps, self.step_size = tuple(sides), steps, step_size
        self.ascend: Ascended = ascend
        self.scale, self.below = scale, below

    def prepare(self, model: nn.Module) -> None:
        if not any(map(_perturbed, model.parameters())):
            raise HoldfastError(
                "the model trains no weights of two or more dimensions that could be perturbed: leave WorstWeights out"
            )

    @property
    def needs_sides(self) -> tuple[str, ...]:  # type: ignore[override]  # what depends on the settings
        """The sides that run perturbed, and the one that is climbed."""
        climbed = ("adv",) if self.ascend == "adversarial_ce" else ()
        return tuple(dict.fromkeys((*self.sides, *climbed)))

    def climbed(self, sides: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The sides that the search runs, and those of them that run at the candidate weights."""
        if self.ascend == "adversarial_ce":
            return ("adv",), ("adv",)
        return tuple(sides), tuple(side for side in sides if side in self.sides)

    def acts(self, sides: Sequence[str], progress: Progress) -> bool:
        """Whether there is anything to do now: γ > 0, a side to perturb, and what is climbed among the sides."""
        climbable = self.ascend == "objective" or "adv" in sides
        return value_at(self.gamma, progress) > 0 and climbable and any(side in sides for side in self.sides)

    def passes(self, progress: Progress, sides: Sequence[str]) -> float:
        if not self.acts(sides, progress):
            return 0.0
        run, moved = self.climbed(sides)
        return self.steps * (len(run) + 2.0 * len(moved))

    def __call__(self, views: Views, search: Search, progress: Progress) -> Views:
        if not self.acts(tuple(views), progress):
            return views
        gamma = value_at(self.gamma, progress)
        perturbed = [side for side in self.sides if side in views]
        weights = dict(views[perturbed[0]].model.named_parameters())
        ascent = self.ascent(views, weights, search)
        with torch.no_grad():
            nu = self.scaled(weights, ascent, gamma)
        state = {name: weight + nu[name] if name in nu else weight for name, weight in weights.items()}
        return {**views, **{side: replace(views[side], state=state) for side in perturbed}}

    def ascent(self, views: Views, weights: Mapping[str, Tensor], search: Search) -> dict[str, Tensor]:
        """v: the sum of the ascent steps, for every parameter that is perturbed."""
        run, moved = self.climbed(tuple(views))
        v = {name: torch.zeros_like(weight) for name, weight in weights.items() if _perturbed(weight)}
        fixed = {name: weight.detach() for name, weight in weights.items()}
        for _ in range(self.steps):
            leaves = {name: (fixed[name] + step).requires_grad_(True) for name, step in v.items()}
            candidate = {**fixed, **leaves}
            tried = {
                side: replace(views[side], state=candidate if side in moved else fixed)
                if views[side].model is views[moved[0]].model
                else views[side]  # a further network, which is never perturbed
                for side in run
            }
            with torch.enable_grad():
                value = search(tried, run, self.ascend, self.below)
                gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            found = [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, v.values(), strict=True)]
            distributed.average_in_place(found)
            v = {name: v[name] + self.step_size * gradient for name, gradient in zip(v, found, strict=True)}
        return v

    def scaled(self, weights: Mapping[str, Tensor], v: Mapping[str, Tensor], gamma: float) -> dict[str, Tensor]:
        """ν: v made as long as γ times the weights."""
        if self.scale == "tensor":
            return {name: gamma * weights[name].norm() / (step.norm() + _TINY) * step for name, step in v.items()}
        length = torch.stack([weights[name].norm() for name in v]).norm()
        factor = gamma * length / (torch.stack([step.norm() for step in v.values()]).norm() + _TINY)
        return {name: factor * step for name, step in v.items()}


def _perturbed(weight: Tensor) -> bool:
    """Whether a search moves this parameter."""
    return weight.requires_grad and weight.dim() > 1
