"""Two evaluations side by side, and `holdfast compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_results import ATTACKS, FLAG, SERIOUS, ledger, protocol, row

from holdfast.evaluation.compared import compare, in_words, read_finished
from holdfast.evaluation.statistics import difference_interval, mcnemar, wilson_interval
from tiny_runs import command, refused

OTHER = {"model": "b" * 64, "model_name": "runs/y (best)"}
A_FATES = [0, 4, 4, 4, 4, 1, 2, 4, 4, 1]
B_FATES = [4, 4, 1, 3, 2, 1, 4, 0, 4, 1]


def write(
    folder: Path, rows: list[dict[str, Any]], *, flags: list[dict[str, Any]] | None = None, **changes: Any
) -> Path:
    """An evaluation as it lies on the disk."""
    folder.mkdir(parents=True)
    (folder / "protocol.json").write_text(json.dumps(protocol(**{"n": len(rows), **changes})))
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    (folder / "flags.json").write_text(json.dumps({"flags": flags or []}))
    return folder


def rows_of(fates: list[int]) -> list[dict[str, Any]]:
    return [row(7 * number, fate) for number, fate in enumerate(fates)]


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return write(tmp_path / "a", rows_of(A_FATES))


@pytest.fixture
def b(tmp_path: Path) -> Path:
    """Its lines stand in another order."""
    return write(tmp_path / "b", rows_of(B_FATES)[::-1], **OTHER)


def compared(a: Path, b: Path) -> dict[str, Any]:
    return compare(read_finished(a), read_finished(b))


# ------------------------------------------------------------------------------------------------ counts


def test_images_are_paired(a: Path, b: Path) -> None:
    """By index, not by line. Counted by hand."""
    found = compared(a, b)
    assert found["n"] == 10
    robust = found["robust"]
    assert (robust["a"], robust["b"]) == (0.6, 0.4)
    assert (robust["only_a"], robust["only_b"]) == (4, 2)
    assert robust["difference"] == pytest.approx(0.2)
    assert robust["interval"] == list(difference_interval(4, 2, 10))
    assert robust["p"] == mcnemar(4, 2)
    assert (robust["a_interval"], robust["b_interval"]) == tuple(list(wilson_interval(k, 10)) for k in (6, 4))
    assert (found["clean"]["only_a"], found["clean"]["only_b"]) == (1, 1)
    assert found["attack"] == "AutoAttack-standard, Linf(8/255)"


def test_after_each_attack(a: Path, b: Path) -> None:
    """The last is the robust accuracy itself."""
    found = compared(a, b)
    assert [each["attack"] for each in found["attacks"]] == ATTACKS
    assert [(each["a"], each["b"]) for each in found["attacks"]] == [(0.7, 0.6), (0.6, 0.5), (0.6, 0.4)]
    assert [(each["only_a"], each["only_b"]) for each in found["attacks"]] == [(2, 1), (3, 2), (4, 2)]
    assert {**found["robust"], "attack": ATTACKS[-1]} == found["attacks"][-1]


def test_the_other_way_round(a: Path, b: Path) -> None:
    """Only signs change."""
    found, turned = compared(a, b)["robust"], compared(b, a)["robust"]
    assert turned["difference"] == -found["difference"]
    assert turned["interval"] == pytest.approx([-bound for bound in reversed(found["interval"])])
    assert turned["p"] == found["p"]


def test_a_part_of_the_images(a: Path, tmp_path: Path) -> None:
    """The common ones decide, and n says so."""
    fewer = write(tmp_path / "fewer", rows_of(B_FATES)[2:6], **OTHER)
    for found in (compared(a, fewer), compared(fewer, a)):
        assert found["n"] == 4
        assert sorted((found["a"]["n"], found["b"]["n"])) == [4, 10]
        assert sorted((found["robust"]["a"], found["robust"]["b"])) == [0.0, 0.75]
    assert "on the same 4 images of cifar10" in in_words(compared(a, fewer))


def test_two_evaluations_of_one_model(a: Path, tmp_path: Path) -> None:
    """Verdicts that differ are listed, with their cause."""
    again = write(tmp_path / "again", rows_of([0, 4, 4, 3, 4, 2, 2, 4, 4, 1]))
    found = compared(a, again)
    assert found["same_model"]
    assert found["differing"] == [{"index": 21, "a": "robust", "b": "broken", "attack_a": None, "attack_b": ATTACKS[2]}]
    assert "same model; verdicts that rounding changed: 1: 21" in in_words(found)
    reseeded = write(tmp_path / "reseeded", rows_of(A_FATES), seed=4)
    assert "verdicts that the seed and rounding changed: none" in in_words(compared(a, reseeded))


def test_two_models_are_not_expected_to_agree(a: Path, b: Path) -> None:
    """Their differing verdicts are the comparison, no instability."""
    found = compared(a, b)
    assert not found["same_model"]
    assert found["differing"] == []
    assert "same model" not in in_words(found)


@pytest.mark.parametrize(
    ("changes", "first", "second"),
    [
        ({"model": "c" * 64}, "A  runs/x (best), weights {hash}, seed 3", "B  runs/x (best), weights cccccccc, seed 3"),
        ({"seed": 4}, "A  runs/x (best), seed 3, n = 10", "B  runs/x (best), seed 4, n = 10"),
        ({}, "A  runs/x (best), in {a}, seed 3", "B  runs/x (best), in {c}, seed 3"),
        (OTHER, "A  runs/x (best), seed 3", "B  runs/y (best), seed 3"),
    ],
    ids=["weights", "seed", "folder", "name"],
)
def test_two_sides_are_never_named_alike(
    changes: dict[str, Any], first: str, second: str, a: Path, tmp_path: Path
) -> None:
    """What differs stands beside a name that does not."""
    c = write(tmp_path / "c", rows_of(A_FATES), **changes)
    found = compared(a, c)
    lines = in_words(found).splitlines()
    names = {"a": a, "c": c, "hash": protocol()["model"][:8]}
    assert lines[0].startswith(first.format(**names))
    assert lines[1].startswith(second.format(**names))
    assert lines[0][1:] != lines[1][1:]
    assert (found["a"]["label"] == found["b"]["label"]) == ("seed" in changes)


def test_hashes_that_begin_alike(a: Path, tmp_path: Path) -> None:
    """As many digits as tell them apart."""
    digest = protocol()["model"][:20] + "z" * 44
    found = compared(a, write(tmp_path / "c", rows_of(A_FATES), model=digest))
    assert found["b"]["label"].endswith(digest[:21])
    assert found["a"]["label"] != found["b"]["label"]


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_prints(a: Path, b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both accuracies, the difference in points, counts and p."""
    assert command("compare", a, b) == 0
    told = capsys.readouterr().out
    for part in ("A  runs/x (best), seed 3", "B  runs/y (best)", "Linf(8/255)", "do not tell the two robust"):
        assert part in told
    (line,) = (line for line in told.splitlines() if line.startswith("robust"))
    low, high = difference_interval(4, 2, 10)
    words = f"60.0% 40.0% +20.0 [{100 * low:+.1f}, {100 * high:+.1f}] 4 2 0.69".split()
    assert [word for word in line.split() if word in words] == words
    assert sum(line.startswith("after ") for line in told.splitlines()) == 3
    assert "DO NOT QUOTE" not in told


def test_the_command_prints_json(a: Path, b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One object, the same as from Python."""
    assert command("compare", a, b, "--json") == 0
    assert json.loads(capsys.readouterr().out) == compared(a, b)


def test_digits_follow_the_number_of_images(tmp_path: Path) -> None:
    """As in the summary's own words."""
    both = [write(tmp_path / name, rows_of([fate, 1] + [4] * 5998)) for name, fate in (("c", 4), ("d", 1))]
    assert "99.98%" in in_words(compared(*both))
    assert "+0.02  [" in in_words(compared(*both))


def test_a_clear_difference_is_not_called_unclear(tmp_path: Path) -> None:
    """And a serious flag of either side forbids to quote it."""
    high = write(tmp_path / "high", rows_of([4] * 10), flags=[FLAG])
    low = write(tmp_path / "low", rows_of([1] * 10), flags=[FLAG, SERIOUS], **OTHER)
    told = in_words(compared(high, low))
    assert "do not tell" not in told
    assert "DO NOT QUOTE: B raises zero-gradients" in told
    assert "A raises" not in told


def test_runs_stand_for_their_only_evaluation_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Others beside it do not matter."""
    for name, fates, more in (("x", A_FATES, {}), ("y", B_FATES, OTHER)):
        evaluations = tmp_path / name / "evaluations"
        write(evaluations / "standard", rows_of(fates), **more)
        (evaluations / "pgd-50.json").write_text("{}")
    write(tmp_path / "x" / "evaluations" / "quick", rows_of(A_FATES), attack="quick")
    write(tmp_path / "y" / "evaluations" / "small", rows_of(B_FATES), epsilon=4 / 255, **OTHER)
    assert command("compare", tmp_path / "x", tmp_path / "y", "--json") == 0
    assert json.loads(capsys.readouterr().out)["robust"]["a"] == 0.6
    write(tmp_path / "y" / "evaluations" / "again", rows_of(B_FATES), **OTHER)
    told = refused(capsys, "compare", tmp_path / "x", tmp_path / "y")
    assert "several evaluations that fit: name two of" in told
    assert all(str(tmp_path / "y" / "evaluations" / name) in told for name in ("standard", "again"))
    told = refused(capsys, "compare", tmp_path / "x" / "evaluations" / "quick", tmp_path / "y")
    assert "has a like" in told
    assert "quick" in told
    assert "Linf(4/255)" in told
    assert command("compare", tmp_path / "x", tmp_path / "y" / "evaluations" / "again") == 0


def test_two_evaluations_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An evaluation is never compared with itself, however its folder is spelt."""
    run = tmp_path / "x"
    write(run / "evaluations" / "one", rows_of(A_FATES))
    assert "is given twice" in refused(capsys, "compare", run, run / "evaluations" / ".." / "evaluations" / "one")
    write(run / "evaluations" / "two", rows_of(A_FATES), seed=4)
    assert command("compare", run, run / "evaluations" / "one") == 0
    assert "several evaluations" in refused(capsys, "compare", run, run)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "e" * 64}, "different images (cifar10 dddddddd and cifar10 eeeeeeee)"),
        ({"attack": "quick"}, "differ in attack, AutoAttack-standard and quick"),
        ({"threat": "L2"}, "differ in threat, Linf and L2"),
        ({"epsilon": 4 / 255}, "differ in epsilon, Linf(8/255) and Linf(4/255)"),
        ({"attacks": [*ATTACKS, "noise"]}, "differ in attacks"),
        (
            {"settings": ["APGD(steps=100)", "Square(queries=9)"]},
            "attack's settings, Square(queries=5) and Square(queries=9)",
        ),
        ({"format": 2}, "has format 2, this version reads 1"),
    ],
)
def test_unlike_evaluations(
    change: dict[str, Any], message: str, a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is compared that was not measured alike."""
    described = json.loads((a / "protocol.json").read_text())
    (a / "protocol.json").write_text(json.dumps({**described, "settings": ["APGD(steps=100)", "Square(queries=5)"]}))
    assert message in refused(capsys, "compare", a, write(tmp_path / "c", rows_of(B_FATES), **change))


def test_epsilon_written_by_another_machine(a: Path, tmp_path: Path) -> None:
    """The last bit of a quotient does not make another threat."""
    other = write(tmp_path / "c", rows_of(B_FATES), epsilon=8 / 255 * (1 + 1e-15), **OTHER)
    assert compared(a, other)["n"] == 10


def test_images_that_only_partly_overlap(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else n would be a choice of nobody; nor is there anything to say of no common image."""
    c = write(tmp_path / "c", [*rows_of(B_FATES)[:3], row(5, 4)], **OTHER)
    assert "looked at 10 and 4 images and share 3" in refused(capsys, "compare", a, c)
    empty = write(tmp_path / "empty", [], **OTHER)
    assert "share 0" in refused(capsys, "compare", a, empty)


def test_labels_that_disagree(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One ledger is not of these images."""
    c = write(tmp_path / "c", [*rows_of(B_FATES)[:9], row(63, 4, label=2)], **OTHER)
    assert "image 63 has label 0 in one ledger and 2 in the other" in refused(capsys, "compare", a, c)


@pytest.mark.parametrize("name", ["ledger.jsonl", "flags.json"])
def test_an_unfinished_evaluation(name: str, a: Path, b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says how to finish."""
    (b / name).unlink()
    told = refused(capsys, "compare", a, b)
    assert f"{b} is an unfinished evaluation, {name} is missing: give the same `holdfast evaluate` command" in told


def test_a_ledger_that_was_cut(a: Path, b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Between lines, within one, or with a line twice."""
    ledger_file = b / "ledger.jsonl"
    lines = ledger_file.read_text().splitlines(keepends=True)
    ledger_file.write_text("".join(lines[:7]))
    assert "7 of 10 images are done" in refused(capsys, "compare", a, b)
    for bad in (lines[-1][:30], '{"index": 3}\n', "[]\n", "\xff\n"):
        ledger_file.write_bytes("".join([*lines[:-1], bad]).encode("latin-1"))
        assert f"line 10 of {ledger_file} is damaged" in refused(capsys, "compare", a, b)
    for more in ([*lines[:-1], lines[0]], [*lines, lines[0]], [*lines, json.dumps(row(1, 4)) + "\n"]):
        ledger_file.write_text("".join(more))
        assert "names an image twice or too many" in refused(capsys, "compare", a, b)


def test_other_damaged_files(a: Path, b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named, with what to do."""
    for bad in ("{}", "[]", '{"flags": {}}', "{"):
        (b / "flags.json").write_text(bad)
        assert f"{b / 'flags.json'} is damaged" in refused(capsys, "compare", a, b)
    (b / "protocol.json").write_text("{")
    assert "protocol.json is damaged" in refused(capsys, "compare", a, b)
    short = {key: value for key, value in protocol().items() if key != "seed"}
    (b / "protocol.json").write_text(json.dumps(short))
    assert "lacks seed" in refused(capsys, "compare", a, b)


def test_folders_without_an_evaluation(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing, a file, or a run that was never evaluated."""
    assert "is no folder" in refused(capsys, "compare", a, tmp_path / "nowhere")
    assert "is no folder" in refused(capsys, "compare", a, a / "protocol.json")
    (tmp_path / "run" / "evaluations").mkdir(parents=True)
    assert "holds no evaluation: run `holdfast evaluate" in refused(capsys, "compare", a, tmp_path / "run")


def test_the_whole_ledger_of_the_other_test(tmp_path: Path) -> None:
    """Flags and rows come back as they were written."""
    finished = read_finished(write(tmp_path / "c", ledger(), flags=[FLAG]))
    assert list(finished.rows) == ledger()
    assert list(finished.flags) == [FLAG]
