"""MixUp and CutMix: training on mixtures of two images and of their labels."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.keyed_random import Key


def _check_alpha(name: str, alpha: float) -> None:
    if not (alpha > 0 and math.isfinite(alpha)):
        raise HoldfastError(f"{name} alpha is {alpha}: give a positive number, for example 1.0")


def _share(key: Key, alpha: float) -> float:
    """λ ~ Beta(alpha, alpha), the first image's share."""
    return random.Random(key.fold("lambda").torch_seed).betavariate(alpha, alpha)


@dataclass(frozen=True, kw_only=True)
class MixUp:
    r"""A weighted mean of two images, and of their targets with the same weights.

    .. math:: \tilde x = \lambda x + (1 - \lambda) x', \qquad \tilde y = \lambda y + (1 - \lambda) y', \qquad
        \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    One λ a batch.

    Args:
        alpha: α > 0; 1 is the uniform distribution, smaller values mix less.

    Shapes:
        x, partner_x: (B, C, H, W); target, partner_target: (B, K), rows of probabilities. Returns both shapes.
    Units:
        None.
    Raises:
        HoldfastError: alpha is not a positive number.
    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv:1710.09412.
    Differs from the reference: the caller chooses the partners; λ is keyed.

    Example:
        >>> import torch
        >>> x, target = torch.zeros(1, 1, 2, 2), torch.tensor([[1.0, 0.0]])
        >>> mixed, soft = MixUp().mixed(x, target, x + 1, 1 - target, key=Key(0))
        >>> round(mixed[0, 0, 0, 0].item() + soft[0, 0].item(), 4)
        1.0
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check_alpha("MixUp", self.alpha)

    def mixed(
        self, x: Tensor, target: Tensor, partner_x: Tensor, partner_target: Tensor, *, key: Key
    ) -> tuple[Tensor, Tensor]:
        """The mixed images and targets; `key` says what the draw is for, seed, epoch and step included."""
        share = _share(key, self.alpha)
        return share * x + (1 - share) * partner_x, share * target + (1 - share) * partner_target


@dataclass(frozen=True, kw_only=True)
class CutMix:
    r"""A box of another image pasted into each, and the targets mixed by the area it really covers.

    .. math:: \tilde x = M x + (1 - M) x', \qquad \tilde y = \bar M y + (1 - \bar M) y', \qquad
        \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    M is 0 in a box of sides H√(1 - λ) and W√(1 - λ) around a uniform centre, clipped at the image's borders, and 1
    elsewhere. M̄ is its mean. One box a batch.

    Args:
        alpha: α > 0; 1 makes the area before clipping uniform.
        probability: Share of the batches that are mixed; the others come back as they are.

    Shapes:
        x, partner_x: (B, C, H, W); target, partner_target: (B, K), rows of probabilities. Returns both shapes.
    Units:
        None.
    Raises:
        HoldfastError: alpha is not a positive number, or probability lies outside [0, 1].
    Source: Yun et al., "CutMix", ICCV 2019, arXiv:1905.04899.
    Differs from the reference: the caller chooses the partners; draws are keyed. As there, half a side is rounded
        down, so a box that is not clipped has even sides.

    Example:
        >>> import torch
        >>> x, target = torch.zeros(1, 1, 8, 8), torch.tensor([[1.0, 0.0]])
        >>> mixed, soft = CutMix().mixed(x, target, x + 1, 1 - target, key=Key(0))
        >>> bool(mixed.mean() == soft[0, 1])
        True
    """

    alpha: float = 1.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        _check_alpha("CutMix", self.alpha)
        if not 0 <= self.probability <= 1:
            raise HoldfastError(f"CutMix probability is {self.probability}: give a number in [0, 1], for example 0.5")

    def mixed(
        self, x: Tensor, target: Tensor, partner_x: Tensor, partner_target: Tensor, *, key: Key
    ) -> tuple[Tensor, Tensor]:
        """The mixed images and targets; `key` says what the draw is for, seed, epoch and step included."""
        if random.Random(key.fold("apply").torch_seed).random() >= self.probability:
            return x, target
        height, width = x.shape[2:]
        side = math.sqrt(1 - _share(key, self.alpha))
        centre = random.Random(key.fold("centre").torch_seed)

        def span(length: int) -> tuple[int, int]:
            """Begin and end of the box on one axis."""
            half, middle = int(length * side) // 2, centre.randrange(length)
            return max(0, middle - half), min(length, middle + half)

        (top, bottom), (left, right) = span(height), span(width)
        mixed = x.clone()
        mixed[:, :, top:bottom, left:right] = partner_x[:, :, top:bottom, left:right]
        share = (bottom - top) * (right - left) / (height * width)
        return mixed, (1 - share) * target + share * partner_target
