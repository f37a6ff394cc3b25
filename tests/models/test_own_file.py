"""Code from files: what is read and hashed, what is executed, and what is refused before anything runs."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
import sys
from pathlib import Path

import pytest

import holdfast
from holdfast.errors import HoldfastError
from holdfast.models import trust
from holdfast.models.own_file import OwnCode

MARK = "import pathlib\npathlib.Path({mark!r}).write_text('ran')\n"


def written(folder: Path, **files: str) -> Path:
    """A folder with Python files of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        file = folder / f"{name.replace('__in__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def result(code: OwnCode) -> object:
    """What the function returns when it is called without arguments."""
    with code.running() as function:
        return function()


# -------------------------------------------------------------------------------------------- what is hashed


def test_the_hash_of_one_file_is_what_sha256sum_says(tmp_path: Path) -> None:
    written(tmp_path, net="import math\ndef make(): return math.pi\n")
    code = OwnCode.named(f"{tmp_path}/net.py:make")
    assert code.sha256 == hashlib.sha256((tmp_path / "net.py").read_bytes()).hexdigest()
    assert set(code.sources) == {"net.py"}


def test_neighbours_are_read_through_one_another_and_packages_whole(tmp_path: Path) -> None:
    written(
        tmp_path,
        net="from blocks import width\nfrom layers.deep import depth\ndef make(): return width + depth\n",
        blocks="import more\nwidth = more.one\n",
        more="one = 1\n",
        unused="raise RuntimeError\n",
        layers__in____init__="",
        layers__in__deep="from . import other\ndepth = other.two\n",
        layers__in__other="two = 20\n",
    )
    code = OwnCode.named(f"{tmp_path}/net.py:make")
    assert set(code.sources) == {
        "net.py", "blocks.py", "more.py", "layers/__init__.py", "layers/deep.py", "layers/other.py"
    }  # fmt: skip
    assert result(code) == 21


@pytest.mark.parametrize("changed", ["net", "blocks", "added"])
def test_a_change_of_any_file_that_can_run_changes_the_hash(changed: str, tmp_path: Path) -> None:
    """Also a file that was not there, and that the code tries to import."""
    text = "import blocks\ntry:\n    import added\nexcept ImportError:\n    pass\ndef make(): return blocks.one\n"
    written(tmp_path, net=text, blocks="one = 1\n")
    before = OwnCode.named(f"{tmp_path}/net.py:make").sha256
    (tmp_path / f"{changed}.py").write_text((text if changed == "net" else "one = 1\n") + "# another byte\n")
    assert OwnCode.named(f"{tmp_path}/net.py:make").sha256 != before


# ------------------------------------------------------------------------------------------ what is executed


def test_what_was_hashed_is_executed_whatever_the_disk_says_now(tmp_path: Path) -> None:
    written(tmp_path, net="from blocks import one\ndef make(): return one\n", blocks="one = 1\n")
    code = OwnCode.named(f"{tmp_path}/net.py:make")
    written(tmp_path, net="def make(): return 'other'\n", blocks="one = 'other'\n")
    assert result(code) == 1


def test_compiled_files_beside_the_source_are_never_executed(tmp_path: Path) -> None:
    """A .pyc whose header fits the source would be taken by Python's own import."""
    import importlib.util
    import py_compile

    source = written(tmp_path, net="from blocks import one\ndef make(): return one\n", blocks="one = 1\n") / "blocks.py"
    evil = tmp_path / "evil.py"
    evil.write_text("one = 'evil'\n")
    cached = Path(importlib.util.cache_from_source(str(source)))
    py_compile.compile(str(evil), cfile=str(cached), dfile=str(source), doraise=True)
    data = bytearray(cached.read_bytes())
    data[8:16] = int(source.stat().st_mtime).to_bytes(4, "little") + source.stat().st_size.to_bytes(4, "little")
    cached.write_bytes(data)
    assert result(OwnCode.named(f"{tmp_path}/net.py:make")) == 1


def test_neighbours_that_are_called_alike_do_not_meet(tmp_path: Path) -> None:
    text = "import blocks_of_two\ndef make(): return blocks_of_two.number\n"
    one = written(tmp_path / "one", net=text, blocks_of_two="number = 1\n")
    two = written(tmp_path / "two", net=text, blocks_of_two="number = 2\n")
    assert [result(OwnCode.named(f"{folder}/net.py:make")) for folder in (one, two, one)] == [1, 2, 1]
    assert "blocks_of_two" not in sys.modules


def test_a_neighbour_takes_the_place_of_no_library(tmp_path: Path) -> None:
    import yaml

    written(tmp_path, net="import yaml, json\ndef make(): return yaml.__file__\n", yaml="raise RuntimeError\n")
    assert result(OwnCode.named(f"{tmp_path}/net.py:make")) == yaml.__file__
    assert sys.modules["yaml"] is yaml


def test_a_module_of_the_callers_own_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blocks_of_mine", json)
    written(tmp_path, net="import blocks_of_mine as b\ndef make(): return b.one\n", blocks_of_mine="one = 1\n")
    assert result(OwnCode.named(f"{tmp_path}/net.py:make")) == 1
    assert sys.modules["blocks_of_mine"] is json


def test_classes_of_neighbours_can_be_pickled(tmp_path: Path) -> None:
    written(tmp_path, net="from blocks import One\ndef make(): return One()\n", blocks="class One: pass\n")
    made = result(OwnCode.named(f"{tmp_path}/net.py:make"))
    assert type(pickle.loads(pickle.dumps(made))) is type(made)


def test_an_import_that_was_not_seen_fails_at_once(tmp_path: Path) -> None:
    """It would not have been copied, so the run's own copy could not be opened later."""
    text = "import importlib\ndef make(): return importlib.import_module('blo' + 'cks')\n"
    written(tmp_path, net=text, blocks="one = 1\n")
    with pytest.raises(ModuleNotFoundError, match="blocks"):
        result(OwnCode.named(f"{tmp_path}/net.py:make"))


# ---------------------------------------------------------------------------------------------- the rule


def test_only_one_file_executes_code() -> None:
    """Wherever else the package could execute what a file says, or look a module up by a name that it did not write."""
    root = Path(holdfast.__file__).parent
    banned = {"exec", "eval", "compile", "__import__", "execfile"}
    attributes = {"import_module", "spec_from_file_location", "run_path", "run_module", "exec_module", "literal_exec"}
    known = {  # a verb and a public name, both from tables in the package
        "models/own_file.py": {"exec", "compile", "exec_module"},
        "cli/main.py": {"import_module"},
        "__init__.py": {"import_module"},
    }
    found: dict[str, set[str]] = {}
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else None
            attribute = node.func.attr if isinstance(node.func, ast.Attribute) else None
            whose = node.func.value if isinstance(node.func, ast.Attribute) else None
            owner = whose.id if isinstance(whose, ast.Name) else None
            called = None
            if name in banned | attributes or attribute in attributes:
                called = name or attribute
            elif attribute in ("load", "loads", "Unpickler") and owner in ("pickle", "dill", "cloudpickle", "joblib"):
                called = f"{owner}.{attribute}"
            elif attribute == "load" and owner in ("torch", "np", "numpy", "yaml"):
                safe = {"torch": ("weights_only", True), "np": ("allow_pickle", False)}.get(owner or "")
                given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
                called = None if safe and given.get(safe[0]) is safe[1] else f"{owner}.load"
            if called:
                found.setdefault(file.relative_to(root).as_posix(), set()).add(called)
    assert found == known


def test_named_code_runs_and_configured_code_does_not(tmp_path: Path, store: Path) -> None:
    mark = tmp_path / "mark"
    written(tmp_path, net=MARK.format(mark=str(mark)) + "def make(): return 1\n")
    code = OwnCode.in_configuration("net.py:make", tmp_path)
    with pytest.raises(HoldfastError, match=rf"net\.py:make is code that came with .*--trust-code={code.sha256}"):
        result(code)
    assert not mark.exists()
    assert result(OwnCode.named(f"{tmp_path}/net.py:make")) == 1
    assert mark.read_text() == "ran"
    assert result(code) == 1  # the very same bytes were named by the person in this process


@pytest.mark.parametrize("how", ["hash", "any", "environment", "store"])
def test_code_that_is_trusted_runs(
    how: str, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "sent", net="def make(): return 1\n")
    code = OwnCode.in_configuration("net.py:make", tmp_path / "sent")
    given: bool | str | None = {"hash": code.sha256, "any": True}.get(how)
    if how == "environment":
        monkeypatch.setenv(trust.HASH_VARIABLE, code.sha256.upper())
    if how == "store":
        assert trust.remember(code) is None
        assert [file.name for file in (store / "trusted-code").iterdir()] == [f"{code.sha256}-net-make"]
    with trust.trusting(given):
        assert result(code) == 1
    told = capsys.readouterr().err
    assert (code.sha256 in told and str(code.path) in told) == (how != "store")
    if how not in ("store", "environment"):
        with pytest.raises(HoldfastError, match="nobody asked"):
            result(code)


def test_trust_in_one_function_is_none_in_another_of_the_same_file(tmp_path: Path, store: Path) -> None:
    """Else a configuration could call whatever a trusted file defines: load(path), say."""
    written(tmp_path, net="def make(): return 1\ndef load(path='x'): return 2\n")
    assert trust.remember(OwnCode.named(f"{tmp_path}/net.py:make")) is None
    assert result(OwnCode.in_configuration("net.py:make", tmp_path)) == 1
    assert result(OwnCode.named(f"{tmp_path}/net.py:make")) == 1
    with pytest.raises(HoldfastError, match="nobody asked"):
        result(OwnCode.in_configuration("net.py:load", tmp_path))


@pytest.mark.parametrize("how", ["option", "environment"])
def test_another_hash_is_not_enough(how: str, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, net="def make(): return 1\n")
    if how == "environment":
        monkeypatch.setenv(trust.HASH_VARIABLE, "0" * 64)
    with trust.trusting("0" * 64 if how == "option" else None), pytest.raises(HoldfastError, match="another hash"):
        result(OwnCode.in_configuration("net.py:make", tmp_path))


@pytest.mark.parametrize("value", ["yes", "1234", "g" * 64])
def test_a_hash_that_is_none(value: str) -> None:
    with pytest.raises(HoldfastError, match="no SHA-256: give all 64"), trust.trusting(value):
        pass


@pytest.mark.parametrize("place", ["file", "unwritable"])
def test_a_store_that_cannot_be_written_is_told(
    place: str, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "file":
        store.write_text("")
    else:

        def refused(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", refused)
    code = OwnCode.named(f"{written(tmp_path / 'a', net='def make(): pass')}/net.py:make") if place == "file" else None
    if code is None:
        monkeypatch.undo()
        code = OwnCode.named(f"{written(tmp_path / 'a', net='def make(): pass')}/net.py:make")
        monkeypatch.setattr(Path, "mkdir", refused)
    told = trust.remember(code)
    assert told is not None
    assert "the trust store cannot be written" in told
    assert f"--trust-code={code.sha256}" in told


# -------------------------------------------------------------------------- what a configuration may name


def sent(tmp_path: Path, how: str) -> tuple[str, Path]:
    """A name, and the folder of a configuration that holds it."""
    folder = written(tmp_path / "sent", fine="def make(): return 1\n")
    outside = written(tmp_path / "outside", net="def make(): return 1\n", blocks="one = 1\n")
    if how == "an absolute path":
        return f"{outside}/net.py:make", folder
    if how == "a path upwards":
        return "../outside/net.py:make", folder
    if how == "a link":
        (folder / "net.py").symlink_to(outside / "net.py")
    if how == "a folder that is a link":
        (folder / "sub").symlink_to(outside)
        return "sub/net.py:make", folder
    if how == "a neighbour that is a link":
        written(folder, net="import blocks\ndef make(): return blocks.one\n")
        (folder / "blocks.py").symlink_to(outside / "blocks.py")
    if how == "links in a circle":
        (folder / "net.py").symlink_to(folder / "other.py")
        (folder / "other.py").symlink_to(folder / "net.py")
    return "net.py:make", folder


@pytest.mark.parametrize(
    "how",
    [
        "an absolute path",
        "a path upwards",
        "a link",
        "a folder that is a link",
        "a neighbour that is a link",
        "links in a circle",
        "nothing",
    ],
)
def test_a_configuration_names_code_in_its_own_folder_only(how: str, tmp_path: Path) -> None:
    name, folder = sent(tmp_path, how)
    with pytest.raises(HoldfastError, match=r"lies outside|is missing|link to a place outside|cannot be reached"):
        OwnCode.in_configuration(name, folder)


def test_the_copy_is_taken_where_the_authors_path_is_gone(tmp_path: Path) -> None:
    written(tmp_path / "run" / "model", net="def make(): return 'the copy'\n")
    code = OwnCode.in_configuration("/gone/net.py:make", tmp_path / "run", copies=("code/model", "model"))
    with trust.trusting(True):
        assert result(code) == "the copy"


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("from subprocess import getoutput\ndef make(): pass\n", "getoutput"),
        ("import os\nsystem = os.system\n", "system"),
        ("class Net:\n    def make(self): pass\n", "make"),
        ("from builtins import exec\n", "exec"),
    ],
)
def test_a_function_from_elsewhere_is_refused_before_anything_runs(text: str, function: str, tmp_path: Path) -> None:
    """Else a file that is trusted would lend every function that it imports to whoever writes a configuration."""
    written(tmp_path, net=text)
    for read in (lambda: OwnCode.named(f"{tmp_path}/net.py:{function}"),
                 lambda: OwnCode.in_configuration(f"net.py:{function}", tmp_path)):  # fmt: skip
        with pytest.raises(HoldfastError, match="has no function"):
            read()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"def make(:\n", r"line 1 is not Python"),
        (b"\0\0\0", "is not Python|cannot be parsed"),
        (b"x = " + b"(" * 5000 + b")" * 5000 + b"\n", "is not Python|cannot be parsed"),
        (b"x = '" + b"a" * (1 << 20) + b"'\n", "larger than 512 kB"),
    ],
)
def test_files_that_cannot_be_read_as_python(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_bytes(content)
    with pytest.raises(HoldfastError, match=message):
        OwnCode.named(f"{tmp_path}/net.py:make")


def test_a_package_that_is_a_link_elsewhere_is_not_walked(tmp_path: Path) -> None:
    """It may lead to the root of a disk."""
    folder = written(tmp_path / "sent", net="import whole\ndef make(): pass\n")
    (folder / "whole").symlink_to("/")
    with pytest.raises(HoldfastError, match="whole is a link to a place outside"):
        OwnCode.in_configuration("net.py:make", folder)


@pytest.mark.parametrize("kind", ["a compiled file", "a source that another name hides"])
def test_what_a_changed_path_leads_to_is_not_run(kind: str, tmp_path: Path) -> None:
    """Code that puts its own folder on sys.path would run whatever else is sent with it."""
    text = "import sys, pathlib\nsys.path.insert(0, str(pathlib.Path(__file__).parent))\n"
    text += "name = 'fast' + '_ops'\ntry:\n    ops = __import__(name)\nexcept ImportError:\n    ops = None\n"
    written(tmp_path, net=text + "def make(): return ops\n", fast_ops="raise RuntimeError('it ran')\n")
    if kind == "a compiled file":
        import py_compile

        py_compile.compile(str(tmp_path / "fast_ops.py"), cfile=str(tmp_path / "fast_ops.pyc"), doraise=True)
        (tmp_path / "fast_ops.py").unlink()
    before = list(sys.path)
    assert result(OwnCode.named(f"{tmp_path}/net.py:make")) is None
    assert sys.path == before


def test_relative_imports_and_programs_are_told(tmp_path: Path) -> None:
    written(tmp_path, relative="from .blocks import x\ndef make(): pass\n", blocks="x = 1\n")
    written(tmp_path, program="import sys\ndef make(): pass\nsys.exit(0)\n")
    with pytest.raises(HoldfastError, match=r"line 1, imports relatively, .* write from blocks import"):
        OwnCode.named(f"{tmp_path}/relative.py:make")
    with pytest.raises(HoldfastError, match="ends the program when it is imported"):
        result(OwnCode.named(f"{tmp_path}/program.py:make"))


def test_a_function_that_was_replaced_after_its_definition(tmp_path: Path) -> None:
    written(tmp_path, net="def getoutput(cmd): pass\nfrom subprocess import getoutput\n")
    with pytest.raises(HoldfastError, match="defines no function 'getoutput' of its own"):
        result(OwnCode.named(f"{tmp_path}/net.py:getoutput"))


def test_files_that_import_each_other_are_trusted_one_by_one(tmp_path: Path, store: Path) -> None:
    """They have one hash."""
    written(tmp_path, net="import other\ndef make(): return 1\n", other="import net\ndef make(): return 2\n")
    assert trust.remember(OwnCode.named(f"{tmp_path}/net.py:make")) is None
    assert result(OwnCode.in_configuration("net.py:make", tmp_path)) == 1
    with pytest.raises(HoldfastError, match="nobody asked"):
        result(OwnCode.in_configuration("other.py:make", tmp_path))


def test_a_folder_of_many_files_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.models.own_file.MOST", 20)
    written(tmp_path, net="import big\ndef make(): pass\n", **{f"big__in__m{number}": "" for number in range(30)})
    with pytest.raises(HoldfastError, match="imports more than 20 files"):
        OwnCode.named(f"{tmp_path}/net.py:make")
