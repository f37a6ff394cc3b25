"""What a view transform is: an inner maximisation over weights, or another BatchNorm branch, as a change of views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from holdfast.forward import Views
from holdfast.schedule import Progress

Ascended = Literal["objective", "adversarial_ce"]

Search = Callable[[Views, Sequence[str], Ascended], Tensor]
"""``search(views, sides, loss)`` runs these sides under candidate views and returns the mean over all rows of the loss
to climb: the ``"objective"``'s terms or the adversarial cross-entropy. It never moves running statistics. Gradients
taken of it are those of this process's rows; `holdfast.distributed.average_in_place` makes them all processes'."""


@runtime_checkable
class ViewTransform(Protocol):
    """Replaces views by views: weights perturbed as values, another branch, another network."""

    def prepare(self, model: nn.Module) -> None:
        """Called once, before optimiser, DistributedDataParallel and compilation: what must be added to the model."""
        ...

    def __call__(self, views: Views, search: Search, progress: Progress) -> Views:
        """The views that the outer forwards use."""
        ...

    def passes(self, progress: Progress) -> float:
        """What the search adds to a step, in forward passes."""
        ...
