"""RST and DM: training with extra or generated images, and with what the papers combine it."""

from __future__ import annotations

from dataclasses import replace

from holdfast.averages.ema import EMA
from holdfast.objectives.geometry_weighted import GeometryWeighted
from holdfast.objectives.logit_stability import LogitStability
from holdfast.objectives.mart import MART
from holdfast.objectives.trades import TRADES
from holdfast.recipe import SGD, Recipe
from holdfast.recipes.iseat import iseat
from holdfast.recipes.settings import Threat, cycled_momentum, is_wide, pgd10, threat_of, trades_pgd10
from holdfast.schedule import Schedule, after_first_decay, one_cycle
from holdfast.views.worst_weights import WorstWeights


def rst(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """RST: TRADES with extra images, half of every batch, under pseudo-labels.

    β = 6; SGD 0.1 with Nesterov momentum, weight decay 5e-4, batch 256, 200 epochs of as many images as the labelled
    set has, a half cosine. The images: --training.extra_data PATH, and for pseudo-labels --training.extra_labels RUN.

    Args:
        epsilon: The threat model, or its Linf radius; 0.031 in the paper.
        model: The network's name; without effect here.
        paper_settings: The attack starts at normal noise of 0.001 and takes steps of 0.007 at epsilon 0.031.

    Source: Carmon et al., NeurIPS 2019, arXiv:1905.13736. Reference code: yaircarmon/semisup-adv (with --distance
        l_inf).
    Differs from the reference: as `TRADES`; the clean side runs before the adversarial one.
    """
    threat = threat_of(epsilon)
    return Recipe(
        name="rst",
        threat=threat,
        attack=trades_pgd10(threat) if paper_settings else pgd10(threat),
        objective=TRADES(beta=6.0),
        optimizer=SGD(nesterov=True),
        schedule=Schedule(((0.0, 1.0), (1.0, 0.0)), "cosine"),
        epochs=200,
        batch_size=256,
        extra_share=0.5,
    )


def rst_mart(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """MART with RST's extra images.

    β = 5, 6 for wide networks; otherwise `rst`.

    Args:
        epsilon: The threat model, or its Linf radius.
        model: The network's name: wide networks get β = 6.
        paper_settings: As in `rst`.

    Source: Wang et al., ICLR 2020; Carmon et al., arXiv:1905.13736; named in ISEAT.
    Differs from the reference: MART's own settings with extra images are not known to us.
    """
    recipe = rst(epsilon=epsilon, model=model, paper_settings=paper_settings)
    return replace(recipe, name="rst_mart", objective=MART(beta=6.0 if is_wide(model) else 5.0))


def rst_gairat(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """GAIRAT with RST's extra images.

    Λ = -1 from half of the run on; otherwise `rst`.

    Args:
        epsilon: The threat model, or its Linf radius.
        model: The network's name; without effect here.
        paper_settings: As in `rst`.

    Source: Zhang et al., ICLR 2021, arXiv:2010.01736; named in ISEAT.
    Differs from the reference: with extra images GAIRAT's code weighs TRADES' KL term; here, as without them, the
        adversarial cross-entropy.
    """
    recipe = rst(epsilon=epsilon, model=model, paper_settings=paper_settings)
    return replace(recipe, name="rst_gairat", objective=GeometryWeighted())


def rst_awp(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """AWP around RST.

    γ = 0.005, both sides; otherwise `rst`.

    Args:
        epsilon: The threat model, or its Linf radius.
        model: The network's name; without effect here.
        paper_settings: As in `rst`.

    Source: Wu et al., arXiv:2004.05884; named in ISEAT.
    Differs from the reference: as `rst` and `trades_awp`, without its warm-up.
    """
    recipe = rst(epsilon=epsilon, model=model, paper_settings=paper_settings)
    views = (WorstWeights(gamma=0.005, sides=("clean", "adv"), ascend="objective"),)
    return replace(recipe, name="rst_awp", views=views)


def rst_rwp(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """RWP around RST.

    γ = 0.005, ten ascent steps on rows with TRADES' loss below 1.7, one scale; otherwise `rst`.

    Args:
        epsilon: The threat model, or its Linf radius.
        model: The network's name; without effect here.
        paper_settings: As in `rst`.

    Source: Yu et al., IJCAI 2022, arXiv:2205.14826; named in ISEAT.
    Differs from the reference: as `rst` and `rwp`, without a warm-up of γ; its code for TRADES does not run.
    """
    recipe = rst(epsilon=epsilon, model=model, paper_settings=paper_settings)
    views = (
        WorstWeights(gamma=0.005, sides=("clean", "adv"), ascend="objective", steps=10, scale="global", below=1.7),
    )
    return replace(recipe, name="rst_rwp", views=views)


def rst_iseat(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """ISEAT with extra images, half of every batch.

    λ = 0.01 once the learning rate has first dropped, γ = 0.005, batch 256; otherwise `iseat`.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: As in `iseat`.

    Source: Li and Spratling (ISEAT), section 6 and table 2.
    Differs from the reference: as `iseat`.
    """
    return replace(
        iseat(epsilon=epsilon, model=model, paper_settings=paper_settings),
        name="rst_iseat",
        objective=LogitStability(strength=after_first_decay(0.01)),
        views=(WorstWeights(gamma=0.005),),
        batch_size=256,
        extra_share=0.5,
    )


def dm_at(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """DM-AT: TRADES with images from a diffusion model, seven tenths of every batch.

    β = 5, label smoothing 0.1, EMA 0.995 with growing decay; SGD 0.2 with Nesterov momentum, weight decay 5e-4, batch
    512, 400 epochs, one cycle that peaks after 2.5 % of the run. The images, with labels: --training.extra_data PATH.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Attack under batch statistics that are not tracked, as the paper's code does, and momentum
            cycled 0.95 - 0.85 - 0.95, as its scheduler does.

    Source: Wang et al., ICML 2023, arXiv:2302.04638. Reference code: wzekai99/DM-Improves-AT.
    Differs from the reference: BatchNorm's momentum and the weight decay of its parameters are the usual ones; the
        average's BatchNorm statistics are averaged, there the model's own; it averages from the start, there after 2.5
        %.
    """
    threat = threat_of(epsilon)
    attack = pgd10(threat)
    return Recipe(
        name="dm_at",
        threat=threat,
        attack=replace(attack, statistics="batch") if paper_settings else attack,
        objective=TRADES(beta=5.0),
        averages=(EMA(decay=0.995),),
        optimizer=SGD(learning_rate=0.2, momentum=cycled_momentum(0.025) if paper_settings else 0.9, nesterov=True),
        schedule=one_cycle(rise=0.025),
        epochs=400,
        batch_size=512,
        label_smoothing=0.1,
        extra_share=0.7,
    )
