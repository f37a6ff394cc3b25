"""What is run, in which order: AutoAttack's versions, the faster screening, and single attacks by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from holdfast.attacks.apgd import APGD
from holdfast.attacks.apgd_l1 import APGDL1
from holdfast.attacks.carlini_wagner import CarliniWagnerL2
from holdfast.attacks.fab import FAB
from holdfast.attacks.iterative import IterativeGradient
from holdfast.attacks.mim import MIM
from holdfast.attacks.multi_targeted import MultiTargeted
from holdfast.attacks.noise import UniformNoise
from holdfast.attacks.square import Square
from holdfast.attacks.stepwise import Loss, StepwiseAttack
from holdfast.attacks.transfer import Transfer
from holdfast.errors import HoldfastError, unknown_name
from holdfast.evaluation.table import PROTOCOLS, SINGLE, UPPER_BOUND
from holdfast.threat import ThreatModel


@dataclass(frozen=True)
class Protocol:
    """Attacks in the order in which they are run; each sees what the earlier ones left.

    Attributes:
        label: As the number is quoted.
        attacks: In order.
        at_end: See `holdfast.evaluation.pursuit.Rules`.
        until_nearest: See there.
    """

    label: str
    attacks: tuple[StepwiseAttack, ...]
    at_end: bool = False
    until_nearest: bool = False

    def require(self, threat: ThreatModel) -> None:
        """Refuse a norm that one of the attacks does not know, and attacks that are told apart by nothing.

        Raises:
            HoldfastError: says which.
        """
        for attack in self.attacks:
            attack.require(threat)
        names = [attack.name for attack in self.attacks]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise HoldfastError(f"{twice.pop()} is asked for twice: once is enough")
        if self.until_nearest and not all(attack.minimum_norm for attack in self.attacks):
            raise HoldfastError("only minimum-norm attacks have distances: use fab, fab-t, or cw with --norm L2")


def apgd(threat: ThreatModel, objective: Loss, *, restarts: int = 1, targets: int = 0, average: int = 1, **own: Any):
    """APGD for this norm."""
    if threat.norm == "L1":
        return APGDL1(objective=objective, restarts=restarts, targets=targets, average=average, **own)
    return APGD(objective=objective, restarts=restarts, targets=targets, average=average)


def autoattack(threat: ThreatModel, version: str = "standard") -> Protocol:
    """AutoAttack with the attacks, order, iterations, restarts and targets of the reference code.

    Args:
        threat: Its norm decides the settings.
        version: ``"standard"``, ``"plus"`` or ``"rand"``.

    Raises:
        HoldfastError: another version.
    Source: Croce and Hein, ICML 2020, arXiv:2003.01690; L1: arXiv:2103.01208. Reference code: fra31/auto-attack.

    Example:
        >>> from holdfast.threat import Linf
        >>> [attack.name for attack in autoattack(Linf(0.1)).attacks]
        ['APGD-CE', 'APGD-T, 9 targets', 'FAB-T, 9 targets', 'Square-5000']
    """
    label = f"AutoAttack-{version}"
    sparse = threat.norm == "L1"
    if version == "standard":
        first = apgd(threat, "ce", restarts=5 if sparse else 1)
        targeted = apgd(threat, "targeted_dlr", targets=5 if sparse else 9)
        return Protocol(label, (first, targeted, FAB(targets=9), Square()))
    small = {"large_radii": False} if sparse else {}
    if version == "plus":
        five = [apgd(threat, objective, restarts=5, **small) for objective in ("ce", "dlr")]
        targeted = apgd(threat, "targeted_dlr", targets=9, **small)
        return Protocol(label, (*five, FAB(restarts=5), Square(), targeted, FAB(targets=9)))
    if version == "rand":
        both = [apgd(threat, objective, average=20, **small) for objective in ("ce", "dlr")]
        return Protocol(label, tuple(both), at_end=True)
    raise HoldfastError(f"AutoAttack version {version!r} is unknown: use standard, plus or rand")


def quick(threat: ThreatModel) -> Protocol:
    """The two attacks of AutoAttack that break nearly all that it breaks."""
    standard = autoattack(threat).attacks[:2]
    return Protocol(f"quick ({' and '.join(attack.name for attack in standard)}): {UPPER_BOUND}", standard)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What single attacks by name may be given; None leaves the attack's own.

    Args:
        steps: Of gradient attacks and FAB; queries of Square, draws of noise.
        restarts: Where the attack has them.
        step_size: Of fgsm, pgd, mim and multitargeted.
        source: The network whose images are transferred, and its name.
    """

    steps: int | None = None
    restarts: int | None = None
    step_size: float | str | None = None
    source: tuple[nn.Module, str] | None = None

    def given(self, *names: str, **renamed: str) -> dict[str, Any]:
        """Those of an attack's settings that are given, as arguments."""
        places = {**{name: name for name in names}, **renamed}
        return {place: getattr(self, name) for name, place in places.items() if getattr(self, name) is not None}


def _transfer(threat: ThreatModel, options: Options) -> StepwiseAttack:
    own = options.given("steps", "source")
    if options.source is None:
        raise HoldfastError("transfer needs the other network: give --source RUN")
    own["source"], own["source_name"] = options.source
    return Transfer(**own)


def _carlini_wagner(threat: ThreatModel, options: Options) -> StepwiseAttack:
    if threat.norm == "L2":
        return CarliniWagnerL2(**options.given("steps"))
    own = {"steps": 30, **options.given("steps", "restarts", "step_size")}
    return IterativeGradient(objective="margin", label="CW", **own)


_MAKE: dict[str, Callable[[ThreatModel, Options], StepwiseAttack]] = {
    "fgsm": lambda threat, o: IterativeGradient(label="FGSM", steps=1, random_start=False, **o.given("step_size")),
    "pgd": lambda threat, o: IterativeGradient(**o.given("steps", "restarts", "step_size")),
    "mim": lambda threat, o: MIM(**o.given("steps", "restarts", "step_size")),
    "cw": _carlini_wagner,
    "apgd-ce": lambda threat, o: apgd(threat, "ce", **o.given("restarts")),
    "apgd-dlr": lambda threat, o: apgd(threat, "dlr", **o.given("restarts")),
    "apgd-t": lambda threat, o: apgd(
        threat, "targeted_dlr", targets=5 if threat.norm == "L1" else 9, **o.given("restarts")
    ),
    "fab": lambda threat, o: FAB(**o.given("steps", "restarts")),
    "fab-t": lambda threat, o: FAB(targets=9, **o.given("steps", "restarts")),
    "square": lambda threat, o: Square(**o.given("restarts", steps="queries")),
    "multitargeted": lambda threat, o: MultiTargeted(**o.given("steps", "restarts", "step_size")),
    "transfer": _transfer,
    "noise": lambda threat, o: UniformNoise(**o.given(steps="draws")),
}


_TAKES: dict[str, tuple[str, ...]] = {
    "fgsm": ("step_size",),
    "pgd": ("steps", "restarts", "step_size"),
    "mim": ("steps", "restarts", "step_size"),
    "cw": ("steps", "restarts", "step_size"),
    "apgd-ce": ("restarts",),
    "apgd-dlr": ("restarts",),
    "apgd-t": ("restarts",),
    "fab": ("steps", "restarts"),
    "fab-t": ("steps", "restarts"),
    "square": ("steps", "restarts"),
    "multitargeted": ("steps", "restarts", "step_size"),
    "transfer": ("steps", "source"),
    "noise": ("steps",),
}


def _refuse_unused(options: Options, words: Sequence[str], taken: Collection[str]) -> None:
    """Refuse a setting that none of the named attacks has."""
    for name in ("steps", "restarts", "step_size", "source"):
        if getattr(options, name) is not None and name not in taken:
            raise HoldfastError(f"{' and '.join(words)} takes no {name.replace('_', '-')}: leave it out")


def known_words(text: str) -> list[str]:
    """The names in a text with commas.

    Raises:
        HoldfastError: one is unknown, none is given, or a whole protocol stands beside others.
    """
    words = [word.strip().lower().replace("_", "-") for word in text.split(",") if word.strip()]
    if not words:
        raise HoldfastError(f"no attack is named: use one of {', '.join((*PROTOCOLS, *SINGLE))}")
    for word in words:
        if word not in PROTOCOLS and word not in SINGLE:
            raise unknown_name("attack", word, (*PROTOCOLS, *SINGLE))
        if word in PROTOCOLS and len(words) > 1:
            raise HoldfastError(f"{word} is a whole protocol: give it alone")
    return words


def named(text: str, threat: ThreatModel, options: Options | None = None, *, distances: bool = False) -> Protocol:
    """The protocol of a name, or of several names of single attacks with commas between them.

    Args:
        text: A key of `PROTOCOLS` or of `SINGLE`; ``"pgd,square"``.
        threat: The ball.
        options: Settings of single attacks.
        distances: Go on to the nearest example instead of stopping within epsilon (minimum-norm attacks).

    Raises:
        HoldfastError: a name is unknown, or an attack does not know the norm or a setting.

    Example:
        >>> from holdfast.threat import Linf
        >>> named("pgd,square", Linf(0.1)).label
        'PGD-50 + Square-5000'
    """
    options = options or Options()
    words = known_words(text)
    if words[0] in PROTOCOLS:
        _refuse_unused(options, words, ())
        made = quick(threat) if words[0] == "quick" else autoattack(threat, words[0].partition("-")[2] or "standard")
        if distances:
            raise HoldfastError("distances come from minimum-norm attacks: use --attack fab-t, fab or cw (L2)")
        made.require(threat)
        return made
    taken = {setting for word in words for setting in _TAKES[word] if word != "cw" or threat.norm != "L2"}
    _refuse_unused(options, words, taken | ({"steps"} if "cw" in words else set()))
    made = of_attacks([_MAKE[word](threat, options) for word in words], until_nearest=distances)
    made.require(threat)
    return made


def adaptations(protocol: Protocol, classes: int) -> list[str]:
    """What few classes change, one sentence each: fewer targets, losses that need more logits than there are.

    Example:
        >>> from holdfast.threat import Linf
        >>> adaptations(autoattack(Linf(0.1)), 3)[0]
        'APGD-T, 9 targets: 2 targets, as there are 3 classes'
    """
    told = []
    for attack in protocol.attacks:
        if attack.targets > classes - 1:
            count = classes - 1
            told.append(f"{attack.name}: {count} target{'s' * (count > 1)}, as there are {classes} classes")
        objective = getattr(attack, "objective", None)
        if objective in ("dlr", "targeted_dlr") and classes < 3:
            told.append(f"{attack.name}: the difference of the two logits in place of DLR, which needs three")
        elif objective == "targeted_dlr" and classes < 4:
            told.append(f"{attack.name}: targeted DLR without a fourth logit")
    return told


def of_attacks(attacks: Sequence[StepwiseAttack], *, until_nearest: bool = False) -> Protocol:
    """A protocol of one's own attacks, named after them."""
    label = " + ".join(attack.name for attack in attacks)
    return Protocol(f"{label}, nearest examples" if until_nearest else label, tuple(attacks), False, until_nearest)


def protocol_of(attack: Any, threat: ThreatModel, options: Options | None) -> Protocol:
    """Return the protocol that was named or given.

    Raises:
        HoldfastError: the name is unknown, or it is neither a name nor attacks.
    """
    if isinstance(attack, Protocol):
        return attack
    if isinstance(attack, str):
        return named(attack, threat, options)
    if isinstance(attack, Sequence) and attack and all(isinstance(each, StepwiseAttack) for each in attack):
        return of_attacks(attack)
    raise HoldfastError(f"attack is {attack!r}: give a name such as autoattack, or a list of attacks such as [APGD()]")
