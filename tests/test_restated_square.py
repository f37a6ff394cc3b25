"""The laws of Square, whose draws no restatement can predict: windows, signs, budgets and what it accepts.

For L2 and L1 every proposal is explained by trying all pairs of windows, both orientations and both signs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from holdfast.attacks.square import Square
from holdfast.attacks.stepwise import Answer, Rows, State
from holdfast.keyed_random import Key
from holdfast.threat import L1, L2, Linf, ThreatModel, build_threat
from test_attacks_on_linear_models import rows_of
from test_restated_evaluation_attacks import photographs

Array = np.ndarray[Any, Any]
KEY = Key(21)
SIDES = {  # at 32 x 32: the last query of every share, and the first of the next
    0: 29, 10: 29, 11: 20, 50: 20, 51: 14, 200: 14, 201: 10, 500: 10, 501: 7, 1000: 7, 1001: 5, 2000: 5, 2001: 4,
    4000: 4, 4001: 3, 4999: 3, 6000: 3, 6001: 2, 8000: 2, 8001: 1,
}  # fmt: skip


def grey(rows: int, channels: int, height: int, width: int) -> Rows:
    """Work on grey images, so that no bound is met."""
    x = torch.full((rows, channels, height, width), 0.5, dtype=torch.float64)
    return rows_of(x, torch.zeros(rows, dtype=torch.int64))


def said(margins: Tensor) -> Answer:
    """An answer with these margins of class 0."""
    logits = torch.stack([margins, torch.zeros_like(margins)], dim=1)
    return Answer(logits, -margins, None)


def propose(attack: Square, rows: Rows, threat: ThreatModel, query: int, best: Tensor | None = None) -> State:
    """The state whose point is the proposal of that query, from 0, made from `best` or else from the start."""
    state = attack.start(rows, threat, KEY)
    if best is not None:
        state["point"] = best
    state["step"] = torch.full_like(rows.y, query)
    return attack.advance(state, rows, said(torch.ones(len(rows.y), dtype=torch.float64)), threat, KEY)


def changed(point: Tensor, before: Tensor) -> Tensor:
    """Which pixels moved by more than rounding."""
    return (point - before).abs() > 1e-7


def test_stripes_at_the_start() -> None:
    rows = grey(400, 3, 5, 8)
    state = Square().start(rows, Linf(0.2), KEY)
    stripes = (state["point"] - rows.x).sign()
    assert ((state["point"] - rows.x).abs() - 0.2).abs().max() < 1e-8
    assert torch.equal(stripes, stripes[:, :, :1].expand_as(stripes))
    signs = stripes[:, :, 0].flatten(1)
    together = signs.T @ signs / len(signs)
    assert signs.mean(0).abs().max() < 0.25
    assert (together - torch.eye(24, dtype=torch.float64)).abs().max() < 0.25  # by column and channel for itself
    x = photographs((3, 5, 8), count=6)
    start = Square().start(rows_of(x, torch.zeros(6, dtype=torch.int64)), Linf(0.2), KEY)["point"]
    assert ((start - (x + 0.2).clamp(0, 1)).abs().minimum((start - (x - 0.2).clamp(0, 1)).abs()) < 1e-8).all()


@pytest.mark.parametrize("rescale", [False, True])
def test_the_side_of_the_window_at_every_query(rescale: bool) -> None:
    attack = Square(queries=2000, rescale=True) if rescale else Square(queries=10000)
    rows = grey(20, 10, 32, 32)
    start = attack.start(rows, Linf(0.1), KEY)["point"]
    tall = grey(20, 10, 12, 5)  # a window of side 7 is wanted, and no more than 5 fit
    moved = changed(propose(attack, tall, Linf(0.1), 0)["point"], attack.start(tall, Linf(0.1), KEY)["point"]).any(1)
    assert moved.any(2).sum(1).eq(5).all()
    for query, side in SIDES.items():
        if rescale and query % 5:
            continue
        point = propose(attack, rows, Linf(0.1), query // 5 if rescale else query)["point"]
        moved = changed(point, start).any(1)
        assert moved.any(2).sum(1).eq(side).all(), query  # every row of pixels of the window
        columns = moved.any(1)
        assert columns.sum(1).max() == side
        assert (columns.sum(1) >= side - 2).all()  # a column stays where all ten channels have its sign already
        reach = columns * torch.arange(1, 33)
        assert (reach.amax(1) - (33 - (columns * torch.arange(32, 0, -1)).amax(1)) < side).all()


@pytest.mark.parametrize(("query", "side"), [(0, 7), (201, 2), (51, 3)])
def test_windows_lie_anywhere_but_at_the_last_place(query: int, side: int) -> None:
    rows = grey(3000, 10, 7, 10)
    start = Square().start(rows, Linf(0.2), KEY)["point"]
    attack = Square(first_share={0: 0.8, 201: 0.5, 51: 0.5}[query])
    moved = changed(propose(attack, rows, Linf(0.2), query)["point"], start).any(1)
    tall, wide = moved.any(2), moved.any(1)
    clear = (tall.sum(1) == side) & (wide.sum(1) == side)
    assert clear.double().mean() > 0.97
    corners = torch.stack([tall.double().argmax(1), wide.double().argmax(1)], dim=1)[clear]
    places = list(itertools.product(range(max(7 - side, 1)), range(10 - side)))
    counts = [int((corners == torch.tensor(place)).all(1).sum()) for place in places]
    assert sum(counts) == len(corners)
    expected = len(corners) / len(places)
    assert max(abs(count - expected) for count in counts) < 4.5 * math.sqrt(expected)


def test_a_proposal_in_linf_sets_a_window_to_one_end_of_the_ball_in_every_channel() -> None:
    x = photographs((3, 7, 10), count=300, edge=0.3)
    rows = rows_of(x, torch.zeros(300, dtype=torch.int64))
    threat = Linf(0.2)
    ends = torch.stack([(x - 0.2).clamp(0, 1), (x + 0.2).clamp(0, 1)])
    best = photographs((3, 7, 10), count=300, seed=5).clamp(ends[0], ends[1])
    point = propose(Square(first_share=0.5), rows, threat, 51, best)["point"]
    drawn = []
    for row in range(300):
        moved = changed(point[row], best[row]).any(0)
        high, wide = moved.any(1).nonzero()[:, 0], moved.any(0).nonzero()[:, 0]
        assert high.max() - high.min() < 3
        assert wide.max() - wide.min() < 3
        window = (slice(None), slice(high.min(), high.max() + 1), slice(wide.min(), wide.max() + 1))
        fits = ((ends[:, row] - point[row])[(slice(None), *window)].abs() < 1e-12).flatten(2).all(2)
        assert fits.any(0).all()  # each channel goes to one end as a whole
        drawn.append(fits[1].double() - fits[0].double())
    signs = torch.stack(drawn)
    assert signs.mean(0).abs().max() < 0.25
    assert (signs.T @ signs / 300 - torch.eye(3, dtype=torch.float64)).abs().max() < 0.25


@pytest.mark.parametrize("threat", [Linf(0.2), L2(0.4), L1(0.7)])
def test_it_goes_on_from_the_point_of_the_lowest_margin(threat: ThreatModel) -> None:
    """What was turned down leaves no trace: the proposals are those of a search that never met it."""
    rows, attack = grey(4, 2, 7, 8), Square(queries=40)
    generator = torch.Generator().manual_seed(0)
    state = attack.start(rows, threat, KEY)
    best, lowest = state["point"], torch.full((4,), torch.inf, dtype=torch.float64)
    falls = 0
    for number in range(30):
        margins = torch.rand(4, generator=generator, dtype=torch.float64).mul(8) - number / 20
        margins = lowest if number % 3 == 2 else margins  # as good is not better
        better = margins < lowest
        falls += int(better.sum())
        lowest = torch.minimum(margins, lowest)
        best = torch.where(better.view(-1, 1, 1, 1), state["point"], best)
        state = attack.advance(state, rows, said(margins), threat, KEY)
        assert torch.equal(state["point"], propose(attack, rows, threat, number, best)["point"])
        assert threat.contains(state["point"], rows.x, 1e-9).all()
    assert 8 < falls < 60
    assert torch.equal(attack.loss(torch.tensor([[2.0, 5.0, 1.0]]), grey(1, 1, 1, 1)), torch.tensor([3.0]))


def test_draws_differ_between_queries_rows_restarts_and_keys() -> None:
    rows = grey(30, 4, 9, 9)
    again = rows_of(rows.x, rows.y, restart=1)
    first, second = (propose(Square(), rows, Linf(0.2), query)["point"] for query in (12, 13))
    start = Square().start(rows, Linf(0.2), KEY)["point"]
    assert (changed(first, start) != changed(second, start)).flatten(1).any(1).all()
    assert changed(Square().start(again, Linf(0.2), KEY)["point"], start).flatten(1).any(1).all()
    assert changed(Square().start(rows, Linf(0.2), Key(22))["point"], start).flatten(1).any(1).all()
    assert len(torch.unique(first.flatten(1), dim=0)) == 30


def bumps(side: int, norm: str) -> Array:
    """The pattern of a window: a pyramid of powers in the upper half, its like with the other sign in the lower."""
    power = 2 if norm == "L2" else 4

    def pyramid(height: int, width: int) -> Array:
        steps = max(height // 2, width // 2) + 1
        made = np.zeros((height, width))
        for i, j in itertools.product(range(height), range(width)):
            ring = max(abs(i - height // 2), abs(j - width // 2))
            made[i, j] = sum((m + 1.0) ** -power for m in range(ring, steps))
        return made / size_of(made, norm)

    made = np.zeros((side, side))
    made[: side // 2] = pyramid(side // 2, side)
    made[side // 2 :] = -pyramid(side - side // 2, side)
    return made / size_of(made, norm)


def size_of(delta: Array, norm: str) -> float:
    """The length that is budgeted."""
    return float(np.sqrt((delta**2).sum())) if norm == "L2" else float(abs(delta).sum())


@pytest.mark.parametrize(("height", "width"), [(17, 19), (20, 20), (11, 10)])
@pytest.mark.parametrize("threat", [L2(0.4), build_threat("L1", "18/1"), L1(0.7)])
def test_a_grid_of_bumps_at_the_start(threat: ThreatModel, height: int, width: int) -> None:
    rows = grey(12, 2, height, width)
    delta = (Square().start(rows, threat, KEY)["point"] - rows.x).numpy()
    side, edge = height // 5, (height - height // 5 * 5) // 2
    assert np.array([size_of(d, threat.norm) for d in delta]) == pytest.approx(threat.epsilon, rel=1e-5)
    pattern = np.zeros((height, width))
    tiles = list(itertools.product(range(height // side), range(width // side)))
    each = bumps(side, threat.norm)
    signs, turned = [], []
    budget = threat.epsilon / (math.sqrt(2 * len(tiles)) if threat.norm == "L2" else 2 * len(tiles))
    for image in delta:
        for i, j in tiles:
            here = (slice(edge + i * side, edge + (i + 1) * side), slice(edge + j * side, edge + (j + 1) * side))
            pattern[here] = 1
            for channel in image:
                tile, fits = channel[here], []
                for shape, sign in itertools.product((each, each.T), (1.0, -1.0)):
                    lam = 0.0  # in L1 the projection takes the same from every entry
                    if threat.norm == "L1":
                        raw = abs(shape).ravel()
                        lam = next(t for t in thresholds(raw) if (raw - t).clip(0).sum() <= budget + 1e-12)
                        lam -= (budget - (raw - lam).clip(0).sum()) / max((raw >= lam).sum(), 1)
                    wanted = np.sign(shape) * (abs(shape) - lam).clip(0) if threat.norm == "L1" else shape * budget
                    fits.append(bool(abs(tile - sign * wanted).max() < 1e-5 * threat.epsilon))
                assert any(fits)
                signs.append(fits[0] or fits[2])
                turned.append(fits[2] or fits[3])
    assert (abs(delta) * (pattern == 0)).max() == 0
    drawn = np.array(signs).reshape(len(delta), len(tiles), 2)
    assert 0.4 < drawn.mean() < 0.6
    assert (drawn[:, :-1] != drawn[:, 1:]).any((1, 2)).all()  # tile by tile
    assert 0.3 < (drawn[..., 0] != drawn[..., 1]).mean() < 0.7  # channel by channel
    if threat.norm == "L2" or side > 2:
        assert 0.35 < np.mean(turned) < 0.65


def thresholds(values: Array) -> Iterator[float]:
    """Thresholds at which something becomes zero, rising."""
    yield from sorted({0.0, *(float(v) for v in values)})


def variants(channel: Array, one: Array, two: Array, rest: float, channels: int, norm: str) -> list[Array]:
    """What may become of one channel: both orientations of the pattern, each with both signs."""
    side = int(one.any(1).sum())
    inside, union = channel[one].reshape(side, side), size_of(channel[one | two], norm)
    budget = math.sqrt(rest / channels + union**2) if norm == "L2" else (rest / channels + union) * channels
    made = []
    for pattern, sign in itertools.product((bumps_of[side, norm], bumps_of[side, norm].T), (1.0, -1.0)):
        new = sign * pattern + inside / (1e-12 + size_of(inside, norm))
        made.append(np.where(two, 0.0, channel))
        made[-1][one] = (new / (size_of(new, norm) + 1e-12) * budget).ravel()
    return made


def explained(before: Array, after: Array, threat: ThreatModel, side: int) -> list[tuple[int, int, int, int]]:
    """The pairs of windows that turn one change into the other, in every channel with the same orientation."""
    channels, height, width = before.shape
    norm, epsilon, close = threat.norm, threat.epsilon, 3e-6 * threat.epsilon
    power = 2 if norm == "L2" else 1
    rest = max(epsilon**power - size_of(before, norm) ** power, 0)
    places = list(itertools.product(range(max(height - side, 1)), range(max(width - side, 1))))
    top = np.unravel_index(abs(after).argmax(), after.shape)
    found = []
    for (i, j), (k, m) in itertools.product(places, places):
        one, two = np.zeros((height, width), bool), np.zeros((height, width), bool)
        one[i : i + side, j : j + side] = two[k : k + side, m : m + side] = True
        made = [variants(channel, one, two, rest, channels, norm) for channel in before]
        for turned, sign in itertools.product((0, 2), (0, 1)):
            if norm == "L2":  # the length of a channel does not depend on its sign
                scale = epsilon / math.sqrt(sum((each[0] ** 2).sum() for each in made))
                wanted = [[variant * scale for variant in each] for each in made]
            else:  # the projection takes the same from every entry, and the greatest tells how much
                lam = abs(made[top[0]][turned + sign][top[1:]]) - abs(after[top])
                wanted = [[np.sign(v) * (abs(v) - lam).clip(0) for v in each] for each in made]
            pairs = zip(wanted, after, strict=True)
            if all(any(abs(v - channel).max() < close for v in each[turned : turned + 2]) for each, channel in pairs):
                found.append((i, j, k, m))
                break
    return found


bumps_of = {(side, norm): bumps(side, norm) for side in (3, 5, 6, 7) for norm in ("L2", "L1")}


@pytest.mark.parametrize("threat", [L2(0.4), L1(0.4)])
@pytest.mark.parametrize(
    ("shape", "query", "side"), [((2, 7, 8), 11, 5), ((1, 10, 10), 11, 7), ((2, 6, 9), 0, 6), ((1, 6, 7), 5000, 3)]
)
def test_a_proposal_moves_the_length_of_two_windows_into_one(
    threat: ThreatModel, shape: tuple[int, int, int], query: int, side: int
) -> None:
    rows, attack = grey(3, *shape), Square(queries=9000)
    best, seen = attack.start(rows, threat, KEY)["point"], set()
    for number in range(3):  # every proposal is taken, and the next one made from it
        if number == 2:
            best = rows.x + (best - rows.x) * 0.7  # some of the budget is left
        point = propose(attack, rows, threat, query + number, best)["point"]
        for row in range(3):
            before, after = ((p[row] - rows.x[row]).numpy() for p in (best, point))
            assert abs(after).max() < 0.5
            windows = explained(before, after, threat, side)
            assert windows
            seen.update(windows)
        best = point
    assert len(seen) > 3


@pytest.mark.parametrize("threat", [L2(0.4), L1(0.7)])
def test_windows_in_l2_and_l1_are_never_smaller_than_three(threat: ThreatModel) -> None:
    rows = grey(200, 1, 9, 12)
    empty = rows.x.clone()  # nothing spent so far: the whole budget goes into the first window
    delta = propose(Square(queries=9000), rows, threat, 8500, empty)["point"] - rows.x
    spent = delta != 0
    assert spent.any(1).any(2).sum(1).eq(3).all()
    assert spent.any(1).any(1).sum(1).eq(3).all()
    assert (threat.length(delta) - threat.epsilon).abs().max() < 1e-5
    high, wide = (spent.any(1).any(axis).double().argmax(1) for axis in (2, 1))
    for corner, places in ((high, 6), (wide, 9)):
        counts = torch.bincount(corner)
        assert len(counts) == places
        assert (counts - 200 / places).abs().max() < 4.5 * math.sqrt(200 / places)


def test_orientation_and_signs_of_the_bumps() -> None:
    rows = grey(200, 2, 9, 12)
    delta = propose(Square(queries=9000), rows, L2(0.4), 8500, rows.x)["point"] - rows.x
    windows = delta[delta != 0].view(200, 2, 3, 3).sign()
    upright = windows[:, :, 0].sum(2).abs().eq(3)  # the upper bump is one row of pixels
    assert torch.equal(upright[:, 0], upright[:, 1])
    assert 0.35 < upright.double().mean() < 0.65
    corner = windows[:, :, 0, 0]
    assert corner.mean(0).abs().max() < 0.25
    assert (corner[:, 0] * corner[:, 1]).mean().abs() < 0.25


def test_the_settings_of_autoattack() -> None:
    attack = Square()
    assert (attack.queries, attack.first_share, attack.rescale, attack.restarts) == (5000, 0.8, False, 1)
