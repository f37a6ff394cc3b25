"""The size of a network before it is allocated."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from holdfast.errors import HoldfastError
from holdfast.regular_files import readable_size

_SHARE_OF_MEMORY = 0.5


class _Unfilled(TorchFunctionMode):
    """Leaves tensors as they were made: what fills them in place does nothing, and draws no random numbers."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], Tensor):
            return args[0]
        return func(*args, **(kwargs or {}))


def shapes_of(make: Callable[[], nn.Module], label: str) -> dict[str, torch.Size]:
    """Return the shapes of a network's parameters and buffers without allocating them.

    Args:
        make: Makes the network; it may not look at values of tensors.
        label: What messages call it.
    Raises:
        HoldfastError: A tensor would have more bytes than can be counted; and what `make` refuses.
    Example:
        >>> shapes_of(lambda: nn.Linear(10**6, 10**6), "it")["weight"]
        torch.Size([1000000, 1000000])
    """
    try:
        with torch.device("meta"), _Unfilled():
            return {name: tensor.shape for name, tensor in make().state_dict().items()}
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise HoldfastError(f"{label} cannot be built ({reason}): give smaller sizes") from error


def require_memory(shapes: Mapping[str, torch.Size], label: str) -> None:
    """Refuse a network that takes more than half of the machine's memory in float32, gradients not counted.

    Raises:
        HoldfastError: says how large it would be.
    """
    count = sum(math.prod(shape) for shape in shapes.values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * count > _SHARE_OF_MEMORY * memory:
        raise HoldfastError(
            f"{label} would have {count:.3g} parameters, which take {readable_size(4 * count)}, and this machine has"
            f" {readable_size(memory)}: give smaller sizes"
        )
