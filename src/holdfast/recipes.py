"""Recipes: functions that return a method with its paper's settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from holdfast.attacks.pgd import PGD
from holdfast.averages.ema import EMA
from holdfast.averages.interpolation import Interpolation
from holdfast.errors import unknown_name
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.objectives.normalized_mse import NormalizedMSE
from holdfast.objectives.standard import StandardTraining
from holdfast.recipe import SGD, Recipe
from holdfast.schedule import Schedule, one_cycle, piecewise, piecewise_linear
from holdfast.threat import Linf, ThreatModel

Threat = ThreatModel | float | str


def _threat(epsilon: Threat) -> ThreatModel:
    return epsilon if isinstance(epsilon, ThreatModel) else Linf(epsilon)  # type: ignore[arg-type]  # text is parsed there


def _pgd10(threat: ThreatModel) -> PGD:
    """PGD-10 with a uniform start and steps of a quarter of epsilon, which is 2/255 at 8/255."""
    return PGD(steps=10, step_size=threat.epsilon / 4)


def _steps_down() -> Schedule:
    return piecewise((0, 1), (0.5, 0.1), (0.75, 0.01))


def _is_wide(model: str) -> bool:
    return model.lower().startswith("wrn")


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
        threat=_threat(epsilon),
        attack=None,
        objective=StandardTraining(),
        schedule=_steps_down(),
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
    threat = _threat(epsilon)
    attack = _pgd10(threat)
    return Recipe(
        name="pgd_at",
        threat=threat,
        attack=replace(attack, statistics="batch_tracked") if paper_settings else attack,
        objective=AdversarialTraining(),
        schedule=_steps_down(),
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
    threat = _threat(epsilon)
    cycled = Schedule(((0.0, 0.95), (0.3, 0.85), (1.0, 0.95)), "cosine")
    return Recipe(
        name="pgd_at_wa",
        threat=threat,
        attack=_pgd10(threat),
        objective=AdversarialTraining(),
        averages=(EMA(decay=0.9995, warm_up=not paper_settings),),
        optimizer=SGD(momentum=cycled if paper_settings else 0.9),
        schedule=one_cycle(),
        epochs=100,
        label_smoothing=0.4,
    )


def _piat_family(name: str, epsilon: Threat, model: str, paper_settings: bool) -> Recipe:
    """What the PIAT paper trains everything by: a clean warm-up, and straight lines between the learning rates.

    ResNet-18: 120 epochs, SGD 0.01, weight decay 3.5e-3. Wide networks: 180 epochs, SGD 0.1, weight decay 7e-4. The
    learning rate is constant for half of the run, falls to a tenth at three quarters and to a hundredth at the end;
    the first ten epochs train on clean images.
    """
    threat = _threat(epsilon)
    attack = _pgd10(threat)
    wide = _is_wide(model)
    epochs = 180 if wide else 120
    return Recipe(
        name=name,
        threat=threat,
        attack=replace(attack, random_start=False) if paper_settings else attack,
        objective=AdversarialTraining(),
        optimizer=SGD(learning_rate=0.1, weight_decay=7e-4) if wide else SGD(learning_rate=0.01, weight_decay=3.5e-3),
        schedule=piecewise_linear((0, 1), (0.5, 1), (0.75, 0.1), (1, 0.01)),
        epochs=epochs,
        warmup=10 / epochs,
    )


def pgd_at_nmse(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """PGD-AT with NMSE, without interpolation: the ablation of the PIAT paper (its table 3).

    Schedule as in `piat`; μ = 5.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name: wide networks get the paper's other schedule.
        paper_settings: The attack starts at x, as Algorithm 1 prints it.

    Source: PIAT, arXiv:2303.13955, eq. (5) and (6), section A.
    Differs from the reference: the attack starts at a random point unless `paper_settings`.
    """
    return replace(_piat_family("pgd_at_nmse", epsilon, model, paper_settings), objective=NormalizedMSE(strength=5.0))


def piat(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """PIAT: PGD-AT with parameters interpolated at every epoch's end.

    ResNet-18: 120 epochs, SGD 0.01, weight decay 3.5e-3; wide networks (WRN): 180 epochs, SGD 0.1, weight decay 7e-4.
    Constant learning rate for half of the run, a tenth at three quarters, a hundredth at the end, in straight lines;
    ten clean epochs first (as a share of the run: 10/120 or 10/180); batch 128, as in the code it seems to build on.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name: wide networks get the paper's other schedule.
        paper_settings: The attack starts at x, as Algorithm 1 prints it.

    Source: PIAT, arXiv:2303.13955, Algorithm 1, eq. (3) and (4), section A.
    Differs from the reference: the attack starts at a random point unless `paper_settings`; see `Interpolation`.
    """
    return replace(_piat_family("piat", epsilon, model, paper_settings), averages=(Interpolation(),))


def piat_nmse(*, epsilon: Threat, model: str = "", paper_settings: bool = False) -> Recipe:
    """PIAT + NMSE: the paper's full method.

    Schedule as in `piat`; μ = 5.

    Args:
        epsilon: The threat model, or its Linf radius; 8/255 in the paper.
        model: The network's name: wide networks get the paper's other schedule.
        paper_settings: The attack starts at x, as Algorithm 1 prints it.

    Source: PIAT, arXiv:2303.13955.
    Differs from the reference: as `piat` and `NormalizedMSE`.

    Example:
        >>> recipe = piat_nmse(epsilon="8/255", model="wrn_32_10")
        >>> recipe.epochs, recipe.passes()
        (180, 26.0)
    """
    return replace(
        _piat_family("piat_nmse", epsilon, model, paper_settings),
        objective=NormalizedMSE(strength=5.0),
        averages=(Interpolation(),),
    )


RECIPES: dict[str, Callable[..., Recipe]] = {
    function.__name__: function for function in (standard, pgd_at, pgd_at_wa, pgd_at_nmse, piat, piat_nmse)
}


def recipe_by_name(name: str) -> Callable[..., Recipe]:
    """The recipe function of a name; - and _, upper and lower case are one.

    Raises:
        HoldfastError: unknown, with the nearest names.
    """
    wanted = name.lower().replace("-", "_")
    if wanted not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return RECIPES[wanted]
