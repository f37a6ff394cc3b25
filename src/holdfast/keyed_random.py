"""Randomness by key instead of by sequence.

Every random number is a hash of (seed, purpose, epoch, image index, element). So it does not depend on the batch an
image fell into, on the number of processes, on the device, or on what was drawn before: a batch split over processes
and a run that was killed and resumed draw the same numbers. Torch's global generator is never touched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_WEYL = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: consecutive integers land far apart
_ROUND_1 = 0xBF58476D1CE4E5B9  # the two multipliers of the splitmix64 finaliser (Steele et al., OOPSLA 2014)
_ROUND_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The same 64 bits, read as torch's signed integer."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix_int(value: int) -> int:
    value &= _MASK64
    value = ((value ^ (value >> 30)) * _ROUND_1) & _MASK64
    value = ((value ^ (value >> 27)) * _ROUND_2) & _MASK64
    return value ^ (value >> 31)


def _mix(value: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64, in place. Torch's shift keeps the sign, so the high bits are masked."""
    shifted = torch.empty_like(value)
    for shift, factor in ((30, _ROUND_1), (27, _ROUND_2), (31, None)):
        torch.bitwise_right_shift(value, shift, out=shifted)
        shifted &= (1 << (64 - shift)) - 1
        value ^= shifted
        if factor is not None:
            value *= _signed(factor)
    return value


@dataclass(frozen=True)
class Key:
    """A 64-bit key from which any number of independent keys and draws can be derived.

    Example:
        >>> Key(0).fold("start", 3) == Key(0).fold("start", 3)
        True
        >>> Key(0).fold("start", 3) == Key(0).fold("crop", 3)
        False
    """

    value: int

    def fold(self, *parts: int | str) -> Key:
        """A key that depends on this one and on every part, in order."""
        value = self.value & _MASK64
        for part in parts:
            if isinstance(part, str):
                part = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
            value = _mix_int(value + _WEYL) ^ _mix_int(part * _WEYL + 1)
            value = _mix_int(value + _WEYL)
        return Key(value)

    @property
    def torch_seed(self) -> int:
        """A seed for a torch generator."""
        return self.value & ((1 << 63) - 1)


def bits(key: Key, index: Tensor, elements: int) -> Tensor:
    """64 hashed bits for every (row, element).

    Args:
        key: What the draw is for.
        index: (B,) integer identity of each row, usually the position of the image in the data set.
        elements: Number of draws a row.

    Shapes:
        Returns (B, elements) int64.
    """
    rows = index.to(torch.int64) * _signed(_WEYL) + _signed(key.value)
    rows = _mix(rows).unsqueeze(1)
    columns = torch.arange(1, elements + 1, device=index.device, dtype=torch.int64) * _signed(_WEYL)
    return _mix(rows + columns)


def uniform(key: Key, index: Tensor, shape: Sequence[int], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws from U[0, 1), with 24 random bits, equal in every floating-point type that holds them.

    Shapes:
        index: (B,). Returns (B, *shape).

    Example:
        >>> a = uniform(Key(1), torch.tensor([4, 7]), (3,))
        >>> b = uniform(Key(1), torch.tensor([7]), (3,))
        >>> bool((a[1] == b[0]).all())
        True
    """
    elements = math.prod(shape)
    numbers = (bits(key, index, elements) >> 40) & ((1 << 24) - 1)
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    return (numbers.to(wide) * (1.0 / (1 << 24))).to(dtype).reshape(len(index), *shape)


def normal(key: Key, index: Tensor, shape: Sequence[int], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal draws by the Box-Muller transform. Equal on every device up to its rounding of log and cos.

    Shapes:
        index: (B,). Returns (B, *shape).
    """
    radius = uniform(key.fold("radius"), index, shape, dtype=dtype)
    angle = uniform(key.fold("angle"), index, shape, dtype=dtype)
    return torch.sqrt(-2 * torch.log1p(-radius)) * torch.cos(2 * math.pi * angle)


def integers(key: Key, index: Tensor, high: int) -> Tensor:
    """One integer in [0, high) for every row; the bias is below high / 2^24.

    Shapes:
        index: (B,). Returns (B,) int64.
    """
    return (((bits(key, index, 1)[:, 0] >> 40) & ((1 << 24) - 1)) * high) >> 24


def permutation(key: Key, count: int, device: torch.device | str = "cpu") -> Tensor:
    """A random order of 0 … count - 1.

    Shapes:
        Returns (count,) int64.
    """
    index = torch.arange(count, device=device, dtype=torch.int64)
    return torch.argsort(bits(key, index, 1)[:, 0], stable=True)
