"""Pre-activation ResNet-18 for small images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from holdfast.models.classifier import GlobalAveragePool, ImageClassifier, require_at_least
from holdfast.models.weight_init import initialize_convolutional


class PreActBlock(nn.Module):
    r"""Two 3x3 convolutions, each after its BatchNorm and ReLU, with a residual connection.

    .. math:: h = \mathrm{relu}(\mathrm{bn}_1(x)), \qquad
              y = \mathrm{conv}_2(\mathrm{relu}(\mathrm{bn}_2(\mathrm{conv}_1(h)))) + s

    where s = x, or a 1x1 convolution of h when the shapes differ.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        stride: Of the first convolution and of the shortcut.
    Shapes:
        x: (B, inputs, H, W); result: (B, outputs, ceil(H / stride), ceil(W / stride)).
    Source: He et al., ECCV 2016, arXiv:1603.05027, figure 4(e).
    Differs from the reference: nothing known.
    Example:
        >>> import torch
        >>> PreActBlock(4, 8, stride=2)(torch.zeros(1, 4, 8, 8)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (B, outputs, H', W')."""
        activated = self.relu1(self.bn1(x))
        # A projection sees the activated input, an identity the raw one.
        skip = x if self.shortcut is None else self.shortcut(activated)
        return self.conv2(self.relu2(self.bn2(self.conv1(activated)))) + skip


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(PreActBlock(inputs, outputs, stride=stride), PreActBlock(outputs, outputs))


class PreActResNet18(ImageClassifier):
    """Pre-activation ResNet-18 with a 3x3 stem and a final BatchNorm and ReLU before pooling.

    Stem conv1 alone; four stages layer1 to layer4 of two `PreActBlock` each, with `width` times 1, 2, 4, 8 channels
    and strides 1, 2, 2, 2; bn, relu; global average pooling; fc. 11,172,170 parameters for 3 channels, 10 classes.

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
    Source: He et al., ECCV 2016, arXiv:1603.05027, with the 18 layers of arXiv:1512.03385, table 1.
    Differs from the reference: a 3x3 stem of stride 1 and no max pooling. Some CIFAR versions in use lack the final
        BatchNorm (11,171,146 parameters); the paper has it.
    Example:
        >>> import torch
        >>> model = PreActResNet18(10, width=8).eval()
        >>> model(torch.rand(2, 3, 32, 32)).shape
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
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        self.bn = nn.BatchNorm2d(8 * width)
        self.relu = nn.ReLU()
        self.avgpool = GlobalAveragePool()
        self.fc = nn.Linear(8 * width, num_classes)
        taps = tuple(f"layer4.{block}.{relu}" for block in (0, 1) for relu in ("relu1", "relu2"))
        self.last_stage = (*taps, "avgpool")
        initialize_convolutional(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, C, H, W) in [0, 1]."""
        hidden = self.conv1(self.normalize(x))
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        hidden = self.relu(self.bn(hidden))
        return self.fc(self.avgpool(hidden).flatten(1))
