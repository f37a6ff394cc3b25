"""PIAT, NMSE, and PIAT around TRADES and MART."""

from __future__ import annotations

from dataclasses import replace

from holdfast.averages.interpolation import Interpolation
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.objectives.mart import MART
from holdfast.objectives.normalized_mse import NormalizedMSE
from holdfast.objectives.trades import TRADES
from holdfast.recipe import SGD, Recipe
from holdfast.recipes.settings import Threat, is_wide, pgd10, threat_of
from holdfast.schedule import piecewise_linear


def _piat_family(name: str, epsilon: Threat, model: str, paper_settings: bool) -> Recipe:
    """What the PIAT paper trains everything by: a clean warm-up, and straight lines between the learning rates.

    ResNet-18: 120 epochs, SGD 0.01, weight decay 3.5e-3. Wide networks: 180 epochs, SGD 0.1, weight decay 7e-4. The
    learning rate is constant for half of the run, falls to a tenth at three quarters and to a hundredth at the end;
    the first ten epochs train on clean images.
    """
    threat = threat_of(epsilon)
    attack = pgd10(threat)
    wide = is_wide(model)
    epochs = 180 if wide else 120
    return Recipe(
        name=name,
        threat=threat,
        attack=replace(attack, random_start=False) if paper_settings else attack,
        objective=AdversarialTraining(),
        optimizer=SGD(learning_rate=0.1, weight_decay=7e-4) if wide else SGD(learning_rate=0.01, weight_decay=3.5e-3),
        schedule=piecewise_linear((0, 1), (0.5, 1), (0.75, 0.1), (1, 0.01)),
        epochs=epochs,
        warmup=10 / epochs,
    )


def pgd_at_nmse(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """PGD-AT with NMSE, without interpolation: the ablation of the PIAT paper (its table 3).

    Schedule as in `piat`; μ = 5.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name: wide networks get the paper's other schedule.
        paper_settings: The attack starts at x, as Algorithm 1 prints it.

    Source: PIAT, arXiv:2303.13955, eq. (5) and (6), section A.
    Differs from the reference: the attack starts at a random point unless `paper_settings`.
    """
    return replace(_piat_family("pgd_at_nmse", epsilon, model, paper_settings), objective=NormalizedMSE(strength=5.0))


def piat(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """PIAT: PGD-AT with parameters interpolated at every epoch's end.

    ResNet-18: 120 epochs, SGD 0.01, weight decay 3.5e-3; wide networks (WRN): 180 epochs, SGD 0.1, weight decay 7e-4.
    Constant learning rate for half of the run, a tenth at three quarters, a hundredth at the end, in straight lines;
    ten clean epochs first (as a share of the run: 10/120 or 10/180); batch 128, as in the code it seems to build on.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name: wide networks get the paper's other schedule.
        paper_settings: The attack starts at x, as Algorithm 1 prints it.

    Source: PIAT, arXiv:2303.13955, Algorithm 1, eq. (3) and (4), section A.
    Differs from the reference: the attack starts at a random point unless `paper_settings`; see `Interpolation`.
    """
    return replace(_piat_family("piat", epsilon, model, paper_settings), averages=(Interpolation(),))


def piat_nmse(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """PIAT + NMSE: the paper's full method.

    Schedule as in `piat`; μ = 5.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name: wide networks get the paper's other schedule.
        paper_settings: The attack starts at x, as Algorithm 1 prints it.

    Source: PIAT, arXiv:2303.13955.
    Differs from the reference: as `piat` and `NormalizedMSE`.

    Example:
        >>> recipe = piat_nmse(epsilon="8/255", model="wrn_32_10")
        >>> recipe.epochs, recipe.passes()
        (180, 26.0)
    """
    return replace(
        _piat_family("piat_nmse", epsilon, model, paper_settings),
        objective=NormalizedMSE(strength=5.0),
        averages=(Interpolation(),),
    )


def piat_trades(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """PIAT around TRADES: its loss in place of PGD-AT's, without NMSE.

    Schedule as in `piat`; β = 6.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name: wide networks get the paper's other schedule.
        paper_settings: Without effect here: a start at x would leave the attack without gradient.

    Source: PIAT, arXiv:2303.13955, section 4.2 and table 2.
    Differs from the reference: as `piat` and `TRADES`.
    """
    recipe = _piat_family("piat_trades", epsilon, model, paper_settings=False)
    return replace(recipe, objective=TRADES(beta=6.0), averages=(Interpolation(),))


def piat_mart(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """PIAT around MART: its loss in place of PGD-AT's, without NMSE.

    Schedule as in `piat`; β = 5, 6 for wide networks, as in MART's own code, since the paper does not say.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name: wide networks get the paper's other schedule.
        paper_settings: The attack starts at x, as Algorithm 1 prints it.

    Source: PIAT, arXiv:2303.13955, section 4.2 and table 2.
    Differs from the reference: as `piat` and `MART`.
    """
    recipe = _piat_family("piat_mart", epsilon, model, paper_settings)
    return replace(recipe, objective=MART(beta=6.0 if is_wide(model) else 5.0), averages=(Interpolation(),))
