"""Files of an evaluation that are not as they were written: noticed by every command that reads them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from test_compared import write
from test_leaderboard import words
from test_results import FLAG, ledger
from test_robustness import EPSILON, digits, network, without_time
from torch import nn

from holdfast import HoldfastError, IterativeGradient, Linf, of_attacks, recount
from holdfast.errors import Damaged
from holdfast.evaluation import probes
from holdfast.evaluation.compared import read_finished
from holdfast.evaluation.inputs import as_inputs
from holdfast.evaluation.ledger import Ledger
from holdfast.evaluation.robustness import Plan, Result
from holdfast.runs.digests import beside
from holdfast.runs.files import read_json, write_json, write_text
from tiny_runs import Killed, Said, killed_at, refused


def evaluated(model: nn.Module, out: Path, said: Said | None = None, **own: object) -> Result:
    """Twenty images in four units, with their examples."""
    plan = {"threat": Linf(EPSILON), "protocol": of_attacks([IterativeGradient(steps=5)]), "unit": 5, "probe": False}
    plan |= {"path": out, "save_examples": True, "display": said or Said()}
    return Plan(model=model, inputs=as_inputs(model, *digits(20)), **{**plan, **own}).run()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def whole(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A finished evaluation; copied before it is changed."""
    return evaluated(model, tmp_path_factory.mktemp("whole") / "e")


@pytest.fixture
def finished(whole: Result, tmp_path: Path) -> Path:
    assert whole.path is not None
    return Path(shutil.copytree(whole.path, tmp_path / "e"))


@pytest.fixture
def partly(model: nn.Module, whole: Result, tmp_path: Path) -> Path:
    """An evaluation that was stopped after two units."""
    write_before = Ledger.write

    def write_two(self: Ledger, number: int, *arguments: object) -> None:
        if number == 2:
            raise KeyboardInterrupt
        write_before(self, number, *arguments)  # type: ignore[arg-type]  # handed on

    with patch.object(Ledger, "write", write_two), pytest.raises(KeyboardInterrupt):
        evaluated(model, tmp_path / "p")
    return tmp_path / "p"


def flip(file: Path) -> None:
    """Change one character in the middle to another one, so that text stays text."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
}


def assert_same(found: Result, whole: Result) -> None:
    """The same ledger, and the same examples on the disk."""
    assert found.path is not None
    assert whole.path is not None
    assert without_time(found.rows) == without_time(whole.rows)
    for file in (whole.path / "examples").glob("*.safetensors"):
        assert file.read_bytes() == (found.path / "examples" / file.name).read_bytes()


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["units/000001.jsonl", "units/000001.jsonl.sha256", "examples/000001.safetensors"])
def test_a_damaged_unit_is_evaluated_again(
    name: str, how: str, model: nn.Module, whole: Result, partly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no other of the finished ones; it is said."""
    DAMAGE[how](partly / name)
    done: list[int] = []
    before = Ledger.write
    monkeypatch.setattr(Ledger, "write", lambda self, number, *more: (done.append(number), before(self, number, *more)))
    said = Said()
    again = evaluated(model, partly, said)
    assert done == [1, 2, 3]
    assert_same(again, whole)
    file = str(partly / name.removesuffix(".sha256"))
    assert [text for text in said.texts if file in text and text.endswith(": these images are evaluated again")]


def test_a_unit_that_is_damaged_while_the_others_are_evaluated(model: nn.Module, whole: Result, partly: Path) -> None:
    """Refused when they are merged; the same command then goes on."""
    before = Ledger.merged

    def merged(self: Ledger, units: int, images: int) -> list:
        flip(partly / "units" / "000000.jsonl")
        return before(self, units, images)

    refusal = pytest.raises(Damaged, match="give the same `holdfast evaluate` command again, which evaluates these")
    with patch.object(Ledger, "merged", merged), refusal:
        evaluated(model, partly)
    assert_same(evaluated(model, partly), whole)


@pytest.mark.slow
def test_killed_before_or_after_any_rename(model: nn.Module, whole: Result, tmp_path: Path) -> None:
    """Every file gets its place, and every digest, by a rename: between any two the evaluation is whole."""
    with killed_at(999, after=True) as renamed:
        evaluated(model, tmp_path / "count")
    assert {"000003.jsonl", "000003.safetensors.sha256", "ledger.jsonl", "flags.json"} <= set(renamed)
    for number, name in enumerate(renamed):
        for after in (False, True):
            out, said = tmp_path / f"{number}-{after}", Said()
            with killed_at(number, after=after), pytest.raises(Killed):
                evaluated(model, out)
            assert_same(evaluated(model, out, said), whole)
            assert not any("damaged" in text for text in said.texts), (name, said.texts)
            assert not recount(out, model)["differing"]


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_examples_of_a_finished_evaluation(how: str, model: nn.Module, whole: Result, finished: Path) -> None:
    """Refused where examples are asked for and by the recount; else the ledger stands, and it is said."""
    file = finished / "examples" / "000002.safetensors"
    DAMAGE[how](file)
    told = r"000002.safetensors (was changed or|is) damaged .*: restore it from a copy, or delete"
    with pytest.raises(Damaged, match=told):
        evaluated(model, finished)
    with pytest.raises(Damaged, match=told):
        recount(finished, model)
    said = Said()
    found = evaluated(model, finished, said, save_examples=False)
    assert without_time(found.rows) == without_time(whole.rows)
    assert any(text.endswith(": `holdfast verify` cannot recount this evaluation") for text in said.texts)


def test_lost_examples_of_a_finished_evaluation(model: nn.Module, finished: Path) -> None:
    """As damaged ones."""
    (finished / "examples" / "000002.safetensors").unlink()
    with pytest.raises(HoldfastError, match="was finished without its examples, or has lost some"):
        evaluated(model, finished)
    with pytest.raises(HoldfastError, match=r"000002.safetensors is missing: restore it, or delete"):
        recount(finished, model)
    said = Said()
    evaluated(model, finished, said, save_examples=False)
    assert any("has lost some of its examples" in text for text in said.texts)


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["ledger.jsonl", "ledger.jsonl.sha256", "protocol.json"])
def test_a_damaged_verdict_is_refused(name: str, how: str, model: nn.Module, finished: Path) -> None:
    """By a repeated evaluation, the recount, and what compares or exports it; all say how to go on."""
    DAMAGE[how](finished / name)
    told = rf"{name.removesuffix('.sha256')} .*damaged.*: restore it from a copy, or delete .* and evaluate again"
    for read in (lambda: evaluated(model, finished), lambda: read_finished(finished)):
        with pytest.raises(Damaged, match=told):
            read()
    with pytest.raises(Damaged, match=r"damaged.*: restore it.*, or delete .* and evaluate again"):
        recount(finished, model)


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_flags_are_refused_and_made_again(how: str, model: nn.Module, whole: Result, finished: Path) -> None:
    """They decide whether a number may be quoted."""
    assert whole.path is not None
    DAMAGE[how](finished / "flags.json")
    with pytest.raises(Damaged, match=r"flags.json .*damaged.*: give the same `holdfast evaluate` command again"):
        read_finished(finished)
    for name in ("summary.json", "images.csv", "log.txt"):
        DAMAGE[how](finished / name)
    evaluated(model, finished)
    for name in ("flags.json", "summary.json", "images.csv"):
        assert (finished / name).read_bytes() == (whole.path / name).read_bytes()
    read_finished(finished)


def test_export_refuses_a_damaged_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, as `compare` does."""
    folder = write(tmp_path / "ten", ledger(), flags=[FLAG])
    write_text(folder / "ledger.jsonl", (folder / "ledger.jsonl").read_text(), hashed=True)
    write_json(folder / "flags.json", read_json(folder / "flags.json"))
    for name in ("ledger.jsonl", "flags.json"):
        good = (folder / name).read_text()
        (folder / name).write_text(good.replace("e", "f", 1))
        assert f"{folder / name} " in (told := refused(capsys, *words(folder)))
        assert "damaged" in told
        (folder / name).write_text(good)


def test_probes_are_read_back(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole ones are not measured again, whatever was found; damaged ones are, and it is said."""
    count = 0
    before = probes.probe

    def counted(*arguments: object, **more: object) -> list:
        nonlocal count
        count += 1
        return before(*arguments, **more)  # type: ignore[arg-type]  # handed on

    monkeypatch.setattr(probes, "probe", counted)
    doubtful = nn.Sequential(model, nn.Softmax(1))
    first = evaluated(doubtful, tmp_path / "e", probe=True)
    assert "probabilities" in [flag.name for flag in first.flags]
    said = Said()
    assert evaluated(doubtful, tmp_path / "e", said, probe=True).flags == first.flags
    assert (count, said.texts) == (1, [])
    for number, damage in enumerate(DAMAGE.values(), 2):
        damage(tmp_path / "e" / "probes.json")
        again = evaluated(doubtful, tmp_path / "e", said, probe=True)
        assert again.flags == first.flags
        assert count == number
        assert said.texts[-1] == f"{tmp_path / 'e' / 'probes.json'} is damaged: it is measured again"


def test_an_evaluation_of_an_older_version(
    model: nn.Module, whole: Result, finished: Path, partly: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without digests it is read as before, and it is said."""
    for folder in (finished, partly):
        for digest in folder.rglob("*.sha256"):
            digest.unlink()
        said = Said()
        assert_same(evaluated(model, folder, said), whole)
        assert len([text for text in said.texts if "without a .sha256 beside them" in text]) == 1
    for digest in finished.rglob("*.sha256"):
        digest.unlink()
    assert not recount(finished, model)["differing"]
    assert all("is used unchecked" in record.getMessage() for record in caplog.records)
    assert caplog.records


def test_examples_of_the_wrong_kind(model: nn.Module, finished: Path) -> None:
    """Also where no digest says so."""
    from safetensors.torch import load_file, save_file

    file = finished / "examples" / "000001.safetensors"
    good = load_file(file)
    beside(file).unlink()
    for bad in ({"x": torch.zeros(1)}, {**good, "y": good["y"][:3]}):
        save_file(bad, file)
        with pytest.raises(Damaged, match="it holds no examples"):
            recount(finished, model)
        with pytest.raises(Damaged, match="it holds no examples"):
            evaluated(model, finished)
