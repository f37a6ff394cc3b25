"""Methods whose attack takes one step: Fast-AT, N-FGSM, GAT, NuAT, FGSM-PGI, LIET, and Free-AT, which takes none."""

from __future__ import annotations

from dataclasses import replace

from holdfast.attacks.class_start import ClassStartFGSM
from holdfast.attacks.fgsm import FGSM
from holdfast.attacks.prior_guided import PriorGuidedFGSM
from holdfast.averages.ema import EMA
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.objectives.guided_adversarial import GuidedAdversarial
from holdfast.objectives.nuclear_norm import NuclearNorm
from holdfast.objectives.prior_guided import PriorGuided
from holdfast.objectives.start_consistency import StartConsistency
from holdfast.recipe import SGD, Recipe
from holdfast.recipes.settings import Threat, cycled_momentum, threat_of
from holdfast.schedule import linear, one_cycle, piecewise, piecewise_linear
from holdfast.steps.free import Free


def fast_at(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """Fast-AT (FGSM-RS): PGD-AT with one step of 1.25 ε from a uniform start.

    SGD, weight decay 5e-4, batch 128, 15 epochs, learning rate from 0 to 0.2 and back to 0 in straight lines. The run
    looks for catastrophic overfitting, to which this method is prone, and tells.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Attack under batch statistics that are tracked, as the paper's code does.

    Source: Wong et al., ICLR 2020, arXiv:2001.03994, algorithm 3. Reference code: locuslab/fast_adversarial.
    Differs from the reference: no stop at catastrophic overfitting unless --training.catastrophic_overfitting stop.
    """
    threat = threat_of(epsilon)
    return Recipe(
        name="fast_at",
        threat=threat,
        attack=FGSM(
            step_size=1.25 * threat.epsilon,
            random_start=True,
            statistics="batch_tracked" if paper_settings else "eval",
        ),
        objective=AdversarialTraining(),
        optimizer=SGD(learning_rate=0.2),
        schedule=piecewise_linear((0, 0), (0.5, 1), (1, 0)),
        epochs=15,
    )


def n_fgsm(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """N-FGSM: one step of ε from noise of twice the radius, left outside the ball.

    Noise from U(-2ε, 2ε), no projection: training images lie up to 3 ε away. SGD, weight decay 5e-4, batch 128, 30
    epochs, learning rate from 0 to 0.2 and back to 0 in straight lines.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Attack under batch statistics that are tracked, as the paper's code does.

    Source: de Jorge et al., NeurIPS 2022, arXiv:2202.01181, algorithm 1.
    Differs from the reference: its code does not clamp to the pixel bounds; here they always hold.
    """
    recipe = fast_at(epsilon=epsilon, model=model, paper_settings=paper_settings)
    attack = FGSM(
        random_start=True,
        start_scale=2.0,
        project=False,
        statistics="batch_tracked" if paper_settings else "eval",
    )
    return replace(recipe, name="n_fgsm", attack=attack, train_ball="unbounded", epochs=30)


def gat(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """GAT: one-step training guided by the distance of probabilities.

    λ = 10, from epoch 86 on 40; SGD 0.1, weight decay 5e-4, batch 64, 100 epochs, learning rate divided by
    10 at epochs 70 and 85; one step of ε from a Bernoulli start.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Without effect here: its code attacks under running statistics too.

    Source: Sriramanan et al., NeurIPS 2020, arXiv:2011.14969. Reference code: val-iisc/GAMA-GAT.
    Differs from the reference: as `GuidedAdversarial`.
    """
    return Recipe(
        name="gat",
        threat=threat_of(epsilon),
        attack=FGSM(random_start="bernoulli"),
        objective=GuidedAdversarial(strength=piecewise((0, 10.0), (0.86, 40.0))),
        schedule=piecewise((0, 1), (0.71, 0.1), (0.86, 0.01)),
        epochs=100,
        batch_size=64,
    )


def nuat(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """NuAT: one-step training with the nuclear norm of the batch's logit changes.

    λ grows from 0 to 4.5 over the first 90 % of the run; weight decay 5e-4, batch 64, 100 epochs, learning rate from 0
    up to 0.1 at epoch 40, down to a fifth at epoch 80, divided by 10 at epochs 86 and 91; one step of ε from a
    Bernoulli start.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Without effect here: its code attacks under running statistics too.

    Source: Sriramanan et al., NeurIPS 2021. Reference code: val-iisc/NuAT.
    Differs from the reference: as `NuclearNorm`; λ grows with every step, there once an epoch.
    """
    schedule = piecewise_linear(
        *((0, 0), (0.4, 1), (0.8, 0.2), (0.86, 0.2)), *((0.86, 0.02), (0.91, 0.02), (0.91, 0.002))
    )
    return Recipe(
        name="nuat",
        threat=threat_of(epsilon),
        attack=FGSM(random_start="bernoulli"),
        objective=NuclearNorm(strength=linear(0.0, 4.5, until=0.9)),
        schedule=schedule,
        epochs=100,
        batch_size=64,
    )


def fgsm_pgi(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """FGSM-PGI (FGSM-MEP): one step from the perturbation that the image had in the epoch before.

    λ = 10, momentum 0.3, memories anew every 40 epochs, label smoothing 0.4; SGD 0.1, weight decay 5e-4, batch 128, 110
    epochs, learning rate divided by 10 at epochs 100 and 105.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Attack under batch statistics that are tracked, as the paper's code does.

    Source: Jia et al., ECCV 2022, arXiv:2207.08859. Reference code: jiaxiaojunQAQ/FGSM-PGI.
    Differs from the reference: as `PriorGuidedFGSM` and `PriorGuided`.
    """
    return Recipe(
        name="fgsm_pgi",
        threat=threat_of(epsilon),
        attack=PriorGuidedFGSM(statistics="batch_tracked" if paper_settings else "eval"),
        objective=PriorGuided(strength=10.0),
        schedule=piecewise((0, 1), (100 / 110, 0.1), (105 / 110, 0.01)),
        epochs=110,
        label_smoothing=0.4,
    )


def liet(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """LIET: one step from a start that mixes noise with a pattern of the class, and predictions held along it.

    λ grows from 0 to 100, random label smoothing 0.6; SGD 0.1, weight decay 5e-4, batch 128, 100 epochs, one cycle, EMA
    0.9995.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Attack under batch statistics that are tracked, as the paper's code does, no warm-up of the
            average's decay, and momentum cycled 0.95 - 0.85 - 0.95, as its scheduler does.

    Source: LIET, ICCV 2025. Reference code: fzjcdt/LIET.
    Differs from the reference: as `ClassStartFGSM` and `StartConsistency`; above 8/255 its code draws wider noise and
        leaves the result unprojected (--attack.wide true --train-ball unbounded).
    """
    return Recipe(
        name="liet",
        threat=threat_of(epsilon),
        attack=ClassStartFGSM(statistics="batch_tracked" if paper_settings else "eval"),
        objective=StartConsistency(strength=linear(0.0, 100.0)),
        averages=(EMA(decay=0.9995, warm_up=not paper_settings),),
        optimizer=SGD(momentum=cycled_momentum(0.3) if paper_settings else 0.9),
        schedule=one_cycle(),
        epochs=100,
    )


def free_at(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """Free-AT: every batch is trained on 8 times, and its perturbation climbs by the same gradients.

    10 epochs of 8 replays each, SGD, weight decay 5e-4, batch 128, learning rate from 0 to 0.04 and back to 0 in
    straight lines, step ε.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Without effect here: these are the paper's.

    Source: Shafahi et al., NeurIPS 2019, arXiv:1904.12843; settings of `train_free.py` in locuslab/fast_adversarial.
    Differs from the reference: as `Free`; its code's default is 11 epochs.
    """
    return Recipe(
        name="free_at",
        threat=threat_of(epsilon),
        attack=None,
        objective=AdversarialTraining(),
        optimizer=SGD(learning_rate=0.04),
        schedule=piecewise_linear((0, 0), (0.5, 1), (1, 0)),
        epochs=10,
        step=Free(replays=8),
    )
