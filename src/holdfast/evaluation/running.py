"""Running a network of a person's own, and saying in a line what it raised."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.forward import View


class CannotRun(HoldfastError):
    """The model raised an error of its own.

    Attributes:
        reason: The first line of it.
    """

    def __init__(self, x: Tensor, reason: str) -> None:
        super().__init__(
            f"the model cannot run on {len(x)} image{'s' * (len(x) > 1)} of shape {tuple(x.shape[1:])}: {reason};"
            " in evaluation mode it must take any number of them"
        )
        self.reason = reason


def logits_from(view: View, x: Tensor) -> Tensor:
    """Logits (R, K) of a view, which may write into the images.

    Raises:
        CannotRun: whatever the model's own code raises, but for errors of memory.
    """
    try:
        return view(x).logits
    except HoldfastError:
        raise
    except Exception as error:
        raise CannotRun(x, told(error)) from error


def told(error: Exception) -> str:
    """The first line of what a network's code raised; an error of memory is raised again."""
    if isinstance(error, CannotRun):
        return error.reason
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error):
        raise error
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]
