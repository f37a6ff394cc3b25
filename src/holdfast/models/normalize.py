"""Input normalisation as the first layer of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError


class Normalize(nn.Module):
    r"""Subtract a mean and divide by a standard deviation, per channel, inside the network.

    .. math:: x \mapsto (x - \mathrm{mean}) / \mathrm{std}

    A network that normalises inside keeps epsilon, the step size and the valid range in pixel scale, so no attack has
    to know the dataset's statistics. The two statistics are persistent buffers: a checkpoint carries them, the
    optimiser and weight decay do not see them, and they follow `.to(...)`.

    Args:
        mean: One number per channel.
        std: One positive number per channel.
    Shapes:
        x: (B, C, H, W) with C = len(mean); result: the same. Buffers mean, std: (1, C, 1, 1) float32.
    Units:
        x, mean and std in pixel scale [0, 1].
    Raises:
        HoldfastError: the lengths differ or are zero, a number is not finite, a std is not positive, or x has another
            number of channels (which broadcasting would otherwise hide for grey images).
    Source: the usual standardisation of inputs; no paper.
    Differs from the reference: nothing known.
    Example:
        >>> layer = Normalize(mean=(0.5,), std=(0.25,))
        >>> layer(torch.ones(1, 1, 1, 2)).flatten().tolist()
        [2.0, 2.0]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        means, stds = [float(value) for value in mean], [float(value) for value in std]
        if not means or len(means) != len(stds):
            raise HoldfastError(
                f"mean has {len(means)} numbers and std has {len(stds)}: give one number per channel to each"
            )
        if not all(math.isfinite(value) for value in means + stds):
            raise HoldfastError(f"mean {means} and std {stds} must be finite: compute them from the training images")
        if min(stds) <= 0:
            raise HoldfastError(f"std {stds} must be above 0 in every channel: use 1 for a constant channel")
        self.register_buffer("mean", torch.tensor(means, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(stds, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised images, (B, C, H, W)."""
        channels = self.mean.shape[1]
        if x.ndim != 4 or x.shape[1] != channels:
            raise HoldfastError(
                f"the network takes images of shape (B, {channels}, H, W), got {tuple(x.shape)}: "
                f"build it with the channels of the data"
            )
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """Show the statistics in `print(model)`; without values where there are none (meta device)."""
        if self.mean.is_meta:
            return f"channels={self.mean.shape[1]}"
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def normalization(channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalize:
    """Return the `Normalize` layer of a network with `channels` input channels; None means no change.

    Args:
        channels: Input channels of the network.
        mean: One number per channel, or None for 0.
        std: One positive number per channel, or None for 1.
    Raises:
        HoldfastError: a given sequence does not have `channels` numbers; see also `Normalize`.
    Example:
        >>> normalization(2, None, None)
        Normalize(mean=[0.0, 0.0], std=[1.0, 1.0])
    """
    mean = [0.0] * channels if mean is None else mean
    std = [1.0] * channels if std is None else std
    for label, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise HoldfastError(f"{label} has {len(values)} numbers for {channels} channels: give one per channel")
    return Normalize(mean, std)
