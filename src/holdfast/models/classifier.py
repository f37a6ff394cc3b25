"""What every network here has: checked sizes, and normalisation as its first child."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.normalize import normalization


def require_at_least(minimum: int, **values: int) -> None:
    """Refuse whole-number arguments below `minimum`.

    Args:
        minimum: The smallest accepted value.
        values: The arguments by their name.
    Raises:
        HoldfastError: one of them is not a whole number or is too small; the message names it.
    Example:
        >>> require_at_least(1, width=32)
        >>> require_at_least(1, width=0)
        Traceback (most recent call last):
            ...
        holdfast.errors.HoldfastError: width must be a whole number of at least 1, got 0
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise HoldfastError(f"{name} must be a whole number of at least {minimum}, got {value!r}")


class GlobalAveragePool(nn.Module):
    """Mean over all positions, keeping them as 1x1.

    The same numbers as `nn.AdaptiveAvgPool2d(1)`. That one's gradient comes out NCHW, after which the elementwise
    gradients of a channels-last network run unvectorised; measured on two cores, a ReLU and this pooling together take
    a third to a half of the time.

    Shapes:
        x: (B, C, H, W). Returns (B, C, 1, 1).
    Example:
        >>> import torch
        >>> GlobalAveragePool()(torch.ones(2, 3, 4, 5)).shape
        torch.Size([2, 3, 1, 1])
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, (x.shape[-2], x.shape[-1]))


class ImageClassifier(nn.Module):
    """Base of the networks: pixels in [0, 1] in, logits out, `normalize` as the first child.

    Args:
        num_classes: K, at least 2.
        channels: C of the images, at least 1.
        mean: Per channel, in pixel scale; None for 0.
        std: Per channel, in pixel scale; None for 1.
    Shapes:
        forward of a subclass: x (B, C, H, W) -> logits (B, K), before softmax.
    Units:
        x in pixel scale [0, 1].
    Raises:
        HoldfastError: a size is too small, or mean or std does not fit the channels.
    Example:
        >>> [name for name, _ in ImageClassifier(10, channels=1).named_children()]
        ['normalize']
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        require_at_least(2, num_classes=num_classes)
        require_at_least(1, channels=channels)
        self.num_classes = num_classes
        self.channels = channels
        self.normalize = normalization(channels, mean, std)
