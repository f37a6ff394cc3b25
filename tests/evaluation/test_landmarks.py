"""Points of the ball that the deciding network is asked about first and again at the end: answers, slopes, edges."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from odd_networks import BALL, PGD, digits, honest
from torch import Tensor, nn

from holdfast import L1, L2, Linf, evaluate
from holdfast.attacks.square import Square
from holdfast.evaluation import probes
from holdfast.evaluation import sight as sights
from holdfast.evaluation.landmarks import ROUNDING, STEPS, Landmarks
from holdfast.evaluation.protocols import of_attacks
from holdfast.evaluation.result import Result
from holdfast.evaluation.sight import Sight, flags_of, from_dict, together
from holdfast.evaluation.watch import Watch
from holdfast.keyed_random import Key
from holdfast.threat import ThreatModel

QUICK = of_attacks([Square(queries=3)])


@pytest.fixture
def without_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is probed before the search."""
    monkeypatch.setattr(probes, "probe", lambda *_, **__: [])


def landmarks(network: Callable[[Tensor], Tensor], x: Tensor, threat: ThreatModel = BALL) -> Landmarks:
    with torch.no_grad():
        return Landmarks(network, x, threat, Key(1))


def gradient_of(network: Callable[[Tensor], Tensor], marks: Landmarks) -> Callable[[Tensor], Tensor]:
    """The right gradient."""

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.detach().clone().requires_grad_(True)
            return torch.autograd.grad((network(point) * marks.weights).sum(), point)[0]

    return gradient


def images(count: int = 8) -> Tensor:
    return digits(count)[0]


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("threat", [Linf(8 / 255), L2(1 / 2), L1(1.0)], ids=str)
def test_points_lie_in_the_ball_and_differ_from_the_images(threat: ThreatModel) -> None:
    marks = landmarks(honest(), images(), threat)
    assert bool(threat.contains(marks.points, images()).all())
    assert bool((marks.points != images()).flatten(1).any(1).all())
    if threat.norm == "Linf":  # every second point lies on the surface, where attacks end
        moved = (marks.points - images()).abs()
        moved = torch.where((marks.points > 0) & (marks.points < 1), moved, 1.0).flatten(1).amin(1)
        assert ((moved - threat.epsilon).abs() < 1e-6).tolist() == [False, True] * 4
    assert torch.equal(marks.points, landmarks(honest(), images(), threat).points)
    assert marks.weights.shape == marks.logits.shape == (8, 10)


def test_changed_names_the_points_that_are_answered_otherwise() -> None:
    answers = torch.randn(4, 10)
    marks = landmarks(lambda x: answers, images(4))
    assert marks.changed(lambda x: answers + 5, 0.01).tolist() == [False] * 4  # an offset changes nothing
    other = answers.clone()
    other[2, 3] += answers[2].abs().max()
    assert marks.changed(lambda x: other, 0.01).tolist() == [False, False, True, False]


# -------------------------------------------------------------------------------------------------------------- slopes


def test_slopes_are_central_differences_of_the_weighted_logits() -> None:
    """A quadratic: central differences are exact whatever the step; its gradient is spoilt by hand."""
    matrix, bend = torch.randn(64, 10, dtype=torch.float64), torch.randn(64, 10, dtype=torch.float64)

    def network(x: Tensor) -> Tensor:
        return x.flatten(1) @ matrix + x.flatten(1).square() @ bend

    marks = landmarks(network, images().double())
    right = gradient_of(network, marks)
    found = marks.slopes(network, right, halves=False)
    assert found.cosine == pytest.approx(1.0, abs=1e-6)
    assert found.rows == 8
    assert found.forward == 2 * 6 * 8  # the first step convinces
    turned = marks.slopes(network, lambda x: -right(x), halves=False)
    assert turned.cosine == pytest.approx(-1.0, abs=1e-6)
    assert turned.forward == 2 * 6 * 8 * len(STEPS)
    # every row counts alike, however long its gradient: half of them turned round leave nothing
    sign = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64).view(-1, 1, 1, 1)
    assert marks.slopes(network, lambda x: sign * right(x), halves=False).cosine == pytest.approx(0.0, abs=1e-6)
    scale = torch.logspace(-3, 3, 8, dtype=torch.float64).view(-1, 1, 1, 1)
    unequal = marks.slopes(lambda x: scale.view(-1, 1) * network(x), lambda x: sign * scale * right(x), halves=False)
    assert unequal.cosine == pytest.approx(0.0, abs=1e-6)


def test_a_gradient_of_zero_has_no_slope_and_one_of_other_length_has_less() -> None:
    marks = landmarks(honest(), images())
    with torch.no_grad():
        right = gradient_of(honest(), marks)
        assert marks.slopes(honest(), right, halves=False).cosine > 0.95
        assert marks.slopes(honest(), torch.zeros_like, halves=False).cosine == 0
        assert marks.slopes(honest(), lambda x: right(x).flip(2, 3), halves=False).cosine < 0.5


def test_points_near_the_edges_are_moved_inside_so_that_no_step_leaves_the_pixel_range() -> None:
    asked: list[Tensor] = []

    def network(x: Tensor) -> Tensor:
        asked.append(x)
        return x.flatten(1)[:, :10]

    x = torch.zeros(2, 1, 8, 8)
    x[1] = 1
    marks = landmarks(network, x, Linf(1 / 255))
    marks.slopes(network, torch.zeros_like, halves=False)
    assert len(asked) == 1 + 2 * 6 * len(STEPS)
    assert min(float(each.min()) for each in asked) >= 0
    assert max(float(each.max()) for each in asked) <= 1 + 1e-6


def test_changes_within_rounding_are_not_compared() -> None:
    """A large offset leaves no figure for the change in float32; the offset of a single row leaves the others."""

    def network(x: Tensor, offset: Tensor) -> Tensor:
        return 0.1 * x.flatten(1)[:, :10] + offset

    x, none = images().clamp(0.2, 0.8), torch.zeros(8, 1)
    marks = landmarks(lambda x: network(x, none), x)
    assert marks.slopes(lambda x: network(x, none), torch.zeros_like, halves=False).rows == 8
    far = torch.full((8, 1), 1e6)
    assert marks.slopes(lambda x: network(x, far), torch.zeros_like, halves=False)[:2] == (1.0, 0)
    far[:5] = 0
    assert marks.slopes(lambda x: network(x, far), torch.zeros_like, halves=False)[:2] == (0.0, 5)
    far[1:] = 1e6  # a single row is not enough to say anything
    assert marks.slopes(lambda x: network(x, far), torch.zeros_like, halves=False)[:2] == (1.0, 0)
    assert ROUNDING * 1e6 > 1


def test_a_row_that_is_not_finite_is_not_compared() -> None:
    marks = landmarks(honest(), images())
    right = gradient_of(honest(), marks)

    def some_nan(x: Tensor) -> Tensor:
        gradient = right(x)
        gradient[3] = torch.nan
        return gradient

    with torch.no_grad():
        found = marks.slopes(honest(), some_nan, halves=False)
    assert found.rows == 7
    assert found.cosine > 0.95


def test_where_short_steps_are_rounded_away_a_long_one_is_taken() -> None:
    """A step that shows no change must not convince: in 16 bits a gradient turned round hid behind it."""

    def network(x: Tensor) -> Tensor:  # levels of 1/128, as 16 bits have them below 1
        return (x.flatten(1)[:, :10] * 128).round() / 128

    x = images().clamp(0.1, 0.7)
    marks = landmarks(network, x, Linf(1 / 255))
    # what the weights promise per pixel, turned round
    wrong = torch.zeros(8, 64)
    wrong[:, :10] = -marks.weights
    found = marks.slopes(network, lambda x: wrong.view_as(x), halves=True)
    assert found.rows >= 2
    assert found.cosine < -0.5


def test_a_max_pooling_on_a_black_background_is_honest() -> None:
    """Its kinks lie closer together than a long step: a short one decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(49, 10)).double().eval()
    x = torch.zeros(8, 1, 28, 28, dtype=torch.float64)
    x[..., 12:15, 12:15] = 0.5
    for threat in (Linf(1 / 255), L2(1 / 20), Linf(0.0)):
        marks = landmarks(network, x, threat)
        with torch.no_grad():
            found = marks.slopes(network, gradient_of(network, marks), halves=False)
        assert found.cosine > sights.SLOPE, threat


@pytest.mark.parametrize("threat", [Linf(1 / 2550), L2(1 / 200), L1(1 / 100), L1(1.0)], ids=str)
def test_a_max_pooling_whose_largest_pixels_are_nearly_black_loses_no_gradient(threat: ThreatModel) -> None:
    """Raising all dark pixels to one level would tie them, and hand the gradient to another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(49, 10)).eval()
    marks = landmarks(network, torch.zeros(8, 1, 28, 28), threat)
    assert float(marks.edges(gradient_of(network, marks)).max()) < 0.01


# --------------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize(
    ("first", "lost"),
    [(nn.Identity(), False), (nn.Hardtanh(0.0, 1.0), True), (nn.ReLU6(), True), (nn.Hardtanh(-1.0, 2.0), False)],
    ids=["identity", "flat beyond 0 and 1", "flat below 0", "flat beyond -1 and 2"],
)
def test_edges_are_pixels_whose_gradient_is_lost_at_zero_or_one(first: nn.Module, *, lost: bool) -> None:
    network = nn.Sequential(first, copy.deepcopy(honest())).eval()
    marks = landmarks(network, images())
    share = marks.edges(gradient_of(network, marks))
    assert int((share > 0.3).sum()) >= 4 if lost else bool((share == 0).all())


def test_white_pixels_are_at_the_edge_too() -> None:
    network = nn.Sequential(nn.Hardtanh(-1.0, 1.0), copy.deepcopy(honest())).eval()
    marks = landmarks(network, 1 - images())
    assert int((marks.edges(gradient_of(network, marks)) > 0.3).sum()) >= 4


def test_a_gradient_that_is_zero_inside_too_is_not_an_edge() -> None:
    marks = landmarks(honest(), images())
    assert marks.edges(torch.zeros_like).tolist() == [0.0] * 8


# --------------------------------------------------------------------------------------------------------------- flags


def test_thresholds_of_the_flags() -> None:
    def names(**seen: float) -> list[str]:
        return [flag.name for flag in flags_of(Sight(**seen))]  # type: ignore[arg-type]

    assert names(slope=0.81, slope_rows=8) == []
    assert names(slope=0.79, slope_rows=8) == ["misleading-gradients"]
    assert names(edges=8, edges_apart=2) == []
    assert names(edges=8, edges_apart=3) == ["misleading-gradients"]
    assert names(edges=1, edges_apart=1) == []  # of one point nothing is said
    assert names(again=20, again_apart=1) == []
    assert names(again=20, again_apart=2) == ["search-differs"]
    (flag,) = flags_of(Sight(slope=0.5, slope_rows=8, edges=8, edges_apart=8))
    assert flag.serious
    assert "0.50" in flag.says
    assert "8 of 8" in flag.says


def test_the_least_slope_of_all_units_counts_and_older_folders_lack_it() -> None:
    old = {name: value for name, value in sights.as_dict(Sight(logits=3)).items() if "slope" not in name}
    assert from_dict(old).slope == 1.0
    whole = together([old, sights.as_dict(Sight(slope=0.3, slope_rows=8)), sights.as_dict(Sight(slope=0.9))])
    assert (whole.slope, whole.slope_rows) == (0.3, 8)


# ------------------------------------------------------------------------------------------------------ in evaluations


class Turned(torch.autograd.Function):
    """The identity, whose gradient is turned round."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0].flip(2, 3)


class Wrong(nn.Module):
    """The bare network, whose gradient is wrong whatever way it is asked, so that no comparison shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = copy.deepcopy(honest())

    def forward(self, x: Tensor) -> Tensor:
        return self.network(Turned.apply(x))


class Later(nn.Module):
    """Another function after some calls in the process, of whichever copy, on images that were changed."""

    calls = 0

    images: Tensor

    def __init__(self, start: int) -> None:
        super().__init__()
        self.network, self.start = copy.deepcopy(honest()), start
        self.register_buffer("images", digits(20)[0])

    def forward(self, x: Tensor) -> Tensor:
        Later.calls += 1
        logits = self.network(x)
        if Later.calls < self.start:
            return logits
        changed = torch.cdist(x.detach().flatten(1), self.images.flatten(1)).amin(1) > 0.1
        return torch.where(changed[:, None], logits.roll(1, 1), logits)


def judged(model: nn.Module, attack=PGD, count: int = 20, **own) -> Result:
    return evaluate(model, *digits(count), threat=BALL, attack=attack, **own)


def named(found: Result) -> list[str]:
    return [flag.name for flag in found.flags if flag.serious]


@pytest.mark.usefixtures("without_probes")
def test_a_gradient_that_is_wrong_everywhere_is_told() -> None:
    assert "misleading-gradients" not in named(judged(honest()))
    assert named(judged(Wrong())) == ["misleading-gradients"]
    assert "misleading-gradients" not in named(judged(Wrong(), probe=False))


class WrongAtTheSurface(Wrong):
    """Its gradient is wrong only where a pixel was moved as far as an attack moves it."""

    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("images", digits(20)[0])

    def forward(self, x: Tensor) -> Tensor:
        moved = (x.detach()[:, None] - self.images).abs().flatten(2).amax(2).amin(1)
        return self.network(torch.where((moved > 0.999 * BALL.epsilon).view(-1, 1, 1, 1), Turned.apply(x), x))


@pytest.mark.usefixtures("without_probes")
def test_a_gradient_that_is_wrong_only_where_attacks_end_is_told() -> None:
    assert named(judged(WrongAtTheSurface())) == ["misleading-gradients"]


@pytest.mark.usefixtures("without_probes")
def test_small_units_do_not_ask_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in eight images and after the last unit; one image alone says nothing of slopes."""
    asked: list[int] = []
    revisit = Watch._revisit
    monkeypatch.setattr(Watch, "_revisit", lambda *given: (asked.append(1), revisit(*given)))
    judged(honest(), QUICK, unit=1)
    assert len(asked) == 3
    judged(honest(), QUICK, unit=20)
    assert len(asked) == 4
    found = judged(honest(), QUICK, count=1)
    assert len(asked) == 5
    assert found.summary["passes"]["checking"] < 97


@pytest.mark.usefixtures("without_probes")
def test_a_first_layer_that_is_flat_at_the_edges_is_told() -> None:
    found = judged(nn.Sequential(nn.Hardtanh(0.0, 1.0), copy.deepcopy(honest())).eval())
    assert named(found) == ["misleading-gradients"]
    assert "a little inside" in next(flag.says for flag in found.flags if flag.serious)


@pytest.mark.usefixtures("without_probes")
def test_an_answer_at_a_point_of_the_ball_that_changes_is_told() -> None:
    Later.calls = 0
    assert named(judged(Later(10**6), QUICK)) == []
    calls = Later.calls
    Later.calls = 0
    found = judged(Later(calls - 16), QUICK)  # all that follows is asked at the end: the last question
    assert named(found) == ["search-differs"]
    assert "are answered otherwise at the end" in found.flags[0].says


@pytest.mark.usefixtures("without_probes")
def test_what_was_seen_at_the_landmarks_outlives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units that were finished before keep their slopes, though the process that goes on sees none."""
    whole = judged(Wrong(), out=tmp_path / "whole", unit=5)
    assert len(list((tmp_path / "whole" / "units").glob("*.json"))) in (0, 4)

    class Killed(Exception):
        pass

    begin = Watch.begin

    def until_the_third(watch: Watch, unit: int) -> None:
        if unit == 2:
            raise Killed
        begin(watch, unit)

    monkeypatch.setattr(Watch, "begin", until_the_third)
    with pytest.raises(Killed):
        judged(Wrong(), out=tmp_path / "killed", unit=5)
    monkeypatch.setattr(Watch, "begin", begin)
    monkeypatch.setattr(Watch, "_revisit", lambda *_: None)
    found = judged(Wrong(), out=tmp_path / "killed", unit=5)
    assert named(whole) == named(found) == ["misleading-gradients"]
    monkeypatch.undo()
    again = judged(Wrong(), out=tmp_path / "killed", unit=5)  # of a finished one the flags are read
    assert named(again) == ["misleading-gradients"]


@pytest.mark.usefixtures("without_probes")
def test_landmarks_are_the_same_for_every_process_and_change_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Landmarks] = []
    make = Landmarks.__init__

    def kept(marks: Landmarks, *given) -> None:
        make(marks, *given)
        seen.append(marks)

    monkeypatch.setattr(Landmarks, "__init__", kept)
    with_them = judged(honest())
    judged(honest(), unit=5)
    assert len(seen) == 2  # once an evaluation, not once a unit
    assert torch.equal(seen[0].points, seen[1].points)
    without = judged(honest(), probe=False)
    assert len(seen) == 2
    columns = ("verdict", "attack", "forward", "backward", "margin")
    assert [[r[k] for k in columns] for r in with_them.rows] == [[r[k] for k in columns] for r in without.rows]


# ------------------------------------------------------------------------------------ batches, at points of the ball


class LeansOnOthers(nn.Module):
    """Mixes what the rest of the batch says into the answer, only where an image was changed."""

    images: Tensor

    def __init__(self, changed_by: float) -> None:
        super().__init__()
        self.network, self.changed_by = copy.deepcopy(honest()), changed_by
        self.register_buffer("images", digits(100)[0])

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        changed = torch.cdist(x.detach().flatten(1), self.images.flatten(1)).amin(1) > self.changed_by
        return torch.where(changed[:, None], logits + logits.mean(0), logits)


def test_batches_are_compared_at_random_points_too() -> None:
    x, y = digits(20)

    def found(model: nn.Module) -> list[probes.Flag]:
        every = probes.probe(model, x, y, BALL, key=Key(0))
        return [flag for flag in every if flag.name == "batch-dependent"]

    assert found(copy.deepcopy(honest())) == []
    (flag,) = found(LeansOnOthers(0.1))
    assert "random points of the ball" in flag.says
    (flag,) = found(LeansOnOthers(-1.0))
    assert " images differ" in flag.says
