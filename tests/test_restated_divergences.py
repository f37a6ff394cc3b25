"""Methods that compare two or three predictions of an image, in float64 against naive restatements, row by row.

Consistency regularisation of two views, squeeze training with its collaborative attack, decoupled KL with class means.
"""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import small_network
from holdfast.attacks.collaborative import CollaborativePGD
from holdfast.attacks.pgd import PGD
from holdfast.forward import Batch, View
from holdfast.functional import cross_entropy
from holdfast.objectives.consistency import Consistency
from holdfast.objectives.decoupled_kl import DecoupledKL
from holdfast.objectives.squeeze_training import SqueezeTraining
from holdfast.schedule import Progress, linear
from holdfast.threat import Linf
from holdfast.views.worst_weights import WorstWeights
from test_restated_comparisons import divergence
from test_restated_objectives import CLASSES, Rows, close, entropy_against, softmax
from test_restated_reweighting import (
    EPSILON,
    SIZE,
    Case,
    Named,
    Recorder,
    StepCase,
    ascend,
    double_batch,
    entropy,
    first_point,
    networks,
    prepared,
    project,
    softened,
    train_forwards,
)

# Consistency


def jensen_shannon(one: list[float], other: list[float]) -> float:
    """Half the divergences of both from their mean, whose logarithm is taken no lower than 1e-8."""
    mean = [(p + q) / 2 for p, q in zip(one, other, strict=True)]
    return sum(sum(p * math.log(p / max(m, 1e-8)) for p, m in zip(row, mean, strict=True)) for row in (one, other)) / 2


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("settings", "scale"), [({}, 1.5), ({"strength": 0.3, "temperature": 2.0}, 1.5), ({}, 5.0)])
def test_consistency_is_the_mean_entropy_of_both_views_and_their_divergence(
    settings: dict, scale: float, soft: bool
) -> None:
    case = Case("adv", "adv2", seed=1, soft=soft, scale=scale)
    strength, temperature = settings.get("strength", 1.0), settings.get("temperature", 0.5)

    def restate(rows: Named, still: Named) -> dict[str, list[float]]:
        pairs = list(zip(rows["adv"], rows["adv2"], strict=True))
        entropies = [
            (entropy_against(one, t) + entropy_against(other, t)) / 2
            for (one, other), t in zip(pairs, case.targets, strict=True)
        ]
        apart = [jensen_shannon(softened(a, temperature), softened(b, temperature)) for a, b in pairs]
        return {"adv_ce": entropies, "divergence": [strength * value for value in apart]}

    objective = Consistency(**settings)
    assert objective.sides(Progress()) == ("adv", "adv2")
    # The library keeps log p, too, from falling below that of 1e-8, which is worth less than 1e-8
    case.check(objective, restate, tolerance=1e-11 if scale < 5 else 1e-8)


def test_consistency_reads_its_strength_at_the_progress_and_is_finite_where_predictions_are_certain() -> None:
    case = Case("adv", "adv2", seed=2)
    at = [Progress(step=step, epochs=100) for step in (20, 80)]
    one, two = (case.terms(Consistency(strength=linear(0, 2)), progress)["divergence"] for progress in at)
    full = case.terms(Consistency(strength=1.0))["divergence"].detach()
    assert close(one, 0.4 * full)
    assert close(two, 1.6 * full)
    case = Case("adv", "adv2", seed=2, scale=500.0)
    terms = case.terms(Consistency())
    gradients = torch.autograd.grad(sum(terms.values()).sum(), list(case.logits.values()))
    assert all(torch.isfinite(value).all() for value in (*terms.values(), *gradients))
    assert terms["divergence"].max().item() == pytest.approx(math.log(2))


def test_a_step_of_consistency_attacks_each_view_around_itself() -> None:
    case = StepCase(Consistency(), PGD(steps=3, step_size=SIZE))
    x, y = case.batch.x, case.batch.y
    x2 = (x.flip(3) * 0.8 + 0.1).contiguous()
    case.batch = case.batch._replace(x2=x2)
    recorder = Recorder(case.model)
    found = case.step.find(case.batch, case.objective, case.progress)
    starts = recorder.inputs[0], recorder.inputs[3]
    assert torch.equal(starts[0], first_point(case.quiet, case.batch, case.progress))
    noise = starts[1] - x2
    assert noise.abs().max() <= EPSILON + 1e-12
    assert noise.abs().mean() > 0.3 * EPSILON
    assert not torch.isclose(noise, starts[0] - x).any(dim=(1, 2, 3)).all()  # drawn apart
    views = [ascend(lambda p: entropy(case.quiet(p), y), c, s, 3)[-1] for c, s in zip((x, x2), starts, strict=True)]
    assert torch.allclose(found.x_adv, views[0], rtol=0, atol=1e-10)
    assert torch.allclose(found.others["adv2"], views[1], rtol=0, atol=1e-10)
    one, other = train_forwards(case.copy, *views)
    p, q = (2 * one).softmax(1), (2 * other).softmax(1)
    mean = (p + q) / 2
    apart = ((p * (p / mean).log()).sum(1) + (q * (q / mean).log()).sum(1)) / 2
    case.assert_step((entropy(one, y) + entropy(other, y)).mean() / 2 + apart.mean())


def test_both_views_start_apart_even_where_they_are_one_image() -> None:
    case = StepCase(Consistency(), PGD(steps=0), rows=40)
    case.batch = case.batch._replace(x=torch.full_like(case.batch.x, 0.5), x2=torch.full_like(case.batch.x, 0.5))
    found = case.step.find(case.batch, case.objective, case.progress)
    pair = torch.stack([found.x_adv.flatten(), found.others["adv2"].flatten()])
    assert torch.corrcoef(pair)[0, 1].abs() < 4 / math.sqrt(pair.shape[1])
    assert ((pair - 0.5).abs().amax(1) > 0.99 * EPSILON).all()


# Squeeze training

ORDER = ("clean", "collaborative", "adv")


def roles(rows: Named, y: list[int]) -> list[tuple[str, str]]:
    """Which side gives y the least and which the most probability, the first in order among equals."""
    found = []
    for i, label in enumerate(y):
        own = {side: softmax(rows[side][i])[label] for side in ORDER}
        found.append((min(ORDER, key=own.__getitem__), max(ORDER, key=own.__getitem__)))
    return found


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("beta", [None, 0.7])
def test_squeeze_training_draws_the_two_extreme_predictions_together(beta: float | None, soft: bool) -> None:
    case = Case(*ORDER, seed=3, rows=16, soft=soft)

    def restate(rows: Named, still: Named) -> dict[str, list[float]]:
        squeezed = []
        for i, (low, high) in enumerate(roles(still, case.labels)):
            halves = divergence(still[high][i], rows[low][i]) + divergence(still[low][i], rows[high][i])
            squeezed.append((6.0 if beta is None else beta) * halves / 2)
        entropies = [entropy_against(row, t) for row, t in zip(rows["clean"], case.targets, strict=True)]
        return {"clean_ce": entropies, "squeeze": squeezed}

    plain = {side: case.logits[side].tolist() for side in ORDER}
    assert len(set(roles(plain, case.labels))) == 6
    objective = SqueezeTraining() if beta is None else SqueezeTraining(beta=beta)
    assert objective.sides(Progress()) == ("collaborative", "clean", "adv")
    assert tuple(objective.untracked_sides) == tuple(objective.needs_others) == ("collaborative",)
    case.check(objective, restate)


@pytest.mark.parametrize(
    ("own", "low", "high"),
    [
        ({"clean": 0.0, "collaborative": 0.0, "adv": 2.0}, "clean", "adv"),
        ({"clean": 0.0, "collaborative": 0.0, "adv": -2.0}, "adv", "clean"),
        ({"clean": 2.0, "collaborative": 0.0, "adv": 0.0}, "collaborative", "clean"),
        ({"clean": -2.0, "collaborative": 0.0, "adv": 0.0}, "clean", "collaborative"),
        ({"clean": 0.0, "collaborative": 2.0, "adv": 0.0}, "clean", "collaborative"),
    ],
)
def test_among_equals_clean_comes_first_then_collaborative(own: dict, low: str, high: str) -> None:
    case = Case(*ORDER, rows=1)
    case.y[0] = 0
    # Two classes share all probability, another one on every side, so that equal logits of y are equal exactly
    for k, side in enumerate(ORDER):
        row = torch.full((1, CLASSES), -700.0, dtype=torch.float64)
        row[0, 0], row[0, k + 1] = own[side], 0.0
        case.logits[side] = row.requires_grad_()
    term = case.terms(SqueezeTraining(beta=1.0))["squeeze"]
    gradients = torch.autograd.grad(term.sum(), list(case.logits.values()), allow_unused=True, materialize_grads=True)
    moved = {side for side, gradient in zip(ORDER, gradients, strict=True) if gradient.abs().max() > 0}
    assert moved == {low, high}


def restated_squeeze(
    model: nn.Module, x: Tensor, y: Tensor, col: Tensor, adv: Tensor, steps: int
) -> tuple[Tensor, Tensor, set[tuple[int, int]]]:
    """Each step: who is lowest, who highest, of x and both points; both climb their divergence and swap if need be."""
    seen: set[tuple[int, int]] = set()
    for _ in range(steps):
        leaves = [point.detach().clone().requires_grad_() for point in (x, col, adv)]
        logits = [model(leaf) for leaf in leaves]
        own = torch.stack([each.softmax(1)[range(len(y)), y] for each in logits]).tolist()
        columns = list(zip(*own, strict=True))
        low = [column.index(min(column)) for column in columns]
        high = [column.index(max(column)) for column in columns]
        seen |= set(zip(low, high, strict=True))
        total = torch.zeros((), dtype=torch.float64)
        for i, (a, b) in enumerate(zip(low, high, strict=True)):
            one, other = logits[a][i].log_softmax(0), logits[b][i].log_softmax(0)
            for still, moving in ((one.detach(), other), (other.detach(), one)):
                total = total + (still.exp() * (still - moving)).sum() / 2
        slopes = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        points = [leaf.detach() + SIZE * slope.sign() for leaf, slope in zip(leaves, slopes, strict=True)]
        adv = project(torch.stack([points[a][i] for i, a in enumerate(low)]), x)
        col = project(torch.stack([points[b][i] for i, b in enumerate(high)]), x)
    return col, adv, seen


def two_starts(recorder: Recorder, x: Tensor) -> tuple[Tensor, Tensor]:
    """The first two stacks of images that a search ran, other than x."""
    stacks = [part for images in recorder.inputs for part in images.split(len(x)) if not torch.equal(part, x)]
    return stacks[0], stacks[1]


@pytest.mark.parametrize("statistics", ["eval", "batch"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_collaborative_attack_step_by_step(steps: int, statistics: Any) -> None:
    (model,), batch = networks(0), double_batch(24)
    restated = copy.deepcopy(model).train(statistics == "batch")
    before = copy.deepcopy(model.state_dict())
    recorder = Recorder(model)
    attack = CollaborativePGD(steps=steps, step_size=SIZE, statistics=statistics)
    ignored = lambda logits: cross_entropy(logits, batch.y)  # noqa: E731
    progress = Progress(epoch=2, epochs=4, seed=3)
    found = attack(View(model), batch, ignored, threat=Linf(EPSILON), progress=progress)
    col, adv, seen = restated_squeeze(restated, batch.x, batch.y, *two_starts(recorder, batch.x), steps)
    assert torch.allclose(found.x_adv, adv, rtol=0, atol=1e-10)
    assert torch.allclose(found.others["collaborative"], col, rtol=0, atol=1e-10)
    if steps == 7:
        assert {(1, 2), (2, 1)} & seen  # no part for x
        assert {(0, 1), (0, 2), (1, 0), (2, 0)} & seen  # x itself is an extreme
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert "collaborative" in attack.makes


def test_collaborative_and_adversarial_points_leave_from_two_small_normal_draws() -> None:
    model = small_network(dtype=torch.float64)
    x = torch.full((200, 1, 8, 8), 0.5, dtype=torch.float64)
    batch = Batch(x, torch.arange(200) % CLASSES, index=torch.arange(200))
    recorder = Recorder(model)
    attack = CollaborativePGD(steps=1)
    attack(View(model), batch, lambda f: f.sum(1), threat=Linf(EPSILON), progress=Progress())
    starts = torch.stack([(start - x).flatten() for start in two_starts(recorder, x)])
    count = starts.shape[1]
    for start in starts:
        assert start.std().item() == pytest.approx(0.001, rel=4 / math.sqrt(2 * count))
        assert ((start / 0.001) ** 4).mean().item() == pytest.approx(3, rel=0.1)
    assert torch.corrcoef(starts)[0, 1].abs() < 4 / math.sqrt(count)


def test_the_collaborative_attack_moves_a_quarter_of_epsilon_and_both_points_climb() -> None:
    (model,), batch = networks(0), double_batch(24)
    model.eval()
    found = {}
    for steps, size in ((1, None), (1, EPSILON / 4), (10, None)):
        attack = CollaborativePGD(steps=steps, step_size=size)
        loss = lambda logits: cross_entropy(logits, batch.y)  # noqa: E731
        found[steps, size] = attack(View(model), batch, loss, threat=Linf(EPSILON), progress=Progress())
    assert torch.equal(found[1, None].x_adv, found[1, EPSILON / 4].x_adv)
    points = found[10, None].x_adv, found[10, None].others["collaborative"]
    for point in points:
        assert Linf(EPSILON).contains(point, batch.x).all()
    adv, col = (entropy(model(point), batch.y) for point in points)
    assert (adv - col > 0.01).float().mean() > 0.9


def test_a_step_of_squeeze_training_moves_no_statistics_on_the_collaborative_side() -> None:
    case = StepCase(SqueezeTraining(beta=3.0), CollaborativePGD(steps=3, step_size=SIZE))
    x, y = case.batch.x, case.batch.y
    recorder = Recorder(case.model)
    case.step.find(case.batch, case.objective, case.progress)
    col, adv, _ = restated_squeeze(case.quiet, x, y, *two_starts(recorder, x), 3)
    logits = train_forwards(case.copy, col, x, adv, untracked=(0,))
    logits = [logits[1], logits[0], logits[2]]
    own = torch.stack([each.softmax(1)[range(12), y] for each in logits])
    stacked = torch.stack(logits)
    low, high = stacked[own.argmin(0), range(12)], stacked[own.argmax(0), range(12)]
    halves = [
        (a.detach().softmax(1) * (a.detach().log_softmax(1) - b.log_softmax(1))).sum(1)
        for a, b in ((low, high), (high, low))
    ]
    case.assert_step((entropy(logits[0], y) + 3.0 * sum(halves) / 2).mean())


# Decoupled KL

UNIFORM = [1 / CLASSES] * CLASSES


def pair_distance(clean: list[float], adv: list[float], s: list[float]) -> float:
    """A quarter of the sum over all pairs of classes of s_j s_k ((n_j - n_k) - (a_j - a_k))²."""
    return sum(
        s[j] * s[k] * ((clean[j] - clean[k]) - (adv[j] - adv[k])) ** 2 / 4 for j in range(len(s)) for k in range(len(s))
    )


def soft_entropy(clean: list[float], adv: list[float]) -> float:
    """Minus the sum of p(x) log p(x')."""
    return entropy_against(adv, softmax(clean))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("settings", [{}, {"alpha": 0.8, "beta": 3.0}])
def test_decoupled_kl_before_any_class_mean_is_known(settings: dict, soft: bool) -> None:
    case = Case("adv", "clean", seed=5, soft=soft)
    objective = prepared(DecoupledKL(**settings))
    alpha, beta = settings.get("alpha", 4.0), settings.get("beta", 20.0)

    def restate(rows: Named, still: Named) -> dict[str, list[float]]:
        pairs = list(zip(rows["clean"], rows["adv"], strict=True))
        frozen = zip(still["clean"], rows["adv"], strict=True)
        return {
            "clean_ce": [entropy_against(row, t) for row, t in zip(rows["clean"], case.targets, strict=True)],
            "distance": [beta * pair_distance(clean, adv, UNIFORM) for clean, adv in pairs],
            "soft_ce": [alpha * soft_entropy(clean, adv) for clean, adv in frozen],
        }

    case.check(objective, restate)
    assert objective.sides(Progress()) == ("adv", "clean")
    assert objective.needs_random_start


@pytest.mark.parametrize("temperature", [4.0, 1.0])
def test_class_means_are_those_of_the_epoch_before_over_all_rows_of_a_class(temperature: float) -> None:
    objective = prepared(DecoupledKL(temperature=temperature, beta=1.0, attack_beta=1.0))
    means = [UNIFORM for _ in range(CLASSES)]
    model = nn.Flatten()
    for epoch in range(4):
        present = {0: (0, 1, 2, 3), 1: (0, 2, 4), 2: (1, 2), 3: (0, 1, 2, 3, 4)}[epoch]
        sums = {label: [0.0] * CLASSES for label in present}
        counts = dict.fromkeys(present, 0)
        for number in range(3):
            case = Case("adv", "clean", seed=10 * epoch + number, rows=8, soft=number == 2)
            case.y.copy_(torch.tensor(present)[torch.arange(8) % len(present)])
            clean, adv = case.logits["clean"].tolist(), case.logits["adv"].tolist()
            expected = [pair_distance(c, a, means[label]) for c, a, label in zip(clean, adv, case.labels, strict=True)]
            progress = Progress(epoch=epoch, step=3 * epoch + number, steps_per_epoch=3, epochs=4)
            assert close(case.terms(objective, progress)["distance"], expected, 1e-10)  # a search adds nothing
            assert close(case.terms(objective, progress, remember=True)["distance"], expected, 1e-10)
            images = case.logits["clean"].detach().view(8, 1, 1, CLASSES)
            loss = objective.inner_loss(View(model), case.batch._replace(x=images), progress)
            climbed = [e + soft_entropy(c, a) for e, c, a in zip(expected, clean, adv, strict=True)]
            assert close(loss(case.logits["adv"]), climbed, 1e-10)
            for row, label in zip(clean, case.labels, strict=True):
                counts[label] += 1
                sums[label] = [a + b for a, b in zip(sums[label], softened(row, temperature), strict=True)]
        objective.after_epoch(progress)
        for label in present:  # the others keep what they had
            means[label] = [value / counts[label] for value in sums[label]]
        if epoch == 1:
            other = prepared(DecoupledKL(temperature=temperature, beta=1.0, attack_beta=1.0))
            other.load_state_dict(copy.deepcopy(objective.state_dict()))
            objective = other
    assert close(objective.class_means, torch.tensor(means, dtype=torch.float64), 1e-10)


def test_means_are_checkpointed_in_the_middle_of_an_epoch() -> None:
    cases = [Case("adv", "clean", seed=seed, rows=20) for seed in (1, 2)]
    whole, first, second = (prepared(DecoupledKL()) for _ in range(3))
    for case in cases:
        case.terms(whole, remember=True)
    cases[0].terms(first, remember=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    cases[1].terms(second, remember=True)
    for objective in (whole, second):
        objective.after_epoch(Progress())
    assert close(cases[0].terms(second)["distance"], cases[0].terms(whole)["distance"].detach())


@pytest.mark.parametrize("attack_beta", [None, 1.0, 0.3])
def test_the_attack_of_decoupled_kl_has_its_own_weights(attack_beta: float | None) -> None:
    (model,), batch = networks(0), double_batch()
    model.eval()
    given = {} if attack_beta is None else {"attack_beta": attack_beta}
    objective = prepared(DecoupledKL(alpha=7.0, beta=11.0, **given))
    loss = objective.inner_loss(View(model), batch, Progress())
    with torch.no_grad():
        clean: Rows = model(batch.x).tolist()
    logits = torch.randn(12, CLASSES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = [
        soft_entropy(c, a) + (attack_beta or 0.0) * pair_distance(c, a, UNIFORM)
        for c, a in zip(clean, logits.tolist(), strict=True)
    ]
    assert close(loss(logits), expected, 1e-10)


@pytest.mark.parametrize("search", [False, True])
def test_a_step_of_decoupled_kl_runs_adv_then_clean_and_adds_to_the_means_once(search: bool) -> None:
    views = (WorstWeights(gamma=0.05, sides=("adv", "clean"), ascend="objective", steps=2),) if search else ()
    objective = DecoupledKL(attack_beta=1.0)
    case = StepCase(objective, PGD(steps=3, step_size=SIZE, random_start="normal"), views=views)
    x, y = case.batch.x, case.batch.y
    earlier = Case("adv", "clean", seed=30, rows=40)
    earlier.terms(objective, remember=True)
    objective.after_epoch(Progress())
    means = torch.zeros(CLASSES, CLASSES, dtype=torch.float64)
    for label in range(CLASSES):
        means[label] = (earlier.logits["clean"].detach()[earlier.y == label] / 4).softmax(1).mean(0)
    recorder = Recorder(case.model)
    if search:
        case.step(case.batch, case.progress)["loss"].backward()
        clean = recorder.logits[-1]
        assert torch.equal(recorder.inputs[-1], x)
    else:

        def apart(n: Tensor, a: Tensor) -> Tensor:
            s, gaps = means[y], n - a
            pairs = (gaps[:, :, None] - gaps[:, None, :]) ** 2
            return (s[:, :, None] * s[:, None, :] * pairs).sum((1, 2)) / 4

        def soft(n: Tensor, a: Tensor) -> Tensor:
            return -(n.detach().softmax(1) * a.log_softmax(1)).sum(1)

        before = case.quiet(x).detach()
        start = first_point(case.quiet, case.batch, case.progress, "normal")
        climbed = lambda p: soft(before, case.quiet(p)) + apart(before, case.quiet(p))  # noqa: E731
        x_adv = ascend(climbed, x, start, 3)[-1]
        adv, clean = train_forwards(case.copy, x_adv, x)
        case.assert_step((entropy(clean, y) + 20 * apart(clean, adv) + 4 * soft(clean, adv)).mean())
    objective.after_epoch(case.progress)
    for label in range(CLASSES):
        if (y == label).any():
            means[label] = (clean.detach()[y == label] / 4).softmax(1).mean(0)
    torch.testing.assert_close(objective.class_means, means, rtol=1e-10, atol=1e-12)
