"""A run that was stopped anywhere and goes on ends like one that was never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast import EMA, SWA, Interpolation, NormalizedMSE, SplitBatchNorm, View, WorstWeights, fit
from holdfast.forward import Attacked, Batch, Forward
from holdfast.interruption import Interrupted
from holdfast.loop import Loop
from holdfast.objectives.base import Measurement
from holdfast.recipe import SGD, Recipe
from holdfast.runs.checkpoint import checkpoints
from holdfast.runs.files import read_json
from holdfast.schedule import Schedule
from tiny_runs import (
    FP32,
    NET,
    Killed,
    Said,
    assert_same,
    assert_same_run,
    command,
    killed_at,
    metrics,
    refused,
    summary,
    tiny_net,
    tiny_recipe,
    toy,
    train,
    weights,
    write_toy,
)

EPOCHS, STEPS = 3, 4


def clean_accuracy(view: View, batches: Any) -> float:
    """Share of augmented training images that are classified correctly."""
    with torch.no_grad():
        return float(torch.cat([view(b.x).logits.argmax(1) == b.y for b in batches]).double().mean())


class Remembering(NormalizedMSE):
    """NMSE with a memory of every image's clean logits, a trained scale, and a weight that the loop measures."""

    measures = (Measurement("clean_accuracy", clean_accuracy, images=32),)

    def __init__(self) -> None:
        super().__init__(strength=1.0)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("memory", torch.zeros(72, 4))
        self.register_buffer("unsaved", torch.ones(()), persistent=False)

    def forward(self, f: Forward) -> dict[str, Tensor]:
        clean = f.outputs["clean"].logits
        pull = (self.scale * clean - self.memory[f.batch.rows]).pow(2).sum(1)
        with torch.no_grad():
            self.memory[f.batch.rows] = 0.9 * self.memory[f.batch.rows] + 0.1 * clean.detach()
            self.unsaved.mul_(1.01)
        strength = 0.1 * (0.5 + f.progress.measured["clean_accuracy"]) * self.unsaved
        return {**super().forward(f), "memory": strength * pull}


class FromLastTime(nn.Module):
    """One step from where the last search on the image ended: an attack with a memory."""

    statistics = "eval"
    memory: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(72, 1, 8, 8))

    def passes(self) -> float:
        return 2.0

    def forward(self, view: View, batch: Batch, inner_loss: Any, *, threat: Any, progress: Any) -> Attacked:
        x = threat.project(batch.x + self.memory[batch.rows], batch.x).requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(inner_loss(view.detached()(x).logits).sum(), x)
        x_adv = threat.project(x.detach() + 0.05 * threat.steepest(gradient), batch.x)
        self.memory[batch.rows] = (x_adv - batch.x).detach()
        return Attacked(x_adv, torch.zeros_like(batch.y))


def everything() -> Recipe:
    """A recipe in which all that a run keeps changes its weights."""
    return tiny_recipe(
        attack=FromLastTime(),
        objective=Remembering(),
        views=(SplitBatchNorm(), WorstWeights(gamma=0.02)),
        averages=(Interpolation(), SWA(begin=0.3, period=3, buffers="clean"), EMA(decay=0.9)),
        optimizer=SGD(learning_rate=0.05, momentum=Schedule(((0, 0.9), (1, 0.5))), weight_decay=1e-3),
        schedule=Schedule(((0, 1), (1, 0.1))),
        warmup=3 / (EPOCHS * STEPS),
        label_smoothing=0.1,
        epochs=EPOCHS,
    )


def go(out: Path, *, resume: bool = False, **settings: Any) -> Path:
    """A run of `everything` on a network with BatchNorm and dropout."""
    chosen = FP32.__class__(**{**vars(FP32), **settings})
    return fit(everything(), toy(), tiny_net(dropout=0.3), out=out, settings=chosen, resume=resume).path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stopped."""
    return go(tmp_path_factory.mktemp("whole") / "run")


class Crash(Exception):
    """What a kill looks like from inside."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, how: Callable[[Loop], None]) -> None:
    """Do something to the loop right after so many steps."""
    before = Loop.one_step

    def one_step(self: Loop, batch: Batch, progress: Any) -> None:
        before(self, batch, progress)
        if progress.step + 1 == step:
            how(self)

    monkeypatch.setattr(Loop, "one_step", one_step)


def ask(loop: Loop) -> None:
    loop.interruption.asked = True


def crash(loop: Loop) -> None:
    raise Crash


def test_the_run_is_what_the_other_tests_need(whole: Path) -> None:
    """Warm-up, both averages, the memories and the measured value are all at work."""
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert list(lines[0]["terms"]) == ["loss", "clean_ce", "adv_ce", "nmse", "memory"]
    assert len({line["measured"]["clean_accuracy"] for line in lines}) > 1
    assert not torch.equal(weights(whole)["0.weight"], tiny_net().state_dict()["0.weight"])


@pytest.mark.parametrize("step", range(1, EPOCHS * STEPS))
def test_asked_to_stop_after_any_step(step: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at every position: saved at once, resumed bit for bit."""
    stop_at(monkeypatch, step, ask)
    with pytest.raises(Interrupted) as stopped:
        go(tmp_path / "run")
    assert str(stopped.value) == f"stopped; go on with: holdfast train --resume --out {tmp_path / 'run'}"
    assert checkpoints(tmp_path / "run")[-1].name == f"step-{step:010d}.pt"
    monkeypatch.undo()
    assert_same_run(go(tmp_path / "run", resume=True), whole)


@pytest.mark.parametrize("minutes", [15.0, 0.0])
@pytest.mark.parametrize("step", [1, 4, 6, 11, 12])
def test_crashed_after_a_step(
    step: int, minutes: float, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing could be saved any more: the run goes on from the last checkpoint, in an epoch or at its end."""
    stop_at(monkeypatch, step, crash)
    with pytest.raises(Crash):
        go(tmp_path / "run", checkpoint_minutes=minutes)
    found = [int(path.stem.removeprefix("step-")) for path in checkpoints(tmp_path / "run")]
    last = step - 1 if minutes == 0 else (step - 1) // STEPS * STEPS
    assert max(found, default=0) == last
    assert len(found) <= FP32.keep_checkpoints
    monkeypatch.undo()
    assert_same_run(go(tmp_path / "run", resume=True, checkpoint_minutes=minutes), whole)


@pytest.mark.parametrize("where", ["restore_metrics", "append_metrics", "write_summary", "export", "save", "close"])
def test_crashed_at_an_epochs_end(where: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between any two of the things that an epoch's end writes."""
    from holdfast.runs.folder import RunFolder

    owner: Any = Loop if hasattr(Loop, where) else RunFolder
    before = getattr(owner, where)

    def after(*arguments: Any) -> None:
        before(*arguments)
        raise Crash

    monkeypatch.setattr(owner, where, after)
    with pytest.raises(Crash):
        go(tmp_path / "run")
    monkeypatch.undo()
    assert_same_run(go(tmp_path / "run", resume=True), whole)


@pytest.mark.slow
def test_killed_before_or_after_any_rename(whole: Path, tmp_path: Path) -> None:
    """Every file gets its place, and every digest, by a rename: between any two the run is whole."""
    with killed_at(999, after=True) as renamed:
        go(tmp_path / "count")
    assert {"model.safetensors", "model.safetensors.sha256", "step-0000000012.pt", "summary.json"} <= set(renamed)
    for number, name in enumerate(renamed):
        for after in (False, True):
            out = tmp_path / f"{number}-{after}"
            with killed_at(number, after=after), pytest.raises(Killed):
                go(out)
            said = Said()
            fit(everything(), toy(), tiny_net(dropout=0.3), out=out, settings=FP32, resume=True, display=said)
            assert not any("damaged" in text or "anew" in text for text in said.texts), (name, said.texts)
            assert_same_run(out, whole)


def test_stopped_twice(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run can be stopped and resumed again; environment.json tells of both."""
    for step, resume in ((3, False), (7, True)):
        with monkeypatch.context() as patch:
            stop_at(patch, step, ask)
            with pytest.raises(Interrupted):
                go(tmp_path / "run", resume=resume)
    assert_same_run(go(tmp_path / "run", resume=True), whole)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert len(environment["resumed"]) == 2


@pytest.mark.parametrize("junk", ['{"epoch": 3, "terms": {', '{"epoch": 99}\n{"epoch": 100}\n'])
def test_metrics_are_cut_back(junk: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that the checkpoint does not know of, whole or not, go."""
    stop_at(monkeypatch, 6, ask)
    with pytest.raises(Interrupted):
        go(tmp_path / "run")
    monkeypatch.undo()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(junk)
    assert_same_run(go(tmp_path / "run", resume=True), whole)


def test_files_of_a_killed_write_are_no_hindrance(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a checkpoint has no checkpoint's name; half a configuration does not make a folder taken."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.yaml.part").write_text("recipe: ti")
    stop_at(monkeypatch, 6, ask)
    with pytest.raises(Interrupted):
        go(run)
    monkeypatch.undo()
    (run / "checkpoints" / ".step-0000000011.pt.part").write_bytes(b"PK")
    assert_same_run(go(run, resume=True), whole)


def test_seconds_count_what_came_before_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving inside an epoch, and stopping in it, take nothing from its time or add to its speed."""
    stop_at(monkeypatch, 3, ask)
    before = Loop.one_step

    def slow(self: Loop, batch: Batch, progress: Any) -> None:
        time.sleep(0.05)
        before(self, batch, progress)

    monkeypatch.setattr(Loop, "one_step", slow)
    with pytest.raises(Interrupted):
        go(tmp_path / "run", checkpoint_minutes=0.0)
    go(tmp_path / "run", checkpoint_minutes=0.0, resume=True)
    for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        assert line["seconds"] >= 0.05 * STEPS
        assert line["images_per_second"] == pytest.approx(STEPS * 16 / line["seconds"], rel=1e-6)


def test_a_finished_run_stays_as_it_is(whole: Path) -> None:
    """Resuming it returns what it found and writes nothing."""

    def times() -> dict[Path, int]:  # but for the lock, which some versions of filelock open for writing
        return {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}

    before = times()
    shown: list[str] = []

    class Heard(__import__("holdfast.progress_display", fromlist=["Display"]).Display):  # type: ignore[misc]
        def say(self, text: str) -> None:
            shown.append(text)

    run = fit(everything(), toy(), tiny_net(dropout=0.3), out=whole, settings=FP32, resume=True, display=Heard())
    assert shown == [f"{whole} is already finished"]
    assert run.summary == read_json(whole / "summary.json")
    assert times() == before


# ------------------------------------------------------------------------------------------------ real signals


def test_sigterm_stops_after_the_step(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is finished and saved; the handlers are put back."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop_at(monkeypatch, 5, lambda loop: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        go(tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert checkpoints(tmp_path / "run")[-1].name == "step-0000000005.pt"
    monkeypatch.undo()
    assert_same_run(go(tmp_path / "run", resume=True), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_commands_exit_code(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """128 and the signal, after the first as after the second; and the command that goes on."""
    data, out = write_toy(tmp_path / "toy.npz"), tmp_path / "run"
    stop_at(monkeypatch, 2, lambda loop: signal.raise_signal(number))
    assert train(data, out) == 128 + number
    again = f"with: holdfast train --resume --out {out}"
    assert capsys.readouterr().err.splitlines()[-1] == f"holdfast: stopped; go on {again}"
    assert [path.name for path in checkpoints(out)] == ["step-0000000002.pt"]
    monkeypatch.undo()

    def twice(loop: Loop) -> None:
        for _ in range(2):
            signal.raise_signal(number)

    monkeypatch.setattr("holdfast.interruption.COPIES", 0.0)
    stop_at(monkeypatch, 3, twice)
    assert command("train", "--resume", "--out", out) == 128 + number
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"holdfast: stopped at once; go on from the last checkpoint {again}"
    assert [path.name for path in checkpoints(out)] == ["step-0000000002.pt"]
    monkeypatch.undo()
    assert command("train", "--resume", "--out", out) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_data_is_read(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends at once, and nothing half made stays, not even the folder."""
    import holdfast.train

    def prepare(*arguments: Any, **more: Any) -> None:
        assert (tmp_path / "run" / ".lock").exists()
        signal.raise_signal(number)

    monkeypatch.setattr(holdfast.train, "prepare", prepare)
    assert train(write_toy(tmp_path / "toy.npz"), tmp_path / "run") == 128 + number
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("calls", range(1, EPOCHS + 1))
def test_asked_to_stop_during_a_validation(
    calls: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops after the batch; what the epoch's steps and averages made is kept, and neither is done twice."""
    evaluation, seen = Loop.evaluation, []

    def asked(self: Loop, *arguments: Any) -> Any:
        seen.append(self.epoch)
        self.interruption.asked = len(seen) == calls
        return evaluation(self, *arguments)

    monkeypatch.setattr(Loop, "evaluation", asked)
    with pytest.raises(Interrupted):
        go(tmp_path / "run")
    assert seen[-1] == calls - 1
    lines = tmp_path / "run" / "metrics.jsonl"
    assert (len(metrics(tmp_path / "run")) if lines.exists() else 0) == calls - 1
    assert checkpoints(tmp_path / "run")[-1].name == f"step-{calls * STEPS:010d}.pt"
    assert torch.load(checkpoints(tmp_path / "run")[-1], weights_only=True)["averaged"]
    monkeypatch.undo()
    if calls == EPOCHS:
        monkeypatch.setattr(Loop, "one_step", crash)
    assert_same_run(go(tmp_path / "run", resume=True), whole)


def test_ctrl_c_during_the_closing_evaluation(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All training is saved by then; the message is the same, and only the evaluation is repeated."""
    close = Loop.close

    def asked(self: Loop) -> Any:
        ask(self)
        return close(self)

    monkeypatch.setattr(Loop, "close", asked)
    with pytest.raises(Interrupted):
        go(tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.setattr(Loop, "close", close)
    monkeypatch.setattr(Loop, "one_step", crash)
    assert_same_run(go(tmp_path / "run", resume=True), whole)


SLOW_NET = NET.replace("return self.body", "__import__('time').sleep(0.002); return self.body").replace(
    "super().__init__()", "super().__init__(); self.ballast = nn.Parameter(torch.zeros(300_000))"
)
"""Slow enough to be caught in the act, with checkpoints of a few megabytes."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a model file with a space in its path, and the whole run of the command."""
    folder = tmp_path_factory.mktemp("killed runs")
    write_toy(folder / "toy.npz")
    (folder / "net.py").write_text(SLOW_NET)
    assert train(folder / "toy.npz", folder / "whole", *options(folder), recipe="piat_nmse", epochs=3) == 0
    return folder


def options(folder: Path) -> list[object]:
    return ["--model", f"{folder / 'net.py'}:make", "--averages.ema.decay", 0.9, "--training.checkpoint_minutes", 0]


def started(folder: Path, out: Path) -> subprocess.Popen[str]:
    """`holdfast train` as a process of its own."""
    words = ["train", "piat_nmse", "--data", folder / "toy.npz", "--threat.epsilon", 0.1, "--model.width", 4]
    words += ["--epochs", 3, "--batch-size", 16, "--precision", "fp32", "--training.device", "cpu"]
    words += ["--training.validation_steps", 2, "--training.test_steps", 2, "--attack.steps", 2]
    words += ["--out", out, *options(folder)]
    return subprocess.Popen(
        [sys.executable, "-m", "holdfast", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], there: Callable[[], bool]) -> None:
    """Look often until something is there."""
    limit = time.monotonic() + 300
    while not there():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.0005)


def lines_of(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "a metrics line": lambda out: lines_of(out) == 1,
    "half a checkpoint": lambda out: lines_of(out) == 1 and any((out / "checkpoints").glob(".*.part")),
    "a checkpoint inside an epoch": lambda out: (out / "checkpoints" / "step-0000000006.pt").exists(),
}


FIRST, *OTHERS = MOMENTS


@pytest.mark.parametrize("moment", [FIRST, *(pytest.param(other, marks=pytest.mark.slow) for other in OTHERS)])
def test_killed_and_resumed(moment: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL cannot be caught: whatever was being written is lost, and nothing else."""
    out = tmp_path / "run"
    process = started(place, out)
    wait_for(process, lambda: MOMENTS[moment](out))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    assert command("train", "--resume", "--out", out) == 0
    assert "going on after epoch" in capsys.readouterr().err
    assert_same_run(out, place / "whole")


def test_ctrl_c_names_the_command_that_goes_on(place: Path, tmp_path: Path) -> None:
    """Exit code 130, one last line, and that very command works."""
    out = tmp_path / "a run"
    process = started(place, out)
    wait_for(process, lambda: lines_of(out) == 1)
    process.send_signal(signal.SIGINT)
    told = process.communicate()[1].strip().splitlines()
    assert process.returncode == 130
    assert told[-1] == f"holdfast: stopped; go on with: holdfast train --resume --out '{out}'"
    assert command("train", "--resume", "--out", out) == 0
    assert_same_run(out, place / "whole")


# ---------------------------------------------------------------------------------------- refusals of the command


def test_the_command_says_when_there_is_nothing_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run is told; other settings, another recipe and a folder in use are refused."""
    data, out = write_toy(tmp_path / "toy.npz"), tmp_path / "run"
    assert train(data, out) == 0
    before, lines = summary(out), metrics(out)
    capsys.readouterr()
    assert command("train", "--resume", "--out", out, "--json") == 0
    told = capsys.readouterr()
    assert "is already finished" in told.err
    assert json.loads(told.out)["best"] == before["best"]

    words = ["train", "pgd_at", "--data", data, "--threat.epsilon", 0.1]
    assert "add --resume to go on with it" in refused(capsys, *words, "--out", out)
    assert "seed is 0, not 5" in refused(capsys, "train", "--resume", "--out", out, "--seed", 5)
    assert "attack.steps is 2, not 3" in refused(capsys, "train", "--resume", "--out", out, "--attack.steps", 3)
    assert "holds a run of pgd_at, not piat" in refused(capsys, "train", "piat", "--resume", "--out", out)
    assert "--resume needs the run folder" in refused(capsys, "train", "--resume")
    assert "nothing to resume" in refused(capsys, "train", "--resume", "--out", tmp_path / "nowhere")
    full = tmp_path / "full"
    full.mkdir()
    (full / "letter.txt").write_text("dear")
    assert "is not empty and holds no run" in refused(capsys, *words, "--out", full)
    assert_same(summary(out), before)
    assert_same(metrics(out), lines)
    assert [path.name for path in full.iterdir()] == ["letter.txt"]


def test_a_run_begun_from_weights_goes_on_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint holds the weights: the run they came from may be gone by then."""
    source = fit(tiny_recipe(epochs=1), toy(), tiny_net(), out=tmp_path / "source", settings=FP32).path
    file = source / "model" / "model.safetensors"
    settings = {"recipe": tiny_recipe(), "data": toy(), "model": tiny_net(), "settings": FP32, "init": file}
    whole = fit(**settings, out=tmp_path / "whole").path
    stop_at(monkeypatch, 3, ask)
    with pytest.raises(Interrupted):
        fit(**settings, out=tmp_path / "run")
    monkeypatch.undo()
    file.unlink()
    assert_same_run(fit(**settings, out=tmp_path / "run", resume=True).path, whole)
