"""A small vision transformer for small images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.classifier import ImageClassifier, require_at_least


def default_patch(image_size: tuple[int, int]) -> int:
    """Return the patch side nearest to an eighth of the smaller image side that divides both sides.

    A large patch ruins small images (patch 16 at 32x32 leaves four tokens); an eighth gives about 64 tokens. Of two
    equally near sides the smaller is taken.

    Args:
        image_size: (H, W).
    Units:
        Pixels.
    Example:
        >>> [default_patch((side, side)) for side in (8, 28, 32, 64)]
        [1, 4, 4, 8]
    """
    height, width = image_size
    shorter = min(height, width)
    divisors = [side for side in range(1, shorter + 1) if height % side == 0 and width % side == 0]
    return min(divisors, key=lambda side: (abs(8 * side - shorter), side))


MOST_BLOCKS = 1000


class SelfAttention(nn.Module):
    r"""Multi-head self-attention over tokens.

    .. math:: \mathrm{softmax}(Q K^\top / \sqrt{d})\, V \quad \text{per head, then a linear map}

    Written with plain matrix products: the fused kernels have no second derivative, which curvature penalties and
    diagnostics need, and at these token counts they gain little.

    Args:
        dim: D, a multiple of heads.
        heads: Attention heads; each has d = D / heads features.
    Shapes:
        tokens: (B, N, D); result: (B, N, D).
    Source: Vaswani et al., NeurIPS 2017, arXiv:1706.03762, section 3.2.
    Differs from the reference: no masking and no dropout.
    Example:
        >>> SelfAttention(8, heads=2)(torch.zeros(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mixed tokens, (B, N, D)."""
        batch, count, dim = tokens.shape
        parts = self.qkv(tokens).reshape(batch, count, 3, self.heads, dim // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(-2, -1)) * (dim // self.heads) ** -0.5
        mixed = scores.softmax(dim=-1) @ value
        return self.project(mixed.transpose(1, 2).reshape(batch, count, dim))


class TransformerBlock(nn.Module):
    r"""Pre-norm transformer block: attention, then a two-layer perceptron with GELU, each added to its input.

    .. math:: z = x + \mathrm{attn}(\mathrm{norm}_1(x)), \qquad y = z + \mathrm{mlp}(\mathrm{norm}_2(z))

    Args:
        dim: D.
        heads: Attention heads.
        mlp_ratio: Hidden features of the perceptron, in multiples of D.
    Shapes:
        tokens: (B, N, D); result: (B, N, D).
    Source: Dosovitskiy et al., ICLR 2021, arXiv:2010.11929, eq. (2) and (3).
    Differs from the reference: no dropout.
    Example:
        >>> TransformerBlock(8, heads=2, mlp_ratio=2)(torch.zeros(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, dim: int, *, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads=heads)
        self.norm2 = nn.LayerNorm(dim)
        hidden = mlp_ratio * dim
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, dim)),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the block's tokens, (B, N, D)."""
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class SmallViT(ImageClassifier):
    """Small vision transformer: patches, learned positions, pre-norm blocks, mean of the tokens, fc.

    The tokens are averaged after the last LayerNorm instead of reading a class token, which small images favour.

    Args:
        num_classes: K.
        channels: C.
        image_size: (H, W) of the images; the positions are learned for this size.
        patch: Side of a square patch; it must divide H and W. None takes `default_patch`.
        dim: D, features of a token; a multiple of heads.
        depth: Transformer blocks.
        heads: Attention heads.
        mlp_ratio: Hidden features of each perceptron, in multiples of D.
        mean: Per channel, in pixel scale; None for 0.
        std: Per channel, in pixel scale; None for 1.
    Shapes:
        x: (B, C, H, W) of `image_size`; tokens: (B, N, D) with N = H W / patch^2; logits: (B, K) before softmax.
    Units:
        x in pixel scale [0, 1]; patch in pixels.
    Raises:
        HoldfastError: patch does not divide the image, heads do not divide dim, a size is too small, mean or std does
            not fit the channels, or an image of another size is given.
    Source: Dosovitskiy et al., ICLR 2021, arXiv:2010.11929; averaged tokens: Beyer et al., arXiv:2205.01580.
    Differs from the reference: much smaller, no class token, no dropout, learned positions start at std 0.02.
    Example:
        >>> model = SmallViT(10, channels=1, image_size=(8, 8), dim=24, depth=1)
        >>> model(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 3,
        image_size: tuple[int, int] = (32, 32),
        patch: int | None = None,
        dim: int = 192,
        depth: int = 6,
        heads: int = 3,
        mlp_ratio: int = 4,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(num_classes, channels=channels, mean=mean, std=std)
        height, width = image_size
        require_at_least(1, height=height, width=width, dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
        if patch is None:
            patch = default_patch((height, width))
        require_at_least(1, patch=patch)
        if depth > MOST_BLOCKS:
            raise HoldfastError(f"depth must be at most {MOST_BLOCKS}, got {depth}: a small network has about 6 blocks")
        if height % patch or width % patch:
            raise HoldfastError(
                f"patch {patch} does not divide images of {height}x{width}: use patch={default_patch((height, width))}"
            )
        if dim % heads:
            raise HoldfastError(f"dim {dim} is not a multiple of heads {heads}: change one of them")
        self.image_size = (height, width)
        self.patch_embedding = nn.Conv2d(channels, dim, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty(1, (height // patch) * (width // patch), dim))
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads=heads, mlp_ratio=mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, num_classes)
        self.last_stage = (*(f"blocks.{block}" for block in range(max(0, depth - 2), depth)), "norm")
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, C, H, W) in [0, 1]."""
        x = self.normalize(x)
        if tuple(x.shape[2:]) != self.image_size:
            height, width = self.image_size
            raise HoldfastError(
                f"this network takes images of {height}x{width}, got {x.shape[2]}x{x.shape[3]}: "
                f"build it with image_size=({x.shape[2]}, {x.shape[3]})"
            )
        tokens = self.patch_embedding(x).flatten(2).transpose(1, 2) + self.positions
        return self.fc(self.norm(self.blocks(tokens)).mean(dim=1))


def _initialize(model: SmallViT) -> None:
    """Kaiming for the patch convolution (no ReLU follows it), truncated normal of std 0.02 for the rest."""
    nn.init.trunc_normal_(model.positions, std=0.02)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
