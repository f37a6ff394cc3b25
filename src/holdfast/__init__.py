"""Holdfast: train image classifiers that hold under attack, and measure honestly how well they hold.

The public names below are imported when they are first used, so that ``holdfast --help`` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from holdfast import recipes as recipes
    from holdfast.attacks.fgsm import FGSM as FGSM
    from holdfast.attacks.pgd import PGD as PGD
    from holdfast.averages.ema import EMA as EMA
    from holdfast.averages.interpolation import Interpolation as Interpolation
    from holdfast.averages.swa import SWA as SWA
    from holdfast.data.sources import load as load_data
    from holdfast.errors import HoldfastError as HoldfastError
    from holdfast.evaluation.accuracy import evaluate as evaluate
    from holdfast.forward import Batch as Batch
    from holdfast.forward import View as View
    from holdfast.models.factory import build as build_model
    from holdfast.objectives.adversarial_training import AdversarialTraining as AdversarialTraining
    from holdfast.objectives.asymmetric_invariance import AsymmetricInvariance as AsymmetricInvariance
    from holdfast.objectives.asymmetric_trades import AsymmetricTRADES as AsymmetricTRADES
    from holdfast.objectives.base import Objective as Objective
    from holdfast.objectives.logit_pairing import LogitPairing as LogitPairing
    from holdfast.objectives.logit_stability import LogitStability as LogitStability
    from holdfast.objectives.mart import MART as MART
    from holdfast.objectives.normalized_mse import NormalizedMSE as NormalizedMSE
    from holdfast.objectives.squared_probabilities import SquaredProbabilities as SquaredProbabilities
    from holdfast.objectives.standard import StandardTraining as StandardTraining
    from holdfast.objectives.trades import TRADES as TRADES
    from holdfast.recipe import Recipe as Recipe
    from holdfast.runs.export import load_model as load_model
    from holdfast.schedule import Progress as Progress
    from holdfast.schedule import Schedule as Schedule
    from holdfast.setup import Settings as Settings
    from holdfast.step import AdversarialStep as AdversarialStep
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
    "evaluate": ("evaluation.accuracy", "evaluate"),
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
    "Settings": ("setup", "Settings"),
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
}

__all__ = [  # noqa: RUF022 - in the order of use, not of the alphabet
    "fit",
    "recipes",
    "load_data",
    "load_model",
    "build_model",
    "evaluate",
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
