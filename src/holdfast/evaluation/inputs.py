"""What is evaluated: images and labels, from tensors, from a split of a data set, or from a loader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.data.images import Images
from holdfast.errors import HoldfastError
from holdfast.keyed_random import Key, permutation


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Images and labels in the order of the ledger.

    Attributes:
        x: (N, C, H, W) floats in [0, 1], or uint8 where they came so.
        y: (N,) labels.
        index: (N,) positions in the data set.
        device: Where the network is.
        whole: All images and labels, of which these may be some: what the data is known by.
        classes: Names, or None.
        model_name: For people.
        data_name: For people.
        about: How the network was trained, where that is known; for people.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    device: torch.device
    whole: tuple[Tensor, Tensor]
    classes: tuple[str, ...] | None = None
    model_name: str = "model"
    data_name: str = "images"
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The classes' names, or their numbers."""
        return self.classes or tuple(str(number) for number in range(int(self.y.max()) + 1))

    def called(self, model: str, data: str, classes: tuple[str, ...], about: Mapping[str, Any] | None = None) -> Inputs:
        """The same images under the names by which people know them."""
        return replace(self, model_name=model, data_name=data, classes=classes, about=about or {})

    def part(self, rows: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of some images as float32 in [0, 1], their labels and positions, on the device."""
        x = self.x[rows].to(self.device)
        pixels = x.to(torch.float32) / 255 if x.dtype == torch.uint8 else x.to(torch.float32, copy=True)
        return pixels.contiguous(), self.y[rows].to(self.device), self.index[rows].to(self.device)


def as_inputs(model: nn.Module, images: Any, labels: Tensor | None = None) -> Inputs:
    """Images and labels in one of the accepted forms; see `holdfast.evaluation.robustness.evaluate`.

    Raises:
        HoldfastError: they are in no such form, or do not fit each other.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(images, Images):
        x, y = images.pixels.permute(0, 3, 1, 2), images.labels
    elif isinstance(images, (Tensor, np.ndarray)):
        if labels is None:
            raise HoldfastError("labels are missing: give them after the images, evaluate(model, x, y, …)")
        x, y = torch.as_tensor(images), _labels(labels)
    elif labels is not None:
        raise HoldfastError("labels were given beside a loader, which has its own: leave them out")
    elif isinstance(images, Iterable):
        x, y = _collected(images)
    else:
        raise HoldfastError(f"images are a {type(images).__name__}: give a tensor, or a loader of images and labels")
    _check(x, y)
    return Inputs(x=x, y=y, index=torch.arange(len(y)), device=device, whole=(x, y))


def _collected(loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """All batches of a loader."""
    images, labels = [], []
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise HoldfastError("the loader must yield pairs of images and labels")
        try:
            images.append(torch.as_tensor(batch[0]))
        except (TypeError, ValueError, RuntimeError):
            raise HoldfastError("the loader's images are no tensors: let it yield pairs of tensors") from None
        labels.append(_labels(batch[1]).reshape(-1))
    if not images:
        raise HoldfastError("the loader yields nothing: give at least one image")
    if len({part.shape[1:] for part in images}) > 1:
        raise HoldfastError("the loader's images differ in shape: resize them to one")
    return torch.cat(images), torch.cat(labels)


def _labels(labels: Any) -> Tensor:
    """Labels of any kind of whole number as int64; others as they are, to be refused."""
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise HoldfastError("the labels are no numbers: give class numbers from 0") from None
    return found if found.is_floating_point() or found.dtype == torch.bool else found.long()


def _check(x: Tensor, y: Tensor) -> None:
    """Refuse what cannot be images and labels."""
    if x.dim() != 4:
        raise HoldfastError(f"images have shape {tuple(x.shape)}: give (N, C, H, W)")
    if len(x) == 0:
        raise HoldfastError("there are no images: give at least one")
    if y.dim() != 1 or len(y) != len(x):
        raise HoldfastError(f"labels have shape {tuple(y.shape)} for {len(x)} images: give one class number an image")
    if y.is_floating_point() or y.dtype == torch.bool:
        raise HoldfastError(f"labels are {y.dtype}: give class numbers as labels.long()")
    if int(y.min()) < 0:
        raise HoldfastError(f"label {int(y.min())} is negative: count classes from 0")
    if not (x.is_floating_point() or x.dtype == torch.uint8):
        raise HoldfastError(f"images are {x.dtype}: give floats in [0, 1], or uint8")
    if x.is_floating_point():
        low, high = float(x.min()), float(x.max())
        if not (low >= 0 and high <= 1):
            advice = "divide by 255" if high > 1 and low >= 0 else "normalisation belongs inside the model"
            raise HoldfastError(f"pixels lie in [{low:g}, {high:g}] instead of [0, 1]: {advice}")


def chosen(inputs: Inputs, n: int | None) -> Inputs:
    """n images drawn without replacement, the same for every model; all of them where n is None.

    Raises:
        HoldfastError: n is below 1.
    """
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise HoldfastError(f"n is {n!r}: give a whole number of at least 1, or None for all images")
    if n is None or n >= len(inputs.y):
        return inputs
    rows = permutation(Key(0).fold("evaluated images"), len(inputs.y), inputs.y.device)[:n].sort().values
    return replace(inputs, x=inputs.x[rows.to(inputs.x.device)], y=inputs.y[rows], index=inputs.index[rows.cpu()])


def check_logits(logits: Tensor, y: Tensor, images: int) -> None:
    """Refuse outputs that are no logits of so many images and of the labels' classes.

    Raises:
        HoldfastError: NaN or infinite outputs, or a label that the model has no output for.
    """
    if len(logits) != images:
        raise HoldfastError(f"the model returned {len(logits)} rows for {images} images: return one row an image")
    if not bool(torch.isfinite(logits).all()):
        raise HoldfastError("the model's logits are NaN or infinite on the first images: check its weights")
    if logits.shape[1] < 2:
        raise HoldfastError("the model returns one output: a classifier needs at least two logits")
    if int(y.max()) >= logits.shape[1]:
        raise HoldfastError(
            f"label {int(y.max())} occurs but the model returns {logits.shape[1]} logits: give the data it was made for"
        )
