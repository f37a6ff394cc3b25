"""TRADES, MART, ALP, SCORE and Asym-TRADES: losses that compare clean with adversarial predictions."""

from __future__ import annotations

from dataclasses import replace

from holdfast.objectives.asymmetric_trades import AsymmetricTRADES
from holdfast.objectives.logit_pairing import LogitPairing
from holdfast.objectives.mart import MART
from holdfast.objectives.squared_probabilities import SquaredProbabilities
from holdfast.objectives.trades import TRADES
from holdfast.recipe import SGD, Recipe
from holdfast.recipes.settings import Threat, is_wide, pgd10, threat_of, trades_pgd10
from holdfast.schedule import piecewise


def trades(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """TRADES: clean cross-entropy and a KL pull, with an attack on the KL.

    β = 6; SGD 0.1, weight decay 2e-4, batch 128, 100 epochs, learning rate divided by 10 at 75 % and 90 %; PGD-10 with
    a uniform start.

    Args:
        epsilon: The threat model, or its Linf radius; 0.031 in the paper.
        model: The network's name; without effect here.
        paper_settings: The attack starts at normal noise of 0.001 and takes steps of 0.007 at epsilon 0.031.

    Source: Zhang et al., ICML 2019, arXiv:1901.08573. Reference code: yaodongyu/TRADES.
    Differs from the reference: its code stops at epoch 76 of these 100; the attack's start and step unless
        `paper_settings`.
    """
    threat = threat_of(epsilon)
    return Recipe(
        name="trades",
        threat=threat,
        attack=trades_pgd10(threat) if paper_settings else pgd10(threat),
        objective=TRADES(beta=6.0),
        optimizer=SGD(weight_decay=2e-4),
        schedule=piecewise((0, 1), (0.75, 0.1), (0.9, 0.01)),
        epochs=100,
    )


def asym_trades(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """Asym-TRADES in our own reading: TRADES whose KL term leaves the clean prediction alone.

    Settings as `trades`. Its variants are options: --objective.adversarial_weight 1, --objective.predictor true,
    --views.split_batchnorm.sides '[clean]'.

    Args:
        epsilon: The threat model, or its Linf radius.
        model: The network's name; without effect here.
        paper_settings: As in `trades`.

    Source: mentioned in AR-AT, arXiv:2402.14648; no formula or code was found.
    Differs from the reference: unknown.
    """
    recipe = trades(epsilon=epsilon, model=model, paper_settings=paper_settings)
    return replace(recipe, name="asym_trades", objective=AsymmetricTRADES(beta=6.0))


def mart(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """MART: boosted cross-entropy, and KL weighted by clean mistakes.

    ResNet-18: β = 5, SGD 0.01, weight decay 3.5e-3, 120 epochs, learning rate divided by 10 at epochs 75, 90 and 100.
    Wide networks (WRN): β = 6, SGD 0.1, weight decay 7e-4, 90 epochs, divided at 75. Batch 128; PGD-10.

    Args:
        epsilon: The threat model, or its Linf radius; 0.031 in the paper's code.
        model: The network's name: wide networks get the other schedule.
        paper_settings: The attack starts at normal noise of 0.001 and takes steps of 0.007 at epsilon 0.031.

    Source: Wang et al., ICLR 2020. Reference code: YisenWang/MART.
    Differs from the reference: the attack's start and step unless `paper_settings`; its code counts epochs from 1, so
        that its learning rate drops an epoch earlier.
    """
    threat = threat_of(epsilon)
    wide = is_wide(model)
    return Recipe(
        name="mart",
        threat=threat,
        attack=trades_pgd10(threat) if paper_settings else pgd10(threat),
        objective=MART(beta=6.0 if wide else 5.0),
        optimizer=SGD(weight_decay=7e-4) if wide else SGD(learning_rate=0.01, weight_decay=3.5e-3),
        schedule=piecewise((0, 1), (75 / 90, 0.1))
        if wide
        else piecewise((0, 1), (75 / 120, 0.1), (90 / 120, 0.01), (100 / 120, 0.001)),
        epochs=90 if wide else 120,
    )


def alp(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """ALP: adversarial logit pairing.

    β = 1, half of the cross-entropy on clean images; SGD 0.1, weight decay 2e-4, batch 128, and the schedule of
    `trades`, by which the code that we know trains it (there stopped at epoch 77 of 100).

    Args:
        epsilon: The threat model, or its Linf radius; 0.031 in that code.
        model: The network's name; without effect here.
        paper_settings: The attack starts at normal noise of 0.001 and takes steps of 0.007 at epsilon 0.031.

    Source: Kannan et al., arXiv:1803.06373; settings of ShawnXYang/AT_HE.
    Differs from the reference: the attack's start and step unless `paper_settings`.
    """
    recipe = trades(epsilon=epsilon, model=model, paper_settings=paper_settings)
    return replace(recipe, name="alp", objective=LogitPairing(strength=1.0))


def score(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """SCORE: squared distances of probabilities in place of cross-entropy and KL.

    β = 4; SGD 0.05, weight decay 5e-4, batch 128, 110 epochs, learning rate divided by 10 at epochs 100 and 105; PGD-10
    with a uniform start.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Attack under batch statistics that are not tracked, as the paper's code does.

    Source: Pang et al., ICML 2022, arXiv:2202.10103. Reference code: P2333/SCORE.
    Differs from the reference: the schedule is that of its scripts without generated data, loss and attack those of its
        other code; the former also clip the loss, in one form or another, which is left out (--objective.clip frees
        distances up to a bound). The attack runs under running statistics unless `paper_settings`.
    """
    threat = threat_of(epsilon)
    attack = pgd10(threat)
    return Recipe(
        name="score",
        threat=threat,
        attack=replace(attack, statistics="batch") if paper_settings else attack,
        objective=SquaredProbabilities(beta=4.0),
        optimizer=SGD(learning_rate=0.05),
        schedule=piecewise((0, 1), (100 / 110, 0.1), (105 / 110, 0.01)),
        epochs=110,
    )
