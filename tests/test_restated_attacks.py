"""Attacks in closed form on linear models, and against a restatement in numpy on a small network."""

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from holdfast.attacks.fgsm import FGSM
from holdfast.attacks.pgd import PGD
from holdfast.data.images import Images
from holdfast.errors import HoldfastError
from holdfast.evaluation.accuracy import accuracies, robust_rows
from holdfast.forward import Attacked, Batch, View
from holdfast.functional import cross_entropy
from holdfast.schedule import Progress, piecewise
from holdfast.threat import L1, L2, Linf, ThreatModel

PIXELS = 6
SHAPE = (1, 2, 3)
Attack = PGD | FGSM
LINF_ATTACKS = [FGSM(), FGSM(random_start=True, step_size=0.25), PGD(), PGD(random_start=False), PGD(restarts=2)]


def linear(weight: np.ndarray, bias: np.ndarray | None = None) -> nn.Sequential:
    """Pixels to logits by one matrix in float64."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], weight.shape[0])).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.from_numpy(weight))
        model[1].bias.copy_(torch.zeros(weight.shape[0]) if bias is None else torch.from_numpy(bias))
    return model


def images(x: np.ndarray, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    """Rows of pixels as images."""
    return torch.from_numpy(x).reshape(len(x), *shape)


def flat(x: Tensor) -> np.ndarray:
    """Images as rows of pixels."""
    return x.flatten(1).numpy()


def search(
    attack: Attack,
    model: nn.Module,
    batch: Batch,
    threat: ThreatModel,
    progress: Progress | None = None,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> Attacked:
    """The attack on cross-entropy, unless another loss is given."""
    inner = loss or (lambda logits: cross_entropy(logits, batch.y))
    return attack(View(model), batch, inner, threat=threat, progress=progress or Progress())


def two_classes(seed: int, low: float, high: float) -> tuple[nn.Module, Batch, np.ndarray, np.ndarray]:
    """A linear model of two classes, a batch, and for every row the direction from its class to the other one."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((2, PIXELS))
    x = generator.uniform(low, high, (12, PIXELS))
    y = np.arange(12) % 2
    uphill = weight[1 - y] - weight[y]
    return linear(weight, generator.standard_normal(2)), Batch(images(x), torch.from_numpy(y)), x, uphill


@pytest.mark.parametrize("attack", LINF_ATTACKS)
@pytest.mark.parametrize(("low", "high"), [(0.4, 0.6), (0.0, 1.0)])
def test_linf_optimum_of_a_linear_model_with_and_without_active_bounds(attack: Attack, low: float, high: float) -> None:
    model, batch, x, uphill = two_classes(0, low, high)
    expected = np.clip(x + 0.1 * np.sign(uphill), 0, 1)
    assert (np.abs(expected - x - 0.1 * np.sign(uphill)).max() > 0.01) == (low == 0.0)
    found = search(attack, model, batch, Linf(0.1))
    assert flat(found.x_adv) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("attack", [FGSM(), PGD(random_start=False), PGD(steps=150), PGD(steps=4, random_start=False)])
def test_l2_optimum_of_a_linear_model(attack: Attack) -> None:
    model, batch, x, uphill = two_classes(1, 0.45, 0.55)
    expected = x + 0.3 * uphill / np.linalg.norm(uphill, axis=1, keepdims=True)
    assert ((expected > 0) & (expected < 1)).all()
    assert flat(search(attack, model, batch, L2(0.3)).x_adv) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", [Linf, L2])
def test_many_classes_along_one_direction(kind: type[ThreatModel]) -> None:
    generator = np.random.default_rng(2)
    axis, positions = generator.standard_normal(PIXELS), np.array([-2.0, -0.7, 0.1, 0.9, 2.5])
    model = linear(np.outer(positions, axis))
    x = generator.uniform(0.45, 0.55, (10, PIXELS))
    y = np.where(np.arange(10) % 2, 0, 4)  # the outermost classes: uphill is away from them for every softmax
    sign = np.where(y == 0, 1.0, -1.0)[:, None]
    best = np.sign(axis) if kind is Linf else axis / np.linalg.norm(axis)
    batch = Batch(images(x), torch.from_numpy(y))
    for attack in (FGSM(), PGD(random_start=False)):
        found = search(attack, model, batch, kind(0.15))
        assert flat(found.x_adv) == pytest.approx(x + 0.15 * sign * best, abs=1e-12)
    if kind is Linf:  # no corner of the box is better, and the loss is convex
        corners = images(np.array(list(itertools.product((-0.15, 0.15), repeat=PIXELS))))
        reached = cross_entropy(model(search(PGD(), model, batch, kind(0.15)).x_adv), batch.y)
        for row in range(10):
            losses = cross_entropy(model(batch.x[row] + corners), batch.y[row].expand(len(corners)))
            assert reached[row].item() == pytest.approx(losses.max().item(), rel=1e-12)


@pytest.mark.parametrize("target", range(4))
@pytest.mark.parametrize("attack", [FGSM(), PGD()])
def test_every_logit_difference_of_a_linear_model(attack: Attack, target: int) -> None:
    generator = np.random.default_rng(3)
    weight = generator.standard_normal((4, PIXELS))
    model, x = linear(weight), generator.uniform(0, 1, (8, PIXELS))
    y = (target + 1 + np.arange(8) % 3) % 4
    batch = Batch(images(x), torch.from_numpy(y))

    def difference(logits: Tensor) -> Tensor:
        """How far the target's logit is above that of the label."""
        return logits[:, target] - logits.gather(1, batch.y[:, None])[:, 0]

    found = flat(search(attack, model, batch, Linf(0.08), loss=difference).x_adv)
    assert found == pytest.approx(np.clip(x + 0.08 * np.sign(weight[target] - weight[y]), 0, 1), abs=1e-12)


def test_evaluation_certifies_a_linear_model_exactly() -> None:
    generator = np.random.default_rng(4)
    weight, bias = generator.standard_normal((2, PIXELS)), generator.standard_normal(2) * 0.1
    pixels = generator.integers(80, 175, (400, 1, 2, 3), dtype=np.uint8)
    y = generator.integers(0, 2, 400)
    model = linear(weight, bias).float()
    x = pixels.transpose(0, 3, 1, 2).reshape(400, PIXELS) / 255  # channels last on disk, first in the model
    scores = x @ weight.T + bias
    rows = np.arange(400)
    margins = scores[rows, y] - scores[rows, 1 - y]
    slack = 0.05 * np.abs(weight[1] - weight[0]).sum()
    assert np.abs(margins - slack).min() > 1e-6
    assert np.abs(margins).min() > 1e-6
    data = Images(torch.from_numpy(pixels), torch.from_numpy(y))
    model[0] = nn.Flatten()
    for attack in (PGD(), PGD(early_stop=0), PGD(restarts=2, early_stop=0), FGSM()):
        for batch_size in (400, 64):
            found = accuracies(model, data, threat=Linf(0.05), attack=attack, batch_size=batch_size)
            assert (found.n, found.clean, found.robust) == (400, (margins > 0).sum(), (margins > slack).sum())
    batch = Batch(torch.from_numpy(x).float().reshape(400, 3, 1, 2), torch.from_numpy(y))
    clean, robust = robust_rows(model, batch, PGD(), Linf(0.05))
    assert clean.tolist() == (margins > 0).tolist()
    assert robust.tolist() == (margins > slack).tolist()
    assert 20 < robust.sum() < clean.sum() - 20


class Network:
    """A network of one hidden layer with its gradient by hand, and the same network in torch."""

    def __init__(self, seed: int, hidden: int = 9, classes: int = 4, scale: float = 3.0) -> None:
        generator = np.random.default_rng(seed)
        self.w1 = scale * generator.standard_normal((hidden, PIXELS))
        self.b1 = -self.w1 @ np.full(PIXELS, 0.5) + 0.3 * generator.standard_normal(hidden)
        self.w2 = generator.standard_normal((classes, hidden))
        self.model = nn.Sequential(*linear(self.w1, self.b1), nn.Tanh(), nn.Linear(hidden, classes)).double()
        with torch.no_grad():
            self.model[3].weight.copy_(torch.from_numpy(self.w2))
            self.model[3].bias.zero_()

    def logits(self, x: np.ndarray) -> np.ndarray:
        """(B, K)."""
        return np.tanh(x @ self.w1.T + self.b1) @ self.w2.T

    def loss(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Cross-entropy of every row."""
        logits = self.logits(x)
        return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]

    def gradient(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Of the cross-entropy, by the chain rule."""
        hidden = np.tanh(x @ self.w1.T + self.b1)
        weights = np.exp(hidden @ self.w2.T)
        error = weights / weights.sum(1, keepdims=True)
        error[np.arange(len(y)), y] -= 1
        return ((error @ self.w2) * (1 - hidden**2)) @ self.w1

    def correct(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Which rows have their largest logit at the label."""
        return self.logits(x).argmax(1) == y


def restated_project(point: np.ndarray, x: np.ndarray, norm: str, epsilon: float) -> np.ndarray:
    """Into the ball, then into the pixel range."""
    delta = point - x
    if norm == "Linf":
        delta = np.clip(delta, -epsilon, epsilon)
    else:
        delta = delta * np.minimum(1, epsilon / np.maximum(np.linalg.norm(delta, axis=1, keepdims=True), 1e-300))
    return np.clip(x + delta, 0, 1)


def restated_iterates(
    network: Network,
    start: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    steps: int,
    size: float,
    norm: str,
    epsilon: float,
) -> list[np.ndarray]:
    """All points x^0 ... x^K of projected gradient ascent, the first of them given."""
    points = [start]
    for _ in range(steps):
        gradient = network.gradient(points[-1], y)
        uphill = np.sign(gradient) if norm == "Linf" else gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
        points.append(restated_project(points[-1] + size * uphill, x, norm, epsilon))
    return points


def problem(seed: int = 0, rows: int = 40, share_wrong: float = 0.1) -> tuple[Network, np.ndarray, np.ndarray, Batch]:
    """A network, rows of pixels from the whole range, and labels most of which it predicts."""
    generator = np.random.default_rng(seed)
    network = Network(seed)
    x = generator.uniform(0, 1, (rows, PIXELS))
    y = network.logits(x).argmax(1)
    wrong = generator.uniform(size=rows) < share_wrong
    y[wrong] = (y[wrong] + 1) % 4
    return network, x, y, Batch(images(x), torch.from_numpy(y), index=torch.arange(rows) * 3 + 1)


def test_an_image_that_is_wrong_clean_is_not_robust_wherever_the_search_ends() -> None:
    network, x, y, batch = problem(6, rows=300, share_wrong=0.5)
    clean, robust = robust_rows(network.model, batch, PGD(steps=0), Linf(0.5))
    assert clean.tolist() == network.correct(x, y).tolist()
    start = flat(search(PGD(steps=0), network.model, batch, Linf(0.5)).x_adv)
    assert (
        ~network.correct(x, y) & network.correct(start, y)
    ).sum() > 3  # many starts happen to be classified correctly
    assert not (robust & ~clean).any()
    assert 0 < robust.sum() < clean.sum()


@pytest.mark.parametrize(("norm", "epsilon"), [("Linf", 0.1), ("Linf", 0.5), ("L2", 0.2), ("L2", 0.9)])
@pytest.mark.parametrize("share", [None, 0.1, 0.6])
def test_pgd_iterate_for_iterate(norm: str, epsilon: float, share: float | None) -> None:
    network, x, y, batch = problem()
    threat = Linf(epsilon) if norm == "Linf" else L2(epsilon)
    size = epsilon / 4 if share is None else share * epsilon
    points = restated_iterates(network, x, x, y, 12, size, norm, epsilon)
    for steps, expected in enumerate(points):
        attack = PGD(steps=steps, step_size=None if share is None else size, random_start=False)
        found = search(attack, network.model, batch, threat)
        assert flat(found.x_adv) == pytest.approx(expected, abs=1e-9), steps
        survived = sum((network.correct(point, y).astype(int) for point in points[:steps]), np.zeros(len(y), int))
        assert found.steps_survived.tolist() == survived.tolist()
    assert (points[-1] == 0).any()
    assert (points[-1] == 1).any()


def test_paper_step_is_two_of_255() -> None:
    network, x, y, batch = problem()
    expected = restated_iterates(network, x, x, y, 1, 2 / 255, "Linf", 8 / 255)[1]
    found = search(PGD(steps=1, random_start=False), network.model, batch, Linf("8/255"))
    assert flat(found.x_adv) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("threat", "size"), [(Linf(0.1), None), (Linf(0.1), 0.125), (L2(0.3), None)])
def test_fgsm_is_one_step(threat: ThreatModel, size: float | None) -> None:
    network, x, y, batch = problem()
    alpha = threat.epsilon if size is None else size
    expected = restated_iterates(network, x, x, y, 1, alpha, threat.norm, threat.epsilon)[1]
    found = search(FGSM(step_size=size), network.model, batch, threat)
    assert flat(found.x_adv) == pytest.approx(expected, abs=1e-12)
    assert found.steps_survived.tolist() == network.correct(x, y).astype(int).tolist()


@pytest.mark.parametrize("threat", [Linf(0.2), L2(0.5)])
def test_pgd_from_its_random_start(threat: ThreatModel) -> None:
    network, x, y, batch = problem(1)
    start = flat(search(PGD(steps=0), network.model, batch, threat).x_adv)
    assert (np.abs(start - x).max(1) > 0.01).all()
    points = restated_iterates(network, start, x, y, 6, 0.05, threat.norm, threat.epsilon)
    for steps in (1, 3, 6):
        found = search(PGD(steps=steps, step_size=0.05), network.model, batch, threat)
        assert flat(found.x_adv) == pytest.approx(points[steps], abs=1e-9)
        survived = sum(network.correct(point, y).astype(int) for point in points[:steps])
        assert found.steps_survived.tolist() == survived.tolist()
    found = search(FGSM(step_size=0.05, random_start=True), network.model, batch, threat)
    assert flat(found.x_adv) == pytest.approx(points[1], abs=1e-9)


def test_scheduled_step_size() -> None:
    network, x, y, batch = problem()
    attack = PGD(steps=3, step_size=piecewise((0, 0.01), (0.5, 0.03)), random_start=False)
    for step, size in ((0, 0.01), (50, 0.03)):
        progress = Progress(step=step, epochs=100)
        found = search(attack, network.model, batch, Linf(0.1), progress)
        expected = restated_iterates(network, x, x, y, 3, size, "Linf", 0.1)[3]
        assert flat(found.x_adv) == pytest.approx(expected, abs=1e-12)


def stopped(points: list[np.ndarray], correct: list[np.ndarray], tau: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Row by row: where it ends, and at how many points that it took a step from it was still correct."""
    ends, survived = [], []
    for row in range(len(points[0])):
        last = len(points) - 1
        wrong = [t for t in range(last + 1) if not correct[t][row]]
        if tau is not None and len(wrong) > tau:  # from τ misclassified points it still steps, at the next it stops
            last = wrong[tau]
        ends.append(points[last][row])
        survived.append(sum(bool(correct[t][row]) for t in range(last)))
    return np.array(ends), np.array(survived)


@pytest.mark.parametrize("tau", [None, 0, 1, 2, 20])
@pytest.mark.parametrize(("norm", "epsilon", "size"), [("Linf", 0.12, 0.02), ("L2", 0.3, 0.05)])
def test_early_stop_row_by_row(tau: int | None, norm: str, epsilon: float, size: float) -> None:
    network, x, y, batch = problem(2, rows=120)
    threat = Linf(epsilon) if norm == "Linf" else L2(epsilon)
    points = restated_iterates(network, x, x, y, 8, size, norm, epsilon)
    correct = [network.correct(point, y) for point in points]
    ends, survived = stopped(points, correct, tau)
    first = [next((t for t in range(9) if not correct[t][row]), None) for row in range(120)]
    assert {0, 1, 2, 3, None} <= set(first)  # wrong at once, soon, later and never
    found = search(PGD(steps=8, step_size=size, random_start=False, early_stop=tau), network.model, batch, threat)
    assert flat(found.x_adv) == pytest.approx(ends, abs=1e-9)
    assert found.steps_survived.tolist() == survived.tolist()
    if tau in (0, 1, 2):
        assert np.abs(ends - points[-1]).max(1).astype(bool).sum() > 10


@pytest.mark.parametrize("statistics", ["eval", "batch"])  # without BatchNorm they are one
@pytest.mark.parametrize("tau", [None, 0, 1, 2, 3])
def test_early_stop_counts_rows_that_become_correct_again(
    tau: int | None, statistics: Literal["eval", "batch"]
) -> None:
    network, x, y, batch = problem(2, rows=120, share_wrong=0.5)
    points, size = [x], 0.03
    for _ in range(6):  # downhill: every row that is wrong at first is soon correct
        points.append(restated_project(points[-1] - size * np.sign(network.gradient(points[-1], y)), x, "Linf", 0.15))
    correct = [network.correct(point, y) for point in points]
    assert (~correct[0] & correct[1]).any()
    assert (~correct[1] & correct[2]).any()
    ends, survived = stopped(points, correct, tau)
    attack = PGD(steps=6, step_size=size, random_start=False, early_stop=tau, statistics=statistics)
    found = search(attack, network.model, batch, Linf(0.15), loss=lambda logits: -cross_entropy(logits, batch.y))
    assert flat(found.x_adv) == pytest.approx(ends, abs=1e-9)
    assert found.steps_survived.tolist() == survived.tolist()


@pytest.mark.parametrize("tau", [None, 0, 1, 2])
def test_the_split_into_batches_changes_nothing(tau: int | None) -> None:
    network, _, _, batch = problem(3, rows=60)
    attack = PGD(steps=6, early_stop=tau, restarts=2)
    whole = search(attack, network.model, batch, Linf(0.15))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    for size in (1, 7, 60):
        for rows in order.split(size):
            part = Batch(batch.x[rows], batch.y[rows], index=batch.index[rows])
            found = search(attack, network.model, part, Linf(0.15))
            assert torch.allclose(found.x_adv, whole.x_adv[rows], rtol=0, atol=1e-9)
            assert torch.equal(found.steps_survived, whole.steps_survived[rows])


class Recording(nn.Module):
    """Keeps every input that it was run on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """The wrapped network."""
        self.seen.append(x.detach().clone())
        return self.model(x)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("restarts", [2, 5])
def test_restarts_keep_the_last_point_with_the_larger_loss(steps: int, restarts: int) -> None:
    network, x, y, batch = problem(4)
    model = Recording(network.model)
    attack = PGD(steps=steps, step_size=0.03, restarts=restarts)
    found = search(attack, model, batch, Linf(0.3))
    assert len(model.seen) == restarts * (steps + 1)  # K forwards and one to choose, each restart
    ends = [flat(point) for point in model.seen[steps :: steps + 1]]
    for first, last in zip(model.seen[:: steps + 1], ends, strict=True):
        expected = restated_iterates(network, flat(first), x, y, steps, 0.03, "Linf", 0.3)[-1]
        assert last == pytest.approx(expected, abs=1e-9)
    losses = np.stack([network.loss(end, y) for end in ends])
    best = losses.argmax(0)
    assert len(set(best)) == restarts
    assert (np.abs(np.diff(np.stack(ends), axis=0)).max(2) > 1e-3).any()
    expected = np.stack(ends)[best, np.arange(len(y))]
    assert flat(found.x_adv) == pytest.approx(expected, abs=1e-12)
    if steps:
        starts = [flat(first) for first in model.seen[:: steps + 1]]
        survived = []
        for row, run in enumerate(best):
            points = restated_iterates(network, starts[run], x, y, steps, 0.03, "Linf", 0.3)[:steps]
            survived.append(sum(bool(network.correct(point, y)[row]) for point in points))
        assert found.steps_survived.tolist() == survived


def ends_of_restarts(steps: int, tau: int, averse: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What six restarts with early stop found, where each ended, which ends are misclassified, and their losses."""
    network, _, y, batch = problem(5, rows=2000, share_wrong=0.0)
    sign = -1.0 if averse else 1.0  # an averse loss is small exactly where the attack succeeds
    model = Recording(network.model)
    attack = PGD(steps=steps, step_size=0.01, restarts=6, early_stop=tau)
    found = search(attack, model, batch, Linf(0.1), loss=lambda logits: sign * cross_entropy(logits, batch.y))
    ends = np.stack([flat(point) for point in model.seen[steps :: steps + 1]])
    assert ends.shape == (6, 2000, PIXELS)
    broken = np.stack([~network.correct(end, y) for end in ends])
    losses = np.stack([sign * network.loss(end, y) for end in ends])
    assert (~broken[losses.argmax(0), np.arange(2000)] & broken.any(0)).any()  # the loss alone would choose worse
    return flat(found.x_adv), ends, broken, losses


@pytest.mark.parametrize("averse", [False, True])
@pytest.mark.parametrize("tau", [0, 1])
@pytest.mark.parametrize("steps", [0, 1])
def test_restarts_with_early_stop_keep_a_misclassified_end_where_there_is_one(
    steps: int, tau: int, averse: bool
) -> None:
    found, ends, broken, _ = ends_of_restarts(steps, tau, averse)
    chosen = np.abs(ends - found).max(2).argmin(0)
    assert np.abs(ends[chosen, np.arange(2000)] - found).max() < 1e-12
    assert broken[chosen, np.arange(2000)].tolist() == broken.any(0).tolist()


@pytest.mark.parametrize("averse", [False, True])
@pytest.mark.parametrize("tau", [0, 1])
@pytest.mark.parametrize("steps", [0, 1])
def test_restarts_with_early_stop_keep_the_larger_loss_among_equals(steps: int, tau: int, averse: bool) -> None:
    found, ends, broken, losses = ends_of_restarts(steps, tau, averse)
    best = np.where(broken, losses + 1e6, losses).argmax(0)
    assert found == pytest.approx(ends[best, np.arange(2000)], abs=1e-12)


@pytest.mark.parametrize("kind", [Linf, L2])
def test_the_random_start_is_uniform_in_the_ball(kind: type[ThreatModel]) -> None:
    rows, epsilon = 4000, 0.1
    x = torch.full((rows, *SHAPE), 0.5, dtype=torch.float64)
    batch = Batch(x, torch.zeros(rows, dtype=torch.long))
    model = linear(np.zeros((2, PIXELS)))
    delta = flat(search(PGD(steps=0), model, batch, kind(epsilon)).x_adv - x)
    size = np.abs(delta).max(1) if kind is Linf else np.linalg.norm(delta, axis=1)
    assert size.max() <= epsilon + 1e-12
    assert size.max() > 0.995 * epsilon
    second_moment = epsilon**2 / (3 if kind is Linf else PIXELS + 2)
    assert np.abs(delta.mean(0)).max() < 4.5 * math.sqrt(second_moment / rows)
    assert (delta**2).mean() == pytest.approx(second_moment, rel=0.04)
    if kind is Linf:
        counts, _ = np.histogram(delta, bins=20, range=(-epsilon, epsilon))
        expected = delta.size / 20
        assert counts.sum() == delta.size
        assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi squared, 19 degrees of freedom, 99.9 %


def test_the_random_start_is_keyed_by_image_epoch_and_seed() -> None:
    x = torch.full((20, *SHAPE), 0.5, dtype=torch.float64)
    y = torch.zeros(20, dtype=torch.long)
    index = torch.arange(20) * 17 + 3
    model = linear(np.zeros((2, PIXELS)))

    def start(progress: Progress, rows: Tensor | None = None) -> Tensor:
        """Starting points of the chosen rows, without a step."""
        rows = torch.arange(20) if rows is None else rows
        batch = Batch(x[rows], y[rows], index=index[rows])
        return search(PGD(steps=0), model, batch, Linf(0.1), progress).x_adv

    base = start(Progress(seed=3, epoch=2, epochs=5))
    assert torch.equal(start(Progress(seed=3, epoch=2, epochs=5)), base)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    assert torch.equal(start(Progress(seed=3, epoch=2, epochs=5), order), base[order])
    assert len(torch.unique(base.flatten(1), dim=0)) == 20
    assert len(torch.unique(base)) == base.numel()
    for other in (Progress(seed=4, epoch=2, epochs=5), Progress(seed=3, epoch=3, epochs=5)):
        assert not torch.isclose(start(other), base).any()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    start(Progress())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("attack", [FGSM(), PGD(steps=3, random_start=False)])
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3)])
def test_a_flat_loss_moves_nothing(attack: Attack, threat: ThreatModel) -> None:
    x = images(np.random.default_rng(6).uniform(0, 1, (5, PIXELS)))
    batch = Batch(x, torch.tensor([0, 1, 0, 1, 0]))
    found = search(attack, linear(np.zeros((2, PIXELS)), np.array([0.0, 1.0])), batch, threat)
    assert torch.equal(found.x_adv, x)
    steps = 1 if isinstance(attack, FGSM) else 3
    assert found.steps_survived.tolist() == [0, steps, 0, steps, 0]


@pytest.mark.parametrize("attack", [FGSM(), PGD(), PGD(early_stop=1, restarts=2)])
def test_an_attack_leaves_no_trace(attack: Attack) -> None:
    network, _, _, batch = problem()
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    pixels = batch.x.clone()
    found = search(attack, network.model, batch, Linf(0.1))
    assert not found.x_adv.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.model.state_dict().items())
    assert torch.equal(batch.x, pixels)


@pytest.mark.parametrize(
    ("build", "settings"),
    [(PGD, {"steps": -1}), (PGD, {"restarts": 0}), (PGD, {"early_stop": -1}), (PGD, {"statistics": "train"})]
    + [(kind, {"step_size": -0.1}) for kind in (PGD, FGSM)],
)
def test_settings_out_of_range_are_refused(build: type[Attack], settings: dict[str, Any]) -> None:
    with pytest.raises(HoldfastError):
        build(**settings)


@pytest.mark.parametrize("attack", [FGSM(), PGD()])
def test_l1_has_no_step(attack: Attack) -> None:
    network, _, _, batch = problem()
    with pytest.raises(HoldfastError, match="L1"):
        search(attack, network.model, batch, L1(1.0))
