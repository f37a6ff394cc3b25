"""Image files and bytes to uint8 tensors: one rule for grey and RGB, for mixed sizes and for damaged files."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from holdfast.errors import HoldfastError

_GREY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N"})
_ALPHA_MODES = frozenset({"LA", "PA", "RGBA", "RGBa", "La"})
_ORIENTATION_TAG = 0x0112
_CHUNK = 64  # images a task, so that the pool's own work does not show
_LARGE = 128 * 128  # pixels; below, threads wait for the interpreter's lock longer than they decode (measured)
# What Pillow raises on damaged files differs with the format.
_DAMAGE = (OSError, SyntaxError, ValueError, LookupError, EOFError, struct.error, Image.DecompressionBombError)


class Encoded(NamedTuple):
    """One image not yet decoded: a name for messages, and a file or its bytes."""

    name: str
    source: Path | bytes


class _Header(NamedTuple):
    size: tuple[int, int]
    is_grey: bool
    has_alpha: bool


@dataclass(frozen=True)
class DecodePlan:
    """What the headers of all images say: how every one of them is decoded.

    Args:
        size: Height and width of every decoded image.
        channels: 1 if all images are grey, else 3.
        resize: Whether images are brought to ``size``, which is square then.
        in_threads: Whether decoding one image is long enough for threads to pay.
        notes: What the user should be told.
    """

    size: tuple[int, int]
    channels: int
    resize: bool
    in_threads: bool = False
    notes: tuple[str, ...] = ()


def plan_decoding(items: Sequence[Encoded], image_size: int | None = None) -> DecodePlan:
    """Read the headers only and decide size and channels for all images together.

    Args:
        items: Every image of every split.
        image_size: Side of the square to resize to; None keeps the size, which must then be common to all.
    Raises:
        HoldfastError: No image, an unreadable header, or mixed sizes without ``image_size``.
    """
    if not items:
        raise HoldfastError("there are no images: add some")
    check_image_size(image_size)
    headers = [_header(item) for item in items]
    first = headers[0]
    notes = []
    if image_size is None:
        for item, header in zip(items, headers, strict=True):
            if header.size != first.size:
                raise HoldfastError(
                    f"image sizes differ, {items[0].name} is {_size_text(first.size)} and {item.name} is "
                    f"{_size_text(header.size)} (height×width): give --image-size N to resize all to N×N"
                )
        size = first.size
    else:
        size = (image_size, image_size)
    resize = any(header.size != size for header in headers)
    if resize:
        notes.append(f"Images are resized to {_size_text(size)}: shorter side, then centre.")
    grey = sum(header.is_grey for header in headers)
    if 0 < grey < len(items):
        notes.append(f"{grey} of {len(items)} images are grey and are converted to RGB like the others.")
    alpha = sum(header.has_alpha for header in headers)
    if alpha > 0:
        notes.append(f"{alpha} of {len(items)} images have transparency, which is dropped.")
    is_large = first.size[0] * first.size[1] >= _LARGE
    return DecodePlan(size, 1 if grey == len(items) else 3, resize, is_large, tuple(notes))


def decode_images(items: Sequence[Encoded], plan: DecodePlan) -> Tensor:
    """Decode every image as planned.

    JPEGs are turned upright as their EXIF orientation says; 16-bit grey becomes round(value / 257); of an animation
    the first frame is read.

    Shapes:
        result: (N, H, W, C) uint8.
    Raises:
        HoldfastError: An image cannot be decoded; the message names it.
    """
    arrays = np.empty((len(items), *plan.size, plan.channels), dtype=np.uint8)

    def decode_range(positions: range) -> None:
        for position in positions:
            arrays[position] = _decode(items[position], plan)

    if plan.in_threads:
        _in_threads(decode_range, len(items))
    else:
        decode_range(range(len(items)))
    return torch.from_numpy(arrays)


def resize_pixels(pixels: Tensor, image_size: int) -> Tensor:
    """Bring decoded images to ``image_size`` squared by the same rule as image files.

    Shapes:
        pixels: (N, H, W, C) uint8; result: (N, image_size, image_size, C) uint8.
    Raises:
        HoldfastError: ``image_size`` is not positive.
    """
    check_image_size(image_size)
    arrays = pixels.cpu().numpy()
    is_grey = arrays.shape[3] == 1
    result = np.empty((len(arrays), image_size, image_size, arrays.shape[3]), dtype=np.uint8)
    for position, array in enumerate(arrays):
        fitted = np.asarray(_fit_square(Image.fromarray(array[..., 0] if is_grey else array), image_size))
        result[position] = fitted.reshape(result.shape[1:])
    return torch.from_numpy(result)


def check_image_size(image_size: int | None) -> None:
    """Refuse a size that no image can have.

    Raises:
        HoldfastError: ``image_size`` is given and less than 1.
    """
    if image_size is not None and image_size < 1:
        raise HoldfastError(f"image size is {image_size}: give --image-size a positive number of pixels")


def _header(item: Encoded) -> _Header:
    try:
        with _open(item) as image:
            width, height = image.size
            has_alpha = image.mode in _ALPHA_MODES or "transparency" in image.info
            if _has_orientation(image) and image.getexif().get(_ORIENTATION_TAG, 1) in (5, 6, 7, 8):
                width, height = height, width
            return _Header((height, width), image.mode in _GREY_MODES, has_alpha)
    except _DAMAGE as error:
        raise _unreadable(item, error) from error


def _decode(item: Encoded, plan: DecodePlan) -> np.ndarray:
    try:
        with _open(item) as image:
            if _has_orientation(image):
                image = ImageOps.exif_transpose(image)
            image = _to_grey(image) if plan.channels == 1 else _to_rgb(image)
            if plan.resize:
                image = _fit_square(image, plan.size[0])
            return np.asarray(image).reshape(*plan.size, plan.channels)
    except _DAMAGE as error:
        raise _unreadable(item, error) from error


def _open(item: Encoded) -> Image.Image:
    return Image.open(io.BytesIO(item.source) if isinstance(item.source, bytes) else item.source)


def _has_orientation(image: Image.Image) -> bool:
    """Only in JPEGs is it known before decoding; of a PNG, asking would decode it."""
    return image.format in ("JPEG", "MPO") and "exif" in image.info


def _unreadable(item: Encoded, error: BaseException) -> HoldfastError:
    if isinstance(error, HoldfastError):
        return HoldfastError(f"{item.name}: {error}")
    reason = "not an image that Pillow knows" if isinstance(error, Image.UnidentifiedImageError) else str(error)
    return HoldfastError(f"{item.name} cannot be read ({reason}): replace or remove it")


def _to_grey(image: Image.Image) -> Image.Image:
    """Mode L. Pillow's own conversion clips 16-bit values where it should scale them."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise HoldfastError("a grey image has values outside 0 to 65535: save it with 8 or 16 bits")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    return image if image.mode == "L" else image.convert("L")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise HoldfastError("floating-point images have no scale: save them with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _to_grey(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the direct way warns
    return image if image.mode == "RGB" else image.convert("RGB")


def _fit_square(image: Image.Image, side: int) -> Image.Image:
    """Shorter side to ``side`` and the centre cut out, as one bicubic (antialiasing) resampling of the centre."""
    width, height = image.size
    if (width, height) == (side, side):
        return image
    shorter = min(width, height)
    left, top = (width - shorter) / 2, (height - shorter) / 2
    box = (left, top, left + shorter, top + shorter)
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)


def _in_threads(work: Callable[[range], None], count: int) -> None:
    """Do ``work`` on ranges that cover 0 to ``count``; Pillow decodes without holding the interpreter's lock."""
    with ThreadPoolExecutor(min(_cores(), 16)) as pool:
        tasks = [pool.submit(work, range(start, min(start + _CHUNK, count))) for start in range(0, count, _CHUNK)]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"
