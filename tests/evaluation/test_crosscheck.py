"""The evaluation's attacks against independent implementations, where these are installed, with equal settings.

foolbox and ART come with the extra `crosscheck`. torchattacks is used where it happens to be importable: it pins old
versions of other packages, so that no extra can ask for it. docs/crosscheck.md has the measured tables.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import small_network
from holdfast.attacks.apgd import APGD
from holdfast.attacks.iterative import IterativeGradient
from holdfast.attacks.pgd import PGD
from holdfast.attacks.stepwise import likely_targets
from holdfast.errors import HoldfastError
from holdfast.evaluation.statistics import difference_interval
from holdfast.forward import Batch, View
from holdfast.functional import cross_entropy
from holdfast.threat import L2, Linf, ThreatModel

MISSING = {
    "foolbox": "foolbox is missing: pip install holdfast[crosscheck]",
    "art": "ART is missing: pip install holdfast[crosscheck]",
    "torchattacks": "torchattacks is missing: put it on PYTHONPATH (it pins old versions of its requirements)",
}
THREATS = [Linf(0.06), L2(0.45)]  # about half of the images survive PGD


def _script() -> ModuleType:
    """benchmarks/crosscheck.py."""
    file = Path(__file__).parents[2] / "benchmarks" / "crosscheck.py"
    spec = importlib.util.spec_from_file_location("crosscheck", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


crosscheck = _script()


@contextmanager
def _quiet() -> Iterator[None]:
    """These libraries use what their own dependencies have deprecated, when they are imported and when they run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextmanager
def _double_precision() -> Iterator[None]:
    """New tensors are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def require(library: str) -> Any:
    """The library, or the test is skipped."""
    with _quiet():
        return pytest.importorskip(library, reason=MISSING[library])


def case(
    threat: ThreatModel, *, rows: int = 250, dtype: torch.dtype = torch.float32, low: float = 0.0, high: float = 1.0
) -> Any:
    """A small network and images that it classifies correctly, with pixels in [low, high]."""
    generator = torch.Generator().manual_seed(3)
    x = low + (high - low) * torch.rand(rows, 1, 8, 8, generator=generator, dtype=torch.float64)
    model = small_network(norm=False, dtype=dtype).eval().requires_grad_(False)
    x = x.to(dtype)
    return crosscheck.Case(model, x, model(x).argmax(1), threat, 20, rows)


def trained_on_points(found: Any) -> Tensor:
    """Where the PGD of adversarial training ends."""
    attack = PGD(steps=crosscheck.PGD_STEPS, random_start=False)
    batch = Batch(found.x, found.y, None, torch.arange(len(found.y)))
    return attack(View(found.model), batch, lambda f: cross_entropy(f, found.y), threat=found.threat).x_adv


@pytest.mark.parametrize("library", ["foolbox", "art", "torchattacks"])
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_what_pgd_of_others_breaks_is_broken_here(
    library: str, threat: ThreatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any point of theirs; counted both ways, because nothing is to be found here that they do not visit.

    Few steps: with many, both sides would have settled long before the end, and a step too few would not show.
    ART clamps to the pixel bounds before it projects (L2), where the others do it after: it gets images far from them.
    """
    require(library)
    monkeypatch.setattr(crosscheck, "PGD_STEPS", 5)
    far = 0.25 if (library, threat.norm) == ("art", "L2") else 0.0
    found = case(threat, low=far, high=1 - far)
    own = [crosscheck.ours(found, "pgd", 0)]
    assert 60 < int(own[0].sum()) < 190
    with _quiet():
        told = crosscheck.compare(found, "pgd", library, own, found.x)
    assert told["only_theirs_broke"][0] <= 1
    assert told["only_ours_broke"][0] <= 1
    assert told["robust_theirs_returned"][0] >= told["robust_theirs"][0]
    assert told["outside_the_ball"] == 0


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_pgd_ends_where_that_of_foolbox_ends(threat: ThreatModel) -> None:
    """In double precision, pixel bounds reached: the attack of the evaluation and that of training."""
    require("foolbox")
    found = case(threat, rows=100, dtype=torch.float64)
    with _quiet():
        theirs = crosscheck.by_foolbox(found.model, found, "pgd", 0)
    ours = crosscheck.unstopped(found, IterativeGradient(steps=50, random_start=False), 50)["point"]
    assert (theirs == 0).any()
    assert (theirs == 1).any()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    torch.testing.assert_close(trained_on_points(found), theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_pgd_ends_where_that_of_art_ends(threat: ThreatModel) -> None:
    """In single precision, which is all that ART knows, so that rounding may lead a few images elsewhere.

    Far from the pixel bounds; see the test before the last.
    """
    require("art")
    found = case(threat, rows=100, low=0.46, high=0.54)
    with _quiet():
        theirs = crosscheck.by_art(found.model, found, "pgd", 0)
    ours = crosscheck.unstopped(found, IterativeGradient(steps=50, random_start=False), 50)["point"]
    for points in (ours, trained_on_points(found)):
        apart = (points - theirs).abs().flatten(1).amax(1)
        assert int((apart > 1e-5).sum()) <= 2


@pytest.mark.parametrize("objective", ["ce", "dlr", "targeted_dlr"])
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_apgd_takes_the_steps_of_torchattacks_from_the_same_start(
    objective: Any, threat: ThreatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Best loss and best point after 100 steps in double precision, all checkpoints and halvings between."""
    torchattacks = require("torchattacks")
    found = case(threat, rows=40, dtype=torch.float64, low=0.46, high=0.54)  # no start is clamped: it can be given
    targets = 3 if objective == "targeted_dlr" else 0
    target = likely_targets(found.model(found.x), found.y, targets)[:, -1] if targets else None
    attack = APGD(objective=objective, targets=targets)
    start = crosscheck.unstopped(found, attack, 0, target)["point"]
    own = {"eps": threat.epsilon, "norm": threat.norm, "steps": 100}
    if targets:
        theirs = torchattacks.APGDT(found.model, **own)
        theirs.target_class = targets + 1
        if threat.norm == "L2":  # there it takes the first image's step size for all: one image at a time, then
            found = found._replace(x=found.x[:1], y=found.y[:1])
            start, target = start[:1], None if target is None else target[:1]
    else:
        theirs = torchattacks.APGD(found.model, loss=objective, **own)
    noise = (start - found.x) / threat.epsilon
    monkeypatch.setattr(torch, "rand", lambda shape: (noise + 1) / 2)
    monkeypatch.setattr(torch, "randn", lambda shape: noise)
    with _double_precision():  # else it compares its losses in single precision
        best, _, loss, _ = theirs.attack_single_run(found.x, found.y)
    state = crosscheck.unstopped(found, attack, attack.steps + 1, target)
    torch.testing.assert_close(state["best_loss"], loss, rtol=0, atol=1e-9)
    torch.testing.assert_close(state["best"], best, rtol=0, atol=1e-7)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_fab_breaks_what_that_of_torchattacks_breaks(threat: ThreatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """All four targets, few steps, at a radius at which about half of the images survive."""
    require("torchattacks")
    monkeypatch.setattr(crosscheck, "STEPS", 15)
    found = case(threat, rows=60)
    own = [crosscheck.ours(found, "fab-t", 0)]
    assert 10 < int(own[0].sum()) < 50
    told = crosscheck.compare(found, "fab-t", "torchattacks", own, None)
    assert told["only_theirs_broke"] == [0]


def test_a_library_is_believed_only_inside_the_ball() -> None:
    """A misclassified point outside of it is counted, and breaks nothing; one inside breaks its image."""
    found = case(Linf(0.06), rows=3)
    ours = found.model(found.x).argmax(1)
    found = found._replace(y=ours.clone().index_fill_(0, torch.tensor([0, 1]), 9))  # 0 and 1 are misclassified
    points = found.x.clone()
    points[0] = (points[0] + 0.5) % 1
    robust, outside = crosscheck.judged(found, points)
    assert robust.tolist() == [True, False, True]
    assert outside == 1


def test_every_point_that_is_visited_counts() -> None:
    """Not only the last one; points outside the ball do not."""
    found = case(Linf(0.06), rows=2)
    found = found._replace(y=found.y + 1, model=nn.Sequential(found.model))
    noting = crosscheck.Visits(found).eval()
    noting((found.x + 0.5) % 1)
    assert noting.broken.tolist() == [False, False]
    points = found.x.clone()
    points[1] = (points[1] + 0.5) % 1
    noting(points)
    noting((found.x + 0.5) % 1)
    assert noting.broken.tolist() == [True, False]


class Bright(nn.Module):
    """Class 1 where the mean is above one half, else class 0."""

    def forward(self, x: Tensor) -> Tensor:
        above = x.flatten(1).mean(1) - 0.5
        return torch.stack([-above, above], 1)


def test_a_comparison_counts_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four images a library breaks one on its way, returns one broken, leaves the ball with one, fails on one."""

    def library(model: nn.Module, found: Any, name: str, seed: int) -> Tensor:
        on_the_way, returned = found.x.clone(), found.x.clone()
        on_the_way[0] += 0.05
        returned[1] += 0.05
        returned[2] += 0.5
        model(on_the_way)
        return returned

    monkeypatch.setitem(crosscheck.THEIRS, "foolbox", library)
    x = torch.full((4, 1, 2, 2), 0.48)
    found = crosscheck.Case(Bright(), x, torch.zeros(4).long(), Linf(0.06), 20, 10)
    own = torch.tensor([True, False, False, True])
    told = crosscheck.compare(found, "pgd", "foolbox", [own], x)
    assert (told["robust_ours"], told["robust_theirs"], told["robust_theirs_returned"]) == ([2], [2], [3])
    assert (told["only_theirs_broke"], told["only_ours_broke"]) == ([1], [1])
    assert (told["outside_the_ball"], told["same_end_point"], told["not_weaker"]) == (1, 2, True)
    assert told["interval_in_images"] == pytest.approx([10 * bound for bound in difference_interval(1, 1, 10)])
    assert told["interval_contains_zero"]
    weak = crosscheck.compare(found, "pgd", "foolbox", [own | True], x)
    assert (weak["difference_in_images"], weak["not_weaker"]) == (2, False)
    several = crosscheck.compare(found, "square", "foolbox", [own, own | True], None)
    assert (several["robust_theirs"], several["difference_in_images"]) == ([3, 3], 0)


def test_interval_of_several_seeds() -> None:
    """That of one seed is the evaluation's own; halves of images count as halves."""
    one = [1.0] * 5 + [-1.0] * 2 + [0.0] * 93
    assert crosscheck.interval(one) == pytest.approx(difference_interval(5, 2, 100))
    low, high = crosscheck.interval([0.5] * 10 + [0.0] * 90)
    assert low < 0.05 * 100 / 102 < high
    assert high - low < difference_interval(10, 0, 100)[1] - difference_interval(10, 0, 100)[0]


def test_a_result_is_added_to_its_file_only(tmp_path: Path) -> None:
    """Comparisons of the same network, images and ball stand together; made again, they are replaced."""
    head = {"weights": "a", "images": "b", "norm": "Linf", "epsilon": 0.1, "versions": {"torch": "2"}}
    first = {"attack": "pgd", "with": "foolbox", "n": 1}
    file = tmp_path / "found.json"
    other = {"attack": "square", "with": "torchattacks", "n": 1}
    found = crosscheck.added(file, head, [other, first])
    file.write_text(json.dumps(found))
    again = crosscheck.added(file, {**head, "versions": {"art": "1"}}, [{**first, "n": 2}, {**first, "with": "art"}])
    assert again["compared"] == [{**first, "with": "art"}, {**first, "n": 2}, other]
    assert again["versions"] == {"torch": "2", "art": "1"}
    with pytest.raises(HoldfastError, match="another epsilon: give another --name"):
        crosscheck.added(file, {**head, "epsilon": 0.2}, [])


def test_the_page_shows_what_was_measured() -> None:
    """The tables of docs/crosscheck.md are those of the files, and no file is left out."""
    page = (Path(__file__).parents[2] / "docs" / "crosscheck.md").read_text()
    files = sorted(crosscheck.RESULTS.glob("crosscheck-*.json"))
    assert len(files) >= 3
    for file in files:
        found = json.loads(file.read_text())
        assert crosscheck.table(found) in page, file.name
        if any(one["attack"] == "pgd" for one in found["compared"]):
            assert crosscheck.points(found) in page, file.name
