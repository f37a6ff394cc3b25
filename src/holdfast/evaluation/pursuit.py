"""Running one attack on the images of a unit: full batches, every success verified, nothing run longer than needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from holdfast.attacks.stepwise import (
    Answer,
    Rows,
    StepwiseAttack,
    choose,
    draw_identity,
    likely_targets,
)
from holdfast.evaluation.networks import Deciding, Pass, SearchFailed, Searching
from holdfast.evaluation.unit import Unit
from holdfast.evaluation.watch import Watch
from holdfast.evaluation.work import Work
from holdfast.functional import margin, misclassified
from holdfast.keyed_random import Key
from holdfast.threat import TOLERANCE, ThreatModel

Tell = Callable[[int, int, int], None]
LOOK_EVERY = 10  # passes between two looks at claimed successes on an accelerator, where each costs a wait
NEAR = 0.02  # of the largest logit: a margin that low precision may get wrong


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What counts, and when a row may stop.

    Args:
        threat: The ball.
        key: Of all draws.
        until_nearest: Minimum norm: a row goes on after a success, and a nearer example replaces a farther one.
        at_end: Only the last misclassified point of a row is looked at, when the row has ended: what the reference does
            with randomised models, where every further look is another lottery ticket.
        look_every: Passes between two looks at what is claimed; None for 1 on the CPU and 10 on an accelerator, where
            each look is a wait.
    """

    threat: ThreatModel
    key: Key
    until_nearest: bool = False
    at_end: bool = False
    look_every: int | None = None


class Pursuit:
    """One attack on one unit.

    Jobs, one for each target, restart and image, are taken in the order of the reference: first target, all images,
    then the next target. While fewer images than fit a batch are left, the next targets of the same images are run
    beside the first. A job is dropped as soon as its image is broken.

    Args:
        attack: What to run.
        unit: Its images; what is found is written into it.
        deciding: Decides whether a claimed success is one.
        searching: Makes the passes.
        rules: What counts.
        number: The attack's place in the evaluation.
        batch_size: Rows that are run together.
        watch: Compares visited points with the deciding network.
    """

    def __init__(
        self,
        attack: StepwiseAttack,
        unit: Unit,
        deciding: Deciding,
        searching: Searching,
        rules: Rules,
        *,
        number: int,
        batch_size: int,
        watch: Watch | None = None,
    ) -> None:
        attack.require(rules.threat)
        self.attack, self.unit, self.rules, self.number = attack, unit, rules, number
        self.deciding, self.searching = deciding, searching
        self.batch_size, self.watch = batch_size, watch
        if attack.asks == "gradients":  # one image takes as much memory as it has classes
            self.batch_size = max(1, batch_size * 10 // unit.clean_logits.shape[1])
        self.key = rules.key.fold("attack", attack.name)
        self.length = attack.passes()[0] // attack.average
        self.look_every = rules.look_every or (1 if unit.x.device.type == "cpu" else LOOK_EVERY)
        self.keeps_claims = rules.at_end or self.look_every > 1
        needed = attack.needs_gradient(torch.arange(self.length)).long()
        self.backwards = torch.cat([torch.zeros(1, dtype=torch.int64), needed.cumsum(0)])  # by age
        self._make_jobs()

    def _make_jobs(self) -> None:
        """Every image, target and restart to be run, in order."""
        unit, attack = self.unit, self.attack
        todo = (unit.correct if self.rules.until_nearest else unit.robust).nonzero()[:, 0]
        targets = likely_targets(unit.clean_logits, unit.y, attack.targets) if attack.targets else None
        ranks = targets.shape[1] if targets is not None else 1
        jobs = [
            torch.stack([todo, torch.full_like(todo, rank), torch.full_like(todo, restart)])
            for rank in range(ranks)
            for restart in range(attack.restarts)
        ]
        self.job_image, self.job_rank, self.job_restart = torch.cat(jobs, 1)
        nothing = torch.full_like(self.job_image, -1)
        self.job_target = nothing if targets is None else targets[self.job_image, self.job_rank]
        self.next_job = 0

    def run(self, tell: Tell | None = None, pause: Callable[[], None] | None = None) -> None:
        """Run every job until it finishes or its image is broken.

        Args:
            tell: Told now and then how many passes were made since, how many jobs have not begun, and how many there
                are.
            pause: Called after every pass; it may raise, and the unit is then not finished.
        """
        self.unit.begin()
        if self.watch is not None:
            self.watch.attack(self.attack.name)
        passes = 0
        work: Work | None = None
        since = 0
        while True:
            work = self._refilled(work)
            if work is None:
                return
            since += 1
            try:
                self._pass(work)
            except SearchFailed as error:
                self._give_up(work, error)
                return
            if pause is not None:
                pause()
            passes += len(work.job) * (2 if self.attack.asks != "logits" else 1)
            if tell is not None and passes > 20 * len(work.job):
                tell(passes, len(self.job_image) - self.next_job, len(self.job_image))
                passes = 0
            ending = int(work.age.max()) >= self.length
            if self.keeps_claims and not ending and (self.rules.at_end or since < self.look_every):
                continue
            since = 0
            work = self._looked(work)

    def _give_up(self, work: Work, error: SearchFailed) -> None:
        """The network cannot be run any more: what was claimed is looked at, and the attack ends."""
        if self.watch is not None:
            self.watch.failed(self.attack.name, error)
        left = self._looked(work) if work.claimed is not None else work
        if left is not None:
            self._count(left)

    def _refilled(self, work: Work | None) -> Work | None:
        """The rows that go on, and new ones in the places that are free; None when nothing is left to do."""
        free = self.batch_size - (0 if work is None else len(work.job))
        if work is not None and free < max(1, self.batch_size // 8):
            return work
        parts = [] if work is None else [work]
        while free > 0 and self.next_job < len(self.job_image):
            chosen = torch.arange(self.next_job, min(self.next_job + free, len(self.job_image)))
            self.next_job = int(chosen[-1]) + 1
            chosen = chosen.to(self.job_image.device)
            chosen = chosen[self._open(self.job_image[chosen])]
            if len(chosen):
                parts.append(self._started(chosen))
                free -= len(chosen)
        return reduce(Work.join, parts) if parts else None

    def _open(self, image: Tensor) -> Tensor:
        """Which images are still to be attacked."""
        return torch.ones_like(image, dtype=torch.bool) if self.rules.until_nearest else self.unit.robust[image]

    def _started(self, chosen: Tensor) -> Work:
        """New rows for some jobs."""
        unit, image, restart = self.unit, self.job_image[chosen], self.job_restart[chosen]
        draw = draw_identity(unit.index[image], self.job_rank[chosen], restart)
        rows = Rows(unit.x[image], unit.y[image], self.job_target[chosen], draw)
        state = self.attack.start(rows, self.rules.threat, self.key)
        age = torch.zeros(len(chosen), dtype=torch.int64)
        worst = torch.full_like(restart, torch.inf, dtype=rows.x.dtype) if self.keeps_claims else None
        never = torch.zeros_like(restart, dtype=torch.bool)
        claim = rows.x if self.keeps_claims else None
        return Work(state, rows, chosen, image, restart, age, never, claim=claim, claimed=worst)

    def _pass(self, work: Work) -> None:
        """One pass of every row: count it, note what it claims, and let the attack go on."""
        attack = self.attack
        done = self._ask(work)
        if self.watch is not None and self.watch.due():
            needs = attack.needs_gradient(work.age)
            self.watch.look(work.state["point"], done, lambda logits: attack.loss(logits, work.rows), needs)
        work.age += 1
        self._claim(work, done.logits)
        gradient = done.gradient
        if gradient is None and attack.asks != "logits":
            gradient = torch.zeros_like(work.rows.x)
        answer = Answer(done.logits, done.loss, gradient)
        work.state = attack.advance(work.state, work.rows, answer, self.rules.threat, self.key)

    def _ask(self, work: Work) -> Pass:
        """The network's answer, rows in groups by what they need and how precise they must be."""
        groups = [
            (index, want, fast)
            for want, rows in self._by_need(work)
            for index, fast in self._by_precision(work, rows)
            if index is None or len(index)
        ]
        if len(groups) == 1:
            _, want, fast = groups[0]
            return self._averaged(work.state["point"], work.rows, want, fast=fast)
        parts = []
        for index, want, fast in groups:
            assert index is not None  # None stands for all rows, and then there is one group
            done = self._averaged(work.state["point"][index], work.rows.take(index), want, fast=fast)
            parts.append((index, done))
        return _merged(parts, len(work.job))

    def _by_need(self, work: Work) -> list[tuple[str, Tensor | None]]:
        """What is asked for, and of which rows (None: all). Ages lie on the CPU, so this waits for nothing."""
        needs = self.attack.needs_gradient(work.age)
        if bool(needs.all()):
            return [(self.attack.asks, None)]
        if not bool(needs.any()):
            return [("logits", None)]
        device = work.job.device
        return [(self.attack.asks, needs.nonzero()[:, 0].to(device)), ("logits", (~needs).nonzero()[:, 0].to(device))]

    def _by_precision(self, work: Work, rows: Tensor | None) -> list[tuple[Tensor | None, bool]]:
        """Rows that low precision may run, and those that it may not; only at a look is it known that there are any."""
        if not self.searching.low or not work.mixed:
            return [(rows, self.searching.low)]
        rows = torch.arange(len(work.job), device=work.job.device) if rows is None else rows
        precise = work.precise[rows]
        return [(rows[~precise], True), (rows[precise], False)]

    def _averaged(self, point: Tensor, rows: Rows, want: str, *, fast: bool) -> Pass:
        """One pass, or the last of several with the mean of their gradients."""

        def loss(logits: Tensor) -> Tensor:
            return self.attack.loss(logits, rows)

        done = self.searching.run(point, loss, want, fast=fast)
        gradient = done.gradient
        for _ in range(self.attack.average - 1):
            done = self.searching.run(point, loss, want, fast=fast)
            gradient = None if gradient is None or done.gradient is None else gradient + done.gradient
        return done._replace(gradient=None if gradient is None else gradient / self.attack.average)

    def _claim(self, work: Work, logits: Tensor) -> None:
        """Note misclassified points that would count, and rows that have come near the boundary."""
        threat, point = self.rules.threat, work.state["point"]
        wrong = misclassified(logits, work.rows.y)
        room = torch.nan_to_num(margin(logits, work.rows.y), nan=-1e30)
        worth = room
        if self.attack.inside:
            inside = torch.ones_like(wrong)
        else:
            worth = threat.length(point - work.rows.x)
            inside = worth <= threat.epsilon + TOLERANCE
        limit = self.unit.distance[work.image] if self.rules.until_nearest else None
        good = wrong & (inside if limit is None else worth < limit)
        if self.searching.low:
            near = inside if self.attack.inside else worth <= 1.1 * threat.epsilon
            work.precise |= near & (room.abs() < NEAR * logits.abs().amax(1))
        if not self.rules.until_nearest:
            self._note_margin(work.image, torch.where(inside, room, torch.inf))
        if not self.keeps_claims:
            work.claim, work.claimed = point, torch.where(good, worth, torch.inf)
            return
        assert work.claim is not None  # it is kept
        assert work.claimed is not None  # with it
        better = good if self.rules.at_end else good & (worth < work.claimed)
        work.claim = choose(better, point, work.claim)
        work.claimed = torch.where(better, worth, work.claimed)

    def _note_margin(self, image: Tensor, room: Tensor) -> None:
        """The least margin that the search saw, for images that nothing has broken."""
        least = self.unit.margin.scatter_reduce(0, image, room.to(self.unit.margin.dtype), "amin")
        self.unit.margin = torch.where(self.unit.robust, least, self.unit.margin)

    def _looked(self, work: Work) -> Work | None:
        """Verify what is claimed, and keep the rows that go on."""
        assert work.claimed is not None  # made by _claim
        ended = (work.age >= self.length).to(work.job.device)
        claims = work.claimed.isfinite() & (ended if self.rules.at_end else True)
        some = claims.nonzero()[:, 0]
        if len(some):
            work.precise[some] |= ~self._verified(work, some)
        if self.searching.low:
            work.mixed = bool(work.precise.any())
        going = self._open(work.image) & ~ended
        if not self.rules.at_end and self.keeps_claims:
            work.claimed = torch.full_like(work.claimed, torch.inf)
        if bool(going.all()):
            return work
        kept = going.nonzero()[:, 0]
        self._count(work.take((~going).nonzero()[:, 0]))
        return work.take(kept) if len(kept) else None

    def _count(self, work: Work) -> None:
        """Write down the passes of rows that leave."""
        attack, classes = self.attack, self.unit.clean_logits.shape[1]
        backwards = self.backwards[work.age].to(work.image.device)
        each = classes if attack.asks == "gradients" else 1
        forwards = work.age.to(work.image.device) * attack.average
        self.unit.forwards[self.number].index_add_(0, work.image, forwards)
        self.unit.backwards[self.number].index_add_(0, work.image, backwards * each * attack.average)

    def _verified(self, work: Work, some: Tensor) -> Tensor:
        """Let the deciding network judge some claims, and write the best of each image down. Returns which hold."""
        assert work.claim is not None  # made by _claim
        unit, threat = self.unit, self.rules.threat
        point, image, y = work.claim[some], work.image[some], work.rows.y[some]
        logits = self.deciding(point)
        unit.verified.index_add_(0, image, torch.ones_like(image))
        distance = threat.length(point - work.rows.x[some])
        holds = misclassified(logits, y)
        if self.rules.until_nearest:
            holds &= threat.with_epsilon(float("inf")).contains(point, work.rows.x[some])
        else:
            holds &= threat.contains(point, work.rows.x[some])
        good = holds.nonzero()[:, 0]
        if len(good):
            worth = distance if self.rules.until_nearest else work.job[some].to(distance.dtype)
            first = good[_first_of_each(image[good], worth[good], len(unit.y))]
            where = image[first]
            unit.robust[where] = False
            unit.example[where] = point[first]
            unit.distance[where] = distance[first]
            unit.margin[where] = margin(logits, y)[first].to(unit.margin.dtype)
            unit.prediction[where] = logits.argmax(1)[first]
            unit.broken_by[where] = self.number
            unit.target[where] = self.job_target[work.job[some][first]]
            unit.restart[where] = work.restart[some][first]
        return holds


def _first_of_each(image: Tensor, worth: Tensor, count: int) -> Tensor:
    """For every image among the rows, the place of its row of lowest worth; of equal ones, the first."""
    best = torch.full((count,), torch.inf, device=worth.device, dtype=worth.dtype)
    best = best.scatter_reduce(0, image, worth, "amin")
    place = torch.arange(len(image), device=image.device)
    far = torch.full((count,), len(image), device=image.device)
    first = far.scatter_reduce(0, image, torch.where(worth == best[image], place, len(image)), "amin")
    return first[first < len(image)]


def _merged(parts: list[tuple[Tensor, Pass]], count: int) -> Pass:
    """Answers to groups of rows, in the order of all rows; rows without gradient hold zeros."""
    first = parts[0][1]
    logits = first.logits.new_zeros(count, first.logits.shape[1])
    loss = first.loss.new_zeros(count)
    gradients = [done.gradient for _, done in parts if done.gradient is not None]
    gradient = gradients[0].new_zeros(count, *gradients[0].shape[1:]) if gradients else None
    for index, done in parts:
        logits[index], loss[index] = done.logits, done.loss
        if done.gradient is not None and gradient is not None:
            gradient[index] = done.gradient
    return Pass(logits, loss, gradient)
