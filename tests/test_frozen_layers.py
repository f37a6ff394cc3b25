"""Frozen BatchNorm, and a `train()` of the network's own: what is frozen neither moves nor is perturbed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import small_batch, small_network
from holdfast import fit, recipes
from holdfast.attacks.pgd import PGD
from holdfast.averages.reestimation import reestimate_statistics
from holdfast.averages.swa import SWA
from holdfast.compilation import compile_in_place
from holdfast.errors import HoldfastError
from holdfast.forward import Batch, View
from holdfast.models.modes import kept_in_evaluation
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.progress_display import Display
from holdfast.recipe import Recipe
from holdfast.run_models import anew
from holdfast.schedule import Progress
from holdfast.step import AdversarialStep
from holdfast.views.split_batchnorm import SplitBatchNorm
from holdfast.views.worst_weights import WorstWeights
from parts import small_recipe
from tiny_runs import FP32, tiny_recipe, toy

RECIPES = ("pgd_at", "trades_awp", "rwp", "ar_at", "iseat", "piat_nmse", "las_at", "free_at", "fgsm_pgi")


class OwnTrain(nn.Sequential):
    """Keeps its first BatchNorm in evaluation mode, though its weights are trained."""

    def train(self, mode: bool = True) -> OwnTrain:
        super().train(mode)
        self[1].eval()
        return self


def with_statistics(network: nn.Sequential) -> nn.Sequential:
    """The network with statistics that fit no batch."""
    for module in network:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.linspace(-0.3, 0.3, len(module.running_mean)))
            module.running_var.copy_(torch.linspace(0.05, 0.2, len(module.running_var)))
    return network


def frozen(*, given: str = "train") -> nn.Sequential:
    """A network whose first BatchNorm was frozen."""
    network = getattr(with_statistics(small_network()), given)()
    network[1].eval().requires_grad_(False)
    return network


def own_train() -> nn.Sequential:
    return OwnTrain(*with_statistics(small_network()))


MAKE: dict[str, Callable[[], nn.Sequential]] = {
    "frozen": frozen,
    "frozen, loaded": lambda: frozen(given="eval"),
    "own train()": own_train,
}


def one_step(network: nn.Module, recipe: Recipe, batch: Batch, **settings: Any) -> tuple[Any, Tensor]:
    """The step and its loss, the gradients taken."""
    recipe.objective.prepare(network, batch.x[:2], 400)
    if isinstance(recipe.attack, nn.Module):
        recipe.attack.prepare(network, batch.x[:2], 400)  # type: ignore[operator]  # an attack with memory
    step = (recipe.step or AdversarialStep)(recipe, network, **settings)
    step.optimizers()
    where = Progress(step=19, epoch=5, epochs=6, steps_per_epoch=4, stage=3, measured={"clean_accuracy": 0.8})
    loss = step(batch, where)["loss"]
    loss.backward()
    step.after_backward(where)
    return step, loss.detach()


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", RECIPES)
def test_frozen_statistics_stand_still_in_every_step(kind: str, name: str) -> None:
    network = MAKE[kind]()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    one_step(network, recipes.RECIPES[name](epsilon=0.1), small_batch())
    after = network.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if key.startswith("1."))
    assert not torch.equal(after["4.running_mean"], before["4.running_mean"]), "the others move"
    auxiliary = {key: value for key, value in after.items() if key.startswith("1.aux.")}
    assert bool(auxiliary) == (name == "ar_at")
    assert all(torch.equal(value, before[key.replace("aux.", "")]) for key, value in auxiliary.items())


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("statistics", ["eval", "batch", "batch_tracked"])
def test_frozen_layers_normalise_by_their_own_statistics(kind: str, statistics: str) -> None:
    """As in a loop of plain PyTorch: `train()`, and the frozen layer in evaluation mode."""
    network, plain = MAKE[kind](), MAKE[kind]()
    plain.train()[1].eval()
    x = small_batch().x
    if statistics == "eval":
        plain.eval()
    expected = plain(x)
    with torch.no_grad():
        found = View(network, statistics=statistics)(x).logits
    torch.testing.assert_close(found, expected.detach())
    recipe = small_recipe(AdversarialTraining(), attack=PGD(steps=2, step_size=0.05, statistics=statistics))
    step = AdversarialStep(recipe, network)
    network.eval()  # between steps, as a person's own validation does: what is frozen was decided before
    views = step.outer_views(recipe.objective, ("adv",), {})
    assert views["adv"].in_evaluation == {"1"}
    assert step.view(statistics=statistics).in_evaluation == {"1"}


def test_a_network_that_was_loaded_is_trained_as_a_new_one() -> None:
    losses = []
    for given in ("train", "eval"):
        network = getattr(small_network(), given)()
        losses.append(one_step(network, small_recipe(), small_batch())[1])
        assert int(network[1].num_batches_tracked) == 2
    assert torch.equal(*losses)


def test_further_networks_keep_theirs() -> None:
    guide = frozen()
    before = guide[1].running_mean.clone()
    recipe = dataclasses.replace(recipes.lbgat(epsilon=0.1), networks={"guide": guide})
    one_step(small_network(), recipe, small_batch())
    assert torch.equal(guide[1].running_mean, before)
    assert int(guide[4].num_batches_tracked) == 1


def test_a_network_that_is_drawn_anew_has_nothing_frozen() -> None:
    drawn = anew(frozen(), 3).requires_grad_(True)
    assert kept_in_evaluation(drawn) == frozenset()


def test_reestimation_leaves_frozen_layers_alone() -> None:
    network = with_statistics(small_network()).eval()
    before = network[1].running_mean.clone(), network[4].running_mean.clone()
    reestimate_statistics(network, [small_batch()], lambda batch: {"main": batch.x}, frozen={"1"})
    assert torch.equal(network[1].running_mean, before[0])
    assert not torch.equal(network[4].running_mean, before[1])


@pytest.mark.parametrize("kind", MAKE)
def test_a_whole_run(kind: str, tmp_path: Path) -> None:
    """Split branches, averaged weights, and their statistics measured anew."""
    network = MAKE[kind]()
    network[7] = nn.Linear(128, 4)
    recipe = tiny_recipe(
        views=(SplitBatchNorm(),),
        objective=recipes.piat_nmse(epsilon=0.1).objective,
        averages=(SWA(begin=0.0, period=1, buffers="adversarial"),),
        epochs=2,
    )
    said: list[str] = []

    class Heard(Display):
        def say(self, text: str) -> None:
            said.append(text)

    fit(recipe, toy(), network, out=tmp_path / "run", settings=FP32, display=Heard())
    assert [line for line in said if "evaluation mode" in line] == [
        "evaluation mode is kept in training, as the model has it: 1, 1.aux (2 in all)"
    ]
    weights = load_file(tmp_path / "run" / "last" / "model.safetensors")
    before = network.state_dict()
    assert torch.equal(weights["1.running_mean"], before["1.running_mean"])
    assert torch.equal(weights["1.running_var"], before["1.running_var"])
    assert not torch.equal(weights["4.running_mean"], before["4.running_mean"])


@pytest.mark.parametrize("scale", ["tensor", "global"])
def test_a_weight_search_leaves_frozen_tensors_alone(scale: Any) -> None:
    """ν is what it is for a network that holds the frozen weights as constants."""

    class Constant(nn.Module):
        def __init__(self, weight: Tensor, bias: Tensor) -> None:
            super().__init__()
            self.register_buffer("weight", weight)
            self.register_buffer("bias", bias)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.weight, self.bias, padding=1)

    network, constant = small_network(), small_network()
    constant[0] = Constant(constant[0].weight.detach(), constant[0].bias.detach())
    network[0].requires_grad_(False)
    found = []
    for each in (network, constant):
        transform = WorstWeights(gamma=0.1, scale=scale, steps=2)
        step = AdversarialStep(small_recipe(AdversarialTraining(), views=(transform,)), each)
        batch = small_batch()
        attacked = step.find(batch, step.objective, Progress())
        views = step.outer_views(step.objective, ("adv",), {})
        state = transform(views, step.search(step.objective, batch, attacked, Progress()), Progress())["adv"].state
        assert state is not None
        found.append({name: value.detach() for name, value in state.items() if not name.startswith("0.")})
        if each is network:
            assert torch.equal(state["0.weight"], network[0].weight)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])
        assert torch.equal(value, network.state_dict()[name]) == (value.dim() == 1)


def test_nothing_to_perturb_and_nothing_to_train_are_said() -> None:
    network = small_network()
    for module in (network[0], network[3], network[7]):
        module.requires_grad_(False)
    with pytest.raises(HoldfastError, match="trains no weights of two or more dimensions"):
        AdversarialStep(small_recipe(AdversarialTraining(), views=(WorstWeights(),)), network)
    with pytest.raises(HoldfastError, match="all parameters of the model are frozen"):
        AdversarialStep(small_recipe(AdversarialTraining()), network.requires_grad_(False)).optimizers()


def test_compiled_networks_keep_them_too() -> None:
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        network = frozen()
        before = network[1].running_mean.clone()
        step = AdversarialStep(small_recipe(AdversarialTraining()), network)
        if compiled:
            compile_in_place(network, backend="eager")
        losses.append(step(small_batch(), Progress())["loss"].item())
        assert torch.equal(network[1].running_mean, before)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
