"""A training method with all its settings, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from torch import nn

from holdfast.attacks.base import Attack
from holdfast.averages.base import Average
from holdfast.data.loader import Augmentation, Mixing
from holdfast.errors import HoldfastError
from holdfast.further_network import FurtherNetwork
from holdfast.objectives.base import Objective
from holdfast.schedule import Progress, Scalar, Schedule, as_scalar, constant, value_at
from holdfast.threat import ThreatModel
from holdfast.views.base import ViewTransform


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum.

    Args:
        learning_rate: Peak learning rate; the recipe's schedule multiplies it.
        momentum: Momentum, or a schedule.
        weight_decay: L2 penalty on all parameters, or a schedule.
        nesterov: Nesterov's form of momentum.
    """

    learning_rate: float = 0.1
    momentum: Scalar = 0.9
    weight_decay: Scalar = 5e-4
    nesterov: bool = False

    def __post_init__(self) -> None:
        for name in ("learning_rate", "momentum", "weight_decay"):
            object.__setattr__(self, name, as_scalar(name, getattr(self, name), minimum=0))


class StepKind(Protocol):
    """What makes a method's own step, and knows what it costs and what it cannot be combined with."""

    def __call__(self, recipe: Recipe, model: nn.Module, *, precision: str, check_finite: bool) -> Any: ...

    def passes(self, recipe: Recipe, progress: Progress) -> float:
        """Cost of one optimiser step in forward passes."""
        ...

    def refusal(self, recipe: Recipe) -> str | None:
        """Why this recipe makes no sense with the step, and what to do; None where it does."""
        ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Attack, objective, views and averages under a threat model, with the schedule they are trained by.

    Args:
        name: What the run is called.
        threat: What the attacker may do.
        attack: The inner maximisation over the input; None only where no side is attacked.
        objective: The outer loss.
        views: Transforms of the outer views, in order.
        averages: Averages of the weights, in order; the last that exports decides what is validated and kept.
        networks: Further networks, each reached as a view of its name ("guide"): modules, or descriptions by which
            `fit` builds them.
        augmentation: How training images are changed; None for the crop and flip that suit the data.
        mixing: MixUp or CutMix, or None.
        extra_share: Share of every batch that is taken from extra images, which the run must then be given.
        input_noise: Radius, in pixel scale, of uniform noise added to the training images, without clamping, before the
            attack and every outer forward; the ball is then centred on the noisy image. What AR-AT's public code does
            (its noise is meant as the attack's start, but is written into the clean batch): with ``input_noise``
            at epsilon and an attack without random start, training examples lie up to two epsilon from the image.
        train_ball: Radius onto which training examples are projected: None for the threat model's epsilon, a number
            or a schedule, or ``"unbounded"`` where the method is that (pixel bounds still hold).
        optimizer: Optimiser settings.
        schedule: Factor of the learning rate over the run.
        epochs: Length of the run.
        warmup: Share of the run that trains on clean images only, at the beginning.
        batch_size: Images a step, over all processes.
        label_smoothing: s of `smooth_labels`.
        gradient_clip: Largest norm of the gradient, or None.
        fine_tuning: The method begins from a trained network; a run without --init is told so.
        step: What makes one step of it, where that is not attack, forwards, loss (Free-AT, LAS-AT); None for
            `AdversarialStep`.

    Raises:
        HoldfastError: a setting is out of range.
    """

    name: str
    threat: ThreatModel
    attack: Attack | None
    objective: Objective
    views: tuple[ViewTransform, ...] = ()
    averages: tuple[Average, ...] = ()
    networks: Mapping[str, nn.Module | FurtherNetwork] = field(default_factory=dict)
    augmentation: Augmentation | None = None
    mixing: Mixing | None = None
    extra_share: float = 0.0
    input_noise: Scalar = 0.0
    train_ball: Scalar | Literal["unbounded"] | None = None
    optimizer: SGD = field(default_factory=SGD)
    schedule: Schedule = field(default_factory=lambda: constant(1.0))
    epochs: int = 100
    warmup: float = 0.0
    batch_size: int = 128
    label_smoothing: float = 0.0
    gradient_clip: float | None = None
    fine_tuning: bool = False
    step: StepKind | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("epochs", self.epochs, 1), ("batch_size", self.batch_size, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise HoldfastError(f"{name} is {value!r}: give a whole number of at least {least}")
        for name in ("warmup", "label_smoothing", "extra_share"):
            if not 0 <= getattr(self, name) < 1:
                raise HoldfastError(f"{name} is {getattr(self, name)}: it is a share, give a number in [0, 1)")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise HoldfastError(f"gradient_clip is {self.gradient_clip}: give a positive norm, or none")
        if self.train_ball is not None and self.train_ball != "unbounded":
            object.__setattr__(self, "train_ball", as_scalar("train_ball", self.train_ball, minimum=0))  # type: ignore[arg-type]  # the word is excluded
        object.__setattr__(self, "input_noise", as_scalar("input_noise", self.input_noise, minimum=0))
        self._refuse_what_makes_no_sense()

    def _refuse_what_makes_no_sense(self) -> None:
        """Combinations that would train something else than they say."""
        sides = self.sides_ever()
        if self.attack is None and self.step is None and self.objective.attacks(sides):
            raise HoldfastError(f"recipe {self.name!r} reads an attacked side: give it an attack")
        self._refuse_what_the_objective_cannot()
        reason = None if self.step is None else self.step.refusal(self)
        if reason is not None:
            raise HoldfastError(reason)
        if self.objective.needs_random_start and getattr(self.attack, "random_start", True) is False:
            raise HoldfastError(
                f"{type(self.objective).__name__}'s attack climbs a divergence whose gradient is zero at the clean"
                " image: give the attack a random start (--attack.random_start true)"
            )
        for view in self.views:
            missing = [side for side in view.needs_sides if side not in sides]
            if missing:
                raise HoldfastError(
                    f"{type(view).__name__} works on side {missing[0]!r}, which {type(self.objective).__name__} never"
                    f" runs (it runs {', '.join(sides)}): choose other sides, or another objective"
                )
            if any(side in self.networks for side in (*view.perturbs, *view.needs_sides)):
                raise HoldfastError(f"{type(view).__name__} is for the classifier alone: take guides out of its sides")
        searched = [side for view in self.views for side in view.perturbs]
        if len(set(searched)) < len(searched):
            raise HoldfastError(
                "two weight perturbations work on one side, and the second would drop the first's: keep one of them"
            )
        if self.threat.norm != "Linf" and value_at(self.input_noise, self._end()) > 0:
            raise HoldfastError(
                f"input_noise is uniform in every pixel, which {self.threat.norm} does not bound: set it to 0, or use"
                " Linf"
            )
        writing = [type(average).__name__ for average in self.averages if average.writes_back]
        if len(writing) > 1:
            raise HoldfastError(
                f"averages {' and '.join(writing)} both write into the model, so the second would average the first's"
                " result as if training had made it: keep one of them"
            )

    def _refuse_what_the_objective_cannot(self) -> None:
        """Networks that are missing, an attack that is too short, mixed images where labels are remembered."""
        name = f"{self.name} ({type(self.objective).__name__})"
        for network in self.objective.needs_networks:
            if network not in self.networks:
                raise HoldfastError(
                    f"{name} needs a further network {network!r}: add networks={{{network!r}: FurtherNetwork()}}"
                )
        for side in self.objective.needs_others:
            if self.attack is not None and side not in getattr(self.attack, "makes", ()):
                raise HoldfastError(
                    f"{name} runs on images {side!r}, which {type(self.attack).__name__} does not make: use the attack"
                    " of its own recipe"
                )
        steps = getattr(self.attack, "steps", None)
        if steps is not None and steps < self.objective.least_attack_steps:
            raise HoldfastError(
                f"{name} weighs images by how many attack steps they survive, of which there is {steps}: give the"
                f" attack {self.objective.least_attack_steps} or more (--attack.steps 10)"
            )
        if self.mixing is not None and not self.objective.takes_mixed_images:
            raise HoldfastError(
                f"{name} needs images of one class, and {type(self.mixing).__name__} mixes two: leave the mixing out"
                " (--mixing none)"
            )

    def _end(self) -> Progress:
        """The last step of a long run, when everything that is scheduled is on."""
        return Progress(epoch=self.epochs - 1, step=self.epochs - 1, epochs=self.epochs, stage=99)

    def sides_ever(self) -> tuple[str, ...]:
        """Every side that the objective runs at some time in a run of many steps."""
        moments = [Progress(step=step, epoch=step, epochs=200) for step in range(200)]
        moments = [replace(moment, stage=self.schedule.stage(moment.fraction)) for moment in moments]
        runs = [self.objective.sides(moment) for moment in (*moments, self._end())]
        return tuple(dict.fromkeys(side for sides in runs for side in sides))

    def radius(self, progress: Progress) -> float | None:
        """The radius of the training ball now; None for pixel bounds only."""
        if self.train_ball == "unbounded":
            return None
        return self.threat.epsilon if self.train_ball is None else value_at(self.train_ball, progress)

    def passes(self, progress: Progress | None = None) -> float:
        """Cost of one step in forward passes: a backward to the input counts one, a full backward two.

        The attack's cost, plus what the views' searches add, plus a forward and a full backward for each outer side.

        Example:
            >>> from holdfast.recipes import pgd_at
            >>> pgd_at(epsilon=8 / 255).passes()
            23.0
        """
        progress = progress or self._end()
        if self.step is not None:
            return self.step.passes(self, progress)
        sides = self.objective.sides(progress)
        searched = 0.0
        if self.attack is not None and self.objective.attacks(sides):
            views = 1 + sum(side.startswith("adv") and side.endswith("2") for side in sides)
            searched = views * (self.attack.passes() + self.objective.inner_passes(progress))
        ascents = sum(view.passes(progress, sides) for view in self.views)
        return searched + ascents + self.objective.passes(progress)
