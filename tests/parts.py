"""Every attack, objective, average and recipe there is, for the tests that all of them must pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from conftest import small_network
from holdfast import distributed
from holdfast.attacks.base import AttackWithMemory
from holdfast.attacks.fgsm import FGSM
from holdfast.attacks.pgd import PGD
from holdfast.components import ATTACKS, AVERAGES, OBJECTIVES
from holdfast.forward import Batch, View, Views
from holdfast.objectives.base import Objective
from holdfast.recipe import SGD, Recipe
from holdfast.schedule import Progress
from holdfast.step import AdversarialStep
from holdfast.threat import Linf
from holdfast.views.base import Search, ViewTransform
from holdfast.views.split_batchnorm import SplitBatchNorm
from holdfast.views.worst_weights import WorstWeights

MAKE_OBJECTIVE: dict[str, Callable[[], Objective]] = {
    **OBJECTIVES,
    "asymmetric_trades, predictor": lambda: OBJECTIVES["asymmetric_trades"](adversarial_weight=1.0, predictor=True),
    "asymmetric_invariance, symmetric": lambda: OBJECTIVES["asymmetric_invariance"](
        direction="symmetric", predictor=False, distance="mse", balance=(1.0, 1.0)
    ),
    "logit_stability, top": lambda: OBJECTIVES["logit_stability"](weights="top", top_share=0.3, distance="kl"),
    "boundary_guided, beta": lambda: OBJECTIVES["boundary_guided"](beta=6.0),
    "geometry_weighted, from the start": lambda: OBJECTIVES["geometry_weighted"](begin=0.0),
    "label_refinement, from the start": lambda: OBJECTIVES["label_refinement"](begin=0.0),
    "fisher_rao_mart, early": lambda: OBJECTIVES["fisher_rao_mart"](early=1.0),
    "fisher_rao_mart, late, kl": lambda: OBJECTIVES["fisher_rao_mart"](early=0.0, late=0.0, distance="kl"),
    "decoupled_kl, attack": lambda: OBJECTIVES["decoupled_kl"](attack_beta=1.0),
    "logit_stability, unperturbed": lambda: OBJECTIVES["logit_stability"](compared="adv_unperturbed"),
}
MAKE_ATTACK: dict[str, Callable[[], Any]] = {
    **ATTACKS,
    "class_start_fgsm, wide": lambda: ATTACKS["class_start_fgsm"](wide=True),
    "fgsm, unprojected": lambda: FGSM(random_start=True, start_scale=2.0, project=False),
    "fgsm, bernoulli": lambda: FGSM(random_start="bernoulli"),
    "pgd, step noise": lambda: PGD(steps=4, step_noise=0.01),
    "pgd, batch": lambda: PGD(steps=3, statistics="batch"),
    "pgd, restarts": lambda: PGD(steps=3, restarts=2),
    "pgd, early stop": lambda: PGD(steps=4, early_stop=1),
    "fgsm, random start": lambda: FGSM(random_start=True),
}
MAKE_AVERAGE: dict[str, Callable[[], Any]] = {**AVERAGES}


class OneWeightStep(ViewTransform):
    """A weight perturbation in its simplest form, to test what a view transform may rely on.

    One ascent of the adversarial cross-entropy on the adversarial side, scaled tensor by tensor.
    """

    def __init__(self, gamma: float = 0.05) -> None:
        self.gamma = gamma
        self.prepared: list[nn.Module] = []

    def prepare(self, model: nn.Module) -> None:
        self.prepared.append(model)

    def passes(self, progress: Progress, sides: Sequence[str]) -> float:
        return 3.0

    def __call__(self, views: Views, search: Search, progress: Progress) -> Views:
        view: View = views["adv"] if "adv" in views else views["clean"]
        side = "adv" if "adv" in views else "clean"
        names = [name for name, parameter in view.model.named_parameters() if parameter.dim() > 1]
        weights: dict[str, Tensor] = {
            n: p.detach().requires_grad_(n in names) for n, p in view.model.named_parameters()
        }
        loss = "adversarial_ce" if side == "adv" else "objective"
        value = search({**views, side: replace(view, state=weights)}, (side,), loss)
        gradients = list(torch.autograd.grad(value, [weights[n] for n in names]))
        distributed.average_in_place(gradients)
        state = dict(view.model.named_parameters())
        for name, gradient in zip(names, gradients, strict=True):
            own = state[name]
            state[name] = own + (self.gamma * own.norm() / gradient.norm().clamp_min(1e-12) * gradient).detach()
        return {**views, side: replace(view, state=state)}


MAKE_VIEWS: dict[str, Callable[[Sequence[str]], tuple[Any, ...]]] = {
    "no view": lambda sides: (),
    "worst weights": lambda sides: (WorstWeights(gamma=0.05, sides=sides, ascend="objective"),),
    "worst weights, ten global steps": lambda sides: (
        WorstWeights(gamma=0.05, sides=sides[-1:], ascend="objective", steps=3, scale="global", below=3.0),
    ),
    "split batchnorm": lambda sides: (SplitBatchNorm(),),
    "split batchnorm, worst weights": lambda sides: (WorstWeights(gamma=0.05, sides=sides[-1:]), SplitBatchNorm()),
}
"""Views by name, for an objective that runs these sides."""


def fits(views: str, sides: Sequence[str]) -> bool:
    """Whether these views make sense for an objective of these sides."""
    return "split" not in views or ("clean" in sides and len(sides) > 1)


def trained_sides(objective: Objective, progress: Progress) -> tuple[str, ...]:
    """The sides on which the classifier runs and learns."""
    others = (*objective.needs_networks, *objective.detached_sides)
    return tuple(side for side in objective.sides(progress) if side not in others)


IMAGES = 400  # more than the largest index of a small batch


def prepared(name: str, network: nn.Module, batch: Batch) -> Objective:
    """The objective of a name, with its predictors drawn from a fixed seed."""
    objective = MAKE_OBJECTIVE[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        objective.prepare(network, batch.x[:2], IMAGES)
    return objective


def attack_for(objective: Objective, network: nn.Module, batch: Batch) -> Any:
    """A cheap attack that makes the images which the objective asks for."""
    made = {"collaborative": "collaborative_pgd", "adv_prior": "prior_guided_fgsm", "adv_start": "class_start_fgsm"}
    for side in objective.needs_others:
        attack = ATTACKS["collaborative_pgd"](steps=2) if side == "collaborative" else ATTACKS[made[side]]()
        if isinstance(attack, AttackWithMemory):
            attack.prepare(network, batch.x[:2], IMAGES)
        return attack
    return PGD(steps=2, step_size=0.05)


def recipe_for(objective: Objective, network: nn.Module, batch: Batch, **changes: Any) -> Recipe:
    """A recipe with the attack and the further networks that the objective asks for."""
    guides = {}
    for number, name in enumerate(objective.needs_networks):
        guides[name] = small_network(seed=number + 5, dtype=batch.x.dtype)
        guides[name].requires_grad_(name not in objective.detached_sides)
    settings = {"attack": attack_for(objective, network, batch), "networks": guides, **changes}
    return small_recipe(objective, **settings)


def small_recipe(objective: Objective | None = None, **changes: Any) -> Recipe:
    """A recipe with a cheap attack."""
    settings: dict[str, Any] = {
        "name": "test",
        "threat": Linf(0.1),
        "attack": PGD(steps=2, step_size=0.05),
        "objective": objective or OBJECTIVES["normalized_mse"](),
        "optimizer": SGD(learning_rate=0.05),
        "epochs": 2,
        "batch_size": 12,
    }
    return Recipe(**{**settings, **changes})


class CountedFlops(TorchDispatchMode):
    """Sums torch's own FLOP formulas. (`FlopCounterMode` hooks modules, which autograd.grad cannot take.)"""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


LATE = Progress(step=19, epoch=5, epochs=6, steps_per_epoch=4, stage=3, measured={"clean_accuracy": 0.8})
"""When all of a method is on."""


def prepared_step(recipe: Recipe, model: nn.Module, batch: Batch, precision: str) -> Any:
    """The step that a run of the recipe takes, with its own parts drawn from one seed and its optimisers made."""
    torch.manual_seed(3)  # predictors and the strategy network draw their weights
    recipe.objective.prepare(model, batch.x[:2], IMAGES)
    if isinstance(recipe.attack, AttackWithMemory):
        recipe.attack.prepare(model, batch.x[:2], IMAGES)
    step: Any = (recipe.step or AdversarialStep)(recipe, model, precision=precision)
    step.optimizers()
    return step
