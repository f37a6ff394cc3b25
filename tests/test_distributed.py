"""Two processes train like one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from holdfast import (
    EMA,
    FGSM,
    SWA,
    TRADES,
    AdversarialTraining,
    BoundaryGuided,
    ClassStartFGSM,
    Consistency,
    CutMix,
    DecoupledKL,
    Free,
    Interpolation,
    LabelRefinement,
    LearnableStrategy,
    NormalizedMSE,
    PriorGuided,
    PriorGuidedFGSM,
    Recipe,
    SplitBatchNorm,
    StartConsistency,
    WorstWeights,
    distributed,
    fit,
)
from holdfast import loop as loop_module
from holdfast.catastrophic_overfitting import OvertakenAttack
from holdfast.errors import HoldfastError
from holdfast.forward import Forward
from holdfast.interruption import Interrupted
from holdfast.loop import Loop
from holdfast.runs.files import read_json
from holdfast.runs.folder import RunFolder
from holdfast.schedule import Progress
from holdfast.threat import Linf
from tiny_runs import (
    FP32,
    FP64,
    NET,
    assert_same,
    assert_same_run,
    metrics,
    newest_checkpoint,
    tiny_net,
    tiny_recipe,
    toy,
    weights,
    write_toy,
)

pytestmark = pytest.mark.slow  # two more processes, each with its own torch

WORLD = 2


class WithMemory(NormalizedMSE):
    """NMSE that keeps a running mean of what its process saw; the loss reads it."""

    def __init__(self) -> None:
        super().__init__(strength=2.0)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, f: Forward) -> dict[str, Tensor]:
        adv = f.outputs["adv"].logits
        with torch.no_grad():
            self.mean.lerp_(adv.detach().mean(0), 0.1)
        return {**super().forward(f), "memory": 0.1 * (adv - self.mean).pow(2).sum(1)}


class Watched:
    """Every step's loss terms of this process, and what is there at the end of every epoch."""

    def __init__(self) -> None:
        self.terms: list[dict[str, float]] = []
        self.ends: list[dict[str, Any]] = []
        self.look, self.end_epoch = Loop.look, Loop.end_epoch

    def __enter__(self) -> Watched:
        watched = self

        def look(loop: Loop, terms: Any) -> dict[str, float]:
            told = watched.look(loop, terms)
            if terms:
                watched.terms.append(told)
            return told

        def end_epoch(loop: Loop) -> None:
            watched.end_epoch(loop)
            watched.ends.append(
                {
                    "step": {name: tensor.clone() for name, tensor in loop.module.state_dict().items()},
                    "exported": {name: tensor.clone() for name, tensor in loop.exported().items()},
                    "evaluated": {name: tensor.clone() for name, tensor in loop.evaluated.state_dict().items()},
                    "best": loop.best,
                }
            )

        Loop.look, Loop.end_epoch = look, end_epoch  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        Loop.look, Loop.end_epoch = self.look, self.end_epoch  # type: ignore[method-assign]


def exact(case: str) -> dict[str, Any]:
    """Arguments of `fit` for the runs that must equal one process."""
    averages = (Interpolation(), EMA(decay=0.9)) if case == "piat" else ()
    recipe = tiny_recipe(averages=averages, epochs=6, warmup=0.1, gradient_clip=1.0)
    if case == "weights":  # both sides at θ + ν, with ν from the gradients of all processes
        perturbed = WorstWeights(gamma=0.05, sides=("clean", "adv"), ascend="objective", below=2.0)
        recipe = replace(recipe, objective=TRADES(), views=(perturbed,))
    if case == "strategy":  # a second network, whose gradient and reward are all processes'
        choices = {"epsilons": [0.5, 1.0, 1.5], "steps": [1, 2, 3], "step_sizes": [0.25, 1.0]}
        step = LearnableStrategy(**choices, period=3, learning_rate=0.05, look_ahead_steps=2, width=4)
        recipe = replace(recipe, attack=None, train_ball="unbounded", step=step, views=(WorstWeights(gamma=0.05),))
    recipe = replace(recipe, batch_size=13 if case == "uneven" else 16)
    if case in METHODS:
        recipe = METHODS[case](replace(recipe, warmup=0.0))
    uneven = case in ("uneven", "free")  # what is remembered for a place in the batch must keep its place
    settings = replace(FP64, drop_last=not uneven)
    # 73 images: 7 are held out and 66 are left, so that batches of 13 or 5 leave one over, for rank 0 alone
    return {
        "recipe": recipe,
        "data": toy(count=73 if uneven else 72),
        "model": tiny_net(norm=False),
        "settings": settings,
    }


def guarded() -> dict[str, Any]:
    """One-step training watched for overfitting; BatchNorm of each process's own half lets their accuracies differ."""
    settings = replace(FP32, catastrophic_overfitting="rollback", overfitting_check=3)
    recipe = tiny_recipe(attack=FGSM(), threat=Linf(0.08), batch_size=16, epochs=2)
    return {"recipe": recipe, "data": toy(count=600), "model": tiny_net(), "settings": settings}


FOUND = (8, 12, 15, 20)  # looks at which it is found: three times the run goes back, then it ends


def watch_guarded(rank: int, folder: Path) -> None:
    """What this process measured at every look, the mean that it judged, and all that it then held."""
    own: list[list[float]] = []
    shared: list[dict[str, float]] = []
    held: list[Any] = []
    total, judge, watch = distributed.total, OvertakenAttack.judge, loop_module.watch

    def noted_total(value: Tensor) -> Tensor:
        if value.shape == (2,) and value.dtype == torch.float64:
            own.append(value.tolist())
        return total(value)

    def rigged(guard: OvertakenAttack, fgsm: float, pgd: float) -> bool:
        judge(guard, fgsm, pgd)
        shared.append(dict(guard.last))
        guard.found = guard.suspected = len(shared) in FOUND
        return guard.found

    def noted_watch(loop: Loop) -> None:
        seen = len(shared)
        watch(loop)
        if len(shared) > seen:
            state = {name: tensor.clone() for name, tensor in loop.module.state_dict().items()}
            parameters = {name: tensor.detach().clone() for name, tensor in loop.module.named_parameters()}
            counts = {"rollbacks": loop.guard.rollbacks, "stopped": loop.stopped}
            held.append({"alike": {**parameters, **counts}, "step": state, **counts})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "total", noted_total)
        patch.setattr(OvertakenAttack, "judge", rigged)
        patch.setattr(loop_module, "watch", noted_watch)
        fit(**guarded(), out=folder / "two" / "guarded")
    torch.save({"own": own, "shared": shared, "held": held}, folder / f"guarded-{rank}.pt")


def coupled() -> dict[str, Any]:
    """BatchNorm on each process's own half, dropout, every average: equal on both, but not to one process."""
    averages = (Interpolation(buffers="reestimate"), SWA(begin=0.0, buffers="adversarial"), EMA(decay=0.9))
    recipe = tiny_recipe(
        objective=WithMemory(),
        views=(SplitBatchNorm(), WorstWeights(gamma=0.02)),
        averages=averages,
        epochs=3,
        batch_size=4,
        label_smoothing=0.1,
    )
    return {"recipe": recipe, "data": toy(), "model": tiny_net(dropout=0.2), "settings": FP32}


METHODS: dict[str, Callable[[Recipe], Recipe]] = {  # with memories, further networks, replays or mixed images
    "labels": lambda recipe: replace(recipe, objective=LabelRefinement(begin=0.3)),
    "prior": lambda recipe: replace(recipe, objective=PriorGuided(), attack=PriorGuidedFGSM(reset_every=4)),
    "classes": lambda recipe: replace(recipe, objective=DecoupledKL(beta=2.0)),
    "start": lambda recipe: replace(recipe, objective=StartConsistency(), attack=ClassStartFGSM(period=3)),
    "views": lambda recipe: replace(recipe, objective=Consistency(), mixing=CutMix()),
    "guide": lambda recipe: replace(
        recipe, objective=BoundaryGuided(beta=1.0), networks={"guide": tiny_net(norm=False, seed=9)}
    ),
    "free": lambda recipe: replace(
        recipe, attack=None, objective=AdversarialTraining(), step=Free(replays=2), batch_size=5, epochs=2
    ),
}
CASES = ("pgd_at", "piat", "uneven", "weights", "strategy", *METHODS)


def process(rank: int, folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD)
    assert distributed.active()
    create = RunFolder.create

    def late(*arguments: Any, **more: Any) -> RunFolder:
        time.sleep(0.3 * rank)  # by then a hasty rank 0 would have made the folder, and rank 1 would refuse it
        return create(*arguments, **more)

    RunFolder.create = late  # type: ignore[method-assign]
    for case in CASES:
        with Watched() as watched:
            fit(**exact(case), out=folder / "two" / case)
        torch.save({"terms": watched.terms, "ends": watched.ends}, folder / f"{case}-{rank}.pt")
    with Watched() as watched:
        fit(**coupled(), out=folder / "two" / "coupled")
    torch.save({"terms": watched.terms, "ends": watched.ends}, folder / f"coupled-{rank}.pt")

    watch_guarded(rank, folder)

    one_step = Loop.one_step

    def asked_on_one(loop: Loop, batch: Any, progress: Progress) -> None:
        one_step(loop, batch, progress)
        if progress.step == 18 and rank == 1:
            loop.interruption.asked = True

    for name, arguments in (("stopped", coupled), ("free-stopped", lambda: exact("free"))):
        Loop.one_step = asked_on_one  # type: ignore[method-assign]
        try:
            fit(**arguments(), out=folder / "two" / name)
        except Interrupted:
            names = sorted(path.name for path in (folder / "two" / name / "checkpoints").glob("*.pt"))
            (folder / f"{name}-{rank}.txt").write_text(names[-1])
        Loop.one_step = one_step  # type: ignore[method-assign]
        fit(**arguments(), out=folder / "two" / name, resume=True)

    try:
        fit(**coupled(), out=folder / "two" / "coupled")
    except HoldfastError as error:
        (folder / f"refused-{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of two processes, made in one go, and those of one process."""
    folder = tmp_path_factory.mktemp("processes")
    together = mp.spawn(process, args=(folder,), nprocs=WORLD, join=False)
    limit = time.monotonic() + 300
    try:
        while not together.join(timeout=1):
            assert time.monotonic() < limit, "the processes wait for each other"
    finally:
        for one in together.processes:
            one.kill()
    for case in CASES:
        with Watched() as watched:
            fit(**exact(case), out=folder / "one" / case)
        torch.save({"terms": watched.terms, "ends": watched.ends}, folder / f"{case}-one.pt")
    return folder


def kept(folder: Path, case: str, who: int | str) -> dict[str, Any]:
    return torch.load(folder / f"{case}-{who}.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_those_of_one_process(case: str, folder: Path) -> None:
    """At the same global batch, step by step, to 1e-10; an uneven or even empty share of the last batch included."""
    one = kept(folder, case, "one")["terms"]
    parts = [kept(folder, case, rank)["terms"] for rank in range(WORLD)]
    assert len(one) == len(parts[0]) == len(parts[1]) >= 20
    for step, alone in enumerate(one):
        for name, value in alone.items():
            together = sum(part[step][name] for part in parts) / WORLD
            assert together == pytest.approx(value, abs=1e-10, rel=0), (step, name)
        assert parts[0][step]["loss"] != parts[1][step]["loss"]  # each saw rows of its own
    assert len({terms["loss"] for terms in one}) == len(one)


@pytest.mark.parametrize("case", CASES)
def test_metrics_and_accuracies_equal_those_of_one_process(case: str, folder: Path) -> None:
    """metrics.jsonl, the best epoch, the weights, and both accuracies of the closing evaluation."""
    one, two = folder / "one" / case, folder / "two" / case
    for alone, together in zip(metrics(one), metrics(two), strict=True):
        for measured in ("terms", "watched"):
            expected = pytest.approx(alone.pop(measured, {}), abs=1e-10, rel=0)
            assert together.pop(measured, {}) == expected
        assert together == alone
    for name in ("model", "last"):
        for alone, together in zip(weights(one, name).values(), weights(two, name).values(), strict=True):
            torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
    told = [read_json(run / "summary.json") for run in (one, two)]
    for key in ("clean_accuracy", "robust_accuracy", "interval", "n", "best", "last"):
        assert told[0][key] == told[1][key]


def test_the_uneven_case_is_what_it_says(folder: Path) -> None:
    """The last batch of every epoch is one image, so that rank 1 has none of it."""
    assert metrics(folder / "two" / "uneven")[0]["step"] == 6
    resolved = (folder / "two" / "uneven" / "config.yaml").read_text()
    assert "steps_per_epoch: 6" in resolved


@pytest.mark.parametrize("case", [*CASES, "coupled"])
def test_both_processes_hold_the_same(case: str, folder: Path) -> None:
    """Parameters bit for bit, buffers, averages, the evaluated network and the best so far, at every epoch's end."""
    first, second = (kept(folder, case, rank)["ends"] for rank in range(WORLD))
    assert_same(first, second)


def test_the_coupled_processes_did_different_things(folder: Path) -> None:
    """Else that they end alike would prove nothing: each saw its own half, and buffers moved."""
    first, second = (kept(folder, "coupled", rank) for rank in range(WORLD))
    assert all(one["loss"] != other["loss"] for one, other in zip(first["terms"], second["terms"], strict=True))
    assert set(first["terms"][0]) == {"loss", "adv_ce", "nmse", "memory"}
    end = first["ends"][-1]["step"]
    assert float(end["objective.mean"].abs().sum()) > 0
    assert not torch.equal(end["model.1.running_mean"], torch.zeros(6))


def test_epoch_means_are_over_both_processes(folder: Path) -> None:
    """The line in metrics.jsonl is the mean of what both saw, not rank 0's."""
    parts = [kept(folder, "coupled", rank)["terms"] for rank in range(WORLD)]
    lines = metrics(folder / "two" / "coupled")
    steps = lines[0]["step"]
    for number, line in enumerate(lines):
        seen = [terms["loss"] for part in parts for terms in part[number * steps : (number + 1) * steps]]
        assert line["terms"]["loss"] == pytest.approx(sum(seen) / len(seen), rel=1e-6)


def test_stopped_on_one_process_and_resumed_on_both(folder: Path) -> None:
    """Both stop at the same step, inside an epoch, and go on bit for bit, each with its own buffers."""
    names = {(folder / f"stopped-{rank}.txt").read_text() for rank in range(WORLD)}
    assert names == {"step-0000000026.pt"}  # 16 steps an epoch; the processes confer at every tenth of an epoch
    assert_same_run(folder / "two" / "stopped", folder / "two" / "coupled")


def test_free_at_keeps_its_perturbations(folder: Path) -> None:
    """Those of all rows are in every process's checkpoint; stopped inside an epoch, each goes on with its own rows."""
    wanted = newest_checkpoint(folder / "one" / "free")["step"]["delta"]
    assert float(wanted.abs().max()) > 0
    for state in newest_checkpoint(folder / "two" / "free")["ranks"]:  # so that any number of processes can go on
        torch.testing.assert_close(state["buffers"]["delta"], wanted, rtol=0, atol=1e-10)
    names = {(folder / f"free-stopped-{rank}.txt").read_text() for rank in range(WORLD)}
    (name,) = names
    assert name == "step-0000000020.pt"  # of 28 in the first epoch
    assert_same_run(folder / "two" / "free-stopped", folder / "two" / "free")


def test_both_processes_decide_alike_about_overfitting(folder: Path) -> None:
    """On the mean of what both measured, which differed; going back and ending, what they hold is the same."""
    first, second = (kept(folder, "guarded", rank) for rank in range(WORLD))
    assert first["own"] != second["own"]
    assert first["shared"] == second["shared"]
    for one, other, mean in zip(first["own"], second["own"], first["shared"], strict=True):
        assert list(mean.values()) == pytest.approx([(a + b) / 2 for a, b in zip(one, other, strict=True)])
    assert_same([look["alike"] for look in first["held"]], [look["alike"] for look in second["held"]])
    assert len(first["held"]) == FOUND[-1]
    for held in (first["held"], second["held"]):  # each with its own running statistics
        for number, looks in enumerate(FOUND[:-1], start=1):
            back, good = held[looks - 1], held[looks - 2]
            assert_same(back["step"], good["step"])
            assert (good["rollbacks"], back["rollbacks"]) == (number - 1, number)
    assert [look["stopped"] for look in first["held"]] == [False] * (FOUND[-1] - 1) + [True]


def test_a_folder_in_use_is_refused_on_both(folder: Path) -> None:
    """Not on one alone, which would leave the other waiting; a fresh folder is refused on neither."""
    for rank in range(WORLD):
        assert "already holds a run" in (folder / f"refused-{rank}.txt").read_text()


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc_per_node=2 -m holdfast …`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    return subprocess.run(
        [*run, "-m", "holdfast", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_torchrun_runs_the_command_unchanged(tmp_path: Path) -> None:
    """`torchrun … holdfast train`: one run folder, one JSON object, the accuracies of one process."""
    data, net = write_toy(tmp_path / "toy.npz"), tmp_path / "net.py"
    net.write_text(NET.replace("nn.BatchNorm2d(width)", "nn.Identity()").replace("nn.Dropout(0.2)", "nn.Identity()"))
    words = ["train", "piat", "--data", data, "--threat.epsilon", "0.1", "--model", f"{net}:make", "--epochs", "3"]
    words += [
        "--batch-size",
        "16",
        "--precision",
        "fp64",
        "--attack.steps",
        "2",
        "--training.test_steps",
        "2",
        "--json",
    ]
    ended = torchrun(*words, "--out", tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["out"] == str(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["processes"] == 2
    assert ended.stderr.count("epoch 3/3") == 1
    from tiny_runs import command

    assert command(*words, "--training.device", "cpu", "--out", tmp_path / "one") == 0
    for alone, together in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert together["terms"] == pytest.approx(alone["terms"], abs=1e-10, rel=0)
        assert together["validation"] == alone["validation"]
    for alone, together in zip(weights(tmp_path / "one").values(), weights(tmp_path / "two").values(), strict=True):
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


def test_damage_is_decided_by_the_first_process(tmp_path: Path) -> None:
    """Both processes go on from the same older checkpoint, mend the same files, or refuse together."""
    out, words = tmp_path / "run", ["--precision", "fp64", "--attack.steps", 2, "--training.test_steps", 2]
    words = ["train", "piat", "--data", write_toy(tmp_path / "toy.npz"), "--threat.epsilon", "0.1", *words]
    words += ["--epochs", 3, "--batch-size", 16, "--model.width", 4]
    assert torchrun(*words, "--out", out).returncode == 0
    whole = Path(shutil.copytree(out, tmp_path / "whole"))
    newest, last = max((out / "checkpoints").glob("*.pt")), out / "last" / "model.safetensors"
    for file in (newest, last, out / "metrics.jsonl"):
        file.write_bytes(file.read_bytes()[:-1])
    (out / "summary.json").unlink()
    ended = torchrun("train", "--resume", "--out", out)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count(f"checkpoint {newest} is damaged") == 1
    assert_same_run(out, whole)
    last.write_bytes(b"")
    ended = torchrun("train", "--resume", "--out", out)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count(f"{out / 'last'} is written anew from a checkpoint") == 1
    assert_same_run(out, whole)
    (out / "summary.json").unlink()
    for file in (out / "checkpoints").glob("*.pt"):
        file.write_bytes(b"")
    ended = torchrun("train", "--resume", "--out", out)
    assert ended.returncode != 0
    assert "No checkpoint of" in ended.stderr
    assert "holdfast: checkpoint" in ended.stderr
