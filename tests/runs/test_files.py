"""A disk that fills or fails, whichever file is written: one line, nothing half made, and the same command goes on."""

from __future__ import annotations

import ast
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast import HoldfastError
from holdfast.runs.files import full_disk_told, write_json
from tiny_runs import NET, assert_same_run, command, refused, train, write_toy

WRITING = {"mkdir", "copyfile", "copyfileobj", "copy2", "copytree", "move", "write_text", "write_bytes", "touch"}


def writes(call: ast.Call) -> bool:
    """Whether a call writes to a disk: a method or function of `WRITING`, an open for writing, a removed tree."""
    text = ast.unparse(call)
    if not isinstance(call.func, ast.Attribute):  # our own `write_text`, for example
        return bool(re.match(r"open\(.*'[rbt]*[wax+]", text)) and "os.devnull" not in text
    if call.func.attr == "open":
        return bool(re.search(r"\.open\((.*, |mode=|)'[rbt]*[wax+][bt+]*'", text))
    return call.func.attr in WRITING or (call.func.attr == "rmtree" and "ignore_errors" not in text)


def unguarded(node: ast.AST) -> Iterator[ast.Call]:
    """Return the calls that write to a disk outside a `with full_disk_told(…)`."""
    if isinstance(node, ast.With) and any("full_disk_told(" in ast.unparse(item) for item in node.items):
        return
    if isinstance(node, ast.Call) and writes(node):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from unguarded(child)


def test_every_write_tells_of_a_full_disk() -> None:
    """No file of the package is written without it, but for the trust store, which training does without.

    The search finds what it should.
    """
    found = [
        f"{path.name}:{call.lineno} {ast.unparse(call)}"
        for path in Path(holdfast.__file__).parent.rglob("*.py")
        if path.name != "trust.py"  # its refusals become a note: test_a_store_that_cannot_be_written_is_told
        for call in unguarded(ast.parse(path.read_text()))
    ]
    assert found == []
    code = ["p.mkdir()", "open(f, 'w')", "open(f)", "p.open('rb')", "with full_disk_told(p): p.open('a')"]
    code += ["with x: p.open(mode='ab')", "shutil.rmtree(p)", "p.open('r+b')", "write_text(p, 'w')", "p.open(f, 'wb')"]
    assert [call.lineno for call in unguarded(ast.parse("\n".join(code)))] == [1, 2, 6, 7, 8, 10]


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "no space left to write a.json: free some in .* and go on with --resume"),
        (errno.EDQUOT, "no space left to write a.json"),
        (errno.EFBIG, "no space left to write a.json"),
        (errno.EACCES, r"a.json cannot be written \(Permission denied\): choose another --out"),
        (errno.EIO, r"a.json cannot be written \(Input/output error\): look after the disk, or choose another --out"),
        (errno.ESTALE, r"a.json cannot be written \(Stale file handle\)"),
    ],
)
def test_what_a_disk_may_refuse(number: int, told: str) -> None:
    with pytest.raises(HoldfastError, match=told), full_disk_told(Path("a.json")):
        raise OSError(number, os.strerror(number))


def test_places_that_are_no_places(tmp_path: Path) -> None:
    """A folder in place of the file, a file in place of the folder, a name that is too long."""
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "a.json").mkdir(parents=True)
    for path in (tmp_path / "file" / "a.json", tmp_path / "folder" / "a.json", tmp_path / ("a" * 300)):
        with pytest.raises(HoldfastError, match="cannot be written"):
            write_json(path, {})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.json", "file", "folder"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a network of one's own, a finished run of it, and an evaluation of that."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "net.py").write_text(NET)
    assert trained(folder, folder / "run") == 0
    return folder


def trained(place: Path, out: Path, *more: object) -> int:
    data = place / "toy.npz"
    if not data.exists():
        write_toy(data)
    return train(data, out, "--model", f"{place / 'net.py'}:make", "--training.checkpoint_minutes", 0, *more, epochs=1)


def fill(patch: pytest.MonkeyPatch, name: str) -> None:
    """Let the disk be full as soon as a file of this name is to be kept."""
    fsync, copyfile = os.fsync, shutil.copyfile
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def kept(number: int) -> None:
        if name in Path(os.readlink(f"/proc/self/fd/{number}")).name:
            raise full
        fsync(number)

    def copied(source: Any, target: Any, **more: Any) -> Any:
        if Path(target).name == name:
            raise full
        return copyfile(source, target, **more)

    patch.setattr(os, "fsync", kept)
    patch.setattr(shutil, "copyfile", copied)


RUN = ["config.yaml", "environment.json", "metrics.jsonl", "step-0000000002.pt", "step-0000000004.pt"]
RUN += ["net.py", "model.safetensors", "config.json", "summary.json"]
EVALUATION = ["protocol.json", "probes.json", "000001.safetensors", "000001.jsonl", "ledger.jsonl", "flags.json"]
EVALUATION += ["summary.json", "images.csv", "log.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks up a file's name in /proc")
@pytest.mark.parametrize("name", RUN)
def test_a_run_on_a_disk_that_fills(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At each of its files."""
    with monkeypatch.context() as patch:
        fill(patch, name)
        capsys.readouterr()
        assert trained(place, tmp_path / "run") == 2
    told = capsys.readouterr()
    assert told.err.splitlines()[-1].startswith(f"holdfast: no space left to write {name}: free some in {tmp_path}")
    assert told.out == ""
    begun = (tmp_path / "run" / "config.yaml").exists()
    assert begun == (name != "config.yaml")
    assert trained(place, tmp_path / "run", *(["--resume"] if begun else [])) == 0
    assert_same_run(tmp_path / "run", place / "run")


@pytest.mark.skipif(sys.platform != "linux", reason="looks up a file's name in /proc")
@pytest.mark.parametrize("name", EVALUATION)
def test_an_evaluation_on_a_disk_that_fills(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same; the same command goes on."""
    words = ["evaluate", place / "run", "--steps", 2, "--unit", 12, "--save-examples", "--out", tmp_path / "e"]
    with monkeypatch.context() as patch:
        fill(patch, name)
        assert f"no space left to write {name}: free some in {tmp_path}" in refused(capsys, *words)
    assert command(*words) == 0
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".part"]


def test_an_export_onto_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `holdfast export` writes goes the same way; its folder is made."""
    with monkeypatch.context() as patch:
        fill(patch, "entry.json")
        with pytest.raises(HoldfastError, match="no space left to write entry"):
            write_json(tmp_path / "deep" / "entry.json", {})
    write_json(tmp_path / "deep" / "entry.json", {})
