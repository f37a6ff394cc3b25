"""Random state, training flags and gradients: left as they were; draws begun anew to compare two runs of a model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


def begin_draws(seed: int, device: torch.device) -> None:
    """Begin all draws anew: torch's on the CPU and the device, Python's and NumPy's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - what models use is the global generator
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def left_as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Training flags, gradients in ``.grad``, and the random state of torch, Python and NumPy."""
    flags = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    grads = [(parameter, parameter.grad, _copy(parameter.grad)) for parameter in model.parameters()]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - models may draw from it
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002 - as above
            for module, training in flags:
                module.training = training
            for parameter, grad, values in grads:
                parameter.grad = grad
                if grad is not None and values is not None:
                    with torch.no_grad():
                        grad.copy_(values)


def _copy(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.clone()
