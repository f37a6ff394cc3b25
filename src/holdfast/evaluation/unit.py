"""A unit of an evaluation: a fixed set of images, and what is known of each so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from holdfast.attacks.stepwise import StepwiseAttack
from holdfast.evaluation.networks import Deciding
from holdfast.functional import correct, margin
from holdfast.threat import TOLERANCE

BORDERLINE = 1e-3  # of the largest logit: a margin that another batch size or another machine may turn
ROBUST, BROKEN, WRONG = "robust", "broken", "wrong"


@dataclass
class Unit:
    """Images that are worked on together, with the best example of each.

    Args:
        x: (U, C, H, W) clean images.
        y: (U,) labels.
        index: (U,) positions in the data set.
        clean_logits: (U, K) of the deciding network.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    clean_logits: Tensor
    robust: Tensor = field(init=False)
    example: Tensor = field(init=False)
    distance: Tensor = field(init=False)
    margin: Tensor = field(init=False)
    broken_by: Tensor = field(init=False)
    target: Tensor = field(init=False)
    restart: Tensor = field(init=False)
    prediction: Tensor = field(init=False)
    verified: Tensor = field(init=False)
    carried: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    carried_from: float = 0.0
    forwards: list[Tensor] = field(default_factory=list)
    backwards: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prediction = self.clean_logits.argmax(1)
        self.robust = self.correct
        self.example = self.x.clone()
        self.distance = torch.full_like(self.y, torch.inf, dtype=self.x.dtype)
        self.margin = margin(self.clean_logits, self.y)
        self.broken_by = torch.full_like(self.y, -1)
        self.target = torch.full_like(self.y, -1)
        self.restart = torch.zeros_like(self.y)
        self.verified = torch.zeros_like(self.y)

    @property
    def correct(self) -> Tensor:
        """Which images are classified correctly without an attack, (U,) bool."""
        return correct(self.clean_logits, self.y)

    def begin(self) -> None:
        """A new attack begins: count its passes from zero."""
        self.forwards.append(torch.zeros_like(self.y))
        self.backwards.append(torch.zeros_like(self.y))

    def carry(self, rows: Sequence[Mapping[str, Any]], examples: Tensor, epsilon: float) -> None:
        """Take over what was broken within a smaller epsilon."""
        for place, row in enumerate(rows):
            if row["verdict"] == BROKEN:
                self.robust[place] = False
                self.example[place] = examples[place]
                self.distance[place] = row["distance"]
                self.margin[place] = row["margin"]
                self.prediction[place] = row["broken_prediction"]
                self.target[place] = -1 if row["target"] is None else row["target"]
                self.restart[place] = row["restart"]
                self.carried[place] = row
        self.carried_from = epsilon


def _number(value: float) -> float | None:
    """What JSON can hold: NaN, infinities and what stands for them become null."""
    return value if abs(value) < 1e30 else None


def rows_of(
    unit: Unit, attacks: Sequence[StepwiseAttack], seconds: float, deciding: Deciding, epsilon: float
) -> list[dict[str, Any]]:
    """A finished unit's rows of the ledger. An example beyond epsilon (minimum norm) has a distance but breaks nothing.

    Args:
        unit: All attacks have been run on it.
        attacks: These.
        seconds: Time spent for each image.
        deciding: Looks once more at every example, in batches of another size.
        epsilon: The radius within which an example breaks an image.
    """
    again = deciding(unit.example, batch_size=max(1, deciding.batch_size // 3))
    held = correct(again, unit.y)
    expected = unit.correct & unit.distance.isinf()
    scale = unit.clean_logits.abs().amax(1).clamp_min(torch.finfo(unit.clean_logits.dtype).tiny)
    unstable = (held != expected) | (unit.margin.abs() < BORDERLINE * scale)
    clean_margin = margin(unit.clean_logits, unit.y).tolist()
    clean, right = unit.clean_logits.argmax(1).tolist(), unit.correct.tolist()
    columns = {
        name: getattr(unit, name).tolist()
        for name in ("y", "index", "broken_by", "target", "restart", "prediction", "distance", "margin", "verified")
    }
    forwards = torch.stack(unit.forwards, 1).tolist()
    backwards = torch.stack(unit.backwards, 1).tolist()
    names = [attack.name for attack in attacks]
    rows = []
    for place in range(len(unit.y)):
        one = {name: values[place] for name, values in columns.items()}
        broken = one["distance"] <= epsilon + TOLERANCE
        verdict = BROKEN if broken else (ROBUST if right[place] else WRONG)
        before = unit.carried.get(place)
        by = names[one["broken_by"]] if one["broken_by"] >= 0 else None if before is None else before["attack"]
        rows.append(
            {
                "index": one["index"],
                "label": one["y"],
                "prediction": clean[place],
                "clean_margin": _number(clean_margin[place]),
                "verdict": verdict,
                "attack": by if broken else None,
                "target": one["target"] if broken and one["target"] >= 0 else None,
                "restart": one["restart"] if broken else None,
                "broken_prediction": one["prediction"] if broken else None,
                "distance": _number(one["distance"]),
                "margin": _number(one["margin"]),
                "forward": dict(zip(names, forwards[place], strict=True)),
                "backward": dict(zip(names, backwards[place], strict=True)),
                "verified": one["verified"],
                "carried": None if before is None else before["carried"] or unit.carried_from,
                "unstable": bool(unstable[place]),
                "seconds": seconds,
            }
        )
    return rows
