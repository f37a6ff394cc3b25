"""SVHN, cropped digits, as published: train_32x32.mat and test_32x32.mat."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from holdfast.data.images import Dataset, Images
from holdfast.errors import HoldfastError


def recognises(path: Path) -> bool:
    """Whether ``path`` is a folder with one of SVHN's files."""
    return path.is_dir() and any((path / f"{split}_32x32.mat").is_file() for split in ("train", "test"))


def read(path: Path) -> Dataset:
    """Read the two splits; the files call the digit 0 label 10, here it is 0.

    Args:
        path: Folder with ``train_32x32.mat`` and ``test_32x32.mat``; ``extra_32x32.mat`` is not used.
    Raises:
        HoldfastError: A file is missing or damaged, or SciPy is not installed.
    """
    notes = ()
    if (path / "extra_32x32.mat").is_file():
        notes = ("extra_32x32.mat is not used: only the training and test files are read.",)
    return Dataset(
        name="svhn",
        train=_split(path / "train_32x32.mat"),
        test=_split(path / "test_32x32.mat"),
        classes=tuple(str(digit) for digit in range(10)),
        suggested_epsilon=8 / 255,
        flip=False,
        crop=False,
        notes=notes,
    )


def _split(file: Path) -> Images:
    if not file.is_file():
        raise HoldfastError(f"{file.parent} lacks {file.name}: put both SVHN files there")
    content = _load_mat(file)
    pixels, labels = content.get("X"), content.get("y")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[:3] != (32, 32, 3):
        raise HoldfastError(f"{file} holds no (32, 32, 3, N) array X of bytes: use SVHN's cropped-digits files")
    if pixels.ndim == 3:  # MATLAB drops a last dimension of length one
        pixels = pixels[..., None]
    if not isinstance(labels, np.ndarray) or labels.size != pixels.shape[3]:
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


def _load_mat(file: Path) -> dict[str, object]:
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise HoldfastError('reading SVHN needs SciPy: pip install "holdfast[data]"') from error
    try:
        return loadmat(str(file), variable_names=["X", "y"])
    except (
        MatReadError,
        ValueError,
        TypeError,
        LookupError,
        NotImplementedError,
        OSError,
        EOFError,
        struct.error,
        zlib.error,
    ) as error:
        raise HoldfastError(f"{file} is not a readable MATLAB file ({error}): download it again") from error
