"""Starting weights, written out instead of left to the defaults of the installed torch."""

from __future__ import annotations

import math

from torch import nn


def initialize_convolutional(model: nn.Module) -> None:
    r"""Draw the weights of a convolutional network in place, from torch's global random number generator.

    .. math:: W_\mathrm{conv} \sim \mathcal{N}(0,\; 2 / (k_h k_w C_\mathrm{out})), \qquad
              W_\mathrm{linear} \sim \mathcal{U}(-1/\sqrt{D},\; 1/\sqrt{D})

    Biases are 0, BatchNorm scales 1 and shifts 0.

    Args:
        model: Any module; its Conv2d, BatchNorm2d and Linear submodules are set, the rest is left alone.
    Shapes:
        C_out: output channels of the convolution; D: inputs of the linear layer.
    Source: He et al., ICCV 2015, arXiv:1502.01852, section 2.2 (backward case, "fan out").
    Differs from the reference: the last linear layer has the uniform law above instead of a fixed 0.01.
    Example:
        >>> import torch
        >>> layer = nn.Linear(4, 2)
        >>> initialize_convolutional(layer)
        >>> layer.bias.tolist(), bool((layer.weight.abs() <= 0.5).all())
        ([0.0, 0.0], True)
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = 1.0 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
