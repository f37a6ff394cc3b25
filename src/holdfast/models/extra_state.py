"""What a module keeps beside its tensors (`get_extra_state`): what of it can be saved, and where it goes.

Tensors are saved with the weights. Plain values go into the description of a model folder, as JSON.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.parsing import parse_json

_SUFFIX = "_extra_state"  # torch's own name for such an entry of a state
_MOST = 1 << 20  # characters of all plain values together; config.json holds them


def is_extra(name: str) -> bool:
    """Return True for the name of an entry that `get_extra_state` made.

    Example:
        >>> is_extra("body.0._extra_state"), is_extra("body.0.weight")
        (True, False)
    """
    return name.rpartition(".")[2] == _SUFFIX


def parted(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a state, and its other values, which can be written as JSON and read again as they were.

    Args:
        state: As `state_dict` gives it.
    Raises:
        HoldfastError: a value is neither a tensor nor made of lists, mappings with text as keys, text, numbers, true,
            false and None; or all of them together are too large.
    Example:
        >>> sorted(part for part in parted({"_extra_state": {"scale": 2.0}})[1])
        ['_extra_state']
    """
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in state.items() if name not in tensors}
    for name, value in values.items():
        try:
            same = _same(parse_json(json.dumps(value, allow_nan=False), "it"), value)
        except (HoldfastError, TypeError, ValueError, RecursionError):
            same = False
        if not same or len(repr(value)) > _MOST:
            owner = name.removesuffix(_SUFFIX).removesuffix(".") or "the model itself"
            raise HoldfastError(
                f"get_extra_state of {owner} returns a {type(value).__name__} that a run cannot save: return a tensor,"
                " or up to a megabyte of lists, mappings with text as keys, text, finite numbers, true, false and None"
            )
    return tensors, values


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal, in their types too: JSON makes lists of tuples, and text of every key."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def require_savable(model: nn.Module) -> None:
    """Refuse a network whose extra state cannot be saved, or could not be put back.

    Raises:
        HoldfastError: names the module.
    """
    for name, module in model.named_modules():
        keeps = type(module).get_extra_state is not nn.Module.get_extra_state
        if keeps and type(module).set_extra_state is nn.Module.set_extra_state:
            raise HoldfastError(
                f"{name or 'the model'} ({type(module).__name__}) has get_extra_state but no set_extra_state, so what"
                " it keeps could not be loaded again: define both"
            )
    parted(model.state_dict())


def with_extra(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return a state, such as an average of the weights, with what the network keeps beside its own tensors.

    Of that it holds copies: `set_extra_state` may keep the very object that it is given.

    Args:
        state: Tensors by name.
        model: Whose extra state is taken where `state` has none.
    """
    whole = {name: value for name, value in {**model.state_dict(), **state}.items() if is_extra(name) or name in state}
    return {name: copy.deepcopy(value) if is_extra(name) else value for name, value in whole.items()}
