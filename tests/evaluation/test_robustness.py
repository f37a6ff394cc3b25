"""The evaluation as a whole: verdicts, passes, kills, processes, and that nothing is changed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import holdfast
from holdfast.attacks.apgd import APGD
from holdfast.attacks.fab import FAB
from holdfast.attacks.iterative import IterativeGradient
from holdfast.attacks.square import Square
from holdfast.attacks.stepwise import StepwiseAttack
from holdfast.errors import Damaged, HoldfastError
from holdfast.evaluation.networks import Speed
from holdfast.evaluation.protocols import Options, autoattack, named, of_attacks
from holdfast.evaluation.robustness import Result, evaluate
from holdfast.evaluation.verified import recount
from holdfast.runs.digests import beside
from holdfast.threat import L1, L2, Linf, ThreatModel

EPSILON = 0.15
SHORT = (
    APGD(steps=8),
    APGD(steps=8, objective="targeted_dlr", targets=3),
    FAB(steps=4, targets=3),
    Square(queries=40),
)


def digits(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Test images of the built-in digits."""
    images = holdfast.load_data("digits").test
    return (images.pixels[:count].permute(0, 3, 1, 2).float() / 255), images.labels[:count]


def network(*, seed: int = 0, norm: bool = True) -> nn.Module:
    """A small network that has learned the digits a little."""
    data = holdfast.load_data("digits").train
    x, y = data.pixels.permute(0, 3, 1, 2).float() / 255, data.labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 12, 3, padding=1, stride=2), nn.BatchNorm2d(12) if norm else nn.Identity(), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * 16, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for start in range(0, 1200, 100):
            loss = nn.functional.cross_entropy(model(x[start : start + 100]), y[start : start + 100])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


def short(model: nn.Module, threat: ThreatModel | None = None, count: int = 40, **own) -> Result:
    """All four attacks, a few steps each."""
    own = {"attack": of_attacks(SHORT), "probe": False, "unit": 16, **own}
    return evaluate(model, *digits(count), threat=threat or Linf(EPSILON), **own)


def without_time(rows) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_equal_up_to_rounding(one: Result, other: Result) -> None:
    """All that is counted or decided is the same; floats may differ in how a processor sums in other batches."""
    for row, twin in zip(one.rows, other.rows, strict=True):
        assert row.keys() == twin.keys()
        for key, value in row.items():
            if key != "seconds":
                wanted = pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
                assert twin[key] == wanted, (row["index"], key)


def test_what_is_robust_was_never_broken_and_what_is_broken_is(model: nn.Module, tmp_path: Path) -> None:
    """The saved images alone give the same verdict, in batches of any size, and lie in the ball."""
    found = short(model, out=tmp_path / "e", save_examples=True)
    x, y = digits()
    clean = model(x).argmax(1) == y
    verdicts = [row["verdict"] for row in found.rows]
    assert {"broken", "robust"} <= set(verdicts)
    assert [verdict != "wrong" for verdict in verdicts] == clean.tolist()
    adversarial = found.examples()
    held = model(adversarial).argmax(1) == y
    assert [verdict == "robust" for verdict in verdicts] == (clean & held).tolist()
    assert bool(Linf(EPSILON).contains(adversarial, x).all())
    broken = torch.tensor([verdict == "broken" for verdict in verdicts])
    assert torch.equal(adversarial[~broken], x[~broken])
    again = recount(tmp_path / "e", model)
    assert set(again["robust"].values()) == {again["ledger"]} == {verdicts.count("robust")}
    assert not again["differing"]
    assert found.robust_accuracy == verdicts.count("robust") / 40


def test_a_recount_sees_a_forged_image_and_another_network(model: nn.Module, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    found = short(model, out=tmp_path / "e", save_examples=True)
    with pytest.raises(HoldfastError, match="another network"):
        recount(tmp_path / "e", network(seed=1))
    file = tmp_path / "e" / "examples" / "000000.safetensors"
    whole = load_file(file)
    place = [row["verdict"] for row in found.rows[:16]].index("broken")
    forged = whole["x_adv"].clone()
    forged[place] = whole["x"][place] + 2 * (forged[place] - whole["x"][place])  # outside the ball
    save_file({**whole, "x_adv": forged.clamp(0, 1)}, file)
    with pytest.raises(Damaged, match=r"000000.safetensors was changed or damaged"):
        recount(tmp_path / "e", model)
    beside(file).unlink()  # as someone would who forges it on purpose
    assert recount(tmp_path / "e", model)["differing"] == [found.rows[place]["index"]]


def test_order_and_provenance(model: nn.Module) -> None:
    """An image is attacked only while nothing has broken it; the row says what did, towards which class, how far."""
    found = short(model)
    names = [attack.name for attack in SHORT]
    for row in found.rows:
        ran = [name for name in names if row["forward"][name] > 0]
        if row["verdict"] == "wrong":
            assert ran == []
        elif row["verdict"] == "robust":
            assert ran == names
        else:
            assert ran == names[: names.index(row["attack"]) + 1]
            assert row["distance"] <= EPSILON + 1e-6
            assert row["margin"] <= 0
            assert (row["target"] is not None) == ("targets" in row["attack"])
            assert row["verified"] >= 1
    assert sum(each["broken"] for each in found.summary["attacks"]) == sum(r["verdict"] == "broken" for r in found.rows)


REFERENCE_PASSES = {  # forwards and backwards for an image that stays robust, of the reference code: evaluation.md 1.1
    "APGD-CE": (103, 101),
    "APGD-T, 9 targets": (9 * 102 + 2, 9 * 101),
    "FAB-T, 9 targets": (9 * 203 + 2, 900),
    "Square-500": (503, 0),
}


STAGES = (*autoattack(Linf(0.1)).attacks[:3], Square(queries=500))


@pytest.mark.parametrize("attack", STAGES, ids=lambda attack: attack.name)
def test_no_stage_costs_more_passes_than_the_reference(attack: StepwiseAttack, model: nn.Module) -> None:
    """A network that nothing breaks spends all; the ledger's counts equal the calls that the network really got."""
    calls = {"forward": 0, "backward": 0}

    class Counted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls["forward"] += len(x)
            out = model(x)
            if out.requires_grad:
                out.register_hook(lambda gradient: calls.__setitem__("backward", calls["backward"] + len(gradient)))
            return out

    images = 1 if attack.name.startswith("Square") else 3
    x = digits(images)[0]
    y = model(x).argmax(1)
    result = evaluate(
        Counted(), x, y, threat=Linf(1e-4), attack=of_attacks([attack]), probe=False, speed=Speed(fold=False)
    )
    forward, backward = REFERENCE_PASSES[attack.name]
    row = result.rows[0]
    assert [row["verdict"] for row in result.rows] == ["robust"] * images
    assert 0.9 * forward < row["forward"][attack.name] <= forward
    assert 0.9 * backward <= row["backward"][attack.name] <= backward
    spent = sum(row["forward"][attack.name] for row in result.rows)
    beside = 17 * images  # clean prediction, the last look, and what is tried on the first eight images of all
    assert spent <= calls["forward"] <= spent + beside
    assert 0 <= calls["backward"] - sum(row["backward"][attack.name] for row in result.rows) <= 4 * images


def test_images_that_break_cost_less_than_the_reference_on_average(model: nn.Module) -> None:
    """Targets of one image run beside each other, which may not cost more than stopping early saves."""
    attacks = (APGD(), APGD(objective="targeted_dlr", targets=9))
    found = short(model, attack=of_attacks(attacks), threat=Linf(0.1), count=60, unit=60)
    left = [row for row in found.rows if row["verdict"] != "wrong"]
    for attack in attacks:
        ran = [row for row in left if row["forward"][attack.name] > 0]
        reference = 0
        for row in ran:  # the reference runs a hit to the end of its target
            targets = 9 if attack.targets else 1
            if row["attack"] == attack.name and attack.targets:
                order = model(digits(60)[0])[[r["index"] for r in found.rows].index(row["index"])].argsort(
                    descending=True
                )
                targets = order.tolist().index(row["target"])
            reference += targets * 102
        assert sum(row["forward"][attack.name] for row in ran) <= reference


@pytest.mark.parametrize("batch_size", [1, 17])
def test_batch_size_changes_no_verdict(model: nn.Module, batch_size: int) -> None:
    one = short(model, speed=Speed(batch_size=250))
    other = short(model, speed=Speed(batch_size=batch_size))
    differing = [a["index"] for a, b in zip(one.rows, other.rows, strict=True) if a["verdict"] != b["verdict"]]
    assert len(differing) <= 1
    unstable = {*one.summary["unstable"], *other.summary["unstable"]}
    assert set(differing) <= unstable


def test_low_precision_searches_but_does_not_decide(model: nn.Module) -> None:
    """Every success of a bfloat16 search holds in float32."""
    found = short(model, speed=Speed(precision="bf16"), save_examples=True)
    held = model(found.examples()).argmax(1) == digits()[1]
    assert [row["verdict"] == "robust" for row in found.rows] == held.tolist()
    assert abs(found.robust_accuracy - short(model).robust_accuracy) <= 0.05


def test_a_false_success_is_not_believed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A searching network that calls everything misclassified breaks nothing."""
    from holdfast.evaluation import networks

    def wrong(self, network, x):
        return model(x) * 0 + torch.nn.functional.one_hot((model(x).argmax(1) + 1) % 10, 10)

    monkeypatch.setattr(networks.Searching, "_logits", wrong)
    found = short(model, threat=Linf(1e-4), count=8)
    assert found.robust_accuracy == found.clean_accuracy
    assert sum(row["verified"] for row in found.rows) > 8


def test_nothing_is_changed(model: nn.Module) -> None:
    """Weights, gradients, requires_grad, modes, buffers and the global generator, after an exception too."""
    subject = network(seed=3).train()
    subject[0].eval()
    next(subject.parameters()).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in subject.state_dict().items()}
    modes = [module.training for module in subject.modules()]
    flags = [parameter.requires_grad for parameter in subject.parameters()]
    generator = torch.get_rng_state()
    short(subject, count=12, probe=True)

    class Fails(IterativeGradient):
        def advance(self, *arguments):
            raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        short(subject, count=12, attack=of_attacks([Fails(steps=2)]))
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in subject.modules()] == modes
    assert [parameter.requires_grad for parameter in subject.parameters()] == flags
    assert all(parameter.grad is None for parameter in subject.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in subject.state_dict().items())


def test_the_same_seed_gives_the_same_ledger_and_another_one_does_not(model: nn.Module) -> None:
    one, same, other = short(model), short(model), short(model, seed=5)
    assert without_time(one.rows) == without_time(same.rows)
    assert without_time(one.rows) != without_time(other.rows)


def test_units_do_not_change_verdicts(model: nn.Module) -> None:
    whole, parts = short(model, unit=40), short(model, unit=7)
    assert [row["index"] for row in parts.rows] == [row["index"] for row in whole.rows]
    differing = sum(a["verdict"] != b["verdict"] for a, b in zip(whole.rows, parts.rows, strict=True))
    assert differing <= 1


WORKER = """
import sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from test_robustness import network, short
short(network(), out={out!r}, save_examples=True, count=60, unit=5)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_ledger(model: nn.Module, tmp_path: Path) -> None:
    """SIGKILL at random moments, then the same command: rows and images are those of an undisturbed evaluation."""
    whole = short(model, out=tmp_path / "whole", save_examples=True, count=60, unit=5)
    code = WORKER.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[1])], out=str(tmp_path / "torn"))
    units = tmp_path / "torn" / "units"
    draw = random.Random(0)
    kills = 0
    for wanted in (1, 4, 8):
        process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None and len(list(units.glob("*.jsonl"))) < wanted:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.05))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    assert not (tmp_path / "torn" / "ledger.jsonl").exists()
    short(model, out=tmp_path / "torn", save_examples=True, count=60, unit=5)
    rows = [json.loads(line) for line in (tmp_path / "torn" / "ledger.jsonl").read_text().splitlines()]
    assert without_time(rows) == without_time(whole.rows)
    for file in (tmp_path / "whole" / "examples").iterdir():
        assert file.read_bytes() == (tmp_path / "torn" / "examples" / file.name).read_bytes()


def test_a_finished_evaluation_is_not_run_again(model: nn.Module, tmp_path: Path) -> None:
    first = short(model, out=tmp_path / "e")
    stamp = (tmp_path / "e" / "ledger.jsonl").stat().st_mtime_ns
    second = short(model, out=tmp_path / "e")
    assert (tmp_path / "e" / "ledger.jsonl").stat().st_mtime_ns == stamp
    assert list(second.rows) == list(first.rows)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"threat": Linf(0.1)}, "epsilon"),
        ({"threat": L2(EPSILON)}, "threat"),
        ({"seed": 1}, "seed"),
        ({"count": 39}, "n"),
        ({"unit": 8}, "unit"),
        ({"attack": of_attacks([APGD(steps=9)])}, "attack"),
        ({"attack": of_attacks([APGD(steps=8, rho=0.5), *SHORT[1:]])}, "settings"),
    ],
)
def test_a_ledger_of_something_else_is_refused(model: nn.Module, tmp_path: Path, change: dict, told: str) -> None:
    short(model, out=tmp_path / "e", count=40)
    with pytest.raises(HoldfastError, match=f"holds an evaluation with another {told} "):
        short(model, out=tmp_path / "e", **change)


def test_a_ledger_of_another_network_or_other_images_is_refused(model: nn.Module, tmp_path: Path) -> None:
    short(model, out=tmp_path / "e")
    with pytest.raises(HoldfastError, match="another model"):
        short(network(seed=1), out=tmp_path / "e")
    x, y = digits()
    with pytest.raises(HoldfastError, match="another data"):
        evaluate(
            model,
            x.flip(0),
            y,
            threat=Linf(EPSILON),
            out=tmp_path / "e",
            attack=of_attacks(SHORT),
            probe=False,
            unit=16,
        )


def test_two_cannot_write_one_ledger(model: nn.Module, tmp_path: Path) -> None:
    from holdfast.evaluation.ledger import PROTOCOL
    from holdfast.runs.lock import locked

    short(model, out=tmp_path / "e")
    refused = pytest.raises(HoldfastError, match=r"another process is writing to .*/e: wait for it, or choose")
    with locked(tmp_path / "e", kept_for=PROTOCOL), refused:
        short(model, out=tmp_path / "e")
    short(model, out=tmp_path / "e")


def test_a_curve_never_rises(model: nn.Module) -> None:
    """What a smaller ball broke counts in the larger one, with its example."""
    from holdfast.evaluation.inputs import as_inputs
    from holdfast.evaluation.robustness import Plan

    inputs = as_inputs(model, *digits())
    found: list[Result] = []
    for epsilon in (0.05, 0.1, 0.2):
        plan = Plan(
            model=model,
            inputs=inputs,
            threat=Linf(epsilon),
            protocol=of_attacks([APGD(steps=5)]),
            save_examples=True,
            probe=False,
            unit=16,
            carried=found[-1] if found else None,
        )
        found.append(plan.run())
    robust = [[row["verdict"] == "robust" for row in result.rows] for result in found]
    assert all(not later or earlier for a, b in pairwise(robust) for earlier, later in zip(a, b, strict=True))
    carried = [row for row in found[2].rows if row["carried"]]
    assert {row["carried"] for row in carried} == {0.05, 0.1}
    assert all(sum(row["forward"].values()) == 0 for row in carried)
    first = {row["index"]: row for row in found[0].rows if row["verdict"] == "broken"}
    for row in carried:
        if row["carried"] == 0.05:
            kept = ("margin", "distance", "attack", "target", "restart", "broken_prediction")
            assert {key: row[key] for key in kept} == {key: first[row["index"]][key] for key in kept}
    held = model(found[2].examples()).argmax(1) == digits()[1]
    assert [row["verdict"] == "robust" for row in found[2].rows] == held.tolist()


def test_distances(model: nn.Module) -> None:
    """Minimum-norm attacks go on to the nearest example; within epsilon they stop at the first."""
    nearest = short(model, attack=named("fab-t", Linf(EPSILON), Options(steps=20), distances=True), save_examples=True)
    x, y = digits()
    examples = nearest.examples()
    for place, row in enumerate(nearest.rows):
        if row["verdict"] == "broken":
            assert row["distance"] == pytest.approx(float((examples[place] - x[place]).abs().max()), abs=1e-7)
    assert bool((model(examples).argmax(1) != y).all())
    within = short(model, attack=of_attacks([FAB(steps=20, targets=9)]))
    for one, two in zip(nearest.rows, within.rows, strict=True):
        if two["verdict"] == "broken":
            assert one["distance"] <= two["distance"] + 1e-6
    with pytest.raises(HoldfastError, match="only minimum-norm attacks have distances"):
        named("pgd", Linf(0.1), distances=True)


@pytest.mark.parametrize("threat", [Linf(0.1), L2("1/1"), L1("6/1")], ids=str)
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_versions_have_the_attacks_of_the_reference(threat: ThreatModel, version: str) -> None:
    """evaluation.md 1.1: attacks, order, iterations, restarts, targets, passes a gradient."""
    made = autoattack(threat, version)
    told = [(a.name.partition(",")[0], a.restarts, a.targets, a.average) for a in made.attacks]
    sparse = threat.norm == "L1"
    expected = {
        "standard": [
            ("APGD-CE", 5 if sparse else 1, 0, 1),
            ("APGD-T", 1, 5 if sparse else 9, 1),
            ("FAB-T", 1, 9, 1),
            ("Square-5000", 1, 0, 1),
        ],
        "plus": [
            ("APGD-CE", 5, 0, 1),
            ("APGD-DLR", 5, 0, 1),
            ("FAB", 5, 0, 1),
            ("Square-5000", 1, 0, 1),
            ("APGD-T", 1, 9, 1),
            ("FAB-T", 1, 9, 1),
        ],
        "rand": [("APGD-CE", 1, 0, 20), ("APGD-DLR", 1, 0, 20)],
    }
    assert told == expected[version]
    for attack in made.attacks:
        steps = {"Square": "queries"}.get(type(attack).__name__, "steps")
        assert getattr(attack, steps) == {"queries": 5000, "steps": 100}[steps]
        if type(attack).__name__ == "APGDL1":
            assert attack.large_radii == (version == "standard")
    assert made.at_end == (version == "rand")


def test_a_randomised_model_is_looked_at_once_at_the_end(model: nn.Module) -> None:
    """AutoAttack-rand: the last misclassified point of a row is run once more; only that decides."""

    class Draws(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return model(x + 0.05 * torch.randn_like(x))

    from dataclasses import replace

    protocol = autoattack(Linf(EPSILON), "rand")
    quickly = replace(protocol, attacks=tuple(replace(attack, steps=5, average=3) for attack in protocol.attacks))
    found = short(Draws(), attack=quickly, count=12)
    again = short(Draws(), attack=quickly, count=12)
    assert without_time(found.rows) == without_time(again.rows)
    for row in found.rows:
        if row["verdict"] != "wrong":
            assert row["verified"] <= 2
            assert row["forward"]["APGD-CE-5, 3 passes a gradient"] == 18
            assert row["backward"]["APGD-CE-5, 3 passes a gradient"] == 18


@pytest.mark.parametrize("threat", [Linf(0.1), L2("1/2"), L1("4/1")], ids=str)
@pytest.mark.parametrize(("classes", "shape"), [(2, (1, 8, 8)), (3, (3, 6, 9)), (10, (1, 7, 5)), (1000, (3, 8, 8))])
def test_any_number_of_classes_and_shape(threat: ThreatModel, classes: int, shape: tuple[int, int, int]) -> None:
    """Two, three and a thousand classes; grey and RGB; images that are not square; a last batch of one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
        x = torch.rand(5, *shape)
    y = model(x).argmax(1)
    attacks = [FAB(steps=2, targets=9), Square(queries=5)]
    sparse = threat.norm == "L1"
    from holdfast.evaluation.protocols import apgd

    attacks += [apgd(threat, "ce"), apgd(threat, "dlr"), apgd(threat, "targeted_dlr", targets=9)]
    attacks += [] if sparse else list(named("pgd,mim,multitargeted", threat, Options(steps=3)).attacks)
    found = evaluate(
        model, x, y, threat=threat, attack=of_attacks(attacks), probe=False, speed=Speed(batch_size=4), unit=4
    )
    assert found.clean_accuracy == 1
    assert found.summary["n"] == 5


def test_three_lines_of_python(model: nn.Module) -> None:
    """Tensors, uint8 tensors, a split of a data set, and a DataLoader give the same."""
    x, y = digits(12)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5)
    own = {"threat": Linf(EPSILON), "attack": of_attacks([APGD(steps=4)]), "probe": False}
    whole = holdfast.evaluate(model, x, y, **own)
    split = holdfast.load_data("digits").test.subset(torch.arange(12))
    bytes_ = (x * 255).round().to(torch.uint8)
    for found in (
        holdfast.evaluate(model, loader, **own),
        holdfast.evaluate(model, split, **own),
        holdfast.evaluate(model, bytes_, y, **own),
    ):
        assert_equal_up_to_rounding(found, whole)
    few = holdfast.evaluate(model, x, y, n=5, **own)
    assert len(few.rows) == 5
    assert {row["index"] for row in few.rows} <= set(range(12))


@pytest.mark.parametrize(
    ("images", "labels", "told"),
    [
        (torch.rand(4, 8, 8), torch.zeros(4).long(), r"give \(N, C, H, W\)"),
        (torch.rand(4, 1, 8, 8) * 255, torch.zeros(4).long(), "divide by 255"),
        (torch.randn(4, 1, 8, 8), torch.zeros(4).long(), "normalisation belongs inside the model"),
        (torch.rand(4, 1, 8, 8), torch.zeros(3).long(), "one class number an image"),
        (torch.rand(4, 1, 8, 8), torch.zeros(4), r"labels\.long\(\)"),
        (torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 10]), "label 10 occurs but the model returns 10 logits"),
        (torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, -1]), "count classes from 0"),
        (torch.rand(0, 1, 8, 8), torch.zeros(0).long(), "there are no images"),
        (torch.rand(4, 1, 8, 8), None, "labels are missing"),
        (torch.randint(0, 9, (4, 1, 8, 8)), torch.zeros(4).long(), "give floats"),
        (3, None, "give a tensor"),
        ([], None, "yields nothing"),
    ],
)
def test_refused_inputs(model: nn.Module, images, labels, told: str) -> None:
    with pytest.raises(HoldfastError, match=told):
        evaluate(model, images, labels, threat=Linf(0.1), attack="pgd", probe=False)


@pytest.mark.parametrize(
    ("attack", "threat", "told"),
    [
        ("pdg", Linf(0.1), "did you mean pgd"),
        ("pgd", L1("4/1"), "PGD is not defined for L1: use Linf or L2"),
        ("autoattack,pgd", Linf(0.1), "give it alone"),
        ("transfer", Linf(0.1), "give --source"),
        ("", Linf(0.1), "no attack is named"),
        ("pgd,pgd", Linf(0.1), "asked for twice"),
    ],
)
def test_refused_attacks(attack: str, threat: ThreatModel, told: str) -> None:
    with pytest.raises(HoldfastError, match=told):
        named(attack, threat)


def test_looking_seldom_finds_the_same(model: nn.Module) -> None:
    """As on an accelerator, where every look is a wait: claims are kept between looks."""
    seldom = short(model, speed=Speed(look_every=5), save_examples=True)
    often = short(model)
    differing = sum(a["verdict"] != b["verdict"] for a, b in zip(seldom.rows, often.rows, strict=True))
    assert differing <= 1
    held = model(seldom.examples()).argmax(1) == digits()[1]
    assert [row["verdict"] == "robust" for row in seldom.rows] == held.tolist()
    spent = [sum(sum(row["forward"].values()) for row in found.rows) for found in (often, seldom)]
    assert spent[0] <= spent[1] <= 1.5 * spent[0]
    nearest = named("fab-t", Linf(EPSILON), Options(steps=10), distances=True)
    one = short(model, attack=nearest, speed=Speed(look_every=4), count=12)
    two = short(model, attack=nearest, count=12)
    assert [row["distance"] for row in one.rows] == pytest.approx([row["distance"] for row in two.rows], nan_ok=True)


def test_few_classes_are_told() -> None:
    """Fewer targets and other losses, in the summary and in the log."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x = torch.rand(4, 1, 2, 2)
    attack = of_attacks([APGD(steps=2, objective="targeted_dlr", targets=9)])
    found = evaluate(model, x, model(x).argmax(1), threat=Linf(0.1), attack=attack, probe=False)
    assert found.summary["notes"] == [
        "APGD-T-2, 9 targets: 2 targets, as there are 3 classes",
        "APGD-T-2, 9 targets: targeted DLR without a fourth logit",
    ]
    assert "note: APGD-T-2, 9 targets: 2 targets" in found.log


def test_compiled_search_finds_the_same(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is compiled, padded to few sizes; the model is not."""
    from holdfast.evaluation import networks

    made = []

    def eagerly(network: nn.Module) -> None:
        from holdfast.compilation import compile_in_place

        made.append(network)
        compile_in_place(network, backend="aot_eager")

    monkeypatch.setattr(networks, "compile_in_place", eagerly)
    compiled = short(model, speed=Speed(compile=True, batch_size=32), count=16)
    assert made
    assert model not in made
    plain = short(model, speed=Speed(batch_size=32), count=16)
    assert [row["verdict"] for row in compiled.rows] == [row["verdict"] for row in plain.rows]


@pytest.mark.parametrize("threat", [Linf("8/255"), L2("1/2"), L2("3/1"), L1("12/1"), L1("60/1")], ids=str)
@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_no_projected_point_leaves_the_ball_by_rounding(threat: ThreatModel, scale: float) -> None:
    """In float32 at CIFAR's size: a point that fails the test of distance would be a success thrown away."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(32, 3, 32, 32, generator=generator)
    point = threat.project(x + scale * torch.randn(x.shape, generator=generator), x)
    assert bool(threat.contains(point, x).all())
    assert float(threat.length(point - x).max()) > 0.7 * threat.epsilon or threat.norm == "L2"
