"""Training and evaluation mode, as a network itself wants them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

Network = TypeVar("Network", bound=nn.Module)


def kept_in_evaluation(model: nn.Module) -> frozenset[str]:
    """Return the names of the modules that stay in evaluation mode while the network is trained.

    They are

    - those that a `train()` of the network's own leaves in evaluation mode,
    - those in evaluation mode all of whose parameters are frozen (``requires_grad=False``), with everything below
      them: BatchNorm that was frozen for fine-tuning, a frozen backbone,
    - single layers in evaluation mode whose container, and the layers with weights beside them, are in training mode.

    A network that is wholly in evaluation mode, as one that was just loaded is, says nothing by it: of such a network
    only frozen layers with running statistics (or other buffers) stay as they are.

    The training flags are as before afterwards. A `train()` of the network's own is called once.

    Args:
        model: Any network.
    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
        >>> kept_in_evaluation(model)
        frozenset()
        >>> _ = model[1].eval().requires_grad_(False)
        >>> kept_in_evaluation(model)
        frozenset({'1'})
    """
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "training")}
    if "" not in modules:  # frozen TorchScript has no modes
        return frozenset()
    kept = set(_left_by_own_train(model, modules))
    for name, module in modules.items():
        if not name or module.training:
            continue
        if _frozen(module) or _picked_out(module, modules[name.rpartition(".")[0]]):
            below = [each for each in modules if f"{each}.".startswith(f"{name}.") and not modules[each].training]
            kept.update(each for each in below if model.training or _has_statistics(modules[each]))
    return frozenset(kept)


def with_added(kept: frozenset[str], before: Collection[str], model: nn.Module) -> frozenset[str]:
    """Return the names with those of modules that were added below them since.

    Args:
        kept: Names of modules.
        before: Names of all modules that there were.
        model: The network with what was added.
    Example:
        >>> sorted(with_added(frozenset({"1"}), ["", "1"], nn.Sequential(nn.Flatten(), nn.Sequential(nn.ReLU()))))
        ['1', '1.0']
    """
    names = (name for name, _ in model.named_modules())
    return kept | {name for name in names if name not in before and name.rpartition(".")[0] in kept}


def in_training_form(model: Network) -> Network:
    """Let a network's own `train()` undo what its `eval()` did to the weights, and return the network.

    Some adapters (LoRA) are merged into the weights they belong to by `eval()`, and taken out again by `train()`. Only
    apart can they be trained, saved and loaded. The training flags are as before afterwards.

    Args:
        model: Changed in place; a network without a `train()` of its own is left alone.
    """
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "training")}
    list(_left_by_own_train(model, modules))
    return model


def flagged(model: Network, *, training: bool) -> Network:
    """Set the training flag of every module, without a `train()` or `eval()` of the network's own, and return it.

    Args:
        model: Changed in place.
        training: The flag.
    """
    for module in model.modules():
        if getattr(module, "training", training) != training:  # frozen TorchScript has none
            module.training = training
    return model


def in_evaluation_mode(model: Network) -> Network:
    """Put a network into evaluation mode, and return it.

    Args:
        model: Changed in place. What `torch.export` made refuses `eval()`: only its flags are set.
    """
    try:
        return model.eval()
    except NotImplementedError:
        return flagged(model, training=False)


def _left_by_own_train(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Names of the modules that are in evaluation mode after `train()`, where any of them has one of its own."""
    if all(type(each).train is nn.Module.train and "train" not in vars(each) for each in modules.values()):
        return
    before = {name: module.training for name, module in modules.items()}
    try:
        with suppress(NotImplementedError):  # what torch.export made has no modes
            model.train()
        yield from [name for name, module in modules.items() if not module.training]
    finally:
        for name, module in modules.items():
            module.training = before[name]


def _frozen(module: nn.Module) -> bool:
    """Whether the module has parameters and trains none."""
    flags = [parameter.requires_grad for parameter in module.parameters()]
    return bool(flags) and not any(flags)


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) or next(module.buffers(recurse=False), None) is not None


def _picked_out(module: nn.Module, container: nn.Module) -> bool:
    """Whether a layer alone was put into evaluation mode, and not with all that it belongs to."""
    single = isinstance(module, _NormBase) or next(module.children(), None) is None
    beside = [
        each
        for each in container.children()
        if not isinstance(each, _NormBase) and any(True for _ in each.parameters())
    ]
    return single and container.training and all(each.training for each in beside)
