"""IDBH: the augmentation that alone lifts adversarial training (flip, CropShift, ColorShape, RandomErasing)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from holdfast.data.colour_shape import (
    autocontrast,
    brightness,
    contrast,
    equalize,
    rotate,
    saturation,
    sharpness,
    shear,
    taken,
)
from holdfast.errors import HoldfastError, unknown_name
from holdfast.keyed_random import Key, integers, uniform

Strength = Literal["weak", "strong", "svhn"]

OPERATIONS = ("saturation", "brightness", "contrast", "sharpness", "autocontrast", "equalize", "shear", "rotate")


class Policy(NamedTuple):
    """How often each of `OPERATIONS` is drawn, and how strong.

    Weights are relative. Factors lie in [low, high), shear in radians, rotation in whole degrees low … high - 1.
    """

    weights: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


COLOUR = Policy((1,) * 8, (0.1, 0.5, 0.5, 0.1, 0, 0, 0.05, 1), (1.9, 1.9, 1.9, 1.9, 0, 0, 0.15, 11))
SHAPE = Policy((8, 8, 4, 8, 4, 8, 30, 30), (0.1, 0.5, 0.5, 0.1, 0, 0, 0.05, 1), (1.9, 1.9, 1.9, 1.9, 0, 0, 0.35, 31))


class Drawn(NamedTuple):
    """What ColorShape does to each image: a position in `OPERATIONS`, its signed magnitude, and the shear's axis."""

    operation: Tensor
    magnitude: Tensor
    vertical: Tensor


def _below(key: Key, index: Tensor, high: Tensor) -> Tensor:
    """One integer in [0, high) for every row, each row with its own bound."""
    return (integers(key, index, 1 << 24) * high) >> 24


def _column(value: Tensor) -> Tensor:
    """(B,) as (B, 1)."""
    return value[:, None]


def flip_and_crop_shift(pixels: Tensor, *, key: Key, index: Tensor, high: int, flip: bool = True) -> Tensor:
    r"""Mirror half of the images, where `flip` says so, then cut s rows and columns away and move the rest.

    .. math:: s \sim \{0 \dots high - 1\}, \qquad c_x \sim \{0 \dots s\}, \qquad c_y = s - c_x

    A window of (W - c_x) x (H - c_y) pixels is taken from a uniform place and put, on black, at a uniform place.
    One gather does all of it.

    Args:
        pixels: A batch of images.
        key: What the draw is for, seed and epoch included.
        index: Position of each image in the data set.
        high: Bound of s, exclusive.

    Shapes:
        pixels: (B, H, W, C), any type; index: (B,). Returns the shape and type of `pixels`.
    Units:
        high: pixels.
    Source: Li and Spratling, ICLR 2023, arXiv:2301.09879.

    Example:
        >>> ones = torch.ones(1, 8, 8, 1, dtype=torch.uint8)
        >>> moved = flip_and_crop_shift(ones, key=Key(4), index=torch.tensor([5]), high=4)
        >>> int(moved.any(2).sum() + moved.any(1).sum())  # rows and columns left of 16: here s = 2
        14
    """
    _, height, width, _ = pixels.shape
    size = integers(key.fold("crop size"), index, high)
    cut_x = _below(key.fold("crop share"), index, size + 1)
    cut_y = size - cut_x

    def axis(name: str, cut: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Source of each output position, and whether it is in the window. Both (B, side)."""
        taken_at = _column(_below(key.fold("taken", name), index, cut + 1))
        put_at = _column(_below(key.fold("put", name), index, cut + 1))
        inside_window = torch.arange(side, device=pixels.device) - put_at
        visible = (inside_window >= 0) & (inside_window < side - _column(cut))
        return inside_window + taken_at, visible

    columns, shown_x = axis("x", cut_x, width)
    rows, shown_y = axis("y", cut_y, height)
    if flip:
        mirrored = integers(key.fold("flip"), index, 2).bool()
        columns = torch.where(_column(mirrored), width - 1 - columns, columns)
    shown = shown_y[:, :, None] & shown_x[:, None, :]
    return taken(pixels, rows[:, :, None], columns[:, None, :], shown)


def draw_colour_shape(*, key: Key, index: Tensor, policy: Policy) -> Drawn:
    """Which operation each image gets, and how strong.

    Args:
        key: What the draw is for, seed and epoch included.
        index: Position of each image in the data set.
        policy: Frequencies and ranges.

    Shapes:
        index: (B,). Returns (B,) each: int64, float32, bool.
    Units:
        magnitude: a factor, radians of shear or degrees of rotation, by operation.

    Example:
        >>> drawn = draw_colour_shape(key=Key(0), index=torch.arange(3), policy=COLOUR)
        >>> [OPERATIONS[position] for position in drawn.operation]
        ['equalize', 'shear', 'shear']
    """
    edges = torch.tensor(policy.weights, device=index.device).cumsum(0)
    ticket = integers(key.fold("operation"), index, sum(policy.weights))
    operation = torch.searchsorted(edges, ticket, right=True)
    low = torch.tensor(policy.low, dtype=torch.float32, device=index.device)[operation]
    high = torch.tensor(policy.high, dtype=torch.float32, device=index.device)[operation]
    magnitude = low + (high - low) * uniform(key.fold("magnitude"), index, ())
    whole = torch.minimum(torch.floor(magnitude), high - 1)  # single precision may round the sum up to high
    magnitude = torch.where(operation == OPERATIONS.index("rotate"), whole, magnitude)
    turned = (operation >= OPERATIONS.index("shear")) & integers(key.fold("sign"), index, 2).bool()
    vertical = integers(key.fold("axis"), index, 2).bool()
    return Drawn(operation, torch.where(turned, -magnitude, magnitude), vertical)


def _apply(name: str, pixels: Tensor, magnitude: Tensor, vertical: Tensor) -> Tensor:
    """One operation to images that all drew it."""
    if name == "autocontrast":
        return autocontrast(pixels)
    if name == "equalize":
        return equalize(pixels)
    if name == "shear":
        none = torch.zeros_like(magnitude)
        return shear(pixels, torch.where(vertical, none, magnitude), torch.where(vertical, magnitude, none))
    scaled = {
        "saturation": saturation,
        "brightness": brightness,
        "contrast": contrast,
        "sharpness": sharpness,
        "rotate": rotate,
    }
    return scaled[name](pixels, magnitude)


def apply_colour_shape(pixels: Tensor, drawn: Drawn) -> Tensor:
    """Do to each image what was drawn for it, every operation once for all images that drew it.

    Args:
        pixels: A batch of images.
        drawn: From `draw_colour_shape`.

    Shapes:
        pixels: (B, H, W, C) uint8, C 1 or 3. Returns its shape.

    Example:
        >>> grey = torch.full((1, 2, 2, 1), 100, dtype=torch.uint8)
        >>> bright = Drawn(torch.tensor([1]), torch.tensor([1.5]), torch.tensor([False]))
        >>> apply_colour_shape(grey, bright).flatten().tolist()
        [150, 150, 150, 150]
    """
    order = torch.argsort(drawn.operation, stable=True)
    counts = torch.bincount(drawn.operation, minlength=len(OPERATIONS)).tolist()
    result = torch.empty_like(pixels)
    for name, rows in zip(OPERATIONS, order.split(counts), strict=True):
        if len(rows):
            part = _apply(name, pixels[rows], drawn.magnitude[rows], drawn.vertical[rows])
            result.index_copy_(0, rows, part)
    return result


def random_erasing(
    pixels: Tensor,
    *,
    key: Key,
    index: Tensor,
    probability: float,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (0.3, 3.3),
    tries: int = 10,
) -> Tensor:
    r"""Blacken a random rectangle, as torchvision's `RandomErasing` with value 0.

    .. math:: h = \mathrm{round}\sqrt{A r}, \qquad w = \mathrm{round}\sqrt{A / r}, \qquad A \sim U[scale]\,H W, \qquad
        \log r \sim U[\log ratio]

    The first of the tries with h < H and w < W counts. An image without one stays whole.

    Args:
        pixels: A batch of images.
        key: What the draw is for, seed and epoch included.
        index: Position of each image in the data set.
        probability: Share of the images that lose a rectangle.
        scale: Range of the rectangle's area.
        ratio: Range of height over width.
        tries: Draws of area and ratio an image.

    Shapes:
        pixels: (B, H, W, C), any type; index: (B,). Returns the shape and type of `pixels`.
    Units:
        scale: shares of the image's area.
    Source: Zhong et al., AAAI 2020, arXiv:1708.04896.
    Differs from the reference: all tries are drawn at once, in single precision.

    Example:
        >>> ones = torch.ones(1, 8, 8, 1, dtype=torch.uint8)
        >>> erased = random_erasing(ones, key=Key(0), index=torch.tensor([2]), probability=1, scale=(0.25, 0.25))
        >>> 64 - int(erased.sum())  # 0.25 * 64 = 16, with whole sides
        15
    """
    _, height, width, channels = pixels.shape
    area = scale[0] + (scale[1] - scale[0]) * uniform(key.fold("area"), index, (tries,))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    proportion = torch.exp(low + (high - low) * uniform(key.fold("ratio"), index, (tries,)))
    tall = torch.round(torch.sqrt(area * (height * width) * proportion)).long()
    wide = torch.round(torch.sqrt(area * (height * width) / proportion)).long()
    accepted = (tall < height) & (wide < width)
    first = _column(accepted.int().argmax(dim=1))
    erased = accepted.any(dim=1) & (uniform(key.fold("erase"), index, ()) < probability)

    def span(name: str, sizes: Tensor, side: int) -> Tensor:
        """Which positions of one axis the rectangle covers, (B, side)."""
        size = sizes.gather(1, first)[:, 0]
        start = _column(_below(key.fold("place", name), index, (side + 1 - size).clamp(min=1)))
        place = torch.arange(side, device=pixels.device)
        return (place >= start) & (place < start + _column(size))

    rows, columns = span("y", tall, height) & _column(erased), span("x", wide, width)
    columns = columns.repeat_interleave(channels, dim=1)  # channels as columns: no broadcast along the fastest axis
    kept = ~(rows[:, :, None] & columns[:, None, :])
    return (pixels.flatten(2) * kept.to(pixels.dtype)).reshape(pixels.shape)


@dataclass(frozen=True, kw_only=True)
class IDBH:
    """Flip, CropShift, one colour or shape operation, and RandomErasing; replaces padding and cropping.

    CropShift's s is below 11 (svhn: 9) pixels of a 32-pixel image. For other sizes the bound is scaled by the smaller
    side: round(11 side / 32), at least 2.

    Args:
        strength: ``"weak"`` erases in half of the images, ``"strong"`` in all. ``"svhn"`` erases in all, up to half of
            the area instead of a third, and shears and rotates more often and farther.
        flip: Mirror half of the images. None lets `fit` follow its settings, by default what suits the data (a mirrored
            digit is another sign); called by itself it mirrors.

    Shapes:
        pixels: (B, H, W, C) uint8, C 1 or 3; index: (B,). A call returns the shape of `pixels`.
    Units:
        Pixels in 0 … 255.
    Raises:
        HoldfastError: an unknown strength, or pixels of another type or number of channels.
    Source: Li and Spratling, "Data Augmentation Alone Can Improve Adversarial Training", ICLR 2023, arXiv:2301.09879.
    Differs from the reference: it mirrors whatever the data; draws are keyed by image instead of taken in sequence; the
        scaling to other sizes. The operations are Pillow's to the byte.

    Example:
        >>> pixels = torch.full((2, 32, 32, 3), 100, dtype=torch.uint8)
        >>> both = IDBH(strength="weak")(pixels, key=Key(0), index=torch.tensor([4, 7]))
        >>> alone = IDBH(strength="weak")(pixels[1:], key=Key(0), index=torch.tensor([7]))
        >>> bool((both[1] == alone[0]).all())
        True
    """

    strength: Strength = "strong"
    flip: bool | None = None

    def __post_init__(self) -> None:
        allowed = ("weak", "strong", "svhn")
        if self.strength not in allowed:
            raise unknown_name("IDBH strength", self.strength, allowed)

    def __call__(self, pixels: Tensor, *, key: Key, index: Tensor) -> Tensor:
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[3] not in (1, 3):
            shape = tuple(pixels.shape)
            raise HoldfastError(f"IDBH got {pixels.dtype} {shape}: give uint8 pixels (B, H, W, C) with C 1 or 3")
        svhn = self.strength == "svhn"
        high = max(2, round((9 if svhn else 11) * min(pixels.shape[1:3]) / 32))
        pixels = flip_and_crop_shift(
            pixels, key=key.fold("crop shift"), index=index, high=high, flip=self.flip is not False
        )
        drawn = draw_colour_shape(key=key.fold("colour shape"), index=index, policy=SHAPE if svhn else COLOUR)
        pixels = apply_colour_shape(pixels, drawn)
        return random_erasing(
            pixels,
            key=key.fold("erasing"),
            index=index,
            probability=0.5 if self.strength == "weak" else 1.0,
            scale=(0.02, 0.5 if svhn else 0.33),
        )
