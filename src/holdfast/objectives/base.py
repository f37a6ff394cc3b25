"""What an objective is: the per-example loss that compares the network's outputs on the sides it asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast import distributed
from holdfast.attacks.base import InnerLoss
from holdfast.errors import HoldfastError
from holdfast.forward import Attacked, Batch, Forward, View
from holdfast.functional import cross_entropy, kl
from holdfast.schedule import Progress


@dataclass(frozen=True)
class Measurement:
    """Something the loop must measure at the start of every epoch.

    Args:
        name: Where the value appears in `Progress.measured`.
        measure: Takes a view of the classifier (``"eval"``) and batches of augmented training images.
        images: How many training images the batches hold, at least.
        side: Whose BatchNorm branch the view runs under.
    """

    name: str
    measure: Callable[[View, Iterable[Batch]], float]
    images: int = 1024
    side: str = "adv"


class Objective(nn.Module):
    """The outer loss of a training method, written once for every model, attack and average.

    A subclass says which `sides` it reads and returns named per-example terms from `forward`, already weighted; the
    step averages them. It never sees the model. It may own trained parts (predictors) and buffers (memories, class
    means): both are checkpointed. Constructor arguments are kept under their own names.

    Attributes:
        couples_batch: A term depends on the rest of the batch (ranks, class means), so it is per process.
        measures: What the loop measures at an epoch's start.
        taps: Names of modules whose outputs `forward` wants as features.
        notes: What the person should be told once it is prepared.
        zero_at_equality: Names of terms that vanish where x_adv = x on the same view.
        needs_random_start: The inner loss has no gradient at x itself, so the attack must begin elsewhere.
        needs_networks: Names of the further networks that its sides run on ("guide").
        needs_others: Sides whose images the attack must make beside x_adv ("collaborative").
        untracked_sides: Sides whose forward leaves BatchNorm's running statistics alone.
        detached_sides: Sides of whose outputs no gradient is taken: their forward keeps no graph.
        least_attack_steps: How many steps the attack must take for the method to mean anything.
        attacks_soft_labels: Its attack climbs the loss against smoothed labels.
        takes_mixed_images: It makes sense with MixUp and CutMix.
    """

    couples_batch: bool = False
    measures: tuple[Measurement, ...] = ()
    taps: Sequence[str] = ()
    notes: Sequence[str] = ()
    zero_at_equality: tuple[str, ...] = ()
    needs_random_start: bool = False
    needs_networks: Sequence[str] = ()
    needs_others: Sequence[str] = ()
    untracked_sides: Sequence[str] = ()
    detached_sides: Sequence[str] = ()
    least_attack_steps: int = 0
    attacks_soft_labels: bool = False
    takes_mixed_images: bool = True

    def prepare(self, model: nn.Module, x: Tensor, images: int = 0) -> None:
        """Called once, before `AdversarialStep` and the optimiser: build what depends on sizes.

        Args:
            model: The classifier.
            x: A few images.
            images: How many training images there are, for memories with a row an image.
        """

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` was called, where it must be."""
        return True

    def sides(self, progress: Progress) -> tuple[str, ...]:
        """The outer forwards this step needs, in their order. Nobody pays for one that is not named."""
        return ("adv",)

    def attacks(self, sides: Sequence[str]) -> bool:
        """Whether these sides need the attack: those named ``adv…``, and what else the method's attack makes."""
        return any(side.startswith("adv") for side in sides)

    def inner_loss(self, view: View, batch: Batch, progress: Progress) -> InnerLoss:
        """What the attack maximises; cross-entropy against the hard labels unless a method says otherwise."""
        return lambda logits: cross_entropy(logits, batch.attacked_labels)

    def side_input(self, side: str, batch: Batch, attacked: Attacked | None) -> Tensor:
        """The images a side runs on.

        Those that the attack made for a side of this name, else those attacked for names ``adv…``, the second view
        for ``…2``, else x.
        """
        if attacked is not None and side in (attacked.others or ()):
            return attacked.others[side]  # type: ignore[index]  # None holds no side
        if side.startswith("adv"):
            assert attacked is not None  # the step attacks whenever such a side is asked for
            return attacked.x_adv
        if side.endswith("2"):
            if batch.x2 is None:
                raise HoldfastError(f"side {side!r} needs a second augmentation: set second_view in the data loader")
            return batch.x2
        return batch.x

    def forward(self, f: Forward) -> Mapping[str, Tensor]:
        """Named terms, each (B,), already weighted."""
        raise NotImplementedError  # every method states its own

    def after_epoch(self, progress: Progress) -> None:
        """Called at every epoch's end on all processes, with the progress of the last step: make buffers equal.

        Memories addressed by image index use `holdfast.distributed.merge_rows` instead.
        """
        distributed.average_buffers(self)

    def inner_passes(self, progress: Progress) -> float:
        """What `inner_loss` itself costs a step, in forward passes."""
        return 0.0

    def passes(self, progress: Progress) -> float:
        """Cost of the outer step in forward passes: a forward and a full backward (two) for each side.

        Detached sides have no backward. A further network counts as if it were as large as the classifier.
        """
        sides = self.sides(progress)
        return 3.0 * len(sides) - 2.0 * sum(side in self.detached_sides for side in sides)


def kl_to_clean(view: View, batch: Batch) -> InnerLoss:
    """KL(p(x) || p(.)), with the clean prediction computed once, under the view of the attack.

    Its value and its gradient are zero at x, so an attack on it needs a random start.
    """
    with torch.no_grad():
        clean = view(batch.x).logits
    return lambda logits: kl(clean, logits)


def require_word(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a word that is none of the allowed ones."""
    if value not in allowed:
        raise HoldfastError(f"{name} {value!r} is unknown: use one of {', '.join(allowed)}")
