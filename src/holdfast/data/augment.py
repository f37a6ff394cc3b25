"""Random crop and flip of a whole batch at once, on the device that holds it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.keyed_random import Key, integers


def default_padding(height: int, width: int) -> int:
    """Padding of the random crop: an eighth of the smaller side, which is 4 pixels at 32.

    Example:
        >>> default_padding(32, 32), default_padding(28, 28), default_padding(8, 8)
        (4, 4, 1)
    """
    return max(1, round(min(height, width) / 8 + 1e-6))


def crop_and_flip(pixels: Tensor, *, key: Key, index: Tensor, padding: int, flip: bool) -> Tensor:
    """Pad with zeros, cut the original size out at a random place, and mirror half of the images.

    One gather does all three.

    Args:
        pixels: A batch of images.
        key: What the draw is for, seed and epoch included.
        index: Position of each image in the data set.
        padding: Pixels on every side; 0 for no crop.
        flip: Mirror left and right with probability one half.

    Shapes:
        pixels: (B, H, W, C), any type; index: (B,). Returns the shape and type of `pixels`.
    """
    if not padding and not flip:
        return pixels
    count, height, width, _ = pixels.shape
    if padding:
        pixels = F.pad(pixels, (0, 0, padding, padding, padding, padding))
    columns = torch.arange(width, device=pixels.device).expand(count, width)
    rows = torch.arange(height, device=pixels.device).expand(count, height)
    if flip:
        mirrored = integers(key.fold("flip"), index, 2).bool()
        columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    if padding:
        columns = columns + integers(key.fold("crop x"), index, 2 * padding + 1)[:, None]
        rows = rows + integers(key.fold("crop y"), index, 2 * padding + 1)[:, None]
    image = torch.arange(count, device=pixels.device)
    return pixels[image[:, None, None], rows[:, :, None], columns[:, None, :]]
