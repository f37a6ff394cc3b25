"""Several processes end together: whoever got the signal, refused, died or found the folder gone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from holdfast import distributed
from holdfast.cli.main import main
from holdfast.errors import HoldfastError
from holdfast.runs.checkpoint import checkpoints
from holdfast.runs.folder import CONFIG
from holdfast.runs.lock import locked
from tiny_runs import NET, assert_same_run, write_toy

pytestmark = pytest.mark.slow  # two more processes, each with its own torch

SLOW_NET = NET.replace("return self.body", "__import__('time').sleep(0.01); return self.body")
LIMIT = 120  # seconds; torchrun itself kills 30 s after it has asked


def words(place: Path, out: Path, epochs: int) -> list[str]:
    """`holdfast train` with two processes' worth of small steps, and a checkpoint whenever they confer."""
    asked = ["train", "pgd_at", "--data", place / "toy.npz", "--model", f"{place / 'net.py'}:make", "--out", out]
    asked += ["--threat.epsilon", 0.1, "--attack.steps", 2, "--epochs", epochs, "--batch-size", 4]
    asked += ["--precision", "fp32", "--training.device", "cpu", "--training.checkpoint_minutes", 0]
    asked += ["--training.validation_steps", 2, "--training.test_steps", 2]
    return [str(word) for word in asked]


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launched(words: list[str]) -> subprocess.Popen[str]:
    """The command in two processes, in a group of its own."""
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
        "-m",
        "holdfast",
    ]
    return subprocess.Popen(
        [*run, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def children(process: subprocess.Popen[str]) -> list[int]:
    """The launched processes, first rank first."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return sorted(int(number) for number in path.read_text().split())


def ended(process: subprocess.Popen[str], workers: list[int]) -> list[str]:
    """Wait until all have ended, in bounded time; the lines of standard error."""
    try:
        told = process.communicate(timeout=LIMIT)[1]
    finally:
        process.kill()
    assert [number for number in workers if Path(f"/proc/{number}").exists()] == []
    return told.splitlines()


def begun(process: subprocess.Popen[str], out: Path) -> list[int]:
    """Wait for the first checkpoint."""
    limit = time.monotonic() + LIMIT
    while not checkpoints(out):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.01)
    return children(process)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a network of one's own, and the run that nobody stopped."""
    folder = tmp_path_factory.mktemp("place")
    write_toy(folder / "toy.npz")
    (folder / "net.py").write_text(SLOW_NET)
    whole = launched(words(folder, folder / "whole", 12))
    assert whole.communicate(timeout=LIMIT)
    assert whole.returncode == 0
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="looks up processes in /proc")
@pytest.mark.parametrize("who", ["launcher", "all", "second"])
def test_all_stop_and_go_on(who: str, place: Path, tmp_path: Path) -> None:
    """At one step, saved; a signal that the launcher repeats is no second one; resumed it ends as if undisturbed."""
    process = launched(words(place, tmp_path / "run", 12))
    workers = begun(process, tmp_path / "run")
    if who == "all":  # as a batch system does it: every process, and the launcher passes it on once more
        for number in workers:
            os.kill(number, signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
    elif who == "second":
        os.kill(workers[1], signal.SIGTERM)
    else:
        process.send_signal(signal.SIGINT)
    told = ended(process, workers)
    assert [line for line in told if line.startswith("holdfast: ")] == [
        f"holdfast: stopped; go on with: holdfast train --resume --out {tmp_path / 'run'}"
    ]
    assert ("stopping after this step; once more ends at once" in told) == (who != "second")
    assert not (tmp_path / "run" / "summary.json").exists()
    again = launched(["train", "--resume", "--out", str(tmp_path / "run")])
    said = again.communicate(timeout=LIMIT)[1]
    assert again.returncode == 0, said
    assert_same_run(tmp_path / "run", place / "whole")


@pytest.mark.skipif(sys.platform != "linux", reason="looks up processes in /proc")
@pytest.mark.parametrize("how", ["killed", "folder deleted"])
def test_all_end_with_one(how: str, place: Path, tmp_path: Path) -> None:
    """None waits for a process that has gone; each says in one line what is the matter."""
    process = launched(words(place, tmp_path / "run", 500))
    workers = begun(process, tmp_path / "run")
    if how == "killed":
        os.kill(workers[1], signal.SIGKILL)
    else:
        shutil.rmtree(tmp_path / "run")
    told = [line for line in ended(process, workers) if line.startswith("holdfast: ")]
    assert told
    expected = "another process of this run has ended" if how == "killed" else "was deleted, moved or emptied"
    assert all(expected in line for line in told)
    assert (tmp_path / "run").exists() == (how == "killed")


@pytest.mark.skipif(sys.platform != "linux", reason="looks up processes in /proc")
def test_all_are_refused_with_the_first(place: Path, tmp_path: Path) -> None:
    """The first process alone asks for the lock; the others do not wait for one that has gone."""
    with locked(tmp_path / "run", kept_for=CONFIG):
        process = launched(words(place, tmp_path / "run", 1))
        told = ended(process, [])
        assert (
            f"holdfast: another process is writing to {tmp_path / 'run'}: wait for it, or choose another --out" in told
        )
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock"]


def training(rank: int, folder: Path, port: int) -> None:
    """What each of two processes does for the test below."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    assert main(words(folder, folder / "run", 1)) == 0
    named = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    (folder / str(rank)).write_text(" ".join(name for name in named if "gloo" in name))


@pytest.mark.skipif(sys.platform != "linux", reason="looks up threads in /proc")
def test_no_thread_of_gloo_stays(tmp_path: Path) -> None:
    """One that lets go of a tensor while Python ends aborts the process, now and then."""
    write_toy(tmp_path / "toy.npz")
    (tmp_path / "net.py").write_text(NET)
    mp.spawn(training, args=(tmp_path, free_port()), nprocs=2)
    assert [(tmp_path / name).read_text() for name in "01"] == ["", ""]


def conferring(rank: int, folder: Path) -> None:
    """What each of two processes does for the test below."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    told = []
    for refusing in ({0}, {1}, {0, 1}, set()):
        try:
            with distributed.refused_together():
                if rank in refusing:
                    raise HoldfastError(f"refused by {rank}")
            told.append("")
        except HoldfastError as error:
            told.append(str(error))
    value = torch.tensor([float(rank), 5.0 - rank])
    told.append(str(distributed.largest(value).tolist()))
    told.append(str(value.tolist()))
    if rank == 1:
        (folder / "1").write_text("\n".join(told))
        os._exit(0)
    try:
        with distributed.others_missed():
            for _ in range(3):
                distributed.barrier()
    except HoldfastError as error:
        told.append(str(error)[:37])
    with pytest.raises(RuntimeError, match="its own"), distributed.others_missed():
        raise RuntimeError("its own")
    (folder / "0").write_text("\n".join(told))


def test_refusals_are_shared(tmp_path: Path) -> None:
    """Each keeps its own, else the first other's; nothing is changed; who has gone is missed."""
    mp.spawn(conferring, args=(tmp_path,), nprocs=2)
    first, second = ((tmp_path / name).read_text().splitlines() for name in "01")
    assert first[:4] == ["refused by 0", "refused by 1", "refused by 0", ""]
    assert second[:4] == ["refused by 0", "refused by 1", "refused by 1", ""]
    assert first[4:6] == ["[1.0, 5.0]", "[0.0, 5.0]"]
    assert second[4:6] == ["[1.0, 5.0]", "[1.0, 4.0]"]
    assert first[6:] == ["another process of this run has ended"]
