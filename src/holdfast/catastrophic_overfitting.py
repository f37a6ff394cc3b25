"""Catastrophic overfitting: a network that learns to fool one-step attacks, and falls to every stronger one.

It happens within a few hundred steps of one-step adversarial training and shows neither in the loss nor in the accuracy
under the training attack, which rise. So a run looks for it by itself.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from holdfast import distributed
from holdfast.attacks.fgsm import FGSM
from holdfast.attacks.pgd import PGD
from holdfast.errors import HoldfastError
from holdfast.forward import Batch, View
from holdfast.functional import correct, cross_entropy
from holdfast.schedule import Progress
from holdfast.threat import ThreatModel

RESPONSES = ("auto", "off", "warn", "stop", "rollback")
DROP = 0.2  # Fast-AT's: PGD accuracy this far below the best so far
GAP = 0.2  # one-step accuracy this far above PGD's
STEPS = 5


@dataclass
class OvertakenAttack:
    """Looks, on a few held-out images, whether one step still tells what several steps would.

    A look suspects catastrophic overfitting where the accuracy under FGSM lies more than 0.2 above that under PGD-5,
    and the latter below half of it, or more than 0.2 below the best of the run. Two such looks in a row find it: one
    may be a dip from which training recovers.

    Attributes:
        best: The best PGD-5 accuracy so far.
        suspected: Whether the last look suspected it.
        found: Whether the last two did.
        rollbacks: How often the run was set back.
        good: What the run is set back to: the state at the last look that did not find it.

    Source: Wong et al., ICLR 2020, arXiv:2001.03994, and its code (the drop of PGD-5 accuracy by 0.2).
    Differs from the reference: held-out images instead of a training batch; FGSM's accuracy beside PGD's, which sets it
        apart from a network that has merely got worse; the drop is measured from the best of the run; two looks.

    Example:
        >>> guard = OvertakenAttack()
        >>> [guard.judge(one_step, pgd) for one_step, pgd in ((0.5, 0.45), (0.9, 0.02), (0.9, 0.02), (0.3, 0.2))]
        [False, False, True, False]
    """

    best: float = 0.0
    suspected: bool = False
    found: bool = False
    rollbacks: int = 0
    good: dict[str, Any] | None = None
    last: dict[str, float] = field(default_factory=dict)

    def look(self, view: View, x: Tensor, y: Tensor, threat: ThreatModel) -> bool:
        """Measure both accuracies under this view, and judge."""
        batch = Batch(x, y)
        accuracies = []
        for attack in (FGSM(), PGD(steps=STEPS, step_size=threat.epsilon / 2, early_stop=0)):
            found = attack(view, batch, lambda logits: cross_entropy(logits, y), threat=threat, progress=Progress())
            with torch.no_grad():
                accuracies.append(correct(view(found.x_adv).logits, y).double().mean())
        one_step, pgd = (distributed.total(torch.stack(accuracies)) / distributed.world_size()).tolist()
        return self.judge(one_step, pgd)

    def judge(self, one_step: float, pgd: float) -> bool:
        """Whether these accuracies show it."""
        before = self.suspected
        self.suspected = one_step > pgd + GAP and (pgd < one_step / 2 or pgd < self.best - DROP)
        self.found = before and self.suspected
        self.best = max(self.best, pgd)
        self.last = {"fgsm_accuracy": one_step, f"pgd{STEPS}_accuracy": pgd}
        return self.found

    def message(self, epoch: int) -> str:
        """What the person is told."""
        one_step, pgd = self.last.values()
        return (
            f"catastrophic overfitting in epoch {epoch}: {pgd:.0%} of held-out images hold against PGD-{STEPS}"
            f" ({self.best:.0%} before), {one_step:.0%} against FGSM"
        )

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on after a kill."""
        names = ("best", "suspected", "found", "rollbacks")
        return {**{name: getattr(self, name) for name in names}, "last": dict(self.last), "good": self.good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.best, self.suspected, self.found = state["best"], state["suspected"], state["found"]
        self.rollbacks = state["rollbacks"]
        self.last, self.good = dict(state["last"]), state["good"]


def response(word: str, attack: object) -> str:
    """What is done when it is found: ``"auto"`` warns where the training attack, or the own step, takes one step.

    Raises:
        HoldfastError: an unknown word.
    """
    if word not in RESPONSES:
        raise HoldfastError(
            f"catastrophic_overfitting {word!r} is unknown: use {', '.join(RESPONSES[:-1])} or rollback"
        )
    if word != "auto":
        return word
    return "warn" if getattr(attack, "steps", None) == 1 else "off"


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of a state that later steps do not change."""
    return copy.deepcopy(state)
