"""Batches from images that stay on the device as uint8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.data.augment import crop_and_flip
from holdfast.data.images import Images
from holdfast.forward import Batch
from holdfast.functional import smooth_labels
from holdfast.keyed_random import Key, permutation


def to_pixels(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (B, H, W, C) to [0, 1] as (B, C, H, W), laid out channels-last."""
    return pixels.permute(0, 3, 1, 2).to(dtype).div_(255)


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Batches of one split, in an order and with an augmentation that depend on seed, epoch and image alone.

    Args:
        images: The split, on its device.
        num_classes: K.
        batch_size: Images a step over all processes.
        seed: The run's seed.
        flip: Mirror half of the images.
        padding: Padding of the random crop; 0 for none.
        label_smoothing: s of `smooth_labels`; 0 leaves `Batch.target` empty.
        second_view: Also give a second augmentation, `Batch.x2`.
        drop_last: Leave out the images that do not fill a batch (others in every epoch).
        dtype: Type of the pixels given out.
        rank: This process gets rows rank, rank + world, … of every batch.
        world: How many processes share a batch.
    """

    images: Images
    num_classes: int
    batch_size: int = 128
    seed: int = 0
    flip: bool = False
    padding: int = 0
    label_smoothing: float = 0.0
    second_view: bool = False
    drop_last: bool = True
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        """Steps an epoch."""
        whole, rest = divmod(len(self.images), self.batch_size)
        return max(1, whole + (rest > 0 and not self.drop_last))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches, from the given step of it on."""
        order = permutation(Key(self.seed).fold("order", epoch), len(self.images), self.images.pixels.device)
        for step in range(start, len(self)):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield self.batch(rows[self.rank :: self.world], epoch)

    def batch(self, index: Tensor, epoch: int) -> Batch:
        """The images at these positions, as they look in this epoch."""
        pixels, y = self.images.pixels[index], self.images.labels[index]
        key = Key(self.seed).fold("augmentation", epoch)

        def augmented(view: int) -> Tensor:
            drawn = crop_and_flip(pixels, key=key.fold(view), index=index, padding=self.padding, flip=self.flip)
            return to_pixels(drawn, self.dtype)

        target = None
        if self.label_smoothing:
            target = smooth_labels(y, self.num_classes, self.label_smoothing, dtype=self.dtype)
        return Batch(augmented(0), y, target, index, augmented(1) if self.second_view else None)
