"""Memory layout: convolutions that must not run channels-last on a CPU."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

_NARROW = 16  # input channels a group; oneDNN's kernels for AVX2 and AVX-512 work on blocks of 8 and of 16


def narrow_convolutions(model: nn.Module) -> list[nn.Module]:
    """Return a network's 1x1 convolutions with a stride and fewer than 16 input channels.

    The gradient of their weights, computed channels-last by oneDNN on an x86 CPU, writes behind the end of its work
    space: it is wrong, the process hangs, or memory is corrupted and it ends some time later. Seen in torch 2.13 with
    AVX2 below 8 channels; oneDNN's issue 6035 has AVX-512 below 16.

    Args:
        model: Any network.
    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1, stride=2), nn.Conv2d(16, 32, 1, stride=2))
        >>> narrow_convolutions(network) == [network[1]]
        True
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and _is_narrow(module)
    ]


def _is_narrow(layer: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    # a transposed convolution is that of its outputs, backwards
    channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.out_channels
    return math.prod(layer.kernel_size) == 1 and max(layer.stride) > 1 and channels // layer.groups < _NARROW


def keep_narrow_contiguous(model: Network) -> Network:
    """Let a network's narrow convolutions run in torch's usual layout on the CPU, whatever the layout of all others.

    Their weights keep their memory and get usual strides; a hook gives their images the same. All numbers stay as they
    are, up to rounding.

    Args:
        model: Changed in place, once.
    Returns:
        The same network.
    """
    for layer in narrow_convolutions(model):
        for parameter in layer.parameters():
            if parameter.device.type == "cpu":
                parameter.data = in_usual_layout(parameter.data)
        hook = _usual_input if isinstance(layer, nn.Conv2d) else _usual_first_input
        if hook not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(hook)
    return model


def in_usual_layout(x: Tensor) -> Tensor:
    """Return a tensor with the strides of a contiguous one.

    `contiguous()` does not: where a size is 1, tensors with strides of both layouts count as contiguous.

    Shapes:
        x: any.
    Example:
        >>> import torch
        >>> x = torch.zeros(2, 1, 3, 3).to(memory_format=torch.channels_last)
        >>> x.contiguous().stride(), in_usual_layout(x).stride()
        ((9, 1, 3, 1), (9, 9, 3, 1))
    """
    return x.reshape(-1).view(x.shape)


# torch.jit.script compiles this hook with the network: it wants these names and annotations.
def _usual_input(self: nn.Module, input: tuple[Tensor]) -> tuple[Tensor]:
    """The hook of a convolution."""
    if len(input) == 1 and input[0].device.type == "cpu":
        return (in_usual_layout(input[0]),)
    return input


def _usual_first_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The hook of a transposed convolution, which may be given a size too."""
    if inputs and inputs[0].device.type == "cpu":
        return (in_usual_layout(inputs[0]), *inputs[1:])
    return inputs
