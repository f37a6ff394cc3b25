"""DKL and IKL: the KL pull taken apart into a weighted squared distance of logit differences and a cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast import distributed
from holdfast.attacks.base import InnerLoss
from holdfast.errors import HoldfastError
from holdfast.forward import Batch, Forward, View
from holdfast.functional import cross_entropy
from holdfast.objectives.base import Objective
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


class DecoupledKL(Objective):
    r"""IKL: clean cross-entropy, a squared distance of all logit differences, and a cross-entropy to clean predictions.

    .. math:: \mathrm{CE}(f(x), t) + \frac{\beta}{4} \sum_{j, k} w_j w_k
        \bigl((f_j(x) - f_k(x)) - (f_j(x') - f_k(x'))\bigr)^2
        - \alpha \sum_c \mathrm{sg}(p_c(x)) \log p_c(x')

    w is the mean softmax, at temperature T, of the clean images of the row's class during the previous epoch, 1 / K in
    the first: the class-wise weights that make DKL the improved one. Gradient flows through both sides of the distance.

    Args:
        alpha: α >= 0, or a schedule; 4 in the paper's scripts.
        beta: β >= 0, or a schedule; 20 there.
        attack_beta: β >= 0 of the loss that the attack climbs, in which α = 1: 0 in the scripts for CIFAR-10, 1 in
            those for CIFAR-100.
        temperature: T > 0 of the class means; 4 there.

    Shapes:
        clean.logits, adv.logits: (B, K) before softmax; labels (B,) or soft (B, K), which the clean cross-entropy
        alone reads. Terms: (B,). Buffers: class_means (K, K), a row a class.
    Units:
        Nats and squared logits.
    Raises:
        HoldfastError: a number is negative, temperature is not positive, or the objective is not prepared.
    Source: Cui et al., NeurIPS 2024, arXiv:2305.13948. Reference code: jiequancui/DKL.
    Differs from the reference: the sum over pairs is computed in O(K) for an image, not O(K²); a class that an epoch
        did not hold keeps its means; mixed images count for the class of the larger share; the attack's clean logits
        are computed once.

    Example:
        >>> DecoupledKL().sides(Progress())
        ('adv', 'clean')
    """

    needs_random_start = True
    zero_at_equality = ("distance",)
    class_means: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(
        self, *, alpha: Scalar = 4.0, beta: Scalar = 20.0, attack_beta: Scalar = 0.0, temperature: float = 4.0
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise HoldfastError(f"temperature is {temperature}: give a positive number, for example 4")
        self.alpha = as_scalar("alpha", alpha, minimum=0)
        self.beta = as_scalar("beta", beta, minimum=0)
        self.attack_beta = as_scalar("attack_beta", attack_beta, minimum=0)
        self.temperature = float(temperature)
        for name in ("class_means", "sums", "counts"):
            self.register_buffer(name, torch.zeros(0))

    @property
    def is_prepared(self) -> bool:
        return self.class_means.numel() > 0

    def prepare(self, model: nn.Module, x: Tensor, images: int = 0) -> None:
        with torch.no_grad():
            classes = View(model)(x).logits.shape[1]
        self.class_means = torch.full((classes, classes), 1 / classes, dtype=torch.float64, device=x.device)
        self.sums = torch.zeros_like(self.class_means)
        self.counts = torch.zeros(classes, dtype=torch.float64, device=x.device)

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("adv", "clean")

    def inner_loss(self, view: View, batch: Batch, progress: Progress) -> InnerLoss:
        with torch.no_grad():
            clean = view(batch.x).logits
        weight = self.class_means[batch.y].to(clean.dtype)
        p = clean.softmax(1)
        beta = value_at(self.attack_beta, progress)
        return lambda logits: beta / 4 * distance(clean, logits, weight) + cross_entropy(logits, p)

    def inner_passes(self, progress: Progress) -> float:
        return 1.0

    def forward(self, f: Forward) -> dict[str, Tensor]:
        clean, adv, y = f.outputs["clean"].logits, f.outputs["adv"].logits, f.batch.y
        weight = self.class_means[y].to(clean.dtype)
        if f.remember:
            self.remember(clean.detach(), y)
        return {
            "clean_ce": cross_entropy(clean, f.batch.labels),
            "distance": value_at(self.beta, f.progress) / 4 * distance(clean, adv, weight),
            "soft_ce": value_at(self.alpha, f.progress) * cross_entropy(adv, clean.softmax(1).detach()),
        }

    @torch.no_grad()
    def remember(self, logits: Tensor, y: Tensor) -> None:
        """Add these images to the class means of the next epoch."""
        p = (logits / self.temperature).softmax(1).to(self.sums.dtype)
        member = F.one_hot(y, len(self.counts)).to(p.dtype)
        self.sums += member.T @ p
        self.counts += member.sum(0)

    @torch.no_grad()
    def after_epoch(self, progress: Progress) -> None:
        """The means of the epoch's images, over all processes, become the weights of the next one."""
        sums, counts = distributed.total(self.sums), distributed.total(self.counts)
        seen = (counts > 0)[:, None]
        self.class_means.copy_(torch.where(seen, sums / counts.clamp_min(1)[:, None], self.class_means))
        self.sums.zero_()
        self.counts.zero_()


def distance(clean: Tensor, adv: Tensor, weight: Tensor) -> Tensor:
    r"""The weighted squared distance of all pairwise logit differences.

    .. math:: \sum_{j, k} w_j w_k (d_j - d_k)^2 =
        2\Bigl(\sum_j w_j \sum_j w_j d_j^2 - \bigl(\sum_j w_j d_j\bigr)^2\Bigr), \qquad d = f(x) - f(x')

    Shapes:
        All (B, K). Returns (B,).
    """
    total = weight.sum(1, keepdim=True)
    change = clean - adv
    centred = change - (weight * change).sum(1, keepdim=True) / total
    return 2 * total[:, 0] * (weight * centred.pow(2)).sum(1)
