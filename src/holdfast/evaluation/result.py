"""What an evaluation returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.evaluation import flags, results
from holdfast.evaluation.ledger import Ledger


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Attributes:
        summary: Accuracies with intervals, what each attack broke, passes, flags; what summary.json holds.
        rows: One mapping an image; what ledger.jsonl holds.
        flags: What speaks against quoting the number.
        path: The folder, or None.
        log: Plain text that can be pasted into an issue.
    """

    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    flags: Sequence[flags.Flag]
    path: Path | None
    log: str
    ledger: Ledger = field(repr=False)

    @property
    def robust_accuracy(self) -> float:
        """Share of images that are classified correctly and that no attack broke."""
        return float(self.summary["robust_accuracy"])

    @property
    def clean_accuracy(self) -> float:
        """Share of images that are classified correctly."""
        return float(self.summary["clean_accuracy"])

    def examples(self) -> Tensor | None:
        """The adversarial images (the clean ones where none was found), (N, C, H, W); None if they were not kept."""
        parts = [self.ledger.examples_of(number) for number in range(self._units)]
        whole = [part["x_adv"] for part in parts if part is not None]
        return torch.cat(whole) if len(whole) == len(parts) and whole else None

    @property
    def _units(self) -> int:
        return -(-len(self.rows) // int(self.ledger.protocol["unit"]))

    def __str__(self) -> str:
        return results.in_words(self.summary)
