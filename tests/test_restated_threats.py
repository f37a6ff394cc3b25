"""Projections against brute force, uniform points of the balls, and what a person may type as epsilon."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.schedule import Progress
from holdfast.threat import L1, L2, Linf, ThreatModel, build_threat, parse_epsilon

KINDS = (Linf, L2, L1)
ORDERS = {"Linf": np.inf, "L2": 2, "L1": 1}


def images(rows: int, pixels: int, seed: int, edge: bool = True) -> Tensor:
    """Clean rows in [0, 1], some of their pixels exactly at a bound, or all of them far from both."""
    generator = np.random.default_rng(seed)
    x = generator.uniform(0, 1, (rows, pixels)) if edge else generator.uniform(0.45, 0.55, (rows, pixels))
    if edge:
        x[generator.uniform(size=x.shape) < 0.2] = 0.0
        x[generator.uniform(size=x.shape) < 0.2] = 1.0
    return torch.from_numpy(x).reshape(rows, 1, 1, pixels)


def somewhere(x: Tensor, scale: float, seed: int) -> Tensor:
    """Points around x, most of them outside of ball and bounds."""
    return x + scale * torch.from_numpy(np.random.default_rng(seed).standard_normal(tuple(x.shape)))


def flat(x: Tensor) -> np.ndarray:
    """One row an image."""
    return x.flatten(1).numpy()


def norms(delta: np.ndarray, kind: str) -> np.ndarray:
    """The norm of every row by numpy."""
    return np.linalg.norm(delta, ord=ORDERS[kind], axis=1)


def nearest_in_l1_ball_and_box(d: np.ndarray, low: np.ndarray, high: np.ndarray, radius: float) -> np.ndarray:
    """Exact: the clipped length is piecewise linear in the threshold, so find the piece and solve in it."""
    cap = np.where(d >= 0, high, -low)

    def length(threshold: float) -> float:
        """Sum of the shrunk and clipped sizes."""
        return float(np.minimum(np.maximum(np.abs(d) - threshold, 0), cap).sum())

    threshold = 0.0
    if length(0.0) > radius:
        corners = np.unique(np.maximum(np.concatenate([[0.0], np.abs(d), np.abs(d) - cap]), 0))
        for left, right in itertools.pairwise(corners):
            at_left, at_right = length(left), length(right)
            if at_right <= radius <= at_left:
                threshold = left + (right - left) * (at_left - radius) / (at_left - at_right)
                break
    return np.sign(d) * np.minimum(np.maximum(np.abs(d) - threshold, 0), cap)


def feasible_points(threat: ThreatModel, x: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Points of ball and bounds around one clean row: shrunk noise of every sparsity, and the extreme moves."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((count, x.size)) * (generator.uniform(size=(count, x.size)) < 0.5)
    noise = np.concatenate([noise, 9 * np.eye(x.size), -9 * np.eye(x.size)])
    delta = np.clip(x + noise, threat.lower, threat.upper) - x
    sizes = norms(delta, threat.norm)
    shrink = np.minimum(1, threat.epsilon / np.maximum(sizes, 1e-300)) * np.where(np.arange(len(sizes)) % 2, 1.0, 0.7)
    return x + delta * shrink[:, None]


@pytest.mark.parametrize("pixels", [1, 2, 3, 6, 11])
@pytest.mark.parametrize("epsilon", [0.05, 0.4, "3/2"])
def test_l1_projection_is_the_nearest_point_of_ball_and_bounds(pixels: int, epsilon: float | str) -> None:
    threat = L1(epsilon)
    active = 0
    for seed in range(6):
        x = images(25, pixels, seed)
        point = somewhere(x, (0.05, 0.5, 3.0)[seed % 3], seed + 100)
        found = flat(threat.project(point, x))
        for row, (clean, moved) in enumerate(zip(flat(x), flat(point), strict=True)):
            expected = clean + nearest_in_l1_ball_and_box(moved - clean, -clean, 1 - clean, threat.epsilon)
            assert found[row] == pytest.approx(expected, abs=1e-9)
            clipped = np.clip(moved, 0, 1) - clean
            active += np.abs(clipped).sum() > threat.epsilon
    assert active > 0 or (pixels == 1 and epsilon == "3/2")  # one pixel cannot move by more than 1


def test_the_restated_l1_projection_agrees_with_a_grid_search() -> None:
    clean, moved, radius = np.array([0.9, 0.3]), np.array([1.6, -0.3]), 0.35
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 801), np.linspace(0, 1, 801)), -1).reshape(-1, 2)
    grid = grid[np.abs(grid - clean).sum(1) <= radius + 1e-12]
    best = grid[((grid - moved) ** 2).sum(1).argmin()]
    exact = clean + nearest_in_l1_ball_and_box(moved - clean, -clean, 1 - clean, radius)
    assert exact == pytest.approx(best, abs=2e-3)
    x, point = (torch.from_numpy(row).reshape(1, 1, 1, 2) for row in (clean, moved))
    assert flat(L1(radius).project(point, x))[0] == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_no_feasible_point_is_nearer_than_the_projection(kind: type[ThreatModel]) -> None:
    threat = kind(0.3)
    edge = kind is not L2  # for L2 the projection is the nearest point only where the bounds are out of reach
    x = images(30, 5, 0, edge)
    point = somewhere(x, 0.4, 1)
    found = flat(threat.project(point, x))
    for clean, moved, nearest in zip(flat(x), flat(point), found, strict=True):
        others = feasible_points(threat, clean, 300, 2)
        assert (norms(others - clean, threat.norm) <= threat.epsilon + 1e-12).all()
        # Convexity: at the nearest point, every feasible direction leads away from the point that was projected.
        assert ((others - nearest) @ (moved - nearest)).max() <= 1e-9
        assert (np.linalg.norm(others - moved, axis=1) >= np.linalg.norm(nearest - moved) - 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epsilon", [0.0, 8 / 255, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_projections_land_inside_stay_there_and_leave_insiders_alone(
    kind: type[ThreatModel], epsilon: float, dtype: torch.dtype
) -> None:
    threat = kind(epsilon)
    slack = 1e-12 if dtype == torch.float64 else 1e-6
    x = images(40, 7, 3).to(dtype)
    once = threat.project(somewhere(x.double(), 1.0, 4).to(dtype), x)
    assert once.dtype == dtype
    assert threat.contains(once, x).all()
    assert (norms(flat(once.double() - x.double()), threat.norm) <= epsilon + slack).all()
    assert once.min() >= 0
    assert once.max() <= 1
    assert torch.allclose(threat.project(once, x), once, rtol=0, atol=slack)
    assert torch.equal(threat.project(x, x), x)
    inside = x + 0.5 * (once - x)
    assert torch.allclose(threat.project(inside, x), inside, rtol=0, atol=slack)


def test_linf_projection_pixel_by_pixel() -> None:
    x = images(20, 6, 5)
    point = somewhere(x, 0.5, 6)
    found = Linf(0.1).project(point, x).flatten().tolist()
    for clean, moved, result in zip(x.flatten().tolist(), point.flatten().tolist(), found, strict=True):
        assert result == pytest.approx(max(max(clean - 0.1, 0), min(min(clean + 0.1, 1), moved)), abs=1e-15)


def test_l2_projection_scales_and_then_clamps() -> None:
    x = images(50, 6, 7)
    point = somewhere(x, 0.5, 8)
    found = flat(L2(0.3).project(point, x))
    differs = 0
    for clean, moved, result in zip(flat(x), flat(point), found, strict=True):
        delta = moved - clean
        length = math.sqrt(sum(value * value for value in delta))
        scaled = clean + delta * min(1, 0.3 / length)
        assert result == pytest.approx(np.clip(scaled, 0, 1), abs=1e-12)
        clamped = np.clip(moved, 0, 1) - clean
        other_order = clean + clamped * min(1, 0.3 / np.linalg.norm(clamped))
        differs += not np.allclose(result, other_order, atol=1e-6)
    assert differs > 10


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_other_than_zero_and_one(kind: type[ThreatModel]) -> None:
    threat = kind(0.9, lower=-1.0, upper=0.5)
    x = images(20, 4, 9) * 1.5 - 1.0
    found = threat.project(somewhere(x, 2.0, 10), x)
    assert threat.contains(found, x).all()
    assert found.min() == -1.0
    assert found.max() == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_radius_a_row(kind: type[ThreatModel]) -> None:
    x = images(6, 5, 11)
    point = somewhere(x, 1.0, 12)
    radii = torch.tensor([0.0, 0.05, 0.1, 0.3, 0.7, 1.2], dtype=torch.float64)
    found = kind(0.2).project(point, x, radii)
    for row, radius in enumerate(radii.tolist()):
        alone = kind(f"{radius}/1").project(point[row : row + 1], x[row : row + 1])
        assert torch.allclose(found[row], alone[0], rtol=0, atol=1e-12)
        one = kind(0.2).project(point[row : row + 1], x[row : row + 1], radius)
        assert torch.allclose(found[row], one[0], rtol=0, atol=1e-12)
    assert torch.equal(found[0], x[0])


@pytest.mark.parametrize("kind", KINDS)
def test_length_by_hand(kind: type[ThreatModel]) -> None:
    delta = somewhere(torch.zeros(9, 2, 3, 4, dtype=torch.float64), 1.0, 13)
    assert kind(0.1).length(delta).numpy() == pytest.approx(norms(flat(delta), kind.norm), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_contains_has_a_tolerance_of_a_millionth(kind: type[ThreatModel]) -> None:
    threat = kind(0.1)
    x = torch.full((1, 1, 1, 4), 0.5, dtype=torch.float64)
    unit = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    for excess, expected in ((-1e-3, True), (5e-7, True), (2e-6, False), (1e-3, False)):
        assert bool(threat.contains(x + (0.1 + excess) * unit, x)) is expected
        assert bool(threat.contains(x - (0.1 + excess) * unit, x)) is expected
    assert bool(threat.contains(x + 0.11 * unit, x, tolerance=0.02))
    corner = torch.tensor([[[[0.0, 1.0, 0.5, 0.5]]]], dtype=torch.float64)
    for outside in ([-0.01, 0, 0, 0], [0, 0.01, 0, 0]):
        moved = corner + torch.tensor(outside, dtype=torch.float64)
        assert not threat.contains(moved, corner).any()
    both = torch.cat([x, x])
    assert threat.contains(both + torch.tensor([0.0, 0.2])[:, None, None, None] * unit, both).tolist() == [True, False]


@pytest.mark.parametrize("kind", [Linf, L2])
def test_steepest_direction_reaches_the_dual_norm(kind: type[ThreatModel]) -> None:
    gradient = somewhere(torch.zeros(9, 1, 2, 3, dtype=torch.float64), 1.0, 14)
    gradient[3, 0, 0, 0] = 0.0
    direction = kind(0.1).steepest(gradient)
    gain = (flat(direction) * flat(gradient)).sum(1)
    dual = np.abs(flat(gradient)).sum(1) if kind is Linf else np.linalg.norm(flat(gradient), axis=1)
    assert gain == pytest.approx(dual, rel=1e-12)
    assert norms(flat(direction), kind.norm) == pytest.approx(np.ones(9), rel=1e-12)
    assert torch.equal(kind(0.1).steepest(torch.zeros_like(gradient)), torch.zeros_like(gradient))
    small = kind(0.1).steepest(1e-9 * gradient)
    assert torch.allclose(small, direction, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e-13, 1e-11, 1e25, 1e37])
@pytest.mark.parametrize("kind", KINDS)
def test_steepest_direction_does_not_depend_on_the_scale(kind: type[ThreatModel], scale: float) -> None:
    """In float32, where a sum of squares underflows or overflows; rows beside a scaled one keep every bit."""
    gradient = somewhere(torch.zeros(9, 1, 2, 3), 1.0, 14)
    direction = kind(0.1).steepest(gradient)
    mixed = gradient.clone()
    mixed[4] *= scale
    found = kind(0.1).steepest(mixed)
    assert torch.allclose(found[4], direction[4], rtol=1e-5)
    others = torch.arange(9) != 4
    assert torch.equal(found[others], direction[others])
    mixed[4, 0, 0, 0] = torch.nan
    assert bool(kind(0.1).steepest(mixed)[4].isnan().any()) or kind is L1


def distance_from_uniform(sample: np.ndarray) -> float:
    """Kolmogorov's distance to the uniform distribution on [0, 1], times the root of the size."""
    ordered, n = np.sort(sample), sample.size
    steps = np.arange(n)
    gap = max(np.max((steps + 1) / n - ordered), np.max(ordered - steps / n))
    return float(gap * math.sqrt(n))


@pytest.mark.parametrize("pixels", [2, 5, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_random_points_are_uniform_in_the_ball(kind: type[ThreatModel], pixels: int) -> None:
    rows, epsilon = 8000, 0.2
    threat = kind(epsilon)
    x = torch.full((rows, 1, 1, pixels), 0.5, dtype=torch.float64)
    points = threat.random_point(x, Progress(seed=4).key("test"), torch.arange(rows))
    assert threat.contains(points, x).all()
    delta = flat(points - x)
    # The share of the ball's volume within a radius r is (r / epsilon)^d: uniform on [0, 1].
    volume = (norms(delta, threat.norm) / epsilon) ** pixels
    assert distance_from_uniform(volume) < 1.95  # passed by chance in 99.9 % of samples
    second_moment = {
        "Linf": epsilon**2 / 3,
        "L2": epsilon**2 / (pixels + 2),
        "L1": 2 * epsilon**2 / ((pixels + 1) * (pixels + 2)),
    }[threat.norm]
    error = math.sqrt(second_moment / rows)
    assert np.abs(delta.mean(0)).max() < 4.5 * error
    assert (delta**2).mean(0) == pytest.approx(np.full(pixels, second_moment), rel=0.12)
    assert (delta**2).mean() == pytest.approx(second_moment, rel=0.05)
    correlation = np.corrcoef(delta.T) - np.eye(pixels)
    assert np.abs(correlation).max() < 4.5 / math.sqrt(rows)
    neighbours = np.corrcoef(delta[:-1, 0], delta[1:, 0])[0, 1]
    assert abs(neighbours) < 4.5 / math.sqrt(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_random_points_are_keyed_and_clamped(kind: type[ThreatModel]) -> None:
    threat = kind(0.3)
    x = images(16, 6, 15)
    index = torch.arange(16) * 1000 + 7
    key = Progress(seed=1).key("start")
    points = threat.random_point(x, key, index)
    assert threat.contains(points, x).all()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for rows in (order, torch.tensor([3, 4])):  # log, cos and sums may round otherwise in a batch of another size
        found = threat.random_point(x[rows], key, index[rows])
        torch.testing.assert_close(found, points[rows], rtol=0, atol=1e-12)
    middle = torch.full_like(x, 0.5)
    same = threat.random_point(middle, key, torch.full((16,), 5))
    assert torch.equal(same, same[:1].expand_as(same))
    for other in (Progress(seed=2).key("start"), Progress(seed=1, epoch=1).key("start"), Progress(seed=1).key("crop")):
        assert (
            not torch.isclose(threat.random_point(middle, other, index), threat.random_point(middle, key, index))
            .all(dim=3)
            .any()
        )


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("8/255", 8 / 255),
        ("8 / 255", 8 / 255),
        (" 0.1 ", 0.1),
        (0.1, 0.1),
        (0, 0.0),
        (1, 1.0),
        ("1", 1.0),
        ("3/1", 3.0),
        ("3/2", 1.5),
        ("0.5/255", 0.5 / 255),
        ("1e-2", 0.01),
    ],
)
def test_epsilon_as_a_person_types_it(typed: float | str, expected: float) -> None:
    assert parse_epsilon(typed) == expected
    assert Linf(typed).epsilon == expected


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (-0.1, ("negative", "8/255")),
        ("-8/255", ("negative", "8/255")),
        ("eight", ("not a number", "8/255")),
        ("", ("not a number", "8/255")),
        (None, ("not a number", "8/255")),
        ([0.1], ("not a number", "8/255")),
        ("1/2/3", ("not a number", "8/255")),
        (float("nan"), ("not finite", "8/255")),
        ("nan", ("not finite", "8/255")),
        (float("inf"), ("not finite", "8/255")),
        ("inf", ("not finite", "8/255")),
        ("8/0", ("zero", "8/255")),
        (8, ("above 1", "8/255", "8/1", "[0, 1]")),
        (4.0, ("above 1", "4/255", "4/1")),
        ("8", ("above 1", "8/255", "8/1")),
        (1.5, ("above 1", "1.5/255", "1.5/1")),
    ],
)
def test_an_epsilon_that_is_none_is_refused_with_advice(typed: object, says: tuple[str, ...]) -> None:
    for build in (parse_epsilon, Linf, L2, L1):
        with pytest.raises(HoldfastError) as refusal:
            build(typed)
        for words in says:
            assert words in str(refusal.value)


def test_the_advice_for_large_epsilons_is_accepted() -> None:
    assert parse_epsilon("1.5/255") == 1.5 / 255
    assert parse_epsilon("1.5/1") == 1.5


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (0.5, 0.5), (float("nan"), 1.0)])
def test_crossed_bounds_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(HoldfastError):
        Linf(0.1, *bounds)


def test_threats_by_name() -> None:
    for kind in KINDS:
        for name in (kind.norm, kind.norm.lower(), kind.norm.upper()):
            assert build_threat(name, "8/255") == kind(8 / 255)
    assert build_threat("L2", 0.5, (-1, 2)) == L2(0.5, -1.0, 2.0)
    assert L2(0.5, -1.0, 2.0).with_epsilon(0.25) == L2(0.25, -1.0, 2.0)
    for name in ("L3", "", "l-2"):
        with pytest.raises(HoldfastError, match=r"Linf.*L2.*L1"):
            build_threat(name, 0.1)
