"""Every recipe: two epochs on real images through the whole of `fit`, and a cost that is what it says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import small_batch, small_network
from holdfast import L2, AsymmetricInvariance, Batch, LabelRefinement, Settings, View, WorstWeights, fit, load_model
from holdfast.attacks.base import AttackWithMemory
from holdfast.data.sources import load
from holdfast.errors import HoldfastError
from holdfast.further_network import FurtherNetwork
from holdfast.models.factory import build
from holdfast.progress_display import Display
from holdfast.recipe import Recipe
from holdfast.recipes import RECIPES
from holdfast.schedule import Progress, constant, piecewise
from holdfast.setup import prepare, recipe_notes
from holdfast.step import AdversarialStep
from holdfast.steps.learnable_strategy import LearnableStrategy
from parts import IMAGES, CountedFlops
from tiny_runs import FP64, metrics, tiny_net, tiny_recipe, toy, weights

EVERY = pytest.mark.parametrize("name", RECIPES)
# LAS-AT's step draws how many steps its attack takes, and now and then trains its strategy: see test_learnable_strategy
NOT_DRAWN = pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("las_")])
QUICK = Settings(precision="fp32", device="cpu", validation_steps=1, test_steps=1, test_images=None)


def with_teachers(recipe: Recipe) -> Recipe:
    """The recipe with new networks for the trained ones that it asks for."""
    teachers = {
        name: build("small_cnn", num_classes=10, channels=1, image_size=(8, 8), width=8).requires_grad_(False)
        if isinstance(network, FurtherNetwork) and not network.trained
        else network
        for name, network in recipe.networks.items()
    }
    return replace(recipe, networks=teachers)


def shortened(recipe: Recipe) -> Recipe:
    """The recipe with searches of two steps at most; how many there are is the subject of `test_recipe_settings`."""
    attack, step, views = recipe.attack, recipe.step, tuple(copy.copy(view) for view in recipe.views)
    if getattr(attack, "steps", 0) > 2:
        attack = replace(attack, steps=2)  # type: ignore[type-var]  # all attacks are data classes
    if isinstance(step, LearnableStrategy):
        step = replace(step, steps=(1, 2), look_ahead_steps=2)
    for view in views:
        if isinstance(view, WorstWeights):
            view.steps = min(view.steps, 2)
    return replace(recipe, attack=attack, step=step, views=views)


def own_step(recipe: Recipe, network: nn.Module) -> AdversarialStep:
    """The step that a run of the recipe takes."""
    if recipe.step is None:
        return AdversarialStep(recipe, network)
    return recipe.step(recipe, network, precision="fp32", check_finite=True)


@EVERY
def test_two_epochs_on_the_digits(name: str, tmp_path: Path) -> None:
    """It learns, its terms add up to the loss, and what it exports is a plain model that anyone can load."""
    recipe = shortened(with_teachers(RECIPES[name](epsilon=0.05)))
    recipe = replace(recipe, epochs=2, warmup=0.0, batch_size=20)
    settings = replace(QUICK, extra_data="digits") if recipe.extra_share else QUICK
    whole = load("digits")
    digits = replace(whole, train=whole.train.subset(torch.arange(200)), test=whole.test.subset(torch.arange(100)))
    run = fit(recipe, digits, "small_cnn", out=tmp_path / "run", settings=settings, model_options={"width": 8})
    first, second = metrics(run.path)
    for line in (first, second):
        parts = [value for term, value in line["terms"].items() if term != "loss"]
        assert parts
        assert line["terms"]["loss"] == pytest.approx(sum(parts), rel=1e-4)
    assert run.summary["last"]["clean_accuracy"] > 0.25, "a tenth would be chance"
    plain = build("small_cnn", num_classes=10, channels=1, image_size=(8, 8), width=8)
    assert weights(run.path).keys() == plain.state_dict().keys()
    images = digits.test
    x = images.pixels.permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        right = load_model(run.path)(x).argmax(1) == images.labels
    assert right.float().mean().item() == pytest.approx(run.summary["clean_accuracy"], abs=1e-6)


@EVERY
def test_paper_settings_make_a_recipe_too(name: str) -> None:
    """Under both kinds of network, and as a schedule of no other method's making."""
    for model in ("resnet18", "wrn_34_10"):
        recipe = RECIPES[name](epsilon="8/255", model=model, paper_settings=True)
        assert recipe.name == name
        assert recipe.threat.epsilon == pytest.approx(8 / 255)
        if name != "las_awp":  # its code trains the strategy network in every step
            assert recipe.passes() == pytest.approx(RECIPES[name](epsilon="8/255").passes())


@NOT_DRAWN
def test_passes_are_what_is_computed(name: str) -> None:
    """Counted by torch's FLOP formulas, at a time of the run when all of the method is on."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(256, 256), nn.ReLU())]
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), *layers, nn.Linear(256, 5))
    recipe = RECIPES[name](epsilon=0.1)
    if name.startswith("fat"):  # what is stated is the most that it costs: where no image stops early
        assert getattr(recipe.attack, "early_stop", None) is not None
        recipe = replace(recipe, attack=replace(recipe.attack, early_stop=None))  # type: ignore[arg-type,type-var]  # PGD
        assert recipe.passes() == RECIPES[name](epsilon=0.1).passes()
    if name.startswith("ar_at"):  # this network has no normalisation to take features from, and predictors cost too
        objective = AsymmetricInvariance(layers=("2",), predictor=False)
        recipe = replace(recipe, objective=objective)
    batch = small_batch()
    recipe.objective.prepare(network, batch.x[:2], IMAGES)
    if isinstance(recipe.attack, AttackWithMemory):
        recipe.attack.prepare(network, batch.x[:2], IMAGES)
    guides = {guide: copy.deepcopy(network) for guide in recipe.networks}
    for guide, module in guides.items():
        module.requires_grad_(guide not in recipe.objective.detached_sides)
    recipe = replace(recipe, networks=guides)
    late = Progress(step=95, epochs=100, epoch=95, stage=3, measured={"clean_accuracy": 0.5})
    with CountedFlops() as one:
        network(batch.x)
    step = own_step(recipe, network)
    step(batch, replace(late, step=93))  # what is only made now and then is there already
    with CountedFlops() as all_of_it:
        step(batch, late)["loss"].backward()
    counted = all_of_it.total / one.total
    assert counted == pytest.approx(recipe.passes(late), rel=0.03)
    assert recipe.passes(late) == recipe.passes()


def test_what_is_not_on_yet_is_not_paid_for() -> None:
    """ISEAT's clean side before the learning rate drops, TRADES-AWP's search in its warm-up."""
    early = Progress(step=0, epochs=100)
    assert RECIPES["iseat"](epsilon=0.1).passes(early) == 26
    assert RECIPES["trades_awp"](epsilon=0.1).passes(early) == 27


def test_svhns_epsilon_grows() -> None:
    recipe = RECIPES["iseat_svhn"](epsilon="8/255")
    radii = [recipe.radius(Progress(step=step, epochs=200)) for step in (0, 1, 4, 5, 100)]
    assert radii == pytest.approx([0, 8 / 255 / 5, 4 * 8 / 255 / 5, 8 / 255, 8 / 255])


def test_a_network_without_batchnorm_is_told_and_trained(tmp_path: Path) -> None:
    """The split falls away; the features come from layers that are named."""
    told: list[str] = []
    recipe = replace(
        RECIPES["ar_at"](epsilon=0.1), epochs=1, batch_size=16, objective=AsymmetricInvariance(layers=("2",))
    )

    class Told(Display):
        def say(self, message: str) -> None:
            told.append(message)

    fit(recipe, toy(), tiny_net(norm=False), out=tmp_path / "run", settings=FP64, display=Told())
    assert any("no BatchNorm" in line for line in told)
    with pytest.raises(HoldfastError, match=r"--objective\.layers"):
        fit(RECIPES["ar_at"](epsilon=0.1), toy(), tiny_net(norm=False), out=tmp_path / "other", settings=FP64)


def test_a_part_that_never_comes_on_is_told(tmp_path: Path) -> None:
    """ISEAT's stability waits for the learning rate to drop."""
    for schedule, expected in ((constant(1.0), True), (piecewise((0, 1), (0.5, 0.1)), False)):
        recipe = replace(RECIPES["iseat"](epsilon=0.1), schedule=schedule, epochs=1)
        notes = prepare(recipe, toy(), tiny_net(), seed=0, settings=FP64).notes
        assert any("stays off" in note for note in notes) == expected


def test_public_codes_noise_moves_both_sides(tmp_path: Path) -> None:
    """AR-AT's --paper-settings: the clean side sees x + U(-ε, ε), unclamped, and x_adv lies up to 2ε from x."""
    recipe = RECIPES["ar_at"](epsilon=0.1, paper_settings=True)
    network, batch = small_network(), small_batch(rows=64)
    recipe.objective.prepare(network, batch.x[:2])
    step = AdversarialStep(recipe, network)
    noisy = step.with_noise(batch, Progress(seed=1))
    moved = noisy.x - batch.x
    assert 0.09 < float(moved.abs().max()) <= 0.1 + 1e-6
    assert float(noisy.x.min()) < 0 or float(noisy.x.max()) > 1
    x_adv = step.find(noisy, step.objective, Progress(seed=1)).x_adv
    assert float((x_adv - noisy.x.clamp(0, 1)).abs().max()) <= 0.1 + 1e-5
    assert float((x_adv - batch.x).abs().max()) > 0.15
    assert 0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1
    plain = AdversarialStep(tiny_recipe(), small_network())
    assert torch.equal(plain.with_noise(batch, Progress()).x, batch.x)


def test_the_balance_is_measured_on_the_clean_branch(tmp_path: Path) -> None:
    """AR-AT's accuracy at an epoch's start is that of the auxiliary branch, and reaches the loss."""
    seen = []

    def measure(view: View, batches: Iterable[Batch]) -> float:
        seen.append((view.branch, view.statistics, sum(len(batch.y) for batch in batches)))
        return 0.25

    objective = AsymmetricInvariance()
    objective.measures = (replace(objective.measures[0], measure=measure, images=40),)
    recipe = replace(RECIPES["ar_at"](epsilon=0.1), objective=objective, epochs=2, batch_size=16)
    run = fit(recipe, toy(), tiny_net(), out=tmp_path / "run", settings=FP64)
    assert seen == [("aux", "eval", 48)] * 2
    assert [line["measured"] for line in metrics(run.path)] == [{"clean_accuracy": 0.25}] * 2
    measured = [objective.weights(Progress(measured={"clean_accuracy": value})) for value in (0.25, 1.0)]
    assert measured == [(0.25, 0.75), (1.0, 0.0)]


def test_an_own_loop_gets_the_methods_stage_from_the_recipes_schedule() -> None:
    """ISEAT's strength waits for the learning rate to drop, which nobody tells the step outside `fit`."""
    step = AdversarialStep(RECIPES["iseat"](epsilon=0.1), small_network())
    for epoch, expected in ((99, False), (100, True)):
        terms = step(small_batch(), Progress(step=epoch, epoch=epoch, epochs=200))
        assert ("stability" in terms) == expected
    assert "stability" in step(small_batch(), Progress(step=5)), "without a length the run is at its end"


def test_a_method_that_needs_the_networks_sizes_says_so_before_an_optimiser_is_made() -> None:
    recipe = RECIPES["ar_at"](epsilon=0.1)
    with pytest.raises(HoldfastError, match="before AdversarialStep"):
        AdversarialStep(recipe, small_network())
    network, batch = small_network(), small_batch(rows=1)
    recipe.objective.prepare(network, batch.x)
    step = AdversarialStep(recipe, network)
    with pytest.raises(HoldfastError, match="two or more images"):
        step(batch, Progress(measured={"clean_accuracy": 0.5}))


@pytest.mark.parametrize("name", ["free_at", "las_at"])
def test_an_own_loop_makes_the_methods_own_step(name: str) -> None:
    """The ordinary step would train something else."""
    with pytest.raises(HoldfastError, match=rf"recipe '{name}' has a step of its own: make it by recipe\.step\("):
        AdversarialStep(RECIPES[name](epsilon=0.1), small_network())


@pytest.mark.parametrize(("name", "method"), [("sglr", "SGLR"), ("fgsm_pgi", "FGSM-PGI")])
def test_memories_ask_for_positions_that_they_have(name: str, method: str) -> None:
    """A batch without its index, or with one beyond the images that were announced, is refused in one line."""
    recipe, network, batch = RECIPES[name](epsilon=0.1), small_network(), small_batch()
    for part in (recipe.objective, recipe.attack):
        if isinstance(part, AttackWithMemory | LabelRefinement):
            part.prepare(network, batch.x[:2], images=20)
    step = AdversarialStep(recipe, network)
    held = batch._replace(index=torch.arange(len(batch.y)) + 20 - len(batch.y))
    step(held, Progress(epoch=90, step=90, epochs=100))
    for index, part in ((None, "give batches their index"), (held.rows + 1, "images, and a batch holds number 20")):
        with pytest.raises(HoldfastError, match=part) as refusal:
            step(batch._replace(index=index), Progress(epoch=90, step=90, epochs=100))
        assert str(refusal.value).startswith(method)
        assert "\n" not in str(refusal.value)


def test_attacked_sides_beside_a_weight_perturbation_are_told() -> None:
    """Of a combination that somebody has made; no recipe's own leaves one out unsaid."""
    recipe = replace(RECIPES["consistency"](epsilon=0.1), views=(WorstWeights(),))
    told = "WorstWeights perturbs adv, while adv2 runs at the weights themselves"
    assert any(note.startswith(told) for note in prepare(recipe, toy(), tiny_net(), seed=0, settings=FP64).notes)
    both = replace(recipe, views=(WorstWeights(sides=("adv", "adv2")),))
    for quiet in (both, *(make(epsilon=0.1) for make in RECIPES.values())):
        assert not any("the weights themselves" in note for note in recipe_notes(quiet, "a run")), quiet.name


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: RECIPES["ar_at"](epsilon=L2(0.5), paper_settings=True), "set it to 0, or use Linf"),
        (
            lambda: replace(RECIPES["awp"](epsilon=0.1), views=(WorstWeights(), WorstWeights(gamma=0.1))),
            "keep one of them",
        ),
        (lambda: AdversarialStep(RECIPES["awp"](epsilon=0.1), nn.BatchNorm2d(1)), "leave WorstWeights out"),
    ],
)
def test_combinations_that_make_no_sense(make: Callable[[], object], advice: str) -> None:
    with pytest.raises(HoldfastError, match=advice):
        make()


def test_fine_tuning_from_scratch_is_told() -> None:
    for name in ("iseat_finetune", "lsi_finetune", "trades_awp_finetune", "iseat_eq7", "iseat"):
        notes = prepare(RECIPES[name](epsilon=0.1), toy(), tiny_net(), seed=0, settings=FP64).notes
        assert any("--init" in note for note in notes) == (name != "iseat")
