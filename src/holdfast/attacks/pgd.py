"""PGD: projected gradient descent."""

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
    loss_of_rows,
    require_steepest,
)
from holdfast.errors import HoldfastError
from holdfast.forward import Attacked, Batch, Statistics, View
from holdfast.functional import correct, misclassified
from holdfast.keyed_random import Key, normal
from holdfast.schedule import Progress, Scalar, as_scalar, value_at
from holdfast.threat import ThreatModel

NORMAL_START = 0.001


@dataclass(frozen=True, kw_only=True)
class PGD:
    r"""Projected gradient descent: repeated steps uphill, each projected back into the ball.

    .. math:: x^{t+1} = \Pi_{B(x)}\bigl(x^t + \alpha\, s(\nabla_{x^t} \ell(f(x^t), y))\bigr)

    with :math:`s` the sign for Linf and the gradient divided by its length for L2.

    Args:
        steps: K >= 0.
        step_size: α in pixel scale, or a schedule; None is a quarter of epsilon (2/255 at 8/255).
        random_start: Begin at a uniform point of the ball (true), at x (false), or at x plus normal noise of standard
            deviation 0.001 (``"normal"``, as the code of TRADES, MART and ALP does).
        restarts: Independent searches; every row keeps the one whose last point has the largest loss, and with
            `early_stop` one that is misclassified before any that is not.
        early_stop: None, or the number τ of misclassified points from which a row still takes a step (0: it stops at
            the first), or a schedule of it (FAT). Without BatchNorm's batch statistics, rows that have stopped are no
            longer computed.
        step_noise: Standard deviation of normal noise added to every step before it is projected (FAT's ω), or a
            schedule.
        statistics: How BatchNorm normalises during the search; see `View`.

    Shapes:
        x: (B, C, H, W); steps_survived: (B,) in 0 … K, over all points at which a gradient was taken.
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: a setting is out of range, or the norm is L1.
    Source: Madry et al., ICLR 2018, arXiv:1706.06083, eq. in section 2.1.
    Differs from the reference: noise is keyed by seed, epoch and image, not drawn from a sequence.

    Example:
        >>> from holdfast.functional import cross_entropy
        >>> from holdfast.threat import Linf
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> batch = Batch(torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]))
        >>> found = PGD(steps=3)(View(model), batch, lambda f: cross_entropy(f, batch.y), threat=Linf(0.1))
        >>> bool(Linf(0.1).contains(found.x_adv, batch.x).all())
        True
    """

    steps: int = 10
    step_size: Scalar | str | None = None
    random_start: bool | Literal["normal"] = True
    restarts: int = 1
    early_stop: Scalar | None = None
    step_noise: Scalar = 0.0
    statistics: Statistics = "eval"

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", checked_step_size(self.step_size))
        for name, least in (("steps", 0), ("restarts", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise HoldfastError(f"{name} is {value!r}: give a whole number of at least {least}")
        if self.early_stop is not None:
            object.__setattr__(self, "early_stop", as_scalar("early_stop", self.early_stop, minimum=0))
        object.__setattr__(self, "step_noise", as_scalar("step_noise", self.step_noise, minimum=0))
        if self.random_start not in (True, False, "normal"):
            raise HoldfastError(f"random_start is {self.random_start!r}: use true, false or normal")
        checked_statistics(self.statistics)

    def passes(self) -> float:
        """K forwards and K backwards to the input for each restart; choosing between restarts takes one more forward.

        With `early_stop` this is the most it can cost.
        """
        return self.restarts * (2.0 * self.steps + (1.0 if self.restarts > 1 else 0.0))

    def __call__(
        self,
        view: View,
        batch: Batch,
        inner_loss: InnerLoss,
        *,
        threat: ThreatModel,
        progress: Progress | None = None,
    ) -> Attacked:
        require_steepest(threat, "PGD")
        progress = progress or Progress()
        view = view.running(self.statistics).detached()
        key = draw_key("attack start", batch, progress)
        best = self._search(view, batch, inner_loss, threat, progress, key.fold(0))
        if self.restarts == 1:
            return best
        best_wrong, best_loss = self._rank(view, batch, inner_loss, best)
        for restart in range(1, self.restarts):
            found = self._search(view, batch, inner_loss, threat, progress, key.fold(restart))
            wrong, loss = self._rank(view, batch, inner_loss, found)
            better = (wrong & ~best_wrong) | ((wrong == best_wrong) & (loss > best_loss))
            best = Attacked(
                torch.where(better.view(-1, 1, 1, 1), found.x_adv, best.x_adv),
                torch.where(better, found.steps_survived, best.steps_survived),
                self.steps,
            )
            best_wrong, best_loss = torch.where(better, wrong, best_wrong), torch.where(better, loss, best_loss)
        return best

    @torch.no_grad()
    def _rank(self, view: View, batch: Batch, inner_loss: InnerLoss, found: Attacked) -> tuple[Tensor, Tensor]:
        """What restarts are compared by: whether the last point is misclassified (early stop only), then its loss."""
        logits = view(found.x_adv).logits
        wrong = misclassified(logits, batch.y)
        return wrong if self.early_stop is not None else torch.zeros_like(wrong), inner_loss(logits)

    def _start(self, x: Tensor, batch: Batch, threat: ThreatModel, key: Key) -> Tensor:
        """The first iterate."""
        if self.random_start == "normal":
            noise = normal(key, batch.rows, x.shape[1:], dtype=x.dtype)
            return threat.project(x + NORMAL_START * noise, x)
        return threat.random_point(x, key, batch.rows) if self.random_start else x.clone()

    def _search(
        self, view: View, batch: Batch, inner_loss: InnerLoss, threat: ThreatModel, progress: Progress, key: Key
    ) -> Attacked:
        """One restart."""
        step_size = threat.epsilon / 4 if self.step_size is None else value_at(self.step_size, progress)  # type: ignore[arg-type]  # no text
        noise = value_at(self.step_noise, progress)
        patience = None if self.early_stop is None else round(value_at(self.early_stop, progress))
        x, y = batch.x.detach(), batch.y

        def stepped(x_adv: Tensor, gradient: Tensor, rows: Tensor | None, number: int) -> Tensor:
            """The next iterate, of all rows or of some."""
            moved = x_adv + step_size * threat.steepest(gradient)
            index, origin = (batch.rows, x) if rows is None else (batch.rows[rows], x[rows])
            if noise > 0:
                moved = moved + noise * normal(key.fold("step noise", number), index, x.shape[1:], dtype=x.dtype)
            return threat.project(moved, origin)

        x_adv = self._start(x, batch, threat, key)
        survived = torch.zeros_like(y)
        left = torch.full_like(y, patience or 0)  # misclassified points from which a row still steps; -1: stopped
        for number in range(self.steps):
            if patience is None:
                gradient, logits = input_gradient(view, x_adv, inner_loss)
                survived += correct(logits, y)
                x_adv = stepped(x_adv, gradient, None, number)
                continue
            active = (left >= 0).nonzero()[:, 0]
            if len(active) == 0:
                break
            compact = self.statistics == "eval" and len(active) < len(y)
            rows = active if compact else torch.arange(len(y), device=y.device)
            loss = loss_of_rows(inner_loss, rows, len(y)) if compact else inner_loss
            gradient, logits = input_gradient(view, x_adv[rows], loss)
            right = torch.zeros_like(y, dtype=torch.bool).index_copy(0, rows, correct(logits, y[rows]))
            running = left >= 0
            survived += right & running
            left = torch.where(running & ~right, left - 1, left)
            move = (left >= 0)[rows].view(-1, 1, 1, 1)
            following = stepped(x_adv[rows], gradient, rows, number)
            x_adv = x_adv.index_copy(0, rows, torch.where(move, following, x_adv[rows]))
        return Attacked(x_adv.detach(), survived, self.steps)
