"""Hyper-parameters of PGD-AT, the methods of the first papers, and what they stand on; see `recipe_rows`.

Where nobody states momentum (SEAT, TRADES, ALP, MART, SWA), it is the 0.9 of `SGD`.
"""

from __future__ import annotations

import pytest

from holdfast.recipes import RECIPES
from recipe_rows import (
    CYCLE,
    EPSILON,
    FROM_THE_IMAGE,
    INTERPOLATION,
    ISEAT,
    MART_5,
    MART_6,
    MOMENTUM_CYCLE,
    NORMAL,
    PIAT,
    PIAT_WIDE,
    TRACKED,
    TRADES,
    TRADES_AWP_VIEW,
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

# Section 6.6: 40 epochs, 0.01 and 0.001 after 20. That λ is 0.1 throughout: docstring.
FINE_TUNED: Row = {
    **ISEAT,
    "objective": stability(0.1),
    "learning_rate": steps((0, 0.01), (20, 0.001), last=40),
    "epochs": 40,
    "fine_tuning": True,
}
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
            "momentum": MOMENTUM_CYCLE,
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
    "score": {
        "settings": {"objective": part("SquaredProbabilities"), "epochs": 110},
        "wide": {},
        "paper": {},
        "wide_paper": {},
    },
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


@pytest.mark.parametrize("paper_settings", [False, True], ids=["default", "paper"])
@pytest.mark.parametrize("model", ["resnet18", "wrn_34_10"])
@pytest.mark.parametrize("name", TABLE)
def test_hyper_parameters(name: str, model: str, paper_settings: bool) -> None:
    """A recipe has its paper's numbers, for both kinds of network, with and without `paper_settings`."""
    assert differences(name, TABLE[name], model, paper_settings) == {}


@pytest.mark.parametrize("name", ["trades", "asym_trades", "alp", "mart", "seat"])
def test_steps_at_the_papers_own_radius(name: str) -> None:
    """Under `paper_settings`, 0.031 is searched in steps of 0.007."""
    assert RECIPES[name](epsilon=0.031, paper_settings=True).attack.step_size == pytest.approx(0.007)
