"""The network that looks at an image and says how it should be attacked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from holdfast.keyed_random import Key, uniform
from holdfast.models.classifier import GlobalAveragePool, require_at_least
from holdfast.models.weight_init import initialize_convolutional


class _Block(nn.Module):
    """Two normalised 3x3 convolutions around which the input is added, then ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.GroupNorm(1, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(1, outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


class StrategyNetwork(nn.Module):
    r"""A small residual network with a softmax head for every setting of an attack.

    .. math:: p_h(\cdot \mid x) = \mathrm{softmax}(W_h\, g(x)), \qquad h = 1, …, H

    Three residual blocks with 1, 2 and 4 times `width` channels at strides 1, 2, 2, then the mean over all positions.
    Every channel of the image is read by the same filters, together with a plane that says which channel it is, and
    the mean of what they find goes on: so any number of channels and any size fit without being told. Normalisation is
    within an image: what is chosen for one depends neither on the rest of the batch nor on how it is split over
    processes, and there are no running statistics.

    Args:
        choices: How many values each head chooses from.
        width: Channels of the first block.

    Shapes:
        x: (B, C, H, W), any C, H, W; result: one (B, n) tensor of logits a head.
    Units:
        x in pixel scale [0, 1].
    Raises:
        HoldfastError: width is below 2.
    Source: Jia et al., CVPR 2022, arXiv:2203.06616.
    Differs from the reference: that is a ResNet-18 with BatchNorm, which trains under batch statistics and chooses
        under running ones; it has a fourth head for the kind of attack, of which there is only one.

    Example:
        >>> [tuple(logits.shape) for logits in StrategyNetwork((13, 12, 5), width=4)(torch.rand(2, 3, 9, 8))]
        [(2, 13), (2, 12), (2, 5)]
    """

    def __init__(self, choices: Sequence[int], *, width: int = 16) -> None:
        super().__init__()
        require_at_least(2, width=width)
        self.stem = nn.Sequential(nn.Conv2d(2, width, 3, padding=1, bias=False), nn.GroupNorm(1, width), nn.ReLU())
        self.trunk = nn.Sequential(
            _Block(width, width, 1),
            _Block(width, 2 * width, 2),
            _Block(2 * width, 4 * width, 2),
            GlobalAveragePool(),
            nn.Flatten(),
        )
        self.heads = nn.ModuleList(nn.Linear(4 * width, count) for count in choices)
        initialize_convolutional(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows, channels, height, width = x.shape
        weight: Tensor = self.stem[0].weight  # type: ignore[assignment]  # a convolution's
        pixels = x.to(weight.dtype).reshape(rows * channels, 1, height, width)
        place = torch.arange(channels, device=x.device, dtype=weight.dtype) / max(1, channels - 1)
        plane = place.repeat(rows).view(-1, 1, 1, 1).expand_as(pixels)
        found = self.stem(torch.cat([pixels, plane], 1))
        features = self.trunk(found.view(rows, channels, *found.shape[1:]).mean(1))
        return tuple(head(features) for head in self.heads)


def draw(logits: Sequence[Tensor], key: Key, index: Tensor) -> Tensor:
    """One choice a row and head, drawn by key from the softmax of the logits.

    Args:
        logits: Of every head.
        key: What the draw is for.
        index: Identity of every image; equal identities and logits draw the same.

    Shapes:
        logits: (B, n) each; index: (B,). Returns (B, H) int64.

    Example:
        >>> sure = torch.tensor([[0.0, 50.0, 0.0]])
        >>> draw([sure, -sure], Key(0), torch.tensor([4])).tolist()[0][0]
        1
    """
    points = uniform(key, index, (len(logits),), dtype=torch.float64)
    choices = []
    for point, head in zip(points.unbind(1), logits, strict=True):
        steps = head.detach().double().softmax(1).cumsum(1)
        found = (point[:, None] >= steps).sum(1)
        choices.append(found.clamp_max(head.shape[1] - 1))  # rounding may leave the sum below 1
    return torch.stack(choices, 1)


def log_probability(logits: Sequence[Tensor], chosen: Tensor) -> Tensor:
    """The logarithm of the probability of every row's choices together.

    Shapes:
        logits: (B, n) each; chosen: (B, H). Returns (B,).

    Example:
        >>> log_probability([torch.zeros(1, 2), torch.zeros(1, 4)], torch.tensor([[0, 3]])).exp().item()
        0.125
    """
    pairs = zip(logits, chosen.unbind(1), strict=True)
    return torch.stack([head.log_softmax(1).gather(1, one[:, None])[:, 0] for head, one in pairs]).sum(0)
