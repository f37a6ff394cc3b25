"""What several families of recipes are set by: the threat model, PGD-10, and learning rates that step down."""

from __future__ import annotations

from holdfast.attacks.pgd import PGD
from holdfast.schedule import Schedule, piecewise
from holdfast.threat import Linf, ThreatModel

Threat = ThreatModel | float | str
"""A threat model, or the radius of an Linf one: 8/255 as text or number."""


def threat_of(epsilon: Threat) -> ThreatModel:
    """The threat model itself."""
    return epsilon if isinstance(epsilon, ThreatModel) else Linf(epsilon)  # type: ignore[arg-type]  # text is parsed there


def pgd10(threat: ThreatModel) -> PGD:
    """PGD-10 with a uniform start and steps of a quarter of epsilon, which is 2/255 at 8/255."""
    return PGD(steps=10, step_size=threat.epsilon / 4)


def trades_pgd10(threat: ThreatModel) -> PGD:
    """PGD-10 as the code of TRADES, MART and ALP runs it: normal noise first, steps of 0.007 at epsilon 0.031."""
    return PGD(steps=10, step_size=threat.epsilon * 7 / 31, random_start="normal")


def steps_down() -> Schedule:
    """The learning rate divided by 10 at 50 % and 75 % of the run."""
    return piecewise((0, 1), (0.5, 0.1), (0.75, 0.01))


def cycled_momentum(rise: float) -> Schedule:
    """0.95 down to 0.85 at this share of the run and back, as PyTorch's `OneCycleLR` does unless told otherwise."""
    return Schedule(((0.0, 0.95), (rise, 0.85), (1.0, 0.95)), "cosine")


def is_wide(model: str) -> bool:
    """Whether the network of this name is a wide ResNet, which some papers train differently."""
    return model.lower().startswith("wrn")
