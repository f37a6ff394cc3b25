"""Checkpoints: everything that is needed to go on after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from holdfast.errors import HoldfastError
from holdfast.runs.files import full_disk_told, write_whole

FOLDER = "checkpoints"


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the state after so many optimiser steps lies."""
    return run / FOLDER / f"step-{step:010d}.pt"


def checkpoints(run: Path) -> list[Path]:
    """All complete checkpoints, oldest first. A checkpoint gets its name only when it is whole."""
    return sorted((run / FOLDER).glob("step-*.pt"))


def save_checkpoint(run: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write a checkpoint whole, then drop all but the newest few.

    Args:
        run: The run folder.
        step: Optimiser steps so far.
        state: Nested dictionaries and lists of tensors and plain values.
        keep: How many to leave.

    Raises:
        HoldfastError: the disk is full; earlier checkpoints are untouched.
    """
    path = checkpoint_path(run, step)

    def write(file: Any) -> None:
        with full_disk_told(path):
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch's zip writer wraps the file's own error
                cause = error.__context__
                raise cause if isinstance(cause, OSError) else error from error

    write_whole(path, write)
    with full_disk_told(path):
        for old in checkpoints(run)[:-keep]:
            old.unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Raises:
        HoldfastError: it is damaged, or holds more than tensors and plain values.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a cut zip file raises anything from EOFError to RuntimeError
        others = [other.name for other in checkpoints(path.parent.parent) if other != path]
        advice = f"remove it, and --resume goes on from {others[-1]}" if others else "train anew in another --out"
        raise HoldfastError(f"checkpoint {path} is damaged ({type(error).__name__}): {advice}") from error
    if not isinstance(state, dict):
        raise HoldfastError(f"checkpoint {path} is no checkpoint of holdfast: remove it")
    return state


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = checkpoints(run)
    return found[-1] if found else None
