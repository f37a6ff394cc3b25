"""IDX files: the format of MNIST, Fashion-MNIST and their kin, packed with gzip or not."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from holdfast.data.images import Dataset, Images, numbered_classes
from holdfast.errors import HoldfastError

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
IMAGE_MAGIC = 0x00000803  # unsigned bytes, three dimensions
LABEL_MAGIC = 0x00000801  # unsigned bytes, one dimension


def recognises(path: Path) -> bool:
    """Whether ``path`` is a folder with IDX training images."""
    return path.is_dir() and _find(path, "train-images", 3) is not None


def read(path: Path) -> Dataset:
    """Read a folder with the four IDX files; Fashion-MNIST's class names where the folder is called so.

    Args:
        path: Folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
            ``t10k-labels-idx1-ubyte``, each perhaps with ``.gz``, or spelt ``train-images.idx3-ubyte``.
    Raises:
        HoldfastError: A file is missing, is not IDX, is truncated, or counts differ.
    """
    train, test = _split(path, "train"), _split(path, "t10k")
    resolved = path.resolve()
    # torchvision keeps the files in <name>/raw
    folder = resolved.parent.name if resolved.name.lower() == "raw" else resolved.name
    is_fashion = "fashion" in folder.lower()
    classes = numbered_classes(train.labels, test.labels)
    if is_fashion and len(classes) == len(FASHION_CLASSES):
        classes = FASHION_CLASSES
    return Dataset(
        name=folder,
        train=train,
        test=test,
        classes=classes,
        suggested_epsilon=0.1,
        flip=False,  # as customary; short runs lose by it, and the figures all face the same way
        crop=False,
    )


def _split(folder: Path, prefix: str) -> Images:
    images_file, labels_file = _require(folder, f"{prefix}-images", 3), _require(folder, f"{prefix}-labels", 1)
    pixels, labels = _array(images_file, IMAGE_MAGIC, 3), _array(labels_file, LABEL_MAGIC, 1)
    if len(pixels) != len(labels):
        raise HoldfastError(
            f"{images_file} holds {len(pixels)} images but {labels_file.name} holds {len(labels)} labels: take both "
            "files from the same download"
        )
    return Images(pixels.unsqueeze(-1), labels.long())


def _find(folder: Path, stem: str, dimensions: int) -> Path | None:
    for mark in ("-", "."):
        for ending in ("", ".gz"):
            file = folder / f"{stem}{mark}idx{dimensions}-ubyte{ending}"
            if file.is_file():
                return file
    return None


def _require(folder: Path, stem: str, dimensions: int) -> Path:
    file = _find(folder, stem, dimensions)
    if file is None:
        raise HoldfastError(f"{folder} lacks {stem}-idx{dimensions}-ubyte (or .gz): put all four IDX files there")
    return file


def _array(file: Path, magic: int, dimensions: int) -> Tensor:
    raw = _read_bytes(file)
    header = 4 + 4 * dimensions
    if len(raw) < header:
        raise HoldfastError(f"{file} is truncated, it ends within its header: download it again")
    found, *shape = struct.unpack(f">{1 + dimensions}I", raw[:header])
    if found != magic:
        raise HoldfastError(
            f"{file} has magic number 0x{found:08x}, 0x{magic:08x} is expected: it is not the IDX file its name says, "
            "download it again"
        )
    expected = header
    size = 1
    for length in shape:
        size *= length
    expected += size
    if len(raw) != expected:
        state = "truncated" if len(raw) < expected else "longer than its header says"
        raise HoldfastError(f"{file} is {state} ({len(raw)} bytes, {expected} are expected): download it again")
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape).copy())


def _read_bytes(file: Path) -> bytes:
    if file.suffix != ".gz":
        return file.read_bytes()
    try:
        with gzip.open(file, "rb") as packed:
            return packed.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise HoldfastError(f"{file} is not a whole gzip file ({error}): download it again") from error
