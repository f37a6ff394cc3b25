"""AWP and RWP around PGD-AT, TRADES and MART."""

from __future__ import annotations

from dataclasses import replace

from holdfast.objectives.mart import MART
from holdfast.objectives.trades import TRADES
from holdfast.recipe import Recipe
from holdfast.recipes.baselines import pgd_at
from holdfast.recipes.settings import Threat, is_wide, threat_of, trades_pgd10
from holdfast.schedule import Schedule, piecewise
from holdfast.views.worst_weights import WorstWeights


def _after_warm_up(gamma: float) -> Schedule:
    """γ from epoch 10 of 200 on."""
    return piecewise((0, 0.0), (0.05, gamma))


def awp(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """AWP around PGD-AT (AT-AWP): the adversarial side runs at weights perturbed uphill.

    γ = 0.01; schedule as `pgd_at`.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Attack under batch statistics that are tracked, as the paper's code does.

    Source: Wu et al., NeurIPS 2020, arXiv:2004.05884. Reference code: csdongxian/AWP.
    Differs from the reference: as `WorstWeights`; the attack runs under running statistics unless `paper_settings`.
    """
    recipe = pgd_at(epsilon=epsilon, model=model, paper_settings=paper_settings)
    return replace(recipe, name="awp", views=(WorstWeights(gamma=0.01),))


def rwp(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """RWP: ten ascent steps on the rows with small loss, with one scale for all weights.

    γ = 0.01, rows with loss below 1.7; schedule as `pgd_at`.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Attack under batch statistics that are tracked, as the paper's code does.

    Source: Yu et al., IJCAI 2022, arXiv:2205.14826. Reference code: ChaojianYu/Robust-Weight-Perturbation.
    Differs from the reference: as `awp`.
    """
    recipe = pgd_at(epsilon=epsilon, model=model, paper_settings=paper_settings)
    return replace(recipe, name="rwp", views=(WorstWeights(gamma=0.01, steps=10, scale="global", below=1.7),))


def trades_awp(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """TRADES-AWP: both sides run at weights perturbed uphill on the whole TRADES loss.

    γ = 0.005 from epoch 10 of 200 on, β = 6; schedule as `pgd_at`.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: The attack starts at normal noise of 0.001.

    Source: Wu et al., arXiv:2004.05884. Reference code: csdongxian/AWP, trades_AWP.
    Differs from the reference: as `awp` and `TRADES`.
    """
    recipe = pgd_at(epsilon=epsilon, model=model)
    attack = replace(trades_pgd10(threat_of(epsilon)), step_size=threat_of(epsilon).epsilon / 4)
    return replace(
        recipe,
        name="trades_awp",
        attack=attack if paper_settings else recipe.attack,
        objective=TRADES(beta=6.0),
        views=(WorstWeights(gamma=_after_warm_up(0.005), sides=("clean", "adv"), ascend="objective"),),
    )


def mart_awp(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """MART-AWP: both sides run at weights perturbed uphill on the whole MART loss.

    γ = 0.005 from epoch 10 of 200 on, as for TRADES-AWP, since MART-AWP's own settings are not known to us; β = 5, 6
    for wide networks; schedule as `pgd_at`.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name: wide networks get β = 6.
        paper_settings: The attack starts at normal noise of 0.001.

    Source: Wu et al., arXiv:2004.05884, table 3; Wang et al., ICLR 2020.
    Differs from the reference: as `awp` and `MART`.
    """
    recipe = trades_awp(epsilon=epsilon, model=model, paper_settings=paper_settings)
    return replace(recipe, name="mart_awp", objective=MART(beta=6.0 if is_wide(model) else 5.0))
