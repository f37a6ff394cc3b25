"""LAS-AT and LAS-AWP: how strongly each image is attacked is learnt."""

from __future__ import annotations

from dataclasses import replace

from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.recipe import Recipe
from holdfast.recipes.settings import Threat, steps_down, threat_of
from holdfast.schedule import piecewise
from holdfast.steps.learnable_strategy import LearnableStrategy
from holdfast.views.worst_weights import WorstWeights


def las_at(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """LAS-AT: a strategy network draws radius, number of steps and step size of PGD for every image.

    SGD 0.1, momentum 0.9, weight decay 5e-4, batch 128, 110 epochs, learning rate divided by 10 at epochs 99 and 104;
    label smoothing 0.3. At 8/255: radii of 3 to 15, 3 to 14 steps of 1 to 5 (/255), trained on without a further bound;
    other epsilons scale them. The strategy network is updated every 20 steps. For CIFAR-100 the paper's code takes 3 to
    12 steps (``--step.steps``).

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Without effect here: these are the paper's.

    Source: Jia et al., CVPR 2022, arXiv:2203.06616. Reference code: jiaxiaojunQAQ/LAS-AT, with its README's ranges (its
        defaults leave out every range's last value).
    Differs from the reference: as `LearnableStrategy`.
    """
    return Recipe(
        name="las_at",
        threat=threat_of(epsilon),
        attack=None,
        objective=AdversarialTraining(),
        train_ball="unbounded",
        schedule=piecewise((0, 1), (99 / 110, 0.1), (104 / 110, 0.01)),
        epochs=110,
        label_smoothing=0.3,
        step=LearnableStrategy(),
    )


def las_awp(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """LAS-AWP: the same around AWP.

    γ = 0.01; SGD 0.1, momentum 0.9, weight decay 5e-4, batch 128, 200 epochs, both networks' learning rates divided by
    10 at 50 % and 75 %; hard labels. At 8/255: radii of 7 to 15, 8 to 16 steps of 2 to 5 (/255); what is found is cut
    to the threat model's ball before it is trained on, as the paper's code does. All weights of the reward are 1. For
    CIFAR-100 it takes 8 to 15 steps (``--step.steps``).

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: The strategy network is updated in every step, as the paper's code does, which costs two and a
            half times as much.

    Source: Jia et al., CVPR 2022, arXiv:2203.06616; Wu et al., arXiv:2004.05884. Reference code: jiaxiaojunQAQ/LAS-AT,
        LAS_AWP.
    Differs from the reference: as `LearnableStrategy` and `WorstWeights`. The reference looks ahead by a smoothed loss
        and measures the reward on images that are not normalised, though the network is trained on such that are.
    """
    step = LearnableStrategy(
        epsilons=[n / 8 for n in range(7, 16)],
        steps=range(8, 17),
        period=1 if paper_settings else 20,
        step_sizes=[n / 8 for n in range(2, 6)],
        learning_rate=piecewise((0, 1e-4), (0.5, 1e-5), (0.75, 1e-6)),
        robust_weight=1.0,
        clean_weight=1.0,
    )
    return replace(
        las_at(epsilon=epsilon),
        name="las_awp",
        views=(WorstWeights(gamma=0.01),),
        train_ball=None,
        schedule=steps_down(),
        epochs=200,
        label_smoothing=0.0,
        step=step,
    )
