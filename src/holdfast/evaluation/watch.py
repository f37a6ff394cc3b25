"""Looking at a search while it works: are its logits and gradients still those of the network that decides?

Now and then, at passes and rows that a key picks, a visited point is shown to the deciding network, and its gradient
is taken through the bare network in a batch of another size. When a unit is done, the search is asked once more what it
answered at the very beginning. What is seen is written beside the unit, so that it outlives a kill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.evaluation.agreement import HALF, gradients_apart, logits_apart, moved
from holdfast.evaluation.landmarks import ENOUGH, Landmarks
from holdfast.evaluation.networks import Deciding, Pass, SearchFailed, Searching, Trouble
from holdfast.evaluation.paths import undisturbed
from holdfast.evaluation.running import told
from holdfast.evaluation.sight import Sight
from holdfast.keyed_random import Key

ROWS = 8  # of a pass, at most
EVERY = 16  # one row of so many is looked at
SECOND_LOOKS = 4  # in a unit: each costs a pass of the whole batch
AGAIN = 4  # every so manieth of the first points is asked again


class _Compared(NamedTuple):
    """Rows, (R,) bool: logits apart, a gradient was asked for, it is another one, it is exactly zero."""

    apart: Tensor
    asked: Tensor
    off: Tensor
    zero: Tensor


class Watch:
    """What looks at the searches of one process.

    Args:
        searching: Whose answers are looked at.
        deciding: The network that decides.
        key: Of the choice of passes and rows.
        looks: Whether visited points are compared; what goes wrong in a search by itself is always noted.
        landmarks: Points that the deciding network was asked about before anything else.
    """

    def __init__(
        self, searching: Searching, deciding: Deciding, key: Key, *, looks: bool, landmarks: Landmarks | None = None
    ) -> None:
        self.landmarks, self.images = landmarks if looks else None, 0
        self.searching, self.deciding, self.key, self.looks = searching, deciding, key, looks
        judge = searching.judge
        self.tolerance = HALF if searching.low else judge.tolerance
        self.first: tuple[Tensor, Tensor | None] | None = None
        self.begin(0)
        if looks:
            self.first = self._ask_first()
        asked = 0 if self.landmarks is None else len(self.landmarks.points)
        self.start = judge.passes[0] + self.sight.forward + asked, judge.passes[1] + self.sight.backward

    def begin(self, unit: int) -> None:
        """A unit begins."""
        self.sight = Sight(starts=[self.searching.differs] if self.searching.differs else [])
        self.searching.trouble = Trouble()
        self.unit_key, self.second_looks = self.key.fold("unit", unit), 0
        self.attack("")

    def attack(self, name: str) -> None:
        """An attack begins."""
        self.attack_key, self.count = self.unit_key.fold(name), 0
        self.next = 1 + self.attack_key.fold("first").value % 2

    def due(self) -> bool:
        """Whether this pass is looked at: soon the first, then one each time the count has doubled or tripled."""
        self.count += 1
        if not self.looks or self.count < self.next or self.second_looks > SECOND_LOOKS:
            return False
        share = (self.attack_key.fold("next", self.count).value % 1000) / 1000
        self.next = self.count + 1 + int(self.count * (1 + share))
        return True

    def look(
        self, point: Tensor, done: Pass, loss: Callable[[Tensor], Tensor], needs: Tensor, *, fast: bool = True
    ) -> None:
        """Compare some rows of a pass with the bare network.

        Args:
            point: Where the pass was made.
            done: What the search answered.
            loss: Logits of all rows to the attack's loss of each.
            needs: Which rows asked for a gradient, (R,) bool.
            fast: Whether low precision was allowed.

        Shapes:
            point: (R, C, H, W).
        """
        some = self._some(len(point)).to(point.device)
        weights = self._weights(done, loss)
        with undisturbed(self.searching.judge.model, point.device):
            seen = self._compared(point, done, weights, some, needs)
            self.sight.logits += len(some)
            self.sight.gradients += int(seen.asked.sum())
            self.sight.gradients_zero += int((seen.asked & seen.zero).sum())
            apart, off = seen.apart, seen.off
            if bool((apart | off).any()):
                self.second_looks += 1
                again = self._moved_pass(point, weights, done, fast=fast)
                if again is not None:
                    second = self._compared(*again, weights, some, needs)
                    apart, off = apart & second.apart, off & second.off
        self.sight.logits_apart += int(apart.sum())
        self.sight.gradients_apart += int(off.sum())
        self.sight.gradients_lost += int((off & seen.zero).sum())

    def _some(self, count: int) -> Tensor:
        """Places of the rows that are looked at; sometimes an even number of them, sometimes an odd one."""
        key = self.attack_key.fold("rows", self.count)
        most = max(1, min(ROWS, count // EVERY))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(key.torch_seed))
        return order[: max(1, most - key.value % 2)]

    def _weights(self, done: Pass, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """What the loss's gradient weighs the logits with: a gradient of all logits is weighed at random."""
        if done.gradient is not None and done.gradient.dim() == 5:
            generator = torch.Generator().manual_seed(self.attack_key.fold("weights", self.count).torch_seed)
            return torch.randn(done.logits.shape, generator=generator).to(done.logits)
        with torch.enable_grad():
            logits = done.logits.detach().clone().requires_grad_(True)
            value = loss(logits)
            if not value.requires_grad:
                return torch.zeros_like(done.logits)
            return torch.autograd.grad(value.sum(), logits)[0]

    def _compared(self, point: Tensor, done: Pass, weights: Tensor, some: Tensor, needs: Tensor) -> _Compared:
        """Some rows of a pass beside the deciding network."""
        few, weights = point[some], weights[some]
        never = torch.zeros(len(some), dtype=torch.bool, device=point.device)
        try:
            logits = self.deciding(few)
        except HoldfastError:  # it cannot run so few: the probes say so
            return _Compared(never, never, never, never)
        self.sight.forward += len(few)
        apart = logits_apart(done.logits[some], logits) > self.tolerance.logits
        asked = needs.to(point.device)[some] & (weights != 0).any(1)
        if done.gradient is None or not bool(asked.any()):
            return _Compared(apart, never, never, never)
        gradient = done.gradient[some]
        if gradient.dim() == 5:
            gradient = (gradient * weights.view(*weights.shape, 1, 1, 1)).sum(1)
        off, wanted = never, self._bare(few, weights)
        if wanted is not None:
            off = asked & (gradients_apart(gradient, wanted, weights, logits) > self.tolerance.gradients)
        return _Compared(apart, asked, off, (gradient == 0).flatten(1).all(1))

    def _bare(self, x: Tensor, weights: Tensor) -> Tensor | None:
        """The bare network's gradient; None where it has none here."""
        try:
            wanted = self.searching.judge.gradient(x, weights)
        except Exception as error:  # whatever a person's code raises
            told(error)
            return None
        self.sight.forward += len(x)
        self.sight.backward += len(x)
        return wanted

    def _moved_pass(self, point: Tensor, weights: Tensor, done: Pass, *, fast: bool) -> tuple[Tensor, Pass] | None:
        """The search's answer to points a little aside, where no pixels are tied and no unit is just at its kink."""
        aside = moved(point, self.attack_key.fold("aside", self.count))
        want = "logits" if done.gradient is None else "gradient"
        try:
            with self._set_aside():
                return aside, self._run(aside, weights, want, fast=fast)
        except SearchFailed:
            return None

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """What goes wrong in passes made for looking is not the attack's."""
        trouble = self.searching.trouble
        self.searching.trouble = Trouble()
        try:
            yield
        finally:
            self.searching.trouble = trouble

    def _run(self, x: Tensor, weights: Tensor, want: str, *, fast: bool = False) -> Pass:
        """A pass of the search with weighted logits as its loss, counted."""
        done = self.searching.run(x, lambda logits: (logits * weights.to(logits)).sum(1), want, fast=fast)
        self.sight.forward += len(x)
        self.sight.backward += len(x) if want == "gradient" else 0
        return done

    def _ask_first(self) -> tuple[Tensor, Tensor | None]:
        """What the search answers to a few of the points that it was compared on."""
        judge = self.searching.judge
        points, weights = judge.points[::AGAIN], judge.weights[::AGAIN]
        want = "gradient" if self.searching.differentiable else "logits"
        with undisturbed(judge.model, points.device):
            done = self._run(points, weights, want)
        return done.logits, done.gradient

    def end(self, images: int, *, last: bool = True) -> Sight:
        """A unit is done: what was seen of it.

        Landmarks are asked about once in as many images as there are landmarks, so that small units cost no more, and
        after the last unit.
        """
        sight, trouble = self.sight, self.searching.trouble
        if self.first is not None:
            self._again(*self.first)
        self.images += images
        if self.landmarks is not None and (last or self.images >= len(self.landmarks.points)):
            self.images = 0
            self._revisit(self.landmarks)
        sight.cut, sight.cut_says = trouble.cut, trouble.why
        sight.size, sight.size_says = trouble.size, trouble.fails
        sight.share = self.tolerance.share
        sight.start_forward, sight.start_backward = self.start
        return sight

    def _again(self, logits: Tensor, gradient: Tensor | None) -> None:
        """Ask the search, and the deciding network, what was asked at the beginning."""
        judge, sight = self.searching.judge, self.sight
        points, weights, decided = judge.points[::AGAIN], judge.weights[::AGAIN], judge.decided[::AGAIN]
        try:
            now, steers = self._ask_first()
            with undisturbed(judge.model, points.device):
                decides = self.deciding(points)
        except SearchFailed:
            return
        sight.forward += len(points)
        tolerance = judge.tolerance
        other = (logits_apart(now, logits) > tolerance.logits) | (logits_apart(decides, decided) > tolerance.logits)
        if gradient is not None and steers is not None:
            other |= gradients_apart(steers, gradient, weights, decided) > tolerance.gradients
        elif gradient is not None:
            other = torch.ones_like(other)
        sight.again += len(points)
        sight.again_apart += int(other.sum())

    def _revisit(self, landmarks: Landmarks) -> None:
        """Ask the deciding network what it was asked first of all, and hold the search's gradient against it."""
        judge, sight = self.searching.judge, self.sight
        with undisturbed(judge.model, landmarks.points.device):
            changed = landmarks.changed(self.deciding, judge.tolerance.logits)
        sight.forward += len(changed)
        sight.again += len(changed)
        sight.again_apart += int(changed.sum())
        if not self.searching.differentiable or len(changed) < ENOUGH:
            return  # another flag says so, or nothing would be said of so few

        def quiet(x: Tensor) -> Tensor:
            with undisturbed(judge.model, x.device):
                return self.deciding(x)

        def gradient(x: Tensor) -> Tensor:
            with undisturbed(judge.model, x.device):
                done = self._run(x, landmarks.weights, "gradient")
            return torch.zeros_like(x) if done.gradient is None else done.gradient

        try:
            with self._set_aside():
                slopes = landmarks.slopes(quiet, gradient, halves=judge.tolerance is HALF)
                apart = landmarks.edges(gradient) > judge.tolerance.gradients
        except SearchFailed:
            return
        sight.forward += slopes.forward
        sight.edges += len(apart)
        sight.edges_apart += int(apart.sum())
        sight.slope_rows += slopes.rows
        sight.slope = min(sight.slope, slopes.cosine)

    def failed(self, attack: str, error: SearchFailed) -> None:
        """An attack ended because the network could not be run."""
        self.sight.failed.append(attack)
        self.sight.failed_says = str(error)
