"""Checkpoints: everything that is needed to go on after a kill."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import Damaged, HoldfastError
from holdfast.runs.digests import beside, matches, of_file, tell_unchecked
from holdfast.runs.files import full_disk_told, remove_hashed, write_whole
from holdfast.zip_files import require_plain_torch_file

FOLDER = "checkpoints"


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the state after so many optimiser steps lies."""
    return run / FOLDER / f"step-{step:010d}.pt"


def checkpoints(run: Path) -> list[Path]:
    """All complete checkpoints, oldest first. A checkpoint gets its name only when it is whole."""
    return sorted((run / FOLDER).glob("step-*.pt"))


def save_checkpoint(
    run: Path, step: int, state: dict[str, Any], *, keep: int = 2, damaged: Sequence[Path] = ()
) -> Path:
    """Write a checkpoint whole, with its SHA-256 beside it, then drop all but the newest few.

    Args:
        run: The run folder.
        step: Optimiser steps so far.
        state: Nested dictionaries and lists of tensors and plain values.
        keep: How many to leave.
        damaged: Checkpoints that were passed over; they are dropped too.

    Raises:
        HoldfastError: the disk is full; earlier checkpoints are untouched.
    """
    path = checkpoint_path(run, step)

    def write(file: Any) -> None:
        with full_disk_told(path):
            try:
                torch.save({**state, "metrics": _as_tensor(state["metrics"])} if "metrics" in state else state, file)
            except RuntimeError as error:  # torch's zip writer wraps the file's own error
                cause = error.__context__
                raise cause if isinstance(cause, OSError) else error from error

    write_whole(path, write, hashed=True)
    bad = [old for old in damaged if old != path]
    good = [old for old in checkpoints(run) if old not in bad]
    with full_disk_told(path):
        for old in (*bad, *good[:-keep]):
            remove_hashed(old)
        for record in path.parent.glob("step-*.pt.sha256"):  # of a checkpoint that a killed process did not write
            if not record.with_suffix("").exists():
                record.unlink()
    return path


def load_checkpoint(path: Path, *, check: bool = True) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Args:
        path: The checkpoint.
        check: Compare its SHA-256 with the recorded one, or, where none is recorded, the archive's own checksums.

    Raises:
        Damaged: it is not as it was written, or holds more than tensors and plain values.
        HoldfastError: it is as it was written, but this version of torch cannot read it.
    """
    right = None
    try:
        require_plain_torch_file(path)
        if check:
            right = matches(path, of_file(path))
            if right is None:
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:
                        raise zipfile.BadZipFile
                tell_unchecked(path)
            elif not right:
                raise Damaged(f"checkpoint {path} is damaged (its SHA-256 is not the one in {beside(path).name})")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (Damaged, MemoryError):
        raise
    except Exception as error:  # a cut zip file raises anything from EOFError to RuntimeError
        if right:
            reason = " ".join(str(error).split())[:200]
            raise HoldfastError(
                f"checkpoint {path} is whole, but cannot be read here ({type(error).__name__}: {reason}): resume with"
                " the versions in environment.json, or with more memory"
            ) from error
        raise Damaged(f"checkpoint {path} is damaged ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise Damaged(f"checkpoint {path} is damaged (it is no checkpoint of holdfast)")
    lines = state.get("metrics")
    if isinstance(lines, Tensor) and lines.dtype == torch.uint8:
        try:
            state["metrics"] = bytes(lines.tolist()).decode().splitlines(keepends=True)
        except ValueError:
            raise Damaged(f"checkpoint {path} is damaged (its metrics are no text)") from None
    return state


def _as_tensor(lines: Sequence[str]) -> Tensor:
    """Text as bytes in a tensor: the part of a checkpoint that is not tensors has a limit, and runs may be long."""
    return torch.tensor(list("".join(lines).encode()), dtype=torch.uint8)


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that is whole.

    Attributes:
        path: Where it lies.
        state: What it holds.
        passed_over: The damaged ones that are newer.
        told: What is wrong with each of these, in words.
    """

    path: Path
    state: dict[str, Any]
    passed_over: tuple[Path, ...]
    told: tuple[str, ...]


def newest_whole(run: Path, problem: Callable[[dict[str, Any]], str | None]) -> Found | None:
    """Read the newest checkpoint that is whole, or return None where there is no checkpoint at all.

    Args:
        run: The run folder.
        problem: What is wrong with a checkpoint's content, or None.

    Raises:
        HoldfastError: there are checkpoints, and all of them are damaged.
    """
    passed_over: list[Path] = []
    told: list[str] = []
    for path in reversed(checkpoints(run)):
        try:
            state = load_checkpoint(path)
            wrong = problem(state)
            if wrong is None:
                return Found(path, state, tuple(passed_over), tuple(told))
            told.append(f"checkpoint {path} is damaged ({wrong})")
        except Damaged as error:
            told.append(str(error))
        passed_over.append(path)
    if told:
        raise HoldfastError(
            f"{'; '.join(told)}. No checkpoint of {run} is whole: restore one from a copy, with its .sha256, or train"
            " anew in another --out"
        )
    return None


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = checkpoints(run)
    return found[-1] if found else None
