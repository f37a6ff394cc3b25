"""One writer a folder; a folder that goes ends its writer; a killed one blocks nobody."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

from holdfast import HoldfastError, Linf, evaluate, fit, load_model
from holdfast.data.images import Images
from holdfast.evaluation.ledger import PROTOCOL
from holdfast.evaluation.pursuit import Pursuit
from holdfast.loop import Loop
from holdfast.runs.folder import CONFIG, RunFolder
from holdfast.runs.lock import LOCK, FolderLock, locked
from tiny_runs import FP32, assert_same_run, command, refused, tiny_net, tiny_recipe, toy, train, write_toy

REFUSED = "another process is writing to .*run: wait for it, or choose another --out"
GONE = r"was deleted, moved or emptied under its writer \(.* is gone\), and nothing more is written: put it back"


def lock_of(path: Path) -> FolderLock:
    return FolderLock(path, kept_for=CONFIG)


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------- the lock


def test_the_second_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    first, second = lock_of(tmp_path / "run"), lock_of(tmp_path / "run")
    first.take()
    for _ in range(2):  # the refused one takes nothing away, also where there is nothing but the lock
        with pytest.raises(HoldfastError, match=REFUSED):
            second.take()
        first.check()
        (tmp_path / "run" / CONFIG).touch()
    first.release()
    second.take()
    second.release()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [LOCK, CONFIG]


@pytest.mark.parametrize("before", ["nothing", "a folder", "a letter"])
def test_a_folder_that_was_not_used_is_left_as_it_was(before: str, tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    if before != "nothing":
        run.mkdir(parents=True)
    if before == "a letter":
        (run / "letter.txt").write_text("dear")
    was = sorted(tmp_path.rglob("*"))
    with pytest.raises(ZeroDivisionError), locked(run, kept_for=CONFIG):
        assert 1 / (not (run / LOCK).exists())
    assert sorted(tmp_path.rglob("*")) == was


def test_what_another_put_there_is_left(tmp_path: Path) -> None:
    """A folder that this one made, and into which somebody has written meanwhile."""
    with locked(tmp_path / "deep" / "run", kept_for=CONFIG):
        (tmp_path / "deep" / "run" / "letter.txt").write_text("dear")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "letter.txt", "run"]


HOLDER = """
import os, sys, time
from pathlib import Path
from holdfast.runs.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), kept_for="config.yaml")
lock.take()
holder = os.getpid()
if sys.argv[2] == "with a child" and os.fork() == 0:
    limit = time.monotonic() + 60
    while os.getppid() == holder and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(5)  # it outlives its parent, as a compiler's worker may
    os._exit(0)
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["alone", "with a child"])
def test_a_killed_holder_blocks_nobody(how: str, tmp_path: Path) -> None:
    """The system lets go of a process's locks; a file that only says that somebody is there would stay."""
    words = [sys.executable, "-W", "ignore", "-c", HOLDER, str(tmp_path / "run"), how]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(HoldfastError, match=REFUSED):
            lock_of(tmp_path / "run").take()
        holder.send_signal(signal.SIGKILL)
        assert holder.wait() == -signal.SIGKILL
    assert (tmp_path / "run" / LOCK).exists()
    lock = lock_of(tmp_path / "run")
    lock.take()
    lock.release()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused with what to do; no soft lock takes its place."""

    def refuse(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(HoldfastError, match=r"its file system has no file locks: choose an --out on a local disk"):
        lock_of(tmp_path / "run").take()
    assert list(tmp_path.iterdir()) == []


def test_a_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There `filelock` puts a soft lock in place of a lock."""
    monkeypatch.setattr(filelock, "FileLock", filelock.SoftFileLock)
    with pytest.raises(HoldfastError, match="this system has no file locks"):
        lock_of(tmp_path / "run").take()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_may_not_be_written(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs this."""
    (tmp_path / "run").mkdir()
    opened = os.open

    def refuse(path: Any, *arguments: Any, **more: Any) -> int:
        if str(path).endswith(LOCK):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HoldfastError, match=r"\.lock cannot be written \(.*\): choose another --out"):
        lock_of(tmp_path / "run").take()


def test_places_that_cannot_be_locked(tmp_path: Path) -> None:
    """A file, a folder below a file, a link or a folder in place of the lock's file."""
    (tmp_path / "file").touch()
    with pytest.raises(HoldfastError, match="is a file: choose another --out"):
        lock_of(tmp_path / "file").take()
    with pytest.raises(HoldfastError, match="cannot be written"):
        lock_of(tmp_path / "file" / "run").take()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / LOCK).symlink_to(tmp_path / "file")
    (tmp_path / "folder" / LOCK).mkdir(parents=True)
    for name in ("linked", "folder"):
        with pytest.raises(HoldfastError, match=r"\.lock cannot be written") as refusal:
            lock_of(tmp_path / name).take()
        assert "\n" not in str(refusal.value)


# ------------------------------------------------------------------------------------------- whoever is refused


def test_a_run_that_goes_on_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`train --out`, `--resume` and `fit`, before data is read; nothing changes. Readers need no lock and make none."""
    data, out = write_toy(tmp_path / "toy.npz"), tmp_path / "run"
    assert train(data, out, epochs=1) == 0
    data.rename(tmp_path / "other.npz")  # who reads data first fails otherwise
    before = files(out)
    with locked(out, kept_for=CONFIG):
        words = ["train", "pgd_at", "--data", data, "--threat.epsilon", 0.1, "--out", out]
        for refusal in (refused(capsys, *words), refused(capsys, *words, "--resume"), refused(capsys, *words[:1],
                        "--resume", "--out", out)):  # fmt: skip
            assert refusal == f"holdfast: another process is writing to {out}: wait for it, or choose another --out"
        for resume in (False, True):
            with pytest.raises(HoldfastError, match=REFUSED):
                fit(tiny_recipe(), toy(), tiny_net(), out=out, settings=FP32, resume=resume)
        assert files(out) == before
        load_model(out)
        assert command("evaluate", out, "--data", tmp_path / "other.npz", "--steps", 1, "--save-examples") == 0
    (out / LOCK).unlink()
    load_model(out)
    assert command("evaluate", out, "--data", tmp_path / "other.npz", "--steps", 2) == 0
    one, other = (out / "evaluations").iterdir()
    assert command("compare", one, other) in (0, 2)
    (saved,) = (folder for folder in (one, other) if (folder / "examples").exists())
    (saved / LOCK).unlink()
    assert command("verify", saved) == 0
    assert not (out / LOCK).exists()
    assert not (saved / LOCK).exists()


def test_a_second_demo_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path / "demo" / "standard", kept_for=CONFIG):
        assert "another process is writing to" in refused(capsys, "demo", "--out", tmp_path / "demo")


def test_the_lock_is_held_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From before the folder is looked at to the summary."""
    seen: list[str] = []

    def watch(owner: Any, name: str) -> None:
        before = getattr(owner, name)

        def watched(*arguments: Any, **more: Any) -> Any:
            with pytest.raises(HoldfastError, match=REFUSED):
                lock_of(tmp_path / "run").take()
            seen.append(name)
            return before(*arguments, **more)

        monkeypatch.setattr(owner, name, watched)

    import holdfast.train

    for owner, name in ((holdfast.train, "prepare"), (RunFolder, "create"), (Loop, "one_step"), (Loop, "close")):
        watch(owner, name)
    watch(RunFolder, "write_summary")
    fit(tiny_recipe(epochs=1), toy(), tiny_net(), out=tmp_path / "run", settings=FP32)
    assert seen[:3] == ["prepare", "create", "one_step"]
    assert seen[-2:] == ["close", "write_summary"]
    lock = lock_of(tmp_path / "run")
    lock.take()
    lock.release()


def test_a_folder_with_a_lock_alone_is_empty(tmp_path: Path) -> None:
    """As a process leaves it that was killed while it read its data."""
    for name in ("run", "evaluation"):
        (tmp_path / name).mkdir()
        (tmp_path / name / LOCK).touch()
    run = fit(tiny_recipe(epochs=1), toy(), tiny_net(), out=tmp_path / "run", settings=FP32).path
    assert_same_run(fit(tiny_recipe(epochs=1), toy(), tiny_net(), out=tmp_path / "other", settings=FP32).path, run)
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4).long()
    evaluate(tiny_net(), x, y, threat=Linf(0.1), attack="pgd", probe=False, out=tmp_path / "evaluation")


def test_without_out_the_folder_is_locked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is found only when the data is read."""
    monkeypatch.chdir(tmp_path)
    run = fit(tiny_recipe(epochs=1), toy(), tiny_net(), settings=FP32).path
    assert (run / LOCK).exists()


# ---------------------------------------------------------------------------------------------- a folder that goes


def deleted(run: Path) -> None:
    shutil.rmtree(run)


def moved(run: Path) -> None:
    run.rename(run.with_name("moved"))


def replaced(run: Path) -> None:
    """By another run, as somebody has it who deletes a folder and begins anew."""
    shutil.rmtree(run)
    run.mkdir()
    (run / LOCK).touch()
    (run / CONFIG).write_text("recipe: another\n")


def unlocked(run: Path) -> None:
    (run / LOCK).unlink()


def without_config(run: Path) -> None:
    (run / CONFIG).unlink()


HOW: list[Callable[[Path], None]] = [deleted, moved, replaced, unlocked, without_config]


@pytest.mark.parametrize("how", HOW)
def test_a_lock_whose_folder_goes(how: Callable[[Path], None], tmp_path: Path) -> None:
    """It tells, and lets go of nothing that is not its own."""
    run = tmp_path / "run"
    lock = lock_of(run)
    lock.take()
    lock.check()
    (run / CONFIG).touch()
    lock.check()
    how(run)
    left = sorted(tmp_path.rglob("*"))
    with pytest.raises(HoldfastError, match=GONE):
        lock.check()
    if how is not without_config:
        lock.release()
        assert sorted(tmp_path.rglob("*")) == left


WHEN = {
    "before a checkpoint inside an epoch": (Loop, "one_step", 2, {"checkpoint_minutes": 0.0}),
    "before the best model": (Loop, "keep_if_best", 1, {}),
    "before a metrics line": (Loop, "keep_if_best", 2, {"validate_every": 1}),
    "before the last model": (RunFolder, "append_metrics", 2, {}),
    "before the closing evaluation": (Loop, "save", 2, {}),
    "in the closing evaluation": (Loop, "evaluation", 3, {}),
    "after the summary": (RunFolder, "write_summary", 1, {}),
}
"""After which call of what the folder goes: its next use must notice."""


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("how", [deleted, replaced])
def test_a_run_whose_folder_goes(
    how: Callable[[Path], None], when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with a refusal, makes no new folder, and leaves a replaced one alone."""
    owner, name, count, changes = WHEN[when]
    run, before, calls = tmp_path / "run", getattr(owner, name), []

    def then(*arguments: Any, **more: Any) -> Any:
        result = before(*arguments, **more)
        calls.append(name)
        if len(calls) == count:
            how(run)
        return result

    monkeypatch.setattr(owner, name, then)
    settings = FP32.__class__(**{**vars(FP32), **changes})
    with pytest.raises(HoldfastError, match=GONE):
        fit(tiny_recipe(), toy(), tiny_net(), out=run, settings=settings)
    assert run.exists() == (how is replaced)
    if how is replaced:
        assert files(run) == {LOCK: b"", CONFIG: b"recipe: another\n"}


@pytest.mark.parametrize("when", ["in the first unit", "in the second unit", "before the summary", "after the log"])
def test_an_evaluation_whose_folder_goes(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same."""
    from holdfast.evaluation import result as conclusion
    from holdfast.evaluation import results

    out, calls = tmp_path / "evaluation", []
    owners: dict[str, tuple[Any, str]] = {
        "before the summary": (results, "summarize"),
        "after the log": (conclusion, "write_text"),  # the second of its files, after images.csv
    }
    owner, name = owners.get(when, (Pursuit, "run"))
    before = getattr(owner, name)

    def then(*arguments: Any, **more: Any) -> Any:
        result = before(*arguments, **more)
        calls.append(name)
        if len(calls) == (2 if when in ("in the second unit", "after the log") else 1):
            shutil.rmtree(out)
        return result

    monkeypatch.setattr(owner, name, then)
    images = Images(*(getattr(toy().test, part) for part in ("pixels", "labels")))
    with pytest.raises(HoldfastError, match=GONE):
        evaluate(tiny_net(), images, threat=Linf(0.1), attack="pgd", probe=False, out=out, unit=12)
    assert not out.exists()


def test_it_is_told_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2, and no word of where everything lies."""
    data, out, before = write_toy(tmp_path / "toy.npz"), tmp_path / "run", Loop.close

    def close(self: Loop) -> Any:
        shutil.rmtree(out)
        return before(self)

    monkeypatch.setattr(Loop, "close", close)
    capsys.readouterr()
    assert train(data, out, epochs=1) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines()[-1].startswith(f"holdfast: {out} was deleted, moved or emptied under its writer")


def test_halves_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    """Of a run, but not of an evaluation in it, which may be going on; and of an evaluation itself."""
    run = fit(tiny_recipe(epochs=1), toy(), tiny_net(), out=tmp_path / "run", settings=FP32).path
    halves = [run / ".summary.json.part", run / "checkpoints" / ".step-1.pt.part", run / "last" / ".config.json.part"]
    other = run / "evaluations" / "one" / ".protocol.json.part"
    other.parent.mkdir(parents=True)
    for half in (*halves, other):
        half.write_bytes(b"half")
    fit(tiny_recipe(epochs=1), toy(), tiny_net(), out=run, settings=FP32, resume=True)
    assert [half for half in halves if half.exists()] == []
    assert other.exists()
    with locked(other.parent, kept_for=PROTOCOL):
        pass
    evaluate(tiny_net(), toy().test, threat=Linf(0.1), attack="pgd", probe=False, out=other.parent)
    assert not other.exists()
