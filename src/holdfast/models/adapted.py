"""The doors: what a network of the user's own must become before it is run, copied or trained here.

Wrappers are taken off, lazy layers are initialised, and what cannot be trained is refused before anything is spent.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from holdfast.errors import HoldfastError
from holdfast.models.modes import flagged

_DATA_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside `nn.DataParallel`, `DistributedDataParallel` or what `torch.compile` returned.

    It holds the same parameters; nothing is copied.

    Args:
        model: Any network, wrapped or not.
    Example:
        >>> network = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(network)) is network
        True
    """
    inside = _inside(model)
    return model if inside is None else unwrapped(inside)


def _inside(model: nn.Module) -> nn.Module | None:
    """What a wrapper holds, or None for what is no wrapper."""
    if isinstance(model, _DATA_PARALLEL):
        return model.module
    return model.get_submodule("_orig_mod") if type(model).__name__ == "OptimizedModule" else None  # slow to import


def wrapper_notes(model: nn.Module) -> tuple[str, ...]:
    """Say in a sentence each which wrappers `own_copy` takes off.

    Args:
        model: Any network.
    """
    kinds = dict.fromkeys(type(module).__name__ for module in model.modules() if _inside(module) is not None)
    advice = {"OptimizedModule": "--training.compile compiles the network of a run"}
    return tuple(
        f"the model is trained without its {'torch.compile' if kind == 'OptimizedModule' else kind} wrapper:"
        f" {advice.get(kind, 'torchrun trains on several processes')}"
        for kind in kinds
    )


def unwrap_in_place(model: nn.Module) -> nn.Module:
    """Return the network without wrappers, its children's taken off too; those of the children are changed in place.

    Args:
        model: A network that may be changed.
    Example:
        >>> network = unwrap_in_place(nn.Sequential(nn.Flatten(), nn.DataParallel(nn.Linear(4, 2))))
        >>> list(network.state_dict())
        ['1.weight', '1.bias']
    """
    model = unwrapped(model)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and _inside(child) is not None:
                parent._modules[name] = unwrapped(child)
    return model


def own_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network without wrappers, to be trained or searched.

    Its tensors are ordinary ones though the network was made under `torch.inference_mode`.

    Args:
        model: Left alone.
    Raises:
        HoldfastError: it cannot be copied; says why.
    """
    memo: dict[int, Any] = {}
    for buffer in model.buffers():
        if isinstance(buffer, UninitializedBuffer):  # which torch cannot copy
            memo[id(buffer)] = UninitializedBuffer(device=buffer.device, dtype=buffer.dtype)  # type: ignore[call-arg]  # torch's stub is of Buffer
    for module in model.modules():  # weights that a hook of torch's own computes at every forward: weight_norm's
        computed = (value for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf)
        memo.update({id(value): value.detach().clone() for value in computed})
    try:
        with torch.inference_mode(False):
            return unwrap_in_place(copy.deepcopy(unwrapped(model), memo))
    except Exception as error:  # whatever a person's own attributes raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if "graph leaves" in reason:
            raise HoldfastError(
                "the model cannot be copied by copy.deepcopy, because it keeps a tensor that was computed with a"
                " gradient: keep it detached"
            ) from error
        raise HoldfastError(
            f"the model cannot be copied by copy.deepcopy ({reason}): keep no open files, locks or generators in it"
        ) from error


# ------------------------------------------------------------------------------------------------- lazy layers


def uninitialised(model: nn.Module) -> list[str]:
    """Names of the lazy layers of a network that have not seen an image yet.

    Args:
        model: Any network.
    Example:
        >>> uninitialised(nn.Sequential(nn.Flatten(), nn.LazyLinear(2)))
        ['1 (LazyLinear)']
    """
    return [
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if any(map(is_lazy, (*module.parameters(recurse=False), *module.buffers(recurse=False))))
    ]


def initialise(model: nn.Module, images: Tensor, seed: int) -> tuple[str, ...]:
    """Run a network with lazy layers once, so that these layers take their sizes and draw their weights.

    Args:
        model: Changed in place; one without lazy layers is not run.
        images: (B, C, H, W), at least two.
        seed: Of the weights; torch's global generator is left as it was.
    Returns:
        What the person should be told.
    Raises:
        HoldfastError: the network cannot run on such images, or leaves a lazy layer out.
    """
    layers = uninitialised(model)
    if not layers:
        return ()
    flags = [(module, module.training) for module in model.modules()]
    first = next((p for p in model.parameters() if p.is_floating_point()), images)
    try:
        with torch.random.fork_rng(devices=[first.device] if first.device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            flagged(model, training=False)(images.to(device=first.device, dtype=first.dtype))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HoldfastError(
            f"the model cannot run on images of shape {tuple(images.shape[1:])}: {reason}; check channels and image"
            " size"
        ) from error
    finally:
        for module, training in flags:
            module.training = training
    left = uninitialised(model)
    if left:
        raise HoldfastError(
            f"the model's lazy layer {left[0]} is not run on an image, so it has no weights: run it once, or leave it"
            " out"
        )
    return (f"lazy layers were initialised by one forward on images of {tuple(images.shape[1:])}: {_few(layers)}",)


def require_initialised(model: nn.Module) -> None:
    """Refuse a network with lazy layers that have no weights yet.

    Raises:
        HoldfastError: names the layers.
    """
    layers = uninitialised(model)
    if layers:
        raise HoldfastError(
            f"the model has lazy layers that have never seen an image, {_few(layers)}: run it once on an image, and"
            " load its weights"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


# ---------------------------------------------------------------------------- what can be searched or trained


def is_scripted(model: nn.Module) -> bool:
    """Return True for a TorchScript module, scripted, traced or loaded, whose weights can only be its own.

    Args:
        model: Any network.
    """
    return isinstance(model, torch.jit.ScriptModule)


def for_evaluation(model: nn.Module) -> nn.Module:
    """Return what an evaluation runs in place of a network that it is given. The given one is left alone.

    Args:
        model: Pixels in [0, 1] to logits.
    Returns:
        The network itself, without a wrapper; a copy where its tensors were made under `torch.inference_mode`, since
        no gradient passes through such tensors.
    Raises:
        HoldfastError: it has lazy layers without weights.
    """
    model = unwrapped(model)
    require_initialised(model)
    return without_inference_tensors(model)


def without_inference_tensors(model: nn.Module) -> nn.Module:
    """Return the network, or a copy with ordinary tensors where it was made under `torch.inference_mode`."""
    return own_copy(model) if _has_inference_tensors(model) else model


def for_training(model: nn.Module) -> nn.Module:
    """Return the network whose own parameters a training step works on, without `nn.DataParallel`.

    What `torch.compile` returned is left as it is: it runs like any other network, and faster than what is inside.

    Args:
        model: Pixels in [0, 1] to logits.
    Raises:
        HoldfastError: it is TorchScript, has lazy layers without weights, or was made under `torch.inference_mode`.
    """
    while isinstance(model, _DATA_PARALLEL):
        model = model.module
    if is_scripted(unwrapped(model)):
        raise HoldfastError(_SCRIPTED)
    require_initialised(model)
    if _has_inference_tensors(model):
        raise HoldfastError(
            "the model was made under torch.inference_mode, so its weights cannot be trained: make it outside of it, or"
            " give copy.deepcopy(model)"
        )
    return model


def require_trainable(model: nn.Module) -> None:
    """Refuse a network whose copy could not be trained, since it is TorchScript or holds some with weights.

    Raises:
        HoldfastError: says what to give in its place.
    """
    for module in model.modules():
        if is_scripted(module) and any(True for _ in module.parameters()):
            raise HoldfastError(_SCRIPTED)
    if is_scripted(model):  # a frozen one has no parameters at all
        raise HoldfastError(_SCRIPTED)


_SCRIPTED = (
    "the model is TorchScript, or a part of it with weights is, and cannot be trained here (evaluate takes it): give"
    " the Python module that it was made from"
)


def _has_inference_tensors(model: nn.Module) -> bool:
    return any(not is_lazy(tensor) and tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
