"""Weights that may be cast to low precision once, instead of at every forward under autocast."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from holdfast import distributed
from holdfast.forward import View

_CAST_BY_AUTOCAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def weights_cast_once(view: View, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> frozenset[str]:
    """Return the names of the weights that give the same logits under autocast whether or not they are cast before.

    Those are the weights of convolutions and linear layers. A network may also read such a weight itself: spectral
    normalisation multiplies it with float32 vectors, a head may normalise it. So the network is tried on a few images,
    with and without gradients: where it raises or answers differently with weights that were cast before, none is
    named. Left to autocast, weights give the same numbers, a little slower.

    Neither the model nor its buffers, flags or torch's random state are changed.

    Args:
        view: How the network is run. Under the statistics of the batch nothing is named where several processes train:
            a network that waits for the others could wait for ever.
        x: A few images, at least two where BatchNorm runs by the statistics of the batch.
        dtype: The low precision.
    Shapes:
        x: (B, C, H, W).
    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> sorted(weights_cast_once(View(model), torch.rand(2, 1, 2, 2)))
        ['1.bias', '1.weight']
    """
    names = _candidates(view.model)
    if not names or len(x) == 0 or (distributed.active() and view.statistics != "eval"):
        return frozenset()
    quiet = replace(view, statistics="eval" if view.statistics == "eval" else "batch", cast_once=frozenset())
    buffers = {name: buffer.clone() for name, buffer in view.model.named_buffers()}
    plain = replace(quiet, state={**buffers, **(view.state or {})}).detached()
    cast = {name: tensor.to(dtype) if name in names else tensor for name, tensor in (plain.state or {}).items()}
    compiled = view.model._compiled_call_impl
    view.model._compiled_call_impl = None  # a compiled network would be compiled anew for so few images
    try:
        with torch.autocast(x.device.type, dtype=dtype):
            for gradients in (True, False):
                expected = _answer(plain, x, gradients)
                if not torch.equal(_answer(replace(plain, state=cast), x, gradients), expected):
                    return frozenset()
    except Exception as error:  # whatever a network raises that meets a type which it does not expect
        if "out of memory" in str(error):
            raise
        return frozenset()
    finally:
        view.model._compiled_call_impl = compiled
    return names


def _answer(view: View, x: Tensor, gradients: bool) -> Tensor:
    """The logits, where gradients could be taken or not; equal weights give equal ones, dropout or not."""
    with (
        torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []),
        torch.set_grad_enabled(gradients),
    ):
        torch.manual_seed(0)
        return view(x.detach().requires_grad_(gradients)).logits.detach()


def _candidates(model: nn.Module) -> frozenset[str]:
    """Weights of plain convolutions and linear layers that the model holds under one name."""
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return frozenset(
        name
        for prefix, module in model.named_modules()
        if type(module) in _CAST_BY_AUTOCAST and not module._forward_pre_hooks  # a hook may make the weight
        for name, parameter in module.named_parameters(prefix, recurse=False)
        if owners[id(parameter)] == 1 and parameter.is_floating_point()
    )
