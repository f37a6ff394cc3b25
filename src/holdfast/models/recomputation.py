"""Activation checkpointing (`torch.utils.checkpoint`), which a training step cannot take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch

from holdfast.errors import HoldfastError

_TOLD = (
    "the model uses torch.utils.checkpoint: its layers would be computed again after the step has put modes and weights"
    " back; switch activation checkpointing off, for example model.gradient_checkpointing_disable() or"
    " model.set_grad_checkpointing(False)"
)


@contextmanager
def recomputation_refused() -> Iterator[None]:
    """Refuse a network that would compute activations again in the backward.

    A step runs a network in other modes than its own, with other weights (AWP) and in other BatchNorm branches. All of
    that is put back after the forward, and the second computation, in the backward, would know nothing of it.

    Raises:
        HoldfastError: the block runs such a network with gradients. The kind with ``use_reentrant=True`` is noticed
            where a gradient with respect to the images is taken.
    Example:
        >>> with recomputation_refused():
        ...     loss = torch.nn.Linear(2, 2)(torch.zeros(1, 2)).sum()
    """
    with ExitStack() as stack:
        with suppress(RuntimeError):  # the caller has hooks of their own, such as save_on_cpu
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(_TOLD))
        stack.enter_context(_told())
        yield


@contextmanager
def _told() -> Iterator[None]:
    """Say what people know in place of torch's errors."""
    try:
        yield
    except RuntimeError as error:
        if _TOLD in str(error) or "use_reentrant=True" in str(error):
            raise HoldfastError(_TOLD) from error
        raise
