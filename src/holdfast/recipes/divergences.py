"""Consistency AT, STAT and IKL: other ways to hold two predictions together."""

from __future__ import annotations

from dataclasses import replace

from holdfast.attacks.collaborative import CollaborativePGD
from holdfast.attacks.pgd import PGD
from holdfast.objectives.consistency import Consistency
from holdfast.objectives.decoupled_kl import DecoupledKL
from holdfast.objectives.squeeze_training import SqueezeTraining
from holdfast.recipe import SGD, Recipe
from holdfast.recipes.baselines import pgd_at
from holdfast.recipes.settings import Threat, threat_of
from holdfast.schedule import Schedule, linear, piecewise
from holdfast.views.worst_weights import WorstWeights


def consistency(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """Consistency AT: two augmentations of an image are attacked, and their predictions drawn together.

    λ = 1, T = 0.5; schedule as `pgd_at`.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Without effect here: its code attacks under running statistics too.

    Source: Tack et al., AAAI 2022, arXiv:2103.04623. Reference code: alinlab/consistency-adversarial.
    Differs from the reference: as `Consistency`; its code adds AutoAugment and Cutout in the second half of the run,
        which this library does not have (`--augmentation idbh` is the augmentation that it has).
    """
    return replace(pgd_at(epsilon=epsilon, model=model), name="consistency", objective=Consistency())


def stat(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """STAT: the outermost of clean, collaborative and adversarial predictions are drawn together.

    β = 6; SGD 0.1, weight decay 5e-4, batch 128, 120 epochs, learning rate divided by 10 at epochs 80 and 100.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Attack under batch statistics that are not tracked, as the paper's code does.

    Source: Li et al., ICLR 2023, arXiv:2205.11156. Reference code: qizhangli/ST-AT.
    Differs from the reference: as `CollaborativePGD`; its scripts print β for extra data only, and we take it.
    """
    threat = threat_of(epsilon)
    return Recipe(
        name="stat",
        threat=threat,
        attack=CollaborativePGD(
            steps=10, step_size=threat.epsilon / 4, statistics="batch" if paper_settings else "eval"
        ),
        objective=SqueezeTraining(beta=6.0),
        schedule=piecewise((0, 1), (80 / 120, 0.1), (100 / 120, 0.01)),
        epochs=120,
    )


def ikl(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """IKL (improved DKL) with AWP, as its authors train it.

    α = 4, β = 20, T = 4; AWP with γ = 0.005 from epoch 10 of 200 on; SGD 0.2, weight decay 5e-4, batch 128, a half
    cosine; epsilon grows from 0 to its value over the whole run, and PGD takes 5 steps of half of it.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Without effect here: these are the paper's.

    Source: Cui et al., NeurIPS 2024, arXiv:2305.13948. Reference code: jiequancui/DKL, DKLv1.
    Differs from the reference: as `DecoupledKL`; epsilon grows with every step, there once an epoch; its released
        networks are averages of the checkpoints (--averages.ema.decay adds one).
    """
    threat = threat_of(epsilon)
    return Recipe(
        name="ikl",
        threat=threat,
        attack=PGD(steps=5, step_size=linear(0.0, threat.epsilon / 2), random_start="normal"),
        objective=DecoupledKL(),
        views=(WorstWeights(gamma=piecewise((0, 0.0), (0.05, 0.005)), sides=("clean", "adv"), ascend="objective"),),
        train_ball=linear(0.0, threat.epsilon),
        optimizer=SGD(learning_rate=0.2),
        schedule=Schedule(((0.0, 1.0), (1.0, 0.0)), "cosine"),
        epochs=200,
    )
