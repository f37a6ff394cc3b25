"""KD: adversarial training that learns from two teachers, one trained on clean and one on adversarial images."""

from __future__ import annotations

from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.forward import Attacked, Batch, Forward
from holdfast.functional import cross_entropy, kl
from holdfast.objectives.base import Objective
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


class Distillation(Objective):
    r"""Cross-entropy, and distillation from a standard and a robust teacher, all on adversarial images.

    .. math:: (1 - \lambda_s - \lambda_r)\,\mathrm{CE}(f(x'), t)
        + T^2 \bigl(\lambda_s\,\mathrm{KL}(p^T_s(x')\,\|\,p^T(x'))
        + \lambda_r\,\mathrm{KL}(p^T_r(x')\,\|\,p^T(x'))\bigr)

    with :math:`p^T` the softmax of logits over T.

    Args:
        standard: λ of the teacher "standard_teacher" >= 0, or a schedule; 0.1 in the paper.
        robust: λ of the teacher "robust_teacher" >= 0, or a schedule; 0.6 in the paper.
        temperature: T > 0; 2 in the paper.

    Shapes:
        Logits of all three networks: (B, K) before softmax; labels (B,) or soft (B, K). Terms: (B,).
    Units:
        Nats.
    Raises:
        HoldfastError: a λ is negative, or temperature is not positive. Recipes without the teachers are refused.
    Source: Chen et al., ICLR 2021 (Robust Overfitting may be mitigated by properly learned smoothening).
        Reference code: VITA-Group/Alleviate-Robust-Overfitting.
    Differs from the reference: KL in place of soft cross-entropy: the same gradient, another value.

    Example:
        >>> Distillation().sides(Progress())
        ('adv', 'standard_teacher', 'robust_teacher')
    """

    needs_networks = ("standard_teacher", "robust_teacher")
    detached_sides = ("standard_teacher", "robust_teacher")

    def __init__(self, *, standard: Scalar = 0.1, robust: Scalar = 0.6, temperature: float = 2.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise HoldfastError(f"temperature is {temperature}: give a positive number, for example 2")
        self.standard = as_scalar("standard", standard, minimum=0)
        self.robust = as_scalar("robust", robust, minimum=0)
        self.temperature = float(temperature)

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("adv", "standard_teacher", "robust_teacher")

    def side_input(self, side: str, batch: Batch, attacked: Attacked | None) -> Tensor:
        return super().side_input("adv", batch, attacked)

    def forward(self, f: Forward) -> dict[str, Tensor]:
        adv, t = f.outputs["adv"].logits, self.temperature
        standard, robust = value_at(self.standard, f.progress), value_at(self.robust, f.progress)
        terms = {"adv_ce": (1 - standard - robust) * cross_entropy(adv, f.batch.labels)}
        for side, strength in (("standard_teacher", standard), ("robust_teacher", robust)):
            terms[side] = strength * t**2 * kl(f.outputs[side].logits / t, adv / t)
        return terms
