"""LBGAT, distillation with SWA, and SGLR: learning from another network's predictions, or from one's own."""

from __future__ import annotations

from dataclasses import replace

from holdfast.further_network import FurtherNetwork
from holdfast.objectives.boundary_guided import BoundaryGuided
from holdfast.objectives.distillation import Distillation
from holdfast.objectives.label_refinement import LabelRefinement
from holdfast.recipe import SGD, Recipe
from holdfast.recipes.baselines import pgd_at, pgd_at_swa
from holdfast.recipes.settings import Threat, pgd10, threat_of, trades_pgd10
from holdfast.schedule import piecewise


def lbgat(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """LBGAT: adversarial logits are drawn to those of a network that learns from clean images beside it.

    β = 0 (LBGAT0; --objective.beta 6 gives LBGAT6), gradients clipped to length 1; SGD 0.1, in the first epoch 0.02,
    weight decay 2e-4, batch 128, 100 epochs, learning rate divided by 10 at epochs 75, 90 and 100. The guide is of the
    classifier's own kind (--networks.guide.model chooses another).

    Args:
        epsilon: The threat model, or its Linf radius; 0.031 in the paper.
        model: The network's name; without effect here.
        paper_settings: The guide is a ResNet-18, gradients are not clipped; the attack starts at normal noise of 0.001
            and takes steps of 0.007 at epsilon 0.031.

    Source: Cui et al., ICCV 2021, arXiv:2011.11164. Reference code: dvlab-research/LBGAT.
    Differs from the reference: as `BoundaryGuided`; guide, start and step unless `paper_settings`; gradients are
        clipped, without which its mean over the classes diverges where there are ten of them (the code is for a
        hundred).
    """
    threat = threat_of(epsilon)
    return Recipe(
        name="lbgat",
        threat=threat,
        attack=trades_pgd10(threat) if paper_settings else pgd10(threat),
        objective=BoundaryGuided(beta=0.0),
        networks={"guide": FurtherNetwork(model="resnet18" if paper_settings else "")},
        optimizer=SGD(weight_decay=2e-4),
        schedule=piecewise((0, 0.2), (0.01, 1), (0.75, 0.1), (0.9, 0.01)),
        epochs=100,
        gradient_clip=None if paper_settings else 1.0,
    )


def kd_swa(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """Distillation from a standard and a robust teacher, with SWA.

    0.3 of the cross-entropy, 0.1 and 0.6 of the teachers', at temperature 2; otherwise `pgd_at_swa`. The teachers are
    finished runs: --networks.standard_teacher.init RUN --networks.robust_teacher.init RUN (best checkpoints of
    `standard` and `pgd_at`).

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Attack under batch statistics that are tracked, as the paper's code does.

    Source: Chen et al., ICLR 2021 (robust overfitting mitigated by learned smoothening). Reference code:
        VITA-Group/Alleviate-Robust-Overfitting.
    Differs from the reference: as `pgd_at_swa`.
    """
    return replace(
        pgd_at_swa(epsilon=epsilon, model=model, paper_settings=paper_settings),
        name="kd_swa",
        objective=Distillation(),
        networks={
            "standard_teacher": FurtherNetwork(trained=False),
            "robust_teacher": FurtherNetwork(trained=False),
        },
    )


def sglr(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """SGLR: labels are softened by the network's own predictions, remembered for every image.

    m = 0.9, r = 0.2, from epoch 90 of 200 on; schedule as `pgd_at`.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Without effect here: its code attacks under running statistics too.

    Source: Li et al., CVPR 2024, arXiv:2403.09101. Reference code: devicerxx/SGLS.
    Differs from the reference: as `LabelRefinement`; the memory is kept in checkpoints, there it begins anew.
    """
    return replace(pgd_at(epsilon=epsilon, model=model), name="sglr", objective=LabelRefinement())
