"""Looking at a search while it works: are its logits and gradients still those of the network that decides?

Now and then, at passes and rows that a key picks, a visited point is shown to the deciding network, and its gradient
is taken through the bare network in a batch of another size. When a unit is done, the search is asked once more what it
answered at the very beginning. What is seen is written beside the unit, so that it outlives a kill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.evaluation.agreement import FULL, HALF, gradients_apart, logits_apart, moved
from holdfast.evaluation.flags import Flag
from holdfast.evaluation.landmarks import Landmarks
from holdfast.evaluation.networks import Deciding, Pass, SearchFailed, Searching, Trouble
from holdfast.evaluation.paths import told, undisturbed
from holdfast.keyed_random import Key

ROWS = 8  # of a pass, at most
EVERY = 16  # one row of so many is looked at
SECOND_LOOKS = 4  # in a unit: each costs a pass of the whole batch
EDGES = 0.25  # of the points: kinks
SLOPE = 0.8  # honest networks lie above 0.95, whatever their layers
AGAIN = 4  # every so manieth of the first points is asked again


@dataclass
class Sight:
    """What was seen of one unit's search, or of several units'.

    Attributes:
        starts: How the search differed from the bare network when it began; none where it did not.
        cut: Rows that asked for a gradient and got none, and why.
        size: The largest batch that still worked, where larger ones did not (0: all did), and why.
        failed: Attacks that ended because the network could not be run any more, and why.
        logits: Rows whose logits were compared, and those that were apart.
        gradients: Rows whose gradients were compared, those that were apart, those where the search's was exactly
            zero, and those of them where the model's was not, which no rounding does.
        again: Rows that were asked again at the end, and those that were answered otherwise than at the start.
        slope_rows: Rows in which the gradient was compared with differences of the deciding network's answers.
        slope: The least cosine between the two, of any unit.
        edges: Points whose gradient was taken again a little inside [0, 1], and those where much of it is zero at the
            very edge.
        forward: Passes made for looking, of one image each.
        backward: Likewise.
        start_forward: Passes made for the comparison at the start, which every unit names and is counted once.
        start_backward: Likewise.
    """

    starts: list[str] = field(default_factory=list)
    cut: int = 0
    cut_says: str = ""
    size: int = 0
    size_says: str = ""
    failed: list[str] = field(default_factory=list)
    failed_says: str = ""
    logits: int = 0
    logits_apart: int = 0
    gradients: int = 0
    gradients_apart: int = 0
    gradients_zero: int = 0
    gradients_lost: int = 0
    again: int = 0
    again_apart: int = 0
    slope_rows: int = 0
    slope: float = 1.0
    edges: int = 0
    edges_apart: int = 0
    share: float = 0.0
    forward: int = 0
    backward: int = 0
    start_forward: int = 0
    start_backward: int = 0

    @property
    def passes(self) -> int:
        """All passes made for looking."""
        return self.forward + self.backward + self.start_forward + self.start_backward

    def add(self, other: Sight) -> None:
        """Take in what another one saw."""
        self.starts += [each for each in other.starts if each not in self.starts]
        self.failed += [each for each in other.failed if each not in self.failed]
        for name in ("cut_says", "size_says", "failed_says"):
            setattr(self, name, getattr(self, name) or getattr(other, name))
        self.size = min((size for size in (self.size, other.size) if size), default=0)
        for name in ("share", "start_forward", "start_backward"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))
        self.slope = min(self.slope, other.slope)
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


COUNTS = (
    "cut", "logits", "logits_apart", "gradients", "gradients_apart", "gradients_zero", "gradients_lost", "again",
    "again_apart", "slope_rows", "edges", "edges_apart", "forward", "backward",
)  # fmt: skip


def as_dict(sight: Sight) -> dict[str, Any]:
    """For JSON."""
    return asdict(sight)


def from_dict(found: Mapping[str, Any]) -> Sight:
    """What `as_dict` wrote; what is missing counts as not seen.

    Raises:
        TypeError: a figure is of another type.
    """
    sight = Sight()
    for each in fields(Sight):
        value = found.get(each.name, getattr(sight, each.name))
        kind = float if each.name in ("share", "slope") else type(getattr(sight, each.name))
        if not isinstance(value, (kind, int) if kind is float else kind):
            raise TypeError(f"{each.name} is {value!r}")
        setattr(sight, each.name, value)
    return sight


def together(sights: Iterable[Mapping[str, Any]]) -> Sight:
    """What was seen of all units."""
    whole = Sight()
    for each in sights:
        whole.add(from_dict(each))
    return whole


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
        self.landmarks = landmarks if looks else None
        self.searching, self.deciding, self.key, self.looks = searching, deciding, key, looks
        judge = searching.judge
        self.tolerance = HALF if searching.low else judge.tolerance
        self.first: tuple[Tensor, Tensor | None] | None = None
        self.begin(0)
        if looks:
            self.first = self._ask_first()
        asked = len(landmarks.points) if self.landmarks is not None and landmarks is not None else 0
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
        trouble = self.searching.trouble
        self.searching.trouble = Trouble()  # what is seen is not the attack's
        try:
            again = self.searching.run(aside, lambda logits: (logits * weights).sum(1), want, fast=fast)
        except SearchFailed:
            return None
        finally:
            self.searching.trouble = trouble
        self.sight.forward += len(point)
        self.sight.backward += len(point) if want == "gradient" else 0
        return aside, again

    def _ask_first(self) -> tuple[Tensor, Tensor | None]:
        """What the search answers to a few of the points that it was compared on."""
        judge = self.searching.judge
        points, weights = judge.points[::AGAIN], judge.weights[::AGAIN]
        want = "gradient" if self.searching.differentiable else "logits"
        with undisturbed(judge.model, points.device):
            done = self.searching.run(points, lambda logits: (logits * weights.to(logits)).sum(1), want, fast=False)
        self.sight.forward += len(points)
        self.sight.backward += len(points) if want == "gradient" else 0
        return done.logits, done.gradient

    def end(self) -> Sight:
        """A unit is done: what was seen of it."""
        sight, trouble = self.sight, self.searching.trouble
        if self.first is not None:
            self._again(*self.first)
        if self.landmarks is not None:
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
        if not self.searching.differentiable:
            return  # another flag says so

        def quiet(x: Tensor) -> Tensor:
            with undisturbed(judge.model, x.device):
                return self.deciding(x)

        def gradient(x: Tensor) -> Tensor:
            weights = landmarks.weights
            with undisturbed(judge.model, x.device):
                done = self.searching.run(
                    x, lambda logits: (logits * weights.to(logits)).sum(1), "gradient", fast=False
                )
            sight.forward += len(x)
            sight.backward += len(x)
            return torch.zeros_like(x) if done.gradient is None else done.gradient

        trouble = self.searching.trouble
        self.searching.trouble = Trouble()  # what is seen is not the attack's
        try:
            slopes = landmarks.slopes(quiet, gradient, halves=judge.tolerance is HALF)
            apart = landmarks.edges(gradient) > judge.tolerance.gradients
        except SearchFailed:
            return
        finally:
            self.searching.trouble = trouble
        sight.forward += slopes.forward
        sight.edges += len(apart)
        sight.edges_apart += int(apart.sum())
        sight.slope_rows += slopes.rows
        if slopes.rows >= 2:
            sight.slope = min(sight.slope, slopes.cosine)

    def failed(self, attack: str, error: SearchFailed) -> None:
        """An attack ended because the network could not be run."""
        self.sight.failed.append(attack)
        self.sight.failed_says = str(error)


def flags_of(sight: Sight, raised: Sequence[Flag] = ()) -> list[Flag]:
    """What was seen of the searches gives reason to doubt.

    Args:
        sight: Of all units.
        raised: Flags that the probes raised; the same is not said twice.

    Example:
        >>> [flag.name for flag in flags_of(Sight(cut=3, cut_says="the logits carry no graph"))]
        ['no-gradients']
    """
    found = [_differs(sight), _none(sight), _fails(sight), _misleads(sight)]
    names = {flag.name for flag in raised if flag.serious}
    return [flag for flag in found if flag is not None and flag.name not in names]


def _differs(sight: Sight) -> Flag | None:
    """The search ran on another network than the one that decides."""
    says = list(sight.starts)
    for what, apart, n, share in (
        ("logits are not those of the model", sight.logits_apart, sight.logits, sight.share),
        ("gradients are not those of the model", sight.gradients_apart, sight.gradients, sight.share),
        ("gradient is zero and that of the model is not", sight.gradients_lost, sight.gradients, FULL.share),
    ):
        if apart >= 2 and apart > share * n:
            says.append(f"at {apart} of {n} visited points its {what}")
    if sight.again_apart >= 2:
        says.append(f"{sight.again_apart} of {sight.again} points are answered otherwise at the end than at the start")
    if not says:
        return None
    counts = ("logits", "logits_apart", "gradients", "gradients_apart", "gradients_lost", "again", "again_apart")
    told = f"the search saw another network than the one that decides: {'; '.join(says)}"
    return Flag("search-differs", told, "serious", {name: getattr(sight, name) for name in counts})


def _none(sight: Sight) -> Flag | None:
    """Attacks asked for gradients and got none."""
    values = {"cut": sight.cut, "gradients": sight.gradients, "gradients_zero": sight.gradients_zero}
    if sight.cut:
        says = f"attacks asked for a gradient and got none, {sight.cut} times: {sight.cut_says}"
        return Flag("no-gradients", says, "serious", values)
    if sight.gradients >= 4 and sight.gradients_zero == sight.gradients:
        says = f"the gradient that attacks got was exactly zero at all {sight.gradients} visited points looked at"
        return Flag("no-gradients", says, "serious", values)
    return None


def _misleads(sight: Sight) -> Flag | None:
    """The gradient is not that of the function that decides."""
    says = []
    if sight.slope < SLOPE:
        says.append(
            "what the search's gradient promises and what the model's answers do in small steps have a cosine of"
            f" {sight.slope:.2f} only ({sight.slope_rows} points of the ball)"
        )
    if sight.edges_apart >= 2 and sight.edges_apart > EDGES * sight.edges:
        says.append(
            f"at {sight.edges_apart} of {sight.edges} points of the ball pixels of exactly 0 or 1 have no gradient, and"
            " have one a little inside"
        )
    if not says:
        return None
    values = {"cosine": sight.slope, "points": sight.slope_rows, "edges": sight.edges, "edges_apart": sight.edges_apart}
    return Flag("misleading-gradients", "; ".join(says), "serious", values)


def _fails(sight: Sight) -> Flag | None:
    """The network could not be run in the batches that were asked for."""
    if sight.failed:
        says = f"{' and '.join(sight.failed)} ended early, the model could not be run any more: {sight.failed_says}"
        return Flag("batch-dependent", says, "serious", {"failed": len(sight.failed)})
    if sight.size:
        says = f"the search ran on {sight.size} images together, because with more {sight.size_says}"
        return Flag("batch-dependent", says, "serious", {"size": sight.size})
    return None
