"""ResNet-18 for small images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from holdfast.models.classifier import GlobalAveragePool, ImageClassifier, require_at_least
from holdfast.models.weight_init import initialize_convolutional


class BasicBlock(nn.Module):
    r"""Two 3x3 convolutions with a residual connection; BatchNorm after each convolution.

    .. math:: y = \mathrm{relu}\big(\mathrm{bn}_2(\mathrm{conv}_2(\mathrm{relu}(\mathrm{bn}_1(\mathrm{conv}_1(x)))))
              + s(x)\big)

    where s is the identity, or a 1x1 convolution and BatchNorm when the shapes differ.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        stride: Of the first convolution and of the shortcut.
    Shapes:
        x: (B, inputs, H, W); result: (B, outputs, ceil(H / stride), ceil(W / stride)).
    Source: He et al., CVPR 2016, arXiv:1512.03385, section 3.3, shortcut option B.
    Differs from the reference: nothing known.
    Example:
        >>> import torch
        >>> BasicBlock(4, 8, stride=2)(torch.zeros(1, 4, 7, 8)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (B, outputs, H', W')."""
        hidden = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(hidden)) + self.shortcut(x))


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(inputs, outputs, stride=stride), BasicBlock(outputs, outputs))


class ResNet18(ImageClassifier):
    """ResNet-18 with the 3x3 stem usual for small images.

    Stem conv1, bn1, relu; four stages layer1 to layer4 of two `BasicBlock` each, with `width` times 1, 2, 4, 8
    channels and strides 1, 2, 2, 2; global average pooling; fc. 11,173,962 parameters for 3 channels and 10 classes.

    Args:
        num_classes: K.
        channels: C.
        width: Channels of the stem and the first stage; the literature's network has 64.
        mean: Per channel, in pixel scale; None for 0.
        std: Per channel, in pixel scale; None for 1.
    Shapes:
        x: (B, C, H, W), any H and W; logits: (B, K) before softmax.
    Units:
        x in pixel scale [0, 1].
    Raises:
        HoldfastError: a size is too small, or mean or std does not fit the channels.
    Source: He et al., CVPR 2016, arXiv:1512.03385, table 1 (18 layers).
    Differs from the reference: a 3x3 stem of stride 1 and no max pooling, as the robustness literature has it for
        CIFAR; pooling is global, so that other image sizes work.
    Example:
        >>> import torch
        >>> model = ResNet18(10, channels=1, width=8).eval()
        >>> model(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 3,
        width: int = 64,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(num_classes, channels=channels, mean=mean, std=std)
        require_at_least(1, width=width)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        self.avgpool = GlobalAveragePool()
        self.fc = nn.Linear(8 * width, num_classes)
        self.last_stage = tuple(f"layer4.{block}.{norm}" for block in (0, 1) for norm in ("bn1", "bn2"))
        initialize_convolutional(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, C, H, W) in [0, 1]."""
        hidden = self.relu(self.bn1(self.conv1(self.normalize(x))))
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        return self.fc(self.avgpool(hidden).flatten(1))
