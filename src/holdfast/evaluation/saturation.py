"""Which attacks still see a gradient where logits are so large that the cross-entropy has none."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from holdfast.attacks.stepwise import Rows, StepwiseAttack
from holdfast.evaluation.flags import LONG_SEARCH

SATURATED = torch.tensor([[1e4, 7e3, 5e3, 4e3, 3e3, 2e3, 1e3, 500.0, 100.0, 0.0]])
"""Logits of one image whose label has the probability 1 exactly."""


def withstands_saturation(attacks: Sequence[StepwiseAttack]) -> bool:
    """Return whether one of the attacks searches by a loss with a gradient there, and long enough to be relied upon.

    The loss is not known by its name but differentiated, so that attacks of one's own count. Twenty backward passes
    are long enough, restarts and targets together: the rule of `black-box-beats-white-box`.

    Example:
        >>> from holdfast.attacks.apgd import APGD
        >>> withstands_saturation([APGD()]), withstands_saturation([APGD(), APGD(objective="dlr")])
        (False, True)
    """
    return any(_backward_passes(attack) >= LONG_SEARCH and _has_gradient(attack) for attack in attacks)


def _backward_passes(attack: StepwiseAttack) -> int:
    """Passes of all searches of one image."""
    return attack.passes()[1] * attack.restarts * max(1, attack.targets)


def _has_gradient(attack: StepwiseAttack) -> bool:
    """Whether its search sees one where the logits are saturated."""
    if attack.asks == "gradients":  # of the logits themselves, whatever the loss
        return True
    if attack.asks == "logits":
        return False
    one = torch.ones(1, dtype=torch.int64)
    rows = Rows(torch.zeros(1, 1, 1, 1), 0 * one, one if attack.targets else -one, 0 * one)
    try:
        with torch.enable_grad():
            logits = SATURATED.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(attack.loss(logits, rows).sum(), logits)
    except Exception:  # whatever the loss of one's own attack raises for an image that it was not made for
        return False
    return bool((gradient != 0).any())
