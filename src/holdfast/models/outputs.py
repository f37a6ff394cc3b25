"""The logits in what a network returns: a tensor, or a tuple, a mapping or an object that holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.adapted import is_scripted

NAMES = ("logits", "output", "out")
"""Under which logits are looked for in a mapping, in this order."""


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a network returned.

    A tensor is taken as it is. Of a mapping or an object with named fields (a `ModelOutput`, `GoogLeNetOutputs`), the
    tensor named "logits", "output" or "out" is taken. Of a tuple or a list, the only two-dimensional tensor; of several
    that have the same shape, as networks with auxiliary classifiers return them, the first.

    Args:
        output: What the network returned.
    Shapes:
        Returns whatever shape is found; (B, K) is for the caller to check.
    Raises:
        HoldfastError: there are no logits in it, or it is not clear which ones they are.
    Example:
        >>> import torch
        >>> logits_of({"logits": torch.zeros(2, 10), "loss": torch.zeros(())}).shape
        torch.Size([2, 10])
        >>> logits_of((torch.zeros(2, 10), torch.zeros(2, 64, 7, 7))).shape
        torch.Size([2, 10])
    """
    return output if isinstance(output, Tensor) else _found(output)[1]


def told(output: Any) -> str | None:
    """Say what `logits_of` takes of an output that is no tensor; None for a tensor.

    Args:
        output: What the network returned.
    Raises:
        HoldfastError: as `logits_of`.
    Example:
        >>> import torch
        >>> told([torch.zeros(2, 10), torch.zeros(2, 10)])
        'the model returns a list of 2: its first item is taken as the logits, and the rest is left out'
    """
    if isinstance(output, Tensor):
        return None
    place = _found(output)[0]
    rest = "" if isinstance(output, (tuple, list, Mapping)) and len(output) == 1 else ", and the rest is left out"
    return f"the model returns {_named(output)}: {place} is taken as the logits{rest}"


def tell_in_training(model: nn.Module, say: Callable[[str], None]) -> None:
    """Say what is taken of the first output that a network returns in training mode, where it is no tensor.

    Args:
        model: Any network; the hook that listens is gone after that output.
        say: Gets the sentence.
    """

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training:
            handle.remove()
            text = told(output)
            if text is not None:
                say(text)

    handle = model.register_forward_hook(look)


@contextmanager
def noticed(model: nn.Module) -> Iterator[list[str]]:
    """Collect what should be told, once each, of the outputs that a network returns while the block runs.

    Args:
        model: Any network. Nothing is collected of TorchScript, which takes no hooks.
    """
    found: list[str] = []
    if is_scripted(model):
        yield found
        return

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        text = told(output)
        if text is not None and text not in found:
            found.append(text)

    handle = model.register_forward_hook(look)
    try:
        yield found
    finally:
        handle.remove()


def _found(output: Any) -> tuple[str, Tensor]:
    """The logits of an output that is no tensor, and where they stand in it, in words."""
    if isinstance(output, Mapping):
        for name in NAMES:
            if isinstance(output.get(name), Tensor):
                return repr(name), output[name]
        tensors = [(repr(key), value) for key, value in output.items() if isinstance(value, Tensor)]
        if len(tensors) == 1:
            return tensors[0]
    elif isinstance(getattr(output, "logits", None), Tensor):
        return "its field 'logits'", output.logits
    elif isinstance(output, (tuple, list)):
        rows = [(place, item) for place, item in enumerate(output) if isinstance(item, Tensor) and item.dim() == 2]
        if rows and all(item.shape == rows[0][1].shape for _, item in rows):
            place, item = rows[0]
            return _ITEMS.get(place, f"its item {place}"), item
    if not isinstance(output, (tuple, list, Mapping)):
        raise HoldfastError(
            f"the model returned {_named(output)} instead of logits (B, K): return one row of logits an image"
        )
    raise HoldfastError(
        f"the model returned {_named(output)}{_shapes(output)} instead of logits (B, K), and which of it are the logits"
        " is not clear: return the logits alone, or a mapping with 'logits'"
    )


_ITEMS = {0: "its first item", 1: "its second item", 2: "its third item"}


def _named(output: Any) -> str:
    kind = type(output).__name__
    article = "an" if kind[0] in "AEIOU" else "a"
    return f"{article} {kind}" + (f" of {len(output)}" if isinstance(output, (tuple, list, Mapping)) else "")


def _shapes(output: Any) -> str:
    """Of the first few tensors in a tuple, a list or a mapping."""
    if isinstance(output, Mapping):
        found = [f"{key!r} {_shape(value)}" for key, value in output.items()]
    else:
        found = [_shape(value) for value in output]
    return f" ({', '.join(found[:4])}{' …' if len(found) > 4 else ''})"


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
