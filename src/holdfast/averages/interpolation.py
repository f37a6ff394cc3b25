"""PIAT: interpolation of parameters between epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.averages.base import Average, floating_tensors, mixed
from holdfast.errors import HoldfastError
from holdfast.schedule import Progress, piat_lambda


class Interpolation(Average):
    r"""PIAT: at the end of each epoch the model becomes a mixture of itself and of what it was an epoch ago.

    .. math::
        \theta'_n = \lambda\,\theta'_{n-1} + (1 - \lambda)\,\theta_n, \qquad \lambda = g(n) = \frac{an + b}{cn + d}

    Training goes on from :math:`\theta'_n`. With a fixed λ this is Lookahead (Zhang et al., 2019) with one epoch as
    its period.

    Args:
        weight: A fixed λ in [0, 1] in place of g(n). 0 changes nothing, 1 never moves.
        coefficients: a, b, c, d of g.
        count_from: What n counts: ``"start"``, all epochs as Algorithm 1 does; ``"adversarial"``, epochs with an
            adversarial step in them, and no interpolation before the first.
        buffers: Floating-point BatchNorm buffers are interpolated like parameters (``"interpolate"``), left as they
            are (``"keep"``), or re-estimated on clean training images after the interpolation (``"reestimate"``).
            Integer buffers always keep their current value.
        period: Interpolate after so many steps instead of at the epoch's end; n then counts interpolations.
        scale_n: Count n as if the whole run had so many epochs (120 in the paper); None counts real ones.

    Shapes:
        Weights keep theirs.
    Units:
        None.
    Raises:
        HoldfastError: a setting is out of range.
    Source: PIAT, arXiv:2303.13955, eq. (3), (4) and Algorithm 1. No public code of the authors is known.
    Differs from the reference: the paper says nothing of BatchNorm buffers, of momentum (here: left alone) or of the
        warm-up; see `buffers` and `count_from`. `period` and `scale_n` are ours, for runs of few or short epochs.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> average = Interpolation(weight=0.75)
        >>> average.start(model)
        >>> _ = nn.init.ones_(model.weight)
        >>> average.after_epoch(model, Progress())
        >>> model.weight.item()
        0.25
    """

    writes_back = True

    def __init__(
        self,
        *,
        weight: float | None = None,
        coefficients: Sequence[float] = (1, 1, 1, 10),
        count_from: Literal["start", "adversarial"] = "start",
        buffers: Literal["interpolate", "keep", "reestimate"] = "interpolate",
        period: int | None = None,
        scale_n: float | None = None,
    ) -> None:
        if weight is not None and not 0 <= weight <= 1:
            raise HoldfastError(f"interpolation weight is {weight}: it is a share, give a number in [0, 1]")
        if len(coefficients) != 4 or not (coefficients[2] >= coefficients[0] and coefficients[3] >= coefficients[1]):
            raise HoldfastError(f"coefficients {tuple(coefficients)}: give a, b, c, d with c >= a and d >= b")
        for name, value, allowed in (
            ("count_from", count_from, ("start", "adversarial")),
            ("buffers", buffers, ("interpolate", "keep", "reestimate")),
        ):
            if value not in allowed:
                raise HoldfastError(f"{name} {value!r} is unknown: use one of {', '.join(allowed)}")
        if (period is not None and period < 1) or (scale_n is not None and scale_n <= 0):
            raise HoldfastError(f"period {period} and scale_n {scale_n} must be positive, or none")
        self.weight = weight
        self.coefficients = tuple(coefficients)
        self.count_from = count_from
        self.buffers = buffers
        self.period = period
        self.scale_n = scale_n
        self.reestimate = "clean" if buffers == "reestimate" else None
        self.interpolations = 0
        self.previous: dict[str, Tensor] = {}

    def start(self, model: nn.Module) -> None:
        self._remember(model)

    def _remember(self, model: nn.Module) -> None:
        tensors = floating_tensors(model, buffers=self.buffers == "interpolate")
        self.previous = {name: tensor.detach().clone() for name, tensor in tensors}

    def share_kept(self, progress: Progress) -> float | None:
        """λ at the coming interpolation, or None where there is none yet."""
        if self.count_from == "adversarial" and progress.adversarial_epochs == 0:
            return None
        if self.weight is not None:
            return self.weight
        n: float = progress.epoch + 1 if self.count_from == "start" else progress.adversarial_epochs
        if self.period is not None:
            n = self.interpolations + 1
        if self.scale_n is not None:
            unit = progress.epochs if self.period is None else progress.total_steps / self.period
            n *= self.scale_n / unit
        return piat_lambda(n, self.coefficients)

    @torch.no_grad()
    def _interpolate(self, model: nn.Module, progress: Progress) -> None:
        kept = self.share_kept(progress)
        if kept is not None:
            for name, tensor in floating_tensors(model, buffers=self.buffers == "interpolate"):
                tensor.copy_(mixed(self.previous[name], tensor, 1 - kept))
            self.interpolations += 1
        self._remember(model)

    def after_step(self, model: nn.Module, progress: Progress) -> None:
        if self.period is not None and (progress.step + 1) % self.period == 0:
            self._interpolate(model, progress)

    def after_epoch(self, model: nn.Module, progress: Progress) -> None:
        if self.period is None:
            self._interpolate(model, progress)

    def state_dict(self) -> dict[str, Any]:
        return {"previous": dict(self.previous), "interpolations": self.interpolations}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.previous = dict(state["previous"])
        self.interpolations = state["interpolations"]
