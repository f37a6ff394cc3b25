"""Hyper-parameters of the methods that the first are compared with; see `recipe_rows`.

"Code" is what the authors have made public: the facts of `methods.md`, or the file named.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from holdfast.recipes import RECIPES
from recipe_rows import (
    CYCLE,
    EPSILON,
    FROM_THE_IMAGE,
    INTERPOLATION,
    ISEAT,
    JUST,
    MART_5,
    MART_6,
    MOMENTUM_CYCLE,
    NORMAL,
    PIAT,
    PIAT_WIDE,
    TRACKED,
    TRADES_STEP,
    Row,
    differences,
    part,
    pgd,
    row,
    stability,
    steps,
    swa,
    worst_weights,
)
from test_recipe_settings import TABLE as FIRST

NETWORK = {"model": "", "init": None}  # of the classifier's own kind, with new weights
TEACHER = part("FurtherNetwork", **NETWORK, trained=False)
IDBH_STRONG, IDBH_WEAK = part("IDBH", strength="strong"), part("IDBH", strength="weak")
TRADES_6, TRADES_5 = part("TRADES", beta=6.0), part("TRADES", beta=5.0)
# Λ = -1 from epoch 60 of 120 on, where the learning rate drops too (both are counted from 1 in the code).
GAIRAT = part("GeometryWeighted", shift=-1.0, begin=0.5)


def fgsm(**changes: Any) -> Row:
    """FGSM from a uniform point of the ball, with one step of epsilon and running statistics."""
    shared = {"step_size": EPSILON, "random_start": True, "start_scale": 1.0, "project": True, "statistics": "eval"}
    return part("FGSM", **{**shared, **changes})


def friendly(*changes: tuple[float, float], last: float, **others: Any) -> dict[str, Row]:
    """PGD-10 that stops, at τ that grows, by default and as the paper's code runs it."""
    stop = steps(*changes, last=last)
    return {"attack": pgd(early_stop=stop), "paper": {"attack": pgd(early_stop=stop, step_size=TRADES_STEP, **others)}}


def triangle(peak: float, epochs: float) -> dict[float, float]:
    """From 0 to the peak at half the run, and back to 0."""
    half = epochs / 2
    return {0: 0.0, half / 2: peak / 2, half: peak, 1.5 * half: peak / 2, epochs: 0.0}


def half_cosine(peak: float, epochs: float) -> dict[float, float]:
    """From the peak to 0."""
    return {epochs * part / 4: peak * (1 + math.cos(math.pi * part / 4)) / 2 for part in range(5)}


def strategy(epsilons: range, numbers: range, sizes: range, **changes: Any) -> Row:
    """LAS-AT's own step: R = R1 + 4 R2 + 2 R3, PGD-10 with two restarts behind R2, SGD 1e-4 clipped at 1."""
    shared = {"period": 20, "learning_rate": 1e-4, "gradient_clip": 1.0, "loss_weight": 1.0, "robust_weight": 4.0}
    shared |= {"clean_weight": 2.0, "look_ahead_steps": 10, "look_ahead_restarts": 2}
    shared |= {"epsilons": tuple(n / 8 for n in epsilons), "step_sizes": tuple(n / 8 for n in sizes)}
    return part("LearnableStrategy", steps=tuple(numbers), **{**shared, **changes})


# The benchmark's average, with the warm-up of τ that ours has by default: docstring of `pgd_at_wa`.
LIET_EMA = part("EMA", decay=0.9995, warm_up=True, buffers="average")

GROWING = {0: 0.0, 50: EPSILON / 4, 100: EPSILON / 2, 200: EPSILON}  # IKL's epsilon
PGI: Row = {"momentum": 0.3, "reset_every": 40, "step_size": EPSILON}

# RST's code: half of a batch of 256 is unlabelled, half a cosine over 200 epochs of 50,000 images.
RST: Row = {
    "objective": TRADES_6,
    "extra_share": 0.5,
    "learning_rate": half_cosine(0.1, 200),
    "nesterov": True,
    "batch_size": 256,
    "paper": NORMAL,
}

# DM-AT's code: OneCycleLR(0.2, pct_start=0.025) over 400 epochs, which begins at 1/25 and ends at 1/10,000 of that.
DM_END = 0.2 / 25 / 10_000
DM_CYCLE = {0: 0.008, 5: 0.104, 10: 0.2, 205: (0.2 + DM_END) / 2, 400: DM_END}

# LAS-AWP's policy is updated every 20 steps, LAS-AT's number: docstring. In its own code, in every step.
LAS_AWP = {
    "learning_rate": steps((0, 1e-4), (100, 1e-5), (150, 1e-6), last=200),
    "robust_weight": 1.0,
    "clean_weight": 1.0,
}
LAS_AWP_RANGES = (range(7, 16), range(8, 17), range(2, 6))

TABLE: dict[str, dict[str, Row]] = {
    # FAT's code: τ = 0 up to epoch 50, 1 up to 90; 0.1, 0.01, 0.001, 0.0005; noise of 0.001 in every step.
    "fat": row(
        **friendly((0, 0), (50, 1), (90, 2), last=120, step_noise=0.001),
        learning_rate=steps((0, 0.1), (60, 0.01), (90, 0.001), (110, 0.0005), last=120),
        weight_decay=2e-4,
        epochs=120,
    ),
    "fat_trades": row(
        **friendly((0, 0), (30, 1), (50, 2), (70, 3), last=85, random_start="normal"),
        objective=TRADES_6,
        learning_rate=steps((0, 0.1), (75, 0.01), last=85),
        weight_decay=2e-4,
        epochs=85,
    ),
    # FAT_for_MART.py: FAT's own optimiser and β = 6 for every network, a drop at 60, a normal start.
    "fat_mart": row(
        **friendly((0, 0), (20, 1), (40, 2), (60, 3), (80, 4), last=90, random_start="normal"),
        objective=MART_6,
        learning_rate=steps((0, 0.1), (60, 0.01), last=90),
        weight_decay=2e-4,
        epochs=90,
    ),
    # Batch: docstring.
    "gairat": row(
        objective=GAIRAT,
        learning_rate=steps((0, 0.1), (60, 0.01), (90, 0.001), (110, 0.0005), last=120),
        weight_decay=2e-4,
        epochs=120,
        paper={"attack": pgd(step_size=TRADES_STEP)},
    ),
    # When its weights begin: docstring.
    "piat_gairat": row(objective=GAIRAT, averages=(INTERPOLATION,), wide=PIAT_WIDE, paper=FROM_THE_IMAGE, **PIAT),
    # No formula, no numbers: docstring.
    "ovr_style": row(objective=part("OneVsRest", share=0.4, strength=0.5), paper=TRACKED),
    # LOAT's code counts from 1: its first epoch, and from its 100th on. Wide networks train 90 epochs there, so that
    # the last window never opens; 110, and drops as for ResNet-18: docstring.
    "slore_mart": row(
        objective=part(
            "FisherRaoMART", beta=6.0, strength=0.1, pairing=0.05, distance="mse", early=1 / 110, late=99 / 110
        ),
        learning_rate=steps((0, 0.01), (75, 0.001), (90, 0.0001), (100, 0.00001), last=110),
        weight_decay=3.5e-3,
        epochs=110,
        batch_size=512,
        wide={
            "learning_rate": steps((0, 0.1), (75, 0.01), (90, 0.001), (100, 0.0001), last=110),
            "weight_decay": 7e-4,
            "batch_size": 128,
        },
        paper=NORMAL,
    ),
    # LBGAT's code, as executed: 0.02 in the first epoch, drops before epoch 76, 91 (and 101), counted from 1. A guide
    # of the classifier's own kind, and gradients clipped to length 1, by default: docstring.
    "lbgat": row(
        objective=part("BoundaryGuided", beta=0.0),
        networks={"guide": part("FurtherNetwork", **NETWORK, trained=True)},
        learning_rate=steps((0, 0.02), (1, 0.1), (75, 0.01), (90, 0.001), last=100 - JUST),
        weight_decay=2e-4,
        epochs=100,
        gradient_clip=1.0,
        paper={
            **NORMAL,
            "gradient_clip": None,
            "networks": {"guide": part("FurtherNetwork", model="resnet18", init=None, trained=True)},
        },
    ),
    # 0.3 of the cross-entropy is what 0.1 and 0.6 leave; averaged from epoch 55, learning rate as `pgd_at_swa`.
    "kd_swa": row(
        objective=part("Distillation", standard=0.1, robust=0.6, temperature=2.0),
        networks={"standard_teacher": TEACHER, "robust_teacher": TEACHER},
        averages=(swa(55 / 200),),
        learning_rate=steps((0, 0.1), (50, 0.01), (150, 0.001), last=200),
        paper=TRACKED,
    ),
    # Refined from epoch 90 on (like the learning rate's drops counted from 1 in the code).
    "sglr": row(objective=part("LabelRefinement", momentum=0.9, clean_share=0.2, begin=90 / 200)),
    # Its code's AutoAugment and Cutout in the second half are left out: docstring.
    "consistency": row(objective=part("Consistency", strength=1.0, temperature=0.5)),
    # β: the script for extra data.
    "stat": row(
        attack=part("CollaborativePGD", steps=10, step_size=2 / 255, statistics="eval"),
        objective=part("SqueezeTraining", beta=6.0),
        learning_rate=steps((0, 0.1), (80, 0.01), (100, 0.001), last=120),
        epochs=120,
        paper={"attack": part("CollaborativePGD", steps=10, step_size=2 / 255, statistics="batch")},
    ),
    # The attack's β is 0 for CIFAR-10; 5 steps of half of an epsilon that grows from 0. That the method's own attack
    # is the default: docstring.
    "ikl": row(
        attack=pgd(
            steps=5, step_size={0: 0.0, 50: EPSILON / 8, 100: EPSILON / 4, 200: EPSILON / 2}, random_start="normal"
        ),
        objective=part("DecoupledKL", alpha=4.0, beta=20.0, attack_beta=0.0, temperature=4.0),
        views=(worst_weights(steps((0, 0.0), (10, 0.005), last=200), sides=("clean", "adv"), ascend="objective"),),
        train_ball=GROWING,
        learning_rate=half_cosine(0.2, 200),
    ),
    # Radii 3 ... 15, 3 ... 14 steps of 1 ... 5 (/255); only the drawn radius bounds. The policy's rate never drops.
    "las_at": row(
        attack=None,
        step=strategy(range(3, 16), range(3, 15), range(1, 6)),
        train_ball="unbounded",
        label_smoothing=0.3,
        learning_rate=steps((0, 0.1), (99, 0.01), (104, 0.001), last=110),
        epochs=110,
    ),
    # Cut to epsilon at last; plain cross-entropy; the policy's rate follows the classifier's.
    "las_awp": row(
        attack=None,
        step=strategy(*LAS_AWP_RANGES, **LAS_AWP),
        views=(worst_weights(0.01),),
        paper={"step": strategy(*LAS_AWP_RANGES, period=1, **LAS_AWP)},
    ),
    # δ climbs by steps of epsilon. Batch: docstring.
    "free_at": row(
        attack=None,
        step=part("Free", replays=8, step_size=EPSILON),
        learning_rate=triangle(0.04, 10),
        epochs=10,
    ),
    "fast_at": row(
        attack=fgsm(step_size=1.25 * EPSILON),
        learning_rate=triangle(0.2, 15),
        epochs=15,
        paper={"attack": fgsm(step_size=1.25 * EPSILON, statistics="batch_tracked")},
    ),
    "n_fgsm": row(
        attack=fgsm(start_scale=2.0, project=False),
        train_ball="unbounded",
        learning_rate=triangle(0.2, 30),
        epochs=30,
        paper={"attack": fgsm(start_scale=2.0, project=False, statistics="batch_tracked")},
    ),
    # GAT_cifar10.py, as executed: drops and λ change after epochs 70 and 85, counted from 0.
    "gat": row(
        attack=fgsm(random_start="bernoulli"),
        objective=part("GuidedAdversarial", strength=steps((0, 10.0), (86, 40.0), last=100)),
        learning_rate=steps((0, 0.1), (71, 0.01), (86, 0.001), last=100),
        epochs=100,
        batch_size=64,
    ),
    # λ: 4.5 / 90 more after every epoch. The learning rate turns at 40, would be 0 at 90, stops at 80, and drops, as
    # executed, after epochs 85 and 90, counted from 0. That it begins at 0: docstring.
    "nuat": row(
        attack=fgsm(random_start="bernoulli"),
        objective=part("NuclearNorm", strength={0: 0.0, 1: 0.05, 45: 2.25, 90: 4.5, 95: 4.5, 100: 4.5}),
        learning_rate={
            0: 0.0,
            20: 0.05,
            40: 0.1,
            60: 0.06,
            80: 0.02,
            86 - JUST: 0.02,
            86: 0.002,
            91 - JUST: 0.002,
            91: 0.0002,
            100: 0.0002,
        },
        epochs=100,
        batch_size=64,
    ),
    # Weight decay and batch: docstring.
    "fgsm_pgi": row(
        attack=part("PriorGuidedFGSM", **PGI, statistics="eval"),
        objective=part("PriorGuided", strength=10.0),
        label_smoothing=0.4,
        learning_rate=steps((0, 0.1), (100, 0.01), (105, 0.001), last=110),
        epochs=110,
        paper={
            "attack": part(
                "PriorGuidedFGSM", momentum=0.3, reset_every=40, step_size=EPSILON, statistics="batch_tracked"
            )
        },
    ),
    # λ: 100 / 100 more in every epoch. Labels are smoothed by the objective alone. The authors' scheduler cycles
    # momentum too.
    "liet": row(
        attack=part("ClassStartFGSM", period=20, noise_share=(0.1, 0.5), wide=False, statistics="eval"),
        objective=part("StartConsistency", strength={0: 0.0, 25: 25.0, 50: 50.0, 100: 100.0}, smoothing=0.6),
        averages=(LIET_EMA,),
        learning_rate=CYCLE,
        epochs=100,
        paper={
            "attack": part("ClassStartFGSM", period=20, noise_share=(0.1, 0.5), wide=False, statistics="batch_tracked"),
            "averages": ({**LIET_EMA, "warm_up": False},),
            "momentum": MOMENTUM_CYCLE,
        },
    ),
    # --swa 0 0.001 1 for wide networks: from the start, 0.001 of the model in every step, no warm-up. The code
    # attacks from x in train mode (`src/utils/train.py`).
    "idbh": row(
        augmentation=IDBH_STRONG,
        wide={
            "augmentation": IDBH_WEAK,
            "averages": (part("EMA", decay=0.999, warm_up=False, buffers="clean"),),
        },
        paper={"attack": pgd(random_start=False, statistics="batch_tracked")},
    ),
    # Its γ, and the attack: docstring.
    "idbh_awp": row(augmentation=IDBH_WEAK, views=(worst_weights(0.01),), paper=TRACKED),
    # Section 6: 400 epochs, λ = 0.1, γ = 0.005, divided by 10 at 50 % and 75 %. The version: docstring.
    "iseat_idbh": row(
        **{
            **ISEAT,
            "augmentation": IDBH_STRONG,
            "objective": stability(steps((0, 0.0), (200, 0.1), last=400)),
            "views": (worst_weights(0.005),),
            "learning_rate": steps((0, 0.1), (200, 0.01), (300, 0.001), last=400),
            "epochs": 400,
            "wide": {"augmentation": IDBH_WEAK},
        }
    ),
    "rst": row(**RST),
    # Combinations with RST: docstrings.
    "rst_mart": row(**{**RST, "objective": MART_5, "wide": {"objective": MART_6}}),
    "rst_gairat": row(**{**RST, "objective": GAIRAT}),
    "rst_awp": row(views=(worst_weights(0.005, sides=("clean", "adv"), ascend="objective"),), **RST),
    # γ of RWP for TRADES: code.
    "rst_rwp": row(
        views=(
            worst_weights(
                gamma=0.005,
                sides=("clean", "adv"),
                ascend="objective",
                steps=10,
                step_size=0.01,
                scale="global",
                below=1.7,
            ),
        ),
        **RST,
    ),
    # Section 6: λ = 0.01 once the learning rate has dropped, γ = 0.005, batches of 256, half of them extra images;
    # all else as without them.
    "rst_iseat": row(
        **{
            **ISEAT,
            "objective": stability(steps((0, 0.0), (100, 0.01), last=200)),
            "views": (worst_weights(0.005),),
            "extra_share": 0.5,
            "batch_size": 256,
        }
    ),
    # The average's BatchNorm statistics are averaged: docstring. The authors' scheduler cycles momentum too.
    "dm_at": row(
        objective=TRADES_5,
        label_smoothing=0.1,
        extra_share=0.7,
        averages=(part("EMA", decay=0.995, warm_up=True, buffers="average"),),
        learning_rate=DM_CYCLE,
        nesterov=True,
        epochs=400,
        batch_size=512,
        paper={
            "attack": pgd(statistics="batch"),
            "momentum": {0: 0.95, 5: 0.9, 10: 0.85, 205: 0.9, 400: 0.95},
        },
    ),
}


@pytest.mark.parametrize("paper_settings", [False, True], ids=["default", "paper"])
@pytest.mark.parametrize("model", ["resnet18", "wrn_34_10"])
@pytest.mark.parametrize("name", TABLE)
def test_hyper_parameters(name: str, model: str, paper_settings: bool) -> None:
    """A recipe has its paper's numbers, for both kinds of network, with and without `paper_settings`."""
    assert differences(name, TABLE[name], model, paper_settings) == {}


def test_every_recipe_is_in_a_table() -> None:
    """A new recipe comes with its row, and has one."""
    assert sorted([*FIRST, *TABLE]) == sorted(RECIPES)


@pytest.mark.parametrize("name", ["fat", "fat_trades", "fat_mart", "gairat", "slore_mart", "lbgat", "rst"])
def test_steps_at_the_papers_own_radius(name: str) -> None:
    """Under `paper_settings`, 0.031 is searched in steps of 0.007."""
    assert RECIPES[name](epsilon=0.031, paper_settings=True).attack.step_size == pytest.approx(0.007)
