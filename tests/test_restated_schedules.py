"""Schedules and recipes at the papers' numbers, the interpolation's table, Wilson's interval, and soft labels."""

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch

from holdfast.attacks.pgd import PGD
from holdfast.averages.ema import EMA
from holdfast.averages.interpolation import Interpolation
from holdfast.evaluation.statistics import wilson_interval
from holdfast.functional import smooth_labels
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.objectives.normalized_mse import NormalizedMSE
from holdfast.objectives.standard import StandardTraining
from holdfast.recipe import Recipe
from holdfast.recipes import pgd_at, pgd_at_nmse, pgd_at_wa, piat, piat_nmse, standard
from holdfast.schedule import (
    Progress,
    Schedule,
    after_first_decay,
    constant,
    linear,
    one_cycle,
    piat_lambda,
    piecewise,
    piecewise_linear,
    value_at,
)

EIGHT = 8 / 255
PER_EPOCH = 10
Build = Callable[..., Recipe]


def rate(recipe: Recipe, epoch: float) -> float:
    """The learning rate at a position counted in epochs."""
    step = round(epoch * PER_EPOCH)
    progress = Progress(epoch=step // PER_EPOCH, step=step, steps_per_epoch=PER_EPOCH, epochs=recipe.epochs)
    return value_at(recipe.optimizer.learning_rate, progress) * value_at(recipe.schedule, progress)


@pytest.mark.parametrize("build", [piat, piat_nmse, pgd_at_nmse])
@pytest.mark.parametrize("paper_settings", [False, True])
@pytest.mark.parametrize(
    ("model", "epochs", "decay", "knots", "rates"),
    [
        ("resnet18", 120, 3.5e-3, (0, 60, 90, 120), (0.01, 0.01, 0.001, 0.0001)),
        ("wrn_32_10", 180, 7e-4, (0, 90, 135, 180), (0.1, 0.1, 0.01, 0.001)),
    ],
)
def test_piat_trains_as_its_appendix_says(
    build: Build,
    paper_settings: bool,
    model: str,
    epochs: int,
    decay: float,
    knots: tuple[int, ...],
    rates: tuple[float, ...],
) -> None:
    recipe = build(epsilon="8/255", model=model, paper_settings=paper_settings)
    assert recipe.epochs == epochs
    assert recipe.optimizer.weight_decay == decay
    assert recipe.optimizer.momentum == 0.9
    assert recipe.batch_size == 128
    assert recipe.label_smoothing == 0
    assert recipe.warmup * epochs == pytest.approx(10, rel=1e-12)
    for epoch, expected in zip(knots, rates, strict=True):
        assert rate(recipe, epoch) == pytest.approx(expected, rel=1e-9)
    for step in range(0, epochs * PER_EPOCH + 1, 7):
        assert rate(recipe, step / PER_EPOCH) == pytest.approx(np.interp(step / PER_EPOCH, knots, rates), rel=1e-9)


@pytest.mark.parametrize("build", [pgd_at, standard])
def test_piecewise_recipes_divide_by_ten_at_half_and_three_quarters(build: Build) -> None:
    recipe = build(epsilon="8/255", model="resnet18")
    assert (recipe.epochs, recipe.batch_size, recipe.warmup, recipe.label_smoothing) == (200, 128, 0, 0)
    assert (recipe.optimizer.weight_decay, recipe.optimizer.momentum) == (5e-4, 0.9)
    for first, last, expected in ((0, 99.9, 0.1), (100, 149.9, 0.01), (150, 199.9, 0.001)):
        for epoch in (first, (first + last) // 2, last):
            assert rate(recipe, epoch) == pytest.approx(expected, rel=1e-12)


def torch_one_cycle(total: int) -> tuple[list[float], list[float]]:
    """Learning rate and momentum of PyTorch's own scheduler at every one of its steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total)
    rates, momenta = [], []
    for step in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        if step + 1 < total:
            scheduler.step()
    return rates, momenta


@pytest.mark.parametrize(("epochs", "per_epoch"), [(100, 7), (30, 10)])
def test_one_cycle_is_that_of_torch(epochs: int, per_epoch: int) -> None:
    recipe = replace(pgd_at_wa(epsilon=EIGHT, paper_settings=True), epochs=epochs)
    total = epochs * per_epoch
    rates, momenta = torch_one_cycle(total)

    def now(scalar: object, step: int) -> float:
        """The value before a step of the run."""
        progress = Progress(epoch=step // per_epoch, step=step, steps_per_epoch=per_epoch, epochs=epochs)
        return value_at(scalar, progress)

    peak = 0.3 * total
    # torch rises over peak - 1 steps and falls over total - peak; ours rises over peak steps. So on the way down
    # torch's step s is our step s + 1, and on the way up both agree at equal shares of the rise.
    for step in range(total):
        down = step > peak - 1
        position = (step + 1) / total if down else 0.3 * step / (peak - 1)
        assert 0.1 * recipe.schedule.at(position) == pytest.approx(rates[step], rel=1e-9)
        assert recipe.optimizer.momentum.at(position) == pytest.approx(momenta[step], rel=1e-9)
        if down:
            ours = now(recipe.optimizer.learning_rate, step + 1) * now(recipe.schedule, step + 1)
            assert ours == pytest.approx(rates[step], rel=1e-3)
            assert now(recipe.optimizer.momentum, step + 1) == pytest.approx(momenta[step], rel=1e-3)
    assert now(recipe.schedule, 0) == pytest.approx(1 / 25)
    assert now(recipe.schedule, round(peak)) == pytest.approx(1)
    assert now(recipe.schedule, total) == pytest.approx(1 / 25e4)


def test_one_cycle_has_its_rise_start_and_end() -> None:
    schedule = one_cycle(rise=0.2, start=0.1, end=0.001)
    assert [schedule.at(position) for position in (0, 0.2, 1)] == pytest.approx([0.1, 1, 0.001])
    assert schedule.at(0.1) == pytest.approx((0.1 + 1) / 2)
    assert schedule.at(0.6) == pytest.approx((0.001 + 1) / 2)


def test_the_baseline_with_weight_averaging_has_the_benchmark_settings() -> None:
    for paper_settings in (False, True):
        recipe = pgd_at_wa(epsilon="8/255", paper_settings=paper_settings)
        assert (recipe.epochs, recipe.batch_size, recipe.label_smoothing) == (100, 128, 0.4)
        assert recipe.optimizer.weight_decay == 5e-4
        assert rate(recipe, 30) == pytest.approx(0.1, rel=1e-12)
        (average,) = recipe.averages
        assert isinstance(average, EMA)
        assert average.decay == 0.9995
        assert average.warm_up is not paper_settings
        assert average.buffers == "average"
    assert pgd_at_wa(epsilon="8/255").optimizer.momentum == 0.9


@pytest.mark.parametrize(
    ("build", "objective", "average", "strength"),
    [
        (standard, StandardTraining, None, None),
        (pgd_at, AdversarialTraining, None, None),
        (pgd_at_wa, AdversarialTraining, EMA, None),
        (pgd_at_nmse, NormalizedMSE, None, 5.0),
        (piat, AdversarialTraining, Interpolation, None),
        (piat_nmse, NormalizedMSE, Interpolation, 5.0),
    ],
)
def test_what_every_recipe_is_made_of(
    build: Build, objective: type, average: type | None, strength: float | None
) -> None:
    recipe = build(epsilon="8/255", model="resnet18")
    assert type(recipe.objective) is objective
    assert [type(each) for each in recipe.averages] == ([] if average is None else [average])
    assert recipe.threat.norm == "Linf"
    assert recipe.threat.epsilon == EIGHT
    assert not recipe.views
    sides = recipe.objective.sides(Progress())
    if average is Interpolation:
        assert recipe.averages[0].share_kept(Progress(epochs=120)) == pytest.approx(2 / 11)
    if strength is not None:
        assert recipe.objective.strength == strength
        assert not recipe.objective.detach_weight
    if build is standard:
        assert sides == ("clean",)
        assert recipe.passes() == 3
        return
    assert isinstance(recipe.attack, PGD)
    assert (recipe.attack.steps, recipe.attack.random_start) == (10, True)
    assert recipe.attack.statistics == "eval"
    assert recipe.attack.step_size in (None, pytest.approx(2 / 255, rel=1e-12))
    assert recipe.passes() == 2 * 10 + 3 * len(sides)


def test_paper_settings_change_what_the_papers_do_differently() -> None:
    for build in (piat, piat_nmse, pgd_at_nmse):
        assert not build(epsilon="8/255", paper_settings=True).attack.random_start  # Algorithm 1: x_adv <- x
    assert pgd_at(epsilon="8/255", paper_settings=True).attack.statistics == "batch_tracked"
    assert pgd_at(epsilon="8/255", paper_settings=True).attack.random_start


@pytest.mark.parametrize("epochs", [12, 30, 60])
def test_schedules_stretch_with_the_number_of_epochs(epochs: int) -> None:
    short = replace(piat(epsilon=EIGHT, model="resnet18"), epochs=epochs)
    full = piat(epsilon=EIGHT, model="resnet18")
    assert short.warmup * epochs == pytest.approx(epochs / 12)
    for share in np.linspace(0, 1, 13):
        assert rate(short, share * epochs) == pytest.approx(rate(full, share * 120), rel=1e-9)
    steps = replace(pgd_at(epsilon=EIGHT), epochs=epochs)
    for share, expected in ((0, 0.1), (0.49, 0.1), (0.51, 0.01), (0.74, 0.01), (0.76, 0.001)):
        assert rate(steps, share * epochs) == pytest.approx(expected)


def test_interpolation_share_at_the_tabulated_epochs() -> None:
    table = {
        0: (0.100, 0.900),
        1: (0.182, 0.818),
        2: (0.250, 0.750),
        5: (0.400, 0.600),
        10: (0.550, 0.450),
        20: (0.700, 0.300),
        30: (0.775, 0.225),
        60: (0.871, 0.129),
        90: (0.910, 0.090),
        110: (0.925, 0.075),
        119: (0.930, 0.070),
        179: (0.952, 0.048),
    }
    for n, (kept, moved) in table.items():
        assert piat_lambda(n) == pytest.approx(kept, abs=5.1e-4)
        assert 1 - piat_lambda(n) == pytest.approx(moved, abs=5.1e-4)
        assert 1 - piat_lambda(n) == pytest.approx(9 / (n + 10), rel=1e-12)
    assert piat_lambda(3, (2, 3, 5, 7)) == pytest.approx((2 * 3 + 3) / (5 * 3 + 7), rel=1e-15)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_at_published_values(successes: int, n: int, low: float, high: float) -> None:
    found = wilson_interval(successes, n)
    assert found == pytest.approx((low, high), abs=5.1e-5)
    mirrored = wilson_interval(n - successes, n)
    assert mirrored == pytest.approx((1 - found[1], 1 - found[0]), abs=1e-12)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (3, 10), (50, 100), (9999, 10000), (0, 50), (50, 50)])
def test_wilson_bounds_are_where_the_score_test_just_rejects(successes: int, n: int, confidence: float) -> None:
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    # (share - p)^2 = z^2 p (1 - p) / n, a quadratic in p
    roots = np.roots([1 + z * z / n, -(2 * share + z * z / n), share * share])
    low, high = wilson_interval(successes, n, confidence)
    assert (low, high) == pytest.approx((min(roots.real), max(roots.real)), abs=1e-9)
    assert 0 <= low <= share <= high <= 1


def test_wilson_interval_of_nothing_is_everything() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("classes", "smoothing"), [(2, 0.1), (5, 0.4), (10, 0.4), (10, 0.0), (100, 0.9)])
def test_smooth_labels_give_the_rest_to_the_others(classes: int, smoothing: float) -> None:
    y = [0, classes - 1, 1, 1]
    found = smooth_labels(torch.tensor(y), classes, smoothing, dtype=torch.float64).tolist()
    for row, label in zip(found, y, strict=True):
        expected = [1 - smoothing if k == label else smoothing / (classes - 1) for k in range(classes)]
        assert row == pytest.approx(expected, abs=1e-12)
        assert sum(row) == pytest.approx(1, abs=1e-12)


def test_progress_counts() -> None:
    # Three epochs of four steps, the first six steps clean.
    table = []
    for step in range(12):
        progress = Progress(epoch=step // 4, step=step, steps_per_epoch=4, epochs=3, warmup_steps=6)
        assert progress.fraction == pytest.approx(step / 12)
        assert progress.total_steps == 12
        table.append((progress.warming_up, progress.adversarial_epochs))
    # The second epoch holds adversarial steps, so it is the first that counts.
    assert table == [(True, 0)] * 4 + [(True, 1)] * 2 + [(False, 1)] * 2 + [(False, 2)] * 4
    without = [Progress(epoch=e, step=4 * e, steps_per_epoch=4, epochs=3).adversarial_epochs for e in range(3)]
    assert without == [1, 2, 3]
    whole = [
        Progress(epoch=e, step=4 * e, steps_per_epoch=4, epochs=3, warmup_steps=4).adversarial_epochs for e in range(3)
    ]
    assert whole == [0, 1, 2]


def test_knots_and_what_lies_between_them() -> None:
    knots = ((0.2, 1.0), (0.4, 3.0), (0.8, 2.0))
    for position in np.linspace(0, 1, 41).tolist():
        left = max((k for k in knots if k[0] <= position + 1e-12), default=knots[0])
        right = min((k for k in knots if k[0] > position + 1e-12), default=knots[-1])
        share = 0.0 if right[0] <= left[0] else min(max((position - left[0]) / (right[0] - left[0]), 0.0), 1.0)
        cosine = (1 - math.cos(math.pi * share)) / 2
        if min(abs(position - k[0]) for k in knots) > 1e-9:
            assert Schedule(knots, "step").at(position) == left[1]
        assert Schedule(knots, "linear").at(position) == pytest.approx(left[1] + share * (right[1] - left[1]))
        assert Schedule(knots, "cosine").at(position) == pytest.approx(left[1] + cosine * (right[1] - left[1]))
    assert Schedule(((0, 1.0), (0.5, 2.0)), "step").at(0.5) == 2.0


def test_positions_in_epochs_stages_and_fractions() -> None:
    progress = Progress(epoch=3, step=35, steps_per_epoch=10, epochs=7, stage=1)
    assert Schedule(((0, 0.0), (1, 1.0)), "linear")(progress) == pytest.approx(0.5)
    assert Schedule(((0, 1.0), (3, 2.0), (4, 3.0)), "step", "epoch")(progress) == 2.0
    assert Schedule(((0, 1.0), (1, 2.0), (2, 3.0)), "step", "stage")(progress) == 2.0
    assert constant(0.3)(progress) == 0.3
    assert linear(1, 3, begin=0.25, until=0.75)(progress) == pytest.approx(2)
    assert piecewise((0, 1.0), (0.5, 2.0))(progress) == 2.0
    assert piecewise_linear((0, 0.0), (0.5, 1.0), (1, 0.0))(progress) == pytest.approx(1)
    assert value_at(0.7, progress) == 0.7


def test_after_the_first_decay() -> None:
    schedule = after_first_decay(0.1)
    assert [schedule(Progress(stage=stage)) for stage in range(4)] == [0.0, 0.1, 0.1, 0.1]


def test_stages_are_the_starts_of_the_drops() -> None:
    steps = pgd_at(epsilon=EIGHT).schedule
    assert [steps.stage(share) for share in (0, 0.49, 0.5, 0.74, 0.75, 1)] == [0, 0, 1, 1, 2, 2]
