"""How long an evaluation will still take."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from holdfast.attacks.stepwise import StepwiseAttack


def passes_of(attack: StepwiseAttack, classes: int) -> int:
    """Forward and backward passes that an image costs which the attack does not break."""
    forward, backward = attack.passes()
    if attack.asks == "gradients":
        backward *= classes
    jobs = attack.restarts * (min(attack.targets, classes - 1) if attack.targets else 1)
    return jobs * (forward + backward)


@dataclass
class Estimate:
    """Counts what is done and says how long the rest will take.

    Args:
        attacks: In order.
        classes: K.
        images: All that are to be evaluated by this process.
    """

    attacks: tuple[StepwiseAttack, ...]
    classes: int
    images: int
    done_images: int = 0
    done_passes: int = 0
    attacked: int = 0  # images whose unit has begun
    attackable: int = 0  # of these, those that were classified correctly
    now: int = 0  # the attack that is running
    left_now: int = 0  # images of the unit that are still robust
    share_left: float = 1.0  # of the running attack's jobs, those that have not begun
    since: float = field(default_factory=time.monotonic)

    def unit(self, images: int, correct: int) -> None:
        """A unit begins."""
        self.attacked += images
        self.attackable += correct

    def attack(self, number: int, left: int, jobs_left: int, jobs: int) -> None:
        """An attack goes on: how many of its jobs have not begun."""
        self.now, self.left_now = number, left
        self.share_left = jobs_left / max(1, jobs)

    @property
    def seconds_left(self) -> float | None:
        """A guess: the passes that are left, if what is robust now stays so, at the speed until now."""
        elapsed = time.monotonic() - self.since
        if self.done_passes == 0:
            return None
        cost = [passes_of(attack, self.classes) for attack in self.attacks]
        here = self.left_now * (cost[self.now] * self.share_left + sum(cost[self.now + 1 :]))
        waiting = max(0, self.images - self.attacked)
        share = self.attackable / max(1, self.attacked)
        each = self.done_passes / max(1, self.attacked) if self.done_images else share * sum(cost)
        later = waiting * each
        return elapsed * (here + later) / self.done_passes
