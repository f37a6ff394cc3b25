"""The minimum-norm attacks as loops over single images in float64: FAB, its step onto a hyperplane, and CW-L2.

The step is compared with linear programs too, which know nothing of its structure.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from holdfast.attacks.carlini_wagner import CarliniWagnerL2
from holdfast.attacks.fab import FAB
from holdfast.attacks.hyperplane import step_to_hyperplane
from holdfast.keyed_random import Key
from holdfast.threat import L1, L2, THREATS, Linf, ThreatModel, build_threat
from test_attacks_on_linear_models import linear, rows_for, rows_of, search
from test_restated_evaluation_attacks import SHAPES, Path, network, photographs, restated_loss

Array = np.ndarray[Any, Any]
NORMS = ("Linf", "L2", "L1")


def length(d: Array, norm: str) -> float:
    """The norm of a change."""
    return {"Linf": abs(d).max(), "L2": np.sqrt((d * d).sum()), "L1": abs(d).sum()}[norm]


def dual(w: Array, norm: str) -> float:
    """The length of a hyperplane's normal that turns its value into a distance."""
    return length(w, {"Linf": "L1", "L2": "L2", "L1": "Linf"}[norm])


def restated_step(t: Array, w: Array, c: float, norm: str) -> Array:
    """The smallest change that meets the hyperplane inside the box, or the nearest corner: bisection, greedy for L1."""
    towards = np.sign(w) * np.sign(c)
    room = np.array([0.0 if s == 0 else 1 - v if s > 0 else v for s, v in zip(towards, t, strict=True)])
    if (abs(w) * room).sum() <= abs(c):
        return towards * room
    if norm == "L1":
        moved, left = np.zeros_like(t), abs(c)
        for i in sorted(range(len(t)), key=lambda i: -abs(w[i])):
            moved[i] = min(room[i], left / abs(w[i])) if w[i] != 0 else 0.0
            left -= moved[i] * abs(w[i])
        return towards * moved
    speed = np.ones_like(t) if norm == "Linf" else abs(w)
    low, high = 0.0, float((room / np.where(speed > 0, speed, np.inf)).max())
    for _ in range(200):
        middle = (low + high) / 2
        if (abs(w) * np.minimum(middle * speed, room)).sum() < abs(c):
            low = middle
        else:
            high = middle
    return towards * np.minimum(high * speed, room)


def linear_program(t: Array, w: Array, c: float, norm: str) -> float:
    """The least length, by a solver that knows nothing of the structure."""
    count = len(t)
    if norm == "Linf":  # variables d and the bound on all |d|
        limits = np.block([[np.eye(count), -np.ones((count, 1))], [-np.eye(count), -np.ones((count, 1))]])
        cost, equality = np.append(np.zeros(count), 1.0), np.append(w, 0.0)
        bounds = [(-v, 1 - v) for v in t] + [(0, None)]
        solved = linprog(cost, limits, np.zeros(2 * count), equality[None], [c], bounds)
    else:  # variables: how far up and how far down every pixel goes
        solved = linprog(
            np.ones(2 * count), None, None, np.append(w, -w)[None], [c], [(0, 1 - v) for v in t] + [(0, v) for v in t]
        )
    assert solved.status == 0
    return float(solved.fun)


def cases(seed: int, count: int, pixels: int = 12) -> list[tuple[Array, Array, float]]:
    """Points, normals and residuals: pixels at the bounds, zero and tiny weights, both signs, near and far."""
    generator = np.random.default_rng(seed)
    made = []
    for number in range(count):
        t = np.clip(generator.uniform(-0.2, 1.2, pixels), 0, 1)
        w = generator.standard_normal(pixels) * 10.0 ** generator.uniform(-2, 2)
        w[generator.random(pixels) < 0.2] = 0.0
        up = (np.where(w > 0, 1 - t, t) * abs(w)).sum()
        down = (np.where(w > 0, t, 1 - t) * abs(w)).sum()
        share = (0.05, 0.3, 0.6, 0.9, 0.999)[number % 5]
        made.append((t, w, share * up if number % 2 else -share * down))
    return made


def stepped(made: list[tuple[Array, Array, float]], norm: str, dtype: torch.dtype = torch.float64) -> Array:
    """What the library does with all of them together."""
    t, w, c = (torch.from_numpy(np.array(part)).to(dtype) for part in zip(*made, strict=True))
    return step_to_hyperplane(t, w, c, norm).double().numpy()


@pytest.mark.parametrize("norm", NORMS)
def test_the_step_is_the_shortest_that_meets_the_hyperplane(norm: str) -> None:
    made = cases(0, 40)
    for (t, w, c), d in zip(made, stepped(made, norm), strict=True):
        assert ((t + d >= -1e-12) & (t + d <= 1 + 1e-12)).all()
        assert w @ d == pytest.approx(c, rel=1e-10)
        assert abs(d - restated_step(t, w, c, norm)).max() < 1e-9
        if norm != "L2":
            assert length(d, norm) == pytest.approx(linear_program(t, w, c, norm), rel=1e-7)
            continue
        free = (t + d > 1e-9) & (t + d < 1 - 1e-9) & (w != 0)
        ratio = d[free] / w[free]  # stationary: every pixel that is free moves by the same multiple of its weight
        assert ratio == pytest.approx(np.full(len(ratio), ratio.mean() if len(ratio) else 0.0), rel=1e-8)
        if len(ratio):
            assert (abs(d[~free]) <= abs(ratio[0] * w[~free]) * (1 + 1e-8)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_no_other_change_of_that_size_is_shorter(norm: str) -> None:
    generator = np.random.default_rng(5)
    made = cases(6, 12, pixels=5)
    for (t, w, c), d in zip(made, stepped(made, norm), strict=True):
        for _ in range(200):
            other = np.clip(t + d + generator.standard_normal(5) * 0.1, 0, 1) - t
            if abs(w @ other) >= abs(c) and (w @ other) * c > 0:  # beyond the hyperplane: it cannot be shorter
                assert length(other, norm) >= length(d, norm) - 1e-12


@pytest.mark.parametrize("norm", NORMS)
def test_steps_that_cannot_reach_and_steps_of_no_length(norm: str) -> None:
    t, w = np.array([0.2, 0.0, 1.0, 0.7]), np.array([1.0, -2.0, 0.5, 0.0])
    far, none, flat = stepped([(t, w, 50.0), (t, w, 0.0), (t, 0 * w, 1.0)], norm)
    assert far == pytest.approx(np.array([0.8, 0.0, 0.0, 0.0]), abs=1e-12)
    assert none == pytest.approx(0 * t, abs=1e-12)
    assert flat == pytest.approx(0 * t, abs=1e-12)
    assert stepped([(t, w, -50.0)], norm)[0] == pytest.approx(np.array([-0.2, 1.0, -1.0, 0.0]), abs=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_single_precision_meets_a_hyperplane_of_many_pixels(norm: str) -> None:
    made = cases(3, 10, pixels=600)
    for (t, w, c), d in zip(made, stepped(made, norm, torch.float32), strict=True):
        assert ((t + d >= -1e-6) & (t + d <= 1 + 1e-6)).all()
        assert w @ d == pytest.approx(c, rel=1e-4)
        assert length(d, norm) <= length(restated_step(t, w, c, norm), norm) * (1 + 1e-4)


def restated_fab(
    model: nn.Module, attack: FAB, x: Array, start: Array, shape: tuple[int, ...], y: int, target: int, norm: str
) -> list[Array]:
    """Algorithm 1 of arXiv:1907.02044; every point at which the network is run."""
    point, path = start, []
    for _ in range(attack.steps):
        path.append(point)
        at = torch.from_numpy(point.copy()).reshape(1, *shape).requires_grad_()
        z = model(at)[0]
        nearest = None
        for k in [target] if target >= 0 else [k for k in range(len(z)) if k != y]:
            (w,) = torch.autograd.grad(z[k] - z[y], at, retain_graph=True)
            normal, gap = w.reshape(-1).numpy(), (z[k] - z[y]).item()
            distance = abs(gap) / (dual(normal, norm) + 1e-12)
            if nearest is None or distance < nearest[0]:
                nearest = (distance, normal, gap)
        assert nearest is not None
        _, w, gap = nearest
        offset = w @ point - gap
        one = restated_step(point, w, offset - w @ point, norm)
        two = restated_step(x, w, offset - w @ x, norm)
        a, b = max(length(one, norm), 1e-8), max(length(two, norm), 1e-8)
        share = min(a / (a + b), attack.alpha_max)
        point = (1 - share) * (point + attack.overshoot * one) + share * (x + attack.overshoot * two)
        point = np.clip(point, 0, 1)
        path.append(point)
        if model(torch.from_numpy(point.copy()).reshape(1, *shape))[0].argmax().item() != y:
            point = x + attack.back * (point - x)
    return path


@pytest.mark.parametrize("threat", [Linf(24 / 255), L2(0.5), build_threat("L1", "2/1")])
@pytest.mark.parametrize(
    "attack",
    [
        FAB(steps=12),
        FAB(steps=8, targets=3),
        FAB(steps=8, targets=2, restarts=2),
        FAB(steps=8, alpha_max=0.4, overshoot=1.3, back=0.5),
    ],
)
def test_fab(attack: FAB, threat: ThreatModel) -> None:
    for seed, shape in enumerate(SHAPES[:2]):
        model, x = network(shape, 5, seed=seed, scale=4.0), photographs(shape, count=3, seed=seed + 1)
        rows = rows_for(attack, model, x, model(x).argmax(1))
        visits = search(attack, model, rows, threat)
        broken = torch.stack([visit.logits.argmax(1) != rows.y for visit in visits[1::2]])
        assert broken.any()
        assert not broken.all()
        for row in range(len(rows.y)):
            path = restated_fab(
                model, attack, rows.x[row].reshape(-1).numpy(), visits[0].point[row].reshape(-1).numpy(), shape,
                int(rows.y[row]), int(rows.target[row]), threat.norm,
            )  # fmt: skip
            assert len(path) == len(visits)
            for ours, visit in zip(path, visits, strict=True):
                assert abs(ours - visit.point[row].reshape(-1).numpy()).max() < 1e-8


@pytest.mark.parametrize(
    ("gap", "nearest"), [(0.2, {"Linf": 2, "L2": 2, "L1": 1}), (0.8, {"Linf": 2, "L2": 1, "L1": 1})]
)
@pytest.mark.parametrize("norm", NORMS)
def test_fab_takes_the_hyperplane_that_is_nearest_in_its_norm(norm: str, gap: float, nearest: dict[str, int]) -> None:
    """Class 1 is a step of 0.2 away through one pixel; class 2 needs all pixels, and how much depends on the norm."""
    weight = np.stack([np.zeros(24), np.eye(24)[5], np.full(24, 0.3)])
    model, x = linear(weight, -weight @ np.full(24, 0.5) - np.array([0, 0.2, gap])), torch.full((1, 1, 4, 6), 0.5)
    rows = rows_of(x.double(), torch.tensor([0]))
    visits = search(FAB(steps=1), model, rows, THREATS[norm](0.5))
    assert visits[1].logits.argmax().item() == nearest[norm]


def test_the_settings_of_the_papers() -> None:
    fab, cw = FAB(), CarliniWagnerL2()
    assert (fab.steps, fab.alpha_max, fab.overshoot, fab.back, fab.restarts) == (100, 0.1, 1.05, 0.9, 1)
    assert (cw.searches, cw.step_size, cw.first, cw.confidence) == (9, 0.01, 0.001, 0.0)


@pytest.mark.parametrize("threat", [Linf(0.2), L2(0.6), L1(0.9)])
def test_fab_starts_at_the_image_and_restarts_half_way_to_epsilon(threat: ThreatModel) -> None:
    x = torch.full((300, 1, 4, 6), 0.5, dtype=torch.float64)
    rows, again = (rows_of(x, torch.zeros(300, dtype=torch.int64), restart=restart) for restart in (0, 2))
    assert torch.equal(FAB().start(rows, threat, Key(1))["point"], x)
    delta = FAB(restarts=3).start(again, threat, Key(1))["point"] - x
    assert (threat.length(delta) - threat.epsilon / 2).abs().max() < 1e-9
    assert delta.flatten(1).sign().mean(0).abs().max() < 0.25
    size = delta.flatten(1).abs() / delta.flatten(1).abs().mean(1, keepdim=True)
    gaussian = (size**2).mean().item()  # of |t| / mean |t|: 4/3 for uniform, nearly π/2 for normal draws
    assert gaussian == pytest.approx(4 / 3 if threat.norm == "Linf" else np.pi / 2, rel=0.04)
    edges = again._replace(x=torch.zeros_like(x))
    assert (FAB(restarts=3).start(edges, threat, Key(1))["point"] >= 0).all()


def restated_cw(
    model: nn.Module, x: Tensor, start: Tensor, y: int, target: int, steps: int, searches: int, rate: float,
    first: float, kappa: float,
) -> Path:  # fmt: skip
    """Section VI-A of arXiv:1608.04644 with Adam of arXiv:1412.6980; every point it visits."""
    lower, upper, constant = 0.0, math.inf, first
    for _ in range(searches):
        w = torch.atanh(2 * start - 1)
        mean, square, succeeded = torch.zeros_like(w), torch.zeros_like(w), False
        for step in range(1, steps + 1):
            w = w.detach().requires_grad_()
            point = (torch.tanh(w) + 1) / 2
            yield point.detach().reshape(-1).numpy().copy()
            z = model(point[None])[0]
            gap = restated_loss("margin" if target < 0 else "difference", z, y, target)
            succeeded |= gap.item() > kappa
            loss = ((point - x) ** 2).sum() + constant * torch.clamp(kappa - gap, min=0)
            (gradient,) = torch.autograd.grad(loss, w)
            mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
            w = w - rate * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        if succeeded:
            upper = min(upper, constant)
        else:
            lower = max(lower, constant)
        constant = (lower + upper) / 2 if upper < math.inf else constant * 10


@pytest.mark.parametrize(
    "attack",
    [
        CarliniWagnerL2(steps=30, searches=7, step_size=0.03),
        CarliniWagnerL2(steps=25, searches=6, targets=2, step_size=0.05),
        CarliniWagnerL2(steps=20, searches=5, confidence=4.0, first=0.1, step_size=0.05),
    ],
)
def test_carlini_and_wagner(attack: CarliniWagnerL2) -> None:
    shape = (1, 4, 6)
    model, x = network(shape, 5, scale=3.0), photographs(shape, count=3, edge=-0.02)
    rows = rows_for(attack, model, x, model(x).argmax(1))
    visits = search(attack, model, rows, L2(1.0))
    assert (visits[0].point - rows.x).abs().max() < 1e-6
    wins = set()
    for row in range(len(rows.y)):
        label, target = int(rows.y[row]), int(rows.target[row])
        path = restated_cw(
            model, rows.x[row], visits[0].point[row], label, target, attack.steps, attack.searches, attack.step_size,
            attack.first, attack.confidence,
        )  # fmt: skip
        for number, (ours, visit) in enumerate(zip(path, visits, strict=True)):
            wins.add((int(visit.logits[row].argmax()) != label, number // attack.steps))
            # not closer: the library forms 0.999^t in float32, which moves the early steps by some 1e-5 of them
            assert abs(ours - visit.point[row].reshape(-1).numpy()).max() < 1e-9
    assert any(won and number < attack.searches - 1 for won, number in wins)  # c falls again
