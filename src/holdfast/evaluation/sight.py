"""What was seen of a search while it worked, beside its unit in the folder, and the flags that it raises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from holdfast.evaluation.agreement import FULL
from holdfast.evaluation.flags import Flag

EDGES = 0.25  # of the points: kinks
SLOPE = 0.8  # honest networks lie above 0.9


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
