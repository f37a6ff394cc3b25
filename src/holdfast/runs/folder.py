"""The run folder: one place for the configuration, the metrics, the checkpoints, the models and the summary."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from holdfast import distributed
from holdfast.errors import HoldfastError
from holdfast.runs.checkpoint import FOLDER, latest_checkpoint
from holdfast.runs.files import full_disk_told, read_json, remove_halves, write_json, write_text
from holdfast.runs.lock import LOCK, FolderLock

CONFIG, ENVIRONMENT, METRICS, SUMMARY = "config.yaml", "environment.json", "metrics.jsonl", "summary.json"


def read_config(path: Path) -> dict[str, Any]:
    """A configuration file, read without executing anything in it.

    Raises:
        HoldfastError: missing, not YAML, or no mapping.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise HoldfastError(f"{path} is missing: give the config.yaml of a run") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise HoldfastError(f"{path} is no YAML ({reason}): mend it, or copy the config.yaml of a run") from None
    except OSError as error:
        raise HoldfastError(f"{path} cannot be read ({error.strerror}): give the config.yaml of a run") from None
    if not isinstance(config, dict):
        raise HoldfastError(f"{path} is no configuration: it must be a mapping, as in the config.yaml of a run")
    return config


class RunFolder:
    """A run's folder on disk. Only rank 0 writes to it, and only while it is the folder that `lock` holds."""

    def __init__(self, path: Path, *, writes: bool = True, lock: FolderLock | None = None) -> None:
        self.path = path
        self.writes = writes
        self.lock = lock

    @classmethod
    def create(
        cls,
        path: Path,
        config: Mapping[str, Any],
        *,
        resume: bool,
        writes: bool = True,
        lock: FolderLock | None = None,
    ) -> RunFolder:
        """Make the folder, or take up one that holds the same run. All processes look before the one that writes does.

        Args:
            path: Where.
            config: The resolved configuration.
            resume: Go on in a folder that exists.
            writes: Whether this process writes.
            lock: The lock on the folder, where `fit` holds it.

        Raises:
            HoldfastError: the folder is in use and `resume` is not set, or it holds another run.
        """
        folder = cls(path, writes=writes, lock=lock)
        if path.exists() and not path.is_dir():
            raise HoldfastError(f"{path} is a file: choose another --out")
        if (path / CONFIG).exists():
            if not resume:
                raise HoldfastError(
                    f"{path} already holds a run: add --resume to go on with it, or choose another --out"
                )
            different = difference(read_config(path / CONFIG), json.loads(json.dumps(config)))
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
                with full_disk_told(path):
                    path.mkdir(parents=True, exist_ok=True)
                write_text(path / CONFIG, yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False))
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
        """Keep the environment of the run's beginning; that of every resumption is added to it."""
        if not self.writes:
            return
        self.check()
        path = self.path / ENVIRONMENT
        if path.exists():
            first = read_json(path)
            write_json(path, {**first, "resumed": [*first.get("resumed", []), dict(environment)]})
        else:
            write_json(path, dict(environment))

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add an epoch's line."""
        if self.writes:
            self.check()
            path = self.path / METRICS
            with full_disk_told(path), path.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def cut_metrics(self, lines: int) -> None:
        """Keep the first so many lines: those that the checkpoint knows of."""
        if self.writes:
            self.check()
            path = self.path / METRICS
            kept = path.read_text().splitlines(keepends=True)[:lines] if path.exists() else []
            write_text(path, "".join(kept))

    def metrics(self) -> list[dict[str, Any]]:
        """All epochs' lines."""
        path = self.path / METRICS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the summary; the run is then finished."""
        if self.writes:
            self.check()
            write_json(self.path / SUMMARY, dict(summary))

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, else None."""
        return read_json(self.path / SUMMARY) if (self.path / SUMMARY).exists() else None

    @property
    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return latest_checkpoint(self.path)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / FOLDER


def difference(before: Any, now: Any, at: str = "") -> str | None:
    """The first difference between two configurations, in words, or None."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            found = difference(before.get(key), now.get(key), f"{at}.{key}" if at else str(key))
            if found:
                return found
        return None
    return None if before == now else f"{at} is {before!r}, not {now!r}"
