"""SVHN, cropped digits, as published: train_32x32.mat and test_32x32.mat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from holdfast.data.images import Dataset, Images
from holdfast.data.limits import Room
from holdfast.data.matlab import read_numeric
from holdfast.errors import HoldfastError


def recognises(path: Path) -> bool:
    """Whether ``path`` is a folder with one of SVHN's files."""
    return path.is_dir() and any((path / f"{split}_32x32.mat").is_file() for split in ("train", "test"))


def read(path: Path) -> Dataset:
    """Read the two splits; the files call the digit 0 label 10, here it is 0.

    Args:
        path: Folder with ``train_32x32.mat`` and ``test_32x32.mat``; ``extra_32x32.mat`` is not used.
    Raises:
        HoldfastError: A file is missing or damaged.
    """
    notes = ()
    if (path / "extra_32x32.mat").is_file():
        notes = ("extra_32x32.mat is not used: only the training and test files are read.",)
    room = Room()
    return Dataset(
        name="svhn",
        train=_split(path / "train_32x32.mat", room),
        test=_split(path / "test_32x32.mat", room),
        classes=tuple(str(digit) for digit in range(10)),
        suggested_epsilon=8 / 255,
        flip=False,
        crop=False,
        notes=notes,
    )


def _split(file: Path, room: Room) -> Images:
    if not file.is_file():
        raise HoldfastError(f"{file.parent} lacks {file.name}: put both SVHN files there")
    content = read_numeric(file, ("X", "y"), room)
    pixels, labels = content.get("X"), content.get("y")
    if pixels is None or pixels.dtype != np.uint8 or pixels.shape[:3] != (32, 32, 3):
        raise HoldfastError(f"{file} holds no (32, 32, 3, N) array X of bytes: use SVHN's cropped-digits files")
    if pixels.ndim == 3:  # MATLAB drops a last dimension of length one
        pixels = pixels[..., None]
    if labels is None or labels.size != pixels.shape[3]:
        raise HoldfastError(f"{file} holds no array y with {pixels.shape[3]} labels: use SVHN's cropped-digits files")
    digits = labels.reshape(-1).astype(np.int64)
    bad = np.flatnonzero((digits < 1) | (digits > 10))
    if bad.size > 0:
        raise HoldfastError(
            f"{file} has label {digits[bad[0]]} at index {bad[0]}, 1 to 10 are expected (10 is the digit 0): download "
            "it again"
        )
    rows = np.ascontiguousarray(pixels.transpose(3, 0, 1, 2))
    return Images(torch.from_numpy(rows), torch.from_numpy(digits % 10))
