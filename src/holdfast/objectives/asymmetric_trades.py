"""Asym-TRADES: TRADES whose KL term leaves the clean prediction alone. Our own reading."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.attacks.base import InnerLoss
from holdfast.errors import HoldfastError
from holdfast.forward import Batch, Forward, View
from holdfast.functional import cross_entropy, kl
from holdfast.objectives.base import Objective, kl_to_clean
from holdfast.objectives.predictor import Predictor, check_ratio
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


class AsymmetricTRADES(Objective):
    r"""Asym-TRADES, in our own reading: the KL term moves the adversarial side only.

    .. math:: \mathrm{CE}(f(x), t) + w\,\mathrm{CE}(f(x'), t)
        + \beta\,\mathrm{KL}(\mathrm{sg}\,p(x)\,\|\,\mathrm{softmax}(h(f(x'))))

    The paper only mentions the method; which of these parts it has is not known, so each is an option. A split
    BatchNorm is the view transform `SplitBatchNorm`.

    Args:
        beta: β >= 0, or a schedule.
        adversarial_weight: w >= 0, or a schedule.
        detach_clean: Stop the gradient at the clean prediction; False gives TRADES.
        predictor: Put a `Predictor` h on the adversarial logits; otherwise h is the identity.
        predictor_ratio: Its bottleneck, as a share of K.

    Shapes:
        clean.logits, adv.logits: (B, K) before softmax; labels (B,) or soft (B, K). Terms: (B,).
    Units:
        Nats.
    Raises:
        HoldfastError: a weight is negative, or the predictor was not prepared.
    Source: mentioned in AR-AT, ICLR 2025, arXiv:2402.14648; no formula or code of it was found.
    Differs from the reference: unknown; this is our reading.

    Example:
        >>> AsymmetricTRADES().sides(Progress())
        ('clean', 'adv')
    """

    needs_random_start = True

    def __init__(
        self,
        *,
        beta: Scalar = 6.0,
        adversarial_weight: Scalar = 0.0,
        detach_clean: bool = True,
        predictor: bool = False,
        predictor_ratio: float = 0.25,
    ) -> None:
        super().__init__()
        self.beta = as_scalar("beta", beta, minimum=0)
        self.adversarial_weight = as_scalar("adversarial_weight", adversarial_weight, minimum=0)
        check_ratio(predictor_ratio)
        self.detach_clean, self.predictor, self.predictor_ratio = detach_clean, predictor, predictor_ratio
        self.head: Predictor | None = None
        self.zero_at_equality = () if predictor else ("kl",)
        self.couples_batch = predictor  # its BatchNorm

    def prepare(self, model: torch.nn.Module, x: Tensor, images: int = 0) -> None:
        if self.predictor and self.head is None:
            with torch.no_grad():
                classes = View(model)(x).logits.shape[1]
            self.head = Predictor(classes, self.predictor_ratio).to(x)

    @property
    def is_prepared(self) -> bool:
        return not self.predictor or self.head is not None

    def sides(self, progress: Progress) -> tuple[str, ...]:
        compared = value_at(self.beta, progress) > 0 or value_at(self.adversarial_weight, progress) > 0
        return ("clean", "adv") if compared else ("clean",)

    def inner_loss(self, view: View, batch: Batch, progress: Progress) -> InnerLoss:
        return kl_to_clean(view, batch)

    def inner_passes(self, progress: Progress) -> float:
        return 1.0

    def forward(self, f: Forward) -> dict[str, Tensor]:
        clean = f.outputs["clean"].logits
        terms = {"clean_ce": cross_entropy(clean, f.batch.labels)}
        if "adv" not in f.outputs:
            return terms
        adv = f.outputs["adv"].logits
        if not self.is_prepared:
            raise HoldfastError("the predictor is not built yet: call objective.prepare(model, x) once before training")
        moving = adv if self.head is None else self.head(adv)
        target = clean.detach() if self.detach_clean else clean
        adversarial_weight = value_at(self.adversarial_weight, f.progress)
        if adversarial_weight > 0:
            terms["adv_ce"] = adversarial_weight * cross_entropy(adv, f.batch.labels)
        return {**terms, "kl": value_at(self.beta, f.progress) * kl(target, moving)}
