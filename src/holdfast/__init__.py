"""Holdfast: train image classifiers that hold under attack, and measure honestly how well they hold.

The public names below are imported when they are first used, so that ``holdfast --help`` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from holdfast import recipes as recipes
    from holdfast.attacks.apgd import APGD as APGD
    from holdfast.attacks.apgd_l1 import APGDL1 as APGDL1
    from holdfast.attacks.carlini_wagner import CarliniWagnerL2 as CarliniWagnerL2
    from holdfast.attacks.class_start import ClassStartFGSM as ClassStartFGSM
    from holdfast.attacks.collaborative import CollaborativePGD as CollaborativePGD
    from holdfast.attacks.fab import FAB as FAB
    from holdfast.attacks.fgsm import FGSM as FGSM
    from holdfast.attacks.iterative import IterativeGradient as IterativeGradient
    from holdfast.attacks.mim import MIM as MIM
    from holdfast.attacks.multi_targeted import MultiTargeted as MultiTargeted
    from holdfast.attacks.noise import UniformNoise as UniformNoise
    from holdfast.attacks.pgd import PGD as PGD
    from holdfast.attacks.prior_guided import PriorGuidedFGSM as PriorGuidedFGSM
    from holdfast.attacks.square import Square as Square
    from holdfast.attacks.transfer import Transfer as Transfer
    from holdfast.averages.ema import EMA as EMA
    from holdfast.averages.interpolation import Interpolation as Interpolation
    from holdfast.averages.swa import SWA as SWA
    from holdfast.data.idbh import IDBH as IDBH
    from holdfast.data.mixing import CutMix as CutMix
    from holdfast.data.mixing import MixUp as MixUp
    from holdfast.data.sources import load as load_data
    from holdfast.errors import HoldfastError as HoldfastError
    from holdfast.evaluation.networks import Speed as Speed
    from holdfast.evaluation.protocols import Options as Options
    from holdfast.evaluation.protocols import of_attacks as of_attacks
    from holdfast.evaluation.robustness import evaluate as evaluate
    from holdfast.evaluation.verified import recount as recount
    from holdfast.forward import Batch as Batch
    from holdfast.forward import View as View
    from holdfast.further_network import FurtherNetwork as FurtherNetwork
    from holdfast.models.factory import build as build_model
    from holdfast.objectives.adversarial_training import AdversarialTraining as AdversarialTraining
    from holdfast.objectives.asymmetric_invariance import AsymmetricInvariance as AsymmetricInvariance
    from holdfast.objectives.asymmetric_trades import AsymmetricTRADES as AsymmetricTRADES
    from holdfast.objectives.base import Objective as Objective
    from holdfast.objectives.boundary_guided import BoundaryGuided as BoundaryGuided
    from holdfast.objectives.consistency import Consistency as Consistency
    from holdfast.objectives.decoupled_kl import DecoupledKL as DecoupledKL
    from holdfast.objectives.distillation import Distillation as Distillation
    from holdfast.objectives.fisher_rao import FisherRaoMART as FisherRaoMART
    from holdfast.objectives.geometry_weighted import GeometryWeighted as GeometryWeighted
    from holdfast.objectives.guided_adversarial import GuidedAdversarial as GuidedAdversarial
    from holdfast.objectives.label_refinement import LabelRefinement as LabelRefinement
    from holdfast.objectives.logit_pairing import LogitPairing as LogitPairing
    from holdfast.objectives.logit_stability import LogitStability as LogitStability
    from holdfast.objectives.mart import MART as MART
    from holdfast.objectives.normalized_mse import NormalizedMSE as NormalizedMSE
    from holdfast.objectives.nuclear_norm import NuclearNorm as NuclearNorm
    from holdfast.objectives.one_vs_rest import OneVsRest as OneVsRest
    from holdfast.objectives.prior_guided import PriorGuided as PriorGuided
    from holdfast.objectives.squared_probabilities import SquaredProbabilities as SquaredProbabilities
    from holdfast.objectives.squeeze_training import SqueezeTraining as SqueezeTraining
    from holdfast.objectives.standard import StandardTraining as StandardTraining
    from holdfast.objectives.start_consistency import StartConsistency as StartConsistency
    from holdfast.objectives.trades import TRADES as TRADES
    from holdfast.recipe import Recipe as Recipe
    from holdfast.runs.export import load_model as load_model
    from holdfast.schedule import Progress as Progress
    from holdfast.schedule import Schedule as Schedule
    from holdfast.settings import Settings as Settings
    from holdfast.step import AdversarialStep as AdversarialStep
    from holdfast.steps.free import Free as Free
    from holdfast.steps.learnable_strategy import LearnableStrategy as LearnableStrategy
    from holdfast.threat import L1 as L1
    from holdfast.threat import L2 as L2
    from holdfast.threat import Linf as Linf
    from holdfast.train import fit as fit
    from holdfast.views.split_batchnorm import SplitBatchNorm as SplitBatchNorm
    from holdfast.views.worst_weights import WorstWeights as WorstWeights

_PLACES = {
    "FGSM": ("attacks.fgsm", "FGSM"),
    "PGD": ("attacks.pgd", "PGD"),
    "EMA": ("averages.ema", "EMA"),
    "Interpolation": ("averages.interpolation", "Interpolation"),
    "load_data": ("data.sources", "load"),
    "HoldfastError": ("errors", "HoldfastError"),
    "evaluate": ("evaluation.robustness", "evaluate"),
    "Batch": ("forward", "Batch"),
    "View": ("forward", "View"),
    "build_model": ("models.factory", "build"),
    "AdversarialTraining": ("objectives.adversarial_training", "AdversarialTraining"),
    "Objective": ("objectives.base", "Objective"),
    "NormalizedMSE": ("objectives.normalized_mse", "NormalizedMSE"),
    "SquaredProbabilities": ("objectives.squared_probabilities", "SquaredProbabilities"),
    "StandardTraining": ("objectives.standard", "StandardTraining"),
    "Recipe": ("recipe", "Recipe"),
    "load_model": ("runs.export", "load_model"),
    "Progress": ("schedule", "Progress"),
    "Schedule": ("schedule", "Schedule"),
    "Settings": ("settings", "Settings"),
    "AdversarialStep": ("step", "AdversarialStep"),
    "L1": ("threat", "L1"),
    "L2": ("threat", "L2"),
    "Linf": ("threat", "Linf"),
    "fit": ("train", "fit"),
    "WorstWeights": ("views.worst_weights", "WorstWeights"),
    "SplitBatchNorm": ("views.split_batchnorm", "SplitBatchNorm"),
    "SWA": ("averages.swa", "SWA"),
    "TRADES": ("objectives.trades", "TRADES"),
    "MART": ("objectives.mart", "MART"),
    "LogitStability": ("objectives.logit_stability", "LogitStability"),
    "LogitPairing": ("objectives.logit_pairing", "LogitPairing"),
    "AsymmetricTRADES": ("objectives.asymmetric_trades", "AsymmetricTRADES"),
    "AsymmetricInvariance": ("objectives.asymmetric_invariance", "AsymmetricInvariance"),
    "ClassStartFGSM": ("attacks.class_start", "ClassStartFGSM"),
    "CollaborativePGD": ("attacks.collaborative", "CollaborativePGD"),
    "PriorGuidedFGSM": ("attacks.prior_guided", "PriorGuidedFGSM"),
    "IDBH": ("data.idbh", "IDBH"),
    "CutMix": ("data.mixing", "CutMix"),
    "MixUp": ("data.mixing", "MixUp"),
    "FurtherNetwork": ("further_network", "FurtherNetwork"),
    "BoundaryGuided": ("objectives.boundary_guided", "BoundaryGuided"),
    "Consistency": ("objectives.consistency", "Consistency"),
    "DecoupledKL": ("objectives.decoupled_kl", "DecoupledKL"),
    "Distillation": ("objectives.distillation", "Distillation"),
    "FisherRaoMART": ("objectives.fisher_rao", "FisherRaoMART"),
    "GeometryWeighted": ("objectives.geometry_weighted", "GeometryWeighted"),
    "GuidedAdversarial": ("objectives.guided_adversarial", "GuidedAdversarial"),
    "LabelRefinement": ("objectives.label_refinement", "LabelRefinement"),
    "NuclearNorm": ("objectives.nuclear_norm", "NuclearNorm"),
    "OneVsRest": ("objectives.one_vs_rest", "OneVsRest"),
    "PriorGuided": ("objectives.prior_guided", "PriorGuided"),
    "SqueezeTraining": ("objectives.squeeze_training", "SqueezeTraining"),
    "StartConsistency": ("objectives.start_consistency", "StartConsistency"),
    "Free": ("steps.free", "Free"),
    "LearnableStrategy": ("steps.learnable_strategy", "LearnableStrategy"),
    "APGD": ("attacks.apgd", "APGD"),
    "APGDL1": ("attacks.apgd_l1", "APGDL1"),
    "CarliniWagnerL2": ("attacks.carlini_wagner", "CarliniWagnerL2"),
    "FAB": ("attacks.fab", "FAB"),
    "IterativeGradient": ("attacks.iterative", "IterativeGradient"),
    "MIM": ("attacks.mim", "MIM"),
    "MultiTargeted": ("attacks.multi_targeted", "MultiTargeted"),
    "UniformNoise": ("attacks.noise", "UniformNoise"),
    "Square": ("attacks.square", "Square"),
    "Transfer": ("attacks.transfer", "Transfer"),
    "Speed": ("evaluation.networks", "Speed"),
    "Options": ("evaluation.protocols", "Options"),
    "of_attacks": ("evaluation.protocols", "of_attacks"),
    "recount": ("evaluation.verified", "recount"),
}

__all__ = [  # noqa: RUF022 - in the order of use, not of the alphabet
    "fit",
    "recipes",
    "load_data",
    "load_model",
    "build_model",
    "evaluate",
    "recount",
    "Speed",
    "Options",
    "of_attacks",
    "Settings",
    "Recipe",
    "AdversarialStep",
    "Batch",
    "View",
    "Progress",
    "Schedule",
    "Linf",
    "L2",
    "L1",
    "PGD",
    "FGSM",
    "CollaborativePGD",
    "PriorGuidedFGSM",
    "ClassStartFGSM",
    "IterativeGradient",
    "MIM",
    "APGD",
    "APGDL1",
    "FAB",
    "Square",
    "MultiTargeted",
    "CarliniWagnerL2",
    "Transfer",
    "UniformNoise",
    "Free",
    "LearnableStrategy",
    "IDBH",
    "MixUp",
    "CutMix",
    "Objective",
    "StandardTraining",
    "AdversarialTraining",
    "NormalizedMSE",
    "LogitPairing",
    "TRADES",
    "MART",
    "SquaredProbabilities",
    "AsymmetricTRADES",
    "AsymmetricInvariance",
    "LogitStability",
    "BoundaryGuided",
    "Consistency",
    "DecoupledKL",
    "Distillation",
    "FisherRaoMART",
    "GeometryWeighted",
    "GuidedAdversarial",
    "LabelRefinement",
    "NuclearNorm",
    "OneVsRest",
    "PriorGuided",
    "SqueezeTraining",
    "StartConsistency",
    "FurtherNetwork",
    "WorstWeights",
    "SplitBatchNorm",
    "EMA",
    "SWA",
    "Interpolation",
    "HoldfastError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "recipes":
        return import_module("holdfast.recipes")
    if name not in _PLACES:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(f"holdfast.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__
