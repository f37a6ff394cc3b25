"""Reading what a network computes inside, by the names of its modules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from holdfast.errors import HoldfastError

_NORMS = (
    nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm
)  # fmt: skip
_ASIDE = re.compile(
    r"short_?cut|down_?sample|^skip|^res(idual)?_?(conv|proj|bn|norm)|^(q|k)_?(norm|ln)$", re.IGNORECASE
)
"""Parts of the names of layers beside the way that features take."""


def feature_names(model: nn.Module) -> list[str]:
    """Return the names that `tapped` accepts, in the order in which the modules were registered.

    Containers that are never called themselves (ModuleList, ModuleDict) are left out; their members are in.

    Args:
        model: Any network.
    Example:
        >>> feature_names(nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 2))))
        ['0', '1', '1.0']
    """
    return list(_tappable(model))


def last_stage(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules whose outputs are the features of a network's last stage.

    The networks of this library say so themselves (their attribute `last_stage`, which your own may have too). Of any
    other the last four normalisation layers are taken, in the order in which they were registered. Those of shortcuts
    (``shortcut``, ``downsample``, ``skip`` … in the name) and of an attention's queries and keys do not count. On a
    ResNet-18 these are the four layers of AR-AT's code, ``layer4.0.bn1`` to ``layer4.1.bn2``.

    Args:
        model: Any network.
    Raises:
        HoldfastError: the network has neither.
    Example:
        >>> last_stage(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten()))
        ('1',)
    """
    stated = getattr(model, "last_stage", None)
    if stated:
        return tuple(stated)
    norms = [name for name, module in _tappable(model).items() if _normalises(module)]
    if not norms:
        raise HoldfastError(
            "the model has no normalisation layers to take features from: name the layers with --objective.layers"
            " '[...]'; holdfast.models.taps.feature_names(model) lists all"
        )
    main = [name for name in norms if not any(_ASIDE.search(part) for part in name.split("."))]
    return tuple((main or norms)[-4:])


def _normalises(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, torch's own or one with parameters that is called like one."""
    if getattr(module, "is_auxiliary", False):  # the second branch of a BatchNorm that was split in two
        return False
    called_so = re.search(r"Norm(\dd)?$", type(module).__name__) is not None
    return isinstance(module, _NORMS) or (called_so and any(True for _ in module.parameters(recurse=False)))


def _tappable(model: nn.Module) -> dict[str, nn.Module]:
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if name and not isinstance(module, (nn.ModuleList, nn.ModuleDict))}


@contextmanager
def tapped(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of named submodules while the block runs.

    The yielded dictionary starts empty and holds, for each name, the output of that module's latest call: a second
    forward overwrites the first, and a module that no forward calls leaves no entry. The tensors are the network's
    own, with their graph: a gradient flows through them. The network goes on with a copy, so that an in-place layer
    after a tapped one changes nothing. Of a module that returns its very input (Identity, dropout in evaluation mode)
    the copy is what is yielded: the network may go on to change that input.
    The hooks are gone when the block ends, however it ends. `torch.func.functional_call` runs them too.

    Args:
        model: Any network.
        names: Module names as `feature_names` lists them, such as "layer4.0.bn1".
    Yields:
        Name -> output of that module's latest call, of whatever shape it has.
    Raises:
        HoldfastError: a name is unknown (the nearest are listed), or a tapped module returns no tensor.
    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> with tapped(model, ["0"]) as features:
        ...     logits = model(torch.zeros(3, 1, 2, 2))
        >>> features["0"].shape
        torch.Size([3, 4])
    """
    if isinstance(names, str):
        raise HoldfastError(f"names must be a list of module names, got the text {names!r}: write [{names!r}]")
    modules = _tappable(model)
    for name in names:
        if name not in modules:
            raise HoldfastError(_unknown(name, list(modules)))
    features: dict[str, Tensor] = {}
    handles = []
    try:
        for name in names:
            handles.append(modules[name].register_forward_hook(_store(features, name)))
        yield features
    finally:
        for handle in handles:
            handle.remove()


def _store(features: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, object], Tensor]:
    def hook(module: nn.Module, inputs: Any, output: object) -> Tensor:
        if not isinstance(output, Tensor):
            raise HoldfastError(f"module {name!r} returns {type(output).__name__}, not a tensor: tap one inside it")
        copied = output.clone()
        passed_on = any(output is each for each in inputs)
        features[name], goes_on = (copied, output) if passed_on else (output, copied)
        return goes_on

    return hook


def _unknown(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
    if not nearest:
        return f"no module is named {name!r}: this model has no named submodules"
    return f"no module is named {name!r}: did you mean {', '.join(nearest)}? feature_names(model) lists all"
