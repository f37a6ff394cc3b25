"""Catastrophic overfitting: how it is found, and what a run does about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from conftest import small_batch, small_network
from holdfast import (
    EMA,
    FGSM,
    PGD,
    SWA,
    HoldfastError,
    Interpolation,
    NormalizedMSE,
    Settings,
    SplitBatchNorm,
    StandardTraining,
    View,
    fit,
)
from holdfast import loop as loop_module
from holdfast.attacks.class_start import ClassStartFGSM
from holdfast.attacks.prior_guided import PriorGuidedFGSM
from holdfast.catastrophic_overfitting import OvertakenAttack, response
from holdfast.cli.overrides import override
from holdfast.forward import Attacked, Batch, Forward
from holdfast.functional import cross_entropy
from holdfast.interruption import Interrupted
from holdfast.loop import Loop
from holdfast.objectives.base import Objective
from holdfast.objectives.prior_guided import PriorGuided
from holdfast.progress_display import Display
from holdfast.recipe import SGD, Recipe
from holdfast.recipes import RECIPES
from holdfast.runs.files import read_json
from holdfast.runs.state import training_state
from holdfast.schedule import Progress
from holdfast.steps.free import Free
from holdfast.threat import Linf
from tiny_runs import (
    FP32,
    assert_same,
    assert_same_run,
    command,
    metrics,
    newest_checkpoint,
    refused,
    summary,
    tiny_net,
    tiny_recipe,
    toy,
    weights,
    write_toy,
)

WELL, OVERFITTED = (0.5, 0.4), (0.9, 0.1)


class Heard(Display):
    """What was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    @property
    def warnings(self) -> list[str]:
        return [text for text in self.said if "catastrophic" in text]


def one_step(**changes: Any) -> Recipe:
    """Adversarial training with one step, and an average."""
    settings: dict[str, Any] = {"attack": FGSM(), "averages": (EMA(decay=0.9),), "epochs": 3}
    return tiny_recipe(**{**settings, **changes})


def watched(word: str, every: int = 1, **changes: Any) -> Settings:
    return replace(FP32, catastrophic_overfitting=word, overfitting_check=every, **changes)  # type: ignore[arg-type]  # a word


def go(out: Path, word: str, *, every: int = 1, display: Display | None = None, resume: bool = False, **changes: Any):
    """A run with the guard's response."""
    settings, model = watched(word, every), tiny_net(dropout=0.2)
    return fit(one_step(**changes), toy(), model, out=out, settings=settings, display=display, resume=resume)


def rig(monkeypatch: pytest.MonkeyPatch, found: Mapping[int, tuple[float, float]]) -> list[int]:
    """Let the looks after these steps measure such accuracies, and all others `WELL`; returns the steps looked at.

    An epoch has four steps: 65 images in batches of 16.
    """
    now = {"step": 0}
    looked: list[int] = []
    before = Loop.one_step

    def noted(self: Loop, batch: Batch, progress: Progress) -> None:
        before(self, batch, progress)
        now["step"] = progress.step + 1

    def look(self: OvertakenAttack, *rest: Any) -> bool:
        looked.append(now["step"])
        return self.judge(*found.get(now["step"], WELL))

    monkeypatch.setattr(Loop, "one_step", noted)
    monkeypatch.setattr(OvertakenAttack, "look", look)
    return looked


# ------------------------------------------------------------------------------------------------ the judgement


@pytest.mark.parametrize(
    ("looks", "suspected"),
    [
        ([(0.5, 0.45), (0.9, 0.02), (0.9, 0.02), (0.3, 0.2)], "-ss-"),
        ([(0.9, 0.02), (0.9, 0.02)], "ss"),  # it never held
        ([(0.5, 0.5), (0.5, 0.3)], "--"),  # a drop of just 0.2, and a gap of just that
        ([(0.5, 0.5), (0.51, 0.29)], "-s"),  # a drop, though more than half is left
        ([(0.5, 0.5), (0.45, 0.28)], "--"),  # dropped, but both together
        ([(0.5, 0.5), (0.15, 0.02)], "--"),  # less than half, but both together
        ([(0.5, 0.5), (0.9, 0.45)], "--"),  # a gap without a drop, and just half
        ([(0.5, 0.5), (0.9, 0.44)], "-s"),  # less than half without a drop
        ([(0.9, 0.8), (0.9, 0.65), (0.9, 0.55)], "--s"),  # from the best, not from the look before
        ([(0.5, 0.4), (0.9, 0.0), (0.5, 0.4), (0.9, 0.0), (0.9, 0.0), (0.9, 0.0), (0.5, 0.4), (0.9, 0.0)], "-s-sss-s"),
    ],
)
def test_the_rule(looks: list[tuple[float, float]], suspected: str) -> None:
    """FGSM more than 0.2 above PGD-5, which is below half of it or 0.2 below its best; found at the second in a row."""
    guard = OvertakenAttack()
    before = "-"
    for (fgsm, pgd), wanted in zip(looks, suspected, strict=True):
        assert guard.judge(fgsm, pgd) is guard.found is (before + wanted == "ss")
        assert guard.suspected is (wanted == "s")
        assert guard.last == {"fgsm_accuracy": fgsm, "pgd5_accuracy": pgd}
        before = wanted
    assert guard.best == max(pgd for _, pgd in looks)


def test_the_message_says_what_was_seen() -> None:
    """Both accuracies, and the best before."""
    guard = OvertakenAttack()
    guard.judge(0.5, 0.45)
    guard.judge(0.9, 0.02)
    said = (
        "catastrophic overfitting in epoch 7: 2% of held-out images hold against PGD-5 (45% before), 90% against FGSM"
    )
    assert guard.message(7) == said


def test_both_accuracies_are_measured() -> None:
    """FGSM of epsilon without a start, PGD-5 with steps of half of it, under the view that is given; no state moves."""
    network, batch, threat = small_network(), small_batch(rows=40), Linf(0.1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(30):
        cross_entropy(network(batch.x), batch.y).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    guard = OvertakenAttack()
    guard.look(View(network), batch.x, batch.y, threat)
    assert_same({name: tensor.clone() for name, tensor in network.state_dict().items()}, before)
    assert all(weight.grad is None for weight in network.parameters())
    network.eval()

    def climbed(x: Tensor, step: float) -> Tensor:
        x = x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(cross_entropy(network(x), batch.y).sum(), x)
        return (x.detach() + step * gradient.sign()).clamp(batch.x - 0.1, batch.x + 0.1).clamp(0, 1)

    def accuracy(x: Tensor) -> float:
        return float((network(x).argmax(1) == batch.y).double().mean())

    assert guard.last["fgsm_accuracy"] == accuracy(climbed(batch.x, 0.1))
    attack = PGD(steps=5, step_size=0.05, early_stop=0)
    found = attack(View(network), batch, lambda f: cross_entropy(f, batch.y), threat=threat, progress=Progress())
    assert guard.last["pgd5_accuracy"] == accuracy(found.x_adv)
    assert guard.last["pgd5_accuracy"] <= guard.last["fgsm_accuracy"] < accuracy(batch.x)


def test_images_of_all_classes_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a folder's images lie class by class, and no more than 128 are."""
    data = toy(count=1600)
    order = data.train.labels.argsort(stable=True)
    data = replace(data, train=data.train.subset(order))
    seen: list[Tensor] = []
    monkeypatch.setattr(OvertakenAttack, "look", lambda self, view, x, y, threat: seen.append(y) or False)
    recipe, settings = one_step(epochs=1, batch_size=360), watched("warn", 4)
    fit(recipe, data, tiny_net(), out=tmp_path / "run", settings=settings)
    (labels,) = seen
    assert len(labels) == 128
    assert int(torch.bincount(labels).min()) > 20


# ------------------------------------------------------------------------------------------------ the response

ONE_STEP = [FGSM(), FGSM(random_start=True), PGD(steps=1), ClassStartFGSM(), PriorGuidedFGSM(), Free(replays=2)]


def test_auto_warns_for_one_step_attacks_alone() -> None:
    """And for Free-AT, whose step is its attack. Every other word is taken as it is; an unknown one is refused."""
    assert [response("auto", attack) for attack in ONE_STEP] == ["warn"] * len(ONE_STEP)
    assert [response("auto", attack) for attack in (PGD(steps=2), PGD(), None)] == ["off"] * 3
    for word in ("off", "warn", "stop", "rollback"):
        assert {response(word, attack) for attack in (FGSM(), PGD(), None)} == {word}
    with pytest.raises(HoldfastError, match="'halt' is unknown: use auto, off, warn, stop or rollback"):
        response("halt", FGSM())
    made = {name: make(epsilon=0.1) for name, make in RECIPES.items()}
    one = {name for name, recipe in made.items() if response("auto", recipe.attack or recipe.step) == "warn"}
    assert {"fast_at", "n_fgsm", "gat", "nuat", "fgsm_pgi", "liet", "free_at"} <= one
    assert not {"pgd_at", "trades", "piat", "standard", "las_at"} & one


@pytest.mark.parametrize(
    ("word", "changes"),
    [
        ("off", {}),
        ("auto", {"attack": PGD(steps=2)}),
        ("auto", {"attack": None, "objective": StandardTraining()}),
    ],
)
def test_off_costs_nothing(word: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No look, and nothing in the metrics."""
    looked = rig(monkeypatch, {})
    run = go(tmp_path / "run", word, **changes)
    assert looked == []
    assert not any("overfitting" in line for line in metrics(run.path))
    assert newest_checkpoint(run.path)["ranks"][0]["guard"]["good"] is None


def test_looks_come_every_so_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And at every epoch's end; counted over the run, in batches where they are replayed, not in a clean warm-up."""
    looked = rig(monkeypatch, {})
    go(tmp_path / "a", "warn", every=3)
    assert looked == [3, 4, 6, 8, 9, 12]
    looked.clear()
    go(tmp_path / "b", "warn", every=3, warmup=6 / 12)
    assert looked == [6, 8, 9, 12]
    looked.clear()
    go(tmp_path / "c", "auto", every=3, attack=None, step=Free(replays=2))
    assert looked == [6, 8, 12, 16, 18, 24]


def test_warn_tells_once_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the second look, again only after it was gone, and not of a dip; the weights are those of an unwatched run."""
    with monkeypatch.context() as patch:
        rig(patch, dict.fromkeys((1, 3, 4, 5, 7, 8, 10), OVERFITTED))
        heard = Heard()
        run = go(tmp_path / "run", "warn", display=heard)
    assert [text.partition(":")[0] for text in heard.warnings] == [
        "catastrophic overfitting in epoch 1",
        "catastrophic overfitting in epoch 2",
    ]
    assert "10% of held-out images hold against PGD-5 (40% before), 90% against FGSM" in heard.warnings[0]
    lines = metrics(run.path)
    assert [line["overfitting"]["found"] for line in lines] == [True, True, False]
    assert lines[0]["overfitting"] == {"fgsm_accuracy": 0.9, "pgd5_accuracy": 0.1, "found": True, "rollbacks": 0}
    assert lines[2]["overfitting"] == {"fgsm_accuracy": 0.5, "pgd5_accuracy": 0.4, "found": False, "rollbacks": 0}
    assert run.summary["last"]["epoch"] == 3
    assert "stopped" not in run.summary
    plain = go(tmp_path / "plain", "off")
    looked = go(tmp_path / "looked", "warn")  # with its real measurements
    for name in ("model", "last"):
        assert_same(weights(run.path, name), weights(plain.path, name))
        assert_same(weights(looked.path, name), weights(plain.path, name))


@pytest.mark.parametrize("word", ["warn", "stop", "rollback"])
def test_the_advice_can_be_typed(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that the message names is one that the command takes."""
    rig(monkeypatch, {2: OVERFITTED, 3: OVERFITTED})
    heard = Heard()
    run = go(tmp_path / "run", word, display=heard, epochs=1)
    (said,) = heard.warnings
    options = [piece.strip(",.;") for piece in said.split() if piece.startswith("--")]
    assert bool(options) is (word == "warn")
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    for option in options:
        assert override(config, [f"{option}=stop"])["training"]["catastrophic_overfitting"] == "stop"


# ------------------------------------------------------------------------------------------------ stop


def test_stop_ends_the_run_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the epoch, with a summary that says why, the best weights and those of now; resuming does nothing."""
    states: dict[int, dict[str, Tensor]] = {}
    steps: list[int] = []
    rig(monkeypatch, {3: OVERFITTED, 5: OVERFITTED, 6: OVERFITTED})
    before = Loop.one_step

    def noted(self: Loop, batch: Batch, progress: Progress) -> None:
        before(self, batch, progress)
        steps.append(progress.step)
        states[progress.step + 1] = {name: tensor.clone() for name, tensor in self.exported().items()}

    monkeypatch.setattr(Loop, "one_step", noted)
    heard = Heard()
    run = go(tmp_path / "run", "stop", display=heard, epochs=5)
    assert steps == list(range(6))
    assert len(heard.warnings) == 1
    assert heard.warnings[0].endswith("the run stops here, the best weights so far are kept")
    lines = metrics(run.path)
    assert [line["step"] for line in lines] == [4, 6]
    assert lines[1]["overfitting"]["found"] is True
    assert "validation" in lines[1]
    assert run.summary["last"]["epoch"] == 2
    assert heard.warnings[0].startswith(run.summary["stopped"] + ";")
    assert run.summary["stopped"].startswith("catastrophic overfitting in epoch 2: 10% of held-out images hold")
    best = run.summary["best"]["epoch"]
    assert_same(weights(run.path), states[4 if best == 1 else 6])
    assert_same(weights(run.path, "last"), states[6])
    assert newest_checkpoint(run.path)["stopped"] is True

    again = go(tmp_path / "run", "stop", resume=True, epochs=5)
    assert again.summary == read_json(run.path / "summary.json")
    (run.path / "summary.json").unlink()  # killed before the closing evaluation was done
    go(tmp_path / "run", "stop", resume=True, epochs=5)
    assert steps == list(range(6))
    assert_same(summary(run.path), {key: value for key, value in run.summary.items() if key != "seconds"})
    assert [line["step"] for line in metrics(run.path)] == [4, 6]


def test_stop_in_an_epochs_last_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The epoch is whole then, and so it is where looks come at epochs' ends alone."""
    looked = rig(monkeypatch, {4: OVERFITTED, 8: OVERFITTED})
    run = go(tmp_path / "run", "stop", every=100)
    assert looked == [line["step"] for line in metrics(run.path)] == [4, 8]
    assert run.summary["stopped"].startswith("catastrophic overfitting in epoch 2:")


def test_stop_in_the_first_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only one: it is validated though others would not be, and its speed counts what was trained alone."""
    rig(monkeypatch, {1: OVERFITTED, 2: OVERFITTED})
    settings = watched("stop", validate_every=2)
    run = fit(one_step(), toy(), tiny_net(), out=tmp_path / "first", settings=settings)
    line = json.loads((run.path / "metrics.jsonl").read_text())
    assert line["step"] == 2
    assert run.summary["best"]["epoch"] == run.summary["last"]["epoch"] == 1
    assert line["images_per_second"] == pytest.approx(2 * 16 / line["seconds"], rel=1e-6)
    assert line["seconds_left"] == 0


@dataclass(frozen=True, kw_only=True)
class OneAndSeveral:
    """FGSM, and beside its images those of PGD-5."""

    statistics = "eval"
    steps = 1
    makes = ("adv_strong",)

    def passes(self) -> float:
        return 13.0

    def __call__(self, view: View, batch: Batch, inner_loss: Any, *, threat: Any, progress: Progress) -> Attacked:
        found = FGSM()(view, batch, inner_loss, threat=threat, progress=progress)
        strong = PGD(steps=5, early_stop=0)(view, batch, inner_loss, threat=threat, progress=progress)
        return found._replace(others={"adv_strong": strong.x_adv})


class Fooling(Objective):
    """First robust training; later what catastrophic overfitting is, as an aim."""

    needs_others = ("adv_strong",)

    def sides(self, progress: Progress) -> tuple[str, ...]:
        return ("adv", "adv_strong")

    def forward(self, f: Forward) -> dict[str, Tensor]:
        y, strong = f.batch.y, f.outputs["adv_strong"].logits
        if f.progress.fraction < 0.4:
            return {"strong_ce": cross_entropy(strong, y)}
        wrong = cross_entropy(strong, (y + 1) % 4)
        return {"adv_ce": cross_entropy(f.outputs["adv"].logits, y), "wrong_ce": wrong}


def test_a_network_that_overfits_is_stopped(tmp_path: Path) -> None:
    """One that has really learnt to tell FGSM's images from PGD's; the best weights are of before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)]
        model = nn.Sequential(nn.Flatten(), *hidden)
    recipe = tiny_recipe(attack=OneAndSeveral(), objective=Fooling(), epochs=16, batch_size=30)
    recipe = replace(recipe, optimizer=SGD(learning_rate=0.05, weight_decay=0.0))
    settings, heard = replace(watched("stop", 3), padding=0, validation_steps=5), Heard()
    run = fit(recipe, toy(count=400), model, out=tmp_path / "run", settings=settings, display=heard)
    lines = metrics(run.path)
    assert 7 <= len(lines) < 16  # it is robust training up to the seventh epoch
    assert len(heard.warnings) == 1
    *before, end = [line["overfitting"] for line in lines]
    assert not any(look["found"] for look in before)
    assert end["found"]
    assert end["fgsm_accuracy"] > end["pgd5_accuracy"] + 0.2
    best, last = (run.summary[which] for which in ("best", "last"))
    assert best["epoch"] < last["epoch"] == len(lines)


# ------------------------------------------------------------------------------------------------ rollback


def copied(state: Any) -> Any:
    """Nested state with tensors of its own."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    return [copied(value) for value in state] if isinstance(state, list | tuple) else state


def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[int, Any], dict[int, Any]]:
    """The training state by batches done: right before the look, and where the run goes on after it."""
    before: dict[int, Any] = {}
    after: dict[int, Any] = {}
    one, pause = Loop.one_step, loop_module.pause

    def noted(self: Loop, batch: Batch, progress: Progress) -> None:
        one(self, batch, progress)
        before[progress.step + 1] = copied(training_state(self))

    def paused(self: Loop) -> None:
        after[self.epoch * len(self.loader) + self.position] = copied(training_state(self))
        pause(self)

    monkeypatch.setattr(Loop, "one_step", noted)
    monkeypatch.setattr(loop_module, "pause", paused)
    return before, after


ROLLBACKS: dict[str, Callable[[], dict[str, Any]]] = {
    "averages": lambda: {"averages": (Interpolation(), SWA(begin=0.0, period=1), EMA(decay=0.9))},
    "memory": lambda: {"attack": PriorGuidedFGSM(), "objective": PriorGuided()},
    "split": lambda: {"views": (SplitBatchNorm(),), "objective": NormalizedMSE()},
}


@pytest.mark.parametrize("case", ROLLBACKS)
def test_rollback_restores_everything(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, both branches, momentum, memories and averages, bit for bit the last ones that held; then it goes on."""
    heard = Heard()
    rig(monkeypatch, dict.fromkeys((6, 7, 9, 10), OVERFITTED))
    before, after = recorded(monkeypatch)
    recipe = {**ROLLBACKS[case](), "optimizer": SGD(learning_rate=0.05, momentum=0.9)}
    run = go(tmp_path / "run", "rollback", display=heard, **recipe)
    assert_same(after[6], before[6])  # suspected alone: neither gone back from, nor kept to go back to
    assert_same(after[7], before[5])
    assert_same(after[8], before[8])
    assert_same(after[10], before[8])
    for state in (before[6]["step"], before[7]["step"], before[8]["step"]):  # undone was something; the run went on
        assert not torch.equal(state["model.0.weight"], before[5]["step"]["model.0.weight"])
    momentum = before[5]["optimizers"][0]["state"][0]["momentum_buffer"]
    assert not torch.equal(momentum, before[7]["optimizers"][0]["state"][0]["momentum_buffer"])
    lines = metrics(run.path)
    assert [line["overfitting"]["rollbacks"] for line in lines] == [0, 1, 2]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert len(heard.warnings) == 2
    assert all(text.endswith("the run goes back to where it still held") for text in heard.warnings)


def test_three_rollbacks_then_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All to the one state that held, which later steps have not changed; the fourth time the run ends."""
    rig(monkeypatch, dict.fromkeys(range(4, 100), OVERFITTED))
    before, after = recorded(monkeypatch)
    heard = Heard()
    run = go(tmp_path / "run", "rollback", display=heard, epochs=5)
    assert max(before) == 11
    for step in (5, 7, 9):  # after each, two looks suspect anew before it is found
        assert_same(after[step], before[3])
        if step < 9:
            assert_same(after[step + 1], before[step + 1])
    assert [line["overfitting"]["rollbacks"] for line in metrics(run.path)] == [0, 2, 3]
    assert run.summary["last"]["epoch"] == 3
    assert "in epoch 3" in run.summary["stopped"]
    assert newest_checkpoint(run.path)["stopped"] is True
    assert len(heard.warnings) == 4
    assert all("goes back" in text for text in heard.warnings[:3])
    assert "stops" in heard.warnings[3]
    assert "goes back" not in heard.warnings[3]


def test_nothing_to_go_back_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that has never held is stopped."""
    rig(monkeypatch, dict.fromkeys(range(100), OVERFITTED))
    heard = Heard()
    run = go(tmp_path / "run", "rollback", display=heard)
    assert [line["step"] for line in metrics(run.path)] == [2]
    assert heard.warnings == [run.summary["stopped"] + "; the run stops here, the best weights so far are kept"]


# ------------------------------------------------------------------------------------------------ kills


class Crash(Exception):
    """What a kill looks like from inside."""


FOUND = dict.fromkeys((2, 3, 4, 5, 7, 8, 10, 11), OVERFITTED)  # back to 1, to 1 again and to 6; then stopped


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody killed."""
    with pytest.MonkeyPatch.context() as patch:
        rig(patch, FOUND)
        run = go(tmp_path_factory.mktemp("whole") / "run", "rollback").path
    assert [line["overfitting"]["rollbacks"] for line in metrics(run)] == [1, 3, 3]
    assert metrics(run)[-1]["step"] == 11
    return run


@pytest.mark.parametrize(
    ("step", "how", "suspected"),
    [(2, "ask", True), (3, "ask", False), (6, "ask", False), (7, "crash", True), (8, "ask", False), (10, "ask", True)],
)
def test_a_kill_takes_nothing_from_the_guard(
    step: int, how: str, suspected: bool, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Best, suspicion, counts and the state to go back to are in the checkpoint: the run ends as if never stopped."""
    with monkeypatch.context() as patch:
        rig(patch, FOUND)
        before = Loop.one_step

        def stopping(self: Loop, batch: Batch, progress: Progress) -> None:
            before(self, batch, progress)
            if progress.step + 1 == step:
                if how == "crash":  # what is left is the epoch's checkpoint, of step 4
                    raise Crash
                self.interruption.asked = True

        patch.setattr(Loop, "one_step", stopping)
        with pytest.raises((Interrupted, Crash)):
            go(tmp_path / "run", "rollback")
    guard = newest_checkpoint(tmp_path / "run")["ranks"][0]["guard"]
    assert guard["best"] == 0.4
    assert guard["suspected"] is suspected
    assert guard["good"] is not None
    rig(monkeypatch, FOUND)
    assert_same_run(go(tmp_path / "run", "rollback", resume=True).path, whole)


# ------------------------------------------------------------------------------------------------ the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The option is in --help's list, config.yaml keeps it, and a wrong word is refused in one line."""
    data, out = write_toy(tmp_path / "toy.npz"), tmp_path / "run"
    words = ["train", "fast_at", "--data", data, "--threat.epsilon", 0.1, "--model.width", 4, "--epochs", 1]
    words += ["--batch-size", 16, "--training.test_steps", 1, "--training.validation_steps", 1]
    words += ["--training.device", "cpu", "--training.catastrophic_overfitting"]
    assert command(*words, "stop", "--training.overfitting_check", 2, "--out", out) == 0
    assert "catastrophic_overfitting: stop" in (out / "config.yaml").read_text()
    assert set(metrics(out)[0]["overfitting"]) == {"fgsm_accuracy", "pgd5_accuracy", "found", "rollbacks"}
    capsys.readouterr()
    assert "use auto or off or warn or stop or rollback" in refused(capsys, *words, "halt", "--out", tmp_path / "no")
    told = refused(capsys, *words, "stop", "--training.overfitting_check", 0, "--out", tmp_path / "no")
    assert "overfitting_check is 0: give a whole number of at least 1" in told
