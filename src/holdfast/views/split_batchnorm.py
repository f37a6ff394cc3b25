"""AR-AT's split BatchNorm: clean and adversarial images are normalised by branches of their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.errors import HoldfastError
from holdfast.forward import Views
from holdfast.schedule import Progress
from holdfast.views.base import Search, ViewTransform

AUXILIARY = "aux"


class SplitBatchNorm(ViewTransform):
    """Gives every BatchNorm an auxiliary branch, with weight, bias and statistics of its own, for the named sides.

    The main branch keeps its names and serves the attack, the other sides, validation and export, so that the exported
    model is a plain one. A clean warm-up trains the main branch. In a model without BatchNorm nothing is split.

    Args:
        sides: Sides that run on the auxiliary branch.

    Shapes:
        Weights keep theirs; for each BatchNorm ``<name>`` there are further ones under ``<name>.aux``.
    Units:
        None.
    Raises:
        HoldfastError: sides is empty or a text, or names an attacked side.
    Source: AR-AT, arXiv:2402.14648, section 4; Xie et al., CVPR 2020, arXiv:1911.09665.
    Differs from the reference: the branches begin as equal copies, with pretrained weights too; there each is
        initialised on its own (which is the same for a network from scratch).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> SplitBatchNorm().prepare(model)
        >>> [name for name, _ in model.named_parameters() if "1." in name]
        ['1.weight', '1.bias', '1.aux.weight', '1.aux.bias']
    """

    def __init__(self, *, sides: Sequence[str] = ("clean",)) -> None:
        if isinstance(sides, str) or not sides:
            raise HoldfastError(f"sides is {sides!r}: give a list of sides, for example [clean]")
        attacked = [side for side in sides if side.startswith("adv")]
        if attacked:
            raise HoldfastError(
                f"side {attacked[0]!r} cannot leave the main branch, which is attacked, validated and exported: split"
                " off clean sides only"
            )
        self.sides = tuple(sides)
        self.needs_sides = self.sides
        self.branches: dict[str, str] = {}
        self.notes: tuple[str, ...] = ()

    def prepare(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        for norm in norms:
            split(norm)
        self.branches = dict.fromkeys(self.sides, AUXILIARY) if norms else {}
        if not norms:
            self.notes = ("the model has no BatchNorm, so there is nothing to split: all sides share one branch",)

    def __call__(self, views: Views, search: Search, progress: Progress) -> Views:
        return {side: replace(view, branch=self.branches.get(side, view.branch)) for side, view in views.items()}


class _Split:
    """What a BatchNorm with an auxiliary branch adds to its class."""

    active_branch: str
    aux: nn.Module
    branch_names = ("main", AUXILIARY)

    def forward(self, x: Tensor) -> Tensor:
        if self.active_branch == AUXILIARY:
            return self.aux(x)
        return super().forward(x)  # type: ignore[misc]  # the BatchNorm class that comes next


_SPLIT: dict[type, type] = {}  # BatchNorm class -> the same with branches; one each, or every network would recompile


def _split_class(kind: type) -> type:
    """The class of a BatchNorm with branches; torch's own can be pickled."""
    if kind not in _SPLIT:
        name = f"Split{kind.__name__}"
        _SPLIT[kind] = type(name, (_Split, kind), {"__module__": __name__, "__qualname__": name})
        globals().setdefault(name, _SPLIT[kind])
    return _SPLIT[kind]


for _kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
    _split_class(_kind)


def split(norm: _BatchNorm) -> None:
    """Give a BatchNorm its auxiliary branch, once. The module stays the same object, with its hooks and parameters."""
    kind = type(norm)
    if issubclass(kind, _Split) or getattr(norm, "is_auxiliary", False):
        return
    auxiliary: Any = copy.deepcopy(norm)
    auxiliary.is_auxiliary = True
    norm.__class__ = cast(Any, _split_class(kind))
    norm.aux = auxiliary
    norm.active_branch = "main"  # type: ignore[assignment]  # a plain attribute, not a tensor or a module


def is_split(model: nn.Module) -> bool:
    """Whether the model has auxiliary branches."""
    return any(isinstance(module, _Split) for module in model.modules())


def branch_state(state: Mapping[str, Tensor], branch: str = "main") -> dict[str, Tensor]:
    """The state of a plain model with the BatchNorms of one branch.

    Args:
        state: Parameters and buffers of a model with branches.
        branch: ``"main"`` or ``"aux"``.

    Raises:
        HoldfastError: another branch.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1, track_running_stats=False))
        >>> SplitBatchNorm().prepare(model)
        >>> list(branch_state(model.state_dict(), "aux"))
        ['0.weight', '0.bias']
    """
    if branch not in ("main", AUXILIARY):
        raise HoldfastError(f"branch {branch!r} is unknown: use main or aux")
    main, auxiliary = {}, {}
    for name, tensor in state.items():
        norm, found, leaf = f".{name}".rpartition(f".{AUXILIARY}.")
        twin = f"{norm}.{leaf}".removeprefix(".")
        if found and "." not in leaf and twin in state:
            auxiliary[twin] = tensor
        else:
            main[name] = tensor
    return main if branch == "main" else {**main, **auxiliary}
