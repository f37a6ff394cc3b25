"""Recipes: functions that return a method with its paper's settings, one family a file."""

from __future__ import annotations

from collections.abc import Callable

from holdfast.errors import unknown_name
from holdfast.recipe import Recipe
from holdfast.recipes.ar_at import ar_at, ar_at_awp, ar_at_piat, ar_at_swa
from holdfast.recipes.augmented import idbh, idbh_awp, iseat_idbh
from holdfast.recipes.baselines import pgd_at, pgd_at_swa, pgd_at_wa, seat, standard
from holdfast.recipes.clean_and_adversarial import alp, asym_trades, mart, score, trades
from holdfast.recipes.divergences import consistency, ikl, stat
from holdfast.recipes.extra_data import dm_at, rst, rst_awp, rst_gairat, rst_iseat, rst_mart, rst_rwp
from holdfast.recipes.friendly import fat, fat_mart, fat_trades
from holdfast.recipes.guided import kd_swa, lbgat, sglr
from holdfast.recipes.iseat import (
    iseat,
    iseat_eq7,
    iseat_finetune,
    iseat_piat,
    iseat_svhn,
    iseat_swa,
    lsi_finetune,
    trades_awp_finetune,
)
from holdfast.recipes.las_at import las_at, las_awp
from holdfast.recipes.one_step import fast_at, fgsm_pgi, free_at, gat, liet, n_fgsm, nuat
from holdfast.recipes.piat import pgd_at_nmse, piat, piat_mart, piat_nmse, piat_trades
from holdfast.recipes.reweighting import gairat, ovr_style, piat_gairat, slore_mart
from holdfast.recipes.weight_perturbation import awp, mart_awp, rwp, trades_awp

RECIPES: dict[str, Callable[..., Recipe]] = {
    function.__name__: function
    for function in (
        *(standard, pgd_at, pgd_at_wa, pgd_at_swa, seat),
        *(alp, trades, asym_trades, mart, score),
        *(awp, rwp, trades_awp, mart_awp),
        *(pgd_at_nmse, piat, piat_nmse, piat_trades, piat_mart),
        *(ar_at, ar_at_swa, ar_at_awp, ar_at_piat),
        *(iseat, iseat_swa, iseat_svhn, iseat_finetune, lsi_finetune, trades_awp_finetune, iseat_eq7, iseat_piat),
        *(fat, fat_trades, fat_mart, gairat, piat_gairat, ovr_style, slore_mart),
        *(lbgat, kd_swa, sglr, consistency, stat, ikl),
        *(las_at, las_awp, free_at, fast_at, n_fgsm, gat, nuat, fgsm_pgi, liet),
        *(idbh, idbh_awp, iseat_idbh, rst, rst_mart, rst_gairat, rst_awp, rst_rwp, rst_iseat, dm_at),
    )
}


def recipe_by_name(name: str) -> Callable[..., Recipe]:
    """The recipe function of a name; - and _, upper and lower case are one.

    Raises:
        HoldfastError: unknown, with the nearest names.
    """
    wanted = name.lower().replace("-", "_")
    if wanted not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return RECIPES[wanted]
