"""GAIRAT, OVR-style and LOAT: losses that treat images by how they stand to the boundary."""

from __future__ import annotations

from dataclasses import replace

from holdfast.averages.interpolation import Interpolation
from holdfast.objectives.fisher_rao import FisherRaoMART
from holdfast.objectives.geometry_weighted import GeometryWeighted
from holdfast.objectives.one_vs_rest import OneVsRest
from holdfast.recipe import SGD, Recipe
from holdfast.recipes.baselines import pgd_at
from holdfast.recipes.piat import piat
from holdfast.recipes.settings import Threat, is_wide, pgd10, threat_of, trades_pgd10
from holdfast.schedule import piecewise


def gairat(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """GAIRAT: images that the attack flips early weigh more.

    Λ = -1 from half of the run on; SGD 0.1, weight decay 2e-4, batch 128, 120 epochs, learning rate divided by 10 at
    50 % and 75 % and by 2 at 92 %; PGD-10 with a uniform start. PGD flatters it: its gradients are masked.

    Args:
        epsilon: The threat model, or its Linf radius; 0.031 in the paper.
        model: The network's name; without effect here.
        paper_settings: Attack steps of 0.007 at epsilon 0.031.

    Source: Zhang et al., ICLR 2021, arXiv:2010.01736. Reference code:
        zjfheart/Geometry-aware-Instance-reweighted-Adversarial-Training.
    Differs from the reference: as `GeometryWeighted`; the attack's step unless `paper_settings`.
    """
    threat = threat_of(epsilon)
    attack = pgd10(threat)
    return Recipe(
        name="gairat",
        threat=threat,
        attack=replace(attack, step_size=threat.epsilon * 7 / 31) if paper_settings else attack,
        objective=GeometryWeighted(),
        optimizer=SGD(weight_decay=2e-4),
        schedule=piecewise((0, 1), (0.5, 0.1), (0.75, 0.01), (11 / 12, 0.005)),
        epochs=120,
    )


def piat_gairat(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """PIAT around GAIRAT.

    Schedule as in `piat`; Λ = -1 from half of the run on.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name: wide networks get the paper's other schedule.
        paper_settings: The attack starts at x, as Algorithm 1 prints it.

    Source: PIAT, arXiv:2303.13955, section 4.2 and table 2.
    Differs from the reference: as `piat` and `gairat`.
    """
    recipe = piat(epsilon=epsilon, model=model, paper_settings=paper_settings)
    return replace(recipe, name="piat_gairat", objective=GeometryWeighted(), averages=(Interpolation(),))


def ovr_style(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """OVR-style, our own reading of SOVR: one-vs-the-rest for the smallest margins of a batch.

    Two fifths of the batch, λ = 0.5; schedule as `pgd_at`. These numbers are ours.

    Args:
        epsilon: The threat model, or its Linf radius.
        model: The network's name; without effect here.
        paper_settings: As in `pgd_at`.

    Source: idea of Kanai et al., ICML 2023, arXiv:2207.10283; its formula could not be verified.
    Differs from the reference: unknown.
    """
    recipe = pgd_at(epsilon=epsilon, model=model, paper_settings=paper_settings)
    return replace(recipe, name="ovr_style", objective=OneVsRest())


def slore_mart(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """LOAT on MART (SLORE-MART): clean probabilities are shaped in the first and the last epochs.

    β = 6, θ = 0.1, γ = 0.05; in the first of 110 epochs and from epoch 100 on. ResNet-18: SGD 0.01, weight decay
    3.5e-3, batch 512, learning rate divided by 10 at epochs 75, 90 and 100; wide networks (WRN): SGD 0.1, weight decay
    7e-4, batch 128.

    Args:
        epsilon: The threat model, or its Linf radius; 0.031 in the paper's code.
        model: The network's name: wide networks get the other optimiser.
        paper_settings: The attack starts at normal noise of 0.001 and takes steps of 0.007 at epsilon 0.031.

    Source: Yin and Ruan, CVPR 2024, arXiv:2403.17520. Reference code: TrustAI/LOAT.
    Differs from the reference: as `FisherRaoMART`; its wide networks stop at epoch 90, before the last window opens,
        ours run all 110 epochs; the attack's start and step unless `paper_settings`.
    """
    threat = threat_of(epsilon)
    wide = is_wide(model)
    return Recipe(
        name="slore_mart",
        threat=threat,
        attack=trades_pgd10(threat) if paper_settings else pgd10(threat),
        objective=FisherRaoMART(beta=6.0),
        optimizer=SGD(weight_decay=7e-4) if wide else SGD(learning_rate=0.01, weight_decay=3.5e-3),
        schedule=piecewise((0, 1), (75 / 110, 0.1), (90 / 110, 0.01), (100 / 110, 0.001)),
        epochs=110,
        batch_size=128 if wide else 512,
    )
