"""The ledger of an evaluation: what was found out about each image, written unit by unit and never half."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from holdfast.errors import Damaged, HoldfastError
from holdfast.parsing import LINES_BYTES, parse_json_lines, through_json
from holdfast.runs.digests import checked_bytes, matches, of_file
from holdfast.runs.files import full_disk_told, read_json, remove_halves, write_json, write_text, write_whole
from holdfast.runs.lock import FolderLock
from holdfast.runs.weights_header import weight_shapes

PROTOCOL, LEDGER, UNITS, EXAMPLES = "protocol.json", "ledger.jsonl", "units", "examples"
SEARCH = "search.json"
SAYS = {
    "model": "model (its weights differ)",
    "outputs": "model (its code differs: the same weights give other logits)",
    "data": "data (its images differ; a loader must not shuffle)",
    "images": "choice of images",
}
EXAMPLE_PARTS = {"x", "x_adv", "y", "index"}
NAMES = ("model_name", "data_name", "about")
"""What a protocol says for people only: it may change from one call to the next."""


class Ledger:
    """A folder with one file for each finished unit; together they are the ledger.

    A unit's file is written beside its place and renamed, so that a kill at any moment leaves it whole or absent, and
    its SHA-256 is kept beside it, so that later damage is noticed. Without a path everything is kept in memory.

    Args:
        path: The folder; made if missing.
        protocol: What is evaluated, and how. A folder that holds another evaluation is refused.
        lock: The lock on the folder, where this process writes to it.

    Attributes:
        damaged: What is wrong with the files of finished units that `has` has looked at, in words.
        unchecked: Files that were read though no digest is recorded beside them.

    Raises:
        HoldfastError: the folder holds something else.
    """

    def __init__(self, path: Path | None, protocol: Mapping[str, Any], lock: FolderLock | None = None) -> None:
        self.path = path
        self.protocol = dict(protocol)
        self.lock = lock
        self.kept: dict[int, tuple[list[dict[str, Any]], dict[str, Tensor] | None]] = {}
        self.seen: dict[int, dict[str, Any]] = {}
        self.damaged: list[str] = []
        self.unchecked: list[Path] = []

    @property
    def _anew(self) -> str:
        return f"restore it from a copy, or delete {self.path} and evaluate again"

    def open(self, *, writes: bool) -> None:
        """Look at the folder, and make it. Every process looks; one writes."""
        if self.path is None:
            return
        if self.path.exists() and not self.path.is_dir():
            raise HoldfastError(f"{self.path} is a file: choose another --out")
        file = self.path / PROTOCOL
        if file.is_file():
            different = difference(read_json(file, advice=self._anew), self.protocol)
            if different:
                raise HoldfastError(
                    f"{self.path} holds an evaluation with another {different}: choose another --out, or delete it"
                )
        elif self.path.is_dir() and any(not each.name.startswith(".") for each in self.path.iterdir()):
            raise HoldfastError(f"{self.path} is not empty and holds no evaluation: choose another --out")
        if writes:
            remove_halves(self.path, self.path / UNITS, self.path / EXAMPLES)
            if not file.is_file():
                write_json(file, self.protocol)
            self.check()

    def check(self) -> None:
        """Look whether the folder is still there. Every writer asks before it writes.

        Raises:
            HoldfastError: it was deleted, moved or replaced.
        """
        if self.lock is not None:
            self.lock.check()

    def _unit_file(self, number: int) -> Path:
        assert self.path is not None  # only called with one
        return self.path / UNITS / f"{number:06d}.jsonl"

    def _seen_file(self, number: int) -> Path:
        assert self.path is not None  # only called with one
        return self.path / UNITS / f"{number:06d}.json"

    def examples_file(self, number: int) -> Path:
        """Where a unit's examples lie."""
        assert self.path is not None  # only called with one
        return self.path / EXAMPLES / f"{number:06d}.safetensors"

    def has(self, number: int, *, examples: bool) -> bool:
        """Whether a unit is finished and whole, with its examples if they are wanted. Damage is added to `damaged`."""
        done = number in self.kept if self.path is None else self._unit_file(number).is_file()
        if not done or (examples and not self.has_examples(number)):
            return False
        try:
            self.rows_of(number)
            self._require_seen(number)
            self.seen_of(number)
            if examples:
                self.check_examples(number)
        except Damaged as error:
            self.damaged.append(error.what)
            return False
        return True

    def has_examples(self, number: int) -> bool:
        """Whether a finished unit's examples were kept."""
        return self.kept[number][1] is not None if self.path is None else self.examples_file(number).is_file()

    def write(
        self,
        number: int,
        rows: Sequence[Mapping[str, Any]],
        examples: Mapping[str, Tensor] | None,
        seen: Mapping[str, Any] | None = None,
    ) -> None:
        """A unit is finished.

        Args:
            number: Which one.
            rows: One an image.
            examples: The adversarial images, if they are kept.
            seen: What was seen of the search, for the flags.
        """
        if self.path is None:
            self.seen[number] = dict(seen or {})
            self.kept[number] = ([dict(row) for row in rows], None if examples is None else dict(examples))
            return
        self.check()
        if examples is not None:
            data = save({name: tensor.detach().cpu().contiguous() for name, tensor in examples.items()})
            write_whole(self.examples_file(number), lambda file: file.write(data), hashed=True)
        if seen is not None:  # before the rows, which say that the unit is finished
            write_json(self._seen_file(number), seen)
        write_text(self._unit_file(number), "".join(json.dumps(row) + "\n" for row in rows), hashed=True)

    def rows_of(self, number: int) -> list[dict[str, Any]]:
        """A finished unit's rows."""
        if self.path is None:
            return self.kept[number][0]
        advice = "give the same `holdfast evaluate` command again, which evaluates these images again"
        return read_rows(self._unit_file(number), advice=advice, unchecked=self.unchecked.append)

    def seen_of(self, number: int) -> dict[str, Any]:
        """What was seen of a finished unit's search; nothing in a folder of an older version, which wrote none of it.

        Raises:
            Damaged: it was damaged.
        """
        if self.path is None:
            return self.seen.get(number, {})
        file = self._seen_file(number)
        return read_json(file, advice=self._anew) if file.is_file() else {}

    def _require_seen(self, number: int) -> None:
        """Refuse a unit without the file of what was seen of its search, though other units have theirs."""
        if self.path is not None:
            file = self._seen_file(number)
            if not file.is_file() and any(file.parent.glob("*.json")):
                raise Damaged(f"{file} is missing", self._anew)

    def seen_of_all(self, units: int) -> list[dict[str, Any]]:
        """What was seen of all searches; with a folder, in one file from now on."""
        file = None if self.path is None else self.path / SEARCH
        if file is not None and self.finished:
            if not file.is_file():
                self._require_older(file)
                return []
            every = read_json(file, advice=self._anew).get("units")
            if not isinstance(every, list) or not all(isinstance(each, dict) for each in every):
                raise Damaged(f"{file} is damaged: it does not say what was seen of the search", self._anew)
            return every
        every = [self.seen_of(number) for number in range(units)]
        if file is not None:
            self.check()
            write_json(file, {"units": every})
        return every

    def _require_older(self, file: Path) -> None:
        """Refuse a finished evaluation without the file of what was seen, unless an older version wrote it."""
        summary = file.with_name("summary.json")
        passes = read_json(summary, advice=self._anew).get("passes") if summary.is_file() else None
        if isinstance(passes, dict) and "checking" in passes:
            raise Damaged(f"{file} is missing", self._anew)

    def check_examples(self, number: int) -> None:
        """Look whether a unit's saved examples are as they were written, without keeping them in memory.

        Raises:
            Damaged: they are not.
        """
        if self.path is None:
            return
        file = self.examples_file(number)
        right = matches(file, of_file(file))
        if right is False:
            raise Damaged(f"{file} was changed or damaged after it was written", self._anew)
        if right is None:
            self.examples_of(number)

    def look_at_examples(self, units: int, *, wanted: bool, say: Callable[[str], None]) -> None:
        """Notice lost and damaged examples of a finished evaluation.

        Args:
            units: How many units there are.
            wanted: Refuse them. Otherwise they are only said: the ledger is whole without them.
            say: Gets what is to be told.

        Raises:
            HoldfastError: examples are wanted, and some are missing or damaged.
        """
        kept = [number for number in range(units) if self.has_examples(number)]
        if wanted and len(kept) < units:
            raise HoldfastError(
                f"{self.path} was finished without its examples, or has lost some: delete it, or choose another --out,"
                " to save them"
            )
        if 0 < len(kept) < units:
            say(f"{self.path} has lost some of its examples: `holdfast verify` cannot recount it")
        for number in kept:
            try:
                self.check_examples(number)
            except Damaged as damage:
                if wanted:
                    raise
                say(f"{damage.what}: `holdfast verify` cannot recount this evaluation")

    def examples_of(self, number: int) -> dict[str, Tensor] | None:
        """A finished unit's examples, if they were kept."""
        if self.path is None:
            return self.kept[number][1]
        file = self.examples_file(number)
        if not file.is_file():
            return None
        try:
            weight_shapes(file, advice=self._anew)
            found = load(checked_bytes(file, advice=self._anew, unchecked=self.unchecked.append))
        except (SafetensorError, OSError):
            raise Damaged(f"{file} is damaged", self._anew) from None
        if not found.keys() >= EXAMPLE_PARTS or len({len(found[name]) for name in EXAMPLE_PARTS}) > 1:
            raise Damaged(f"{file} is damaged: it holds no examples", self._anew)
        return found

    def merged(self, units: int, images: int) -> list[dict[str, Any]]:
        """All rows in order; with a folder, as one file from now on.

        Raises:
            HoldfastError: there are not as many rows as images.
        """
        if self.finished and self.path is not None:
            rows = read_rows(self.path / LEDGER, advice=self._anew, unchecked=self.unchecked.append)
            if len(rows) != images:
                raise Damaged(f"{self.path / LEDGER} has {len(rows)} rows for {images} images", self._anew)
            shutil.rmtree(self.path / UNITS, ignore_errors=True)  # killed before it was removed
            return rows
        rows = [row for number in range(units) for row in self.rows_of(number)]
        if self.path is not None:
            self.check()
            write_text(self.path / LEDGER, "".join(json.dumps(row) + "\n" for row in rows), hashed=True)
            with full_disk_told(self.path / UNITS):
                shutil.rmtree(self.path / UNITS)
        return rows

    @property
    def finished(self) -> bool:
        """Whether all units are done and merged."""
        return self.path is not None and (self.path / LEDGER).is_file()


def read_rows(
    path: Path,
    *,
    advice: str = "restore it, or delete its folder and evaluate again",
    unchecked: Callable[[Path], None] | None = None,
) -> list[dict[str, Any]]:
    """The rows of a ledger, or of one of its units, after its SHA-256 has been compared with the one beside it.

    Args:
        path: The file.
        advice: How to go on without it.
        unchecked: Called with the path where no digest is recorded; None writes a line to standard error.

    Raises:
        HoldfastError: missing or damaged (`Damaged`).
    """
    try:
        content = checked_bytes(path, most=LINES_BYTES, advice=advice, unchecked=unchecked)
        rows = parse_json_lines(content, str(path), advice=advice)
        if not all(isinstance(row, dict) and "verdict" in row for row in rows):
            raise Damaged(f"{path} is damaged", advice)
        return rows
    except FileNotFoundError:
        raise HoldfastError(f"{path} is missing: finish the evaluation with the command that began it") from None


def _alike(before: Any, now: Any) -> bool:
    """Whether two networks' logits are the same but for rounding on another machine or in other batches."""
    try:
        one, two = torch.tensor(before), torch.tensor(now)
    except (TypeError, ValueError, RuntimeError):
        return False
    return one.shape == two.shape and bool((one - two).abs().max() <= 1e-3 * one.abs().max())


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first thing in which two protocols differ, with both values; None if they are about the same.

    Example:
        >>> difference({"epsilon": 0.1, "seed": 0}, {"epsilon": 0.2, "seed": 0})
        'epsilon (0.1 there, 0.2 asked for)'
    """
    now = through_json(now)
    for name in (*before, *now):
        if name not in NAMES and before.get(name) != now.get(name):
            if name == "outputs" and _alike(before.get(name), now.get(name)):
                continue
            if name in SAYS:
                return SAYS[name]
            return f"{name} ({before.get(name)} there, {now.get(name)} asked for)"
    return None
