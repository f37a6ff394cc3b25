"""FAT around PGD-AT, TRADES and MART: the attack stops soon after it has succeeded."""

from __future__ import annotations

from dataclasses import replace

from holdfast.attacks.pgd import PGD
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.objectives.mart import MART
from holdfast.objectives.trades import TRADES
from holdfast.recipe import SGD, Recipe
from holdfast.recipes.settings import Threat, pgd10, threat_of, trades_pgd10
from holdfast.schedule import Schedule, piecewise
from holdfast.threat import ThreatModel


def _friendly(threat: ThreatModel, patience: Schedule, *, paper_settings: bool = False) -> PGD:
    """PGD-10 that leaves an image alone once it has been misclassified at so many points."""
    attack = trades_pgd10(threat) if paper_settings else pgd10(threat)
    return replace(attack, early_stop=patience)


def fat(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """FAT: PGD-AT on the least adversarial of the images that fool the network.

    PGD-10 stops for every image τ steps after it is first misclassified: τ = 0, from epoch 51 on 1, from epoch 91 on 2,
    of 120. SGD 0.1, weight decay 2e-4, batch 128; learning rate divided by 10 at epochs 60 and 90 and by 2 at 110.

    Args:
        epsilon: The threat model, or its Linf radius; 0.031 in the paper. It also trains with a larger ball than it is
            evaluated in: ``--train-ball 16/255``.
        model: The network's name; without effect here.
        paper_settings: Normal noise of 0.001 in every attack step, which takes 0.007 at epsilon 0.031.

    Source: Zhang et al., ICML 2020, arXiv:2002.11242, algorithm 1. Reference code:
        zjfheart/Friendly-Adversarial-Training.
    Differs from the reference: rows keep their place, where the code hands them back in the order in which they
        stopped; noise and step of the attack unless `paper_settings`.
    """
    threat = threat_of(epsilon)
    patience = piecewise((0, 0), (50 / 120, 1), (90 / 120, 2))
    attack = _friendly(threat, patience)
    if paper_settings:
        attack = replace(attack, step_size=threat.epsilon * 7 / 31, step_noise=0.001)
    return Recipe(
        name="fat",
        threat=threat,
        attack=attack,
        objective=AdversarialTraining(),
        optimizer=SGD(weight_decay=2e-4),
        schedule=piecewise((0, 1), (60 / 120, 0.1), (90 / 120, 0.01), (110 / 120, 0.005)),
        epochs=120,
    )


def fat_trades(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """FAT around TRADES.

    As `fat`, with τ = 0, 1, 2, 3 from epochs 0, 30, 50 and 70 of 85 on and β = 6; SGD 0.1, weight decay 2e-4, learning
    rate divided by 10 at epoch 75.

    Args:
        epsilon: The threat model, or its Linf radius; 0.031 in the paper.
        model: The network's name; without effect here.
        paper_settings: The attack starts at normal noise of 0.001 and takes steps of 0.007 at epsilon 0.031.

    Source: Zhang et al., ICML 2020, arXiv:2002.11242. Reference code: `FAT_for_TRADES.py`.
    Differs from the reference: as `fat` and `TRADES`.
    """
    threat = threat_of(epsilon)
    patience = piecewise((0, 0), (30 / 85, 1), (50 / 85, 2), (70 / 85, 3))
    return replace(
        fat(epsilon=threat, model=model),
        name="fat_trades",
        attack=_friendly(threat, patience, paper_settings=paper_settings),
        objective=TRADES(beta=6.0),
        schedule=piecewise((0, 1), (75 / 85, 0.1)),
        epochs=85,
    )


def fat_mart(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """FAT around MART.

    As `fat`, with τ = 0 … 4 from epochs 0, 20, 40, 60 and 80 of 90 on and β = 6; SGD 0.1, weight decay 2e-4, learning
    rate divided by 10 at epoch 60.

    Args:
        epsilon: The threat model, or its Linf radius; 0.031 in the paper.
        model: The network's name; without effect here.
        paper_settings: The attack starts at normal noise of 0.001 and takes steps of 0.007 at epsilon 0.031.

    Source: Zhang et al., ICML 2020, arXiv:2002.11242. Reference code: `FAT_for_MART.py`.
    Differs from the reference: as `fat` and `MART`.
    """
    threat = threat_of(epsilon)
    patience = piecewise((0, 0), (20 / 90, 1), (40 / 90, 2), (60 / 90, 3), (80 / 90, 4))
    return replace(
        fat(epsilon=threat, model=model),
        name="fat_mart",
        attack=_friendly(threat, patience, paper_settings=paper_settings),
        objective=MART(beta=6.0),
        schedule=piecewise((0, 1), (60 / 90, 0.1)),
        epochs=90,
    )
