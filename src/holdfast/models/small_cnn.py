"""A small convolutional network for laptops and tests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.classifier import ImageClassifier, require_at_least
from holdfast.models.weight_init import initialize_convolutional


def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs), relu=nn.ReLU()))


class SmallCNN(ImageClassifier):
    """Five 3x3 convolutions, each with BatchNorm and ReLU, then a 4x4 grid of features and fc.

    layer1 to layer5 have `width` times 1, 2, 4, 4, 8 channels; layer3 and layer5 have stride 2, and layer1 too where
    the smaller side of `image_size` is above 16: nearly all the work is then done at a quarter of the pixels, where
    low-precision convolutions are efficient on a CPU. The grid keeps where things are, which small centred figures
    need; it is smaller than 4x4 for small images.

    Args:
        num_classes: K.
        channels: C.
        image_size: (H, W) of the images, at least 8 each; it sets the stride of layer1 and the grid.
        width: Channels of the first layer.
        mean: Per channel, in pixel scale; None for 0.
        std: Per channel, in pixel scale; None for 1.
    Shapes:
        x: (B, C, H, W), square or not; logits: (B, K) before softmax.
    Units:
        x in pixel scale [0, 1].
    Raises:
        HoldfastError: a side is below 8, another size is too small, or mean or std does not fit the channels.
    Source: this project.
    Differs from the reference: there is none.
    Example:
        >>> import torch
        >>> model = SmallCNN(10, channels=1, image_size=(8, 8)).eval()
        >>> model(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 3,
        image_size: tuple[int, int] = (32, 32),
        width: int = 32,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(num_classes, channels=channels, mean=mean, std=std)
        require_at_least(1, width=width)
        if min(image_size) < 8:
            raise HoldfastError(f"small_cnn needs images of at least 8x8, got {tuple(image_size)}: enlarge them")
        first = 2 if min(image_size) > 16 else 1
        self.layer1 = _layer(channels, width, stride=first)
        self.layer2 = _layer(width, 2 * width)
        self.layer3 = _layer(2 * width, 4 * width, stride=2)
        self.layer4 = _layer(4 * width, 4 * width)
        self.layer5 = _layer(4 * width, 8 * width, stride=2)
        self.grid = (min(4, -(-image_size[0] // (4 * first))), min(4, -(-image_size[1] // (4 * first))))
        self.fc = nn.Linear(8 * width * self.grid[0] * self.grid[1], num_classes)
        self.last_stage = ("layer4.bn", "layer5.bn")
        initialize_convolutional(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, C, H, W) in [0, 1]."""
        hidden = self.layer2(self.layer1(self.normalize(x)))
        hidden = self.layer5(self.layer4(self.layer3(hidden)))
        if hidden.shape[2:] != self.grid:
            hidden = F.adaptive_avg_pool2d(hidden, self.grid)
        return self.fc(hidden.flatten(1))
