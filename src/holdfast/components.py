"""The parts that a recipe is made of, by the names that configurations use."""

from __future__ import annotations

from typing import Any

from holdfast.attacks.fgsm import FGSM
from holdfast.attacks.pgd import PGD
from holdfast.averages.ema import EMA
from holdfast.averages.interpolation import Interpolation
from holdfast.averages.swa import SWA
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.objectives.asymmetric_invariance import AsymmetricInvariance
from holdfast.objectives.asymmetric_trades import AsymmetricTRADES
from holdfast.objectives.logit_pairing import LogitPairing
from holdfast.objectives.logit_stability import LogitStability
from holdfast.objectives.mart import MART
from holdfast.objectives.normalized_mse import NormalizedMSE
from holdfast.objectives.squared_probabilities import SquaredProbabilities
from holdfast.objectives.standard import StandardTraining
from holdfast.objectives.trades import TRADES
from holdfast.views.split_batchnorm import SplitBatchNorm
from holdfast.views.worst_weights import WorstWeights

ATTACKS: dict[str, type[Any]] = {"pgd": PGD, "fgsm": FGSM}
OBJECTIVES: dict[str, type[Any]] = {
    "standard": StandardTraining,
    "adversarial_training": AdversarialTraining,
    "normalized_mse": NormalizedMSE,
    "logit_pairing": LogitPairing,
    "trades": TRADES,
    "mart": MART,
    "squared_probabilities": SquaredProbabilities,
    "asymmetric_trades": AsymmetricTRADES,
    "asymmetric_invariance": AsymmetricInvariance,
    "logit_stability": LogitStability,
}
AVERAGES: dict[str, type[Any]] = {"interpolation": Interpolation, "ema": EMA, "swa": SWA}
VIEWS: dict[str, type[Any]] = {"worst_weights": WorstWeights, "split_batchnorm": SplitBatchNorm}
