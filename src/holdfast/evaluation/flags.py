"""Flags: what makes a robust accuracy doubtful, named so that a program can act on it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from holdfast.errors import HoldfastError, unknown_name
from holdfast.evaluation.statistics import binomial_tail, wilson_interval
from holdfast.threat import ThreatModel

Severity = Literal["warning", "serious"]

FLAGS: dict[str, str] = {
    "pixel-range": "The images do not look like pixels in [0, 1].",
    "train-mode": "The model, or a part of it, was given in training mode.",
    "probabilities": "The model returns probabilities instead of logits.",
    "constant-predictions": "The model predicts one class whatever the image.",
    "randomised": "The model answers the same image differently each time.",
    "batch-dependent": "The answer to an image depends on the other images of its batch.",
    "optimises-at-inference": "The model computes gradients of its own while it classifies.",
    "non-finite": "The model's outputs or gradients are NaN or infinite.",
    "search-differs": "The attacks saw another network than the one that decides.",
    "no-gradients": "No gradient reaches the pixels: the graph is cut.",
    "zero-gradients": "The gradient with respect to the pixels is exactly zero on some images.",
    "vanishing-gradients": "The gradient is far too small for how much the loss changes inside the ball.",
    "misleading-gradients": "The loss does not grow along its own gradient.",
    "saturated-cross-entropy": "The cross-entropy has no gradient because the logits are too large.",
    "one-step-beats-many": "One large step breaks images that many small steps do not.",
    "accurate-at-huge-epsilon": "Images survive a ball in which every image can become plain grey.",
    "loss-not-monotone": "A larger ball does not give the attack a larger loss.",
    "black-box-beats-white-box": "An attack without gradients breaks images that attacks with gradients left.",
    "restarts-still-winning": "The last restart of an attack still breaks images.",
    "few-images": "So few images were evaluated that the accuracy is known only roughly.",
}
"""Every flag with what it means in a sentence, in the order in which flags are told; its page is docs/flags/NAME.md."""

BLACK_BOX = ("square", "uniform noise", "transfer from")
SQUARE_SHARE = 0.002  # of all images: the reference's own limit for Square
LEFT_SHARE = 0.01  # of the images that gradients left: what a black-box attack may break of them by chance
SIGNIFICANT = 0.01
SERIOUS_SHARE = 0.01
LONG_SEARCH = 20  # backward passes: a shorter search may lose to random search honestly
HALF_WIDTH = 0.05


@dataclass(frozen=True)
class Flag:
    """One reason to doubt a robust accuracy.

    Args:
        name: A key of `FLAGS`.
        says: One sentence with the measured figures.
        severity: ``"serious"`` where the accuracy must not be quoted before the cause is known.
        values: The measured figures, finite.

    Raises:
        HoldfastError: there is no flag of that name, or a severity is neither of the two.

    Example:
        >>> Flag("few-images", "n is 10", "warning", {"n": 10}).page
        'docs/flags/few-images.md'
    """

    name: str
    says: str
    severity: Severity
    values: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in FLAGS:
            raise unknown_name("flag", self.name, FLAGS)
        if self.severity not in ("warning", "serious"):
            raise HoldfastError(f"severity {self.severity!r} is unknown: use warning or serious")

    @property
    def page(self) -> str:
        """Where the flag is explained."""
        return f"docs/flags/{self.name}.md"

    @property
    def serious(self) -> bool:
        """The accuracy must not be quoted."""
        return self.severity == "serious"


def as_dict(flag: Flag) -> dict[str, Any]:
    """A flag for JSON.

    Example:
        >>> as_dict(Flag("few-images", "n is 10", "warning", {"n": 10}))["values"]
        {'n': 10.0}
    """
    return {
        "name": flag.name,
        "severity": flag.severity,
        "says": flag.says,
        "values": {name: float(value) for name, value in flag.values.items()},
        "page": flag.page,
    }


def from_dict(found: Mapping[str, Any]) -> Flag:
    """The flag that `as_dict` wrote.

    Example:
        >>> from_dict(as_dict(Flag("few-images", "n is 10", "warning", {"n": 10}))).values
        {'n': 10.0}
    """
    return Flag(found["name"], found["says"], found["severity"], dict(found["values"]))


def from_rows(rows: Sequence[Mapping[str, Any]], *, threat: ThreatModel) -> list[Flag]:
    """What the finished rows of an evaluation give reason to doubt.

    Args:
        rows: One an image: its verdict, the attack and the restart that broke it, and the passes that every attack
            spent on it. Restarts count from 0.
        threat: The ball, for the wording.

    Example:
        >>> from holdfast.threat import Linf
        >>> row = {"verdict": "robust", "attack": None, "restart": None, "forward": {}, "backward": {}}
        >>> [flag.name for flag in from_rows([row] * 10, threat=Linf(0.1))]
        ['few-images']
    """
    found = (_black_box(rows), _restarts(rows), _few_images(rows, threat))
    return [flag for flag in found if flag is not None]


def is_black_box(attack: str) -> bool:
    """Whether the attack of that name asks the network for no gradient.

    Example:
        >>> is_black_box("Square-5000"), is_black_box("APGD-CE")
        (True, False)
    """
    return attack.lower().startswith(BLACK_BOX)


def _black_box(rows: Sequence[Mapping[str, Any]]) -> Flag | None:
    """Images that gradients left and something else broke."""
    left, broken, searched, by = 0, 0, 0, set()
    for row in rows:
        before = _gradients_before(row)
        if not before:  # broken or wrong by then; or a black-box attack that came first, which shows nothing
            continue
        left += 1
        if row["verdict"] == "broken" and row["attack"] is not None and is_black_box(row["attack"]):
            broken += 1
            searched += sum(row["backward"].get(name, 0) for name in before)
            by.add(row["attack"])
    if broken == 0:
        return None
    share, chance, passes = broken / len(rows), binomial_tail(broken, left, LEFT_SHARE), searched / broken
    serious = chance < SIGNIFICANT and passes >= LONG_SEARCH
    if not serious and share <= SQUARE_SHARE:
        return None
    names = " and ".join(sorted(by))
    return Flag(
        "black-box-beats-white-box",
        f"{names} broke {broken} of the {left} images that attacks with gradients had left after {passes:.0f} backward"
        f" passes each ({share:.1%} of all {len(rows)})",
        "serious" if serious else "warning",
        {"broken": broken, "left": left, "p": chance, "n": len(rows), "share": share, "backward_passes": passes},
    )


def _gradients_before(row: Mapping[str, Any]) -> list[str]:
    """The attacks with gradients that had searched an image in vain before the first black-box attack did."""
    before: list[str] = []
    for name, passes in row["forward"].items():  # in the order of the protocol
        if passes > 0 and is_black_box(name):
            return before
        if passes > 0:
            before.append(name)
    return []


def _restarts(rows: Sequence[Mapping[str, Any]]) -> Flag | None:
    """Images that the last restart of an attack broke when all the others had failed.

    Restarts may run side by side, and then the one that is named is only the first to arrive. That the others had
    failed shows in the passes: what robust images spent is the whole, and all but one restart's part must be gone.
    """
    worst: Flag | None = None
    for name in dict.fromkeys(name for row in rows for name in row["forward"]):
        match = re.search(r"(\d+) restarts", name)
        full = max((row["forward"].get(name, 0) for row in rows if row["verdict"] == "robust"), default=0)
        if match is None or "target" in name or full == 0:
            continue
        restarts = int(match.group(1))
        last = sum(
            row["verdict"] == "broken"
            and row["attack"] == name
            and row["restart"] == restarts - 1
            and row["forward"].get(name, 0) >= full * (restarts - 1) / restarts
            for row in rows
        )
        share = last / len(rows)
        if share <= SQUARE_SHARE or (worst is not None and last <= worst.values["broken"]):
            continue
        worst = Flag(
            "restarts-still-winning",
            f"the last of the {restarts} restarts of {name} still broke {last} of {len(rows)} images ({share:.1%})",
            "serious" if last > 1 and share > SERIOUS_SHARE else "warning",
            {"broken": last, "n": len(rows), "share": share, "restarts": restarts},
        )
    return worst


def _few_images(rows: Sequence[Mapping[str, Any]], threat: ThreatModel) -> Flag | None:
    """An interval wider than five points to either side."""
    robust = sum(row["verdict"] == "robust" for row in rows)
    low, high = wilson_interval(robust, len(rows))
    half = _half_width(robust, len(rows))
    if half <= HALF_WIDTH:
        return None
    need = _images_needed(robust / max(1, len(rows)))
    return Flag(
        "few-images",
        f"robust accuracy within {threat} is known to {100 * half:.1f} points only (n = {len(rows)}, 95 % Wilson"
        f" interval [{low:.1%}, {high:.1%}]); about {need} images would make it {100 * HALF_WIDTH:.0f}",
        "warning",
        {"n": len(rows), "robust": robust, "half_width": half, "needed": need},
    )


def _half_width(robust: int, n: int) -> float:
    low, high = wilson_interval(robust, n)
    return (high - low) / 2


def _images_needed(share: float) -> int:
    """How many images make the interval's half width `HALF_WIDTH` at this share: at most 381."""
    return next(n for n in itertools.count(1) if _half_width(round(share * n), n) <= HALF_WIDTH)
