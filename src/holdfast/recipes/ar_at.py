"""AR-AT, and its combinations."""

from __future__ import annotations

from dataclasses import replace

from holdfast.averages.interpolation import Interpolation
from holdfast.averages.swa import SWA
from holdfast.objectives.asymmetric_invariance import AsymmetricInvariance
from holdfast.recipe import Recipe
from holdfast.recipes.settings import Threat, is_wide, pgd10, threat_of
from holdfast.schedule import piecewise
from holdfast.views.split_batchnorm import SplitBatchNorm
from holdfast.views.worst_weights import WorstWeights


def ar_at(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """AR-AT: adversarial features are drawn to clean ones that stand still, with a BatchNorm branch for each.

    λ = 30, 100 for wide networks, over the network's last stage; SGD 0.1, weight decay 5e-4, batch 128, 100 epochs;
    learning rate 0.02 in the first hundredth of the run, divided by 10 at 76 % and 91 %, as the code runs it.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name: wide networks get λ = 100.
        paper_settings: As in the public code: attack under batch statistics that are tracked, and the noise of its
            attack's start written into the clean batch (`Recipe.input_noise`), so that training examples lie up to two
            epsilon from the image. Its table's PGD rows were measured in the same way and are not comparable.

    Source: Waseda et al., ICLR 2025, arXiv:2402.14648. Reference code: futakw/AR-AT.
    Differs from the reference: unless `paper_settings`, a correct attack, under running statistics.
    """
    threat = threat_of(epsilon)
    attack = pgd10(threat)
    return Recipe(
        name="ar_at",
        threat=threat,
        attack=replace(attack, random_start=False, statistics="batch_tracked") if paper_settings else attack,
        objective=AsymmetricInvariance(strength=100.0 if is_wide(model) else 30.0),
        views=(SplitBatchNorm(sides=("clean",)),),
        input_noise=threat.epsilon if paper_settings else 0.0,
        schedule=piecewise((0, 0.2), (0.01, 1), (0.76, 0.1), (0.91, 0.01)),
        epochs=100,
    )


def ar_at_swa(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """AR-AT with SWA, whose BatchNorm statistics are re-estimated: main on adversarial, auxiliary on clean images.

    Averaged at every epoch's end from epoch 76 of 100 on; statistics from 2,048 training images before each validation.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name: wide networks get λ = 100.
        paper_settings: As `ar_at`, averaged every 500 steps, statistics from the whole training set.

    Source: AR-AT, arXiv:2402.14648, table 3. Reference code: futakw/AR-AT, utils/swa.py.
    Differs from the reference: its clean branch is left without statistics, so that it cannot be used; here it is.
    """
    swa = SWA(begin=0.75, buffers="adversarial", images=2048)
    if paper_settings:
        swa = SWA(begin=0.75, period=500, buffers="adversarial")
    return replace(
        ar_at(epsilon=epsilon, model=model, paper_settings=paper_settings), name="ar_at_swa", averages=(swa,)
    )


def ar_at_awp(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """AR-AT whose adversarial side runs at weights perturbed uphill. Nobody has reported it.

    γ = 0.005; otherwise as `ar_at`.

    Args:
        epsilon: The threat model, or its Linf radius.
        model: The network's name: wide networks get λ = 100.
        paper_settings: As `ar_at`.

    Source: this project's combination of arXiv:2402.14648 and arXiv:2004.05884.
    """
    recipe = ar_at(epsilon=epsilon, model=model, paper_settings=paper_settings)
    return replace(recipe, name="ar_at_awp", views=(*recipe.views, WorstWeights(gamma=0.005)))


def ar_at_piat(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """AR-AT with PIAT's interpolation of parameters, of both branches, at every epoch's end. Nobody has reported it.

    Otherwise as `ar_at`.

    Args:
        epsilon: The threat model, or its Linf radius.
        model: The network's name: wide networks get λ = 100.
        paper_settings: As `ar_at`.

    Source: this project's combination of arXiv:2402.14648 and arXiv:2303.13955.
    """
    recipe = ar_at(epsilon=epsilon, model=model, paper_settings=paper_settings)
    return replace(recipe, name="ar_at_piat", averages=(Interpolation(),))
