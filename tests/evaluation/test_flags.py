"""Flags: every broken defence of the zoo raises its own, an honest network raises none that is serious."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from broken_defences import BALL, ZOO, Around, SteepSigmoid, digits, honest_network, probed
from torch import Tensor, nn

from holdfast import L1, L2, Batch, HoldfastError, Linf, View
from holdfast.attacks.pgd import PGD
from holdfast.evaluation.flags import FLAGS, Flag, as_dict, from_rows
from holdfast.evaluation.probes import probe
from holdfast.evaluation.protocols import autoattack
from holdfast.keyed_random import Key
from holdfast.threat import ThreatModel

PAGES = Path(__file__).resolve().parents[2] / "docs" / "flags"


@pytest.fixture
def images() -> Batch:
    """Sixty-four test digits."""
    return digits()


@pytest.fixture
def honest() -> nn.Module:
    """An adversarially trained network, for the test alone."""
    return copy.deepcopy(honest_network(0.15))


# ------------------------------------------------------------------------------------------------------------ the zoo


@pytest.mark.parametrize("name", ZOO)
def test_every_broken_defence_raises_its_flag(name: str, honest: nn.Module, images: Batch) -> None:
    """And says it in one line whose figures are finite and go through JSON."""
    defence = ZOO[name]
    flags = probed(defence.make(honest, images.x), images._replace(x=defence.x(images.x)))
    for flag in defence.flag.split():
        assert flags[flag].severity == defence.severity
    for flag in flags.values():
        assert flag.says
        assert "\n" not in flag.says
        written = json.loads(json.dumps(as_dict(flag), allow_nan=False))
        assert set(written) == {"name", "severity", "says", "values", "page"}


@pytest.mark.parametrize(("place", "name"), list(enumerate(ZOO)))
def test_zoo_at_work_in_other_balls(place: int, name: str, honest: nn.Module, images: Batch) -> None:
    """No probe raises in L2 or L1, nor on a single image; every defence meets one of the three."""
    defence = ZOO[name]
    threat, count = ((L2(0.5), 2), (L1(2 / 3), 2), (BALL, 1 + (name == "batch statistics")))[place % 3]
    few = Batch(defence.x(images.x)[:count], images.y[:count])
    probed(defence.make(honest, images.x), few, threat)


def test_network_that_cannot_run_on_one_image(honest: nn.Module, images: Batch) -> None:
    """Torch itself refuses to normalise one row by itself."""
    model = ZOO["batch statistics"].make(honest, images.x)
    with pytest.raises(HoldfastError, match="cannot run"):
        probed(model, Batch(images.x[:1], images.y[:1]))


@pytest.mark.parametrize("threat", [Linf("8/255"), BALL, L2(0.5), L2("2/1"), L1("4/1"), Linf(0.7)], ids=str)
@pytest.mark.parametrize("within", [0.0, 0.15])
def test_honest_networks_raise_nothing(within: float, threat: ThreatModel, images: Batch) -> None:
    """Plain and adversarially trained: not even a warning."""
    assert probed(honest_network(within), images, threat, seed=1) == {}


def test_honest_network_on_one_image(honest: nn.Module, images: Batch) -> None:
    """Nothing is said either."""
    assert probed(honest, Batch(images.x[:1], images.y[:1])) == {}


def test_honest_variants_raise_nothing(honest: nn.Module, images: Batch) -> None:
    """Log-probabilities, centred logits, float64 weights, logits with an offset, and a network of two classes."""
    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "log-probabilities": lambda z: z.log_softmax(1),
        "centred": lambda z: z - z.mean(1, keepdim=True),
        "offset": lambda z: z + 50,
        "small": lambda z: 1e-3 * z,
    }
    for name, after in variants.items():
        assert probed(Around(honest, after=after).eval(), images) == {}, name
    two = images._replace(y=(images.y >= 5).long())
    grouped = Around(honest, after=lambda z: torch.stack([z[:, :5].logsumexp(1), z[:, 5:].logsumexp(1)], 1))
    assert probed(grouped.eval(), two) == {}
    assert probed(honest.double(), images) == {}


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e-2, 100.0, 1e6, 1e25])
def test_the_scale_of_the_logits_raises_nothing(scale: float, honest: nn.Module, images: Batch) -> None:
    """Under attacks of which one does not depend on it."""
    model = Around(honest, after=lambda z: scale * z).eval()
    assert probe(model, images.x, images.y, BALL, key=Key(0), attacks=autoattack(BALL).attacks) == []


@pytest.mark.parametrize("offset", [50.0, 1e6, -1e6])
def test_an_offset_of_the_logits_raises_nothing(offset: float, honest: nn.Module, images: Batch) -> None:
    """Though the largest rounds them to a sixteenth; nor where they are centred first, and rows have one sum."""
    for before in (lambda z: z, lambda z: z - z.mean(1, keepdim=True)):
        assert probed(Around(honest, after=lambda z, f=before: f(z) + offset).eval(), images) == {}


@pytest.mark.parametrize("threat", [Linf(1 / 255), Linf(8 / 255), BALL], ids=str)
def test_a_network_that_computes_in_bfloat16_raises_nothing(threat: ThreatModel, images: Batch) -> None:
    """Steps whose promise is lost in its rounding are not asked."""

    class Low(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = honest_network(0.15)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, dtype=torch.bfloat16):
                return self.network(x).float()

    assert probed(Low().eval(), images, threat) == {}


# ------------------------------------------------------------------------------------------------------ finished rows


def row(verdict: str = "robust", attack: str | None = None, **other: Any) -> dict[str, Any]:
    """A row of a ledger; passes are of two attacks that ran to their ends."""
    passes = {"APGD-CE": 100, "Square-5000": 5000}
    return {"index": 0, "label": 0, "prediction": 0, "clean_margin": 1.0, "verdict": verdict, "attack": attack,
            "target": None, "restart": 0 if attack else None, "broken_prediction": 1 if attack else None,
            "distance": None, "margin": 1.0, "forward": passes, "backward": {"APGD-CE": 100, "Square-5000": 0},
            "verified": 1, **other}  # fmt: skip


def flags_of(rows: list[dict[str, Any]]) -> dict[str, Flag]:
    return {flag.name: flag for flag in from_rows(rows, threat=BALL)}


@pytest.mark.parametrize(
    "name", ["Square-5000", "Square-1000, 2 restarts", "uniform noise, 100 draws", "transfer from X, PGD-50"]
)
def test_black_box_beats_white_box(name: str) -> None:
    """More than 0.2 points of images is a flag; more than chance breaks, at 1 % of the images left, is serious."""
    passes = {"APGD-CE": 100, name: 5000}
    left, gone = row(forward=passes), row("broken", "APGD-CE", forward={"APGD-CE": 9, name: 0})

    def severity(broken: int, n: int = 1000, easy: int = 0, **other: Any) -> str | None:
        rows = [row("broken", name, **{"forward": passes, **other})] * broken + [left] * (n - broken) + [gone] * easy
        flag = flags_of(rows).get("black-box-beats-white-box")
        assert flag is None or (flag.values["broken"] == broken and name in flag.says and flag.values["left"] == n)
        return None if flag is None else flag.severity

    assert severity(2) is None
    assert severity(3) == "warning"
    assert severity(18) == "warning"
    assert severity(19) == "serious"
    assert severity(3, 50) == "warning"
    assert severity(4, 50) == "serious"
    assert severity(1, 1) == severity(1, 10) == "warning"  # a single image is no reason to forbid a number
    assert severity(2, 10) == "serious"
    assert severity(3, 30, easy=970) == "serious"  # a tenth of the images left, though few of all
    assert severity(2, 10, easy=9990) == "serious"
    assert severity(1, 10, easy=9990) is None
    assert severity(19, backward={"APGD-CE": 19}) == "warning"  # a short search may lose honestly
    assert severity(19, backward={"APGD-CE": 20}) == "serious"
    first = [row("broken", name, forward={name: 9, "APGD-CE": 0})] * 50
    assert flags_of(first + [row(forward={name: 5000, "APGD-CE": 100})] * 950) == {}  # no gradients came before
    assert flags_of([row("broken", name, forward={"APGD-CE": 0, name: 9})] * 50 + [left] * 950) == {}


def test_images_that_a_later_attack_breaks_were_left_too() -> None:
    """In AutoAttack-plus gradients go on after Square."""
    order = {"APGD-CE": 100, "Square-5000": 5000, "APGD-T, 9 targets": 900}
    later = [row("broken", "APGD-T, 9 targets", forward=order)] * 400
    flag = flags_of([row("broken", "Square-5000", forward={**order, "APGD-T, 9 targets": 0})] * 8 + later)
    assert flag["black-box-beats-white-box"].values["left"] == 408
    assert not flag["black-box-beats-white-box"].serious


def test_gradients_that_win_are_no_flag() -> None:
    """Nor are images that were wrong from the beginning."""
    rows = [row("broken", "APGD-CE", forward={"APGD-CE": 9})] * 300 + [row("wrong", forward={}, backward={})] * 300
    assert flags_of([*rows, *[row()] * 400]) == {}


def test_restarts_still_winning() -> None:
    """Only what the last restart broke after the others' passes, of an attack with restarts and without targets."""
    name = "PGD-50, 5 restarts"

    def found(broken: int, **other: Any) -> Flag | None:
        spent = {"verdict": "broken", "attack": name, "restart": 4, "forward": {name: 220}, **other}
        rows = [{**row(), **spent}] * broken + [{**row(), "forward": {name: 255}}] * (1000 - broken)
        return flags_of(rows).get("restarts-still-winning")

    assert found(2) is None
    for broken, severity in ((3, "warning"), (11, "serious")):
        flag = found(broken)
        assert flag is not None
        assert (flag.severity, flag.values["broken"], flag.values["restarts"]) == (severity, broken, 5)
    assert found(50, restart=3) is None
    assert found(50, forward={name: 203}) is None  # side by side: the last was only the first to arrive
    assert found(50, forward={name: 204}) is not None
    assert found(50, attack="Square-5000") is None


def test_few_images() -> None:
    """The interval's half width, to either side of five points."""

    def found(robust: int, n: int) -> Flag | None:
        return flags_of([row()] * robust + [row("wrong", forward={}, backward={})] * (n - robust)).get("few-images")

    assert found(190, 380) is not None
    assert found(191, 382) is None
    assert found(0, 100) is None
    flag = found(32, 64)
    assert flag is not None
    assert flag.severity == "warning"
    assert flag.values["needed"] == 381
    assert flags_of([])["few-images"].values["half_width"] == 0.5


def test_square_beats_gradients_on_a_masked_network(honest: nn.Module, images: Batch) -> None:
    """With a real PGD and a real random search of corners, told by the rows they leave; and not on the honest one."""

    def rows_of(model: nn.Module) -> list[dict[str, Any]]:
        view, attack = View(model), PGD(steps=20, early_stop=0)
        with torch.no_grad():
            clean = view(images.x).logits.argmax(1) == images.y
        loss = lambda logits: F.cross_entropy(logits, images.y, reduction="none")  # noqa: E731
        x_adv = attack(view, images, loss, threat=BALL).x_adv
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            left = clean & (view(x_adv).logits.argmax(1) == images.y)
            found = torch.zeros_like(left)
            for _ in range(60):
                corner = (torch.rand(64, 1, 8, 8, generator=generator) < 0.5).float() * 2 - 1
                x = BALL.project(images.x + BALL.epsilon * corner, images.x)
                found |= view(x).logits.argmax(1) != images.y
        passes = {"forward": {"PGD-20": 20, "Square-60": 60}, "backward": {"PGD-20": 20, "Square-60": 0}}
        verdict = lambda i: "wrong" if not clean[i] else "robust" if left[i] and not found[i] else "broken"  # noqa: E731
        return [row(verdict(i), "Square-60" if left[i] and found[i] else None, **passes) for i in range(64)]

    assert flags_of(rows_of(SteepSigmoid(honest, steepness=300.0)))["black-box-beats-white-box"].serious
    assert "black-box-beats-white-box" not in flags_of(rows_of(honest))


# --------------------------------------------------------------------------------------------------------- the table


def test_every_flag_has_a_page_and_every_page_a_flag() -> None:
    """A page says what it means, how it is measured and what to do; the index names all in the table's order."""
    assert {path.stem for path in PAGES.glob("*.md")} - {"README"} == set(FLAGS)
    for name, meaning in FLAGS.items():
        text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        assert text.startswith(f"# {name}\n\n{meaning}\n")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["How it is measured", "What to do"]
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(.*?)\]\((.*?)\.md\)", index, re.MULTILINE) == [(name, name) for name in FLAGS]


def test_every_flag_is_raised_by_something() -> None:
    """By the zoo, by the rows above, or by the searches of test_agreement.py."""
    assert set(FLAGS) - set(" ".join(defence.flag for defence in ZOO.values()).split()) == {
        "black-box-beats-white-box",
        "restarts-still-winning",
        "few-images",
        "search-differs",
    }


def test_flag_refuses_what_is_not_in_the_table() -> None:
    """A name, a severity."""
    with pytest.raises(HoldfastError, match="did you mean zero-gradients"):
        Flag("zero-gradient", "", "serious")
    with pytest.raises(HoldfastError, match="use warning or serious"):
        Flag("few-images", "", "severe")  # type: ignore[arg-type]
