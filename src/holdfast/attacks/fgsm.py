"""FGSM: the fast gradient sign method, and the one-step attacks that start elsewhere than at the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from holdfast.attacks.base import (
    InnerLoss,
    checked_statistics,
    checked_step_size,
    draw_key,
    input_gradient,
    require_steepest,
)
from holdfast.errors import HoldfastError
from holdfast.forward import Attacked, Batch, Statistics, View
from holdfast.functional import correct
from holdfast.keyed_random import Key, uniform
from holdfast.schedule import Progress, Scalar, as_scalar, value_at
from holdfast.threat import ThreatModel

Start = bool | Literal["bernoulli"]


@dataclass(frozen=True, kw_only=True)
class FGSM:
    r"""One step uphill, from the image or from a random point near it.

    .. math:: x' = \Pi_{B(x)}\bigl(x_0 + \alpha\,\mathrm{sign}(\nabla_{x_0} \ell(f(x_0), y))\bigr)

    For L2 the gradient divided by its length takes the sign's place (the fast gradient method). With a random start and
    α = 1.25 ε this is the attack of Fast-AT (FGSM-RS); with a start in the ball of twice the radius and without
    projection that of N-FGSM; with a Bernoulli start that of GAT and NuAT.

    Args:
        step_size: α in pixel scale, or a schedule; None is epsilon.
        random_start: Where :math:`x_0` lies: at x (false), uniform in the ball (true), or at x ± ε / 2 in every pixel
            (``"bernoulli"``, Linf only).
        start_scale: Radius of the ball in which a uniform start lies, in epsilons.
        project: Bring the result back into the ball; the pixel bounds hold in any case. The step projects it all the
            same unless the recipe's `train_ball` is ``"unbounded"``.
        statistics: How BatchNorm normalises during the search; see `View`.

    Shapes:
        x: (B, C, H, W); steps_survived: (B,) in {0, 1}. `Attacked.others` holds the start as "adv_start".
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: a setting is out of range, or the norm is L1.
    Source: Goodfellow et al., ICLR 2015, arXiv:1412.6572, section 4; Wong et al., ICLR 2020, arXiv:2001.03994 (random
        start); de Jorge et al., NeurIPS 2022, arXiv:2202.01181 (N-FGSM).
    Differs from the reference: noise is keyed by seed, epoch and image.

    Example:
        >>> FGSM().passes()
        2.0
    """

    step_size: Scalar | str | None = None
    random_start: Start = False
    start_scale: Scalar = 1.0
    project: bool = True
    statistics: Statistics = "eval"

    steps = 1
    makes = ("adv_start",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", checked_step_size(self.step_size))
        object.__setattr__(self, "start_scale", as_scalar("start_scale", self.start_scale, minimum=0))
        if self.random_start not in (True, False, "bernoulli"):
            raise HoldfastError(f"random_start is {self.random_start!r}: use true, false or bernoulli")
        checked_statistics(self.statistics)

    def passes(self) -> float:
        """One forward and one backward to the input."""
        return 2.0

    def start(self, batch: Batch, threat: ThreatModel, progress: Progress) -> Tensor:
        """The point at which the gradient is taken."""
        x, key = batch.x.detach(), draw_key("attack start", batch, progress).fold(0)
        if self.random_start == "bernoulli":
            if threat.norm != "Linf":
                raise HoldfastError(f"a Bernoulli start is for Linf, not {threat.norm}: use --attack.random_start true")
            return threat.clamp(x + threat.epsilon / 2 * signs(key, batch.rows, x))
        if not self.random_start:
            return x.clone()
        scale = value_at(self.start_scale, progress)
        ball = threat if scale == 1 else threat.with_epsilon(scale * threat.epsilon)
        return ball.random_point(x, key, batch.rows)

    def __call__(
        self,
        view: View,
        batch: Batch,
        inner_loss: InnerLoss,
        *,
        threat: ThreatModel,
        progress: Progress | None = None,
    ) -> Attacked:
        require_steepest(threat, "FGSM")
        progress = progress or Progress()
        view = view.running(self.statistics).detached()
        step_size = threat.epsilon if self.step_size is None else value_at(self.step_size, progress)  # type: ignore[arg-type]  # no text
        x0 = self.start(batch, threat, progress)
        gradient, logits = input_gradient(view, x0, inner_loss)
        moved = x0 + step_size * threat.steepest(gradient)
        x_adv = threat.project(moved, batch.x.detach()) if self.project else threat.clamp(moved)
        return Attacked(x_adv.detach(), correct(logits, batch.y).long(), 1, {"adv_start": x0})


def signs(key: Key, index: Tensor, like: Tensor) -> Tensor:
    """+1 or -1 with equal probability for every element, keyed.

    Shapes:
        index: (B,); like: (B, ...). Returns the shape and type of `like`.
    """
    drawn = uniform(key, index, like.shape[1:], dtype=like.dtype)
    return torch.where(drawn < 0.5, -torch.ones_like(drawn), torch.ones_like(drawn))
