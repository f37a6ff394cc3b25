"""Batches from images that stay on the device as uint8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.data.augment import crop_and_flip
from holdfast.data.images import Images
from holdfast.forward import Batch
from holdfast.functional import smooth_labels
from holdfast.keyed_random import Key, permutation


def to_pixels(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (B, H, W, C) to [0, 1] as (B, C, H, W), laid out channels-last."""
    return pixels.permute(0, 3, 1, 2).to(dtype).div_(255)


class Augmentation(Protocol):
    """Changes a batch of images: uint8 (B, H, W, C) in and out, by keyed draws that go by the images' positions."""

    def __call__(self, pixels: Tensor, *, key: Key, index: Tensor) -> Tensor: ...


class Mixing(Protocol):
    """Mixes every image and its soft label with a partner's."""

    def mixed(
        self, x: Tensor, target: Tensor, partner_x: Tensor, partner_target: Tensor, *, key: Key
    ) -> tuple[Tensor, Tensor]: ...


@dataclass
class Passes:
    """One pass after the other over a set of images, each in a new order; any stretch of it can be asked for.

    Args:
        key: Of the orders.
        first: Position of the set's first image.
        count: Images of the set.
        stride: Distance between a draw's number and that of the same position one pass later.
        device: Where the draws are made.
    """

    key: Key
    first: int
    count: int
    stride: int
    device: torch.device
    _number: int = field(default=-1, init=False)
    _order: Tensor = field(init=False)

    def take(self, start: int, length: int) -> Tensor:
        """The draws start, …, start + length - 1, as pass * stride + position."""
        parts = [torch.empty(0, dtype=torch.int64, device=self.device)]
        while length > 0:
            number, at = divmod(start, self.count)
            if number != self._number:  # kept for the next batch, which mostly lies in the same pass
                self._order = permutation(self.key.fold(number), self.count, self.device)
                self._number = number
            part = self._order[at : at + length]
            parts.append(number * self.stride + self.first + part)
            start, length = start + len(part), length - len(part)
        return torch.cat(parts)


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Batches of one split, in an order and with an augmentation that depend on seed, epoch and image alone.

    With extra images, every batch has round(extra_share * batch_size) of them after the split's own. Own and extra
    images are then each drawn in passes that go on across epochs: the step's number decides what is drawn. An epoch
    is as many steps as without them, that is as many images of both kinds as the split has of its own (as RST counts
    them); all its batches are full.

    Args:
        images: The split, on its device.
        num_classes: K.
        batch_size: Images a step over all processes.
        seed: The run's seed.
        flip: Mirror half of the images.
        padding: Padding of the random crop; 0 for none.
        augmentation: In place of crop and flip, where given.
        mixing: Mixes every image with another of the batch, where given; `Batch.target` then holds the mixed labels.
        label_smoothing: s of `smooth_labels`; 0 leaves `Batch.target` empty.
        second_view: Also give a second augmentation, `Batch.x2`.
        extra: Extra images to mix in, on the same device; their positions, `Batch.index`, follow those of `images`.
        extra_share: Share of every batch that they take.
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
    augmentation: Augmentation | None = None
    mixing: Mixing | None = None
    label_smoothing: float = 0.0
    second_view: bool = False
    extra: Images | None = None
    extra_share: float = 0.0
    drop_last: bool = True
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        """Steps an epoch."""
        whole, rest = divmod(len(self.images), self.batch_size)
        return max(1, whole + (rest > 0 and not self.drop_last))

    @property
    def positions(self) -> int:
        """How many images there are, extra ones included: every position is less."""
        return len(self.images) + (0 if self.extra is None else len(self.extra))

    @property
    def extra_rows(self) -> int:
        """Extra images of a batch."""
        return 0 if self.extra is None else round(self.extra_share * self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches, from the given step of it on."""
        for step, rows in enumerate(self.draws(epoch, start), start):
            own = self.batch(rows[self.rank :: self.world], epoch)
            if self.mixing is not None:
                key = Key(self.seed).fold("mixing", epoch, step)
                partners = rows[permutation(key.fold("partners"), len(rows), rows.device)]
                own = self.mix(own, self.batch(partners[self.rank :: self.world], epoch), key)
            yield own

    def draws(self, epoch: int, start: int) -> Iterator[Tensor]:
        """What each batch draws, over all processes: positions, plus `positions` times the pass where there are any.

        So an image that is drawn twice in an epoch, in two passes, is augmented in two ways.
        """
        key, device = Key(self.seed).fold("order"), self.images.pixels.device
        if self.extra is None:
            order = permutation(Key(self.seed).fold("order", epoch), len(self.images), device)
            for step in range(start, len(self)):
                yield order[step * self.batch_size : (step + 1) * self.batch_size]
            return
        own = Passes(key.fold("own"), 0, len(self.images), self.positions, device)
        extra = Passes(key.fold("extra"), len(self.images), len(self.extra), self.positions, device)
        for step in range(epoch * len(self) + start, (epoch + 1) * len(self)):
            rows = self.batch_size - self.extra_rows
            parts = own.take(step * rows, rows), extra.take(step * self.extra_rows, self.extra_rows)
            yield torch.cat(parts)

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels and labels of the images at these positions."""
        if self.extra is None:
            return self.images.pixels[index], self.images.labels[index]
        count = len(self.images)
        own, extra = index.clamp_max(count - 1), (index - count).clamp_min(0)
        is_own = index < count  # both are looked up and one is taken: a mask's size would make an accelerator wait
        pixels = torch.where(is_own[:, None, None, None], self.images.pixels[own], self.extra.pixels[extra])
        return pixels, torch.where(is_own, self.images.labels[own], self.extra.labels[extra])

    def batch(self, drawn: Tensor, epoch: int) -> Batch:
        """The images of these draws, as they look in this epoch."""
        index = drawn % self.positions
        pixels, y = self.at(index)
        key = Key(self.seed).fold("augmentation", epoch)

        def augmented(view: int) -> Tensor:
            if self.augmentation is not None:
                changed = self.augmentation(pixels, key=key.fold(view), index=drawn)
            else:
                changed = crop_and_flip(pixels, key=key.fold(view), index=drawn, padding=self.padding, flip=self.flip)
            return to_pixels(changed, self.dtype)

        target = None
        if self.label_smoothing:
            target = smooth_labels(y, self.num_classes, self.label_smoothing, dtype=self.dtype)
        return Batch(augmented(0), y, target, index, augmented(1) if self.second_view else None)

    def mix(self, own: Batch, partner: Batch, key: Key) -> Batch:
        """The batch mixed row by row with its partner: images, second views and labels."""
        assert self.mixing is not None  # asked for by whoever calls this
        targets = [
            F.one_hot(batch.y, self.num_classes).to(self.dtype) if batch.target is None else batch.target
            for batch in (own, partner)
        ]
        x, target = self.mixing.mixed(own.x, targets[0], partner.x, targets[1], key=key)
        x2 = own.x2
        if own.x2 is not None and partner.x2 is not None:
            x2, _ = self.mixing.mixed(own.x2, targets[0], partner.x2, targets[1], key=key)
        share = target.gather(1, own.y[:, None]) >= target.gather(1, partner.y[:, None])
        return Batch(x, torch.where(share[:, 0], own.y, partner.y), target, own.index, x2, mixed=True)
