"""What a view transform is: an inner maximisation over weights, or another BatchNorm branch, as a change of views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from torch import Tensor, nn

from holdfast.forward import Views
from holdfast.schedule import Progress

Ascended = Literal["objective", "adversarial_ce"]


class Search(Protocol):
    """What a weight search climbs.

    ``search(views, sides, loss, below=None)`` runs these sides under candidate views and returns the mean over all rows
    of the loss to climb: the ``"objective"``'s terms or the adversarial cross-entropy. Rows whose loss is not below
    `below` count as zero. It never moves running statistics. Gradients taken of it are those of this process's rows;
    `holdfast.distributed.average_in_place` makes them all processes'.
    """

    def __call__(self, views: Views, sides: Sequence[str], loss: Ascended, below: float | None = None) -> Tensor: ...


class ViewTransform:
    """Replaces views by views: weights perturbed as values, another branch, another network.

    Constructor arguments are kept under their own names.

    Attributes:
        needs_sides: Sides without which the transform makes no sense: a recipe whose objective never runs one of them
            is refused.
        perturbs: Sides whose weights it replaces.
        branches: The BatchNorm branch of every side that does not run on ``"main"``; known once prepared.
        notes: What the person should be told once the transform is prepared.
    """

    needs_sides: Sequence[str] = ()
    perturbs: Sequence[str] = ()
    branches: Mapping[str, str] = {}
    notes: Sequence[str] = ()

    def prepare(self, model: nn.Module) -> None:
        """Called once, before optimiser, DistributedDataParallel and compilation: what must be added to the model."""

    def __call__(self, views: Views, search: Search, progress: Progress) -> Views:
        """The views that the outer forwards use."""
        raise NotImplementedError  # every transform states its own

    def passes(self, progress: Progress, sides: Sequence[str]) -> float:
        """What the search adds to a step whose outer forwards are these sides, in forward passes."""
        return 0.0
