"""Free-AT: one backward gives the gradient of the weights and that of the perturbation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import distributed
from holdfast.attacks.base import checked_step_size, require_steepest
from holdfast.errors import HoldfastError
from holdfast.forward import Attacked, Batch
from holdfast.objectives.base import Objective
from holdfast.recipe import Recipe
from holdfast.schedule import Progress, Scalar, value_at
from holdfast.step import AdversarialStep


@dataclass(frozen=True, kw_only=True)
class Free:
    r"""Free-AT: every batch is trained on m times, and its perturbation climbs by the gradients of these passes.

    .. math:: \theta \leftarrow \theta - \eta\,\nabla_\theta \ell(f_\theta(x + \delta), y), \qquad
        \delta \leftarrow \Pi\bigl(\delta + \alpha\,\mathrm{sign}(\nabla_x \ell(f_\theta(x + \delta), y))\bigr)

    both from one backward. δ begins at zero and is carried on from replay to replay and from batch to batch, by the
    place in the batch.

    Args:
        replays: m >= 1; 8 on CIFAR-10. A run then takes m times as many optimiser steps an epoch, so its epochs are
            usually divided by m.
        step_size: α in pixel scale, or a schedule; None is epsilon.

    Shapes:
        δ: (B, C, H, W), a buffer.
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: replays is no whole number, the norm is L1, or the recipe has an attack or view transforms.
    Source: Shafahi et al., NeurIPS 2019, arXiv:1904.12843, algorithm 1. Reference code: `train_free.py` of
        locuslab/fast_adversarial.
    Differs from the reference: x + δ is clamped to the pixel bounds before every pass, there not before the first on a
        new batch.

    Example:
        >>> Free(replays=8).replays
        8
    """

    replays: int = 8
    step_size: Scalar | str | None = None

    steps = 1

    def __post_init__(self) -> None:
        if isinstance(self.replays, bool) or not isinstance(self.replays, int) or self.replays < 1:
            raise HoldfastError(f"replays is {self.replays!r}: give a whole number of at least 1")
        object.__setattr__(self, "step_size", checked_step_size(self.step_size))

    def passes(self, recipe: Recipe, progress: Progress) -> float:
        """A forward and a full backward for every optimiser step, of which a batch has m."""
        return recipe.objective.passes(progress)

    def refusal(self, recipe: Recipe) -> str | None:
        """Free-AT takes its attack from the training pass itself: nothing may change that pass."""
        if recipe.views:
            return (
                f"Free-AT attacks with the gradient of the training pass, which {type(recipe.views[0]).__name__} would"
                " run at other weights or statistics: leave the views out, or use the recipe of a method with an attack"
            )
        if recipe.attack is not None:
            return "Free-AT makes its own perturbation from the training pass: give it a recipe without an attack"
        objective, sides = recipe.objective, recipe.sides_ever()
        ran = ", ".join(dict.fromkeys((*sides, *objective.needs_others)))
        odd = [side for side in sides if side.startswith("adv") and side != "adv"]
        if "adv" not in sides or odd or objective.needs_others or objective.least_attack_steps > 1:
            return (
                f"Free-AT makes one attacked image of each, and {type(objective).__name__} runs on {ran} or counts"
                " attack steps: use another objective (--objective.name adversarial_training)"
            )
        if objective.needs_random_start:
            return (
                f"Free-AT's perturbation begins at zero, where {type(objective).__name__} has no gradient: use another"
                " objective (--objective.name adversarial_training)"
            )
        return None

    def __call__(self, recipe: Recipe, model: nn.Module, **settings: Any) -> FreeStep:
        return FreeStep(recipe, model, self, **settings)


class FreeStep(AdversarialStep):
    """The step of `Free`: one replay of a batch."""

    delta: Tensor

    def __init__(self, recipe: Recipe, model: nn.Module, free: Free, **settings: Any) -> None:
        require_steepest(recipe.threat, "Free-AT")
        super().__init__(recipe, model, **settings)
        self.free = free
        self.replays = free.replays
        self.register_buffer("delta", torch.zeros(0))
        self.leaf: tuple[Tensor, Tensor] | None = None  # the images of this pass and its clean ones

    def find(
        self, batch: Batch, objective: Objective, progress: Progress, *, model: nn.Module | None = None
    ) -> Attacked:
        """The images at the carried perturbation; in training they take up the gradient of the coming backward."""
        x = batch.x.detach()
        with torch.no_grad():
            x_adv = self.recipe.threat.project(x + self.carried(x), x)
        if model is None and torch.is_grad_enabled():
            x_adv = x_adv.requires_grad_(True)
            self.leaf = (x_adv, x)
        return Attacked(x_adv, torch.zeros_like(batch.y))

    def carried(self, x: Tensor) -> Tensor:
        """δ for the rows of this batch: a view of the buffer. Each process has every so manieth row of a batch."""
        world = distributed.world_size()
        rows = max(distributed.rank() + world * (len(x) - 1) + 1, self.recipe.batch_size)  # the same on every process
        if self.delta.shape[1:] != x.shape[1:] or len(self.delta) < rows:
            self.delta = torch.zeros(rows, *x.shape[1:], dtype=x.dtype, device=x.device)
        return self.delta[distributed.rank() :: world][: len(x)]

    @torch.no_grad()
    def after_backward(self, progress: Progress) -> None:
        """Move δ by the gradient that the backward left on the images."""
        if self.leaf is None:
            return  # a clean warm-up makes no perturbation
        (x_adv, x), self.leaf = self.leaf, None
        assert x_adv.grad is not None
        threat = self.recipe.threat
        step_size = threat.epsilon if self.free.step_size is None else value_at(self.free.step_size, progress)  # type: ignore[arg-type]  # no text
        moved = threat.project(x_adv.detach() + step_size * threat.steepest(x_adv.grad), x)
        self.carried(x).copy_(moved - x)

    def after_epoch(self, progress: Progress) -> None:
        super().after_epoch(progress)
        own = torch.zeros(len(self.delta), dtype=torch.bool, device=self.delta.device)
        own[distributed.rank() :: distributed.world_size()] = True
        distributed.merge_rows(self.delta, own)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}delta")
        if saved is not None:
            self.delta = torch.zeros_like(saved, device=self.delta.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)
