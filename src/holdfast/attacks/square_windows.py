"""The windows of the Square attack: where they lie, how large they are, and what shape is put into them."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from holdfast.keyed_random import Key, bits, uniform

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def signs(key: Key, identity: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random signs, (R, count)."""
    return (((bits(key, identity, count) >> 40) & 1) * 2 - 1).to(dtype)


@cache
def window_sides(
    queries: int, first_share: float, height: int, width: int, *, odd: bool, device: torch.device | str = "cpu"
) -> Tensor:
    """The side of the window at every query, (queries,).

    The share of the image falls by halves after 10, 50, 200, … queries. Windows of L2 and L1 have an odd side of at
    least 3; none is larger than the image.

    Example:
        >>> window_sides(5000, 0.8, 32, 32, odd=False)[[0, 11, 4999]].tolist()
        [29, 20, 3]
    """
    sides = []
    for query in range(queries):
        share = first_share / 2 ** sum(query > after for after in HALVINGS)
        side = max(round(math.sqrt(share * height * width)), 3 if odd else 1)
        side += odd and side % 2 == 0
        sides.append(min(side, height, width))
    return torch.tensor(sides, device=device)


def corners(key: Key, identity: Tensor, side: Tensor, x: Tensor) -> Tensor:
    """The window of every row as a mask, (R, 1, H, W). Its corner is uniform over [0, H - s) x [0, W - s)."""
    height, width = x.shape[2:]
    draw = uniform(key, identity, (2,))
    top, left = ((size - side) * draw[:, axis] for axis, size in ((0, height), (1, width)))
    rows = torch.arange(height, device=x.device) - top.long()[:, None]
    columns = torch.arange(width, device=x.device) - left.long()[:, None]
    inside = ((rows >= 0) & (rows < side[:, None]))[:, :, None] & ((columns >= 0) & (columns < side[:, None]))[:, None]
    return inside[:, None]


@cache
def bump(height: int, width: int, power: int = 2) -> Tensor:
    """A pyramid of rectangles, each worth 1 / (ring + 1)², of length 1 in L2, (height, width).

    With ``power=1`` for L1: each worth 1 / (ring + 1)⁴, of length 1 in L1.
    """

    def worth(ring: int) -> float:
        return 1 / (ring + 1) ** (2 if power == 2 else 4)

    shape = torch.zeros(height, width)
    top, left = height // 2, width // 2
    for ring in range(max(height // 2 + 1, width // 2 + 1)):
        size = 2 * ring + 1
        shape[max(top, 0) : min(top + size, height), max(left, 0) : min(left + size, width)] += worth(ring)
        top, left = top - 1, left - 1
    return shape / shape.norm(p=power)


@cache
def two_bumps(side: int, power: int = 2) -> Tensor:
    """Two bumps of opposite sign, one above the other, of length 1 together, (side, side)."""
    if side < 2:
        return torch.ones(side, side)
    upper = side // 2
    shape = torch.cat([bump(upper, side, power), -bump(side - upper, side, power)])
    return shape / shape.norm(p=power)


def bumps(key: Key, identity: Tensor, side: Tensor, window: Tensor, power: int = 2) -> Tensor:
    """Two bumps in every row's window, upright or lying at random, (R, 1, H, W)."""
    placed = torch.zeros(window.shape, device=window.device)
    upright = uniform(key, identity, (1,))[:, 0] <= 0.5
    for length in side.unique().tolist():
        for standing in (True, False):
            rows = ((side == length) & (upright == standing)).nonzero()[:, 0]
            if len(rows):
                shape = two_bumps(length, power).to(window.device)
                shape = shape if standing else shape.T
                part = torch.zeros(len(rows), *window.shape[1:], device=window.device)
                part[window[rows]] = shape.flatten().repeat(len(rows))
                placed[rows] = part
    return placed


def tiles(key: Key, identity: Tensor, x: Tensor, power: int = 2) -> Tensor:
    """The start of L2 and L1: a grid of two bumps each, with random signs, (R, C, H, W)."""
    _, channels, height, width = x.shape
    side = max(height // 5, 1)
    first = max((height - side * 5) // 2, 0)
    delta = torch.zeros_like(x)
    for row in range(height // side):
        for place in range(width // side):
            top, left = first + row * side, first + place * side
            part = key.fold("tile", row, place)
            shape = two_bumps(side, power).to(x.device)
            standing = (uniform(part, identity, (1,)) <= 0.5).view(-1, 1, 1)
            shapes = torch.where(standing, shape, shape.T)[:, None]
            shapes = shapes * signs(part.fold("sign"), identity, channels)[..., None, None]
            room = delta[:, :, top : top + side, left : left + side]
            room += shapes[:, :, : room.shape[2], : room.shape[3]]
    return delta
