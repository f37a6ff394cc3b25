"""LAS-AT: a second network learns how strongly every image is attacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from holdfast import distributed
from holdfast.attacks.pgd import PGD
from holdfast.errors import HoldfastError
from holdfast.forward import Attacked, Batch, View, Views
from holdfast.functional import correct, cross_entropy
from holdfast.models.classifier import require_at_least
from holdfast.models.layout import keep_narrow_contiguous
from holdfast.objectives.base import Objective
from holdfast.recipe import Recipe
from holdfast.schedule import Progress, Scalar, as_scalar, value_at
from holdfast.step import AdversarialStep
from holdfast.steps.strategy_attack import StrategyAttack
from holdfast.steps.strategy_network import StrategyNetwork, log_probability

LARGEST_LOSS = 10.0  # above which the reward's cross-entropy is cut
WATCHED = ("reward", "adversarial_ce", "robust_accuracy", "clean_accuracy", "epsilon", "steps", "step_size")


@dataclass(frozen=True, kw_only=True)
class LearnableStrategy:
    r"""LAS-AT: radius, number of steps and step size of the attack are chosen for every image by a strategy network.

    Each is drawn from a softmax head of `StrategyNetwork`. Every `period` steps the network is trained by REINFORCE,

    .. math:: \nabla_w \; -\frac1B \sum_i R \sum_h \log p_h(a_{ih} \mid x_i), \qquad
        R = a\,\min(R_1, 10) + b\,R_2 + c\,R_3

    where :math:`R_1` is the mean cross-entropy of the images that the strategy's attack found, and :math:`R_2` and
    :math:`R_3` are the robust and the clean accuracy on the same images after the classifier's next step,
    :math:`\hat\theta = \theta - \eta\,(\nabla_\theta \mathcal{L} + \text{weight decay} \cdot \theta)`. R is one number
    for the batch, and no baseline is taken from it. :math:`\hat\theta` is a value: the classifier itself is trained by
    its own optimiser, on the recipe's objective, views and averages, as in every other method.

    Args:
        epsilons: Radii to choose from, as multiples of the radius that the recipe trains at (of the threat model's
            epsilon where its `train_ball` is "unbounded"). Whatever is chosen, what is trained on is then projected
            onto the recipe's `train_ball`.
        steps: Numbers of steps to choose from.
        step_sizes: Step sizes to choose from, as multiples of the same radius.
        period: Optimiser steps between two updates of the strategy network.
        learning_rate: Of the strategy network's own SGD, which has no momentum and no weight decay; or a schedule.
        gradient_clip: Largest norm of its gradient.
        loss_weight: a, or a schedule, as are the next two.
        robust_weight: b.
        clean_weight: c.
        look_ahead_steps: PGD steps behind R_2, each of a quarter of the radius.
        look_ahead_restarts: Its restarts.
        width: Channels of the strategy network's first block.

    Shapes:
        Choices are made by row: (B,) radii, numbers of steps and step sizes.
    Units:
        Multiples of a radius in pixel scale.
    Raises:
        HoldfastError: a setting is out of range. Recipes with an attack of their own are refused.
    Source: Jia et al., CVPR 2022, arXiv:2203.06616. Reference code: jiaxiaojunQAQ/LAS-AT.
    Differs from the reference: on an update's step the images that are rewarded are also trained on, and the update
        acts from the next step on (the reference draws and attacks anew, after the update). The look-ahead keeps the
        running statistics of the classifier, and its attack runs under them; the reference leaves the copy in training
        mode during that attack, so that it moves them. See also `rowwise_pgd` and `StrategyNetwork`.

    Example:
        >>> from holdfast.recipes.las_at import las_at
        >>> las_at(epsilon=8 / 255).passes()
        22.4
    """

    epsilons: Sequence[float] = tuple(n / 8 for n in range(3, 16))
    steps: Sequence[int] = tuple(range(3, 15))
    step_sizes: Sequence[float] = tuple(n / 8 for n in range(1, 6))
    period: int = 20
    learning_rate: Scalar = 1e-4
    gradient_clip: float = 1.0
    loss_weight: Scalar = 1.0
    robust_weight: Scalar = 4.0
    clean_weight: Scalar = 2.0
    look_ahead_steps: int = 10
    look_ahead_restarts: int = 2
    width: int = 16

    def __post_init__(self) -> None:
        for name in ("epsilons", "steps", "step_sizes"):
            values = getattr(self, name)
            whole = name == "steps"
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise HoldfastError(f"{name} is {values!r}: give a list of what may be chosen")
            for value in values:
                right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
                if not right or not 0 < value < float("inf"):
                    kind = "whole numbers of at least 1" if whole else "multiples of the radius above 0, such as 1.5"
                    raise HoldfastError(f"{name} holds {value!r}: give {kind}")
            object.__setattr__(self, name, tuple(values) if whole else tuple(float(value) for value in values))
        require_at_least(1, period=self.period, look_ahead_restarts=self.look_ahead_restarts)
        require_at_least(0, look_ahead_steps=self.look_ahead_steps)
        require_at_least(2, width=self.width)
        for name in ("learning_rate", "loss_weight", "robust_weight", "clean_weight"):
            object.__setattr__(self, name, as_scalar(name, getattr(self, name), minimum=0))
        if not self.gradient_clip > 0:
            raise HoldfastError(f"gradient_clip is {self.gradient_clip}: give a positive norm")

    def __call__(
        self, recipe: Recipe, model: nn.Module, *, precision: str = "fp32", check_finite: bool = True
    ) -> LearnableStrategyStep:
        return LearnableStrategyStep(recipe, model, settings=self, precision=precision, check_finite=check_finite)

    @property
    def look_ahead(self) -> PGD:
        """The attack behind R_2; rows that are misclassified are left where they are."""
        return PGD(steps=self.look_ahead_steps, restarts=self.look_ahead_restarts, early_stop=0)

    def due(self, progress: Progress) -> bool:
        """Whether the strategy network is trained in this step."""
        return not progress.warming_up and (progress.step + 1) % self.period == 0

    def passes(self, recipe: Recipe, progress: Progress) -> float:
        """The mean cost over a period, were all numbers of steps equally likely; the most it can be otherwise.

        The strategy network's own forward is not counted.
        """
        objective = recipe.objective
        sides = objective.sides(progress)
        outer = objective.passes(progress) + sum(view.passes(progress, sides) for view in recipe.views)
        if not objective.attacks(sides):
            return outer
        searches = 1 + sum(side.startswith("adv") and side.endswith("2") for side in sides)
        search = 2.0 * sum(self.steps) / len(self.steps) + objective.inner_passes(progress)
        reward = objective.passes(progress) + self.look_ahead.passes() + 3.0  # the step ahead, its attack, R_1 to R_3
        return searches * search + outer + reward / self.period

    def refusal(self, recipe: Recipe) -> str | None:
        """Why this recipe makes no sense with the step."""
        if recipe.attack is not None:
            return (
                "learnable_strategy chooses the attack for every image, so the recipe's own would never run: set it to"
                " None and give step.epsilons, step.steps and step.step_sizes instead"
            )
        name = type(recipe.objective).__name__
        if not recipe.objective.attacks(recipe.sides_ever()):
            return f"learnable_strategy chooses how images are attacked, and {name} runs no attacked side: leave it out"
        if recipe.objective.least_attack_steps:
            return (
                f"{name} weighs images by how many attack steps they survive, which learnable_strategy makes different"
                " from image to image: choose another objective"
            )
        return None


class LearnableStrategyStep(AdversarialStep):
    """One step of LAS-AT: `AdversarialStep` with `StrategyAttack` as its attack, and now and then a policy gradient.

    The policy's loss is part of the loss that is differentiated, so that DistributedDataParallel averages its gradient
    with all others; its value is taken off again, so that the loss that is shown is the classifier's. What the reward
    was stands in `watched`, which the loop writes into every epoch's line of metrics.

    Args:
        recipe: The method.
        model: Pixels in [0, 1] to logits.
        settings: Of the strategy.
        precision: As `AdversarialStep`; the strategy network always runs in its weights' own type.
        check_finite: As `AdversarialStep`.

    Example:
        >>> from holdfast.recipes.las_at import las_at
        >>> recipe = las_at(epsilon=0.1)
        >>> step = recipe.step(recipe, nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
        >>> terms = step(Batch(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])), Progress(step=19))
        >>> sorted(terms), sorted(step.watched())[:2]
        (['adv_ce', 'loss'], ['adversarial_ce', 'clean_accuracy'])
    """

    last: Tensor

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        *,
        settings: LearnableStrategy,
        precision: str = "fp32",
        check_finite: bool = True,
    ) -> None:
        super().__init__(recipe, model, precision=precision, check_finite=check_finite)
        self.settings = settings
        choices = [len(table) for table in (settings.epsilons, settings.steps, settings.step_sizes)]
        self.strategy = keep_narrow_contiguous(StrategyNetwork(choices, width=settings.width))
        self.strategy_attack = StrategyAttack(self.strategy, settings.epsilons, settings.steps, settings.step_sizes)
        self.attack = self.strategy_attack
        self.register_buffer("last", torch.full((len(WATCHED),), -1.0, dtype=torch.float64))

    def watched(self) -> dict[str, float]:
        """Of the last policy update: reward, what it was made of, and the mean strategy. Empty before the first."""
        values = self.last.tolist()
        return {} if values[0] < 0 else dict(zip(WATCHED, values, strict=True))

    def further_loss(
        self,
        objective: Objective,
        views: Views,
        sides: Sequence[str],
        batch: Batch,
        attacked: Attacked | None,
        progress: Progress,
    ) -> Tensor | None:
        """The policy's loss with its value taken off, in the steps that train the strategy network."""
        if attacked is None or not self.settings.due(progress) or not torch.is_grad_enabled():
            return None
        logits = self.strategy_attack.logits(batch)
        chosen = self.strategy_attack.chosen(logits, batch, progress)
        value = self.search(objective, batch, attacked, progress)(views, sides, "objective")
        parts = self.reward_parts(batch, attacked, self.look_ahead(value, progress), progress)
        reward = self.reward(parts, progress)
        means = self.mean_over_all([table.double() for table in self.strategy_attack.meant(chosen)])
        self.last.copy_(torch.cat([reward[None], parts, means]))
        policy = self.reduce({"policy": self.policy_rows(logits, chosen, reward)}, len(batch.y))["policy"]
        return policy - policy.detach()

    def reward(self, parts: Tensor, progress: Progress) -> Tensor:
        """R, of its three parts."""
        settings = self.settings
        weights = [value_at(w, progress) for w in (settings.loss_weight, settings.robust_weight, settings.clean_weight)]
        return (parts.new_tensor(weights) * parts.clamp_max(parts.new_tensor([LARGEST_LOSS, 1.0, 1.0]))).sum()

    def policy_rows(self, logits: Sequence[Tensor], chosen: Tensor, reward: Tensor) -> Tensor:
        """What REINFORCE minimises, a row each: the choices' log-probability times the reward, negative."""
        return -reward.to(logits[0].dtype) * log_probability(logits, chosen)

    def look_ahead(self, loss: Tensor, progress: Progress) -> View:
        """The classifier after one step of its optimiser down this loss, as a value."""
        weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        gradients = [
            torch.zeros_like(weight) if gradient is None else gradient
            for gradient, weight in zip(found, weights.values(), strict=True)
        ]
        distributed.average_in_place(gradients)
        rate = self.recipe.optimizer.learning_rate * self.recipe.schedule(progress)
        decay = value_at(self.recipe.optimizer.weight_decay, progress)
        state = {
            name: weight.detach() - rate * (gradient + decay * weight.detach())
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
        return self.view(state=state)

    @torch.no_grad()
    def reward_parts(self, batch: Batch, attacked: Attacked, ahead: View, progress: Progress) -> Tensor:
        """R_1, R_2, R_3 over all processes' rows, (3,) float64."""
        labels = batch.attacked_labels
        radius = self.recipe.radius(progress)
        threat = self.recipe.threat if radius is None else self.recipe.threat.with_epsilon(radius)
        elsewhere = replace(progress, seed=progress.key("look-ahead").value)  # starts of its own
        harm = cross_entropy(self.view().detached()(attacked.x_adv).logits, labels)
        ahead = ahead.detached()
        found = self.settings.look_ahead(
            ahead, batch, lambda logits: cross_entropy(logits, labels), threat=threat, progress=elsewhere
        )
        right = [correct(ahead(images).logits, batch.y) for images in (found.x_adv, batch.x)]
        return self.mean_over_all([harm, *right])

    def mean_over_all(self, quantities: Sequence[Tensor]) -> Tensor:
        """The mean of each (B,) over the rows of all processes, float64."""
        count = len(quantities[0])
        sums = [quantity.detach().double().sum() for quantity in quantities]
        everything = distributed.total(torch.stack([*sums, sums[0].new_tensor(float(count))]))
        return everything[:-1] / everything[-1]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The classifier's as in `AdversarialStep`, and the strategy network's, whose groups the loop leaves alone."""
        own = set(self.strategy.parameters())
        (first,) = super().optimizers()
        (group,) = first.param_groups
        group["params"] = [parameter for parameter in group["params"] if parameter not in own]
        rate = value_at(self.settings.learning_rate, Progress(epochs=self.recipe.epochs))
        self.policy_optimizer = torch.optim.SGD(
            [{"params": list(self.strategy.parameters()), "own_schedule": True}], lr=rate
        )
        return [first, self.policy_optimizer]

    def after_backward(self, progress: Progress) -> None:
        """Clip the policy gradient, once all processes' are averaged, and set its learning rate."""
        if not self.settings.due(progress):
            return
        torch.nn.utils.clip_grad_norm_(self.strategy.parameters(), self.settings.gradient_clip)
        for group in self.policy_optimizer.param_groups:
            group["lr"] = value_at(self.settings.learning_rate, progress)
