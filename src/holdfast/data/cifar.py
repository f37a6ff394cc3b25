"""CIFAR-10 and CIFAR-100 as published: binary or Python version, as a folder or as the .tar.gz itself."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import torch

from holdfast.data.images import Dataset, Images
from holdfast.data.inert_pickle import load_inert
from holdfast.data.unpacking import Gunzip, GzipDamage
from holdfast.errors import HoldfastError
from holdfast.regular_files import open_regular, read_regular, readable_size

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SUGGESTED_EPSILON = 8 / 255
_PIXELS = 3 * 32 * 32
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")
_TRAIN10 = tuple(f"data_batch_{number}" for number in range(1, 6))
_NAMES = frozenset(
    [f"{name}{ending}" for name in (*_TRAIN10, "test_batch", "train", "test") for ending in ("", ".bin")]
    + ["batches.meta", "batches.meta.txt", "meta", "fine_label_names.txt", "coarse_label_names.txt"]
)
_LARGEST_FILE = 1 << 28  # CIFAR-100's train file has 155 MB; a longer one is not CIFAR
_LARGEST_ARCHIVE = 400 << 20  # unpacked; CIFAR's have 190 MB
_MEMBERS = 10_000
_BLOCK = 512  # bytes: tar's unit, and the length of a member's header
_PART = 1 << 20

Files = Mapping[str, Callable[[], bytes]]
"""Reads each file of the data set by its name, from a folder or out of an archive."""


def recognises(path: Path) -> bool:
    """Whether ``path`` is a CIFAR folder, its parent, or a tar archive."""
    if path.is_dir():
        return _folder(path) is not None
    return path.is_file() and _is_tar(path)


def read(path: Path) -> Dataset:
    """Read CIFAR-10, or CIFAR-100 with its 100 fine labels; pickled code is never run.

    Args:
        path: The folder with the batches, the folder above it, or the published ``.tar.gz``, read in memory.
    Raises:
        HoldfastError: A batch is missing, truncated or damaged, or a pickle asks for anything but arrays.
    """
    folder = _folder(path) if path.is_dir() else None
    files = _archive_files(path) if folder is None else _folder_files(folder)
    version = _version(files)
    if version is None:
        raise HoldfastError(f"{path} does not hold CIFAR: give cifar-10-*.tar.gz, cifar-100-*.tar.gz or their folder")
    is_binary, is_ten = version
    train_names, test_name = (_TRAIN10, "test_batch") if is_ten else (("train",), "test")
    read_split = _binary_split if is_binary else _pickled_split
    train = read_split(path, files, train_names, is_ten)
    test = read_split(path, files, (test_name,), is_ten)
    classes = _class_names(path, files, is_binary, is_ten)
    notes = [] if is_ten else ["CIFAR-100: the 100 fine labels are used, not the 20 coarse ones."]
    if (len(train), len(test)) != (50_000, 10_000):
        notes.append(f"{len(train)} training and {len(test)} test images found; the published set has 50000 and 10000.")
    return Dataset(
        name="cifar10" if is_ten else "cifar100",
        train=train,
        test=test,
        classes=classes,
        suggested_epsilon=SUGGESTED_EPSILON,
        flip=True,
        crop=True,
        notes=tuple(notes),
    )


def _version(names: Files) -> tuple[bool, bool] | None:
    """(binary?, ten classes?) or None. CIFAR-100's bare "train" is told from a folder of images by its "meta"."""
    if any(f"{name}.bin" in names for name in _TRAIN10):
        return True, True
    if any(name in names for name in _TRAIN10):
        return False, True
    if "train.bin" in names:
        return True, False
    if "train" in names and "meta" in names:
        return False, False
    return None


def _folder(path: Path) -> Path | None:
    """The folder itself or the one CIFAR folder in it."""
    if _version(_folder_files(path)) is not None:
        return path
    inside = [path / name for name in _FOLDERS if (path / name).is_dir()]
    if len(inside) > 1:
        raise HoldfastError(f"{path} holds both {inside[0].name} and {inside[1].name}: give the path of one of them")
    return inside[0] if inside else None


def _folder_files(folder: Path) -> Files:
    return {
        name: partial(read_regular, folder / name, most=_LARGEST_FILE) for name in _NAMES if (folder / name).is_file()
    }


def _is_tar(path: Path) -> bool:
    """Whether a file begins as a tar archive does, packed with gzip or not."""
    try:
        with open_regular(path) as file:
            tarfile.TarInfo.frombuf(_unpacked(file).read(_BLOCK), "utf-8", "surrogateescape")
    except (tarfile.TarError, GzipDamage):
        return False
    return True


def _unpacked(file: IO[bytes]) -> io.BufferedIOBase | IO[bytes]:
    """The content of a file that may be packed with gzip."""
    is_packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return io.BufferedReader(Gunzip(file)) if is_packed else file


def _archive_files(path: Path) -> Files:
    """Read the wanted members into memory; nothing is extracted, so no member's path can matter."""
    try:
        with open_regular(path) as file:
            contents = dict(_members(path, _unpacked(file)))
    except (tarfile.TarError, GzipDamage, EOFError) as error:
        raise HoldfastError(f"{path} is not a whole archive ({error}): download it again") from error
    return {name: (lambda content=content: content) for name, content in contents.items()}


def _members(path: Path, stream: io.BufferedIOBase | IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Go through a tar archive once, forwards. Long names and attributes, which are members too, are passed over."""
    left = _LARGEST_ARCHIVE
    for _ in range(_MEMBERS):
        block = stream.read(_BLOCK)
        if not block:
            return
        if not block.strip(b"\0"):
            _pass_over(stream, left)  # to the checksum of gzip
            return
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        name = PurePosixPath(member.name).name
        is_wanted = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and name in _NAMES
        if is_wanted and member.size > _LARGEST_FILE:
            raise HoldfastError(
                f"{path}: {name} has {member.size} bytes, more than any of CIFAR's files: download it again"
            )
        padded = -(-member.size // _BLOCK) * _BLOCK
        left -= _BLOCK + padded
        if member.size < 0 or left < 0:
            raise HoldfastError(
                f"{path} holds more than {readable_size(_LARGEST_ARCHIVE)}, which CIFAR does not: download it again"
            )
        if not is_wanted:
            _pass_over(stream, padded)
            continue
        content = stream.read(padded)
        if len(content) < member.size:
            raise EOFError(f"{name} is cut")
        yield name, content[: member.size]
    raise HoldfastError(f"{path} holds more than {_MEMBERS} files, which CIFAR does not: download it again")


def _pass_over(stream: io.BufferedIOBase | IO[bytes], count: int) -> None:
    """Read and forget, at most so many bytes."""
    while count > 0 and (part := stream.read(min(count, _PART))):
        count -= len(part)


def _require(path: Path, files: Files, name: str) -> bytes:
    if name not in files:
        raise HoldfastError(f"{path} lacks {name}: unpack all of CIFAR's files there")
    return files[name]()


def _binary_split(path: Path, files: Files, names: tuple[str, ...], is_ten: bool) -> Images:
    """Rows of label bytes (CIFAR-100: coarse, then fine) and 3072 pixels."""
    head = 1 if is_ten else 2
    rows = []
    for name in names:
        raw = _require(path, files, f"{name}.bin")
        if not raw or len(raw) % (head + _PIXELS) != 0:
            raise HoldfastError(
                f"{path}: {name}.bin has {len(raw)} bytes, not a whole number of {head + _PIXELS}-byte records: it is "
                "truncated, download it again"
            )
        rows.append(np.frombuffer(raw, dtype=np.uint8).reshape(-1, head + _PIXELS))
    table = np.concatenate(rows)
    return _images(table[:, head:], table[:, head - 1].astype(np.int64))


def _pickled_split(path: Path, files: Files, names: tuple[str, ...], is_ten: bool) -> Images:
    pixels, labels = [], []
    label_key = "labels" if is_ten else "fine_labels"
    for name in names:
        batch = _pickled_dict(path, files, name)
        data, batch_labels = batch.get("data"), batch.get(label_key)
        if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != _PIXELS:
            raise HoldfastError(f"{path}: {name} holds no (N, {_PIXELS}) array called data: use the published files")
        if not isinstance(batch_labels, list) or any(
            type(label) is not int or not 0 <= label < 256 for label in batch_labels
        ):
            raise HoldfastError(f"{path}: {name} holds no list {label_key} of numbers from 0: use the published files")
        if len(batch_labels) != len(data):
            raise HoldfastError(
                f"{path}: {name} holds {len(data)} images but {len(batch_labels)} {label_key}: download it again"
            )
        pixels.append(data)
        labels.extend(batch_labels)
    return _images(np.concatenate(pixels), np.array(labels, dtype=np.int64))


def _pickled_dict(path: Path, files: Files, name: str) -> dict[str, object]:
    """A batch's dictionary with its keys as text: Python 2 wrote them as bytes."""
    value = load_inert(_require(path, files, name), f"{path}: {name}")
    if not isinstance(value, dict):
        raise HoldfastError(f"{path}: {name} is no dictionary: use the published files")
    return {_text(key): item for key, item in value.items()}


def _images(rows: np.ndarray, labels: np.ndarray) -> Images:
    """Rows are channel by channel, each 32 lines of 32 pixels."""
    pixels = np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))


def _class_names(path: Path, files: Files, is_binary: bool, is_ten: bool) -> tuple[str, ...]:
    count = 10 if is_ten else 100
    if is_binary:
        name = "batches.meta.txt" if is_ten else "fine_label_names.txt"
        lines = files[name]().decode("utf-8", "replace").splitlines() if name in files else []
        names = [line.strip() for line in lines if line.strip()]
    else:
        name, key = ("batches.meta", "label_names") if is_ten else ("meta", "fine_label_names")
        listed = _pickled_dict(path, files, name).get(key) if name in files else []
        names = [_text(item) for item in listed] if isinstance(listed, list) else []
    if not names:
        return CIFAR10_CLASSES if is_ten else tuple(str(label) for label in range(count))
    if len(names) != count:
        raise HoldfastError(f"{path}: {name} lists {len(names)} class names, {count} are expected: download it again")
    return tuple(names)


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
