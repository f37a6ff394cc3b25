"""AR-AT: adversarial features are drawn to clean ones that stand still."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.forward import Batch, Forward, View
from holdfast.functional import correct, cross_entropy, kl
from holdfast.models.taps import last_stage
from holdfast.objectives.base import Measurement, Objective, require_word
from holdfast.objectives.predictor import Predictor, check_ratio, is_channels_last, pooled_feature
from holdfast.schedule import Progress, Scalar, as_scalar, value_at


@torch.no_grad()
def clean_accuracy(view: View, batches: Iterable[Batch]) -> float:
    """Share of the images that the view classifies correctly."""
    right = total = 0
    for batch in batches:
        right += int(correct(view(batch.x).logits, batch.y).sum())
        total += len(batch.y)
    return right / max(1, total)


def two_weights(balance: object) -> tuple[float, float]:
    """The adversarial and the clean weight as numbers >= 0."""
    numbers = list(balance) if isinstance(balance, Sequence) and not isinstance(balance, str) else []
    if len(numbers) == 2 and all(isinstance(weight, int | float) and weight >= 0 for weight in numbers):
        return float(numbers[0]), float(numbers[1])
    raise HoldfastError(f"balance is {balance!r}: write measured, or two weights such as [1, 1]")


class AsymmetricInvariance(Objective):
    r"""AR-AT: two cross-entropies, and predicted adversarial features drawn to clean features that stand still.

    .. math:: a^p\,\mathrm{CE}(f(x'), t) + (1 - a)^p\,\mathrm{CE}(f(x), t)
        + \frac{\lambda}{|L|} \sum_{l \in L} \bigl[1 - \cos(h_l(z'_l), \mathrm{sg}\,z_l)\bigr]

    z is a layer's output after ReLU and pooling (`pooled_feature`), h_l its `Predictor`, a the clean accuracy of the
    clean branch at the epoch's start. With `SplitBatchNorm` the clean side has BatchNorms of its own.

    Args:
        strength: λ >= 0, or a schedule, shared by the layers; 30 for ResNet-18, 100 for WRN-34-10.
        layers: Names of the tapped modules, as `holdfast.models.taps.feature_names` lists them; None for the network's
            last stage (`last_stage`). A feature is what its layer returns, before a later layer changes it in place.
        distance: ``"cosine"``; ``"mse"``, mean over D; ``"kl"``, of softmaxes over D at `temperature`.
        direction: ``"asymmetric"``, the adversarial side moves; ``"reversed"``, the clean side; ``"symmetric"``, half
            the sum of both; ``"no_stop_gradient"``, both move towards each other at once.
        predictor: Put h on the moving side; False leaves features as they are.
        predictor_ratio: Bottleneck of h as a share of D.
        balance: ``"measured"``, or the two weights (adversarial, clean) as fixed numbers.
        balance_power: p > 0.
        temperature: Of ``"kl"``, > 0.

    Shapes:
        Logits: (B, K); features: (B, D, ...); labels (B,) or soft (B, K). Terms: (B,).
    Units:
        Nats for the cross-entropies; cosine distance lies in [0, 2].
    Raises:
        HoldfastError: a setting is out of range, `prepare` was not called, or the accuracy was not measured.
    Source: Waseda et al. (AR-AT), ICLR 2025, arXiv:2402.14648. Reference code: futakw/AR-AT.
    Differs from the reference: a correct attack around the clean image (its code's noise is `Recipe.input_noise`). Of
        the ablations, its code puts the predictor on the adversarial side only, leaves the reversed direction without a
        stop-gradient and ``"no_stop_gradient"`` without a predictor, and multiplies KL by T²; ours put h on whichever
        side moves.

    Example:
        >>> AsymmetricInvariance(balance=(1.0, 1.0)).sides(Progress())
        ('clean', 'adv')
    """

    measures = (Measurement("clean_accuracy", clean_accuracy, images=1024, side="clean"),)

    def __init__(
        self,
        *,
        strength: Scalar = 30.0,
        layers: Sequence[str] | None = None,
        distance: Literal["cosine", "mse", "kl"] = "cosine",
        direction: Literal["asymmetric", "reversed", "symmetric", "no_stop_gradient"] = "asymmetric",
        predictor: bool = True,
        predictor_ratio: float = 0.25,
        balance: Literal["measured"] | Sequence[float] = "measured",
        balance_power: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.strength = as_scalar("strength", strength, minimum=0)
        if layers is not None and (isinstance(layers, str) or not layers):
            raise HoldfastError(f"layers is {layers!r}: give a list of module names, or none for the last stage")
        self.layers = None if layers is None else tuple(layers)
        require_word("distance", distance, ("cosine", "mse", "kl"))
        require_word("direction", direction, ("asymmetric", "reversed", "symmetric", "no_stop_gradient"))
        check_ratio(predictor_ratio)
        self.balance = balance if balance == "measured" else two_weights(balance)
        if not (balance_power > 0 and temperature > 0):
            raise HoldfastError(f"balance_power {balance_power} and temperature {temperature} must be positive")
        self.distance, self.direction = distance, direction
        self.predictor, self.predictor_ratio = predictor, predictor_ratio
        self.balance_power, self.temperature = balance_power, temperature
        self.measures = type(self).measures if balance == "measured" else ()
        self.predictors = nn.ModuleList()
        self.taps = self.layers or ()
        self.channels_last: frozenset[str] = frozenset()
        self.zero_at_equality = () if predictor else ("invariance",)
        self.couples_batch = predictor  # its BatchNorm

    def prepare(self, model: nn.Module, x: Tensor, images: int = 0) -> None:
        self.taps = tuple(self.layers or last_stage(model))
        self.notes = ()
        if self.layers is None and not getattr(model, "last_stage", None):
            self.notes = (
                f"AR-AT reads {', '.join(self.taps)}, the last normalisation layers of this network:"
                " --objective.layers '[...]' names others",
            )
        with torch.no_grad():
            features = View(model, taps=self.taps)(x).features
        uncalled = [name for name in self.taps if name not in features]
        if uncalled:
            raise HoldfastError(
                f"the network never calls its layer {uncalled[0]!r}: name others with --objective.layers '[...]'"
            )
        self.channels_last = frozenset(
            name for name in self.taps if is_channels_last(model.get_submodule(name), features[name])
        )
        if self.predictor and not self.predictors:
            widths = [self.pooled(name, features).shape[1] for name in self.taps]
            self.predictors.extend(Predictor(width, self.predictor_ratio).to(x) for width in widths)

    def pooled(self, name: str, features: Mapping[str, Tensor]) -> Tensor:
        """The feature of a layer, (B, D)."""
        return pooled_feature(features[name], channels_last=name in self.channels_last)

    @property
    def is_prepared(self) -> bool:
        return bool(self.taps) and (not self.predictor or len(self.predictors) == len(self.taps))

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("clean", "adv")

    def weights(self, progress: Progress) -> tuple[float, float]:
        """The weights of the adversarial and the clean cross-entropy now."""
        if self.balance != "measured":
            return self.balance  # type: ignore[return-value]  # two numbers, checked above
        accuracy = progress.measured.get("clean_accuracy")
        if accuracy is None:
            raise HoldfastError(
                "AR-AT balances by the clean accuracy at the epoch's start: give Progress(measured={'clean_accuracy':"
                " …}), or set balance to two fixed weights"
            )
        return accuracy**self.balance_power, (1 - accuracy) ** self.balance_power

    def forward(self, f: Forward) -> dict[str, Tensor]:
        clean, adv = f.outputs["clean"], f.outputs["adv"]
        adversarial_weight, clean_weight = self.weights(f.progress)
        return {
            "adv_ce": adversarial_weight * cross_entropy(adv.logits, f.batch.labels),
            "clean_ce": clean_weight * cross_entropy(clean.logits, f.batch.labels),
            "invariance": value_at(self.strength, f.progress) * self.invariance(clean.features, adv.features),
        }

    def invariance(self, clean: Mapping[str, Tensor], adv: Mapping[str, Tensor]) -> Tensor:
        """The mean over the layers of the distance between the sides, (B,)."""
        if not self.is_prepared:
            raise HoldfastError("AR-AT is not prepared: call objective.prepare(model, x) once before training")
        distances = []
        for number, name in enumerate(self.taps):
            head = self.predictors[number] if self.predictor else nn.Identity()
            z, z_adv = self.pooled(name, clean), self.pooled(name, adv)
            if self.direction == "no_stop_gradient":
                distances.append(self.between(head(z_adv), z))
                continue
            moved = []
            if self.direction != "reversed":
                moved.append(self.between(head(z_adv), z.detach()))
            if self.direction != "asymmetric":
                moved.append(self.between(head(z), z_adv.detach()))
            distances.append(torch.stack(moved).mean(0))
        return torch.stack(distances).mean(0)

    def between(self, moving: Tensor, target: Tensor) -> Tensor:
        """The distance of two features, (B,)."""
        if self.distance == "mse":
            return (moving - target).pow(2).mean(1)
        if self.distance == "kl":
            return kl(target / self.temperature, moving / self.temperature)
        return 1 - F.cosine_similarity(moving, target, dim=1)
