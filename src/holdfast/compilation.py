"""Compiling a network in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import unknown_name


def require_backend(backend: str) -> None:
    """Refuse a backend that `torch.compile` does not know.

    Raises:
        HoldfastError: names the nearest.
    """
    known = torch._dynamo.list_backends(None)
    if backend not in known:
        raise unknown_name("compiler backend", backend, known)


def compile_in_place(model: nn.Module, backend: str = "inductor") -> None:
    """Compile a network's calls without renaming its parameters.

    `nn.Module.compile` does the same, but silently compiles nothing where the outermost module is one of torch's own
    containers (an `nn.Sequential`, for example), because torch's files are not traced as the outermost frame. Here the
    outermost frame is ours. The network is given a copy of its input there, into which it may write: inside the graph
    the copy is optimised away where nothing is written, and what enters the graph stays what the caller made, a leaf.

    Args:
        model: Changed in place.
        backend: A backend of `torch.compile`.

    Raises:
        HoldfastError: the backend is unknown.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> compile_in_place(model, backend="eager")
        >>> [name for name, _ in model.named_parameters()]
        ['0.weight', '0.bias']
    """
    require_backend(backend)
    # A forward with feature taps must not reuse the graph of one without: torch looks at hooks only if told to.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    call = model._call_impl

    def outermost(*arguments: Any, **keywords: Any) -> Any:
        return call(*(each.clone() if isinstance(each, Tensor) else each for each in arguments), **keywords)

    compiled = torch.compile(outermost, backend=backend)
    compiled.copies_input = True  # type: ignore[attr-defined]  # a function; `copies_input` below reads it
    model._compiled_call_impl = compiled  # type: ignore[assignment]  # what Module.compile sets


def copies_input(model: nn.Module) -> bool:
    """Return whether the network was compiled by `compile_in_place`, so that it never writes into what it is given."""
    return getattr(getattr(model, "_compiled_call_impl", None), "copies_input", False)
