"""LAS-AT: attacks with settings for every row, the policy gradient restated, and what the step leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import small_batch, small_network
from holdfast import L2, Batch, Linf, Schedule, StandardTraining, View, WorstWeights, fit, load_data
from holdfast.attacks.pgd import PGD
from holdfast.attacks.rowwise_pgd import rowwise_pgd
from holdfast.cli.overrides import override
from holdfast.configuration import build_recipe, recipe_config
from holdfast.errors import HoldfastError
from holdfast.functional import cross_entropy
from holdfast.interruption import Interrupted
from holdfast.keyed_random import Key, uniform
from holdfast.loop import Loop, set_hyperparameters
from holdfast.recipe import SGD, Recipe
from holdfast.recipes.las_at import las_at, las_awp
from holdfast.schedule import Progress, constant
from holdfast.setup import Settings
from holdfast.steps.learnable_strategy import LearnableStrategy, LearnableStrategyStep
from holdfast.steps.strategy_network import StrategyNetwork, draw, log_probability
from parts import CountedFlops
from tiny_runs import FP32, assert_same_run, metrics, newest_checkpoint, tiny_net, tiny_recipe, toy

DUE = Progress(step=19, steps_per_epoch=20, epochs=2, seed=5)
EPSILON = 0.05


def recipe_with(recipe: Recipe | None = None, /, **settings: Any) -> Recipe:
    """LAS-AT, or this recipe, with other settings of the strategy."""
    recipe = recipe or las_at(epsilon=EPSILON)
    return replace(recipe, step=replace(recipe.step, **settings))  # type: ignore[type-var]  # a dataclass


def make(recipe: Recipe, network: nn.Module, *, seed: int = 0, precision: str = "fp32") -> LearnableStrategyStep:
    """The step of a recipe, its strategy network drawn from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return recipe.step(recipe, network, precision=precision)  # type: ignore[misc]  # not None


def trained_network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """With running statistics that are not those it was made with."""
    network = small_network(dtype=dtype)
    network.train()
    with torch.no_grad():
        for seed in range(3):
            network(small_batch(dtype=dtype, seed=10 + seed).x)
    return network


# ------------------------------------------------------------------ the attack


@pytest.mark.parametrize("norm", [Linf, L2])
def test_every_row_is_attacked_by_its_own_settings(norm: type[Any]) -> None:
    """Equal to PGD written out, on one image at a time."""
    network, batch = trained_network(), small_batch(rows=6, dtype=torch.float64)
    radius = torch.tensor([0.01, 0.3, 0.05, 0.2, 0.1, 0.15], dtype=torch.float64)
    steps = torch.tensor([3, 1, 7, 4, 7, 2])
    step_size = torch.tensor([0.02, 0.01, 0.2, 0.05, 0.004, 0.1], dtype=torch.float64)
    found = rowwise_pgd(
        View(network, statistics="batch"),
        batch,
        lambda logits: cross_entropy(logits, batch.y),
        threat=norm(0.07),
        radius=radius,
        steps=steps,
        step_size=step_size,
        key=Key(9),
    )
    alone = copy.deepcopy(network).eval()
    for row in range(6):
        x, y = batch.x[row], batch.y[row]
        ball, size = float(radius[row]), float(step_size[row])
        if norm is Linf:
            noise = uniform(Key(9), batch.rows[row : row + 1], x.shape, dtype=torch.float64)[0]
            at = (x + ball * (2 * noise - 1)).clamp(0, 1)
        else:
            at = L2(ball).random_point(x[None], Key(9), batch.rows[row : row + 1])[0]
        survived = 0
        for _ in range(int(steps[row])):
            at = at.detach().requires_grad_(True)
            logits = alone(at[None])[0]
            survived += int(logits.argmax()) == int(y)
            (gradient,) = torch.autograd.grad(-logits.log_softmax(0)[y], at)
            if norm is Linf:
                at = torch.min(torch.max(at.detach() + size * gradient.sign(), x - ball), x + ball)
            else:
                delta = at.detach() + size * gradient / gradient.norm() - x
                at = x + delta * min(1.0, ball / float(delta.norm()))
            at = at.clamp(0, 1)
        torch.testing.assert_close(found.x_adv[row], at.detach(), rtol=0, atol=1e-10)
        assert int(found.steps_survived[row]) == survived
    assert found.steps == 7


def test_rows_stay_in_their_own_balls() -> None:
    """Some beyond the threat model's, unless the recipe cuts them to it; pixels always in their bounds."""
    batch = small_batch(rows=96)
    free, cut = (
        make(replace(las_at(epsilon=EPSILON), train_ball=ball), small_network()) for ball in ("unbounded", None)
    )
    attack = free.strategy_attack
    radius, steps, step_size = attack.meant(attack.chosen(attack.logits(batch), batch, DUE))
    assert len(radius.unique()) == 13
    assert len(steps.unique()) == 12
    assert len(step_size.unique()) == 5
    x_adv = free.find(batch, free.objective, DUE).x_adv
    moved = (x_adv - batch.x).abs().flatten(1).amax(1)
    assert (moved <= EPSILON * radius + 1e-6).all()
    assert (moved > 0.98 * EPSILON * radius).float().mean() > 0.5
    assert (moved > 1.5 * EPSILON).any()
    assert 0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1
    within = (cut.find(batch, cut.objective, DUE).x_adv - batch.x).abs().flatten(1).amax(1)
    torch.testing.assert_close(within, moved.clamp_max(EPSILON), rtol=0, atol=1e-6)


def test_the_network_reads_any_images_and_each_by_itself() -> None:
    network = StrategyNetwork((3, 4), width=4).double()
    for shape in ((2, 1, 5, 7), (2, 3, 8, 8), (2, 4, 1, 1), (0, 3, 8, 8)):
        assert [tuple(logits.shape) for logits in network(torch.rand(shape))] == [(shape[0], 3), (shape[0], 4)]
    x = torch.rand(6, 3, 8, 8, dtype=torch.float64)
    for whole, part in zip(network(x), network(x[2:4]), strict=True):
        torch.testing.assert_close(whole[2:4], part, rtol=0, atol=1e-12)
    assert not torch.allclose(network(x)[0], network(x.flip(1))[0]), "channels are told apart"


def test_draws_follow_the_softmax_and_their_probability() -> None:
    head = torch.tensor([[0.0, 1.0, -1.0]]).expand(20000, 3)
    other = torch.zeros(20000, 2)
    chosen = draw([head, other], Key(1), torch.arange(20000))
    share = torch.bincount(chosen[:, 0], minlength=3) / 20000
    torch.testing.assert_close(share, head[0].softmax(0), rtol=0, atol=0.015)
    both = (chosen[:, 0] == 1) & (chosen[:, 1] == 1)
    assert float(both.float().mean()) == pytest.approx(float(head[0].softmax(0)[1]) / 2, abs=0.015)
    expected = head[0].log_softmax(0)[chosen[:, 0]] + torch.tensor(0.5).log()
    torch.testing.assert_close(log_probability([head, other], chosen), expected)


# ----------------------------------------------------------------- the policy


def test_the_policy_gradient_restated() -> None:
    """Σ of log-probabilities times the reward, with the reward computed by copies that are trained in place."""
    network, batch = trained_network(), small_batch(dtype=torch.float64)
    with torch.no_grad():
        predicted = copy.deepcopy(network).eval()(batch.x).argmax(1)
    batch = batch._replace(y=torch.where(torch.arange(12) < 9, predicted, batch.y))
    recipe = recipe_with(las_at(epsilon=0.2), loss_weight=0.7, robust_weight=3.0, clean_weight=1.5, width=4)
    recipe = replace(recipe, optimizer=SGD(learning_rate=0.03))
    step = make(recipe, network)
    step.strategy.double()
    x_adv = step.find(batch, step.objective, DUE).x_adv
    before, ahead = copy.deepcopy(network).eval(), copy.deepcopy(network)
    terms = step(batch, DUE)
    terms["loss"].backward()

    optimizer = torch.optim.SGD(ahead.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
    soft = torch.full((12, 5), 0.3 / 4, dtype=torch.float64)
    soft[range(12), batch.y] = 0.7
    ahead.train()
    (-(soft * ahead(x_adv).log_softmax(1)).sum(1).mean()).backward()
    optimizer.step()
    ahead.load_state_dict({**ahead.state_dict(), **dict(before.named_buffers())})  # statistics stay
    ahead.eval()
    with torch.no_grad():
        harm = min(10.0, float(F.cross_entropy(before(x_adv), batch.y)))
        clean = float((ahead(batch.x).argmax(1) == batch.y).double().mean())
    elsewhere = replace(DUE, seed=DUE.key("look-ahead").value)
    attack = PGD(steps=10, step_size=0.2 / 4, restarts=2, early_stop=0)
    found = attack(View(ahead), batch, lambda z: cross_entropy(z, batch.y), threat=recipe.threat, progress=elsewhere)
    robust = float((ahead(found.x_adv).argmax(1) == batch.y).double().mean())
    reward = 0.7 * harm + 3.0 * robust + 1.5 * clean
    told = step.watched()
    assert 0 < told["robust_accuracy"] < told["clean_accuracy"] <= 1, "else the test shows little"
    assert [told[name] for name in ("adversarial_ce", "robust_accuracy", "clean_accuracy")] == pytest.approx(
        [harm, robust, clean], abs=1e-10
    )
    assert told["reward"] == pytest.approx(reward, abs=1e-10)

    naive = copy.deepcopy(step.strategy)
    naive.zero_grad()
    points = uniform(DUE.key("attack strategy"), batch.rows, (3,), dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for head, logits in enumerate(naive(batch.x)):
        for row in range(12):
            probabilities = logits[row].softmax(0)
            place, mass = 0, 0.0
            for probability in probabilities.tolist():
                mass += probability
                place += mass <= float(points[row, head])
            loss = loss - reward * probabilities[place].log() / 12
    loss.backward()
    for (name, expected), given in zip(naive.named_parameters(), step.strategy.parameters(), strict=True):
        assert float(expected.grad.abs().sum()) > 0, name
        torch.testing.assert_close(given.grad, expected.grad, rtol=1e-8, atol=1e-12, msg=name)


def test_a_reward_of_enormous_losses_is_cut() -> None:
    step = make(recipe_with(), small_network())
    for loss, expected in ((9.0, 9.0), (12.0, 10.0)):
        parts = torch.tensor([loss, 0.5, 0.25], dtype=torch.float64)
        assert float(step.reward(parts, DUE)) == expected + 4 * 0.5 + 2 * 0.25


@pytest.mark.parametrize("views", [(), (WorstWeights(gamma=0.05),)], ids=["las_at", "las_awp"])
def test_it_looks_ahead_by_the_gradient_that_the_classifier_gets(views: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    network = trained_network()
    step = make(replace(las_at(epsilon=EPSILON), views=views), network)
    seen: list[View] = []
    measured = step.reward_parts

    def reward_parts(batch: Batch, attacked: Any, ahead: View, progress: Progress) -> Tensor:
        seen.append(ahead)
        return measured(batch, attacked, ahead, progress)

    monkeypatch.setattr(step, "reward_parts", reward_parts)
    step(small_batch(dtype=torch.float64), DUE)["loss"].backward()
    for name, weight in network.named_parameters():
        expected = weight - 0.1 * (weight.grad + 5e-4 * weight)
        torch.testing.assert_close(seen[0].state[name], expected.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_classifier_does_not_see_the_policy(precision: str) -> None:
    """Its weights bit for bit, its gradient, its statistics and its loss are those of a step without an update."""
    recipe = replace(recipe_with(), views=(WorstWeights(gamma=0.05),))
    batch, results = small_batch(), []
    for period in (20, 1000):
        network = trained_network(torch.float32)
        before = {name: weight.clone() for name, weight in network.named_parameters()}
        tracked = [int(value) for name, value in network.named_buffers() if name.endswith("tracked")]
        step = make(recipe_with(recipe, period=period), network, precision=precision)
        terms = step(batch, DUE)
        terms["loss"].backward()
        for name, weight in network.named_parameters():
            assert torch.equal(weight, before[name]), name
        after = [int(value) for name, value in network.named_buffers() if name.endswith("tracked")]
        assert after == [count + 1 for count in tracked]
        assert set(terms) == {"loss", "adv_ce"}
        learns = [weight.grad is not None for weight in step.strategy.parameters()]
        assert all(learns) if period == 20 else not any(learns)
        assert bool(step.watched()) == (period == 20)
        gradients = {name: weight.grad for name, weight in network.named_parameters()}
        results.append({**terms, **gradients, **dict(network.named_buffers())})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_it_learns_what_is_rewarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is rewarded but a change beyond three halves of epsilon, which the largest radius alone can make."""
    choices = {"epsilons": [0.5, 1.0, 2.0], "steps": [1], "step_sizes": [4.0], "look_ahead_steps": 0}
    settings = {"period": 1, "learning_rate": 0.1, "gradient_clip": 10.0, "width": 4}
    step = make(recipe_with(**choices, **settings), nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    batch = Batch(torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1]))

    def reward_parts(batch: Batch, attacked: Any, ahead: View, progress: Progress) -> Tensor:
        far = (attacked.x_adv - batch.x).abs().flatten(1).amax(1) > 1.5 * EPSILON
        return torch.tensor([float(far.double().mean()), 0.0, 0.0], dtype=torch.float64)

    monkeypatch.setattr(step, "reward_parts", reward_parts)
    _, second = step.optimizers()

    @torch.no_grad()
    def chance() -> float:
        return float(step.strategy(batch.x)[0].softmax(1)[:, 2].mean())

    start = chance()
    for number in range(150):
        progress = Progress(step=number, steps_per_epoch=150)
        step(batch, progress)["loss"].backward()
        step.after_backward(progress)
        second.step()
        second.zero_grad()
    assert start < 0.6
    assert chance() > 0.9


def test_the_strategys_optimiser_keeps_its_own_settings() -> None:
    """The loop sets the classifier's learning rate and decay, and the gradient is clipped."""
    rate = Schedule(((0, 1e-4), (0.5, 1e-5)), "step")
    recipe = replace(recipe_with(learning_rate=rate, gradient_clip=1e-3), optimizer=SGD(learning_rate=0.3))
    recipe = replace(recipe, schedule=constant(1.0))
    step = make(recipe, small_network())
    both = step.optimizers()
    trained = [{id(p) for group in one.param_groups for p in group["params"]} for one in both]
    assert trained[0] == {id(p) for p in step.model.parameters()}
    assert trained[1] == {id(p) for p in step.strategy.parameters()}
    for epoch, expected in ((0, 1e-4), (1, 1e-5)):
        progress = replace(DUE, epoch=epoch, step=20 * epoch + 19)
        set_hyperparameters(both, recipe, progress)
        step(small_batch(), progress)["loss"].backward()
        step.after_backward(progress)
        norm = torch.stack([p.grad.norm() for p in step.strategy.parameters()]).norm()
        assert float(norm) == pytest.approx(1e-3, rel=1e-3)
        assert [group["lr"] for one in both for group in one.param_groups] == pytest.approx([0.3, expected])
        assert [group["weight_decay"] for one in both for group in one.param_groups] == [5e-4, 0]
        step.zero_grad()


# ------------------------------------------------------------------- the whole


def counted(
    recipe: Recipe, network: nn.Module, batch: Batch, progress: Progress
) -> tuple[float, LearnableStrategyStep]:
    """The cost of a step in forward passes, by torch's FLOP formulas."""
    step = make(recipe, network)
    with CountedFlops() as one:
        network(batch.x)
    with CountedFlops() as everything:
        step(batch, progress)["loss"].backward()
    return everything.total / one.total, step


@pytest.mark.parametrize("name", ["las_at", "las_awp"])
def test_passes_are_what_is_computed(name: str) -> None:
    """Without an update by what the rows chose, with one at most, and on the mean over a period."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(256, 256), nn.ReLU())]
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), *layers, nn.Linear(256, 5))
    recipe = {"las_at": las_at, "las_awp": las_awp}[name](epsilon=1e-5)
    recipe = replace(recipe_with(recipe, width=2), optimizer=SGD(learning_rate=1e-6))
    batch = small_batch(rows=24)
    batch = batch._replace(y=network(batch.x).argmax(1))  # never misclassified, so that no row of the look-ahead stops
    outer = 6 if name == "las_awp" else 3
    plain, step = counted(recipe, network, batch, replace(DUE, step=18))
    attack = step.strategy_attack
    steps = attack.meant(attack.chosen(attack.logits(batch), batch, DUE))[1].double()
    assert float(steps.std()) > 1
    assert plain == pytest.approx(2 * float(steps.mean()) + outer, rel=0.03)
    update, _ = counted(recipe, network, batch, DUE)
    assert update - plain == pytest.approx(3 + 42 + 3, rel=0.03)
    mean = 2 * sum(recipe.step.steps) / len(recipe.step.steps) + outer
    expected = mean + (update - plain) / 20
    assert recipe.passes() == pytest.approx(expected, rel=0.01)
    assert recipe.passes() == recipe.passes(DUE)


def quick(**changes: Any) -> Recipe:
    """Two epochs of four steps on the toy data, with an update in every third."""
    choices = {"epsilons": [0.5, 1.0, 1.5], "steps": [1, 2, 3], "step_sizes": [0.25, 1.0]}
    step = LearnableStrategy(**choices, period=3, learning_rate=0.05, look_ahead_steps=2, width=4)
    return tiny_recipe(attack=None, step=step, train_ball="unbounded", label_smoothing=0.1, **changes)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside an epoch; the strategy network and its optimiser are kept, and have an effect."""
    recipe, whole, parted = quick(gradient_clip=5.0), tmp_path / "whole", tmp_path / "parted"
    fit(recipe, toy(), tiny_net(), out=whole, settings=FP32)
    one_step = Loop.one_step

    def asked(loop: Loop, batch: Batch, progress: Progress) -> None:
        one_step(loop, batch, progress)
        loop.interruption.asked = progress.step == 4

    monkeypatch.setattr(Loop, "one_step", asked)
    with pytest.raises(Interrupted):
        fit(recipe, toy(), tiny_net(), out=parted, settings=FP32)
    stopped = newest_checkpoint(parted)
    monkeypatch.undo()
    fit(recipe, toy(), tiny_net(), out=parted, settings=FP32, resume=True)
    assert_same_run(whole, parted)
    ended = newest_checkpoint(parted)
    assert len(ended["optimizers"]) == 2
    heads = [state["step"]["strategy.heads.0.weight"] for state in (stopped, ended)]
    assert not torch.equal(*heads), "the update after the stop counts"
    lines = metrics(whole)
    assert all(set(line["terms"]) == {"loss", "adv_ce"} for line in lines)
    assert all(0 < line["watched"]["reward"] < 16 for line in lines)
    assert lines[0]["watched"] != lines[1]["watched"]


def test_runs_of_other_seeds_begin_with_other_strategies(tmp_path: Path) -> None:
    heads, recipe = [], recipe_with(quick(epochs=1), period=1000)  # never updated
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        fit(recipe, toy(), tiny_net(), out=out, settings=FP32, seed=seed)
        heads.append(newest_checkpoint(out)["step"]["strategy.stem.0.weight"])
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_two_epochs_on_the_digits(tmp_path: Path) -> None:
    whole = load_data("digits")
    digits = replace(whole, train=whole.train.subset(torch.arange(800)), test=whole.test.subset(torch.arange(200)))
    recipe = replace(recipe_with(las_at(epsilon=0.2), period=5), epochs=2, batch_size=64)
    settings = Settings(precision="fp32", device="cpu", validation_steps=1, test_steps=1, test_images=None)
    run = fit(recipe, digits, "small_cnn", out=tmp_path / "run", settings=settings, model_options={"width": 8})
    first, second = metrics(run.path)
    for line in (first, second):
        assert line["terms"]["loss"] == pytest.approx(line["terms"]["adv_ce"], rel=1e-4)
        assert line["watched"]["clean_accuracy"] >= line["watched"]["robust_accuracy"] >= 0
    assert second["terms"]["loss"] < first["terms"]["loss"]
    assert run.summary["last"]["clean_accuracy"] > 0.3, "a tenth would be chance"
    best = newest_checkpoint(run.path)["best"]["count"]
    assert best[0] < best[1], "the best is chosen by robust accuracy, then by clean"


@pytest.mark.parametrize("make_recipe", [las_at, las_awp])
def test_a_configuration_makes_the_same_recipe_again(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(epsilon="8/255")
    config = recipe_config(recipe)
    assert config["step"]["name"] == "learnable_strategy"
    assert config["attack"] is None
    again = build_recipe(config)
    assert again.step == recipe.step
    assert recipe_config(again) == config
    whole = {**config, "data": "digits", "model": {}, "training": {}}
    changed = build_recipe(override(whole, ["--step.period=5", "--step.steps=[2, 4]", "--step.epsilons=[0.5, 1]"]))
    assert changed.step == replace(recipe.step, period=5, steps=(2, 4), epsilons=(0.5, 1.0))  # type: ignore[type-var]


def test_the_papers_settings() -> None:
    """In steps of 1/255 at 8/255, both ends included."""
    for recipe, radii, steps, sizes in (
        (las_at(epsilon="8/255"), (3, 15), (3, 14), (1, 5)),
        (las_awp(epsilon="8/255"), (7, 15), (8, 16), (2, 5)),
    ):
        settings = recipe.step
        assert [8 * value for value in settings.epsilons] == list(range(radii[0], radii[1] + 1))
        assert list(settings.steps) == list(range(steps[0], steps[1] + 1))
        assert [8 * value for value in settings.step_sizes] == list(range(sizes[0], sizes[1] + 1))
        assert (settings.period, settings.gradient_clip) == (20, 1.0)
        assert settings.look_ahead == PGD(steps=10, restarts=2, early_stop=0)


@pytest.mark.parametrize(
    ("make_it", "advice"),
    [
        (lambda: replace(las_at(epsilon=0.1), attack=PGD()), "set it to None"),
        (lambda: replace(las_at(epsilon=0.1), objective=StandardTraining()), "leave it out"),
        (lambda: LearnableStrategy(epsilons=[]), "give a list"),
        (lambda: LearnableStrategy(steps=[1.5]), "whole numbers of at least 1"),
        (lambda: LearnableStrategy(step_sizes=[0.0]), "above 0"),
        (lambda: LearnableStrategy(period=0), "at least 1"),
        (lambda: LearnableStrategy(clean_weight=-1.0), "at least 0"),
        (lambda: LearnableStrategy(gradient_clip=0.0), "positive norm"),
    ],
)
def test_what_makes_no_sense_is_refused(make_it: Callable[[], object], advice: str) -> None:
    with pytest.raises(HoldfastError, match=advice):
        make_it()


def test_objectives_that_count_survived_steps_are_refused() -> None:
    from holdfast.objectives.geometry_weighted import GeometryWeighted

    with pytest.raises(HoldfastError, match="choose another objective"):
        replace(las_at(epsilon=0.1), objective=GeometryWeighted())
