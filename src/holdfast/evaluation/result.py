"""What an evaluation returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast import distributed
from holdfast.errors import Damaged
from holdfast.evaluation import flags, results, sight
from holdfast.evaluation.ledger import SEARCH, Ledger
from holdfast.runs.files import write_json, write_text
from holdfast.threat import ThreatModel


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


def conclude(
    ledger: Ledger,
    rows: Sequence[Mapping[str, Any]],
    seen: Sequence[Mapping[str, Any]],
    raised: Sequence[flags.Flag],
    *,
    threat: ThreatModel | None,
) -> Result:
    """Sum up a finished evaluation, and write the summary, the flags, the table and the log into its folder.

    Args:
        ledger: Where it was kept.
        rows: All of them.
        seen: What was seen of the search of each unit.
        raised: Flags that the probes raised.
        threat: The ball; None where no flag is to be raised from the rows.

    Raises:
        HoldfastError: the folder is gone, or what was seen is damaged.
    """
    whole = _whole(ledger, seen)
    every = [*raised, *sight.flags_of(whole, raised)]
    every += [] if threat is None else flags.from_rows(rows, threat=threat)
    told, protocol = [flags.as_dict(flag) for flag in every], ledger.protocol
    summary = results.summarize(rows, protocol, told)
    summary["passes"]["checking"] = whole.passes / max(1, len(rows))
    summary = {**summary, "about": protocol["about"], "notes": protocol["notes"]}
    log = results.log(summary, protocol) + "".join(f"note: {note}\n" for note in protocol["notes"])
    with distributed.refused_together():
        if ledger.path is not None and distributed.rank() == 0:
            ledger.check()
            write_json(ledger.path / "flags.json", {"flags": told})
            write_json(ledger.path / "summary.json", summary)
            write_text(ledger.path / "images.csv", results.images_csv(rows))
            write_text(ledger.path / "log.txt", log)
            ledger.check()
    return Result(summary, rows, every, ledger.path, log, ledger)


def _whole(ledger: Ledger, seen: Sequence[Mapping[str, Any]]) -> sight.Sight:
    """What was seen of all searches."""
    try:
        return sight.together(seen)
    except TypeError:
        advice = f"delete {ledger.path} and evaluate again"
        raise Damaged(f"{ledger.path and ledger.path / SEARCH} is damaged", advice) from None
