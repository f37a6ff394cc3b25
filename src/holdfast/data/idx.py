"""IDX files: the format of MNIST, Fashion-MNIST and their kin, packed with gzip or not."""

from __future__ import annotations

import io
import math
import os
import struct
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from holdfast.data.images import Dataset, Images, numbered_classes
from holdfast.data.limits import Room
from holdfast.data.unpacking import DEFLATE_RATIO, Gunzip, GzipDamage, read_into
from holdfast.errors import HoldfastError
from holdfast.regular_files import open_regular

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
    room = Room()
    train, test = _split(path, "train", room), _split(path, "t10k", room)
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


def _split(folder: Path, prefix: str, room: Room) -> Images:
    images_file, labels_file = _require(folder, f"{prefix}-images", 3), _require(folder, f"{prefix}-labels", 1)
    labels = _array(labels_file, LABEL_MAGIC, 1, room)
    room.take(8 * len(labels), str(labels_file))  # they become int64
    pixels = _array(images_file, IMAGE_MAGIC, 3, room)
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


def _array(file: Path, magic: int, dimensions: int, room: Room) -> Tensor:
    """Read an IDX file: first its header, then as many bytes as that declares."""
    try:
        with open_regular(file) as packed:
            return _content(file, packed, magic, dimensions, room)
    except GzipDamage as error:
        raise HoldfastError(f"{file} is not a whole gzip file ({error}): download it again") from error


def _content(file: Path, packed: IO[bytes], magic: int, dimensions: int, room: Room) -> Tensor:
    stream = io.BufferedReader(Gunzip(packed)) if file.suffix == ".gz" else packed
    header = stream.read(4 + 4 * dimensions)
    if len(header) < 4 + 4 * dimensions:
        raise HoldfastError(f"{file} is truncated, it ends within its header: download it again")
    found, *shape = struct.unpack(f">{1 + dimensions}I", header)
    if found != magic:
        raise HoldfastError(
            f"{file} has magic number 0x{found:08x}, 0x{magic:08x} is expected: it is not the IDX file its name says, "
            "download it again"
        )
    expected = len(header) + math.prod(shape)
    size = os.fstat(packed.fileno()).st_size
    possible = DEFLATE_RATIO * (size + 1) if file.suffix == ".gz" else size
    if possible < expected:
        raise HoldfastError(f"{file} is truncated ({size} bytes, {expected} are expected): download it again")
    room.take(expected, str(file))
    array = np.empty(math.prod(shape), dtype=np.uint8)
    count = len(header) + read_into(stream, array)
    if count < expected or stream.read(1):
        state = f"truncated ({count}" if count < expected else f"longer than its header says ({max(size, count + 1)}"
        raise HoldfastError(f"{file} is {state} bytes, {expected} are expected): download it again")
    return torch.from_numpy(array.reshape(shape))
