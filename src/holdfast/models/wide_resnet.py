"""Wide residual networks (WRN-28-10, WRN-32-10, WRN-34-10)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.classifier import GlobalAveragePool, ImageClassifier, require_at_least
from holdfast.models.weight_init import initialize_convolutional


def blocks_per_group(depth: int) -> int:
    """Return n, the residual blocks in each of the three groups of a wide ResNet.

    Two counts are in use and they name the same networks. Zagoruyko and Komodakis count the 6n + 1 convolutions of
    3x3 and the three shortcut convolutions: depth = 6n + 4 (28, 34). Madry et al., whose "WRN-32-10" FAT, GAIRAT, SEAT
    and PIAT report, count 6n + 1 convolutions and the linear layer: depth = 6n + 2. So 32 and 34 both mean n = 5.

    Args:
        depth: 6n + 4 or 6n + 2 with n >= 1.
    Raises:
        HoldfastError: the depth is neither.
    Source: Zagoruyko and Komodakis, BMVC 2016, arXiv:1605.07146; Madry et al., ICLR 2018, arXiv:1706.06083.
    Example:
        >>> [blocks_per_group(depth) for depth in (28, 32, 34)]
        [4, 5, 5]
    """
    require_at_least(1, depth=depth)
    for fixed in (4, 2):
        if depth > fixed and (depth - fixed) % 6 == 0:
            return (depth - fixed) // 6
    raise HoldfastError(f"depth {depth} is no wide ResNet: use 6n + 4 (such as 28 or 34) or 6n + 2 (such as 32)")


class WideBlock(nn.Module):
    r"""The wide network's residual block: BatchNorm, ReLU, 3x3 convolution, twice, with optional dropout between.

    .. math:: h = \mathrm{relu}_1(\mathrm{bn}_1(x)), \qquad
              y = \mathrm{conv}_2(\mathrm{dropout}(\mathrm{relu}_2(\mathrm{bn}_2(\mathrm{conv}_1(h))))) + s

    where s = x, or a 1x1 convolution of h when the number of channels changes. The ReLUs are modules of their own and
    do not work in place, so that their outputs can be tapped.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        stride: Of the first convolution and of the shortcut; above 1 only with inputs != outputs.
        dropout: Probability of dropping an activation between the convolutions.
    Shapes:
        x: (B, inputs, H, W); result: (B, outputs, ceil(H / stride), ceil(W / stride)).
    Source: Zagoruyko and Komodakis, BMVC 2016, arXiv:1605.07146, figure 1(c, d).
    Differs from the reference: nothing known.
    Example:
        >>> import torch
        >>> WideBlock(4, 8, stride=2)(torch.zeros(1, 4, 8, 8)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (B, outputs, H', W')."""
        activated = self.relu1(self.bn1(x))
        # A projection sees the activated input, an identity the raw one.
        skip = x if self.shortcut is None else self.shortcut(activated)
        hidden = self.relu2(self.bn2(self.conv1(activated)))
        return self.conv2(self.dropout(hidden)) + skip


class WideGroup(nn.Module):
    """The n blocks of one width, in the child `layer`, so that taps read `block3.layer.0.relu1`.

    Args:
        inputs: Input channels of the first block.
        outputs: Output channels of every block.
        blocks: n.
        stride: Of the first block.
        dropout: Of every block.
    Shapes:
        x: (B, inputs, H, W); result: (B, outputs, ceil(H / stride), ceil(W / stride)).
    Source: Zagoruyko and Komodakis, BMVC 2016, arXiv:1605.07146, table 1.
    Example:
        >>> len(WideGroup(4, 8, blocks=3).layer)
        3
    """

    def __init__(self, inputs: int, outputs: int, *, blocks: int, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        first = WideBlock(inputs, outputs, stride=stride, dropout=dropout)
        rest = [WideBlock(outputs, outputs, dropout=dropout) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Return the group's output, (B, outputs, H', W')."""
        return self.layer(x)


class WideResNet(ImageClassifier):
    """Wide ResNet: a 16-channel stem, three groups of n blocks, BatchNorm, ReLU, global average pooling, fc.

    Parameters for 3 channels and 10 classes: WRN-28-10 36,479,194; WRN-32-10 and WRN-34-10, which are one network
    under two ways of counting depth (see `blocks_per_group`), 46,160,474.

    Args:
        depth: 6n + 4 or 6n + 2.
        widen: Widening factor k; the groups have 16k, 32k and 64k channels.
        num_classes: K.
        channels: C.
        dropout: Probability of dropping an activation between a block's convolutions, in [0, 1).
        mean: Per channel, in pixel scale; None for 0.
        std: Per channel, in pixel scale; None for 1.
    Shapes:
        x: (B, C, H, W), any H and W; logits: (B, K) before softmax.
    Units:
        x in pixel scale [0, 1].
    Raises:
        HoldfastError: the depth fits no n, dropout is outside [0, 1), a size is too small, or mean or std does not
            fit the channels.
    Source: Zagoruyko and Komodakis, BMVC 2016, arXiv:1605.07146, table 1.
    Differs from the reference: Madry's WRN-32-10 (arXiv:1706.06083) pads its shortcuts with zeros; like the PyTorch
        versions in use, this one has a 1x1 convolution there. Pooling is global, so that other image sizes work.
    Example:
        >>> import torch
        >>> model = WideResNet(10, 1, 10).eval()
        >>> model(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int,
        widen: int,
        num_classes: int,
        *,
        channels: int = 3,
        dropout: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(num_classes, channels=channels, mean=mean, std=std)
        require_at_least(1, widen=widen)
        if not 0.0 <= dropout < 1.0:
            raise HoldfastError(f"dropout must be in [0, 1), got {dropout}")
        blocks = blocks_per_group(depth)
        wide = 16 * widen
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = WideGroup(16, wide, blocks=blocks, dropout=dropout)
        self.block2 = WideGroup(wide, 2 * wide, blocks=blocks, stride=2, dropout=dropout)
        self.block3 = WideGroup(2 * wide, 4 * wide, blocks=blocks, stride=2, dropout=dropout)
        self.bn1 = nn.BatchNorm2d(4 * wide)
        self.relu = nn.ReLU()
        self.avgpool = GlobalAveragePool()
        self.fc = nn.Linear(4 * wide, num_classes)
        taps = tuple(f"block3.layer.{block}.{relu}" for block in range(blocks) for relu in ("relu1", "relu2"))
        self.last_stage = (*taps, "avgpool")
        initialize_convolutional(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, C, H, W) in [0, 1]."""
        hidden = self.conv1(self.normalize(x))
        hidden = self.block3(self.block2(self.block1(hidden)))
        hidden = self.relu(self.bn1(hidden))
        return self.fc(self.avgpool(hidden).flatten(1))
