"""Free-AT: algorithm 1 restated, the loop that counts replays, and the perturbation in the run folder."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from conftest import small_batch, small_network
from holdfast import (
    EMA,
    PGD,
    TRADES,
    AdversarialTraining,
    Consistency,
    GeometryWeighted,
    HoldfastError,
    NormalizedMSE,
    SplitBatchNorm,
    StandardTraining,
    StartConsistency,
    WorstWeights,
    fit,
)
from holdfast.data.images import Dataset
from holdfast.forward import Batch
from holdfast.interruption import Interrupted
from holdfast.loop import Loop
from holdfast.progress_display import Display
from holdfast.recipe import SGD, Recipe
from holdfast.runs.checkpoint import checkpoints
from holdfast.schedule import Progress, Schedule, linear, one_cycle, value_at
from holdfast.setup import prepare
from holdfast.steps.free import Free, FreeStep
from holdfast.threat import L1, L2
from parts import small_recipe
from tiny_runs import (
    FP32,
    FP64,
    assert_same,
    assert_same_run,
    command,
    metrics,
    newest_checkpoint,
    refused,
    tiny_net,
    tiny_recipe,
    toy,
    weights,
)

EPSILON, REPLAYS, EPOCHS = 0.1, 3, 2


def free(*, replays: int = REPLAYS, step_size: Any = None, **changes: Any) -> Recipe:
    """Free-AT for a few epochs, with a learning rate that differs in every replay."""
    settings: dict[str, Any] = {
        "name": "free",
        "attack": None,
        "epochs": EPOCHS,
        "optimizer": SGD(learning_rate=0.1, momentum=0.9, weight_decay=1e-3),
        "schedule": one_cycle(),
        "step": Free(replays=replays, step_size=step_size),
    }
    return tiny_recipe(**{**settings, **changes})


def lone(recipe: Recipe | None = None, *, dtype: torch.dtype = torch.float64) -> FreeStep:
    """The step alone, on a small network for images of `small_batch`."""
    recipe = recipe or small_recipe(AdversarialTraining(), attack=None, step=Free(replays=2))
    assert recipe.step is not None
    return recipe.step(recipe, small_network(dtype=dtype), precision="fp32", check_finite=True)


class Noted:
    """Every pass of the network in training mode, and every perturbation after a replay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: list[Tensor] = []
        self.deltas: list[Tensor] = []
        find, after = FreeStep.find, FreeStep.after_backward

        def noted_find(step: FreeStep, *arguments: Any, **more: Any) -> Any:
            found = find(step, *arguments, **more)
            self.images.append(found.x_adv.detach().clone())
            return found

        def noted_after(step: FreeStep, progress: Progress) -> None:
            after(step, progress)
            self.deltas.append(step.delta.clone())

        monkeypatch.setattr(FreeStep, "find", noted_find)
        monkeypatch.setattr(FreeStep, "after_backward", noted_after)


# ------------------------------------------------------------------------------------------------ algorithm 1 restated


def algorithm_1(
    recipe: Recipe, model: nn.Module, epochs: list[list[Batch]], step_size: Callable[[Progress], float]
) -> tuple[list[Tensor], list[Tensor]]:
    """Free-AT as the paper prints it, with SGD written out; changes the model, returns images and perturbations."""
    assert isinstance(recipe.step, Free)
    model.train()
    delta = torch.zeros(recipe.batch_size, 1, 8, 8, dtype=torch.float64)
    speed = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    images, deltas = [], []
    step, a_epoch = 0, len(epochs[0]) * recipe.step.replays
    for number, batches in enumerate(epochs):
        for batch in batches:
            rows = len(batch.y)
            for replay in range(recipe.step.replays):
                now = Progress(number, step, a_epoch, len(epochs), replay=replay)
                x_adv = (batch.x + delta[:rows]).clamp(0, 1).requires_grad_(True)
                loss = F.cross_entropy(model(x_adv), batch.y)
                loss.backward()  # both gradients at once, at the perturbation before its step
                assert x_adv.grad is not None
                images.append(x_adv.detach().clone())
                moved = x_adv.detach() - batch.x + step_size(now) * x_adv.grad.sign()
                moved = moved.clamp(-EPSILON, EPSILON)
                delta[:rows] = torch.minimum(torch.maximum(moved, -batch.x), 1 - batch.x)
                deltas.append(delta.clone())
                for name, weight in model.named_parameters():
                    assert weight.grad is not None
                    speed[name] = 0.9 * speed[name] + weight.grad + 1e-3 * weight.detach()
                    with torch.no_grad():
                        weight -= 0.1 * recipe.schedule(now) * speed[name]
                    weight.grad = None
                step += 1
    return images, deltas


def contrasty(count: int) -> Dataset:
    """Quadrants with black and white pixels, so that the pixel bounds bind on both sides."""
    data = toy(count)
    pixels = data.train.pixels.clone()
    pixels[pixels < 40], pixels[pixels > 100] = 0, 255
    return replace(data, train=replace(data.train, pixels=pixels))


@pytest.mark.parametrize("step_size", [None, 0.04, linear(0.02, 0.08)])
def test_training_is_algorithm_1(step_size: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, BatchNorm's statistics, every image and every perturbation, over replays, batches and epochs."""
    data, recipe = contrasty(73), free(step_size=step_size, batch_size=13)
    settings = replace(FP64, drop_last=False)
    setup = prepare(recipe, data, tiny_net(), seed=0, settings=settings)
    epochs = [list(setup.loader.batches(epoch)) for epoch in range(EPOCHS)]
    assert [len(batch.y) for batch in epochs[0]] == [13] * 5 + [1]
    expected = tiny_net().double()
    size = EPSILON if step_size is None else step_size
    images, deltas = algorithm_1(recipe, expected, epochs, lambda now: value_at(size, now))
    noted = Noted(monkeypatch)
    run = fit(recipe, data, tiny_net(), out=tmp_path / "run", settings=settings)
    assert len(noted.images) == len(images) == EPOCHS * 6 * REPLAYS
    for step, (seen, wanted) in enumerate(zip(noted.images, images, strict=True)):
        torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-12, msg=f"images of step {step}")
        torch.testing.assert_close(noted.deltas[step], deltas[step], rtol=0, atol=1e-12, msg=f"delta of step {step}")
    for name, tensor in weights(run.path, "last").items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=0, atol=1e-10, msg=name)
    assert int(weights(run.path, "last")["1.num_batches_tracked"]) == len(images)  # one tracked pass a replay


def test_images_keep_to_ball_and_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every pass, the first on new images included, whose carried perturbation was made for others."""
    noted = Noted(monkeypatch)
    recipe = free(replays=2, step_size=10 * EPSILON)
    setup = prepare(recipe, contrasty(72), tiny_net(), seed=0, settings=FP32)
    fit(recipe, contrasty(72), tiny_net(), out=tmp_path / "run", settings=FP32)
    batches = [batch for epoch in range(EPOCHS) for batch in setup.loader.batches(epoch) for _ in range(2)]
    cut = 0
    for number, (batch, seen) in enumerate(zip(batches, noted.images, strict=True)):
        assert float(seen.min()) >= 0
        assert float(seen.max()) <= 1
        assert float((seen - batch.x).abs().max()) <= EPSILON + 1e-6
        if number:
            carried = batch.x + noted.deltas[number - 1][: len(seen)]
            cut += int(((carried < 0) | (carried > 1)).sum())
    assert cut > 100  # without the clamp many would have left


def test_rows_beyond_a_short_batch_keep_theirs() -> None:
    """The next full batch begins with them."""
    step = lone()
    whole, short = small_batch(dtype=torch.float64), small_batch(rows=5, dtype=torch.float64, seed=2)
    for batch in (whole, short):
        before = step.delta.clone()
        step(batch, Progress())["loss"].backward()
        step.after_backward(Progress())
    assert torch.equal(step.delta[5:], before[5:])
    assert not torch.equal(step.delta[:5], before[:5])
    assert float(before[5:].abs().min()) > 0
    seen = step.find(whole, step.objective, Progress()).x_adv.detach()
    torch.testing.assert_close(seen[5:], (whole.x + before)[5:].clamp(0, 1))


def test_l2_climbs_along_the_gradient() -> None:
    """By a step of the given length a row, projected onto the ball."""
    step = lone(small_recipe(AdversarialTraining(), attack=None, threat=L2(0.5), step=Free(step_size=0.3)))
    batch = small_batch(dtype=torch.float64)
    for longest in (0.3, 0.5, 0.5):
        step(batch, Progress())["loss"].backward()
        step.after_backward(Progress())
        lengths = step.delta.flatten(1).norm(dim=1)
        assert float(lengths.max()) <= longest + 1e-9
        assert float(lengths.min()) > 0.1


def test_without_gradient_or_attacked_side_nothing_moves() -> None:
    """Under no_grad, on another model, in a clean warm-up, and with an objective that attacks nothing."""
    step, batch = lone(), small_batch(dtype=torch.float64)
    with torch.no_grad():
        step(batch, Progress())
    assert step.leaf is None
    found = step.find(batch, step.objective, Progress(), model=small_network(dtype=torch.float64))
    assert not found.x_adv.requires_grad
    warm = Progress(warmup_steps=5)
    assert set(step(batch, warm)) == {"loss", "clean_ce"}
    step.after_backward(warm)
    assert float(step.delta.abs().sum()) == 0


def test_other_losses_and_averages_train(tmp_path: Path) -> None:
    """NMSE by Free-AT, with soft labels, clipping, warm-up and EMA, on a network that draws."""
    recipe = free(objective=NormalizedMSE(), averages=(EMA(decay=0.8),), label_smoothing=0.1, gradient_clip=1.0)
    recipe = replace(recipe, warmup=0.25)
    run = fit(recipe, toy(), tiny_net(dropout=0.2), out=tmp_path / "run", settings=FP32)
    first, second = metrics(run.path)
    assert set(second["terms"]) == {"loss", "adv_ce", "nmse"}
    assert second["terms"]["nmse"] > 0
    assert set(first["terms"]) == {"loss", "clean_ce", "adv_ce", "nmse"}


def test_cost_is_that_of_the_training_pass() -> None:
    """A forward and a full backward of every side: the attack is free."""
    assert free().passes() == 3.0
    assert free(objective=NormalizedMSE()).passes() == 6.0


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("view", [WorstWeights(gamma=0.01), SplitBatchNorm()])
def test_refused_with_views(view: Any) -> None:
    """They would run the very pass that attacks at other weights or statistics."""
    with pytest.raises(HoldfastError, match=f"which {type(view).__name__} would run at other weights .* leave the vie"):
        free(views=(view,), objective=NormalizedMSE())


def test_refused_settings() -> None:
    """With an attack, without whole replays, and under L1."""
    with pytest.raises(HoldfastError, match="makes its own perturbation from the training pass: give it a recipe with"):
        free(attack=PGD(steps=1))
    for replays in (0, -1, 2.0, True):
        with pytest.raises(HoldfastError, match=r"replays is .*: give a whole number of at least 1"):
            Free(replays=replays)  # type: ignore[arg-type]  # that is the test
    with pytest.raises(HoldfastError, match="L1"):
        lone(small_recipe(attack=None, threat=L1(1.0), objective=NormalizedMSE(), step=Free()))


def test_step_size_is_a_radius() -> None:
    """Text like 2/255 is read, and a bare number of grey values is refused."""
    assert Free(step_size="2/255").step_size == pytest.approx(2 / 255)
    with pytest.raises(HoldfastError, match=r"write 2/255 if that was meant"):
        Free(step_size=2)
    with pytest.raises(HoldfastError, match=r"step_size is -0.1: it must be at least 0"):
        Free(step_size=-0.1)
    seen = []
    for step_size in ("2/255", 2 / 255):
        step = lone(small_recipe(AdversarialTraining(), attack=None, step=Free(step_size=step_size)))
        step(small_batch(dtype=torch.float64), Progress())["loss"].backward()
        step.after_backward(Progress())
        seen.append(step.delta)
    assert torch.equal(*seen)
    assert float(seen[0].abs().max()) == pytest.approx(2 / 255)


@pytest.mark.parametrize(
    ("objective", "part"),
    [
        (StandardTraining(), "StandardTraining runs on clean or"),  # no attacked side
        (StartConsistency(), "StartConsistency runs on adv_start, adv or"),  # images that another attack makes
        (Consistency(), "Consistency runs on adv, adv2 or"),  # two attacked views
        (GeometryWeighted(), "or counts attack steps: use another objective"),
        (TRADES(), "begins at zero, where TRADES has no gradient"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_refused_objectives(objective: Any, part: str) -> None:
    """Those that one attacked image, without a count of steps, and from the clean image, do not serve."""
    with pytest.raises(HoldfastError, match=re.escape(part)) as refusal:
        free(objective=objective)
    assert "--objective.name adversarial_training" in str(refusal.value)


# ------------------------------------------------------------------------------------------------ the loop


class Counted(Display):
    """How many steps the display was told of."""

    def __init__(self) -> None:
        self.total = self.steps = 0

    def start(self, total_steps: int, done: int, images_per_step: int) -> None:
        self.total = total_steps

    def step(self, epoch: int, terms: Any) -> None:
        self.steps += 1


def test_the_loop_counts_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, learning rate, the network's draws, averages, display, metrics, checkpoints, speed."""
    seen: list[tuple[Any, ...]] = []
    before = Loop.one_step

    def one_step(self: Loop, batch: Batch, progress: Progress) -> None:
        time.sleep(0.002)
        before(self, batch, progress)
        rate = self.optimizers[0].param_groups[0]["lr"]
        seen.append((progress.step, progress.replay, progress.epoch, rate, batch.rows.tolist()))

    monkeypatch.setattr(Loop, "one_step", one_step)
    display = Counted()
    run = fit(free(), toy(), tiny_net(), out=tmp_path / "run", settings=FP32, display=display)
    batches, all_steps = 4, EPOCHS * 4 * REPLAYS
    schedule = one_cycle()
    for step, (number, replay, epoch, rate, rows) in enumerate(seen):
        assert (number, replay, epoch) == (step, step % REPLAYS, step // (batches * REPLAYS))
        assert rate == 0.1 * schedule(Progress(epoch, step, batches * REPLAYS, EPOCHS))
        assert (rows == seen[step - 1][4]) == (replay > 0)
    assert len(seen) == display.steps == display.total == all_steps
    assert len({rate for *_, rate, _ in seen}) > all_steps // 2
    assert [line["step"] for line in metrics(run.path)] == [batches * REPLAYS, all_steps]
    assert [path.name for path in checkpoints(run.path)] == ["step-0000000012.pt", "step-0000000024.pt"]
    for line in map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines()):
        assert line["seconds"] >= 0.002 * batches * REPLAYS
        assert line["images_per_second"] == pytest.approx(batches * REPLAYS * 16 / line["seconds"], rel=1e-6)


# ------------------------------------------------------------------------------------------------ state


def test_a_state_goes_into_a_fresh_step() -> None:
    """Whose perturbation has no size yet; the next replay is the same bit for bit."""
    one, batch = lone(), small_batch(dtype=torch.float64)
    for _ in range(2):
        one(batch, Progress())["loss"].backward()
        one.after_backward(Progress())
    other = lone()
    assert len(other.delta) == 0
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.delta, other.delta)
    for step in (one, other):
        step.zero_grad()
        step(batch, Progress())["loss"].backward()
        step.after_backward(Progress())
    assert_same(one.state_dict(), other.state_dict())
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)
    one.load_state_dict(lone().state_dict())  # and back to before the first step
    assert len(one.delta) == 0


class Crash(Exception):
    """What a kill looks like from inside."""


def eventful() -> Recipe:
    """Free-AT in which all that a run keeps changes its weights."""
    return free(
        averages=(EMA(decay=0.9),),
        optimizer=SGD(learning_rate=0.1, momentum=Schedule(((0, 0.9), (1, 0.5)))),
        warmup=4 / (EPOCHS * 4 * REPLAYS),
    )


def go(out: Path, *, resume: bool = False, minutes: float = 15.0) -> Path:
    settings = replace(FP32, checkpoint_minutes=minutes)
    return fit(eventful(), toy(), tiny_net(dropout=0.3), out=out, settings=settings, resume=resume).path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """The runs that nobody stopped, with few checkpoints and with many, which keep settings of their own."""
    folder = tmp_path_factory.mktemp("whole")
    return {minutes: go(folder / f"{minutes}", minutes=minutes) for minutes in (15.0, 0.0)}


@pytest.mark.parametrize(("step", "asked"), [(1, True), (8, True), (12, True), (17, True), (5, False), (20, False)])
def test_stopped_inside_an_epoch(
    step: int, asked: bool, whole: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two replays, by Ctrl-C or a kill: the batch is finished or repeated, and δ is in the checkpoint."""
    before = Loop.one_step

    def one_step(self: Loop, batch: Batch, progress: Progress) -> None:
        before(self, batch, progress)
        if progress.step + 1 == step:
            if not asked:
                raise Crash
            self.interruption.asked = True

    monkeypatch.setattr(Loop, "one_step", one_step)
    minutes = 15.0 if asked else 0.0
    with pytest.raises(Interrupted if asked else Crash):
        go(tmp_path / "run", minutes=minutes)
    monkeypatch.undo()
    batches = -(-step // REPLAYS) if asked else (step - 1) // REPLAYS
    state = newest_checkpoint(tmp_path / "run")
    assert checkpoints(tmp_path / "run")[-1].name == f"step-{batches * REPLAYS:010d}.pt"
    if batches > 2:  # the warm-up makes none
        assert float(state["step"]["delta"].abs().max()) > 0
        assert_same(state["step"]["delta"], state["ranks"][0]["buffers"]["delta"])
    assert_same_run(go(tmp_path / "run", minutes=minutes, resume=True), whole[minutes])


# ------------------------------------------------------------------------------------------------ the command

QUICK = ["--epochs", 1, "--training.test_steps", 1, "--training.validation_steps", 1, "--training.test_images", 40]
QUICK += ["--model.width", 4, "--training.device", "cpu"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the digits with two replays, twice as many steps as batches; --config repeats it to the bit."""
    assert command("train", "free_at", "--data", "digits", "--step.replays", 2, *QUICK, "--out", tmp_path / "run") == 0
    assert "free_at on digits" in capsys.readouterr().err
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["step"] == {"name": "free", "replays": 2, "step_size": None}
    assert config["attack"] is None
    (line,) = metrics(tmp_path / "run")
    assert line["step"] == 2 * config["resolved"]["steps_per_epoch"] == 20
    assert command("train", "--config", tmp_path / "run" / "config.yaml", "--out", tmp_path / "again") == 0
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "again"))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--views.worst_weights.gamma", "0.01"], "which WorstWeights would run at other weights or statistics"),
        (["--views.split_batchnorm.sides", "[clean]"], "which SplitBatchNorm would run"),
        (["--attack.name", "pgd"], "give it a recipe without an attack"),
        (["--step.step_size", "2"], "write 2/255 if that was meant"),
        (["--objective.name", "trades"], "begins at zero, where TRADES has no gradient"),
        (["--step.replays", "0"], "replays is 0: give a whole number of at least 1"),
        (["--step.replays", "2.5"], "--step.replays is '2.5': give a whole number"),
        (["--step.replay", "2"], "did you mean --step.replays"),
    ],
)
def test_refusals_of_the_command(
    words: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2, nothing written."""
    told = refused(capsys, "train", "free_at", "--data", "digits", "--out", tmp_path / "run", *words)
    assert part in told
    assert not (tmp_path / "run").exists()
