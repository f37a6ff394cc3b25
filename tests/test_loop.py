"""The training loop: what it does at every step and at every epoch's end."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import holdfast
from holdfast import (
    EMA,
    PGD,
    SWA,
    Interpolation,
    NormalizedMSE,
    Objective,
    Settings,
    SplitBatchNorm,
    StandardTraining,
    fit,
    recipes,
)
from holdfast import loop as loop_module
from holdfast.averages.base import Average
from holdfast.compilation import compile_in_place
from holdfast.data.images import Dataset, Images
from holdfast.data.loader import to_pixels
from holdfast.errors import HoldfastError
from holdfast.evaluation.accuracy import Evaluation, accuracies
from holdfast.forward import Batch, Forward, View
from holdfast.functional import cross_entropy, smooth_labels
from holdfast.loop import Loop
from holdfast.progress_display import Display, LiveDisplay
from holdfast.recipe import SGD
from holdfast.runs.folder import RunFolder
from holdfast.schedule import Progress, Schedule, one_cycle, piecewise, value_at
from holdfast.setup import prepare
from holdfast.step import AdversarialStep
from tiny_runs import FP32, FP64, assert_same, metrics, newest_checkpoint, tiny_net, tiny_recipe, toy, weights

STEPS = 4  # of an epoch: 65 images in batches of 16


def watch(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seen: Callable[..., None], *, first: bool = False
) -> None:
    """Call `seen` with the arguments of a method or a function that takes the loop, after it or before it."""
    before = getattr(owner, name)

    def wrapped(self: Any, *arguments: Any, **more: Any) -> Any:
        if first:
            seen(self, *arguments, **more)
        result = before(self, *arguments, **more)
        if not first:
            seen(self, *arguments, **more)
        return result

    monkeypatch.setattr(owner, name, wrapped)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# ------------------------------------------------------------------------------------------------ the order of things


class Noted(Average):
    """Writes down when it is called, and reads what the averages before it left."""

    def __init__(self, name: str, log: list[Any], *, shift: float = 0.0) -> None:
        self.name, self.log, self.shift = name, log, shift

    def __deepcopy__(self, memo: Any) -> Noted:
        return Noted(self.name, self.log, shift=self.shift)

    def start(self, model: nn.Module) -> None:
        self.log.append(("start", self.name))

    def after_step(self, model: nn.Module, progress: Progress) -> None:
        self.log.append(("step", self.name, progress.step))

    def after_epoch(self, model: nn.Module, progress: Progress) -> None:
        self.log.append(("epoch", self.name, progress.epoch, progress.step, float(model[5].bias.detach()[0])))
        with torch.no_grad():
            model[5].bias += self.shift

    def state_dict(self) -> dict[str, Any]:
        self.log.append(("saved", self.name))
        return {}


def test_the_order_at_an_epochs_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps with every average after each; then averages in order, validation, best, metrics, last, checkpoint."""
    log: list[Any] = []
    outcomes(monkeypatch, [(50, 30), (40, 20)], (60, 40))
    watch(monkeypatch, Loop, "evaluation", lambda self, images, *rest: log.append(
        ("validation" if images is self.setup.validation else "test",)), first=True)  # fmt: skip
    watch(monkeypatch, Loop, "export", lambda self, name: log.append(("export", name)), first=True)
    watch(
        monkeypatch, RunFolder, "append_metrics", lambda self, line: log.append(("metrics", line["epoch"])), first=True
    )
    watch(monkeypatch, RunFolder, "write_summary", lambda self, *rest: log.append(("summary",)), first=True)
    averages = (Noted("first", log, shift=100.0), Noted("second", log))
    fit(tiny_recipe(averages=averages), toy(), tiny_net(), out=tmp_path / "run", settings=FP32)
    ends = {"epoch": lambda entry: entry[:4]}
    steps = [("step", name, number) for number in range(2 * STEPS) for name in ("first", "second")]
    short = [ends.get(entry[0], tuple)(entry) for entry in log]
    assert short == [
        ("start", "first"), ("start", "second"),
        *steps[: 2 * STEPS],
        ("epoch", "first", 0, 3), ("epoch", "second", 0, 3), ("validation",), ("export", "model"), ("metrics", 1),
        ("saved", "first"), ("saved", "second"),
        *steps[2 * STEPS :],
        ("epoch", "first", 1, 7), ("epoch", "second", 1, 7), ("validation",), ("metrics", 2), ("export", "last"),
        ("saved", "first"), ("saved", "second"),
        ("test",), ("test",), ("summary",),
    ]  # fmt: skip
    told = [entry for entry in log if entry[0] == "epoch"]
    assert told[1][4] == pytest.approx(told[0][4] + 100)  # the second average reads what the first wrote


@dataclass(frozen=True, kw_only=True)
class Counting(PGD):
    """PGD that counts its calls by step."""

    calls: Any = None

    def __deepcopy__(self, memo: Any) -> Counting:
        return self

    def __call__(self, *arguments: Any, progress: Progress, **more: Any) -> Any:
        self.calls.append(progress.step)
        return super().__call__(*arguments, progress=progress, **more)


def test_schedules_are_followed_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning rate, momentum and weight decay, in the very groups that take the step; the metrics tell the last."""
    seen: list[tuple[float, ...]] = []

    def group(optimizer: torch.optim.SGD) -> None:
        (only,) = optimizer.param_groups
        seen.append((only["lr"], only["momentum"], only["weight_decay"], only["nesterov"]))

    watch(monkeypatch, torch.optim.SGD, "step", group, first=True)
    momentum, decay = Schedule(((0, 0.95), (0.3, 0.85), (1, 0.95)), "cosine"), piecewise((0, 1e-3), (0.5, 1e-2))
    recipe = tiny_recipe(
        optimizer=SGD(learning_rate=0.2, momentum=momentum, weight_decay=decay, nesterov=True), schedule=one_cycle()
    )
    run = fit(recipe, toy(), tiny_net(), out=tmp_path / "run", settings=FP32)
    wanted = []
    for step in range(2 * STEPS):
        at = Progress(epoch=step // STEPS, step=step, steps_per_epoch=STEPS, epochs=2)
        wanted.append((0.2 * one_cycle()(at), value_at(momentum, at), value_at(decay, at), True))
    assert seen == wanted
    assert len(set(seen)) == 2 * STEPS
    assert [line["learning_rate"] for line in metrics(run.path)] == [wanted[3][0], wanted[7][0]]


def test_the_learning_rates_stage_reaches_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`stage` counts the drops of the recipe's schedule; a strength by stage follows it."""
    stages: list[int] = []
    watch(monkeypatch, Loop, "one_step", lambda self, batch, progress: stages.append(progress.stage))
    schedule = piecewise((0, 1), (0.5, 0.1), (0.75, 0.01))
    objective = NormalizedMSE(strength=holdfast.schedule.after_first_decay(2.0))
    run = fit(
        tiny_recipe(schedule=schedule, objective=objective), toy(), tiny_net(), out=tmp_path / "run", settings=FP32
    )
    assert stages == [0, 0, 0, 0, 1, 1, 2, 2]
    assert ["nmse" in line["terms"] for line in metrics(run.path)] == [False, True]


def test_warm_up_steps_are_clean(tmp_path: Path) -> None:
    """No attack is called before the share of the run is over; then at every step."""
    calls: list[int] = []
    attack = Counting(steps=1, calls=calls)
    recipe = tiny_recipe(attack=attack, warmup=5 / 8)
    run = fit(recipe, toy(), tiny_net(), out=tmp_path / "run", settings=FP32)
    assert calls == [5, 6, 7]
    first, second = metrics(run.path)
    assert set(first["terms"]) == {"loss", "clean_ce"}
    assert set(second["terms"]) == {"loss", "clean_ce", "adv_ce"}
    assert first["terms"]["loss"] == first["terms"]["clean_ce"]


def test_validate_every(tmp_path: Path) -> None:
    """Every so many epochs, and after the last."""
    run = fit(tiny_recipe(epochs=5), toy(), tiny_net(), out=tmp_path / "run", settings=replace(FP32, validate_every=2))
    assert ["validation" in line for line in metrics(run.path)] == [False, True, False, True, True]


def test_drop_last(tmp_path: Path) -> None:
    """65 images: four batches of 16, or five with the last of one image."""
    rows: list[int] = []
    for drop, wanted in ((True, [16] * 4), (False, [16] * 4 + [1])):
        settings = replace(FP32, drop_last=drop)
        setup = prepare(tiny_recipe(), toy(), tiny_net(), seed=0, settings=settings)
        rows = [len(batch.y) for batch in setup.loader.batches(0)]
        assert rows == wanted
        assert len(setup.loader) == len(wanted)
    seen = torch.cat([batch.rows for batch in setup.loader.batches(0)])
    assert sorted(seen.tolist()) == list(range(65))


# ------------------------------------------------------------------------------------------------ the best checkpoint


def outcomes(monkeypatch: pytest.MonkeyPatch, validation: list[tuple[int, int]], test: tuple[int, int]) -> list[str]:
    """Let evaluations find these counts of clean and robust images; returns what was evaluated."""
    seen: list[str] = []
    left = iter(validation)

    def evaluation(self: Loop, images: Images, steps: int, n: int | None) -> Evaluation:
        seen.append("validation" if images is self.setup.validation else "test")
        clean, robust = next(left) if seen[-1] == "validation" else test
        return Evaluation(100, clean, robust, f"PGD-{steps}")

    monkeypatch.setattr(Loop, "evaluation", evaluation)
    return seen


@pytest.mark.parametrize(
    ("found", "best", "attacked"),
    [
        ([(90, 10), (50, 30), (95, 20), (60, 25)], 2, True),  # robust decides
        ([(50, 30), (60, 30), (55, 30), (60, 30)], 2, True),  # then clean; then the first
        ([(50, 30), (50, 30), (50, 30), (50, 30)], 1, True),
        ([(10, 1), (20, 2), (30, 3), (40, 4)], 4, True),
        ([(90, 10), (50, 30), (95, 20), (60, 25)], 3, False),  # standard training: clean alone
    ],
)
def test_the_best_by_validation(
    found: list[tuple[int, int]], best: int, attacked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Robust accuracy first, then clean, the first of equals; `model` holds that epoch's weights, `last` the last's."""
    seen = outcomes(monkeypatch, found, (77, 33))
    ends: list[dict[str, Tensor]] = []
    watch(monkeypatch, Loop, "end_epoch", lambda self: ends.append(state_of(self.model)))
    recipe = tiny_recipe(epochs=4) if attacked else tiny_recipe(epochs=4, attack=None, objective=StandardTraining())
    run = fit(recipe, toy(), tiny_net(), out=tmp_path / "run", settings=FP32)
    assert seen == ["validation"] * 4 + ["test"] * (1 if best == 4 else 2)
    assert run.summary["best"]["epoch"] == best
    assert run.summary["last"]["epoch"] == 4
    assert (run.summary["clean_accuracy"], run.summary["robust_accuracy"]) == (0.77, 0.33)
    assert_same(weights(run.path), ends[best - 1])
    assert_same(weights(run.path, "last"), ends[3])
    told = json.loads((run.path / "model" / "config.json").read_text())
    assert told["epoch"] == best
    assert told["validation"]["clean_accuracy"] == found[best - 1][0] / 100


def test_the_test_images_choose_nothing(tmp_path: Path) -> None:
    """With other test images and labels the same weights come out; they are seen only at the end."""
    data = toy()
    turned = Images(255 - data.test.pixels, (data.test.labels + 1) % 4)
    first = fit(tiny_recipe(epochs=3), data, tiny_net(), out=tmp_path / "a", settings=FP32)
    second = fit(tiny_recipe(epochs=3), replace(data, test=turned), tiny_net(), out=tmp_path / "b", settings=FP32)
    assert_same(weights(first.path), weights(second.path))
    assert metrics(first.path) == metrics(second.path)
    assert first.summary["clean_accuracy"] != second.summary["clean_accuracy"]


def test_validation_images_are_not_trained_on(tmp_path: Path) -> None:
    """A tenth at most is held out, the classes in proportion, and the rest is all there is to train on."""
    setup = prepare(tiny_recipe(), toy(count=200), tiny_net(), seed=0, settings=FP32)
    assert (len(setup.validation), len(setup.loader.images)) == (20, 180)
    assert torch.bincount(setup.validation.labels).tolist() == [5, 5, 5, 5]
    trained = {tuple(image.flatten().tolist()) for image in setup.loader.images.pixels}
    held = {tuple(image.flatten().tolist()) for image in setup.validation.pixels}
    assert len(trained) == 180
    assert len(held) == 20
    assert not trained & held
    few = prepare(tiny_recipe(), toy(count=200), tiny_net(), seed=0, settings=replace(FP32, validation_images=8))
    assert len(few.validation) == 8


def test_the_closing_evaluation_is_of_the_whole_test_set_or_of_n(tmp_path: Path) -> None:
    """And equal to `accuracies` on the exported model."""
    data = toy()
    run = fit(tiny_recipe(), data, tiny_net(), out=tmp_path / "run", settings=replace(FP32, test_images=None))
    model = holdfast.load_model(run.path, model=tiny_net())
    found = accuracies(model, data.test, threat=tiny_recipe().threat, attack=PGD(steps=2, early_stop=0))
    assert run.summary["n"] == 24
    assert found.as_dict() == {key: run.summary["best"][key] for key in found.as_dict()}
    again = replace(FP32, test_images=10)
    assert fit(tiny_recipe(), data, tiny_net(), out=tmp_path / "ten", settings=again).summary["n"] == 10


# ------------------------------------------------------------------------------------------------ averages


def test_the_emas_weights_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`model` and `last` hold the average, which validation judged; the network itself goes on raw."""
    raw: list[dict[str, Tensor]] = [state_of(tiny_net())]
    judged: list[dict[str, Tensor]] = []
    watch(monkeypatch, Loop, "one_step", lambda self, *rest: raw.append(state_of(self.model)))
    watch(monkeypatch, Loop, "evaluation", lambda self, *rest: judged.append(state_of(self.evaluated)), first=True)
    run = fit(tiny_recipe(averages=(EMA(decay=0.8),)), toy(), tiny_net(), out=tmp_path / "run", settings=FP32)
    shadow = {name: tensor.double() for name, tensor in raw[0].items()}
    ends = []
    for step, state in enumerate(raw[1:]):
        decay = min(0.8, (1 + step) / (10 + step))
        for name, tensor in state.items():
            still = not tensor.is_floating_point()
            shadow[name] = tensor.double() if still else decay * shadow[name] + (1 - decay) * tensor.double()
        if (step + 1) % STEPS == 0:
            ends.append(dict(shadow))
    best = run.summary["best"]["epoch"]
    for name, tensor in weights(run.path).items():
        torch.testing.assert_close(tensor.double(), ends[best - 1][name], rtol=1e-5, atol=1e-6)
    for name, tensor in weights(run.path, "last").items():
        torch.testing.assert_close(tensor.double(), ends[1][name], rtol=1e-5, atol=1e-6)
        assert torch.equal(tensor, judged[1][name])
    checkpoint = newest_checkpoint(run.path)
    assert torch.equal(checkpoint["step"]["model.5.weight"], raw[-1]["5.weight"])
    assert not torch.equal(raw[-1]["5.weight"], weights(run.path, "last")["5.weight"])


def test_piat_writes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next epoch starts from the mixture, which is what is exported."""
    log: list[tuple[str, dict[str, Tensor]]] = [("start", state_of(tiny_net()))]
    watch(monkeypatch, Loop, "one_step", lambda self, *rest: log.append(("before", state_of(self.model))), first=True)
    watch(monkeypatch, Loop, "one_step", lambda self, *rest: log.append(("after", state_of(self.model))))
    run = fit(tiny_recipe(averages=(Interpolation(),)), toy(), tiny_net(), out=tmp_path / "run", settings=FP32)
    before = [state for word, state in log if word == "before"]
    after = [state for word, state in log if word == "after"]
    assert_same(before[1], after[0])
    previous = log[0][1]
    for epoch in range(2):
        kept = (epoch + 2) / (epoch + 11)  # (n + 1) / (n + 10)
        ended = after[(epoch + 1) * STEPS - 1]
        mixed = before[STEPS] if epoch == 0 else weights(run.path, "last")
        for name, tensor in mixed.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(
                    tensor, kept * previous[name] + (1 - kept) * ended[name], rtol=1e-5, atol=1e-6
                )
        previous = mixed
    assert not torch.equal(before[STEPS]["5.weight"], after[STEPS - 1]["5.weight"])


@pytest.mark.parametrize("how", ["piat", "clean", "adversarial"])
def test_statistics_are_reestimated(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over the epoch's batches of their own mean and variance, at the convolution, under the final weights."""
    average = Interpolation(buffers="reestimate") if how == "piat" else EMA(decay=0.5, buffers=how)
    found: list[Tensor] = []
    real = PGD.__call__

    def kept(self: PGD, *arguments: Any, **more: Any) -> Any:
        result = real(self, *arguments, **more)
        found.append(result.x_adv)
        return result

    monkeypatch.setattr(PGD, "__call__", kept)
    loops: list[Loop] = []
    watch(monkeypatch, loop_module, "reestimate", lambda self, *rest: (found.clear(), loops.append(self)), first=True)
    at_end: list[list[Tensor]] = []
    watch(monkeypatch, loop_module, "reestimate", lambda self, *rest: at_end.append(list(found)))
    run = fit(tiny_recipe(averages=(average,)), toy(), tiny_net(), out=tmp_path / "run", settings=FP64)
    state = weights(run.path, "last")
    assert len(at_end) == 2
    clean = [batch.x for batch in loops[-1].loader.batches(1)]
    inputs = clean if how != "adversarial" else [x.double() for x in at_end[-1]]
    assert len(inputs) == STEPS
    assert (len(at_end[-1]) == STEPS) == (how == "adversarial")
    hidden = [nn.functional.conv2d(x, state["0.weight"], state["0.bias"], stride=2, padding=1) for x in inputs]
    mean = torch.stack([h.mean((0, 2, 3)) for h in hidden]).mean(0)
    variance = torch.stack([h.var((0, 2, 3)) for h in hidden]).mean(0)
    torch.testing.assert_close(state["1.running_mean"], mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(state["1.running_var"], variance, rtol=0, atol=1e-10)
    if how == "adversarial":
        assert all(float((a - c).abs().max()) > 0.05 for a, c in zip(inputs, clean, strict=True))
        model = newest_checkpoint(run.path)["step"]
        assert not torch.equal(model["model.1.running_mean"], state["1.running_mean"])  # the network's own are left


@pytest.mark.parametrize("how", ["clean", "adversarial"])
@pytest.mark.parametrize("images", [None, 20])
def test_every_branch_is_reestimated_on_its_own_kind(
    how: str, images: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Split: auxiliary statistics from clean images, the main ones from adversarial ones whatever the average says."""
    found: list[tuple[Tensor, Tensor]] = []
    real = AdversarialStep.find

    def kept(self: AdversarialStep, batch: Batch, *arguments: Any, **more: Any) -> Any:
        result = real(self, batch, *arguments, **more)
        if more.get("model") is not None:
            found.append((batch.x, result.x_adv))
        return result

    monkeypatch.setattr(AdversarialStep, "find", kept)
    average = SWA(begin=0.0, buffers=how, images=images)
    recipe = tiny_recipe(objective=NormalizedMSE(), views=(SplitBatchNorm(),), averages=(average,), epochs=1)
    run = fit(recipe, toy(), tiny_net(), out=tmp_path / "run", settings=FP64)
    (shadow,) = (state["shadow"] for state in newest_checkpoint(run.path)["ranks"][0]["averages"])
    assert len(found) == (STEPS if images is None else 2)
    for branch, inputs in (("1.aux.", [x for x, _ in found]), ("1.", [x_adv for _, x_adv in found])):
        hidden = [nn.functional.conv2d(x, shadow["0.weight"], shadow["0.bias"], stride=2, padding=1) for x in inputs]
        mean = torch.stack([h.mean((0, 2, 3)) for h in hidden]).mean(0)
        torch.testing.assert_close(shadow[f"{branch}running_mean"], mean, rtol=0, atol=1e-10)
    assert torch.equal(weights(run.path)["1.running_mean"], shadow["1.running_mean"])
    assert not torch.allclose(shadow["1.running_mean"], shadow["1.aux.running_mean"], atol=1e-4)


def test_reestimation_leaves_what_a_model_does_not_save(tmp_path: Path) -> None:
    """A buffer that is not persistent is no statistic."""
    model = tiny_net()
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    average = Interpolation(buffers="reestimate")
    run = fit(tiny_recipe(averages=(average,)), toy(), model, out=tmp_path / "run", settings=FP32)
    assert "scratch" not in weights(run.path)


# ------------------------------------------------------------------------------------------------ the step in the loop


def one_update(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> dict[str, Tensor]:
    """The network after the first step of a run in double precision."""
    after: list[dict[str, Tensor]] = []
    watch(monkeypatch, Loop, "one_step", lambda self, *rest: after.append(state_of(self.model)))
    fit(replace(recipe, epochs=1), toy(), tiny_net(), out=tmp_path, settings=FP64, **more)
    monkeypatch.undo()
    return after[0]


def by_hand(recipe: Any, clip: float | None) -> tuple[dict[str, Tensor], float]:
    """The same step, written out: clean cross-entropy against smoothed labels, clipped gradient, plain descent."""
    setup = prepare(recipe, toy(), tiny_net(), seed=0, settings=FP64)
    batch = next(iter(setup.loader.batches(0)))
    model = tiny_net().double()
    soft = torch.full((16, 4), recipe.label_smoothing / 3, dtype=torch.float64)
    soft[torch.arange(16), batch.y] = 1 - recipe.label_smoothing
    loss = -(soft * model(batch.x).log_softmax(1)).sum(1).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    scale = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter -= 0.5 * scale * gradient
    return state_of(model), norm


@pytest.mark.parametrize("clip", [None, 0.1, 100.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_one_step_by_hand(
    clip: float | None, smoothing: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Label smoothing makes the target, the gradient is clipped where it is longer, and BatchNorm's statistics move."""
    plain = SGD(learning_rate=0.5, momentum=0.0, weight_decay=0.0)
    recipe = tiny_recipe(
        attack=None, objective=StandardTraining(), optimizer=plain, label_smoothing=smoothing, gradient_clip=clip
    )
    found = one_update(recipe, tmp_path / "run", monkeypatch)
    wanted, norm = by_hand(recipe, clip)
    assert 0.1 < norm < 100
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9)


def test_smoothed_targets_are_those_of_the_functional() -> None:
    """And without smoothing there are none."""
    setup = prepare(tiny_recipe(label_smoothing=0.4), toy(), tiny_net(), seed=0, settings=FP32)
    batch = next(iter(setup.loader.batches(0)))
    assert torch.equal(batch.target, smooth_labels(batch.y, 4, 0.4))
    setup = prepare(tiny_recipe(), toy(), tiny_net(), seed=0, settings=FP32)
    assert next(iter(setup.loader.batches(0))).target is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own, on some versions of Python
def test_compiled_gives_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile` with aot_eager: same losses and trained weights, same names of parameters."""
    compiled: list[str] = []
    real = compile_in_place
    monkeypatch.setattr(
        "holdfast.loop.compile_in_place", lambda m, backend: (compiled.append(backend), real(m, backend))
    )
    recipe = tiny_recipe(objective=NormalizedMSE(), averages=(Interpolation(),), epochs=1)
    eager = fit(recipe, toy(), tiny_net(), out=tmp_path / "eager", settings=FP32)
    quick = fit(recipe, toy(), tiny_net(), out=tmp_path / "quick", settings=replace(FP32, compile="aot_eager"))
    assert compiled == ["aot_eager"]
    for one, other in zip(metrics(eager.path), metrics(quick.path), strict=True):
        assert other["terms"] == pytest.approx(one["terms"], abs=1e-5)
    for name, tensor in weights(eager.path).items():
        torch.testing.assert_close(weights(quick.path)[name], tensor, rtol=0, atol=1e-5)
    assert not torch.equal(weights(quick.path)["5.weight"], tiny_net().state_dict()["5.weight"])


def test_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and searches run in low precision, verdicts and weights in float32, and the loss falls."""
    kinds: dict[str, set[torch.dtype]] = {}
    phases = ["before"]

    def noted(self: nn.Conv2d, x: Tensor) -> None:
        low = torch.is_autocast_enabled("cpu")
        kinds.setdefault(phases[-1], set()).add(torch.get_autocast_dtype("cpu") if low else x.dtype)

    watch(monkeypatch, nn.Conv2d, "forward", noted)
    for name in ("one_step", "end_epoch", "close"):
        watch(monkeypatch, Loop, name, lambda *rest, name=name: phases.append(name), first=True)
    recipe = tiny_recipe(objective=NormalizedMSE(), averages=(EMA(decay=0.9),), epochs=6)
    run = fit(recipe, toy(), tiny_net(), out=tmp_path / "run", settings=replace(FP32, precision="bf16"))
    assert kinds == {
        "before": {torch.float32},  # the look at the model
        "one_step": {torch.bfloat16},
        "end_epoch": {torch.bfloat16, torch.float32},  # low precision searches, float32 decides
        "close": {torch.float32},
    }
    assert {tensor.dtype for tensor in weights(run.path).values()} == {torch.float32, torch.int64}
    assert all(bool(tensor.isfinite().all()) for tensor in weights(run.path).values())
    losses = [line["terms"]["loss"] for line in metrics(run.path)]
    assert losses[-1] < losses[0]


def test_all_precisions_agree(tmp_path: Path) -> None:
    """fp32 and fp64 to rounding, bf16 to its own."""
    losses = {}
    for precision in ("fp32", "fp64", "bf16"):
        settings = replace(FP32, precision=precision)
        run = fit(tiny_recipe(epochs=1), toy(), tiny_net(), out=tmp_path / precision, settings=settings)
        losses[precision] = metrics(run.path)[0]["terms"]["loss"]
    assert losses["fp32"] == pytest.approx(losses["fp64"], abs=1e-4)
    assert losses["bf16"] == pytest.approx(losses["fp64"], abs=0.05)
    assert losses["bf16"] != losses["fp32"]


# ------------------------------------------------------------------------------------------------ the caller's things


class WithBuffer(NormalizedMSE):
    """Counts its calls in a buffer, and owns a trained part."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, f: Forward) -> dict[str, Tensor]:
        self.calls += 1
        return {name: self.scale * term for name, term in super().forward(f).items()}


class AttackWithBuffer(nn.Module):
    """FGSM-like, counting its calls in a buffer."""

    statistics = "eval"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def passes(self) -> float:
        return 2.0

    def forward(self, view: View, batch: Batch, inner_loss: Any, *, threat: Any, progress: Any) -> Any:
        self.calls += 1
        return PGD(steps=1)(view, batch, inner_loss, threat=threat, progress=progress)


def test_the_callers_own_things_are_left_alone(tmp_path: Path) -> None:
    """Model, objective, attack, averages and further networks are copied; generators are as before."""
    model, objective, attack, ema = tiny_net(dropout=0.2), WithBuffer(), AttackWithBuffer(), EMA(decay=0.9)
    guide = tiny_net(seed=5)
    before = [copy.deepcopy(part.state_dict()) for part in (model, objective, attack, guide)]
    recipe = tiny_recipe(objective=objective, attack=attack, averages=(ema, Interpolation()), networks={"guide": guide})
    torch.manual_seed(11)
    random.seed(11)
    generators = torch.get_rng_state(), random.getstate(), str(np.random.get_state(legacy=False))  # noqa: NPY002
    training = [module.training for module in model.modules()]
    run = fit(recipe, toy(), model, out=tmp_path / "run", settings=FP32)
    assert_same([part.state_dict() for part in (model, objective, attack, guide)], before)
    assert (ema.steps, ema.shadow, recipe.averages[1].previous) == (0, {}, {})
    assert [module.training for module in model.modules()] == training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), str(np.random.get_state(legacy=False))) == generators[1:]  # noqa: NPY002
    state = newest_checkpoint(run.path)["step"]
    assert int(state["objective.calls"]) == 2 * STEPS
    assert int(state["attack.calls"]) == 2 * STEPS
    assert float(state["objective.scale"]) != 1.0
    again = fit(recipe, toy(), model, out=tmp_path / "again", settings=FP32)
    assert_same(weights(again.path), weights(run.path))


def test_the_global_seed_changes_nothing(tmp_path: Path) -> None:
    """The run's own seed does, in weights by name, order and attack."""
    runs = []
    for number, (ambient, seed) in enumerate(((1, 0), (2, 0), (1, 7))):
        torch.manual_seed(ambient)
        out = tmp_path / str(number)
        runs.append(
            fit(tiny_recipe(), toy(), "small_cnn", out=out, seed=seed, settings=FP32, model_options={"width": 2})
        )
    assert_same(weights(runs[0].path), weights(runs[1].path))
    assert not torch.equal(weights(runs[0].path)["fc.weight"], weights(runs[2].path)["fc.weight"])


def test_dropout_is_drawn_by_seed_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another mask at every step, the same in a run of the same seed, whatever the global generator has come to."""
    masks: list[Tensor] = []

    def forward(self: nn.Dropout, x: Tensor) -> Tensor:
        mask = nn.functional.dropout(torch.ones_like(x), self.p, self.training)
        if self.training:
            masks.append(mask)
        return x * mask

    monkeypatch.setattr(nn.Dropout, "forward", forward)
    drawn = []
    for ambient, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(ambient)
        recipe = tiny_recipe(attack=None, objective=StandardTraining())
        fit(recipe, toy(), tiny_net(dropout=0.5), out=tmp_path / f"{ambient}-{seed}", seed=seed, settings=FP32)
        drawn.append(list(masks))
        masks.clear()
    assert_same(drawn[0], drawn[1])
    assert len(drawn[0]) == 2 * STEPS
    for first in range(2 * STEPS):
        assert not torch.equal(drawn[0][first], drawn[2][first])
        assert all(not torch.equal(drawn[0][first], drawn[0][later]) for later in range(first + 1, 2 * STEPS))


def test_any_module(tmp_path: Path) -> None:
    """No BatchNorm, no name, no method but forward; it comes back with the weights on the caller's architecture."""
    run = fit(tiny_recipe(), toy(), nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), out=tmp_path / "run", settings=FP32)
    assert run.summary["model"] == "torch.nn.modules.container.Sequential"
    assert torch.equal(run.model()[1].weight, weights(run.path)["1.weight"])
    with pytest.raises(HoldfastError, match=r"of your own, given from Python: load it by load_model\('.*', model=THE"):
        holdfast.load_model(run.path)
    model = holdfast.load_model(run.path, model=nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
    assert torch.equal(model[1].weight, weights(run.path)["1.weight"])


def readme(number: int) -> str:
    """A Python example of the README, as it stands there."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[number]


def test_the_readmes_three_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same as the command, from Python; here on fewer images and epochs."""
    code = readme(0)
    assert len(code.strip().replace("\n\n", "\n").splitlines()) == 3
    whole = recipes.piat_nmse
    monkeypatch.setattr(recipes, "piat_nmse", lambda epsilon: replace(whole(epsilon=epsilon), epochs=1))
    monkeypatch.setattr("holdfast.setup.load", lambda source, image_size: {"digits": toy()}[source])
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(code, scope)
    run = scope["run"]
    assert run.path == Path("runs/mine")
    assert capsys.readouterr().out == f"{run.summary['robust_accuracy']} {run.summary['interval']}\n"
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(holdfast.load_model("runs/mine")(x), run.model()(x))


def test_the_readmes_loop_of_ones_own() -> None:
    """The step in a person's own loop, in ten lines; the loss falls."""
    code = readme(2)
    assert len(code.strip().replace("\n\n", "\n").splitlines()) <= 10
    data, model = toy().train, tiny_net()
    x, y = to_pixels(data.pixels), data.labels
    orders = [torch.randperm(72, generator=torch.Generator().manual_seed(number))[:32] for number in range(40)]
    losses: list[float] = []

    class Batches(list[Any]):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                yield batch
                losses.append(scope["terms"]["loss"].item())

    scope: dict[str, Any] = {"model": model, "batches": Batches((x[rows], y[rows], rows) for rows in orders)}
    exec(code, scope)
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


# ------------------------------------------------------------------------------------------------ small things


def test_an_objective_that_couples_nothing_sees_every_image(tmp_path: Path) -> None:
    """Every training image once an epoch, in another order in every epoch."""
    seen: list[Tensor] = []

    class Seeing(Objective):
        def sides(self, progress: Progress) -> tuple[str, ...]:
            return ("clean",)

        def forward(self, f: Forward) -> dict[str, Tensor]:
            seen.append(f.batch.rows.clone())
            return {"ce": cross_entropy(f.outputs["clean"].logits, f.batch.labels)}

    settings = replace(FP32, drop_last=False)
    fit(
        tiny_recipe(attack=None, objective=Seeing(), batch_size=13),
        toy(),
        tiny_net(),
        out=tmp_path / "r",
        settings=settings,
    )
    epochs = torch.cat(seen[:5]), torch.cat(seen[5:])
    assert len(seen) == 10
    assert all(sorted(epoch.tolist()) == list(range(65)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_the_display_is_told_everything(tmp_path: Path) -> None:
    """Start, every step with its terms, every epoch's line, the evaluation's images."""
    told: list[Any] = []

    class Told(Display):
        def start(self, total_steps: int, done: int, images_per_step: int) -> None:
            told.append((total_steps, done, images_per_step))

        def step(self, epoch: int, terms: Any) -> None:
            told.append((epoch, sorted(terms)))

        def epoch(self, line: Any, epochs: int) -> None:
            told.append((line["epoch"], epochs))

        def work(self, text: str, total: int) -> None:
            told.append((text, total))

        def advance(self, count: int) -> None:
            told.append(count)

    fit(tiny_recipe(epochs=1), toy(), tiny_net(), out=tmp_path / "run", settings=FP32, display=Told())
    step = (1, ["adv_ce", "loss"])
    assert told == [(4, 0, 16), step, step, step, step, (1, 1), ("evaluating best (PGD-2)", 24), 24]


def test_the_live_display_prints_a_line_an_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On standard error, with all that the issue names."""
    fit(tiny_recipe(), toy(), tiny_net(), out=tmp_path / "run", settings=FP32, display=LiveDisplay())
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if line.startswith("epoch ")]
    assert told.out == ""
    assert len(lines) == 2
    for part in ("epoch 1/2", "adv_ce", "validation clean", "robust", "images/s", "left"):
        assert part in lines[0]


def test_small_training_sets_lower_the_batch(tmp_path: Path) -> None:
    """And it is said."""
    said: list[str] = []

    class Heard(Display):
        def say(self, text: str) -> None:
            said.append(text)

    run = fit(tiny_recipe(batch_size=500), toy(), tiny_net(), out=tmp_path / "run", settings=FP32, display=Heard())
    assert "batch size lowered from 500 to 65: there are no more training images" in said
    assert [line["step"] for line in metrics(run.path)] == [1, 2]


def test_the_best_model_of_a_loop_that_validates_the_ema_differs_from_raw_statistics(tmp_path: Path) -> None:
    """`step.model` after a run of EMA(buffers='keep'): exported buffers are the network's own."""
    run = fit(
        tiny_recipe(averages=(EMA(decay=0.9, buffers="keep"),)), toy(), tiny_net(), out=tmp_path / "r", settings=FP32
    )
    last, own = weights(run.path, "last"), newest_checkpoint(run.path)["step"]
    assert torch.equal(last["1.running_var"], own["model.1.running_var"])
    assert not torch.equal(last["5.weight"], own["model.5.weight"])


def test_recipes_of_the_issue_run(tmp_path: Path) -> None:
    """Each by name, one epoch, with finite terms of its own."""
    terms = {"standard": {"clean_ce"}, "pgd_at": {"adv_ce"}, "pgd_at_wa": {"adv_ce"}}
    for name in ("standard", "pgd_at", "pgd_at_wa", "pgd_at_nmse", "piat", "piat_nmse"):
        recipe = replace(recipes.RECIPES[name](epsilon=0.1), epochs=1, batch_size=16, warmup=0.0)
        settings = Settings(precision="fp32", device="cpu", validation_steps=1, test_steps=1)
        run = fit(recipe, toy(), tiny_net(), out=tmp_path / name, settings=settings)
        (line,) = metrics(run.path)
        wanted = terms.get(name, {"adv_ce", "nmse"} if "nmse" in name else {"adv_ce"})
        assert set(line["terms"]) == {"loss", *wanted}
        assert line["terms"]["loss"] == pytest.approx(sum(v for k, v in line["terms"].items() if k != "loss"), rel=1e-5)


def test_a_dataset_needs_no_name_to_be_trained_on(tmp_path: Path) -> None:
    """Any two splits of bytes and labels."""
    pixels = torch.randint(0, 256, (60, 6, 10, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Images(pixels, torch.arange(60) % 3)
    data = Dataset("mine", train=split, test=split, classes=("a", "b", "c"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(180, 3))
    run = fit(tiny_recipe(epochs=1), data, model, out=tmp_path / "run", settings=FP32)
    assert json.loads((run.path / "model" / "config.json").read_text())["input"] == {
        "channels": 3, "height": 6, "width": 10, "range": [0, 1], "output": "logits",
    }  # fmt: skip
    assert isinstance(AdversarialStep(tiny_recipe(), model), nn.Module)
