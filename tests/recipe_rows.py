"""What the tests of the recipes' settings share: words for rows, settings of whole families, and how both are read.

The rows are written out from the papers and their authors' public code, not from ours. A number that neither gives is
what the recipe's docstring promises; the comment above it says "docstring". An epoch is counted from 0 here: epoch 100
is the moment at which 100 epochs are done. A change that code places at "epoch >= 60" stands at 60, whether it counts
from 0 or from 1, unless the comment says "as executed".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from holdfast.recipe import Recipe
from holdfast.recipes import RECIPES
from holdfast.schedule import Progress, value_at

EPSILON = 8 / 255
TRADES_STEP = EPSILON * 0.007 / 0.031  # the code of TRADES, MART, ALP and SEAT: 0.007 at 0.031
JUST = 0.01  # of an epoch, one step of a hundred: just before a change
Row = dict[str, Any]


def part(type_name: str, **settings: Any) -> Row:
    """An attack, objective, view or average: its class, and what it is set to."""
    return {"type": type_name, **settings}


def steps(*changes: tuple[float, float], last: float) -> dict[float, float]:
    """{epoch: value} just before and at every change, and at the run's end."""
    first, *later = changes
    values = dict([first])
    for (_, before), (epoch, after) in zip(changes, later, strict=False):
        values |= {epoch - JUST: before, epoch: after}
    return {**values, last: changes[-1][1]}


def pgd(**changes: Any) -> Row:
    """PGD-10 with steps of 2/255, a uniform start and running statistics: what all recipes share, on equal terms."""
    shared = {"steps": 10, "step_size": 2 / 255, "random_start": True, "statistics": "eval"}
    return part("PGD", **{**shared, "restarts": 1, "early_stop": None, "step_noise": 0.0, **changes})


def worst_weights(gamma: Any, **changes: Any) -> Row:
    """AWP as its code runs it for PGD-AT. With one step its size has no effect, so that it is no column."""
    shared = {"sides": ("adv",), "ascend": "adversarial_ce", "steps": 1, "scale": "tensor", "below": None}
    return part("WorstWeights", gamma=gamma, **{**shared, **changes})


def stability(strength: Any, **changes: Any) -> Row:
    """ISEAT's term: squared L2 between logits, weighted linearly by rank."""
    shared = {"weights": "linear", "distance": "squared_l2", "compared": "adv"}
    return part("LogitStability", strength=strength, **{**shared, **changes})


def swa(begin: float, **changes: Any) -> Row:
    """SWA, by default at every epoch's end with statistics of all clean training images."""
    return part("SWA", **{"begin": begin, "period": None, "buffers": "clean", "images": None, **changes})


INTERPOLATION = part(  # λ = (n + 1) / (n + 10); the rest is this project's decision, the paper is silent
    "Interpolation",
    weight=None,
    coefficients=(1, 1, 1, 10),
    count_from="start",
    buffers="interpolate",
    period=None,
    scale_n=None,
)

COMMON: Row = {  # robust overfitting (Rice et al.): SGD 0.1, divided by 10 at half and three quarters of 200 epochs
    "threat": {"norm": "Linf", "epsilon": EPSILON},
    "attack": pgd(),
    "objective": part("AdversarialTraining"),
    "views": (),
    "averages": (),
    "networks": {},
    "augmentation": None,  # crop and flip
    "mixing": None,
    "extra_share": 0.0,
    "input_noise": 0.0,
    "train_ball": None,
    "learning_rate": steps((0, 0.1), (100, 0.01), (150, 0.001), last=200),
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "nesterov": False,
    "epochs": 200,
    "warmup_epochs": 0.0,
    "batch_size": 128,
    "label_smoothing": 0.0,
    "gradient_clip": None,
    "fine_tuning": False,
    "step": None,
}


def row(*, wide: Row | None = None, paper: Row | None = None, **settings: Any) -> dict[str, Row]:
    """A recipe's settings, what differs for wide networks, and what paper_settings changes."""
    return {"settings": {**COMMON, **settings}, "wide": wide or {}, "paper": paper or {}}


TRACKED = {"attack": pgd(statistics="batch_tracked")}  # the network is in train mode while the attack runs
NORMAL = {"attack": pgd(random_start="normal", step_size=TRADES_STEP)}  # starts at 0.001 N(0, 1)

# The fast-AT benchmark's one cycle: 0.004 at first, 0.1 at its peak, and down along half a cosine. Its epochs end at
# 99, so that what it has at epoch 50, 70 and 90 (0.079, 0.037, 0.0040) a cycle over 100 epochs has one later.
END = 0.1 / 25 / 10_000
CYCLE = {0: 0.004, 30: 0.1, 100: END}
CYCLE |= {e + 1: END + (0.1 - END) * (1 + math.cos(math.pi * (e - 29) / 70)) / 2 for e in (50, 70, 90)}
MOMENTUM_CYCLE = {0: 0.95, 15: 0.9, 30: 0.85, 65: 0.9, 100: 0.95}  # `OneCycleLR` cycles momentum too

# TRADES: code 0.1, 2e-4, drops at 75 and 90 (the code stops at 76; the paper trains 100 epochs). AT_HE's batch:
# docstring.
TRADES: Row = {
    "weight_decay": 2e-4,
    "learning_rate": steps((0, 0.1), (75, 0.01), (90, 0.001), last=100),
    "epochs": 100,
    "paper": NORMAL,
}

# PIAT's appendix: constant, then straight lines; clean images for ten epochs. Batch: docstring (SEAT's code).
PIAT: Row = {
    "learning_rate": {0: 0.01, 60: 0.01, 61: 0.0097, 75: 0.0055, 90: 0.001, 91: 0.00097, 105: 0.00055, 120: 0.0001},
    "weight_decay": 3.5e-3,
    "epochs": 120,
    "warmup_epochs": 10.0,
}
PIAT_WIDE: Row = {
    "learning_rate": {0: 0.1, 90: 0.1, 91: 0.098, 112.5: 0.055, 135: 0.01, 136: 0.0098, 157.5: 0.0055, 180: 0.001},
    "weight_decay": 7e-4,
    "epochs": 180,
}
FROM_THE_IMAGE = {"attack": pgd(random_start=False)}  # Algorithm 1 begins at x
MART_5, MART_6 = part("MART", beta=5.0), part("MART", beta=6.0)

# ISEAT, section 6: λ waits for the first drop, γ does not; the attack begins at x, in train mode in the code.
ISEAT: Row = {
    "attack": pgd(random_start=False),
    "objective": stability(steps((0, 0.0), (100, 0.1), last=200)),
    "views": (worst_weights(0.007),),
    "paper": {"attack": pgd(random_start=False, statistics="batch_tracked")},
}
# γ waits for 10 of 200 epochs, and the whole loss is climbed.
TRADES_AWP_VIEW = worst_weights(steps((0, 0.0), (10, 0.005), last=200), sides=("clean", "adv"), ascend="objective")


def moment(recipe: Recipe, epoch: float) -> Progress:
    """Where a run stands that has trained so many epochs, of a hundred steps each."""
    step, total = round(100 * epoch), 100 * recipe.epochs
    stage = recipe.schedule.stage(min(1.0, step / total))
    return Progress(epoch=int(epoch), step=step, steps_per_epoch=100, epochs=recipe.epochs, stage=stage)


def as_set(recipe: Recipe) -> Row:
    """A recipe's settings under the table's names."""
    names = ("attack", "objective", "views", "averages", "input_noise", "train_ball", "epochs", "batch_size", "threat")
    names += ("label_smoothing", "gradient_clip", "fine_tuning", "step", "networks", "augmentation", "mixing")
    names += ("extra_share",)
    optimizer = recipe.optimizer
    return {
        **{name: getattr(recipe, name) for name in names},
        "learning_rate": lambda progress: optimizer.learning_rate * recipe.schedule(progress),
        "momentum": optimizer.momentum,
        "weight_decay": optimizer.weight_decay,
        "nesterov": optimizer.nesterov,
        "warmup_epochs": recipe.warmup * recipe.epochs,
    }


def setting(recipe: Recipe, of: Any, name: str) -> Any:
    """A setting of a part; a step size that is left out is what the part's docstring says of None."""
    value = getattr(of, name)
    if name == "step_size" and value is None:
        return recipe.threat.epsilon / (4 if type(of).__name__ in ("PGD", "CollaborativePGD") else 1)
    return value


def read(recipe: Recipe, found: Any, expected: Any) -> Any:
    """What was found, in the shape of what is expected: a part's settings, a value over the epochs, or a value."""
    if isinstance(found, Mapping):  # further networks by name
        same = isinstance(expected, Mapping) and set(found) == set(expected)
        return {name: read(recipe, one, expected[name]) for name, one in found.items()} if same else str(sorted(found))
    if found is None or isinstance(found, str):
        return found
    if isinstance(expected, Mapping) and "type" in expected:
        if type(found).__name__ != expected["type"]:
            return {"type": type(found).__name__}
        names = [name for name in expected if name != "type"]
        values = {name: read(recipe, setting(recipe, found, name), expected[name]) for name in names}
        return {"type": type(found).__name__, **values}
    if isinstance(expected, Mapping) and any(isinstance(key, str) for key in expected):
        return {name: read(recipe, getattr(found, name), value) for name, value in expected.items()}
    if isinstance(expected, Mapping):
        return {epoch: value_at(found, moment(recipe, epoch)) for epoch in expected}
    if isinstance(expected, tuple):
        if len(found) != len(expected):
            return tuple(str(one) for one in found)
        return tuple(read(recipe, one, value) for one, value in zip(found, expected, strict=True))
    if callable(found) and expected is not None:  # a schedule where one value is expected
        values = {value_at(found, moment(recipe, share * recipe.epochs / 20)) for share in range(21)}
        return values.pop() if len(values) == 1 else repr(sorted(values))
    return found


def flat(settings: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as one level, with dotted names."""
    if isinstance(settings, tuple):
        settings = dict(enumerate(settings)) or "none"
    if not isinstance(settings, Mapping):
        return {name: settings}
    return {key: value for part_, rest in settings.items() for key, value in flat(rest, f"{name}.{part_}").items()}


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same, numbers up to rounding."""
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-12)
    return bool(one == other)


def differences(name: str, row: Mapping[str, Row], model: str, paper_settings: bool) -> dict[str, str]:
    """Where a recipe is not as its row has it."""
    recipe = RECIPES[name](epsilon="8/255", model=model, paper_settings=paper_settings)
    expected = {"name": name, **row["settings"]}
    expected |= row["wide"] if model.startswith("wrn") else {}
    expected |= row["paper"] if paper_settings else {}
    everything = {"name": recipe.name, **as_set(recipe)}
    found, expected = flat({key: read(recipe, everything[key], expected[key]) for key in expected}), flat(expected)
    pairs = {key: (found.get(key, "nothing"), expected.get(key, "nothing")) for key in {**expected, **found}}
    return {key: f"{one!r} is not {other!r}" for key, (one, other) in pairs.items() if not same(one, other)}
