"""The parts that a recipe is made of, by the names that configurations use."""

from __future__ import annotations

from typing import Any

from holdfast.attacks.fgsm import FGSM
from holdfast.attacks.pgd import PGD
from holdfast.averages.ema import EMA
from holdfast.averages.interpolation import Interpolation
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.objectives.normalized_mse import NormalizedMSE
from holdfast.objectives.standard import StandardTraining

ATTACKS: dict[str, type[Any]] = {"pgd": PGD, "fgsm": FGSM}
OBJECTIVES: dict[str, type[Any]] = {
    "standard": StandardTraining,
    "adversarial_training": AdversarialTraining,
    "normalized_mse": NormalizedMSE,
}
AVERAGES: dict[str, type[Any]] = {"interpolation": Interpolation, "ema": EMA}
VIEWS: dict[str, type[Any]] = {}  # the view transforms of methods that perturb weights or split BatchNorm
