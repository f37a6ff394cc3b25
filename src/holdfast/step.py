"""One training step. This file is the only place where the order of operations is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from holdfast import checks, distributed
from holdfast.attacks.base import Attack, AttackWithMemory
from holdfast.errors import HoldfastError, NonFiniteLoss
from holdfast.forward import Attacked, Batch, Forward, Outputs, Statistics, View, Views
from holdfast.functional import cross_entropy, smooth_labels
from holdfast.keyed_random import uniform
from holdfast.low_precision import weights_cast_once
from holdfast.models.adapted import for_evaluation, for_training
from holdfast.models.layout import keep_narrow_contiguous
from holdfast.models.modes import kept_in_evaluation, with_added
from holdfast.models.recomputation import recomputation_refused
from holdfast.objectives.base import Objective
from holdfast.objectives.standard import StandardTraining
from holdfast.recipe import SGD, Recipe
from holdfast.schedule import Progress, value_at
from holdfast.views.base import Ascended, Search

_NO_GRADIENT = (
    "no gradient passes through the model: take torch.no_grad, detach, .data and roundings such as argmax out of its"
    " forward"
)


class Step(Protocol):
    """What the loop needs of a step. Most methods are an objective; Free-AT and LAS-AT write a step of their own."""

    replays: int

    def __call__(self, batch: Batch, progress: Progress) -> Mapping[str, Tensor]: ...

    def optimizers(self) -> Sequence[torch.optim.Optimizer]: ...

    def after_backward(self, progress: Progress) -> None: ...


class AdversarialStep(nn.Module):
    """Attack, views, outer forwards, objective, mean: one step of any recipe, compiled and distributed as one module.

    A step changes no parameter. Its attack and searches run on detached weights and leave BatchNorm's running
    statistics alone unless the recipe asks otherwise. Frozen layers, and what the model's own `train()` leaves in
    evaluation mode when the step is made, stay in it: see `holdfast.models.modes.kept_in_evaluation`. Models that draw
    (dropout) do so from a generator forked and seeded by (seed, step); the caller's random state is as before.

    Args:
        recipe: The method.
        model: Pixels in [0, 1] to logits. A wrapper such as `nn.DataParallel` is taken off.
        precision: ``"bf16"`` runs the network under autocast; losses stay in float32. ``"fp32"`` and ``"fp64"`` run it
            in the weights' own type.
        check_finite: Look at every term before it is returned, and raise if one is not finite. It makes an
            accelerator wait; the loop looks at its sums every few steps there instead.

    Shapes:
        Returns means, each of shape (): "loss", and one for every term.
    Raises:
        NonFiniteLoss: a term is NaN or infinite; the message names it.
        HoldfastError: the model uses activation checkpointing.

    Example:
        >>> from holdfast.recipes import pgd_at
        >>> step = AdversarialStep(pgd_at(epsilon=0.1), nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
        >>> terms = step(Batch(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])), Progress())
        >>> sorted(terms)
        ['adv_ce', 'loss']
    """

    replays = 1

    def __init__(self, recipe: Recipe, model: nn.Module, *, precision: str = "fp32", check_finite: bool = True) -> None:
        super().__init__()
        if recipe.step is not None and type(self) is AdversarialStep:
            raise HoldfastError(
                f"recipe {recipe.name!r} has a step of its own: make it by recipe.step(recipe, model, precision='fp32',"
                " check_finite=True), and call its after_backward and after_epoch too"
            )
        self.recipe = recipe
        self.model = model = for_training(model)
        self.objective: Objective = recipe.objective
        self.warmup_objective: Objective = StandardTraining()
        self.attack: Attack | None = recipe.attack
        self.networks = nn.ModuleDict(built_networks(recipe))
        self.view_transforms = recipe.views
        if not self.objective.is_prepared:
            raise HoldfastError(
                f"{type(self.objective).__name__} must know sizes: call objective.prepare(model, x, images=N) with a"
                " few images and the number of training images before AdversarialStep is made"
            )
        self.precision = precision
        self.check_finite = check_finite
        kept = {name: kept_in_evaluation(network) for name, network in (("", model), *self.networks.items())}
        before = {name for name, _ in model.named_modules()}
        for transform in self.view_transforms:
            transform.prepare(model)
        self.in_evaluation = {**kept, "": with_added(kept[""], before, model)}  # by network, the classifier's under ""
        self.cast_once: frozenset[str] | None = None  # unknown before the first attack
        keep_narrow_contiguous(self)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        if self.check_finite and not (distributed.active() and len(batch.y) == 0):  # a process may get no rows
            checks.check_batch(batch)
        if progress.stage is None:
            progress = replace(progress, stage=self.recipe.schedule.stage(progress.fraction))
        objective = self.warmup_objective if progress.warming_up else self.objective
        sides = objective.sides(progress)
        device = batch.x.device.type
        with recomputation_refused(), _forked_generator(progress, batch.x.device), self.autocast(device):
            batch = self.with_noise(batch, progress)
            if objective.attacks_soft_labels and self.recipe.label_smoothing and batch.target is None:
                batch = self.smoothed(batch, {"one": self.one(batch)})
            attacked = self.find(batch, objective, progress) if objective.attacks(sides) else None
            views = self.outer_views(objective, sides, {} if progress.warming_up else self.branches)
            if not progress.warming_up:
                for transform in self.view_transforms:
                    views = transform(views, self.search(objective, batch, attacked, progress), progress)
            further = self.further_loss(objective, views, sides, batch, attacked, progress)
            outputs = self.run(objective, views, sides, batch, attacked)
            batch = self.smoothed(batch, outputs)
            with torch.autocast(device, enabled=False):  # losses and predictors in full precision
                terms = objective(Forward(batch, outputs, attacked, progress, remember=True))
            means = self.reduce(terms, len(batch.y))
            if torch.is_grad_enabled() and not any(output.logits.requires_grad for output in outputs.values()):
                raise HoldfastError(_NO_GRADIENT)
            return means if further is None else {**means, "loss": means["loss"] + further}

    def with_noise(self, batch: Batch, progress: Progress) -> Batch:
        """The batch with the recipe's `input_noise`; not clamped."""
        radius = 0.0 if progress.warming_up else value_at(self.recipe.input_noise, progress)
        if radius == 0:
            return batch
        share = uniform(progress.key("input noise"), batch.rows, batch.x.shape[1:], dtype=batch.x.dtype)
        return batch._replace(x=batch.x + radius * (2 * share - 1))

    @torch.no_grad()
    def one(self, batch: Batch) -> Outputs:
        """The classifier's outputs for one image of the batch, for their shape."""
        return View(self.model)(batch.x[:1])

    def view(self, model: nn.Module | None = None, **how: Any) -> View:
        """A view of the classifier, or of a copy of it, as the step runs it."""
        model = self.model if model is None else model
        return View(model, in_evaluation=self.in_evaluation[""], cast_once=self.cast_once or frozenset(), **how)

    def smoothed(self, batch: Batch, outputs: Mapping[str, Outputs]) -> Batch:
        """The batch with the recipe's soft labels, where whoever made the batch has not given any."""
        if not self.recipe.label_smoothing or batch.target is not None:
            return batch
        classes = next(iter(outputs.values())).logits.shape[1]
        return batch._replace(target=smooth_labels(batch.y, classes, self.recipe.label_smoothing))

    def autocast(self, device: str) -> torch.autocast:
        """The precision under which the network runs."""
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def find(
        self, batch: Batch, objective: Objective, progress: Progress, *, model: nn.Module | None = None
    ) -> Attacked:
        """Inner maximisation over the input. The result is detached and inside the ball that the recipe declares.

        `model` is attacked instead of the classifier where it is given.
        """
        if self.attack is None:
            raise HoldfastError(f"recipe {self.recipe.name!r} reads an attacked side: give it an attack")
        view = self.view(model, statistics=self.attack.statistics)
        if self.cast_once is None and torch.is_autocast_enabled(batch.x.device.type) and len(batch.x):
            self.cast_once = weights_cast_once(view, batch.x[:2])
            view = replace(view, cast_once=self.cast_once)
        radius = self.recipe.radius(progress)
        threat = self.recipe.threat if radius is None else self.recipe.threat.with_epsilon(radius)

        @torch.no_grad()
        def inside(x_adv: Tensor, x: Tensor) -> Tensor:
            return threat.clamp(x_adv.detach()) if radius is None else threat.project(x_adv.detach(), x)

        def attack(of: Batch, now: Progress) -> Attacked:
            inner_loss = objective.inner_loss(view, of, now)
            try:
                found = self.attack(view, of, inner_loss, threat=threat, progress=now)  # type: ignore[misc]  # not None
            except RuntimeError as error:
                if "does not require grad" in str(error):
                    raise HoldfastError(_NO_GRADIENT) from error
                raise
            others = {side: inside(images, of.x) for side, images in (found.others or {}).items()}
            return found._replace(x_adv=inside(found.x_adv, of.x), others=others)

        with _reading_only(self.attack if model is not None else None):
            found = attack(batch, progress)
            for side in objective.sides(progress):
                if side.startswith("adv") and side.endswith("2"):
                    second = batch._replace(x=objective.side_input("clean2", batch, None))
                    other = replace(progress, seed=progress.key("second view").value)
                    found = found._replace(others={**(found.others or {}), side: attack(second, other).x_adv})
        return found

    @property
    def branches(self) -> dict[str, str]:
        """The BatchNorm branch of every side that does not run on the main one."""
        return {side: branch for transform in self.view_transforms for side, branch in transform.branches.items()}

    def outer_views(self, objective: Objective, sides: Sequence[str], branches: Mapping[str, str]) -> dict[str, View]:
        """The views of the outer forwards: the classifier in training mode, further networks under their names.

        Branches are chosen here, so that a weight search sees them wherever it stands among the transforms.
        """
        views = {}
        for side in sides:
            statistics: Statistics = "batch" if side in objective.untracked_sides else "batch_tracked"
            network, branch, taps = self.model, branches.get(side, "main"), objective.taps
            if side in self.networks:
                network, branch, taps = self.networks[side], "main", ()
                trained = any(parameter.requires_grad for parameter in network.parameters())
                if not trained or side in objective.detached_sides:
                    statistics = "eval"  # it stands still
            kept = self.in_evaluation[side if side in self.networks else ""]
            views[side] = View(network, branch=branch, statistics=statistics, taps=taps, in_evaluation=kept)
        return views

    def run(
        self, objective: Objective, views: Views, sides: Sequence[str], batch: Batch, attacked: Attacked | None
    ) -> dict[str, Outputs]:
        """The outer forwards, in the objective's order (clean before adv unless it says otherwise)."""
        outputs = {}
        for side in sides:
            with torch.set_grad_enabled(torch.is_grad_enabled() and side not in objective.detached_sides):
                outputs[side] = views[side](objective.side_input(side, batch, attacked))
        return outputs

    def further_loss(
        self,
        objective: Objective,
        views: Views,
        sides: Sequence[str],
        batch: Batch,
        attacked: Attacked | None,
        progress: Progress,
    ) -> Tensor | None:
        """What a method's own step adds to the loss to train a part that no term reaches (LAS-AT's strategy), or None.

        It stands before the outer forwards, so that what it runs is freed before they keep their graphs.
        """
        return None

    def search(self, objective: Objective, batch: Batch, attacked: Attacked | None, progress: Progress) -> Search:
        """What a weight search climbs, under candidate views and batch statistics that are not tracked."""

        def ascended(views: Views, sides: Sequence[str], loss: Ascended, below: float | None = None) -> Tensor:
            quiet = {
                side: view if view.statistics == "eval" else replace(view, statistics="batch")
                for side, view in views.items()
            }
            outputs = self.run(objective, quiet, sides, batch, attacked)
            with torch.autocast(batch.x.device.type, enabled=False):
                if loss == "adversarial_ce":
                    terms = {loss: cross_entropy(outputs["adv"].logits, self.smoothed(batch, outputs).labels)}
                else:
                    terms = objective(Forward(self.smoothed(batch, outputs), outputs, attacked, progress))
            if below is not None:
                rows = torch.stack(list(terms.values())).sum(0)
                terms = {"below": torch.where(rows < below, rows, torch.zeros_like(rows))}
            return self.reduce(terms, len(batch.y))["loss"]

        return ascended

    def reduce(self, terms: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
        """Means over the valid rows of all processes, scaled so that a mean of gradients over processes is right."""
        for name, term in terms.items():
            if term.shape != (rows,):
                raise HoldfastError(
                    f"loss term {name!r} has shape {tuple(term.shape)}: return one value an image, ({rows},)"
                )
            if self.check_finite and not bool(torch.isfinite(term).all()):
                raise not_finite(name)
        if distributed.active():
            everyone = distributed.total(torch.tensor(float(rows), device=next(iter(terms.values())).device))
            share = {name: distributed.world_size() / everyone.to(term.dtype) for name, term in terms.items()}
            means = {name: term.sum() * share[name] for name, term in terms.items()}
        else:
            means = {name: term.mean() for name, term in terms.items()}
        return {"loss": torch.stack(list(means.values())).sum(), **means}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """One optimiser over all trained parameters: the classifier's, the objective's and the further networks'.

        Raises:
            HoldfastError: the classifier has none.
        """
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise HoldfastError(
                "all parameters of the model are frozen (requires_grad=False), so nothing would be trained: unfreeze"
                " some, for example model.requires_grad_(True)"
            )
        settings: SGD = self.recipe.optimizer
        start = Progress(epochs=self.recipe.epochs)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [
            torch.optim.SGD(
                trained,
                lr=settings.learning_rate * self.recipe.schedule(start),
                momentum=value_at(settings.momentum, start),
                weight_decay=value_at(settings.weight_decay, start),
                nesterov=settings.nesterov,
            )
        ]

    def after_backward(self, progress: Progress) -> None:
        """Nothing: the averages and the objective have no use for raw gradients."""

    def after_epoch(self, progress: Progress) -> None:
        """Called at an epoch's end on all processes: what they hold beside the classifier becomes equal."""
        distributed.average_buffers(self.networks)
        self.objective.after_epoch(progress)
        if isinstance(self.attack, AttackWithMemory):
            self.attack.after_epoch(progress)


def built_networks(recipe: Recipe) -> dict[str, nn.Module]:
    """The recipe's further networks.

    Raises:
        HoldfastError: one is still a description, which only `fit` turns into a network.
    """
    built = {}
    for name, network in recipe.networks.items():
        if isinstance(network, nn.Module):
            trained = any(parameter.requires_grad for parameter in network.parameters())
            built[name] = for_training(network) if trained else for_evaluation(network)
    for name in recipe.networks:
        if name not in built:
            raise HoldfastError(
                f"the network {name!r} is only described: give the module itself,"
                f" dataclasses.replace(recipe, networks={{{name!r}: module}}), or train with fit()"
            )
    return built


def not_finite(term: str) -> NonFiniteLoss:
    """The error for a loss term, or the gradient, that is NaN or infinite."""
    what = "the gradient" if term == "gradient" else f"loss term {term!r}"
    return NonFiniteLoss(
        f"{what} is NaN or infinite: lower the learning rate, set --gradient-clip 1.0, or use"
        " --precision fp32; the last checkpoint is kept"
    )


class _reading_only:
    """An attack with memory writes nothing inside; any other attack, or None, is left alone."""

    def __init__(self, attack: Attack | None) -> None:
        self.attack = attack if isinstance(attack, AttackWithMemory) and attack.training else None

    def __enter__(self) -> None:
        if self.attack is not None:
            self.attack.eval()

    def __exit__(self, *error: object) -> None:
        if self.attack is not None:
            self.attack.train()


class _forked_generator:
    """Draws inside come from a generator seeded by (seed, step); afterwards the global one is as it was."""

    def __init__(self, progress: Progress, device: torch.device) -> None:
        self.seed = progress.key("model draws").fold(progress.step, distributed.rank()).torch_seed
        self.fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        self.fork.__exit__(*error)  # type: ignore[arg-type]  # the three exception arguments, passed on
