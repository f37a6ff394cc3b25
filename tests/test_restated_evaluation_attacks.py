"""APGD, PGD and MIM as loops over single images in float64, written from the papers.

What is random, the start, is taken from the library and its law is tested; the rest of every path is restated. The
facts that the papers leave open (the first step of APGD, what a checkpoint compares) are those of fra31/auto-attack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from holdfast.attacks.apgd import APGD
from holdfast.attacks.apgd_l1 import APGDL1
from holdfast.attacks.iterative import IterativeGradient
from holdfast.attacks.mim import MIM
from holdfast.attacks.multi_targeted import MultiTargeted
from holdfast.attacks.stepwise import StepwiseAttack
from holdfast.keyed_random import Key
from holdfast.threat import L1, L2, Linf, ThreatModel, build_threat
from test_attacks_on_linear_models import rows_for, rows_of, search

Array = np.ndarray[Any, Any]
Oracle = Callable[[Array], tuple[float, Array]]
Path = Iterator[Array]
SHAPES = [(1, 4, 6), (3, 5, 3), (3, 4, 6)]


class Wave(nn.Module):
    """A smooth activation with many peaks: no corner of a ball stays the best for long."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def network(shape: tuple[int, int, int], classes: int, *, seed: int = 0, scale: float = 6.0) -> nn.Module:
    """A small network without kinks, at which rounding would choose the side."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Flatten(), nn.Linear(math.prod(shape), 14), Wave(), nn.Linear(14, 10), nn.Tanh()]
        model = nn.Sequential(*layers, nn.Linear(10, classes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= scale
    return model


def photographs(shape: tuple[int, int, int], *, count: int = 4, seed: int = 1, edge: float = 0.1) -> Tensor:
    """Random images with some pixels at the bounds."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, *shape, generator=generator, dtype=torch.float64) * (1 + 2 * edge) - edge
    return x.clamp(0, 1)


def restated_loss(name: str, z: Tensor, y: int, target: int) -> Tensor:
    """One row's loss from its logits."""
    order = sorted(range(len(z)), key=lambda k: -z[k].item())
    other = order[0] if order[0] != y else order[1]
    if name == "ce":
        return z.exp().sum().log() - z[y]
    if name == "dlr":
        return -(z[y] - z[other]) / (z[order[0]] - z[order[2]] + 1e-12)
    if name == "targeted_dlr":
        return -(z[y] - z[target]) / (z[order[0]] - 0.5 * (z[order[2]] + z[order[3]]) + 1e-12)
    return z[other] - z[y] if name == "margin" else z[target] - z[y]


def oracle(model: nn.Module, name: str, y: int, target: int, shape: tuple[int, ...]) -> Oracle:
    """Loss and gradient at one point, as plain numbers."""

    def ask(point: Array) -> tuple[float, Array]:
        x = torch.from_numpy(point.copy()).reshape(1, *shape).requires_grad_()
        loss = restated_loss(name, model(x)[0], y, target)
        (gradient,) = torch.autograd.grad(loss, x)
        return loss.item(), gradient.reshape(-1).numpy()

    return ask


def into_ball(point: Array, x: Array, threat: ThreatModel) -> Array:
    """Into the ball first, into [0, 1] last."""
    delta = point - x
    if threat.norm == "Linf":
        delta = np.array([min(max(d, -threat.epsilon), threat.epsilon) for d in delta])
    elif threat.norm == "L2":
        length = math.sqrt(sum(d * d for d in delta))
        delta = delta * min(1.0, threat.epsilon / length) if length > 0 else delta
    else:
        return nearest_in_l1(point, x, threat.epsilon)
    return np.array([min(max(v, 0.0), 1.0) for v in x + delta])


class Undecided(Exception):
    """Rounding decides which entries differ from the image."""


def nearest_in_l1(point: Array, x: Array, epsilon: float) -> Array:
    """The nearest point of the L1 ball and the box: the Lagrange multiplier by walking through all kinks."""
    delta = point - x
    room = [min(abs(d), 1 - a if d > 0 else a) for d, a in zip(delta, x, strict=True)]
    if sum(room) <= epsilon:
        lam = 0.0
    else:

        def spent(lam: float) -> float:
            return sum(min(max(abs(d) - lam, 0.0), r) for d, r in zip(delta, room, strict=True))

        kinks = sorted({0.0, *(abs(d) for d in delta), *(abs(d) - r for d, r in zip(delta, room, strict=True))})
        high = next(k for k in kinks if spent(k) <= epsilon)
        low = max(k for k in kinks if k < high)
        lam = low + (spent(low) - epsilon) / (spent(low) - spent(high)) * (high - low)
    if any(abs(abs(d) - lam) < 1e-12 for d in delta if d != 0):
        raise Undecided
    return x + np.array([math.copysign(min(max(abs(d) - lam, 0), r), d) for d, r in zip(delta, room, strict=True)])


def direction(gradient: Array, norm: str) -> Array:
    """Where a step leads."""
    return np.sign(gradient) if norm == "Linf" else gradient / math.sqrt(sum(g * g for g in gradient))


def undecided(gradient: Array, loss: float, *others: float) -> bool:
    """Rounding decides what comes next: a flat loss, or one that equals another to the last digits."""
    return abs(gradient).max() < 1e-9 or any(abs(loss - other) < 1e-11 * max(1, abs(loss)) for other in others)


def restated_apgd(ask: Oracle, x: Array, start: Array, threat: ThreatModel, steps: int, rho: float) -> Path:
    """Algorithm 1 of arXiv:2003.01690; every point it visits."""
    window, shortest = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1)
    size = 2 * threat.epsilon
    loss, gradient = ask(start)
    best, best_gradient, best_loss, best_before = start, gradient, loss, loss
    losses, kept, since = [0.0], False, 0  # the reference compares the first step's loss with zero
    point, previous = start, start
    yield point
    for k in range(steps):
        share = 1.0 if k == 0 else 0.75
        z = into_ball(point + size * direction(gradient, threat.norm), x, threat)
        following = into_ball(point + share * (z - point) + (1 - share) * (point - previous), x, threat)
        previous, point = point, following
        yield point
        loss, gradient = ask(point)
        if undecided(gradient, loss, best_loss, losses[-1]):
            return
        losses.append(loss)
        if loss > best_loss:
            best, best_gradient, best_loss = point, gradient, loss
        since += 1
        if since == window:
            growths = sum(losses[-i] > losses[-i - 1] for i in range(1, window + 1))
            halve = growths <= rho * window or (kept and best_before >= best_loss)
            if halve:
                size, point, gradient = size / 2, best, best_gradient
            kept, best_before, since = not halve, best_loss, 0
            window = max(window - max(int(0.03 * steps), 1), shortest)


def restated_l1_stage(
    ask: Oracle, x: Array, start: Array, epsilon: float, steps: int, first: bool
) -> Generator[Array, None, Array | None]:
    """One radius of APGD in L1: every point, and the best of them. `first`: it begins at noise, with a fifth."""
    count, size, since = len(x), epsilon, 0
    yield start
    point = best = start
    best_loss, best_gradient = ask(start)
    gradient = best_gradient
    changed = int((start - x != 0).sum())
    share, before = (0.2, count) if first else (changed / count / 1.5, changed)
    for _ in range(steps):
        ascending = sorted(abs(gradient))
        threshold = ascending[min(max(int((1 - share) * count), 0), count - 1)]
        chosen = np.array([math.copysign(1.0, g) if abs(g) >= threshold and g != 0 else 0.0 for g in gradient])
        try:
            point = nearest_in_l1(point + size * chosen / (abs(chosen).sum() + 1e-10), x, epsilon)
        except Undecided:
            return None
        yield point
        loss, gradient = ask(point)
        if undecided(gradient, loss, best_loss):
            return None
        if loss > best_loss:
            best, best_loss, best_gradient = point, loss, gradient
        since += 1
        if since == max(int(0.04 * steps), 1):
            now = int((best - x != 0).sum())
            sparser = now / before < 0.95
            size = epsilon if sparser else min(max(size / 1.5, epsilon / 10), epsilon)
            if sparser:
                point, gradient = best, best_gradient
            share, before, since = now / count / 1.5, now, 0
    return best


def restated_apgd_l1(ask: Oracle, x: Array, start: Array, epsilon: float, steps: int, large: bool) -> Path:
    """Section 3.3 of arXiv:2103.01208: three radii, each begun at the best point of the one before."""
    long = math.ceil(0.3 * steps)
    stages = ((3.0, long), (2.0, long), (1.0, steps - 2 * long)) if large else ((1.0, steps),)
    begin: Array | None = start
    for factor, length in stages:
        if begin is None:
            return
        begin = nearest_in_l1(begin, x, factor * epsilon)
        begin = yield from restated_l1_stage(ask, x, begin, factor * epsilon, length, first=not large)


def restated_momentum(
    ask: Oracle, x: Array, start: Array, threat: ThreatModel, steps: int, size: float, momentum: float | None
) -> Path:
    """PGD, or with a momentum the iterative method of arXiv:1710.06081, equations 6 and 7."""
    point, velocity = start, np.zeros_like(x)
    yield point
    for _ in range(steps):
        gradient = ask(point)[1]
        if momentum is not None:
            velocity = momentum * velocity + gradient / sum(abs(gradient))
        step = direction(gradient if momentum is None else velocity, threat.norm)
        point = into_ball(point + size * step, x, threat)
        yield point


def assert_restated(
    attack: StepwiseAttack,
    threat: ThreatModel,
    restate: Callable[[Oracle, Array, Array], Path],
    *,
    loss: str,
    seed: int = 0,
    wrong: bool = False,
    least: float = 1.0,
) -> None:
    """Every visited point of every row agrees with the restatement, as far as rounding has no say.

    Args:
        attack: What is restated.
        threat: Its ball.
        restate: The restatement of one row, from its loss, its image and its start.
        loss: The name of its loss.
        seed: Of network and images.
        wrong: The label is the least likely class: no point is met where the third logit, which DLR divides by, is y's.
        least: The share of all points that must be comparable.
    """
    shape = SHAPES[seed % len(SHAPES)]
    model, x = network(shape, 7, seed=seed), photographs(shape, seed=seed + 1)
    rows = rows_for(attack, model, x, model(x).argmin(1) if wrong else model(x).argmax(1))
    visits = search(attack, model, rows, threat)
    compared = 0
    for row in range(len(rows.y)):
        ask = oracle(model, loss, int(rows.y[row]), int(rows.target[row]), shape)
        path = list(restate(ask, rows.x[row].reshape(-1).numpy(), visits[0].point[row].reshape(-1).numpy()))
        assert len(path) <= len(visits)
        compared += len(path)
        for ours, visit in zip(path, visits, strict=False):
            assert abs(ours - visit.point[row].reshape(-1).numpy()).max() < 1e-8
    assert compared >= least * len(visits) * len(rows.y)


@pytest.mark.parametrize(
    ("attack", "threat", "wrong", "least"),
    [
        (APGD(), Linf(24 / 255), False, 0.7),
        (APGD(), L2(0.5), False, 0.8),
        (APGD(steps=37, rho=0.5), Linf(0.4), False, 0.8),
        (APGD(steps=37, rho=0.5), L2(0.5), True, 0.8),
        (APGD(steps=70, objective="dlr"), Linf(24 / 255), True, 0.8),
        (APGD(steps=70, objective="dlr"), L2(0.5), True, 0.8),
        (APGD(steps=70, objective="dlr"), L2(0.1), False, 0.6),
        (APGD(steps=9, objective="dlr", rho=0.3), Linf(0.1), True, 0.8),
        (APGD(steps=9, objective="dlr", rho=0.3), L2(0.1), False, 0.7),
        (APGD(steps=50, objective="targeted_dlr", targets=3), Linf(0.4), False, 0.8),
        (APGD(steps=50, objective="targeted_dlr", targets=3), L2(0.5), False, 0.8),
    ],
)
def test_apgd(attack: APGD, threat: ThreatModel, wrong: bool, least: float) -> None:
    for seed in (0, 1):
        assert_restated(
            attack,
            threat,
            lambda ask, x, start: restated_apgd(ask, x, start, threat, attack.steps, attack.rho),
            loss=attack.objective,
            seed=seed,
            wrong=wrong,
            least=least,
        )


@pytest.mark.parametrize(
    ("attack", "epsilon", "wrong", "least"),
    [
        (APGDL1(), "3/1", False, 0.8),
        (APGDL1(large_radii=False), "3/1", True, 0.6),
        (APGDL1(steps=37, objective="dlr"), "1/1", True, 0.8),
        (APGDL1(steps=60, objective="dlr", large_radii=False), "1/1", True, 0.6),
        (APGDL1(steps=20, objective="targeted_dlr", targets=2), "3/1", False, 0.8),
    ],
)
def test_apgd_in_l1(attack: APGDL1, epsilon: str, wrong: bool, least: float) -> None:
    threat = build_threat("L1", epsilon)
    assert_restated(
        attack,
        threat,
        lambda ask, x, start: restated_apgd_l1(ask, x, start, threat.epsilon, attack.steps, attack.large_radii),
        loss=attack.objective,
        seed=2,
        wrong=wrong,
        least=least,
    )


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.7)])
@pytest.mark.parametrize(
    ("attack", "size"),
    [
        (IterativeGradient(steps=12), 1 / 4),
        (IterativeGradient(steps=1, random_start=False), 1.0),
        (IterativeGradient(steps=12, step_size=0.05, objective="margin"), None),
        (IterativeGradient(steps=12, random_start=False, objective="dlr"), 1 / 4),
        (IterativeGradient(steps=8, objective="difference", targets=3), 1 / 4),
        (MultiTargeted(steps=12, targets=3), 1 / 4),
        (MIM(), 1 / 10),
        (MIM(momentum=0.4, steps=7, objective="dlr"), 1 / 7),
        (MIM(steps=7, step_size="1/20", random_start=True), None),
    ],
)
def test_pgd_mim_and_multi_targeted(attack: IterativeGradient, size: float | None, threat: ThreatModel) -> None:
    length = 0.05 if size is None else size * threat.epsilon
    momentum = attack.momentum if isinstance(attack, MIM) else None
    assert_restated(
        attack,
        threat,
        lambda ask, x, start: restated_momentum(ask, x, start, threat, attack.steps, length, momentum),
        loss=attack.objective,
        seed=6,
        wrong=attack.objective == "dlr",
    )


def test_the_settings_of_the_papers() -> None:
    apgd, mim, many = APGD(), MIM(), MultiTargeted()
    assert (apgd.steps, apgd.objective, apgd.rho, apgd.restarts, apgd.average) == (100, "ce", 0.75, 1, 1)
    assert (mim.steps, mim.momentum, mim.random_start) == (10, 1.0, False)
    assert (many.steps, many.targets, many.objective, many.random_start) == (200, 9, "difference", True)
    assert APGDL1().large_radii


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.4)])
def test_the_start_of_apgd_touches_the_sphere(threat: ThreatModel) -> None:
    x = torch.full((400, 1, 4, 6), 0.5, dtype=torch.float64)
    rows = rows_of(x, torch.zeros(400, dtype=torch.int64))
    delta = APGD().start(rows, threat, Key(3))["point"] - x
    assert (threat.length(delta) - threat.epsilon).abs().max() < 1e-9
    assert delta.flatten(1).sign().mean(0).abs().max() < 0.2
    share = (delta.flatten(1) / threat.epsilon).abs()
    if threat.norm == "Linf":  # uniform before it is stretched: the greatest of 24 is 24/25 on average
        assert (share < 1 - 1e-9).sum(1).eq(23).all()
        assert share.mean().item() == pytest.approx(0.52, abs=0.01)
        assert (share < 0.25).double().mean().item() == pytest.approx(0.24, abs=0.015)
    else:  # any direction is as likely: fourth moments of a point of the sphere in 24 dimensions
        assert (share**2).mean().item() == pytest.approx(1 / 24, rel=1e-9)
        assert (share**4).mean().item() == pytest.approx(3 / (24 * 26), rel=0.06)
    edges = rows._replace(x=(x - 0.5) + (torch.arange(400, dtype=torch.float64) % 2).view(-1, 1, 1, 1))
    assert threat.contains(APGD().start(edges, threat, Key(3))["point"], edges.x, 1e-9).all()


@pytest.mark.parametrize(("large", "factor"), [(True, 3), (False, 1)])
def test_the_start_of_apgd_in_l1_is_projected_noise(large: bool, factor: int) -> None:
    threat, x = L1(0.8), photographs((3, 4, 6), count=50)
    rows = rows_of(x, torch.zeros(50, dtype=torch.int64))
    start = APGDL1(large_radii=large).start(rows, threat, Key(3))["point"]
    wide = threat.with_epsilon(factor * threat.epsilon)
    assert wide.contains(start, x, 1e-9).all()
    assert (wide.length(start - x) - wide.epsilon).abs().max() < 1e-9
    grey = rows._replace(x=torch.full_like(x, 0.5))
    moved = (APGDL1(large_radii=large).start(grey, threat, Key(3))["point"] - 0.5).flatten()
    assert moved[moved != 0].sign().mean().abs() < 0.2  # the noise lies around the image
    assert (start[0] - x[0]).ne(0).sum() < x[0].numel() / 2  # the threshold of the projection leaves most where it was


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.4)])
def test_the_start_of_pgd_is_the_image_or_a_uniform_point(threat: ThreatModel) -> None:
    x = torch.full((500, 1, 4, 6), 0.5, dtype=torch.float64)
    rows, again = (rows_of(x, torch.zeros(500, dtype=torch.int64), restart=restart) for restart in (0, 1))
    drawn = IterativeGradient().start(rows, threat, Key(3))["point"]
    for attack in (IterativeGradient(random_start=False, restarts=2), MIM(restarts=2)):
        assert torch.equal(attack.start(rows, threat, Key(3))["point"], x)
        assert (attack.start(again, threat, Key(3))["point"] != x).flatten(1).any(1).all()
    assert (IterativeGradient().start(again, threat, Key(3))["point"] != drawn).flatten(1).any(1).all()
    assert (IterativeGradient().start(rows, threat, Key(4))["point"] != drawn).flatten(1).any(1).all()
    for start in (drawn, MIM(restarts=2).start(again, threat, Key(3))["point"]):
        delta = start - x
        assert threat.contains(start, x, 1e-9).all()
        if threat.norm == "Linf":
            assert (delta.abs() / 0.1).mean().item() == pytest.approx(0.5, abs=0.01)
        else:
            assert (threat.length(delta) / 0.4).mean().item() == pytest.approx(24 / 25, abs=0.01)
