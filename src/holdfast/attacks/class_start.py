"""LIET's attack: one step from a start that mixes noise with what raises the loss of the label on an empty image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast import distributed
from holdfast.attacks.base import AttackWithMemory, InnerLoss, checked_statistics, draw_key, input_gradient
from holdfast.errors import HoldfastError
from holdfast.forward import Attacked, Batch, Statistics, View
from holdfast.functional import correct, cross_entropy
from holdfast.keyed_random import uniform
from holdfast.schedule import Progress
from holdfast.threat import ThreatModel


class ClassStartFGSM(AttackWithMemory):
    r"""LIET: FGSM from :math:`x_0 = x \pm \delta_0`, where :math:`\delta_0` mixes noise with a pattern of the class.

    .. math:: x' = \Pi\bigl(x_0 + \epsilon\,\mathrm{sign}(\nabla \ell(f(x_0), y))\bigr), \qquad
        \delta_0 = \begin{cases} \epsilon\,\mathrm{sign}\bigl(\nabla_z \mathrm{CE}(f(z), y)\bigr)_{z = 1/2}
        & u > \rho \\ \mathcal U(-\epsilon, \epsilon) & \text{otherwise} \end{cases}

    pixel by pixel, with u uniform in [0, 1], and ρ uniform in `noise_share` and the sign ± drawn once a step.

    Args:
        period: Steps after which the patterns of the classes are computed anew; 20 in the paper's code, 10 in its
            configuration for CIFAR-10.
        noise_share: Least and largest ρ; 0.1 and 0.5 in the paper's code.
        wide: Draw the noise from twice the radius and leave x' unprojected, as the paper's code does above 8/255; the
            recipe's `train_ball` must then be ``"unbounded"``.
        statistics: How BatchNorm normalises during the search; see `View`. The patterns use running statistics.

    Shapes:
        x: (B, C, H, W). `Attacked.others` holds the start as "adv_start". Buffer: patterns (K, C, H, W).
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: a setting is out of range, the norm is not Linf, or `prepare` was not called.
    Source: LIET, ICCV 2025. Reference code: fzjcdt/LIET.
    Differs from the reference: the patterns climb cross-entropy against hard labels; there against randomly smoothed
        ones. Running statistics of BatchNorm by default.

    Example:
        >>> ClassStartFGSM().passes()
        2.0
    """

    steps = 1
    makes = ("adv_start",)
    patterns: Tensor
    age: Tensor

    def __init__(
        self,
        *,
        period: int = 20,
        noise_share: tuple[float, float] = (0.1, 0.5),
        wide: bool = False,
        statistics: Statistics = "eval",
    ) -> None:
        super().__init__()
        if isinstance(period, bool) or not isinstance(period, int) or period < 1:
            raise HoldfastError(f"period is {period!r}: give a whole number of steps, 1 or more")
        if len(noise_share) != 2 or not 0 <= noise_share[0] <= noise_share[1] <= 1:
            raise HoldfastError(f"noise_share is {noise_share!r}: give the least and the largest share, 0 … 1")
        self.period, self.wide = period, wide
        self.noise_share = (float(noise_share[0]), float(noise_share[1]))
        self.statistics: Statistics = checked_statistics(statistics)
        self.register_buffer("patterns", torch.zeros(0))
        self.register_buffer("age", torch.tensor(-1, dtype=torch.int64))  # the step of the patterns; -1: none yet

    def prepare(self, model: nn.Module, x: Tensor, images: int) -> None:
        with torch.no_grad():
            classes = View(model)(x[:2]).logits.shape[1]
        self.patterns = torch.zeros(classes, *x.shape[1:], device=x.device)

    def passes(self) -> float:
        """One forward and one backward; the patterns add a batch of K images every `period` steps."""
        return 2.0

    def refresh(self, view: View, x: Tensor, threat: ThreatModel, step: int) -> Tensor:
        """The patterns that hold now, computed anew where they are due."""
        due = step % self.period == 0 or int(self.age) < 0
        if not due or (not self.training and int(self.age) >= 0):
            return self.patterns
        labels = torch.arange(len(self.patterns), device=x.device)
        empty = torch.full_like(self.patterns, 0.5, dtype=x.dtype)
        gradient, _ = input_gradient(view.running("eval"), empty, lambda logits: cross_entropy(logits, labels))
        patterns = threat.epsilon * gradient.sign().to(self.patterns.dtype)
        if self.training:
            self.patterns.copy_(patterns)
            self.age.fill_(step)
        return patterns

    def forward(
        self,
        view: View,
        batch: Batch,
        inner_loss: InnerLoss,
        *,
        threat: ThreatModel,
        progress: Progress | None = None,
    ) -> Attacked:
        if threat.norm != "Linf":
            raise HoldfastError(f"LIET's attack has no step for {threat.norm}: use Linf")
        if not self.patterns.numel():
            raise HoldfastError("LIET's attack keeps a pattern for every class: call attack.prepare(model, x, 0) once")
        progress = progress or Progress()
        view = view.running(self.statistics).detached()
        x = batch.x.detach()
        patterns = self.refresh(view, x, threat, progress.step)
        x0 = threat.clamp(x + self.start(patterns, batch, threat, progress))
        gradient, logits = input_gradient(view, x0, inner_loss)
        moved = x0 + threat.epsilon * gradient.sign()
        x_adv = threat.clamp(moved) if self.wide else threat.project(moved, x)
        return Attacked(x_adv.detach(), correct(logits, batch.y).long(), 1, {"adv_start": x0})

    def start(self, patterns: Tensor, batch: Batch, threat: ThreatModel, progress: Progress) -> Tensor:
        """± δ0 of every image."""
        x, key = batch.x, draw_key("attack start", batch, progress)
        once = torch.zeros(1, dtype=torch.int64, device=x.device)
        share, sign = uniform(progress.key("class start").fold(progress.step), once, (2,), dtype=x.dtype)[0]
        least, most = self.noise_share
        radius = threat.epsilon * (2 if self.wide else 1)
        noise = radius * (2 * uniform(key.fold("noise"), batch.rows, x.shape[1:], dtype=x.dtype) - 1)
        noisy = uniform(key.fold("mask"), batch.rows, x.shape[1:], dtype=x.dtype) < least + (most - least) * share
        delta = torch.where(noisy, noise, patterns[batch.y].to(x.dtype))
        return torch.where(sign < 0.5, -delta, delta)

    def after_epoch(self, progress: Progress) -> None:
        distributed.average_in_place([self.patterns])
