"""Every recipe's hyper-parameters, written out from the papers and their authors' public code, not from ours.

A number that neither gives is what the recipe's docstring promises; the comment above it says "docstring". An epoch is
counted from 0 here: epoch 100 is the moment at which 100 epochs are done. Where nobody states momentum (SEAT, TRADES,
ALP, MART, SWA), it is the 0.9 of `SGD`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

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
    return part("PGD", **{**shared, "restarts": 1, "early_stop": None, **changes})


def worst_weights(gamma: Any, **changes: Any) -> Row:
    """AWP as its code runs it for PGD-AT. With one step its size has no effect, so that it is no column."""
    shared = {"sides": ("adv",), "ascend": "adversarial_ce", "steps": 1, "scale": "tensor", "below": None}
    return part("WorstWeights", gamma=gamma, **{**shared, **changes})


def stability(strength: Any, **changes: Any) -> Row:
    """ISEAT's term: squared L2 between logits, weighted linearly by rank."""
    shared = {"weights": "linear", "distance": "squared_l2", "compared": "adv"}
    return part("LogitStability", strength=strength, **{**shared, **changes})


def invariance(strength: float) -> Row:
    """AR-AT's loss as its code's defaults have it."""
    return part(
        "AsymmetricInvariance",
        strength=strength,
        layers=None,  # the network's last stage
        distance="cosine",
        direction="asymmetric",
        predictor=True,
        predictor_ratio=0.25,
        balance="measured",
        balance_power=1.0,
    )


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
    "networks": 0,
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
NMSE = part("NormalizedMSE", strength=5.0, detach_weight=False)

# AR-AT's code as executed: 0.02 in the first epoch, drops after epoch 76 and 91 (counted from 1).
AR_AT: Row = {
    "objective": invariance(30.0),
    "views": (part("SplitBatchNorm", sides=("clean",)),),
    "learning_rate": steps((0, 0.02), (1, 0.1), (76, 0.01), (91, 0.001), last=100),
    "epochs": 100,
    "wide": {"objective": invariance(100.0)},
    # its noise is written into the clean batch, around which the attack then starts
    "paper": {"attack": pgd(random_start=False, statistics="batch_tracked"), "input_noise": EPSILON},
}

# ISEAT, section 6: λ waits for the first drop, γ does not; the attack begins at x, in train mode in the code.
ISEAT: Row = {
    "attack": pgd(random_start=False),
    "objective": stability(steps((0, 0.0), (100, 0.1), last=200)),
    "views": (worst_weights(0.007),),
    "paper": {"attack": pgd(random_start=False, statistics="batch_tracked")},
}
# Section 6.6: 40 epochs, 0.01 and 0.001 after 20. That λ is 0.1 throughout: docstring.
FINE_TUNED: Row = {
    **ISEAT,
    "objective": stability(0.1),
    "learning_rate": steps((0, 0.01), (20, 0.001), last=40),
    "epochs": 40,
    "fine_tuning": True,
}
# γ waits for 10 of 200 epochs, and the whole loss is climbed.
TRADES_AWP_VIEW = worst_weights(steps((0, 0.0), (10, 0.005), last=200), sides=("clean", "adv"), ascend="objective")

TABLE: dict[str, dict[str, Row]] = {
    # No paper: docstring.
    "standard": row(attack=None, objective=part("StandardTraining")),
    "pgd_at": row(paper=TRACKED),
    # The benchmark's average has no warm-up and its scheduler cycles momentum. Both as options: docstring.
    "pgd_at_wa": row(
        averages=(part("EMA", decay=0.9995, warm_up=True, buffers="average"),),
        learning_rate=CYCLE,
        epochs=100,
        label_smoothing=0.4,
        paper={
            "averages": (part("EMA", decay=0.9995, warm_up=False, buffers="average"),),
            "momentum": {0: 0.95, 15: 0.9, 30: 0.85, 65: 0.9, 100: 0.95},
        },
    ),
    # Chen et al.'s code: drops at 50 and 150, averaged from epoch 55 (counted from 0), statistics on clean images.
    "pgd_at_swa": row(
        averages=(swa(55 / 200),),
        learning_rate=steps((0, 0.1), (50, 0.01), (150, 0.001), last=200),
        paper=TRACKED,
    ),
    # SEAT's code: constant, then straight lines between thirds of the run.
    "seat": row(
        averages=(part("EMA", decay=0.999, warm_up=True, buffers="average"),),
        learning_rate={0: 0.01, 40: 0.01, 41: 0.009775, 60: 0.0055, 80: 0.001, 100: 0.00055, 120: 0.0001},
        weight_decay=3.5e-3,
        epochs=120,
        wide={
            "learning_rate": {0: 0.1, 40: 0.1, 41: 0.09775, 60: 0.055, 80: 0.01, 100: 0.0075, 120: 0.005},
            "weight_decay": 7e-4,
        },
        paper={"attack": pgd(step_size=TRADES_STEP)},
    ),
    # AT_HE's code: β = 1, half of either cross-entropy, the recipe of TRADES. 100 epochs, not its 77: docstring.
    "alp": row(objective=part("LogitPairing", strength=1.0, clean_weight=0.5), **TRADES),
    "trades": row(objective=part("TRADES", beta=6.0), **TRADES),
    # Our own reading; settings as TRADES: docstring.
    "asym_trades": row(
        objective=part("AsymmetricTRADES", beta=6.0, adversarial_weight=0.0, detach_clean=True, predictor=False),
        **TRADES,
    ),
    # MART's code. Batch: docstring.
    "mart": row(
        objective=MART_5,
        learning_rate=steps((0, 0.01), (75, 0.001), (90, 0.0001), (100, 0.00001), last=120),
        weight_decay=3.5e-3,
        epochs=120,
        wide={
            "objective": MART_6,
            "learning_rate": steps((0, 0.1), (75, 0.01), last=90),
            "weight_decay": 7e-4,
            "epochs": 90,
        },
        paper=NORMAL,
    ),
    # Only what will stay as it is.
    "score": {"settings": {"objective": part("SquaredProbabilities"), "epochs": 110}, "wide": {}, "paper": {}},
    "awp": row(views=(worst_weights(0.01),), paper=TRACKED),
    "rwp": row(
        views=(worst_weights(0.01, steps=10, step_size=0.01, scale="global", below=1.7),),
        paper=TRACKED,
    ),
    # AWP's code runs TRADES with steps of 2/255, not 0.007. The schedule of `pgd_at`: docstring.
    "trades_awp": row(
        objective=part("TRADES", beta=6.0),
        views=(TRADES_AWP_VIEW,),
        paper={"attack": pgd(random_start="normal")},
    ),
    # γ and the schedule of TRADES-AWP: docstring. β as in MART.
    "mart_awp": row(
        objective=MART_5,
        views=(TRADES_AWP_VIEW,),
        wide={"objective": MART_6},
        paper={"attack": pgd(random_start="normal")},
    ),
    "pgd_at_nmse": row(objective=NMSE, wide=PIAT_WIDE, paper=FROM_THE_IMAGE, **PIAT),
    "piat": row(averages=(INTERPOLATION,), wide=PIAT_WIDE, paper=FROM_THE_IMAGE, **PIAT),
    "piat_nmse": row(objective=NMSE, averages=(INTERPOLATION,), wide=PIAT_WIDE, paper=FROM_THE_IMAGE, **PIAT),
    # KL has no gradient at x, so that paper_settings leaves the start alone: docstring.
    "piat_trades": row(objective=part("TRADES", beta=6.0), averages=(INTERPOLATION,), wide=PIAT_WIDE, **PIAT),
    # The paper gives no β for MART: docstring, and MART's own.
    "piat_mart": row(
        objective=MART_5,
        averages=(INTERPOLATION,),
        wide={**PIAT_WIDE, "objective": MART_6},
        paper=FROM_THE_IMAGE,
        **PIAT,
    ),
    "ar_at": row(**AR_AT),
    # The code begins at epoch 76 (counted from 1) and averages every 500 steps, statistics from one whole pass.
    # Every epoch's end, and 2,048 images: docstring.
    "ar_at_swa": row(
        averages=(swa(0.75, buffers="adversarial", images=2048),),
        **{**AR_AT, "paper": {**AR_AT["paper"], "averages": (swa(0.75, buffers="adversarial", period=500),)}},
    ),
    # Combinations that nobody has reported: docstring.
    "ar_at_awp": row(**{**AR_AT, "views": (*AR_AT["views"], worst_weights(0.005))}),
    "ar_at_piat": row(averages=(INTERPOLATION,), **AR_AT),
    "iseat": row(**ISEAT),
    # How the paper averages is not known: docstring.
    "iseat_swa": row(averages=(swa(0.5),), **ISEAT),
    # Steps of 1/255, no wait for λ, epsilon from 0 within five epochs.
    "iseat_svhn": row(
        attack=pgd(random_start=False, step_size=1 / 255),
        objective=stability(0.1),
        views=(worst_weights(0.009),),
        train_ball={0: 0.0, 1: EPSILON / 5, 2.5: EPSILON / 2, 5: EPSILON, 6: EPSILON, 200: EPSILON},
        learning_rate=steps((0, 0.01), (100, 0.001), (150, 0.0001), last=200),
        paper={"attack": pgd(random_start=False, step_size=1 / 255, statistics="batch_tracked")},
    ),
    "iseat_finetune": row(**FINE_TUNED),
    # Table 9: LSI compares at θ. That the cross-entropy stays at θ + ν: docstring.
    "lsi_finetune": row(**{**FINE_TUNED, "objective": stability(0.1, compared="adv_unperturbed")}),
    # Eq. (12): clean and adversarial images both at θ + ν.
    "trades_awp_finetune": row(**{**FINE_TUNED, "views": (worst_weights(0.007, sides=("clean", "adv")),)}),
    # Eq. (7), the tenth with the highest AV, 10 epochs, divided at half. η = 1 of 0 to 4: docstring.
    "iseat_eq7": row(
        **{
            **FINE_TUNED,
            "objective": stability(1.0, weights="top", top_share=0.1),
            "views": (),
            "learning_rate": steps((0, 0.01), (5, 0.001), last=10),
            "epochs": 10,
        }
    ),
    "iseat_piat": row(averages=(INTERPOLATION,), **ISEAT),
}


def moment(recipe: Recipe, epoch: float) -> Progress:
    """Where a run stands that has trained so many epochs, of a hundred steps each."""
    step, total = round(100 * epoch), 100 * recipe.epochs
    stage = recipe.schedule.stage(min(1.0, step / total))
    return Progress(epoch=int(epoch), step=step, steps_per_epoch=100, epochs=recipe.epochs, stage=stage)


def as_set(recipe: Recipe) -> Row:
    """A recipe's settings under the table's names."""
    names = ("attack", "objective", "views", "averages", "input_noise", "train_ball", "epochs", "batch_size", "threat")
    names += ("label_smoothing", "gradient_clip", "fine_tuning", "step")
    optimizer = recipe.optimizer
    return {
        **{name: getattr(recipe, name) for name in names},
        "networks": len(recipe.networks),
        "learning_rate": lambda progress: optimizer.learning_rate * recipe.schedule(progress),
        "momentum": optimizer.momentum,
        "weight_decay": optimizer.weight_decay,
        "nesterov": optimizer.nesterov,
        "warmup_epochs": recipe.warmup * recipe.epochs,
    }


def read(recipe: Recipe, found: Any, expected: Any) -> Any:
    """What was found, in the shape of what is expected: a part's settings, a value over the epochs, or a value."""
    if isinstance(expected, Mapping) and "type" in expected:
        values = {name: read(recipe, getattr(found, name), value) for name, value in expected.items() if name != "type"}
        return {"type": type(found).__name__, **values}
    if isinstance(expected, Mapping) and any(isinstance(key, str) for key in expected):
        return {name: read(recipe, getattr(found, name), value) for name, value in expected.items()}
    if isinstance(expected, Mapping):
        return {epoch: value_at(found, moment(recipe, epoch)) for epoch in expected}
    if isinstance(expected, tuple):
        if len(found) != len(expected):
            return tuple(type(one).__name__ for one in found)
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


@pytest.mark.parametrize("paper_settings", [False, True], ids=["default", "paper"])
@pytest.mark.parametrize("model", ["resnet18", "wrn_34_10"])
@pytest.mark.parametrize("name", TABLE)
def test_hyper_parameters(name: str, model: str, paper_settings: bool) -> None:
    """A recipe has its paper's numbers, for both kinds of network, with and without `paper_settings`."""
    recipe = RECIPES[name](epsilon="8/255", model=model, paper_settings=paper_settings)
    expected = dict(TABLE[name]["settings"])
    expected |= TABLE[name]["wide"] if model.startswith("wrn") else {}
    expected |= TABLE[name]["paper"] if paper_settings else {}
    everything = as_set(recipe)
    assert recipe.name == name
    found = {setting: read(recipe, everything[setting], value) for setting, value in expected.items()}
    assert flat(found) == pytest.approx(flat(expected))


def test_every_recipe_is_in_the_table() -> None:
    """A new recipe comes with its row."""
    assert set(TABLE) == set(RECIPES)


@pytest.mark.parametrize("name", ["trades", "asym_trades", "alp", "mart", "seat"])
def test_steps_at_the_papers_own_radius(name: str) -> None:
    """Under `paper_settings`, 0.031 is searched in steps of 0.007."""
    assert RECIPES[name](epsilon=0.031, paper_settings=True).attack.step_size == pytest.approx(0.007)
