"""One-step attacks and their objectives, in float64 against naive restatements.

Fast-AT, N-FGSM, GAT, NuAT, FGSM-PGI with its memory and momentum, LIET with its patterns and random labels.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from holdfast.attacks.class_start import ClassStartFGSM
from holdfast.attacks.fgsm import FGSM
from holdfast.attacks.prior_guided import PriorGuidedFGSM
from holdfast.forward import Attacked, Batch, Forward, Outputs, View
from holdfast.functional import cross_entropy
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.objectives.base import Objective
from holdfast.objectives.guided_adversarial import GuidedAdversarial
from holdfast.objectives.nuclear_norm import NuclearNorm
from holdfast.objectives.prior_guided import PriorGuided
from holdfast.objectives.start_consistency import StartConsistency
from holdfast.schedule import Progress, linear, piecewise
from holdfast.threat import Linf
from holdfast.views.worst_weights import WorstWeights
from test_restated_comparisons import squared_distance
from test_restated_divergences import jensen_shannon
from test_restated_objectives import CLASSES, Rows, close, entropy_against, softmax
from test_restated_reweighting import (
    EPSILON,
    Case,
    Named,
    Recorder,
    StepCase,
    double_batch,
    entropy,
    networks,
    project,
    train_forwards,
)

BALL = Linf(EPSILON)


def entropy_of(batch: Batch) -> Callable[[Tensor], Tensor]:
    """The cross-entropy against the hard labels."""
    return lambda logits: cross_entropy(logits, batch.y)


def slope(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient of the mean loss of these logits along the images."""
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(model(leaf)).mean(), leaf)[0]


def grey(rows: int) -> Batch:
    """Images of one grey, far from black and white."""
    return Batch(torch.full((rows, 1, 8, 8), 0.5).double(), torch.arange(rows) % CLASSES, index=torch.arange(rows) * 5)


def chi_squared(values: Tensor, low: float, high: float, bins: int = 20) -> float:
    """How far the values are from uniform."""
    counts, _ = np.histogram(values.numpy(), bins=bins, range=(low, high))
    assert counts.sum() == values.numel()
    expected = values.numel() / bins
    return float(((counts - expected) ** 2 / expected).sum())


# Fast-AT, N-FGSM, and GAT's start


@pytest.mark.parametrize("statistics", ["eval", "batch"])
@pytest.mark.parametrize(
    ("settings", "size", "projected"),
    [
        ({"random_start": True, "step_size": 1.25 * EPSILON}, 1.25 * EPSILON, True),
        ({"random_start": True, "start_scale": 2.0, "project": False}, EPSILON, False),
        ({"random_start": "bernoulli"}, EPSILON, True),
    ],
    ids=["fast", "noise", "bernoulli"],
)
def test_one_step_from_its_start(settings: dict, size: float, projected: bool, statistics: Any) -> None:
    (model,), batch = networks(0), double_batch(30)
    other = copy.deepcopy(model).train(statistics == "batch")
    recorder = Recorder(model)
    progress = Progress(epoch=2, step=5, epochs=4, seed=1)
    found = FGSM(**settings, statistics=statistics)(
        View(model), batch, entropy_of(batch), threat=BALL, progress=progress
    )
    (start,) = recorder.inputs
    assert torch.equal(found.others["adv_start"], start)
    moved = start + size * slope(other, start, entropy_of(batch)).sign()
    expected = project(moved, batch.x) if projected else moved.clamp(0, 1)
    assert torch.allclose(found.x_adv, expected, rtol=0, atol=1e-12)
    assert ((found.x_adv == 0).any(), (found.x_adv == 1).any()) == (True, True)
    far = (found.x_adv - batch.x).abs().max().item()
    assert far == pytest.approx(EPSILON) if projected else 2.8 * EPSILON < far < 3 * EPSILON + 1e-12
    with torch.no_grad():
        right = other(start).argmax(1) == batch.y
    assert found.steps_survived.tolist() == right.long().tolist()


def starts(settings: dict, batch: Batch, progress: Progress | None = None) -> Tensor:
    """How far from x the one forward of the attack is."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)).double()
    recorder = Recorder(model)
    FGSM(**settings)(View(model), batch, entropy_of(batch), threat=BALL, progress=progress or Progress())
    return recorder.inputs[0] - batch.x


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_starts_are_uniform_in_a_ball_of_so_many_epsilons(scale: float) -> None:
    noise = starts({"random_start": True, "start_scale": scale, "project": False}, grey(600)).flatten()
    assert noise.abs().max() <= scale * EPSILON + 1e-12
    assert chi_squared(noise.clamp(-scale * EPSILON, scale * EPSILON), -scale * EPSILON, scale * EPSILON) < 43.8


def test_bernoulli_starts_are_half_an_epsilon_up_or_down_in_every_pixel() -> None:
    settings = {"random_start": "bernoulli"}
    noise = starts(settings, grey(600))
    assert torch.allclose(noise.abs(), torch.full_like(noise, EPSILON / 2), rtol=0, atol=1e-12)
    count = noise.numel()
    assert (noise > 0).double().mean().item() == pytest.approx(0.5, abs=2 / math.sqrt(count))
    assert (noise[:, 0, :, 1:] * noise[:, 0, :, :-1] > 0).double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert len(torch.unique(noise.flatten(1) > 0, dim=0)) == 600
    other = starts(settings, grey(600), Progress(epoch=1, epochs=2))
    assert ((noise > 0) == (other > 0)).double().mean().item() == pytest.approx(0.5, abs=2 / math.sqrt(count))
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    batch = grey(600)
    permuted = Batch(batch.x[order], batch.y[order], index=batch.index[order])
    assert torch.equal(starts(settings, permuted), noise[order])
    black = grey(40)._replace(x=torch.zeros(40, 1, 8, 8).double())
    assert set(starts(settings, black).unique().tolist()) == {0.0, EPSILON / 2}


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
def test_a_step_of_fast_at_and_of_n_fgsm(noisy: bool, tracked: bool) -> None:
    settings: dict = {"statistics": "batch_tracked" if tracked else "eval"}
    settings |= {"start_scale": 2.0, "project": False} if noisy else {"step_size": 1.25 * EPSILON}
    more = {"train_ball": "unbounded"} if noisy else {}
    case = StepCase(AdversarialTraining(), FGSM(random_start=True, **settings), **more)
    x, y = case.batch.x, case.batch.y
    start = starts({"random_start": True, "start_scale": 2.0 if noisy else 1.0}, case.batch, case.progress) + x
    attacked = copy.deepcopy(case.copy).train() if tracked else case.quiet
    moved = start + (1.0 if noisy else 1.25) * EPSILON * slope(attacked, start, lambda f: entropy(f, y)).sign()
    x_adv = moved.clamp(0, 1) if noisy else project(moved, x)
    images = [start, x_adv] if tracked else [x_adv]
    adv = train_forwards(case.copy, *images)[-1]
    case.assert_step(entropy(adv, y).mean())


# GAT


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("strength", [None, 2.5])
def test_gat_is_the_clean_entropy_and_the_squared_distance_of_probabilities(strength: float | None, soft: bool) -> None:
    case = Case("adv", "clean", seed=1, soft=soft)

    def restate(rows: Named, still: Named) -> dict[str, list[float]]:
        pairs = zip(rows["clean"], rows["adv"], strict=True)
        weight = 10.0 if strength is None else strength
        return {
            "clean_ce": [entropy_against(row, t) for row, t in zip(rows["clean"], case.targets, strict=True)],
            "distance": [weight * squared_distance(softmax(clean), softmax(adv)) for clean, adv in pairs],
        }

    objective = GuidedAdversarial() if strength is None else GuidedAdversarial(strength=strength)
    assert objective.sides(Progress()) == ("adv", "clean")
    case.check(objective, restate)


@pytest.mark.parametrize("statistics", ["eval", "batch"])
def test_the_attack_of_gat_is_guided_in_every_second_step(statistics: Any) -> None:
    (model,), batch = networks(0), double_batch()
    with torch.no_grad():
        guide = copy.deepcopy(model).train(statistics == "batch")(batch.x).tolist()
    logits = torch.randn(12, CLASSES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    objective = GuidedAdversarial(strength=piecewise((0, 10), (0.85, 40)))
    for step in (0, 1, 2, 3, 84, 85, 87):
        view = View(model, statistics=statistics)
        loss = objective.inner_loss(view, batch, Progress(step=step, epochs=100))
        weight = 0.0 if step % 2 == 0 else 10.0 if step < 85 else 40.0
        expected = [
            entropy_against(row, [float(k == label) for k in range(CLASSES)])
            + weight * squared_distance(softmax(clean), softmax(row))
            for row, clean, label in zip(logits.tolist(), guide, batch.y.tolist(), strict=True)
        ]
        assert close(loss(logits), expected, 1e-10), step


@pytest.mark.parametrize("step", [0, 1])
def test_a_step_of_gat_runs_adv_then_clean(step: int) -> None:
    case = StepCase(
        GuidedAdversarial(strength=8.0), FGSM(random_start="bernoulli"), progress=Progress(step=step, epochs=4)
    )
    x, y = case.batch.x, case.batch.y
    start = starts({"random_start": "bernoulli"}, case.batch, case.progress) + x
    guide = case.quiet(x).detach().softmax(1)
    gradient = slope(case.quiet, start, lambda f: entropy(f, y) + step * 8.0 * ((guide - f.softmax(1)) ** 2).sum(1))
    other = slope(case.quiet, start, lambda f: entropy(f, y) + (1 - step) * 8.0 * ((guide - f.softmax(1)) ** 2).sum(1))
    assert not torch.equal(gradient.sign(), other.sign())
    recorder = Recorder(case.model)
    case.step.find(case.batch, case.objective, case.progress)
    assert len(recorder.inputs) == 1 + step  # the guide is run where it is read, and nowhere else
    adv, clean = train_forwards(case.copy, project(start + EPSILON * gradient.sign(), x), x)
    distance = ((clean.softmax(1) - adv.softmax(1)) ** 2).sum(1)
    case.assert_step((entropy(clean, y) + 8.0 * distance).mean())


# NuAT


def nuclear(clean: Rows, adv: Rows) -> float:
    """The sum of the singular values of the B×K difference of the logits."""
    return float(np.linalg.svd(np.array(clean) - np.array(adv), compute_uv=False).sum())


@pytest.mark.parametrize("rows", [3, 5, 9])
@pytest.mark.parametrize("strength", [None, 1.5])
def test_nuat_is_the_clean_entropy_and_the_nuclear_norm_of_the_difference(strength: float | None, rows: int) -> None:
    case = Case("adv", "clean", seed=2, rows=rows)

    def restate(logits: Named, still: Named) -> dict[str, list[float]]:
        weight = 4.0 if strength is None else strength
        norm = nuclear(logits["clean"], logits["adv"]) / rows
        entropies = [entropy_against(row, t) for row, t in zip(logits["clean"], case.targets, strict=True)]
        return {"clean_ce": entropies, "nuclear_norm": [weight * norm] * rows}

    objective = NuclearNorm() if strength is None else NuclearNorm(strength=strength)
    assert objective.sides(Progress()) == ("adv", "clean")
    assert objective.couples_batch
    case.check(objective, restate, mean=True)


def test_nuat_has_finite_gradients_where_the_difference_has_no_full_rank() -> None:
    case = Case("adv", "clean", seed=3)
    equal = case.logits["clean"].detach().clone()
    for adv in (equal, torch.cat([equal[:1] + 1.0, equal[1:]])):
        case.logits["adv"] = adv.clone().requires_grad_()
        terms = case.terms(NuclearNorm())
        gradients = torch.autograd.grad(terms["nuclear_norm"].sum(), list(case.logits.values()))
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
    batch = double_batch()
    (model,) = networks(0)
    loss = NuclearNorm().inner_loss(View(model), batch, Progress(step=1, epochs=2))
    logits = model.eval()(batch.x).detach().requires_grad_()
    assert torch.isfinite(torch.autograd.grad(loss(logits).sum(), logits)[0]).all()


@pytest.mark.parametrize("statistics", ["eval", "batch"])
def test_the_attack_of_nuat_is_guided_in_every_second_step(statistics: Any) -> None:
    (model,), batch = networks(0), double_batch()
    with torch.no_grad():
        guide = copy.deepcopy(model).train(statistics == "batch")(batch.x).tolist()
    logits = torch.randn(12, CLASSES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows = logits.tolist()
    entropies = [softmax(row)[label] for row, label in zip(rows, batch.y.tolist(), strict=True)]
    plain = -sum(math.log(value) for value in entropies) / 12
    objective = NuclearNorm(strength=linear(0, 4.5))
    for step in (0, 1, 50, 51, 99):
        loss = objective.inner_loss(View(model, statistics=statistics), batch, Progress(step=step, epochs=100))
        weight = 4.5 * step / 100 * (step % 2)
        assert loss(logits).shape == (12,)
        assert loss(logits).mean().item() == pytest.approx(plain + weight * nuclear(guide, rows) / 12, rel=1e-10)


@pytest.mark.parametrize("step", [0, 1])
def test_a_step_of_nuat_runs_adv_then_clean(step: int) -> None:
    case = StepCase(NuclearNorm(strength=3.0), FGSM(random_start="bernoulli"), progress=Progress(step=step, epochs=4))
    x, y = case.batch.x, case.batch.y
    start = starts({"random_start": "bernoulli"}, case.batch, case.progress) + x
    guide = case.quiet(x).detach()

    def climbed(logits: Tensor) -> Tensor:
        return entropy(logits, y).mean() + step * 3.0 * torch.linalg.svdvals(logits - guide).sum() / 12

    x_adv = project(start + EPSILON * slope(case.quiet, start, climbed).sign(), x)
    adv, clean = train_forwards(case.copy, x_adv, x)
    case.assert_step(entropy(clean, y).mean() + 3.0 * torch.linalg.svdvals(clean - adv).sum() / 12)


# FGSM-PGI


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("strength", [None, 2.5])
def test_prior_guided_training_is_the_entropy_and_the_mean_squared_gap_to_the_start(
    strength: float | None, soft: bool
) -> None:
    case = Case("adv_prior", "adv", seed=4, soft=soft)

    def restate(rows: Named, still: Named) -> dict[str, list[float]]:
        pairs = zip(rows["adv_prior"], rows["adv"], strict=True)
        weight = 10.0 if strength is None else strength
        return {
            "adv_ce": [entropy_against(row, t) for row, t in zip(rows["adv"], case.targets, strict=True)],
            "stability": [weight * squared_distance(prior, adv) / CLASSES for prior, adv in pairs],
        }

    objective = PriorGuided() if strength is None else PriorGuided(strength=strength)
    assert objective.sides(Progress()) == ("adv_prior", "adv")
    assert tuple(objective.needs_others) == ("adv_prior",)
    case.check(objective, restate)
    loss = objective.inner_loss(View(nn.Flatten()), case.batch, Progress())
    adv = case.logits["adv"]
    assert close(loss(adv), [entropy_against(r, t) for r, t in zip(adv.tolist(), case.targets, strict=True)], 1e-11)


class Prior:
    """The memory of FGSM-PGI written out: a perturbation and a momentum for every image."""

    def __init__(self, attack: Any, momentum: float, reset_every: int) -> None:
        self.attack, self.momentum, self.reset_every = attack, momentum, reset_every
        self.delta: dict[int, Tensor] = {}
        self.moment: dict[int, Tensor] = {}
        self.drawn: list[Tensor] = []
        self.epoch = -1

    def visit(self, model: nn.Module, batch: Batch, progress: Progress) -> None:
        """One call of the attack gives what the equations give, from the memory as it was."""
        if progress.epoch != self.epoch and progress.epoch % self.reset_every == 0:
            self.delta, self.moment = {}, {}
        self.epoch = progress.epoch
        found = self.attack(View(model), batch, entropy_of(batch), threat=BALL, progress=progress)
        x, images = batch.x, batch.index.tolist()
        for row, image in enumerate(images):
            if image not in self.delta:  # a fresh draw, which is taken from the library
                drawn = (found.others["adv_prior"][row] - x[row]).round(decimals=9)
                assert torch.allclose(drawn.abs(), torch.full_like(drawn, EPSILON), rtol=0, atol=1e-8)
                self.drawn.append(drawn)
                self.delta[image], self.moment[image] = EPSILON * drawn.sign(), torch.zeros_like(drawn)
        delta = torch.stack([self.delta[image] for image in images])
        start = (x + delta).clamp(0, 1)
        assert torch.allclose(found.others["adv_prior"], start, rtol=0, atol=1e-8)
        gradient = slope(model, start, lambda f: entropy(f, batch.y))
        moment = gradient / gradient.abs().sum() + self.momentum * torch.stack([self.moment[i] for i in images])
        assert torch.allclose(found.x_adv, project(x + delta + EPSILON * gradient.sign(), x), rtol=0, atol=1e-8)
        kept = project(x + delta + EPSILON * moment.sign(), x) - x
        for row, image in enumerate(images):
            self.delta[image], self.moment[image] = kept[row], moment[row]


def inner_images(index: Tensor, seed: int) -> Tensor:
    """Images far from black and white, drawn anew for every seed, as augmentation does."""
    x = torch.rand(len(index), 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 0.2 + 0.6 * x


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_memory_and_momentum_over_epochs_and_resets(momentum: float | None) -> None:
    (model,) = networks(0)
    model.eval()
    attack = PriorGuidedFGSM(reset_every=3, **({} if momentum is None else {"momentum": momentum}))
    attack.prepare(model, torch.zeros(2, 1, 8, 8), 300)
    attack.double()
    prior = Prior(attack, 0.3 if momentum is None else momentum, 3)
    draw = torch.Generator().manual_seed(5)
    for epoch in range(8):
        order = torch.randperm(30, generator=draw)[: 30 if epoch % 3 else 22]  # a reset that some images miss
        for number, rows in enumerate(order.split(8)):
            progress = Progress(epoch=epoch, step=4 * epoch + number, steps_per_epoch=4, epochs=8)
            batch = Batch(inner_images(rows, 100 * epoch + number), rows % CLASSES, index=rows * 9 + 2)
            with torch.no_grad():
                for parameter in model.parameters():  # training goes on
                    parameter += 0.05 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            prior.visit(model, batch, progress)
        attack.after_epoch(progress)
        if epoch == 4:
            other = PriorGuidedFGSM(reset_every=3, **({} if momentum is None else {"momentum": momentum}))
            other.prepare(model, torch.zeros(2, 1, 8, 8), 300)
            other.double().load_state_dict(copy.deepcopy(attack.state_dict()))
            prior.attack = attack = other
    assert len(prior.drawn) == 90  # every image three times: at the start, and after each reset
    drawn = torch.stack(prior.drawn) > 0
    assert drawn.double().mean().item() == pytest.approx(0.5, abs=2 / math.sqrt(drawn.numel()))
    assert len(torch.unique(drawn.flatten(1), dim=0)) == 90


def test_memory_keeps_pixels_in_range_on_images_that_touch_it() -> None:
    (model,) = networks(0)
    model.eval()
    attack = PriorGuidedFGSM()
    attack.prepare(model, torch.zeros(2, 1, 8, 8), 300)
    attack.double()
    prior = Prior(attack, 0.3, 40)
    index = torch.arange(8) * 3
    for step in range(6):
        batch = Batch(inner_images(index, 50 + step), torch.arange(8) % CLASSES, index=index)
        if step:  # memory is filled; now there are pixels at both ends
            batch = batch._replace(x=((batch.x - 0.5) * 2.5 + 0.5).clamp(0, 1))
            assert ((batch.x == 0).any(), (batch.x == 1).any()) == (True, True)
        prior.visit(model, batch, Progress(step=step, steps_per_epoch=6, epochs=2))


@pytest.mark.parametrize("how", ["eval", "another model"])
def test_memory_is_only_read_in_evaluation_and_where_another_model_is_attacked(how: str) -> None:
    case = StepCase(PriorGuided(), PriorGuidedFGSM())
    case.batch = case.batch._replace(x=inner_images(torch.arange(12), 3))
    attack: Any = case.step.attack
    first = case.step.find(case.batch, case.objective, case.progress)
    kept = copy.deepcopy(attack.state_dict())
    other = networks(7)[0] if how == "another model" else None
    attack.train(how != "eval")
    for _ in range(2):
        again = case.step.find(case.batch, case.objective, case.progress, model=other)
        torch.testing.assert_close(attack.state_dict(), kept, rtol=0, atol=0)
        assert not torch.equal(again.others["adv_prior"], first.others["adv_prior"])  # it stands where memory is
    assert attack.training == (how != "eval")


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_a_step_of_fgsm_pgi_runs_start_then_adv_and_remembers_once(smoothing: float, search: bool) -> None:
    views = (WorstWeights(gamma=0.05, sides=("adv",), ascend="objective", steps=2),) if search else ()
    case = StepCase(PriorGuided(), PriorGuidedFGSM(), label_smoothing=smoothing, views=views)
    case.batch = case.batch._replace(x=inner_images(torch.arange(12), 3))
    x, y = case.batch.x, case.batch.y
    attack: Any = case.step.attack
    with torch.no_grad():
        attack.eval()
        drawn = case.step.find(case.batch, case.objective, case.progress).others["adv_prior"] - x
        attack.train()
    soft = torch.full((12, CLASSES), smoothing / (CLASSES - 1), dtype=torch.float32)
    soft = soft.scatter(1, y[:, None], 1.0 - smoothing).double()
    smoothed = lambda f: -(soft * f.log_softmax(1)).sum(1)  # noqa: E731
    gradient = slope(case.quiet, x + drawn, smoothed)
    if smoothing:
        assert not torch.equal(gradient.sign(), slope(case.quiet, x + drawn, lambda f: entropy(f, y)).sign())
    x_adv = project(x + drawn + EPSILON * gradient.sign(), x)
    if search:
        recorder = Recorder(case.model)
        case.step(case.batch, case.progress)["loss"].backward()
        assert torch.allclose(recorder.inputs[-1], x_adv, rtol=0, atol=1e-10)
    else:
        start, adv = train_forwards(case.copy, x + drawn, x_adv)
        case.assert_step((smoothed(adv) + 10.0 * ((adv - start) ** 2).mean(1)).mean())
    after = case.step.find(case.batch, case.objective, case.progress).others["adv_prior"]
    assert torch.allclose(after, x_adv, rtol=0, atol=1e-10)  # without earlier momentum, memory is the attack's own


# LIET


def random_labels(objective: Objective, batch: Batch, progress: Progress | None = None) -> Tensor:
    """The soft labels of the entropy term: minus its slope at equal logits, plus 1 / K."""
    logits = torch.zeros(len(batch.y), CLASSES, dtype=torch.float64, requires_grad=True)
    outputs = {side: Outputs(logits if side == "adv" else logits.detach(), {}) for side in ("adv_start", "adv")}
    attacked = Attacked(batch.x, torch.zeros_like(batch.y))
    term = objective(Forward(batch, outputs, attacked, progress or Progress()))["adv_ce"]
    return 1 / CLASSES - torch.autograd.grad(term.sum(), logits)[0]


def climbed_labels(objective: Objective, batch: Batch, progress: Progress | None = None) -> Tensor:
    """The soft labels that the attack climbs away from."""
    logits = torch.zeros(len(batch.y), CLASSES, dtype=torch.float64, requires_grad=True)
    loss = objective.inner_loss(View(nn.Flatten()), batch, progress or Progress())(logits)
    return 1 / CLASSES - torch.autograd.grad(loss.sum(), logits)[0]


@pytest.mark.parametrize("smoothing", [None, 0.8])
def test_liet_shares_a_part_of_the_label_at_random(smoothing: float | None) -> None:
    objective = StartConsistency() if smoothing is None else StartConsistency(smoothing=smoothing)
    s = 0.6 if smoothing is None else smoothing
    batch = grey(3000)
    soft = random_labels(objective, batch)
    own = soft[range(3000), batch.y]
    assert torch.allclose(own, torch.full_like(own, 1 - s), rtol=0, atol=1e-7)
    others = soft[torch.arange(CLASSES) != batch.y[:, None]].view(3000, CLASSES - 1)
    assert (others >= 0).all()
    assert torch.allclose(others.sum(1), torch.full((3000,), s).double(), rtol=0, atol=1e-7)
    assert torch.allclose(others.mean(0), torch.full((4,), s / 4).double(), rtol=0, atol=0.02 * s)
    assert others.std().item() > 0.2 * s / 4  # not shared equally
    assert len(torch.unique(others, dim=0)) > 2990
    assert torch.equal(random_labels(objective, batch), soft)  # what a weight search sees is what the step sees
    assert (random_labels(objective, batch, Progress(epoch=1, epochs=2)) - soft).abs().max() > 0.1


@pytest.mark.parametrize("settings", [{}, {"strength": 3.0, "smoothing": 0.3}])
def test_liet_is_the_entropy_and_the_divergence_from_the_start(settings: dict) -> None:
    case = Case("adv_start", "adv", seed=6)
    objective = StartConsistency(**settings)
    soft = random_labels(objective, case.batch).tolist()

    def restate(rows: Named, still: Named) -> dict[str, list[float]]:
        pairs = zip(rows["adv_start"], rows["adv"], strict=True)
        weight = settings.get("strength", 100.0)
        return {
            "adv_ce": [entropy_against(row, t) for row, t in zip(rows["adv"], soft, strict=True)],
            "divergence": [weight * jensen_shannon(softmax(a), softmax(b)) for a, b in pairs],
        }

    assert objective.sides(Progress()) == ("adv_start", "adv")
    assert tuple(objective.needs_others) == ("adv_start",)
    case.check(objective, restate)
    rising = StartConsistency(strength=linear(0, 100))
    full = case.terms(StartConsistency())["divergence"].detach()
    assert close(case.terms(rising, Progress(step=30, epochs=100))["divergence"], 0.3 * full)
    logits = case.logits["adv"].tolist()
    climbed = climbed_labels(objective, case.batch)
    loss = objective.inner_loss(View(nn.Flatten()), case.batch, Progress())(case.logits["adv"])
    assert close(loss, [entropy_against(row, t) for row, t in zip(logits, climbed.tolist(), strict=True)], 1e-11)
    assert close(climbed[range(7), case.y], [1 - settings.get("smoothing", 0.6)] * 7, 1e-7)
    assert close(climbed.sum(1), [1.0] * 7, 1e-7)


def liet(model: nn.Module, **settings: Any) -> Any:
    """The attack with its patterns, in float64."""
    attack = ClassStartFGSM(**settings)
    attack.prepare(model, torch.zeros(2, 1, 8, 8).double(), 300)
    return attack.double()


def restated_patterns(model: nn.Module) -> Tensor:
    """ε times the sign of the gradient of every class's entropy at an image of constant 0.5, in evaluation mode."""
    model = copy.deepcopy(model).eval()
    half = torch.full((1, 1, 8, 8), 0.5, dtype=torch.float64)
    each = [slope(model, half, lambda f, c=c: entropy(f, torch.tensor([c])))[0] for c in range(CLASSES)]
    return EPSILON * torch.stack(each).sign()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("statistics", ["eval", "batch"])
def test_starts_of_liet_mix_the_pattern_of_the_class_with_noise(statistics: Any, wide: bool) -> None:
    (model,), batch = networks(0), grey(30)
    with torch.no_grad():
        for _ in range(3):
            model.train()(double_batch(32).x)
    patterns = restated_patterns(model)
    other = copy.deepcopy(model).train(statistics == "batch")
    attack = liet(model, wide=wide, statistics=statistics)
    reach = 2 * EPSILON if wide else EPSILON
    shares, signs, noises = [], [], []
    for step in range(20):
        progress = Progress(epoch=step, step=step, epochs=20)  # noise is drawn once an epoch for every image
        found = attack(View(model), batch, entropy_of(batch), threat=BALL, progress=progress)
        start = found.others["adv_start"]
        delta = start - batch.x
        wanted = patterns[batch.y]
        like = [torch.isclose(delta, sign * wanted, rtol=0, atol=1e-8) for sign in (1, -1)]
        sign = torch.stack([mask.flatten(1).sum(1) for mask in like]).argmax(0)
        mask = torch.where(sign.view(-1, 1, 1, 1) == 0, like[0], like[1])
        assert delta[~mask].abs().max() < reach
        shares.append((~mask).double().flatten(1).mean(1))
        signs.append(sign)
        noises.append(delta[~mask])
        moved = start + EPSILON * slope(other, start, lambda f: entropy(f, batch.y)).sign()
        expected = moved.clamp(0, 1) if wide else project(moved, batch.x)
        assert torch.allclose(found.x_adv, expected, rtol=0, atol=1e-8)
    share = torch.stack(shares)  # by step and image
    means = share.mean(1)
    assert means.min() > 0.08
    assert means.max() < 0.52
    assert means.min() < 0.2
    assert means.max() > 0.4
    binomial = (means * (1 - means) / 64).sqrt()
    assert ((share.std(1) / binomial) < 1.6).all()  # one ρ for all images of a batch, one draw for every pixel
    noise = torch.cat(noises)
    assert chi_squared(noise, -reach, reach) < 43.8
    up = torch.stack(signs).double()
    assert 0.2 < up.mean() < 0.8  # the side is drawn, too


def test_patterns_are_made_anew_after_so_many_steps_under_running_statistics() -> None:
    (model,), batch = networks(0), grey(30)
    attack = liet(model, period=4, noise_share=(0.0, 0.0), statistics="batch")
    draw = torch.Generator().manual_seed(0)
    for step in range(13):
        if step % 4 == 0:
            patterns = restated_patterns(model)[batch.y]
        progress = Progress(step=step, steps_per_epoch=5, epoch=step // 5, epochs=3)
        buffers = copy.deepcopy(dict(model.named_buffers()))
        found = attack(View(model), batch, entropy_of(batch), threat=BALL, progress=progress)
        delta = found.others["adv_start"] - batch.x
        ratio = (delta / patterns).flatten(1)
        assert torch.allclose(ratio, ratio[:, :1].sign().expand_as(ratio), rtol=0, atol=1e-6), step
        torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)
        assert all(parameter.grad is None for parameter in model.parameters())
        if step == 6:
            other = liet(model, period=4, noise_share=(0.0, 0.0), statistics="batch")
            other.load_state_dict(copy.deepcopy(attack.state_dict()))
            attack = other
        if step % 5 == 4:
            attack.after_epoch(progress)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        assert (restated_patterns(model)[batch.y] != patterns).any()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_starts_of_liet_are_brought_into_the_range_of_pixels(share: float) -> None:
    (model,), batch = networks(0), double_batch(30)
    x = ((batch.x - 0.5) * 3 + 0.5).clamp(0, 1)
    batch = batch._replace(x=x)
    attack = liet(model, noise_share=(share, share))
    found = attack(View(model), batch, entropy_of(batch), threat=BALL, progress=Progress())
    start = found.others["adv_start"]
    assert (start.min(), start.max()) == (0, 1)
    if share == 0.0:
        patterns = restated_patterns(model)[batch.y]
        up, down = ((x + sign * patterns).clamp(0, 1) for sign in (1, -1))
        close_to = [torch.isclose(start, side, rtol=0, atol=1e-8).flatten(1).all(1) for side in (up, down)]
        assert (close_to[0] | close_to[1]).all()
    gradient = slope(model.eval(), start, lambda f: entropy(f, batch.y))
    assert torch.allclose(found.x_adv, project(start + EPSILON * gradient.sign(), x), rtol=0, atol=1e-8)


@pytest.mark.parametrize("how", ["eval", "eval from the beginning", "another model"])
def test_patterns_are_not_made_from_another_model_nor_in_evaluation(how: str) -> None:
    case = StepCase(StartConsistency(), ClassStartFGSM(period=1))
    attack: Any = case.step.attack
    if how != "eval from the beginning":
        case.step.find(case.batch, case.objective, case.progress)
    kept = copy.deepcopy(attack.state_dict())
    attack.train(how == "another model")
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.neg_()
    other = networks(7)[0] if how == "another model" else None
    case.step.find(case.batch, case.objective, case.progress, model=other)
    torch.testing.assert_close(attack.state_dict(), kept, rtol=0, atol=0)


def test_a_step_of_liet_runs_start_then_adv_against_random_labels() -> None:
    case = StepCase(StartConsistency(strength=linear(0, 100)), ClassStartFGSM(), progress=Progress(step=1, epochs=4))
    x = case.batch.x
    recorder = Recorder(case.model)
    attack: Any = case.step.attack
    found = case.step.find(case.batch, case.objective, case.progress)
    start = next(images for images in recorder.inputs if len(images) == 12)
    assert torch.allclose(found.others["adv_start"], start, rtol=0, atol=1e-10)
    soft = random_labels(case.objective, case.batch, case.progress)
    climbed = climbed_labels(case.objective, case.batch, case.progress)
    gradient = slope(case.quiet, start, lambda f: -(climbed * f.log_softmax(1)).sum(1))
    x_adv = project(start + EPSILON * gradient.sign(), x)
    one, adv = train_forwards(case.copy, start, x_adv)
    p, q = one.softmax(1), adv.softmax(1)
    mean = (p + q) / 2
    apart = ((p * (p / mean).log()).sum(1) + (q * (q / mean).log()).sum(1)) / 2
    entropies = -(soft * adv.log_softmax(1)).sum(1)
    case.assert_step((entropies + 25.0 * apart).mean())
    assert attack.makes == ("adv_start",)
