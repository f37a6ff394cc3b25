"""NumPy archives: x_train, y_train, x_test, y_test, or x and y."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from holdfast.data.archive import open_archive
from holdfast.data.images import MOST_CLASSES, Dataset, Images, numbered_classes
from holdfast.data.limits import Room
from holdfast.data.split import hold_out_test
from holdfast.errors import HoldfastError

_CHUNK = 1 << 20  # numbers converted at a time, so that a large float array is not copied whole


def recognises(path: Path) -> bool:
    """Whether ``path`` is a zip archive of ``.npy`` files."""
    if not path.is_file():
        return False
    try:
        with open_archive(path, str(path), Room()) as archive:
            return bool(archive.names)
    except HoldfastError:
        return False


def read(path: Path, *, seed: int = 0) -> Dataset:
    """Read images and labels from an ``.npz``; nothing pickled is loaded.

    Pixels are uint8, or float in [0, 1], which is rounded to uint8 and noted. Images are (N, H, W), (N, H, W, C) or
    (N, C, H, W) with C 1 or 3; where both readings fit, channels last is taken and noted. Labels are integers from 0,
    and an array ``classes`` of strings may name them. Whether a flip is harmless cannot be known: ``flip`` is False.

    Args:
        path: The archive.
        seed: Of the 20 % held out where there is no test split.
    Raises:
        HoldfastError: An array is missing or not of the stated kind.
    """
    room = Room()
    arrays = _arrays(path, room)
    notes: list[str] = []
    if "x_train" in arrays or "y_train" in arrays:
        train = _split(path, arrays, "x_train", "y_train", notes, room)
        has_test = "x_test" in arrays or "y_test" in arrays
        test = _split(path, arrays, "x_test", "y_test", notes, room) if has_test else None
    else:
        train, test = _split(path, arrays, "x", "y", notes, room), None
    if test is None:
        classes = _class_names(path, arrays) or numbered_classes(train.labels)
        train, test, note = hold_out_test(train, seed)
        notes.append(note)
    else:
        classes = _class_names(path, arrays) or numbered_classes(train.labels, test.labels)
    return Dataset(name=path.stem, train=train, test=test, classes=classes, notes=tuple(notes))


def _arrays(path: Path, room: Room) -> dict[str, np.ndarray]:
    wanted = ("x_train", "y_train", "x_test", "y_test", "x", "y", "classes")
    with open_archive(path, str(path), room) as archive:
        for images, labels in (("x_train", "y_train"), ("x_test", "y_test"), ("x", "y")):
            archive.require_one_for_each(labels, images)
        return {name: archive.read(name) for name in wanted if name in archive.names}


def _split(path: Path, arrays: dict[str, np.ndarray], x_name: str, y_name: str, notes: list[str], room: Room) -> Images:
    for name in (x_name, y_name):
        if name not in arrays:
            raise HoldfastError(f"{path} holds no array {name}: save x_train, y_train, x_test and y_test, or x and y")
    pixels = pixels_of(f"{path}: {x_name}", arrays.pop(x_name), notes)
    return Images(pixels, labels_of(f"{path}: {y_name}", arrays[y_name], room))


def pixels_of(where: str, pixels: np.ndarray, notes: list[str]) -> Tensor:
    """Return an array of images as bytes, channels last.

    Args:
        where: What messages call it.
        pixels: The array as it was read.
        notes: Gets what was decided.
    Shapes:
        pixels: (N, H, W), (N, H, W, C) or (N, C, H, W); result: (N, H, W, C) uint8.
    Raises:
        HoldfastError: It is of another shape, type or scale.
    """
    return torch.from_numpy(np.ascontiguousarray(_channels_last(where, _as_bytes(where, pixels, notes), notes)))


def _channels_last(where: str, pixels: np.ndarray, notes: list[str]) -> np.ndarray:
    if pixels.ndim == 3:
        return pixels[..., None]
    if pixels.ndim != 4 or (pixels.shape[3] not in (1, 3) and pixels.shape[1] not in (1, 3)):
        raise HoldfastError(
            f"{where} has shape {pixels.shape}: reshape it to (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3"
        )
    if pixels.shape[3] in (1, 3):
        if pixels.shape[1] in (1, 3):
            notes.append(f"{where} of shape {pixels.shape} is taken as (N, H, W, C); it could be (N, C, H, W).")
        return pixels
    return pixels.transpose(0, 2, 3, 1)


def _as_bytes(where: str, pixels: np.ndarray, notes: list[str]) -> np.ndarray:
    if pixels.dtype == np.uint8:
        if pixels.size > 0 and pixels.max() <= 1:
            notes.append(f"{where} is uint8 but never above 1: on the scale 0 to 255 these images are all but black.")
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating):
        raise HoldfastError(f"{where} is {pixels.dtype}: store uint8 from 0 to 255, or float from 0 to 1")
    _channels_last(where, pixels, [])  # a wrong shape is told first
    result = np.empty_like(pixels, dtype=np.uint8)
    numbers, rounded_numbers = (
        (array if array.flags.c_contiguous else array.T).reshape(-1) for array in (pixels, result)
    )
    largest_change = 0.0
    for start in range(0, len(numbers), _CHUNK):
        part = numbers[start : start + _CHUNK].astype(np.float64)
        if not (np.isfinite(part).all() and part.min() >= 0 and part.max() <= 1):
            raise HoldfastError(
                f"{where} is float from {part.min():g} to {part.max():g}, 0 to 1 is expected: store uint8, or divide "
                "by 255"
            )
        rounded = np.rint(part * 255)
        largest_change = max(largest_change, float(np.abs(rounded / 255 - part).max(initial=0.0)))
        rounded_numbers[start : start + _CHUNK] = rounded
    notes.append(f"{where} was float and is rounded to uint8; the largest change is {largest_change:.2g}.")
    return result


def labels_of(where: str, labels: np.ndarray, room: Room) -> Tensor:
    """Return an array of labels as class numbers.

    Args:
        where: What messages call it.
        labels: The array as it was read.
        room: What the data may take.
    Shapes:
        labels: (N,) or (N, 1); result: (N,) int64.
    Raises:
        HoldfastError: They are not whole numbers from 0, one an image.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise HoldfastError(f"{where} has shape {labels.shape}: store one class number an image, as argmax(1) gives")
    if not np.issubdtype(labels.dtype, np.integer):
        raise HoldfastError(f"{where} is {labels.dtype}: store class numbers as integers from 0")
    if labels.size > 0 and labels.min() < 0:
        index = int(labels.argmin())
        raise HoldfastError(f"{where} has label {labels[index]} at index {index}: number the classes from 0")
    if labels.size > 0 and labels.max() > np.iinfo(np.int64).max:
        raise HoldfastError(f"{where} has label {labels.max()}: number the classes from 0 without gaps")
    room.take(8 * len(labels), where)
    return torch.from_numpy(labels.astype(np.int64))


def _class_names(path: Path, arrays: dict[str, np.ndarray]) -> tuple[str, ...] | None:
    names = arrays.get("classes")
    if names is None:
        return None
    if names.ndim != 1 or names.dtype.kind not in "US":
        raise HoldfastError(f"{path}: classes is {names.dtype} of shape {names.shape}: store a flat array of strings")
    if len(names) > MOST_CLASSES:
        raise HoldfastError(f"{path}: classes has {len(names)} names, at most {MOST_CLASSES} are read: leave them out")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names)
