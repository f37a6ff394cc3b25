"""SWA: stochastic weight averaging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.averages.base import Average, mixed, saved_tensors
from holdfast.errors import HoldfastError
from holdfast.schedule import Progress


class SWA(Average):
    r"""The equal-weight mean of the weights at regular moments of the run's later part, kept as a shadow and exported.

    .. math:: \bar\theta_k = \bar\theta_{k-1} + \frac{1}{k}\,(\theta_k - \bar\theta_{k-1})

    Nothing is exported before the first of these moments.

    Args:
        begin: Share of the run in [0, 1) after which averaging begins.
        period: Steps between averagings, counted from the run's start; None for every epoch's end.
        buffers: BatchNorm's running statistics are averaged like parameters (``"average"``), taken from the model
            (``"keep"``), or re-estimated on ``"clean"`` or ``"adversarial"`` training images before every validation
            (split branches each on their own kind). Integer buffers are always the model's.
        images: How many training images the re-estimation sees; None for all.

    Shapes:
        Weights keep theirs.
    Units:
        None.
    Raises:
        HoldfastError: a setting is out of range.
    Source: Izmailov et al., UAI 2018, arXiv:1803.05407, algorithm 1; in adversarial training Chen et al., ICLR 2021;
        AR-AT, whose code averages every 500 steps and re-estimates on adversarial images.
    Differs from the reference: statistics are re-estimated before every validation, not once at the end.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = SWA(begin=0.0)
        >>> for value in (1.0, 2.0):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     average.after_epoch(model, Progress())
        >>> average.exported()["weight"].item()
        1.5
    """

    def __init__(
        self,
        *,
        begin: float = 0.5,
        period: int | None = None,
        buffers: Literal["average", "keep", "clean", "adversarial"] = "clean",
        images: int | None = None,
    ) -> None:
        if not 0 <= begin < 1:
            raise HoldfastError(f"SWA begin is {begin}: it is a share of the run, give a number in [0, 1)")
        for name, value in (("period", period), ("images", images)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise HoldfastError(f"SWA {name} is {value!r}: give a whole number of at least 1, or none")
        if buffers not in ("average", "keep", "clean", "adversarial"):
            raise HoldfastError(f"buffers {buffers!r} is unknown: use average, keep, clean or adversarial")
        self.begin, self.period, self.buffers, self.images = begin, period, buffers, images
        self.reestimate = buffers if buffers in ("clean", "adversarial") else None
        self.reestimate_images = images
        self.count = 0
        self.shadow: dict[str, Tensor] = {}

    @torch.no_grad()
    def _average(self, model: nn.Module, progress: Progress) -> None:
        if (progress.step + 1) / max(1, progress.total_steps) <= self.begin + 1e-9:
            return
        self.count += 1
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name, tensor in saved_tensors(model).items():
            if name not in self.shadow:
                self.shadow[name] = tensor.detach().clone()
            elif tensor.is_floating_point() and (name in parameters or self.buffers == "average"):
                self.shadow[name].copy_(mixed(self.shadow[name], tensor, 1 / self.count))
            elif name in parameters or self.reestimate is None or not tensor.is_floating_point():
                self.shadow[name].copy_(tensor)

    def after_step(self, model: nn.Module, progress: Progress) -> None:
        if self.period is not None and (progress.step + 1) % self.period == 0:
            self._average(model, progress)

    def after_epoch(self, model: nn.Module, progress: Progress) -> None:
        if self.period is None:
            self._average(model, progress)

    def exported(self) -> Mapping[str, Tensor] | None:
        return self.shadow or None

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": dict(self.shadow), "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shadow = dict(state["shadow"])
        self.count = state["count"]
