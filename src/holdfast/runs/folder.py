"""The run folder: one place for the configuration, the metrics, the checkpoints, the models and the summary."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from holdfast import distributed
from holdfast.errors import Damaged, HoldfastError
from holdfast.interruption import resuming
from holdfast.parsing import JSON_BYTES, LINES_BYTES, YAML_BYTES, parse_json, parse_json_lines, parse_yaml, through_json
from holdfast.regular_files import read_regular
from holdfast.runs import digests
from holdfast.runs.checkpoint import FOLDER, latest_checkpoint, newest_whole
from holdfast.runs.files import full_disk_told, read_json, remove_halves, write_json, write_text, write_whole
from holdfast.runs.lock import LOCK, FolderLock
from holdfast.runs.own_code import with_copies_named

CONFIG, ENVIRONMENT, METRICS, SUMMARY = "config.yaml", "environment.json", "metrics.jsonl", "summary.json"


def read_config(path: Path, *, check: bool = False) -> dict[str, Any]:
    """Read a configuration file without executing anything in it.

    Args:
        path: The file.
        check: Refuse a file whose digest is wrong; see `holdfast.runs.digests`.

    Raises:
        HoldfastError: missing, not YAML, no mapping, or (`Damaged`) not as it was written.
    """
    try:
        content = read_regular(path, most=YAML_BYTES)
    except FileNotFoundError:
        raise HoldfastError(f"{path} is missing: give the config.yaml of a run") from None
    if check and not digests.unchanged(content):
        raise Damaged(f"{path} was changed or damaged after it was written", _mended(path.parent))
    config = parse_yaml(content, str(path), advice="mend it, or copy the config.yaml of a run")
    if check and config is None:
        raise Damaged(f"{path} is no configuration, it is empty", _mended(path.parent))
    if not isinstance(config, dict):
        raise HoldfastError(f"{path} is no configuration: it must be a mapping, as in the config.yaml of a run")
    return config


def _mended(run: Path) -> str:
    """Say how to go on without a run's configuration."""
    if latest_checkpoint(run) is None:
        return "restore it from a copy, or train anew in another --out"
    return f"restore it from a copy, or delete it: `{resuming(run)}` writes it anew"


def run_config(run: Path) -> dict[str, Any] | None:
    """Read the configuration of a run that is to go on: its config.yaml, else what its newest checkpoint holds.

    Returns None where there is neither.

    Raises:
        HoldfastError: config.yaml is there, but damaged.
    """
    if (run / CONFIG).exists():
        return read_config(run / CONFIG, check=True)
    found = newest_whole(run, lambda state: None)
    if found is None or "config" not in found.state:
        return None
    return parse_json(found.state["config"], f"the configuration in {found.path}")


class RunFolder:
    """A run's folder on disk. Only rank 0 writes to it, and only while it is the folder that `lock` holds.

    Args:
        path: Where.
        writes: Whether this process writes.
        say: Gets what is to be told of damage that stops nothing.
        lock: The lock on the folder, where `fit` holds it.
    """

    def __init__(
        self,
        path: Path,
        *,
        writes: bool = True,
        say: Callable[[str], None] = lambda text: None,
        lock: FolderLock | None = None,
    ) -> None:
        self.path = path
        self.writes = writes
        self.lock = lock
        self.say = say
        self.lines: list[str] = []  # of metrics.jsonl, as far as they are certain: a checkpoint takes them along

    @classmethod
    def create(
        cls,
        path: Path,
        config: Mapping[str, Any],
        *,
        resume: bool,
        writes: bool = True,
        say: Callable[[str], None] = lambda text: None,
        lock: FolderLock | None = None,
    ) -> RunFolder:
        """Make the folder, or take up one that holds the same run. All processes look before the one that writes does.

        Args:
            path: Where.
            config: The resolved configuration.
            resume: Go on in a folder that exists.
            writes: Whether this process writes.
            say: Gets what is to be told of damage that stops nothing.
            lock: The lock on the folder, where `fit` holds it.

        Raises:
            HoldfastError: the folder is in use and `resume` is not set, or it holds another run.
        """
        folder = cls(path, writes=writes, say=say, lock=lock)
        if path.exists() and not path.is_dir():
            raise HoldfastError(f"{path} is a file: choose another --out")
        before = run_config(path) if resume else None
        if (path / CONFIG).exists() and not resume:
            raise HoldfastError(f"{path} already holds a run: add --resume to go on with it, or choose another --out")
        if before is not None:
            different = difference(with_copies_named(before), through_json(config))
            if different:
                raise HoldfastError(
                    f"{path} holds another run, its {different}: --resume repeats the run's own configuration;"
                    " choose another --out, or start from its weights with --init"
                )
        elif path.is_dir() and any(file.suffix != ".part" and file.name != LOCK for file in path.iterdir()):
            raise HoldfastError(f"{path} is not empty and holds no run: choose another --out")
        distributed.barrier()
        with distributed.refused_together():
            if writes:
                remove_halves(path, path / FOLDER, path / "model", path / "last")
            if writes and not (path / CONFIG).exists():
                if before is not None:
                    say(f"{path / CONFIG} is missing: it is written anew from the checkpoint")
                with full_disk_told(path):
                    path.mkdir(parents=True, exist_ok=True)
                text = yaml.safe_dump(through_json(config), sort_keys=False)
                write_text(path / CONFIG, digests.signed(text))
            folder.check()
        return folder

    def check(self) -> None:
        """Look whether the folder is still there. Every writer asks before it writes.

        Raises:
            HoldfastError: it was deleted, moved or replaced.
        """
        if self.lock is not None:
            self.lock.check()

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Keep the environment of the run's beginning; that of every resumption is added to it.

        It decides nothing, so one that is damaged is begun anew, with the resumptions as far as they can be read.
        """
        path = self.path / ENVIRONMENT
        if not self.writes:
            return
        self.check()
        if not path.exists():
            write_json(path, dict(environment))
            return
        try:
            first = read_json(path, advice="it is begun anew")
            if not isinstance(first.get("resumed", []), list):
                raise Damaged(f"{path} is damaged (resumed is no list)", "it is begun anew")
        except HoldfastError as damage:
            self.say(str(damage))
            first = {**environment, "resumed": _resumptions(path)}
        write_json(path, {**first, "resumed": [*first.get("resumed", []), dict(environment)]})

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add an epoch's line."""
        text = json.dumps(line) + "\n"
        if self.writes:
            self.check()
            path = self.path / METRICS
            with full_disk_told(path), path.open("a") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        self.lines.append(text)

    def restore_metrics(self, lines: Sequence[str] | None, count: int) -> None:
        """Make metrics.jsonl what it was when a checkpoint was written.

        Args:
            lines: The lines that the checkpoint holds; None for one of an older version, which only counts them.
            count: How many there are.

        Raises:
            HoldfastError: the file is damaged, and the checkpoint does not hold its lines.
        """
        path = self.path / METRICS
        found = self.metrics_content()
        if lines is None and count and not path.exists():
            self.say(f"{path} is missing: the run goes on without the lines of its first {count} epochs")
            lines = []
        elif lines is None:
            lines = [f"{line}\n" for line in found.decode(errors="replace").split("\n")[:-1]][:count]
            _require_lines(path, lines, count)
        elif not found.startswith("".join(lines).encode()):
            self.say(f"{path} was changed or damaged: its {count} lines are written anew from the checkpoint")
        self.lines = list(lines)
        whole = "".join(lines).encode()
        if self.writes and (found != whole or path.is_symlink()):  # nothing is appended through a link
            write_whole(path, lambda file: file.write(whole))

    def metrics_content(self) -> bytes:
        """What metrics.jsonl holds; nothing where it is missing."""
        path = self.path / METRICS
        return read_regular(path, most=LINES_BYTES) if path.exists() else b""

    def metrics(self) -> list[dict[str, Any]]:
        """All epochs' lines.

        Raises:
            HoldfastError: the file is damaged.
        """
        path = self.path / METRICS
        advice = f"`{resuming(self.path)}` writes it anew from the checkpoint"
        lines = parse_json_lines(self.metrics_content(), str(path), advice=advice)
        if not all(isinstance(line, dict) for line in lines):
            raise Damaged(f"{path} is damaged", advice)
        return lines

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the summary; the run is then finished."""
        if self.writes:
            self.check()
            write_json(self.path / SUMMARY, dict(summary))

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, else None.

        Raises:
            Damaged: it is not as it was written.
        """
        path, advice = (
            self.path / SUMMARY,
            f"`{resuming(self.path)}` evaluates again",
        )
        if not path.exists():
            return None
        summary = read_json(path, advice=advice)
        for part in ("best", "last"):
            if not isinstance(summary.get(part), dict) or not isinstance(summary[part].get("epoch"), int):
                raise Damaged(f"{path} is damaged: it does not say of which epoch the {part} weights are", advice)
        return summary

    def whole_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; None where there is none or it is damaged."""
        try:
            return self.summary()
        except Damaged:
            return None

    @property
    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return latest_checkpoint(self.path)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / FOLDER


def _require_lines(path: Path, lines: Sequence[str], count: int) -> None:
    """Refuse damaged lines of a run's past, where nothing but the file itself holds them."""
    try:
        whole = all(isinstance(parse_json(line, str(path)), dict) for line in lines)
    except HoldfastError:
        whole = False
    if not whole or len(lines) < count:
        raise Damaged(
            f"{path} is damaged, and the checkpoint of an older version does not hold its {count} lines",
            "restore it, or delete it to go on without them",
        )


def _resumptions(path: Path) -> list[Any]:
    """What can be read of the resumptions in a damaged environment.json."""
    try:
        found = parse_json(read_regular(path, most=JSON_BYTES), str(path))["resumed"]
        return found if isinstance(found, list) else []
    except (OSError, HoldfastError, LookupError, TypeError):
        return []


def difference(before: Any, now: Any, at: str = "") -> str | None:
    """The first difference between two configurations, in words, or None."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            found = difference(before.get(key), now.get(key), f"{at}.{key}" if at else str(key))
            if found:
                return found
        return None
    return None if before == now else f"{at} is {before!r}, not {now!r}"
