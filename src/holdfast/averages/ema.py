"""EMA: exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.averages.base import Average, mixed, saved_tensors
from holdfast.errors import HoldfastError
from holdfast.schedule import Progress

Buffers = Literal["average", "keep", "clean", "adversarial"]


class EMA(Average):
    r"""An exponential moving average of the weights over steps, kept as a shadow and exported.

    .. math:: \bar\theta_s = \tau_s\,\bar\theta_{s-1} + (1 - \tau_s)\,\theta_s, \qquad
        \tau_s = \min\left(\tau, \frac{1 + s}{10 + s}\right)

    Args:
        decay: τ in [0, 1); the fast-AT benchmark uses 0.9995.
        warm_up: Let τ grow with the number s of steps so far, so that a short run does not export its beginnings.
        buffers: BatchNorm's running statistics are averaged like parameters (``"average"``), taken from the model at
            export (``"keep"``), or re-estimated on ``"clean"`` or ``"adversarial"`` training images at every epoch's
            end. Integer buffers are always the model's.

    Shapes:
        Weights keep theirs.
    Units:
        None.
    Raises:
        HoldfastError: decay lies outside [0, 1), or an unknown word.
    Source: Wang and Wang (SEAT), ICLR 2022, arXiv:2203.09678; the baseline "with weight averaging" of
        arXiv:2604.22853.
    Differs from the reference: the benchmark does not warm τ up (`warm_up=False` repeats it).

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> average = EMA(decay=0.9)
        >>> average.start(model)
        >>> _ = nn.init.ones_(model.weight)
        >>> average.after_step(model, Progress())
        >>> round(average.exported()["weight"].item(), 4)
        0.9
    """

    def __init__(self, *, decay: float = 0.9995, warm_up: bool = True, buffers: Buffers = "average") -> None:
        if not 0 <= decay < 1:
            raise HoldfastError(f"EMA decay is {decay}: give a number in [0, 1), for example 0.9995")
        if buffers not in ("average", "keep", "clean", "adversarial"):
            raise HoldfastError(f"buffers {buffers!r} is unknown: use average, keep, clean or adversarial")
        self.decay = decay
        self.warm_up = warm_up
        self.buffers = buffers
        self.reestimate = buffers if buffers in ("clean", "adversarial") else None
        self.steps = 0
        self.shadow: dict[str, Tensor] = {}

    def start(self, model: nn.Module) -> None:
        self.shadow = {name: tensor.detach().clone() for name, tensor in saved_tensors(model).items()}

    @torch.no_grad()
    def after_step(self, model: nn.Module, progress: Progress) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.warm_up else self.decay
        parameters = dict(model.named_parameters(remove_duplicate=False))
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        for name, tensor in saved_tensors(model).items():
            if name in trained and tensor.is_floating_point():
                self.shadow[name].lerp_(tensor, 1 - decay)
            elif tensor.is_floating_point() and (name in parameters or self.buffers == "average"):
                self.shadow[name].copy_(mixed(self.shadow[name], tensor, 1 - decay))
            elif name in parameters or self.reestimate is None or not tensor.is_floating_point():
                self.shadow[name].copy_(tensor)
        self.steps += 1

    def exported(self) -> Mapping[str, Tensor]:
        return self.shadow

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": dict(self.shadow), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shadow = dict(state["shadow"])
        self.steps = state["steps"]
