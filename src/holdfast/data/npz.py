"""NumPy archives: x_train, y_train, x_test, y_test, or x and y."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from holdfast.data.images import Dataset, Images, numbered_classes
from holdfast.data.split import hold_out_test
from holdfast.errors import HoldfastError

_CHUNK = 4096  # images converted at a time, so that a large float array is not copied whole


def recognises(path: Path) -> bool:
    """Whether ``path`` is a zip archive of ``.npy`` files."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
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
    arrays = _arrays(path)
    notes: list[str] = []
    if "x_train" in arrays or "y_train" in arrays:
        train = _split(path, arrays, "x_train", "y_train", notes)
        has_test = "x_test" in arrays or "y_test" in arrays
        test = _split(path, arrays, "x_test", "y_test", notes) if has_test else None
    else:
        train, test = _split(path, arrays, "x", "y", notes), None
    if test is None:
        classes = _class_names(path, arrays) or numbered_classes(train.labels)
        train, test, note = hold_out_test(train, seed)
        notes.append(note)
    else:
        classes = _class_names(path, arrays) or numbered_classes(train.labels, test.labels)
    return Dataset(name=path.stem, train=train, test=test, classes=classes, notes=tuple(notes))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    wanted = ("x_train", "y_train", "x_test", "y_test", "x", "y", "classes")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in wanted if name in archive.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HoldfastError(f"{path} cannot be read ({reason}): save plain arrays with numpy.savez") from error


def _split(path: Path, arrays: dict[str, np.ndarray], x_name: str, y_name: str, notes: list[str]) -> Images:
    for name in (x_name, y_name):
        if name not in arrays:
            raise HoldfastError(f"{path} holds no array {name}: save x_train, y_train, x_test and y_test, or x and y")
    pixels = _channels_last(f"{path}: {x_name}", arrays[x_name], notes)
    labels = _labels(f"{path}: {y_name}", arrays[y_name])
    if len(pixels) != len(labels):
        raise HoldfastError(f"{path}: {x_name} has {len(pixels)} images and {y_name} {len(labels)} labels: match them")
    rows = np.array(_as_bytes(f"{path}: {x_name}", pixels, notes), order="C")
    return Images(torch.from_numpy(rows), torch.from_numpy(labels))


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
    result = np.empty(pixels.shape, dtype=np.uint8)
    largest_change = 0.0
    for start in range(0, len(pixels), _CHUNK):
        part = pixels[start : start + _CHUNK].astype(np.float64)
        if not (np.isfinite(part).all() and part.min() >= 0 and part.max() <= 1):
            raise HoldfastError(
                f"{where} is float from {part.min():g} to {part.max():g}, 0 to 1 is expected: store uint8, or divide "
                "by 255"
            )
        rounded = np.rint(part * 255)
        largest_change = max(largest_change, float(np.abs(rounded / 255 - part).max(initial=0.0)))
        result[start : start + _CHUNK] = rounded
    notes.append(f"{where} was float and is rounded to uint8; the largest change is {largest_change:.2g}.")
    return result


def _labels(where: str, labels: np.ndarray) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise HoldfastError(f"{where} has shape {labels.shape}: store one class number an image, as argmax(1) gives")
    if not np.issubdtype(labels.dtype, np.integer):
        raise HoldfastError(f"{where} is {labels.dtype}: store class numbers as integers from 0")
    if labels.size > 0 and labels.min() < 0:
        index = int(labels.argmin())
        raise HoldfastError(f"{where} has label {labels[index]} at index {index}: number the classes from 0")
    return labels.astype(np.int64)


def _class_names(path: Path, arrays: dict[str, np.ndarray]) -> tuple[str, ...] | None:
    names = arrays.get("classes")
    if names is None:
        return None
    if names.ndim != 1 or names.dtype.kind not in "US":
        raise HoldfastError(f"{path}: classes is {names.dtype} of shape {names.shape}: store a flat array of strings")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names)
