"""Images and Dataset: what every reader returns, checked once, when it is made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.errors import HoldfastError


@dataclass(frozen=True, eq=False)
class Images:
    """One split: images as bytes, channels last, and their labels.

    Args:
        pixels: The images; made contiguous if they are not.
        labels: One class number an image.
    Shapes:
        pixels: (N, H, W, C) uint8, C is 1 or 3; labels: (N,) int64.
    Units:
        pixels: 0 to 255. A model sees them divided by 255, in [0, 1].
    Raises:
        HoldfastError: A shape or dtype is not the stated one.
    Example:
        >>> import torch
        >>> images = Images(torch.zeros(4, 8, 8, 1, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
        >>> len(images), len(images.subset(torch.tensor([0, 2])))
        (4, 2)
    """

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        _check_pixels(self.pixels)
        _check_labels(self.labels, self.pixels)
        object.__setattr__(self, "pixels", self.pixels.contiguous())

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def to(self, device: torch.device | str) -> Images:
        """The same split with both tensors on ``device``."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def subset(self, index: Tensor) -> Images:
        """The images at the positions ``index`` (or where it is True), in that order."""
        index = index.to(self.pixels.device)
        return Images(self.pixels[index], self.labels[index])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split of the same kind of image, and what is known about them.

    Args:
        name: Short name for tables and run folders.
        train: Training images; every class occurs.
        test: Test images.
        classes: Class names; position is label.
        suggested_epsilon: L∞ radius customary for this data, or None where there is no custom: 0.2 for the digits,
            0.1 for IDX files (Fashion-MNIST; for MNIST itself 0.3 is customary), 8/255 for CIFAR and SVHN.
        flip: A horizontal flip leaves the class as it is.
        crop: Random crops with padding are customary; small centred figures (digits, IDX files) lose by them.
        notes: What the reader decided and the user should be told, one sentence each.
        source: What `load` was asked for, so that a run can load it again.
    Units:
        suggested_epsilon: pixel scale [0, 1].
    Raises:
        HoldfastError: A label outside the classes, a class without a training image, an empty split, fewer than two
            classes, or splits that differ in image shape.
    Example:
        >>> import torch
        >>> split = Images(torch.zeros(2, 4, 6, 3, dtype=torch.uint8), torch.tensor([0, 1]))
        >>> data = Dataset("toy", train=split, test=split, classes=("cat", "dog"))
        >>> data.image_size, data.channels, data.num_classes
        ((4, 6), 3, 2)
    """

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    suggested_epsilon: float | None = None
    flip: bool = False
    crop: bool = True
    notes: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise HoldfastError(f"{self.name}: {len(self.classes)} class found: a classifier needs at least two")
        if len(set(self.classes)) < len(self.classes):
            twice = next(name for name, count in Counter(self.classes).items() if count > 1)
            raise HoldfastError(f"{self.name}: class name {twice!r} occurs twice: give every class its own name")
        for split, images in (("training", self.train), ("test", self.test)):
            if len(images) == 0:
                raise HoldfastError(f"{self.name}: the {split} split holds no images: add some")
            _check_range(f"{self.name}: {split}", images.labels, len(self.classes))
        train_shape, test_shape = tuple(self.train.pixels.shape[1:]), tuple(self.test.pixels.shape[1:])
        if train_shape != test_shape:
            raise HoldfastError(
                f"{self.name}: training images are {train_shape} and test images {test_shape} (height, width, "
                "channels): make both splits the same"
            )
        counts = torch.bincount(self.train.labels, minlength=len(self.classes))
        if int(counts.min()) == 0:
            empty = int(counts.argmin())
            raise HoldfastError(
                f"{self.name}: class {self.classes[empty]!r} has no training image: add at least one, or drop the "
                f"class and number the labels from 0 without gaps (it is label {empty})"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.train.pixels.shape[1], self.train.pixels.shape[2]

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return self.train.pixels.shape[3]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)


MOST_CLASSES = 100_000
"""More names than these are refused: the largest public data sets have 22,000."""


def numbered_classes(train: Tensor, test: Tensor | None = None) -> tuple[str, ...]:
    """Class names "0", "1", … for labels that came without names.

    Raises:
        HoldfastError: The largest label leaves more classes than there are training images, so that some are empty.
    """
    splits = [labels for labels in (train, test) if labels is not None and labels.numel() > 0]
    count = max((int(labels.max()) for labels in splits), default=-1) + 1
    if count > train.numel():
        raise HoldfastError(
            f"the largest label is {count - 1} but there are only {train.numel()} training images: number the classes "
            "from 0 without gaps"
        )
    return tuple(str(label) for label in range(count))


def _check_pixels(pixels: Tensor) -> None:
    shape = tuple(pixels.shape)
    if pixels.dtype != torch.uint8:
        advice = "store (255 * pixels).round() as uint8" if pixels.is_floating_point() else "store 0 to 255 as uint8"
        raise HoldfastError(f"pixels are {_dtype_name(pixels)}, uint8 is expected: {advice}")
    if pixels.ndim != 4:
        raise HoldfastError(f"pixels have shape {shape}, (N, H, W, C) is expected: reshape them")
    if shape[3] not in (1, 3):
        advice = "use pixels.permute(0, 2, 3, 1)" if shape[1] in (1, 3) else "convert the images to grey or RGB"
        raise HoldfastError(f"pixels have shape {shape}, (N, H, W, C) with C 1 or 3 is expected: {advice}")
    if shape[1] == 0 or shape[2] == 0:
        raise HoldfastError(f"pixels have shape {shape}: height and width must be at least 1")


def _check_labels(labels: Tensor, pixels: Tensor) -> None:
    if labels.dtype != torch.int64:
        raise HoldfastError(f"labels are {_dtype_name(labels)}, int64 is expected: give class numbers as labels.long()")
    if labels.ndim != 1 or labels.shape[0] != pixels.shape[0]:
        raise HoldfastError(
            f"labels have shape {tuple(labels.shape)} for {pixels.shape[0]} images: give one class number an image"
        )
    if labels.device != pixels.device:
        raise HoldfastError(f"pixels are on {pixels.device} and labels on {labels.device}: put both on one device")


def _check_range(where: str, labels: Tensor, num_classes: int) -> None:
    bad = ((labels < 0) | (labels >= num_classes)).nonzero()
    if bad.numel() > 0:
        index = int(bad[0])
        raise HoldfastError(
            f"{where} label {int(labels[index])} at index {index} is outside 0 to {num_classes - 1}: number the "
            f"{num_classes} classes from 0"
        )


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
