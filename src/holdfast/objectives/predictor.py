"""The predictor of asymmetric invariance: a small network between a moving side and its target."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import HoldfastError


class Predictor(nn.Sequential):
    r"""Two linear layers with a bottleneck, as in SimSiam.

    .. math:: h(z) = W_2\,\mathrm{relu}(\mathrm{bn}(W_1 z)) + b_2

    Args:
        features: D.
        ratio: Width of the bottleneck as a share of D, in (0, 1]; at least one unit is kept.

    Shapes:
        z: (B, D). Returns (B, D). B must be at least 2, because the BatchNorm uses the batch's statistics.
    Raises:
        HoldfastError: ratio lies outside (0, 1].
    Source: AR-AT, arXiv:2402.14648, section 4; Chen and He (SimSiam), arXiv:2011.10566. Layout of futakw/AR-AT.
    Differs from the reference: nothing known.

    Example:
        >>> Predictor(8, 0.25)(torch.zeros(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(self, features: int, ratio: float = 0.25) -> None:
        check_ratio(ratio)
        hidden = max(1, int(features * ratio))
        super().__init__(
            nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, features)
        )

    def forward(self, z: Tensor) -> Tensor:
        """h(z)."""
        if self.training and len(z) == 1:
            raise HoldfastError(
                "the predictor's BatchNorm needs two or more images a batch, and this one has one: choose another"
                " --batch-size, leave --training.drop_last true, or set --objective.predictor false"
            )
        return super().forward(z)


def check_ratio(ratio: float) -> None:
    """Refuse a bottleneck that is no share of the features."""
    if not 0 < ratio <= 1:
        raise HoldfastError(f"predictor_ratio is {ratio}: give a share of the features in (0, 1], for example 0.25")


def pooled_feature(output: Tensor, *, channels_last: bool = False) -> Tensor:
    """A tapped layer's output as one vector an image: ReLU, then the mean over positions or tokens.

    Args:
        output: What the layer returned.
        channels_last: Four dimensions are (B, H, W, D), as a LayerNorm within a convolutional network has them.
    Shapes:
        output: (B, D, H, W), (B, N, D) or (B, D). Returns (B, D), at least float32.
    """
    rectified = F.relu(output)
    if rectified.dtype in (torch.bfloat16, torch.float16):
        rectified = rectified.float()
    if rectified.dim() == 4 and channels_last:
        return rectified.mean((1, 2))
    if rectified.dim() == 4:  # avg_pool2d, because the gradient of mean is not laid out channels-last, and slow
        return F.avg_pool2d(rectified, (rectified.shape[2], rectified.shape[3])).flatten(1)
    if rectified.dim() == 3:
        return rectified.mean(1)
    if rectified.dim() == 2:
        return rectified
    raise HoldfastError(
        f"a tapped layer returns shape {tuple(output.shape)}: tap one of (B, D, H, W), (B, N, D), (B, D)"
    )


def is_channels_last(layer: nn.Module, output: Tensor) -> bool:
    """Whether a layer's output is (B, H, W, D): it normalises the last dimension, and that is not also the second."""
    shape = getattr(layer, "normalized_shape", None)
    return output.dim() == 4 and isinstance(shape, tuple) and len(shape) == 1 and output.shape[1] != shape[0]
