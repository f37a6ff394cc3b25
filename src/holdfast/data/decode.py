"""Image files and bytes to uint8 tensors: one rule for grey and RGB, for mixed sizes and for damaged files."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from holdfast.data.limits import Room, most_for_one_image
from holdfast.errors import HoldfastError
from holdfast.regular_files import open_regular, readable_size, require_regular

_GREY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N"})
_ALPHA_MODES = frozenset({"LA", "PA", "RGBA", "RGBa", "La"})
_ORIENTATION_TAG = 0x0112
_CHUNK = 64  # images a task, so that the pool's own work does not show
_LARGE = 128 * 128  # pixels; below, threads wait for the interpreter's lock longer than they decode (measured)
_BAND = 1 << 20  # pixels converted at a time, so that a large image does not lie in memory three times
_FORMATS = ("PNG", "JPEG", "MPO", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
"""What is read; others are seldom images to learn from, and for one of them Pillow starts another program."""

_COSTS = {"WEBP": 16, "JPEG2000": 24, "AVIF": 16}
_COST, _COST_OF_CMYK = 8, 12
"""Bytes of memory that decoding and converting a pixel takes at its peak (measured with Pillow 13)."""


class Encoded(NamedTuple):
    """One image not yet decoded: a name for messages, and a file or its bytes."""

    name: str
    source: Path | bytes


class _Header(NamedTuple):
    size: tuple[int, int]
    is_grey: bool
    has_alpha: bool
    cost: int


@dataclass(frozen=True)
class DecodePlan:
    """What the headers of all images say: how every one of them is decoded.

    Args:
        size: Height and width of every decoded image.
        channels: 1 if all images are grey, else 3.
        resize: Whether images are brought to ``size``, which is square then.
        threads: How many images to decode at the same time; 1 where one is decoded so fast that threads do not pay.
        notes: What the user should be told.
    """

    size: tuple[int, int]
    channels: int
    resize: bool
    threads: int = 1
    notes: tuple[str, ...] = ()


def plan_decoding(items: Sequence[Encoded], image_size: int | None = None, *, room: Room | None = None) -> DecodePlan:
    """Read the headers only and decide size and channels for all images together.

    Args:
        items: Every image of every split.
        image_size: Side of the square to resize to; None keeps the size, which must then be common to all.
        room: What the data may take; None for the whole limit.
    Raises:
        HoldfastError: No image, an unreadable header, mixed sizes without ``image_size``, or more pixels than allowed.
    """
    if not items:
        raise HoldfastError("there are no images: add some")
    check_image_size(image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # these sizes are looked at here
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
    channels = 1 if grey == len(items) else 3
    (room or Room()).take(len(items) * size[0] * size[1] * channels, f"{len(items)} images of {_size_text(size)}")
    is_large = first.size[0] * first.size[1] >= _LARGE
    at_once = max(1, most_for_one_image() // max(header.cost for header in headers))
    return DecodePlan(size, channels, resize, min(_cores(), 16, at_once) if is_large else 1, tuple(notes))


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
            _decode(items[position], plan, arrays[position])

    if plan.threads > 1:
        _in_threads(decode_range, len(items), plan.threads)
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
    room = Room()
    room.take(arrays.nbytes, "the images")
    room.take(len(arrays) * image_size * image_size * arrays.shape[3], f"{len(arrays)} images of side {image_size}")
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
    with _opened(item) as image:
        width, height = image.size
        cost = width * height * (_COST_OF_CMYK if image.mode == "CMYK" else _COSTS.get(image.format or "", _COST))
        if cost > most_for_one_image():
            raise HoldfastError(
                f"it has {_size_text((height, width))} pixels, which take {readable_size(cost)} to decode, and"
                f" {readable_size(most_for_one_image())} are allowed for one image: make it smaller, or raise the limit"
                " with --max-data-gib (or HOLDFAST_MAX_DATA_GIB), of which this is the 36th part"
            )
        has_alpha = image.mode in _ALPHA_MODES or "transparency" in image.info
        if _has_orientation(image) and image.getexif().get(_ORIENTATION_TAG, 1) in (5, 6, 7, 8):
            width, height = height, width
        return _Header((height, width), image.mode in _GREY_MODES, has_alpha, max(1, cost))


def _decode(item: Encoded, plan: DecodePlan, into: np.ndarray) -> None:
    with _opened(item) as opened:
        image = ImageOps.exif_transpose(opened) if _has_orientation(opened) else opened
        convert = _to_grey if plan.channels == 1 else _to_rgb
        if plan.resize:
            into[:] = np.asarray(_fit_square(convert(image), plan.size[0])).reshape(into.shape)
            return
        height, width = plan.size
        rows = max(1, _BAND // width)
        for top in range(0, height, rows):
            band = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
            into[top : top + rows] = np.asarray(convert(band)).reshape(-1, width, plan.channels)


@contextmanager
def _opened(item: Encoded) -> Iterator[Image.Image]:
    """Open an image; whatever goes wrong until it is done with is told with its name."""
    try:
        if isinstance(item.source, Path) and require_regular(item.source) > most_for_one_image():
            raise HoldfastError("the file is larger than any image of the allowed size: replace or remove it")
        with open_regular(item.source) if isinstance(item.source, Path) else io.BytesIO(item.source) as file:
            yield Image.open(file, formats=_known_formats())
    except HoldfastError as error:
        message = str(error)
        is_told = isinstance(item.source, Path) and message.startswith(f"{item.source} ")
        raise HoldfastError(message if is_told else f"{item.name}: {message}") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise HoldfastError(f"{item.name}: it has more than {most} pixels: make it smaller, or remove it") from error
    except UnidentifiedImageError as error:
        raise HoldfastError(
            f"{item.name} cannot be read (not an image in one of the formats {', '.join(_known_formats())}): replace or"
            " remove it"
        ) from error
    except Exception as error:  # what Pillow raises on damaged files differs with the format, and is anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise HoldfastError(f"{item.name} cannot be read ({reason}): replace or remove it") from error


@cache
def _known_formats() -> tuple[str, ...]:
    """Those of the formats that this build of Pillow can open."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _has_orientation(image: Image.Image) -> bool:
    """Only in JPEGs is it known before decoding; of a PNG, asking would decode it."""
    return image.format in ("JPEG", "MPO") and "exif" in image.info


def _to_grey(image: Image.Image) -> Image.Image:
    """Mode L. Pillow's own conversion clips 16-bit values where it should scale them."""
    if not image.mode.startswith("I"):
        return image if image.mode == "L" else image.convert("L")
    values = np.asarray(image)
    levels = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, _BAND // max(1, values.shape[1]))
    for top in range(0, len(values), rows):
        part = values[top : top + rows].astype(np.int64)
        if part.min() < 0 or part.max() > 65535:
            raise HoldfastError("a grey image has values outside 0 to 65535: save it with 8 or 16 bits")
        levels[top : top + rows] = np.rint(part / 257)
    return Image.fromarray(levels)


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


def _in_threads(work: Callable[[range], None], count: int, threads: int) -> None:
    """Do ``work`` on ranges that cover 0 to ``count``; Pillow decodes without holding the interpreter's lock."""
    with ThreadPoolExecutor(threads) as pool:
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
