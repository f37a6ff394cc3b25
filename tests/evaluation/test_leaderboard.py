"""`holdfast export`: an entry in the form of RobustBench's own, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_compared import write
from test_results import FLAG, SERIOUS, ledger, row

from tiny_runs import command, refused

PAPER = {
    "--paper": "A Method",
    "--authors": "Ada One, Bo Two",
    "--link": "https://arxiv.org/abs/0000.00000",
    "--venue": "ICML 2030",
    "--architecture": "WideResNet-34-10",
    "--additional-data": "false",
}


def words(folder: Path, **changes: str) -> list[str]:
    """The command line, with some options changed."""
    options = {**PAPER, **{f"--{name.replace('_', '-')}": value for name, value in changes.items()}}
    return ["export", str(folder), "--format", "robustbench", *(word for pair in options.items() for word in pair)]


def entry(capsys: pytest.CaptureFixture[str], folder: Path, **changes: str) -> dict[str, Any]:
    """What the command prints."""
    capsys.readouterr()
    assert command(*words(folder, **changes)) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    return write(tmp_path / "ten", ledger(), flags=[FLAG])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 10,000 test images: 8,567 correct, 7,371 robust."""
    fates = [4] * 7371 + [1] * 1196 + [0] * 1433
    return write(tmp_path_factory.mktemp("whole") / "one", [row(k, fate) for k, fate in enumerate(fates)])


def test_an_entry_of_the_whole_test_set(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every field, in the board's own form: accuracies are text in percent."""
    assert entry(capsys, whole) == {
        "link": "https://arxiv.org/abs/0000.00000",
        "name": "A Method",
        "authors": "Ada One, Bo Two",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "venue": "ICML 2030",
        "architecture": "WideResNet-34-10",
        "eps": "8/255",
        "clean_acc": "85.67",
        "reported": "73.71",
        "autoattack_acc": "73.71",
        "unreliable": False,
    }


def test_what_the_person_adds(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's number, extra data and a footnote."""
    found = entry(capsys, whole, reported="74.5", additional_data="true", footnote="Uses 1M generated images.")
    assert (found["reported"], found["autoattack_acc"], found["additional_data"]) == ("74.50", "73.71", True)
    assert found["footnote"] == "Uses 1M generated images."


def test_fewer_images_stand_in_the_footnote(ten: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After what the person says."""
    assert entry(capsys, ten)["footnote"] == "Evaluated on 10 of the 10000 test images."
    told = entry(capsys, ten, footnote="Averaged weights. ")["footnote"]
    assert told == "Averaged weights. Evaluated on 10 of the 10000 test images."
    assert entry(capsys, ten)["clean_acc"] == "80.00"


@pytest.mark.parametrize(
    ("changes", "eps", "board"),
    [
        ({"threat": "L2", "epsilon": 0.5}, "0.5", "its place in RobustBench is model_info/cifar10/L2"),
        ({"data_name": "cifar100"}, "8/255", "its place in RobustBench is model_info/cifar100/Linf"),
        ({"data_name": "digits", "epsilon": 0.1}, "0.1", "RobustBench has no digits Linf board"),
        ({"data_name": "cifar100", "threat": "L2"}, "8/255", "RobustBench has no cifar100 L2 board"),
    ],
)
def test_where_it_belongs(
    changes: dict[str, Any], eps: str, board: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said beside the file; where the size of the test set is not known, n is always told."""
    folder, out = write(tmp_path / "other", ledger(), **changes), tmp_path / "new" / "entry.json"
    assert command(*words(folder, out=str(out))) == 0
    assert capsys.readouterr().out == f"written to {out}; {board}\n"
    found = json.loads(out.read_text())
    assert found["eps"] == eps
    size = "of the 10000 " if "cifar" in found["dataset"] else ""
    assert found["footnote"] == f"Evaluated on 10 {size}test images."


@pytest.mark.parametrize(
    "label", ["quick: upper bound, not AutoAttack-standard", "AutoAttack-standard, nearest examples", "PGD-50"]
)
def test_another_attack(label: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the standard one may stand beside others' numbers."""
    folder = write(tmp_path / "one", ledger(), attack=label)
    told = refused(capsys, *words(folder))
    assert f"was made under {label}, but a leaderboard takes AutoAttack-standard only: run" in told


def test_a_serious_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names it and its page; nothing is written, and no option overrules it."""
    folder = write(tmp_path / "one", ledger(), flags=[FLAG, SERIOUS])
    told = refused(capsys, *words(folder, out=str(tmp_path / "entry.json")))
    assert "raises zero-gradients, so its number must not be quoted: read docs/flags/zero-gradients.md" in told
    assert not (tmp_path / "entry.json").exists()
    assert "--anyway" in refused(capsys, *words(folder), "--anyway")


def test_an_unfinished_evaluation(ten: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its flags nobody knows whether it may be quoted."""
    (ten / "flags.json").unlink()
    assert "is an unfinished evaluation" in refused(capsys, *words(ten))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paper": " "}, "--paper is empty"),
        ({"authors": ""}, "--authors is empty"),
        ({"venue": ""}, "--venue is empty"),
        ({"architecture": ""}, "--architecture is empty"),
        ({"link": "arxiv"}, "--link 'arxiv' is no address"),
        ({"reported": "0.62"}, "--reported '0.62' is no accuracy in percent"),
        ({"reported": "62 %"}, "is no accuracy in percent"),
        ({"reported": "nan"}, "is no accuracy in percent"),
        ({"reported": "101"}, "is no accuracy in percent"),
        ({"additional_data": "no"}, "invalid choice: 'no'"),
        ({"format": "other"}, "invalid choice: 'other'"),
    ],
)
def test_texts_that_will_not_do(
    changes: dict[str, str], message: str, ten: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is told by the option's name."""
    assert message in refused(capsys, *words(ten, **changes))


def test_every_text_is_needed(ten: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is missing is named."""
    told = refused(capsys, "export", ten)
    assert all(option in told for option in PAPER)


def test_a_run_stands_for_its_only_standard_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Others beside it do not matter; with none or several, what there is is listed."""
    run = tmp_path / "run"
    write(run / "evaluations" / "quick", ledger(), attack="quick")
    told = refused(capsys, *words(run))
    assert "holds no evaluation under AutoAttack-standard" in told
    assert "quick (quick, Linf(8/255), n = 10)" in told
    write(run / "evaluations" / "standard", ledger())
    assert entry(capsys, run)["autoattack_acc"] == "40.00"
    write(run / "evaluations" / "again", ledger(), seed=4)
    told = refused(capsys, *words(run))
    assert "several evaluations under AutoAttack-standard" in told
    assert "quick" not in told
