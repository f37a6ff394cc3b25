"""Folding BatchNorm into the convolution before it, in a copy that only searches."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from holdfast.models.outputs import logits_of

TOLERANCE = 1e-4


@torch.no_grad()
def folded(model: nn.Module, x: Tensor) -> tuple[nn.Module, int]:
    """A copy in evaluation mode whose BatchNorms are part of the layers before them, where that changes nothing.

    Which layer comes before a BatchNorm is seen by running the model: it must be the very tensor that a convolution or
    a linear layer returned, and both must run once. The copy is then compared with the model on the images and on
    noise, logits and gradients; if any differs by more than 1e-4 of the largest, a copy without folding is returned.

    Args:
        model: Left alone.
        x: A few images.

    Shapes:
        x: (B, C, H, W). Returns the copy and how many BatchNorms were folded.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).eval()
        >>> folded(network, torch.rand(2, 1, 2, 2))[1]
        1
    """
    plain = copy.deepcopy(model).eval()
    pairs = _pairs(plain, x)
    if not pairs:
        return plain, 0
    candidate = copy.deepcopy(plain)
    modules = dict(candidate.named_modules())
    for layer, norm in pairs:
        fuse = fuse_linear_bn_eval if isinstance(modules[layer], nn.Linear) else fuse_conv_bn_eval
        _replace(candidate, layer, fuse(modules[layer], modules[norm]))  # type: ignore[arg-type]  # _pairs chose the kinds
        _replace(candidate, norm, nn.Identity())
    for images in (x, torch.linspace(0, 1, x.numel(), device=x.device, dtype=x.dtype).view_as(x)):
        for before, after in zip(_answers(plain, images), _answers(candidate, images), strict=True):
            if not bool((before - after).abs().max() <= TOLERANCE * before.abs().max()):
                return plain, 0
    return candidate, len(pairs)


def _answers(model: nn.Module, x: Tensor) -> list[Tensor]:
    """A model's logits less their mean, which no constant can hide, and a gradient with respect to the pixels."""
    with torch.enable_grad():
        point = x.clone().requires_grad_(True)
        logits = logits_of(model(point + 0))
        found = [logits - logits.mean()]
        if logits.requires_grad:
            found.append(torch.autograd.grad((logits[:, 0] - logits.mean(1)).sum(), point)[0])
    return [each.detach() for each in found]


def _pairs(model: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    """Names of the layers and of the BatchNorms that directly follow them."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept, so that its id stays its own
    calls: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                made[id(output)] = (name, output)
            elif id(inputs[0]) in made and module.track_running_stats:  # type: ignore[truthy-function]  # a BatchNorm's
                found.append((made[id(inputs[0])][0], name))

        handles.append(module.register_forward_hook(after))

    for name, module in model.named_modules():
        if type(module) in (nn.Conv2d, nn.Linear) or isinstance(module, _BatchNorm):
            watch(name, module)
    try:
        model(x.clone())  # a model may write into its input
    finally:
        for handle in handles:
            handle.remove()
    layers = [layer for layer, _ in found]
    return [pair for pair in found if all(calls[name] == 1 for name in pair) and layers.count(pair[0]) == 1]


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in another's place."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, leaf, new)
