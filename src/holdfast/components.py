"""The parts that a recipe is made of, by the names that configurations use."""

from __future__ import annotations

from typing import Any

from holdfast.attacks.class_start import ClassStartFGSM
from holdfast.attacks.collaborative import CollaborativePGD
from holdfast.attacks.fgsm import FGSM
from holdfast.attacks.pgd import PGD
from holdfast.attacks.prior_guided import PriorGuidedFGSM
from holdfast.averages.ema import EMA
from holdfast.averages.interpolation import Interpolation
from holdfast.averages.swa import SWA
from holdfast.data.idbh import IDBH
from holdfast.data.mixing import CutMix, MixUp
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.objectives.asymmetric_invariance import AsymmetricInvariance
from holdfast.objectives.asymmetric_trades import AsymmetricTRADES
from holdfast.objectives.boundary_guided import BoundaryGuided
from holdfast.objectives.consistency import Consistency
from holdfast.objectives.decoupled_kl import DecoupledKL
from holdfast.objectives.distillation import Distillation
from holdfast.objectives.fisher_rao import FisherRaoMART
from holdfast.objectives.geometry_weighted import GeometryWeighted
from holdfast.objectives.guided_adversarial import GuidedAdversarial
from holdfast.objectives.label_refinement import LabelRefinement
from holdfast.objectives.logit_pairing import LogitPairing
from holdfast.objectives.logit_stability import LogitStability
from holdfast.objectives.mart import MART
from holdfast.objectives.normalized_mse import NormalizedMSE
from holdfast.objectives.nuclear_norm import NuclearNorm
from holdfast.objectives.one_vs_rest import OneVsRest
from holdfast.objectives.prior_guided import PriorGuided
from holdfast.objectives.squared_probabilities import SquaredProbabilities
from holdfast.objectives.squeeze_training import SqueezeTraining
from holdfast.objectives.standard import StandardTraining
from holdfast.objectives.start_consistency import StartConsistency
from holdfast.objectives.trades import TRADES
from holdfast.steps.free import Free
from holdfast.steps.learnable_strategy import LearnableStrategy
from holdfast.views.split_batchnorm import SplitBatchNorm
from holdfast.views.worst_weights import WorstWeights

ATTACKS: dict[str, type[Any]] = {
    "pgd": PGD,
    "fgsm": FGSM,
    "collaborative_pgd": CollaborativePGD,
    "prior_guided_fgsm": PriorGuidedFGSM,
    "class_start_fgsm": ClassStartFGSM,
}
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
    "geometry_weighted": GeometryWeighted,
    "boundary_guided": BoundaryGuided,
    "consistency": Consistency,
    "squeeze_training": SqueezeTraining,
    "decoupled_kl": DecoupledKL,
    "label_refinement": LabelRefinement,
    "fisher_rao_mart": FisherRaoMART,
    "distillation": Distillation,
    "one_vs_rest": OneVsRest,
    "guided_adversarial": GuidedAdversarial,
    "nuclear_norm": NuclearNorm,
    "prior_guided": PriorGuided,
    "start_consistency": StartConsistency,
}
AVERAGES: dict[str, type[Any]] = {"interpolation": Interpolation, "ema": EMA, "swa": SWA}
AUGMENTATIONS: dict[str, type[Any]] = {"idbh": IDBH}
MIXINGS: dict[str, type[Any]] = {"mixup": MixUp, "cutmix": CutMix}
STEPS: dict[str, type[Any]] = {
    "free": Free,
    "learnable_strategy": LearnableStrategy,
}
VIEWS: dict[str, type[Any]] = {"worst_weights": WorstWeights, "split_batchnorm": SplitBatchNorm}
