"""IDBH, alone and around AWP and ISEAT: augmentation that is harder and more varied than crop and flip."""

from __future__ import annotations

from dataclasses import replace

from holdfast.averages.ema import EMA
from holdfast.data.idbh import IDBH
from holdfast.recipe import Recipe
from holdfast.recipes.baselines import pgd_at
from holdfast.recipes.iseat import iseat
from holdfast.recipes.settings import Threat, is_wide
from holdfast.recipes.weight_perturbation import awp
from holdfast.views.worst_weights import WorstWeights


def idbh(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """IDBH around PGD-AT.

    ResNet-18: the strong version. Wide networks (WRN): the weak one, with an EMA of 0.999 whose BatchNorm is
    re-estimated on clean images. Schedule as `pgd_at`; for SVHN --augmentation.strength svhn.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name: wide networks get the weak version and the average.
        paper_settings: The attack starts at x and runs under batch statistics that are tracked, as in the paper's code.

    Source: Li and Spratling, ICLR 2023 (Data Augmentation Alone Can Improve Adversarial Training), arXiv:2301.09879.
        Reference code: TreeLLi/DA-Alone-Improves-AT.
    Differs from the reference: as `IDBH`; the attack's start and statistics unless `paper_settings`.
    """
    recipe = pgd_at(epsilon=epsilon, model=model, paper_settings=paper_settings)
    wide = is_wide(model)
    return replace(
        recipe,
        name="idbh",
        attack=replace(recipe.attack, random_start=not paper_settings),  # type: ignore[type-var]  # PGD, a dataclass
        augmentation=IDBH(strength="weak" if wide else "strong"),
        averages=(EMA(decay=0.999, warm_up=False, buffers="clean"),) if wide else (),
    )


def idbh_awp(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """IDBH around AWP.

    The weak version; otherwise `awp`.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: As in `awp`.

    Source: Li and Spratling, ICLR 2023, arXiv:2301.09879.
    Differs from the reference: as `IDBH` and `awp`.
    """
    recipe = awp(epsilon=epsilon, model=model, paper_settings=paper_settings)
    return replace(recipe, name="idbh_awp", augmentation=IDBH(strength="weak"))


def iseat_idbh(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """ISEAT with IDBH.

    γ = 0.005, 400 epochs; the strong version, for wide networks (WRN) the weak one; otherwise `iseat`.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name: wide networks get the weak version.
        paper_settings: As in `iseat`.

    Source: Li and Spratling (ISEAT), section 6 and table 2.
    Differs from the reference: as `iseat`; which version of IDBH the paper uses is not known to us.
    """
    recipe = iseat(epsilon=epsilon, model=model, paper_settings=paper_settings)
    return replace(
        recipe,
        name="iseat_idbh",
        views=(WorstWeights(gamma=0.005),),
        augmentation=IDBH(strength="weak" if is_wide(model) else "strong"),
        epochs=400,
    )
