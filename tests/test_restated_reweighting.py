"""Methods that weigh, stop, guide or soften, in float64 against naive restatements of their papers, row by row.

GAIRAT, FAT, LBGAT, the one-vs-the-rest loss, SGLR, distillation from two teachers, LOAT on MART.

A restatement takes the logits twice: `rows`, and `still`, the same numbers where the paper stops the gradient. Finite
differences move `rows` alone, so that a gradient on the wrong side, missing or doubled shows up.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import small_batch, small_network
from holdfast.attacks.pgd import PGD
from holdfast.forward import Attacked, Batch, Forward, Outputs, View
from holdfast.functional import cross_entropy
from holdfast.keyed_random import normal
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.objectives.base import Objective
from holdfast.objectives.boundary_guided import BoundaryGuided
from holdfast.objectives.distillation import Distillation
from holdfast.objectives.fisher_rao import FisherRaoMART
from holdfast.objectives.geometry_weighted import GeometryWeighted
from holdfast.objectives.label_refinement import LabelRefinement
from holdfast.objectives.one_vs_rest import OneVsRest
from holdfast.schedule import Progress, linear, piecewise
from holdfast.step import AdversarialStep
from holdfast.threat import Linf
from holdfast.views.worst_weights import WorstWeights
from parts import small_recipe
from test_restated_comparisons import divergence, restated_mart, squared_distance
from test_restated_objectives import CLASSES, Rows, close, entropy_against, one_hot, softmax

Named = dict[str, Rows]
Restate = Callable[[Named, Named], dict[str, list[float]]]
LOOSE = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
EPSILON, SIZE = 0.1, 0.04
HALF = Progress(epoch=50, step=50, epochs=100)


class Case:
    """Random logits for every side, labels, and the check of an objective against its restatement."""

    def __init__(self, *sides: str, seed: int = 0, rows: int = 7, soft: bool = False, scale: float = 1.5) -> None:
        draw = torch.Generator().manual_seed(seed)
        shape = (rows, CLASSES)
        self.logits = {
            side: (scale * torch.randn(shape, generator=draw, dtype=torch.float64)).requires_grad_() for side in sides
        }
        self.y = torch.randint(CLASSES, (rows,), generator=draw)
        mixed = torch.rand(shape, generator=draw, dtype=torch.float64)
        target = mixed / mixed.sum(1, keepdim=True) if soft else None
        images = torch.zeros(rows, 1, 2, 2, dtype=torch.float64)
        self.batch = Batch(images, self.y, target, torch.arange(rows) * 17 + 3)
        self.cotangent = torch.rand(rows, generator=draw, dtype=torch.float64) + 0.5
        self.attacked = Attacked(images, torch.zeros(rows, dtype=torch.long), 10)

    @property
    def labels(self) -> list[int]:
        """The hard labels."""
        return self.y.tolist()

    @property
    def targets(self) -> Rows:
        """What the cross-entropy is taken against."""
        return one_hot(self.labels) if self.batch.target is None else self.batch.target.tolist()

    def terms(self, objective: Objective, progress: Progress | None = None, *, remember: bool = False) -> dict:
        """The terms, where the objective is given the sides that it asks for and no others."""
        progress = progress or Progress()
        logits = {s: t.detach() if s in objective.detached_sides else t for s, t in self.logits.items()}
        outputs = {side: Outputs(logits[side], {}) for side in objective.sides(progress)}
        return dict(objective(Forward(self.batch, outputs, self.attacked, progress, remember)))

    def check(
        self,
        objective: Objective,
        restate: Restate,
        progress: Progress | None = None,
        *,
        mean: bool = False,
        tolerance: float = 1e-11,
    ) -> None:
        """Terms and their gradients with respect to the logits of every side equal those of the restatement.

        Row by row, or as means over the batch where only those are defined.
        """
        progress = progress or Progress()
        sides = objective.sides(progress)
        terms = self.terms(objective, progress)
        rows = {side: self.logits[side].tolist() for side in sides}
        expected = restate(rows, rows)
        assert set(terms) == set(expected)
        count = len(self.y)
        share = [1 / count] * count if mean else self.cotangent.tolist()

        leaves = [self.logits[side] for side in sides]
        slopes = {side: self.slopes(restate, rows, side, share) for side in sides}
        for name, term in terms.items():
            assert term.shape == (count,)
            if mean:
                assert close(term.mean(), torch.tensor(sum(expected[name]) / count, dtype=torch.float64), tolerance), (
                    name
                )
            else:
                assert close(term, expected[name], tolerance), name
            found = [torch.zeros_like(leaf) for leaf in leaves]
            if term.requires_grad:
                found = torch.autograd.grad((term * torch.tensor(share, dtype=torch.float64)).sum(), leaves, **LOOSE)
            for side, gradient in zip(sides, found, strict=True):
                assert close(gradient, slopes[side][name], 1e-7), (name, side)

    @staticmethod
    def slopes(restate: Restate, rows: Named, side: str, share: list[float], step: float = 1e-6) -> dict[str, Tensor]:
        """Central differences of every term, summed over the batch with these shares, along the logits of a side."""
        found = {name: torch.zeros(len(share), CLASSES, dtype=torch.float64) for name in restate(rows, rows)}
        for i in range(len(share)):
            for k in range(CLASSES):
                for sign in (1, -1):
                    moved = [list(row) for row in rows[side]]
                    moved[i][k] += sign * step
                    for name, values in restate({**rows, side: moved}, rows).items():
                        total = math.fsum(s * v for s, v in zip(share, values, strict=True))
                        found[name][i, k] += sign * total / (2 * step)
        return found


def networks(*seeds: int) -> list[nn.Module]:
    """Small networks with BatchNorm, in float64."""
    return [small_network(dtype=torch.float64, seed=seed) for seed in seeds]


def double_batch(rows: int = 12, seed: int = 1) -> Batch:
    """A small batch in float64."""
    return small_batch(rows=rows, dtype=torch.float64, seed=seed)


def train_forwards(model: nn.Module, *images: Tensor, untracked: Sequence[int] = ()) -> list[Tensor]:
    """Logits of training-mode forwards, in their order; those of the given numbers leave running statistics alone."""
    outputs = []
    for number, x in enumerate(images):
        kept = [buffer.clone() for buffer in model.buffers()]
        outputs.append(model.train()(x))
        if number in untracked:
            for buffer, value in zip(model.buffers(), kept, strict=True):
                buffer.data.copy_(value)
    return outputs


def ascend(loss: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, steps: int) -> list[Tensor]:
    """The iterates of signed ascent of a loss of images, each brought back into the Linf ball and to [0, 1]."""
    points = [start]
    for _ in range(steps):
        point = points[-1].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(point).sum(), point)
        points.append(project(points[-1] + SIZE * gradient.sign(), x))
    return points


def project(x_adv: Tensor, x: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Every pixel within epsilon of the clean one, and in [0, 1]."""
    return torch.minimum(torch.maximum(x_adv, x - epsilon), x + epsilon).clamp(0, 1).detach()


def entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Minus the log of the probability of y, (B,)."""
    return -torch.stack([row.softmax(0)[label].log() for row, label in zip(logits, y, strict=True)])


def first_point(model: nn.Module, batch: Batch, progress: Progress, start: Any = True) -> Tensor:
    """The library's own draw of where PGD begins."""
    attack = PGD(steps=0, random_start=start)
    ignored = lambda logits: logits.sum(1)  # noqa: E731
    return attack(View(model), batch, ignored, threat=Linf(EPSILON), progress=progress).x_adv


class Recorder:
    """Keeps inputs, outputs and mode of every forward of a network."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.modes: list[bool] = []
        model.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.inputs.append(args[0].detach().clone())
        self.logits.append(output.detach().clone())
        self.modes.append(module.training)


class StepCase:
    """A step of a method beside an untouched copy of its networks, on which the method is written out."""

    def __init__(
        self,
        objective: Objective,
        attack: Any = None,
        *,
        progress: Progress | None = None,
        further: Mapping[str, nn.Module] | None = None,
        rows: int = 12,
        **settings: Any,
    ) -> None:
        self.model = networks(0)[0]
        with torch.no_grad():  # running statistics that are not the batch's
            for _ in range(3):
                self.model(double_batch(32, seed=9).x)
        self.further = dict(further or {})
        self.copy, self.copies = copy.deepcopy(self.model), copy.deepcopy(self.further)
        self.quiet = copy.deepcopy(self.model).eval()  # what an attack in evaluation mode sees
        self.batch = double_batch(rows)
        self.progress = progress or Progress(epochs=2)
        self.objective = objective
        objective.prepare(self.model, self.batch.x[:2], 300)
        objective.double()
        attack = attack or PGD(steps=3, step_size=SIZE)
        if isinstance(attack, nn.Module):
            attack.prepare(self.model, self.batch.x[:2], 300)
            attack.double()
        settings = {"threat": Linf(EPSILON), "attack": attack, "networks": self.further, **settings}
        self.step = AdversarialStep(small_recipe(objective, **settings), self.model, precision="fp64")

    def assert_step(self, loss: Tensor) -> None:
        """One step gives this loss and its gradients, and moves running statistics as the copies' forwards did."""
        loss.backward()
        rng = torch.get_rng_state()
        before = copy.deepcopy(dict(self.model.named_parameters()))
        found = self.step(self.batch, self.progress)["loss"]
        assert torch.equal(torch.get_rng_state(), rng)
        torch.testing.assert_close(found.detach(), loss.detach(), rtol=1e-10, atol=1e-10)
        found.backward()
        torch.testing.assert_close(dict(self.model.named_parameters()), before, rtol=0, atol=0)
        for own, other in ((self.model, self.copy), *((self.further[n], self.copies[n]) for n in self.further)):
            for (name, one), (_, two) in zip(own.named_parameters(), other.named_parameters(), strict=True):
                assert (one.grad is None) == (two.grad is None), name
                if one.grad is not None:
                    torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(dict(own.named_buffers()), dict(other.named_buffers()), rtol=1e-10, atol=1e-12)


# GAIRAT


def restated_geometry(kappa: list[int], steps: int, shift: float) -> list[float]:
    """(1 + tanh(Λ + 5 (1 - 2 κ / K))) / 2, normalised to a mean of 1 over the batch."""
    raw = [(1 + math.tanh(shift + 5 * (1 - 2 * k / steps))) / 2 for k in kappa]
    return [w * len(raw) / sum(raw) for w in raw]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("steps", "shift"), [(10, None), (10, 0.7), (7, None), (2, -2.0)])
def test_gairat_weighs_by_how_many_iterates_were_right(steps: int, shift: float | None, soft: bool) -> None:
    case = Case("adv", seed=1, rows=9, soft=soft)
    kappa = [0, steps, 1, steps - 1, steps // 2, steps, 2, 0, 1]
    case.attacked = Attacked(case.batch.x, torch.tensor(kappa), steps)
    objective = GeometryWeighted() if shift is None else GeometryWeighted(shift=shift)
    weights = restated_geometry(kappa, steps, -1.0 if shift is None else shift)
    assert max(weights) / min(weights) > 2
    assert sum(weights) == pytest.approx(9)

    def restate(rows: Named, still: Named) -> dict[str, list[float]]:
        entropies = [entropy_against(row, t) for row, t in zip(rows["adv"], case.targets, strict=True)]
        return {"weighted_ce": [w * e for w, e in zip(weights, entropies, strict=True)]}

    case.check(objective, restate, HALF)
    assert objective.sides(HALF) == ("adv",)
    assert objective.couples_batch


def test_gairat_weighs_all_alike_before_it_begins_and_where_all_survive_as_long() -> None:
    case = Case("adv", seed=2)
    plain = [entropy_against(row, t) for row, t in zip(case.logits["adv"].tolist(), case.targets, strict=True)]
    case.attacked = Attacked(case.batch.x, torch.tensor([0, 1, 2, 3, 4, 5, 10]), 10)
    for begin, step, weighted in ((0.5, 49, False), (0.5, 50, True), (0.2, 19, False), (0.2, 20, True), (0.0, 0, True)):
        objective = GeometryWeighted() if begin == 0.5 else GeometryWeighted(begin=begin)
        terms = case.terms(objective, Progress(step=step, epochs=100))
        found = torch.stack(list(terms.values())).sum(0)
        assert close(found, plain) != weighted
    for kappa in (0, 7, 10):
        case.attacked = Attacked(case.batch.x, torch.full((7,), kappa), 10)
        assert close(case.terms(GeometryWeighted(), HALF)["weighted_ce"], plain, 1e-10)


def test_gairat_reads_its_shift_at_the_progress() -> None:
    case = Case("adv", seed=3)
    kappa = [0, 1, 2, 3, 4, 5, 10]
    case.attacked = Attacked(case.batch.x, torch.tensor(kappa), 10)
    plain = [entropy_against(row, t) for row, t in zip(case.logits["adv"].tolist(), case.targets, strict=True)]
    objective = GeometryWeighted(shift=linear(0, -2), begin=0.1)
    for step in (10, 75):
        weights = restated_geometry(kappa, 10, -2 * step / 100)
        expected = [w * e for w, e in zip(weights, plain, strict=True)]
        assert close(case.terms(objective, Progress(step=step, epochs=100))["weighted_ce"], expected, 1e-11)


def test_a_step_of_gairat_counts_the_iterates_that_were_right_before_each_step() -> None:
    case = StepCase(GeometryWeighted(), PGD(steps=4, step_size=SIZE), progress=Progress(epoch=1, step=1, epochs=2))
    with torch.no_grad():
        right = case.quiet(case.batch.x).argmax(1)
    case.batch = case.batch._replace(y=torch.where(torch.arange(12) % 4 == 0, case.batch.y, right))
    x, y = case.batch.x, case.batch.y
    start = first_point(case.model, case.batch, case.progress)
    points = ascend(lambda point: entropy(case.quiet(point), y), x, start, 4)
    kappa = sum((case.quiet(point).argmax(1) == y).long() for point in points[:4]).tolist()
    assert {0, 4} < set(kappa)  # and something between
    (adv,) = train_forwards(case.copy, points[4])
    weights = torch.tensor(restated_geometry(kappa, 4, -1.0), dtype=torch.float64)
    case.assert_step((weights * entropy(adv, y)).mean())


# FAT


def restated_friendly(
    model: nn.Module, batch: Batch, start: Tensor, *, steps: int, tau: int, omega: float, progress: Progress, signs: Any
) -> tuple[Tensor, list[int], int]:
    """Image by image: look, stop where the wrong points are used up, else step, with noise, and project.

    Returns where the images end, how many points each had computed, and how many turned right again after being wrong
    and went on.
    """
    ends, rounds, again = [], [], 0
    key = progress.key("attack start").fold(0)
    noise = [normal(key.fold("step noise", t), batch.rows, (1, 8, 8), dtype=torch.float64) for t in range(steps)]
    for row in range(len(batch.y)):
        x, label, point, left, seen = batch.x[row], int(batch.y[row]), start[row], tau, []
        for t in range(steps):
            leaf = point.detach().requires_grad_()
            logits = model(leaf[None])
            (gradient,) = torch.autograd.grad(signs[row] * entropy(logits, torch.tensor([label])).sum(), leaf)
            seen.append(int(logits.argmax()) == label)
            if not seen[-1]:
                if left == 0:
                    break
                left -= 1
            moved = point + SIZE * gradient.sign() + omega * noise[t][row]
            point = project(moved, x, 0.3)
        again += any(a > b for a, b in zip(seen[1:], seen[:-1], strict=True))
        ends.append(point)
        rounds.append(len(seen))
    return torch.stack(ends), rounds, again


@pytest.mark.parametrize("statistics", ["eval", "batch"])  # one thing without BatchNorm, but one runs only some rows
@pytest.mark.parametrize("tau", [0, 1, 2, 3])
def test_fat_stops_every_image_when_its_wrong_points_are_used_up(tau: int, statistics: Any) -> None:
    model = small_network(norm=False, dtype=torch.float64).eval()
    batch = double_batch(60)
    with torch.no_grad():
        batch = batch._replace(y=torch.where(torch.arange(60) % 3 == 0, batch.y, model(batch.x).argmax(1)))
    progress = Progress(epoch=3, step=7, epochs=9, seed=5)
    signs = torch.where(torch.arange(60) % 2 == 0, 1.0, -1.0).double()
    start = PGD(steps=0)(View(model), batch, lambda f: f.sum(1), threat=Linf(0.3), progress=progress).x_adv
    expected, rounds, again = restated_friendly(
        model, batch, start, steps=7, tau=tau, omega=0.15, progress=progress, signs=signs
    )
    assert again > 1 or tau == 0
    attack = PGD(steps=7, step_size=SIZE, early_stop=tau, step_noise=0.15, statistics=statistics)
    recorder = Recorder(model)
    loss = lambda logits: signs * cross_entropy(logits, batch.y)  # noqa: E731
    found = attack(View(model), batch, loss, threat=Linf(0.3), progress=progress)
    assert torch.allclose(found.x_adv, expected, rtol=0, atol=1e-10)
    assert len({*rounds}) > 2
    if statistics == "eval":  # a row is run for as long as it is looked at, and no longer
        assert sum(len(each) for each in recorder.inputs) == sum(rounds)


def test_fat_takes_its_patience_and_its_noise_from_schedules() -> None:
    model, batch = small_network(norm=False, dtype=torch.float64).eval(), double_batch(40)

    def ends(progress: Progress, **settings: Any) -> Tensor:
        attack = PGD(steps=5, step_size=SIZE, **settings)
        loss = lambda logits: cross_entropy(logits, batch.y)  # noqa: E731
        return attack(View(model), batch, loss, threat=Linf(EPSILON), progress=progress).x_adv

    patience, noise = piecewise((0, 0), (0.42, 1), (0.75, 2)), piecewise((0, 0.001), (0.5, 0.03))
    for step, tau, omega in ((0, 0, 0.001), (41, 0, 0.001), (42, 1, 0.001), (60, 1, 0.03), (75, 2, 0.03)):
        progress = Progress(step=step, epochs=100)
        found = ends(progress, early_stop=patience, step_noise=noise)
        assert torch.equal(found, ends(progress, early_stop=tau, step_noise=omega))
    assert not torch.equal(ends(Progress(), early_stop=0), ends(Progress(), early_stop=1))


def test_the_noise_of_fat_is_normal_and_fresh_at_every_step_of_images_that_still_move() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False)).double()
    nn.init.zeros_(flat[1].weight)  # no gradient, and every image is told to be of class 0
    rows = 400
    batch = Batch(torch.full((rows, 1, 8, 8), 0.5).double(), torch.arange(rows) % 2, index=torch.arange(rows) * 3)
    moves = {}
    for steps in (1, 4):
        attack = PGD(steps=steps, step_size=0.05, early_stop=0, step_noise=0.001, random_start=False)
        loss = lambda logits: cross_entropy(logits, batch.y)  # noqa: E731
        moves[steps] = attack(View(flat), batch, loss, threat=Linf(EPSILON)).x_adv - batch.x
        assert (moves[steps][1::2] == 0).all()
    one, four = moves[1][::2].flatten(), moves[4][::2].flatten()
    count = len(one)
    assert abs(one.mean().item()) < 4 * 0.001 / math.sqrt(count)
    assert one.std().item() == pytest.approx(0.001, rel=4 / math.sqrt(2 * count))
    assert ((one / 0.001) ** 4).mean().item() == pytest.approx(3, rel=0.15)
    assert four.std().item() == pytest.approx(0.002, rel=4 / math.sqrt(2 * count))
    assert torch.corrcoef(torch.stack([one, four - one]))[0, 1].abs() < 4 / math.sqrt(count)
    attack = PGD(steps=3, step_size=0.0, step_noise=0.5, random_start=False)
    far = attack(View(flat), batch, lambda f: cross_entropy(f, batch.y), threat=Linf(EPSILON)).x_adv - batch.x
    assert far.abs().max() <= EPSILON + 1e-12


def test_a_step_of_fat_trains_on_the_friendly_images_in_the_order_of_the_batch() -> None:
    attack = PGD(steps=5, step_size=SIZE, early_stop=1, step_noise=0.001)
    case = StepCase(AdversarialTraining(), attack, threat=Linf(0.3))
    start = PGD(steps=0)(View(case.quiet), case.batch, lambda f: f.sum(1), threat=Linf(0.3), progress=case.progress)
    friendly, rounds, _ = restated_friendly(
        case.quiet,
        case.batch,
        start.x_adv,
        steps=5,
        tau=1,
        omega=0.001,
        progress=case.progress,
        signs=torch.ones(12).double(),
    )
    assert len({*rounds}) > 1
    (adv,) = train_forwards(case.copy, friendly)
    case.assert_step(entropy(adv, case.batch.y).mean())


# LBGAT


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_lbgat_pulls_adversarial_logits_to_those_of_the_guide_and_both_learn(beta: float, soft: bool) -> None:
    case = Case("adv", "clean", "guide", seed=5, soft=soft)

    def restate(rows: Named, still: Named) -> dict[str, list[float]]:
        pairs = list(zip(rows["adv"], rows["guide"], strict=True))
        terms = {
            "boundary": [squared_distance(adv, guide) / CLASSES for adv, guide in pairs],
            "guide_ce": [entropy_against(g, t) for g, t in zip(rows["guide"], case.targets, strict=True)],
        }
        if beta:
            both = zip(rows["clean"], rows["adv"], strict=True)
            terms["kl"] = [beta * divergence(clean, adv) for clean, adv in both]
        return terms

    objective = BoundaryGuided(beta=beta)
    assert objective.sides(Progress()) == (("adv", "clean", "guide") if beta else ("adv", "guide"))
    assert objective.needs_networks == ("guide",)
    assert objective.needs_random_start
    case.check(objective, restate)
    assert BoundaryGuided().sides(Progress()) == ("adv", "guide")


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_the_attack_of_lbgat_climbs_the_divergence_of_the_student_whatever_beta(beta: float) -> None:
    (model,), batch = networks(0), double_batch()
    for name, net in (("eval", model.eval()), ("batch", copy.deepcopy(model).train())):
        loss = BoundaryGuided(beta=beta).inner_loss(View(model, statistics=name), batch, Progress())
        with torch.no_grad():
            clean = net(batch.x).tolist()
        logits = torch.randn(12, CLASSES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        expected = [divergence(c, a) for c, a in zip(clean, logits.tolist(), strict=True)]
        assert close(loss(logits), expected, 1e-10)


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_a_step_of_lbgat_runs_student_adv_student_clean_and_the_guide_on_clean_images(beta: float) -> None:
    attack = PGD(steps=3, step_size=SIZE, random_start="normal")
    (guide,) = networks(4)
    case = StepCase(BoundaryGuided(beta=beta), attack, further={"guide": guide})
    x, y = case.batch.x, case.batch.y
    recorder = Recorder(guide)
    start = first_point(case.model, case.batch, case.progress, "normal")
    with torch.no_grad():
        before = case.quiet(x).softmax(1)

    def apart(point: Tensor) -> Tensor:
        return (before * (before.log() - case.quiet(point).log_softmax(1))).sum(1)

    x_adv = ascend(apart, x, start, 3)[-1]
    adv, *clean = train_forwards(case.copy, x_adv, *([x] if beta else []))
    (taught,) = train_forwards(case.copies["guide"], x)
    loss = ((adv - taught) ** 2).mean() + entropy(taught, y).mean()
    if beta:
        p = clean[0].softmax(1)
        loss = loss + beta * (p * (p.log() - adv.log_softmax(1))).sum(1).mean()
    case.assert_step(loss)
    assert recorder.modes == [True]  # in training mode, once, on x: the attack never asks it
    assert torch.equal(recorder.inputs[0], x)
    assert guide[0].weight.grad.abs().max() > 0
    (optimizer,) = case.step.optimizers()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in (*case.model.parameters(), *guide.parameters())}


# One versus the rest


def softplus(value: float) -> float:
    """log(1 + e^v)."""
    return math.log(1 + math.exp(value))


@pytest.mark.parametrize(
    ("rows", "share", "strength", "count"),
    [(10, None, None, 4), (10, 0.7, 2.0, 7), (10, 0.0, 0.5, 0), (10, 1.0, 0.3, 10), (100, 0.29, 0.5, 29)],
)
def test_the_smallest_margins_get_the_one_versus_the_rest_loss(
    rows: int, share: float | None, strength: float | None, count: int
) -> None:
    case = Case("adv", seed=6, rows=rows)
    given = {"share": share, "strength": strength}
    objective = OneVsRest(**{name: value for name, value in given.items() if value is not None})
    weight = 0.5 if strength is None else strength

    def restate(logits: Named, still: Named) -> dict[str, list[float]]:
        margins = [
            row[label] - max(value for k, value in enumerate(row) if k != label)
            for row, label in zip(still["adv"], case.labels, strict=True)
        ]
        chosen = sorted(range(rows), key=lambda i: margins[i])[:count]
        entropies = [entropy_against(row, t) for row, t in zip(logits["adv"], case.targets, strict=True)]
        apart = [
            softplus(-row[label]) + sum(softplus(value) for k, value in enumerate(row) if k != label)
            for row, label in zip(logits["adv"], case.labels, strict=True)
        ]
        return {
            "adv_ce": [0.0 if i in chosen else e for i, e in enumerate(entropies)],
            "one_vs_rest": [weight * v if i in chosen else 0.0 for i, v in enumerate(apart)],
        }

    if rows == 10:
        case.check(objective, restate)
    else:
        terms, logits = case.terms(objective), {"adv": case.logits["adv"].tolist()}
        expected = [sum(both) for both in zip(*restate(logits, logits).values(), strict=True)]
        assert close(sum(terms.values()), expected, 1e-11)
    assert objective.sides(Progress()) == ("adv",)
    assert objective.couples_batch


def test_a_step_of_the_one_versus_the_rest_loss_attacks_the_entropy() -> None:
    case = StepCase(OneVsRest(share=0.5, strength=0.8), threat=Linf(EPSILON))
    x, y = case.batch.x, case.batch.y
    start = first_point(case.model, case.batch, case.progress)
    x_adv = ascend(lambda point: entropy(case.quiet(point), y), x, start, 3)[-1]
    (adv,) = train_forwards(case.copy, x_adv)
    own = torch.nn.functional.one_hot(y, CLASSES).bool()
    margins = adv[own] - adv.masked_fill(own, -math.inf).amax(1)
    low = torch.zeros(12, dtype=torch.bool).scatter(0, margins.argsort()[:6], True)
    apart = torch.where(own, (1 + (-adv).exp()).log(), (1 + adv.exp()).log()).sum(1)
    case.assert_step(torch.where(low, 0.8 * apart, entropy(adv, y)).mean())


# SGLR


def refined_rows(old: Rows, clean: Rows, adv: Rows, momentum: float = 0.9, share: float = 0.2) -> Rows:
    """m sl + (1 - m) (r p(x) + (1 - r) p(x'))."""
    return [
        [
            momentum * s + (1 - momentum) * (share * p + (1 - share) * q)
            for s, p, q in zip(before, softmax(c), softmax(a), strict=True)
        ]
        for before, c, a in zip(old, clean, adv, strict=True)
    ]


def prepared(objective: Objective, images: int = 300) -> Any:
    """The objective with memories for so many images, in float64."""
    objective.prepare(small_network(), torch.zeros(2, 1, 8, 8), images)
    return objective.double()


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.6, "clean_share": 0.5}])
def test_refined_labels_start_at_the_hard_ones_and_no_gradient_flows_into_them(settings: dict) -> None:
    case = Case("adv", "clean", seed=7)
    objective = prepared(LabelRefinement(**settings))
    momentum, share = settings.get("momentum", 0.9), settings.get("clean_share", 0.2)

    def restate(rows: Named, still: Named) -> dict[str, list[float]]:
        soft = refined_rows(one_hot(case.labels), still["clean"], still["adv"], momentum, share)
        return {"refined_ce": [entropy_against(row, t) for row, t in zip(rows["adv"], soft, strict=True)]}

    case.check(objective, restate, HALF)
    assert objective.sides(HALF) == ("adv", "clean")
    assert "clean" in objective.detached_sides
    assert not objective.takes_mixed_images


def test_before_it_begins_sglr_is_the_plain_entropy_and_runs_no_clean_images() -> None:
    case = Case("adv", "clean", seed=8)
    objective = prepared(LabelRefinement())
    for step in (0, 44):
        progress = Progress(step=step, epochs=100)
        assert objective.sides(progress) == ("adv",)
        before = copy.deepcopy(objective.state_dict())
        terms = case.terms(objective, progress, remember=True)
        plain = [entropy_against(row, t) for row, t in zip(case.logits["adv"].tolist(), case.targets, strict=True)]
        assert close(sum(terms.values()), plain, 1e-11)
        torch.testing.assert_close(objective.state_dict(), before, rtol=0, atol=0)
    assert objective.sides(Progress(step=45, epochs=100)) == ("adv", "clean")


def test_the_labels_of_every_image_are_refined_once_a_step_over_steps_and_epochs() -> None:
    objective = prepared(LabelRefinement())
    draw = torch.Generator().manual_seed(0)
    images = list(range(0, 300, 13))
    labels = {image: image % CLASSES for image in images}
    memory = {image: one_hot([labels[image]])[0] for image in images}
    for epoch in range(8):
        order = torch.randperm(len(images), generator=draw).tolist()[: 21 if epoch % 2 else 23]  # some are left out
        for number in range(0, len(order), 6):
            chosen = [images[i] for i in order[number : number + 6]]
            step = 4 * epoch + number // 6
            progress = Progress(epoch=epoch, step=step, steps_per_epoch=4, epochs=8)
            case = Case("adv", "clean", seed=100 + step, rows=len(chosen))
            y = torch.tensor([labels[image] for image in chosen])
            case.batch = case.batch._replace(y=y, index=torch.tensor(chosen))
            clean, adv = case.logits["clean"].tolist(), case.logits["adv"].tolist()
            targets = one_hot(y.tolist())
            if progress.fraction >= 0.45:
                targets = refined_rows([memory[image] for image in chosen], clean, adv)
            expected = [entropy_against(row, t) for row, t in zip(adv, targets, strict=True)]
            for _ in range(2):  # a weight search looks, and writes nothing
                assert close(sum(case.terms(objective, progress).values()), expected, 1e-11)
            assert close(sum(case.terms(objective, progress, remember=True).values()), expected, 1e-11)
            if progress.fraction >= 0.45:
                memory.update(zip(chosen, targets, strict=True))
        objective.after_epoch(progress)
        if epoch == 5:  # a run that goes on from its checkpoint
            other = prepared(LabelRefinement())
            other.load_state_dict(copy.deepcopy(objective.state_dict()))
            objective = other
    assert all(sum(row) == pytest.approx(1) for row in memory.values())
    assert len([row for row in memory.values() if 0.6 < max(row) < 0.97]) > 15


@pytest.mark.parametrize("search", [False, True])
def test_a_step_of_sglr_runs_adv_then_clean_without_gradient_and_writes_once(search: bool) -> None:
    views = (WorstWeights(gamma=0.05, sides=("adv", "clean"), ascend="objective", steps=3),) if search else ()
    objective = LabelRefinement(begin=0.5)
    case = StepCase(objective, views=views, progress=Progress(epoch=1, step=1, epochs=2))
    x, y = case.batch.x, case.batch.y
    recorder = Recorder(case.model)
    if search:
        case.step(case.batch, case.progress)["loss"].backward()
        adv, clean = recorder.logits[-2:]
        assert torch.equal(recorder.inputs[-1], x)
    else:
        start = first_point(case.quiet, case.batch, case.progress)
        x_adv = ascend(lambda point: entropy(case.quiet(point), y), x, start, 3)[-1]
        adv, clean = train_forwards(case.copy, x_adv, x)
    rows = refined_rows(one_hot(y.tolist()), clean.tolist(), adv.tolist())
    soft = torch.tensor(rows, dtype=torch.float64)
    if not search:
        case.assert_step(-(soft * adv.log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(objective.memory[case.batch.index], soft, rtol=1e-10, atol=1e-12)
    seen = torch.zeros(300, dtype=torch.bool).index_fill(0, case.batch.index, True)
    assert torch.equal(objective.started, seen)


# Distillation from two teachers

TEACHERS = ("standard_teacher", "robust_teacher")


def softened(row: list[float], temperature: float) -> list[float]:
    """softmax(f / T)."""
    return softmax([value / temperature for value in row])


def softened_divergence(teacher: list[float], student: list[float], temperature: float) -> float:
    """T² KL(softmax(t / T) || softmax(s / T)); the public code leaves out the teacher's entropy, a constant."""
    pairs = zip(softened(teacher, temperature), softened(student, temperature), strict=True)
    return temperature**2 * sum(t * math.log(t / s) for t, s in pairs)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("settings", [{}, {"standard": 0.25, "robust": 0.5, "temperature": 3.0}])
def test_distillation_shares_the_loss_between_the_label_and_two_teachers(settings: dict, soft: bool) -> None:
    case = Case("adv", *TEACHERS, seed=9, soft=soft)
    shares = settings.get("standard", 0.1), settings.get("robust", 0.6)
    temperature = settings.get("temperature", 2.0)

    def restate(rows: Named, still: Named) -> dict[str, list[float]]:
        terms = {
            "adv_ce": [
                (1 - sum(shares)) * entropy_against(r, t) for r, t in zip(rows["adv"], case.targets, strict=True)
            ]
        }
        for name, share in zip(TEACHERS, shares, strict=True):
            pairs = zip(still[name], rows["adv"], strict=True)
            terms[name] = [share * softened_divergence(teacher, student, temperature) for teacher, student in pairs]
        return terms

    objective = Distillation(**settings)
    assert objective.sides(Progress()) == ("adv", *TEACHERS)
    assert tuple(objective.detached_sides) == tuple(objective.needs_networks) == TEACHERS
    case.check(objective, restate)


def test_teachers_see_the_adversarial_images_in_evaluation_mode_and_stand_still() -> None:
    teachers = dict(zip(TEACHERS, networks(4, 5), strict=True))
    for teacher in teachers.values():
        teacher.requires_grad_(False)
    case = StepCase(Distillation(), further=teachers)
    x, y = case.batch.x, case.batch.y
    recorders = {name: Recorder(teacher) for name, teacher in teachers.items()}
    start = first_point(case.model, case.batch, case.progress)
    x_adv = ascend(lambda point: entropy(case.quiet(point), y), x, start, 3)[-1]
    (adv,) = train_forwards(case.copy, x_adv)
    loss = 0.3 * entropy(adv, y).mean()
    for name, share in zip(TEACHERS, (0.1, 0.6), strict=True):
        with torch.no_grad():
            p = (case.copies[name].eval()(x_adv) / 2).softmax(1)
        loss = loss + share * 4 * (p * (p.log() - (adv / 2).log_softmax(1))).sum(1).mean()
    case.assert_step(loss)
    for recorder in recorders.values():
        assert recorder.modes == [False]
        assert torch.allclose(recorder.inputs[0], x_adv, rtol=0, atol=1e-10)
    held = {id(p) for group in case.step.optimizers()[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in case.model.parameters()}


# LOAT on MART


def restated_loat(
    rows: Named, y: list[int], settings: dict[str, float], window: str, distance: str
) -> dict[str, list[float]]:
    """MART's terms, and the two of LOAT, each as B equal numbers whose mean is the term."""
    theta, gamma, count = settings["strength"], settings["pairing"], len(y)
    terms = restated_mart(rows, y, one_hot(y), settings["beta"])
    right = [max(range(CLASSES), key=row.__getitem__) == label for row, label in zip(rows["clean"], y, strict=True)]

    def spread(row: list[float], label: int) -> float:
        p = softmax(row)
        others = [value for k, value in enumerate(p) if k != label]
        if distance == "kl":
            return -math.log(1 - max(others))
        return sum((value - (1 - p[label]) / (CLASSES - 1)) ** 2 for value in others)

    def change(clean: list[float], adv: list[float]) -> float:
        p, q = softmax(clean), softmax(adv)
        if distance == "kl":
            j = max(range(CLASSES), key=q.__getitem__)
            return -math.log(1 - abs(q[j] - p[j]))
        return squared_distance(q, p)

    def mean_over(values: list[float], of: bool) -> float:
        chosen = [value for value, correct in zip(values, right, strict=True) if correct == of]
        return sum(chosen) / len(chosen) if chosen else 0.0

    if window == "middle":
        return terms
    sign = 1 if window == "early" else -1
    spreads = [spread(row, label) for row, label in zip(rows["clean"], y, strict=True)]
    changes = [change(c, a) for c, a in zip(rows["clean"], rows["adv"], strict=True)]
    terms["spread"] = [theta * sign * (mean_over(spreads, True) - mean_over(spreads, False))] * count
    if gamma:
        terms["pairing"] = [gamma * mean_over(changes, window == "late")] * count
    return terms


WINDOWS = [(0, "early"), (9, "early"), (10, "middle"), (500, "middle"), (989, "middle"), (990, "late"), (1099, "late")]
PAPER = {"beta": 6.0, "strength": 0.1, "pairing": 0.05}


def loat_case(right: Sequence[int], seed: int = 10) -> Case:
    """A case in which exactly these clean rows are told right."""
    case = Case("clean", "adv", seed=seed)
    with torch.no_grad():
        for row, label in enumerate(case.labels):
            best = case.logits["clean"][row].max()
            case.logits["clean"][row, label] = best + (0.8 if row in right else -1.3)
    assert (case.logits["clean"].argmax(1) == case.y).nonzero()[:, 0].tolist() == list(right)
    return case


@pytest.mark.parametrize("distance", ["mse", "kl"])
@pytest.mark.parametrize(("step", "window"), WINDOWS)
def test_loat_acts_in_the_first_and_the_last_epochs_alone(step: int, window: str, distance: str) -> None:
    case = loat_case((0, 2, 3, 6))
    progress = Progress(epoch=step // 10, step=step, steps_per_epoch=10, epochs=110)
    objective = FisherRaoMART(distance=distance) if distance == "kl" else FisherRaoMART()
    assert objective.sides(progress) == ("clean", "adv")
    case.check(
        objective, lambda rows, still: restated_loat(rows, case.labels, PAPER, window, distance), progress, mean=True
    )


@pytest.mark.parametrize("distance", ["mse", "kl"])
@pytest.mark.parametrize("step", [0, 99])
@pytest.mark.parametrize("right", [(), (0, 1, 2, 3, 4, 5, 6), (5,)])
def test_loat_with_none_right_or_none_wrong(right: Sequence[int], step: int, distance: str) -> None:
    case = loat_case(right)
    settings = {"beta": 2.0, "strength": 0.7, "pairing": 0.4}
    objective = FisherRaoMART(**settings, distance=distance, early=0.1, late=0.8)
    window = "early" if step == 0 else "late"
    progress = Progress(step=step, epochs=100)
    case.check(
        objective, lambda rows, still: restated_loat(rows, case.labels, settings, window, distance), progress, mean=True
    )


def test_loat_without_pairing() -> None:
    case = loat_case((0, 4))
    settings = {**PAPER, "pairing": 0.0}
    objective = FisherRaoMART(pairing=0.0)
    assert objective.couples_batch
    assert not objective.takes_mixed_images
    terms = case.terms(objective)
    rows = {side: case.logits[side].tolist() for side in ("clean", "adv")}
    expected = restated_loat(rows, case.labels, settings, "early", "mse")
    total = sum(sum(values) for values in expected.values()) / 7
    assert sum(terms.values()).mean().item() == pytest.approx(total, rel=1e-11)


@pytest.mark.parametrize("distance", ["mse", "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loat_stays_finite_where_predictions_are_certain(distance: str, dtype: torch.dtype) -> None:
    case = loat_case((0, 4))
    sure = (200.0 * case.logits["clean"].detach()).to(dtype)
    case.logits = {"clean": sure.clone().requires_grad_(), "adv": sure.roll(1, 1).requires_grad_()}
    for step in (0, 99):
        terms = case.terms(FisherRaoMART(distance=distance), Progress(step=step, epochs=100))
        total = sum(terms.values()).sum()
        gradients = torch.autograd.grad(total, list(case.logits.values()))
        assert torch.isfinite(total)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_step_of_loat_attacks_the_entropy_and_runs_clean_then_adv() -> None:
    case = StepCase(FisherRaoMART(), PGD(steps=3, step_size=SIZE, random_start="normal"))
    x, y = case.batch.x, case.batch.y
    start = first_point(case.model, case.batch, case.progress, "normal")
    x_adv = ascend(lambda point: entropy(case.quiet(point), y), x, start, 3)[-1]
    clean, adv = train_forwards(case.copy, x, x_adv)
    p, q = clean.softmax(1), adv.softmax(1)
    own = torch.nn.functional.one_hot(y, CLASSES).bool()
    boosted = entropy(adv, y) - (1.0001 - q.masked_fill(own, 0.0).amax(1) + 1e-12).log()
    weighted = (p * (p.log() - q.log())).sum(1) * (1.0000001 - p[own])
    right = clean.argmax(1) == y
    assert 0 < right.sum() < 12
    spread = ((p - (1 - p[own])[:, None] / (CLASSES - 1)) ** 2).masked_fill(own, 0.0).sum(1)
    pairing = ((q - p) ** 2).sum(1)[~right].mean()
    regular = 0.1 * (spread[right].mean() - spread[~right].mean()) + 0.05 * pairing
    case.assert_step((boosted + 6 * weighted).mean() + regular)
