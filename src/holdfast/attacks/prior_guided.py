"""FGSM-PGI's attack: one step from the perturbation that the image had in the epoch before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast import distributed
from holdfast.attacks.base import (
    AttackWithMemory,
    InnerLoss,
    checked_statistics,
    checked_step_size,
    input_gradient,
)
from holdfast.attacks.fgsm import signs
from holdfast.errors import HoldfastError
from holdfast.forward import Attacked, Batch, Statistics, View
from holdfast.functional import correct
from holdfast.keyed_random import Key
from holdfast.schedule import Progress, Scalar, as_scalar, value_at
from holdfast.threat import ThreatModel


class PriorGuidedFGSM(AttackWithMemory):
    r"""FGSM-PGI (FGSM-MEP): FGSM from a perturbation remembered for every image and moved by momentum.

    .. math:: g = \nabla_x \ell(f(x + \eta_i), y), \quad x' = \Pi(x + \eta_i + \epsilon\,\mathrm{sign}\,g), \quad
        m_i \leftarrow \mu m_i + \frac{g}{\|g\|_1}, \quad \eta_i \leftarrow \Pi(\eta_i + \epsilon\,\mathrm{sign}\,m_i)

    with :math:`\|g\|_1` over the whole batch, on all processes. Memories begin at :math:`\epsilon\,\mathrm{sign}\,u`, u
    uniform in [-1, 1], and begin anew every `reset_every` epochs.

    Args:
        momentum: μ >= 0; 0.3 in the paper.
        reset_every: Epochs after which memories begin anew; 40 of 110 for CIFAR-10, 10 for CIFAR-100.
        step_size: Length of both steps in pixel scale, or a schedule; None is epsilon.
        statistics: How BatchNorm normalises during the search; see `View`.

    Shapes:
        x: (B, C, H, W). `Attacked.others` holds the start as "adv_prior". Buffers: prior, moment (N, C, H, W), a row
        an image: twice the training set in float32.
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: a setting is out of range, the norm is not Linf, images have no index, or `prepare` was not
            called.
    Source: Jia et al., ECCV 2022 (Prior-Guided Adversarial Initialization for Fast Adversarial Training),
        arXiv:2207.08859. Reference code: jiaxiaojunQAQ/FGSM-PGI.
    Differs from the reference: running statistics of BatchNorm by default; the start is clamped to the pixel bounds,
        there not. As there, the remembered perturbation does not move with the image's random crop and flip.

    Example:
        >>> PriorGuidedFGSM().passes()
        2.0
    """

    steps = 1
    makes = ("adv_prior",)
    prior: Tensor
    moment: Tensor
    born: Tensor
    written: Tensor

    def __init__(
        self,
        *,
        momentum: Scalar = 0.3,
        reset_every: int = 40,
        step_size: Scalar | str | None = None,
        statistics: Statistics = "eval",
    ) -> None:
        super().__init__()
        self.momentum = as_scalar("momentum", momentum, minimum=0)
        if isinstance(reset_every, bool) or not isinstance(reset_every, int) or reset_every < 1:
            raise HoldfastError(f"reset_every is {reset_every!r}: give a whole number of epochs, 1 or more")
        self.reset_every = reset_every
        self.step_size = checked_step_size(step_size)
        self.statistics: Statistics = checked_statistics(statistics)
        for name in ("prior", "moment", "born", "written"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.bool if name == "written" else torch.float32))

    def prepare(self, model: nn.Module, x: Tensor, images: int) -> None:
        self.prior = torch.zeros(images, *x.shape[1:], device=x.device)
        self.moment = torch.zeros_like(self.prior)
        self.born = torch.full((images,), -1.0, device=x.device)  # the period in which the memory began
        self.written = torch.zeros(images, dtype=torch.bool, device=x.device)

    def passes(self) -> float:
        return 2.0

    def remembered(self, batch: Batch, threat: ThreatModel, progress: Progress) -> tuple[Tensor, Tensor]:
        """Perturbation and momentum of the batch's images; those that begin anew get a random sign and no momentum."""
        index, x = batch.rows, batch.x
        period = progress.epoch // self.reset_every
        key = Key(progress.seed).fold("prior", period)
        fresh = (self.born[index] != period).view(-1, 1, 1, 1)
        start = threat.epsilon * signs(key, index, x)
        prior = torch.where(fresh, start, self.prior[index].to(x.dtype))
        moment = torch.where(fresh, torch.zeros_like(x), self.moment[index].to(x.dtype))
        return prior, moment

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
            raise HoldfastError(f"FGSM-PGI has no step for {threat.norm}: use Linf")
        if batch.index is None or not self.prior.numel():
            raise HoldfastError(
                "FGSM-PGI remembers a perturbation for every image: call attack.prepare(model, x, images=N) once, and"
                " give batches their index"
            )
        distributed.require_rows("FGSM-PGI", batch.index, self.prior)
        progress = progress or Progress()
        view = view.running(self.statistics).detached()
        step_size = threat.epsilon if self.step_size is None else value_at(self.step_size, progress)
        x = batch.x.detach()
        prior, moment = self.remembered(batch, threat, progress)
        start = threat.clamp(x + prior)
        gradient, logits = input_gradient(view, start, inner_loss)
        x_adv = threat.project(x + prior + step_size * gradient.sign(), x)
        if self.training:
            length = distributed.total(gradient.abs().sum()).clamp_min(1e-12)
            moment = value_at(self.momentum, progress) * moment + gradient / length
            moved = threat.project(x + prior + step_size * moment.sign(), x) - x
            self.remember(batch.rows, moved, moment, progress.epoch // self.reset_every)
        return Attacked(x_adv.detach(), correct(logits, batch.y).long(), 1, {"adv_prior": start})

    @torch.no_grad()
    def remember(self, index: Tensor, prior: Tensor, moment: Tensor, period: int) -> None:
        """Keep them for the next time these images come."""
        self.prior[index] = prior.to(self.prior.dtype)
        self.moment[index] = moment.to(self.moment.dtype)
        self.born[index] = float(period)
        self.written[index] = True

    def after_epoch(self, progress: Progress) -> None:
        for memory in (self.prior, self.moment, self.born):
            distributed.merge_rows(memory, self.written.clone())
        self.written.zero_()
