"""Standard training, PGD-AT, and PGD-AT with averaged weights."""

from __future__ import annotations

from dataclasses import replace

from holdfast.averages.ema import EMA
from holdfast.averages.swa import SWA
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.objectives.standard import StandardTraining
from holdfast.recipe import SGD, Recipe
from holdfast.recipes.settings import Threat, cycled_momentum, is_wide, pgd10, steps_down, threat_of
from holdfast.schedule import one_cycle, piecewise, piecewise_linear


def standard(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """Standard training, the baseline that shows what an attack does to an undefended network.

    SGD 0.1, momentum 0.9, weight decay 5e-4, batch 128, 200 epochs, learning rate divided by 10 at 50 % and 75 %.
    Robust accuracy is measured during training; the best checkpoint is chosen by clean accuracy.

    Args:
        epsilon: The threat model it is measured under, or its Linf radius.
        model: The network's name; without effect here.
        paper_settings: Without effect here.
    """
    return Recipe(
        name="standard",
        threat=threat_of(epsilon),
        attack=None,
        objective=StandardTraining(),
        schedule=steps_down(),
        epochs=200,
    )


def pgd_at(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """PGD-AT as in the study of robust overfitting.

    SGD 0.1, momentum 0.9, weight decay 5e-4, batch 128, 200 epochs, learning rate divided by 10 at 50 % and 75 %;
    PGD-10 with a uniform start.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Attack under batch statistics that are tracked, as the paper's code does.

    Source: Madry et al., arXiv:1706.06083; Rice et al., ICML 2020, arXiv:2002.11569.
    Differs from the reference: the attack runs under running statistics unless `paper_settings`.
    """
    threat = threat_of(epsilon)
    attack = pgd10(threat)
    return Recipe(
        name="pgd_at",
        threat=threat,
        attack=replace(attack, statistics="batch_tracked") if paper_settings else attack,
        objective=AdversarialTraining(),
        schedule=steps_down(),
        epochs=200,
    )


def pgd_at_wa(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """PGD-AT with weight averaging, label smoothing and one cycle: the baseline that counts.

    SGD 0.1, weight decay 5e-4, batch 128, 100 epochs, one cycle, label smoothing 0.4, EMA 0.9995 with its BatchNorm
    statistics averaged; PGD-10 with a uniform start.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the benchmark.
        model: The network's name; without effect here.
        paper_settings: No warm-up of the average's decay, and momentum cycled 0.95 - 0.85 - 0.95, as the benchmark's
            scheduler does; 0.9 throughout otherwise.

    Source: the fast-AT benchmark, arXiv:2604.22853.
    Differs from the reference: the learning rate follows the cycle at every step, not once an epoch.
    """
    threat = threat_of(epsilon)
    return Recipe(
        name="pgd_at_wa",
        threat=threat,
        attack=pgd10(threat),
        objective=AdversarialTraining(),
        averages=(EMA(decay=0.9995, warm_up=not paper_settings),),
        optimizer=SGD(momentum=cycled_momentum(0.3) if paper_settings else 0.9),
        schedule=one_cycle(),
        epochs=100,
        label_smoothing=0.4,
    )


def pgd_at_swa(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """PGD-AT with stochastic weight averaging.

    SGD 0.1, weight decay 5e-4, batch 128, 200 epochs, learning rate divided by 10 at 25 % and 75 %; weights averaged
    at every epoch's end from epoch 56 of 200 on, BatchNorm re-estimated on clean images.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name; without effect here.
        paper_settings: Attack under batch statistics that are tracked, as the paper's code does.

    Source: Chen et al., ICLR 2021 (robust overfitting mitigated by learned smoothening); Izmailov et al.,
        arXiv:1803.05407.
    Differs from the reference: without its distillation from two teachers.
    """
    return replace(
        pgd_at(epsilon=epsilon, model=model, paper_settings=paper_settings),
        name="pgd_at_swa",
        averages=(SWA(begin=55 / 200, buffers="clean"),),
        schedule=piecewise((0, 1), (0.25, 0.1), (0.75, 0.01)),
    )


def seat(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """SEAT: PGD-AT whose weights are averaged at every step; the average is the result.

    ResNet-18: SGD 0.01, weight decay 3.5e-3; wide networks (WRN): SGD 0.1, weight decay 7e-4. 120 epochs, batch 128;
    learning rate constant for a third of the run, a tenth at two thirds, a hundredth at the end (wide: a twentieth), in
    straight lines. EMA 0.999, BatchNorm statistics averaged too.

    Args:
        epsilon: The threat model, or its Linf radius; 0.031 in the paper's code.
        model: The network's name: wide networks get the paper's other schedule.
        paper_settings: Steps of 0.007 at epsilon 0.031 instead of a quarter of epsilon.

    Source: Wang and Wang, ICLR 2022, arXiv:2203.09678. Reference code: whj363636/Self-Ensemble-Adversarial-Training.
    Differs from the reference: its further forward through the average, for logging only, is left out.
    """
    threat = threat_of(epsilon)
    attack = pgd10(threat)
    wide = is_wide(model)
    return Recipe(
        name="seat",
        threat=threat,
        attack=replace(attack, step_size=threat.epsilon * 7 / 31) if paper_settings else attack,
        objective=AdversarialTraining(),
        averages=(EMA(decay=0.999),),
        optimizer=SGD(learning_rate=0.1, weight_decay=7e-4) if wide else SGD(learning_rate=0.01, weight_decay=3.5e-3),
        schedule=piecewise_linear((0, 1), (1 / 3, 1), (2 / 3, 0.1), (1, 0.05 if wide else 0.01)),
        epochs=120,
    )
