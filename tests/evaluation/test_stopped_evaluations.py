"""Signals during an evaluation and a recount: finished units are kept, and the same command ends as if undisturbed."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast import Linf, evaluate
from holdfast.evaluation.networks import Deciding
from holdfast.evaluation.pursuit import Pursuit
from holdfast.interruption import SIGNALS, Stopped
from tiny_runs import command, tiny_net, toy, train, write_toy


def go(out: Path) -> Any:
    """Four units of six images, PGD with two restarts."""
    found = evaluate(tiny_net(), toy().test, threat=Linf(0.1), attack="pgd", probe=False, out=out, unit=6)
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found.rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The rows of the evaluation that nobody stopped."""
    return go(tmp_path_factory.mktemp("whole") / "evaluation")


def at_pass(monkeypatch: pytest.MonkeyPatch, unit: int, act: Callable[[], None]) -> list[int]:
    """Act in the second pass of a unit; the list gets every pass's unit."""
    begun, passes = [0], []
    run, one_pass = Pursuit.run, Pursuit._pass

    def counted(self: Pursuit, *arguments: Any) -> None:
        begun[0] += 1
        run(self, *arguments)

    def noted(self: Pursuit, work: Any) -> None:
        passes.append(begun[0])
        if begun[0] == unit and passes.count(unit) == 2:
            act()
        one_pass(self, work)

    monkeypatch.setattr(Pursuit, "run", counted)
    monkeypatch.setattr(Pursuit, "_pass", noted)
    return passes


@pytest.mark.parametrize("number", SIGNALS)
def test_it_stops_after_the_pass(number: int, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass is finished, its unit is not kept, those before are, and the handlers are put back."""
    before = [signal.getsignal(each) for each in SIGNALS]
    passes = at_pass(monkeypatch, 3, lambda: signal.raise_signal(number))
    with pytest.raises(Stopped) as stopped:
        go(tmp_path / "e")
    assert stopped.value.number == number
    assert passes.count(3) == 2
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert sorted(path.name for path in (tmp_path / "e" / "units").glob("*.jsonl")) == ["000000.jsonl", "000001.jsonl"]
    monkeypatch.undo()
    again = at_pass(monkeypatch, 0, lambda: None)
    assert go(tmp_path / "e") == whole
    assert set(again) == {1, 2}  # the two units that were left


def test_a_second_signal_ends_it_within_the_pass(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was kept is damaged."""
    monkeypatch.setattr("holdfast.interruption.COPIES", 0.0)
    reached: list[int] = []

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        reached.append(1)

    at_pass(monkeypatch, 2, twice)
    with pytest.raises(Stopped) as stopped:
        go(tmp_path / "e")
    assert stopped.value.number == signal.SIGTERM
    assert reached == []
    monkeypatch.undo()
    assert go(tmp_path / "e") == whole


def test_before_the_first_pass_it_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was found yet, and nothing stays."""
    monkeypatch.setattr("holdfast.evaluation.fingerprint.of_model", lambda model: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Stopped):
        go(tmp_path / "deep" / "e")
    assert list(tmp_path.iterdir()) == []


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`evaluate` says how to go on, `verify` ends; both with 128 and the signal's number."""
    data, run, out = write_toy(tmp_path / "toy.npz"), tmp_path / "run", tmp_path / "e"
    assert train(data, run, epochs=1) == 0
    words = ["evaluate", run, "--steps", 3, "--unit", 6, "--out", out, "--save-examples"]
    with monkeypatch.context() as patch:
        at_pass(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        capsys.readouterr()
        assert command(*words) == 128 + signal.SIGTERM
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "holdfast: stopped; finished units are kept: give the same command again to go on"
    assert len(list((out / "units").glob("*.jsonl"))) == 1
    assert command(*words) == 0
    rows = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    with monkeypatch.context() as patch:
        patch.setattr(Deciding, "__call__", lambda *rest: signal.raise_signal(signal.SIGHUP))
        capsys.readouterr()
        assert command("verify", out, "--model", run) == 128 + signal.SIGHUP
    assert capsys.readouterr().err == "holdfast: stopped\n"
