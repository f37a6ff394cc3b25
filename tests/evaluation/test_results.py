"""The summary of a ledger and its forms, on a ledger that was counted by hand."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

import pytest
import torch

from holdfast import __version__
from holdfast.errors import HoldfastError
from holdfast.evaluation.accuracy import Evaluation
from holdfast.evaluation.results import curve, distances, images_csv, in_words, log, standing, summarize, table
from holdfast.evaluation.statistics import wilson_interval

ATTACKS = ["APGD-CE", "APGD-T, 9 targets", "Square-5000"]
FORWARD, BACKWARD = (103, 900, 5000), (101, 909, 0)


def protocol(**changes: Any) -> dict[str, Any]:
    """What was run."""
    return {
        "format": 1,
        "version": "0.0.9",
        "attack": "AutoAttack-standard",
        "attacks": ATTACKS,
        "threat": "Linf",
        "epsilon": 8 / 255,
        "seed": 3,
        "n": 10,
        "unit": 250,
        "model": "a" * 64,
        "data": "d" * 64,
        "data_name": "cifar10",
        "model_name": "runs/x (best)",
        "classes": ["cat", "dog", "eel"],
        **changes,
    }


def row(index: int, fate: int, *, label: int = 0, **changes: Any) -> dict[str, Any]:
    """A line of the ledger. Fate: 0 wrong, k broken by the k-th attack, 4 robust."""
    verdict = "wrong" if fate == 0 else "robust" if fate > len(ATTACKS) else "broken"
    broken, ran = verdict == "broken", ATTACKS[:fate]
    return {
        "index": index,
        "label": label,
        "prediction": (label + 1) % 3 if fate == 0 else label,
        "clean_margin": -0.5 if fate == 0 else 1.5,
        "verdict": verdict,
        "attack": ATTACKS[fate - 1] if broken else None,
        "target": 2 if broken and fate == 2 else None,
        "restart": 0 if broken else None,
        "broken_prediction": 1 if broken else None,
        "distance": 0.03 if broken else None,
        "margin": -0.25 if fate <= 3 else 0.125,
        "forward": dict(zip(ran, FORWARD, strict=False)),
        "backward": dict(zip(ran, BACKWARD, strict=False)),
        "verified": fate,
        "unstable": False,
        "seconds": 0.5,
        **changes,
    }


def ledger() -> list[dict[str, Any]]:
    """Ten images: 2 wrong, 3 broken by the first attack, 1 by the second, none by the third, 4 robust."""
    fates = [0, 1, 4, 1, 0, 4, 2, 1, 4, 4]
    labels = [0, 0, 0, 0, 1, 1, 1, 0, 1, 1]
    return [
        row(11 * number, fate, label=label, unstable=number in (3, 6))
        for number, (fate, label) in enumerate(zip(fates, labels, strict=True))
    ]


FLAG = {"name": "few-images", "says": "only 10 images\nwere attacked", "severity": "warning", "values": {"n": 10.0}}
SERIOUS = {"name": "zero-gradients", "says": "no gradient", "severity": "serious", "values": {}}


# ------------------------------------------------------------------------------------------------ summary


def test_accuracies_mean_what_they_mean_elsewhere() -> None:
    """The same keys and values as an evaluation by a single attack."""
    found = summarize(ledger(), protocol())
    expected = Evaluation(10, 8, 4, "AutoAttack-standard, Linf(8/255)").as_dict()
    assert {key: found[key] for key in expected} == expected
    assert (found["complete"], found["planned"]) == (True, 10)


def test_after_each_attack() -> None:
    """What it broke, what was left of all images, and the passes spent in it."""
    found = summarize(ledger(), protocol())["attacks"]
    assert [each["attack"] for each in found] == ATTACKS
    assert [each["broken"] for each in found] == [3, 1, 0]
    assert [each["robust_after"] for each in found] == [0.5, 0.4, 0.4]
    assert [each["interval"] for each in found] == [list(wilson_interval(k, 10)) for k in (5, 4, 4)]
    assert [each["forward"] for each in found] == [8 * 103, 5 * 900, 4 * 5000]
    assert [each["backward"] for each in found] == [8 * 101, 5 * 909, 0]


def test_what_the_last_attack_broke_is_not_robust() -> None:
    """Nor is it forgotten in the table."""
    found = summarize([row(0, 3), row(1, 4), row(2, 4), row(3, 0)], protocol(n=4))
    assert (found["clean_accuracy"], found["robust_accuracy"]) == (0.75, 0.5)
    assert [each["robust_after"] for each in found["attacks"]] == [0.75, 0.75, 0.5]
    assert found["classes"][0]["robust_accuracy"] == 0.5


def test_costs_unstable_images_and_what_was_run() -> None:
    """Passes are an image's; every pass counts, whatever it is called."""
    rows = ledger()
    rows[0]["forward"] = {"clean": 7}
    found = summarize(rows, protocol(), [FLAG])
    assert found["passes"] == {
        "forward": (7 + 8 * 103 + 5 * 900 + 4 * 5000) / 10,
        "backward": (8 * 101 + 5 * 909) / 10,
        "verifying": (3 * 1 + 2 + 4 * 4) / 10,
    }
    assert found["unstable"] == [33, 66]
    assert found["seconds"] == 5.0
    assert found["flags"] == [FLAG]
    for key in ("threat", "epsilon", "seed", "model", "data", "model_name", "data_name", "version"):
        assert found[key] == protocol()[key]
    assert found["attack_label"] == "AutoAttack-standard"
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_classes() -> None:
    """Each with its own interval; a class without an image has no accuracy and is never the worst."""
    found = summarize(ledger(), protocol())
    cat, dog, eel = found["classes"]
    assert cat == {
        "name": "cat",
        "n": 5,
        "clean_accuracy": 4 / 5,
        "robust_accuracy": 1 / 5,
        "interval": list(wilson_interval(1, 5)),
    }
    assert (dog["n"], dog["clean_accuracy"], dog["robust_accuracy"]) == (5, 0.8, 0.6)
    assert eel == {"name": "eel", "n": 0, "clean_accuracy": None, "robust_accuracy": None, "interval": [0.0, 1.0]}
    assert found["worst_robust"] == {"name": "cat", "n": 5, "robust_accuracy": 0.2}
    assert found["worst_clean"] == {"name": "cat", "n": 5, "clean_accuracy": 0.8}
    harder = summarize([*ledger(), row(1000, 0, label=1)], protocol(n=11))
    assert harder["worst_clean"] == {"name": "dog", "n": 6, "clean_accuracy": 4 / 6}
    assert harder["worst_robust"]["name"] == "cat"


def test_no_image_at_all() -> None:
    """Nothing is divided by zero, and everything can be written and read."""
    found = summarize([], protocol(n=0))
    assert (found["n"], found["robust_accuracy"], found["interval"]) == (0, 0.0, [0.0, 1.0])
    assert found["passes"] == {"forward": 0.0, "backward": 0.0, "verifying": 0.0}
    assert found["worst_clean"] is found["worst_robust"] is None
    json.dumps(found, allow_nan=False)
    assert "n = 0" in in_words(found)
    assert "worst classes, clean   none" in log(found, protocol(n=0))
    assert images_csv([]).count("\n") == 1


def test_a_part_of_the_images_is_called_so() -> None:
    """A number of half the images must not pass for that of all."""
    found = summarize(ledger()[:4], protocol())
    assert not found["complete"]
    assert "INCOMPLETE: 4 of 10 images" in in_words(found)
    assert "INCOMPLETE" in log(found, protocol())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attack": "PGD-50"}, "image 22 of the ledger is 'broken' by 'PGD-50', which is none of the protocol's"),
        ({"attack": None}, "'broken' by None"),
        ({"verdict": "unknown"}, "is 'unknown'"),
        ({"label": 3}, "has label 3, but the protocol names 3 classes"),
        ({"label": -1}, "has label -1"),
        ({"index": 11}, "stands twice"),
    ],
)
def test_a_ledger_that_does_not_belong_to_the_protocol(changes: dict[str, Any], message: str) -> None:
    """Told in one line, not counted somewhere."""
    rows = ledger()
    rows[2] = row(22, 1) | changes
    with pytest.raises(HoldfastError, match=message) as told:
        summarize(rows, protocol())
    assert "evaluate anew" in str(told.value)
    assert "\n" not in str(told.value)


def test_standing() -> None:
    """Zero, the attack's number, or one above all."""
    assert [standing(row(0, fate), ATTACKS) for fate in range(5)] == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------ curve and distances


def at(epsilon: float, robust: int, **changes: Any) -> dict[str, Any]:
    rows = [row(k, 4 if k < robust else 1) for k in range(10)]
    return summarize(rows, protocol(epsilon=epsilon, **changes))


def test_curve_is_sorted() -> None:
    """By epsilon, with its interval beside each number."""
    found = curve([at(8 / 255, 3), at(2 / 255, 9), at(4 / 255, 9)])
    assert found["epsilon"] == [2 / 255, 4 / 255, 8 / 255]
    assert found["robust_accuracy"] == [0.9, 0.9, 0.3]
    assert found["interval"] == [list(wilson_interval(k, 10)) for k in (9, 9, 3)]
    assert (found["threat"], found["attack_label"], found["n"]) == ("Linf", "AutoAttack-standard", 10)
    assert found["falls"]


def test_a_curve_that_rises_says_so() -> None:
    """A larger ball cannot be safer."""
    assert not curve([at(8 / 255, 5), at(4 / 255, 4)])["falls"]


@pytest.mark.parametrize("change", [{"threat": "L2"}, {"model": "b" * 64}, {"data": "e" * 64}, {"attack": "quick"}])
def test_a_curve_of_unlike_evaluations(change: dict[str, Any]) -> None:
    """Refused, as is one of nothing."""
    key = next(iter(change)).replace("attack", "attack_label")
    with pytest.raises(HoldfastError, match=f"differ in {key}"):
        curve([at(4 / 255, 5), at(8 / 255, 4, **change)])
    with pytest.raises(HoldfastError, match="at least one"):
        curve([])


def test_a_curve_over_unlike_numbers_of_images() -> None:
    """Refused."""
    with pytest.raises(HoldfastError, match="differ in n"):
        curve([at(4 / 255, 5), summarize(ledger()[:4], protocol())])


def far(*values: float | None) -> list[dict[str, Any]]:
    """Correct images with examples at these distances; the verdict at epsilon plays no part."""
    return [row(k, 4 if k % 2 else 1, distance=value) for k, value in enumerate(values)]


def test_distances() -> None:
    """Quantiles interpolate as is customary; wrong images are at no distance but count in the shares."""
    found = distances([*far(0.4, 0.1, 0.3, 0.2), row(9, 0)], radii=(0.2, 0.1, 0.05, 1))
    assert (found["n"], found["correct"], found["found"]) == (5, 4, 4)
    quartiles = [found[name] for name in ("lower_quartile", "median", "upper_quartile")]
    assert quartiles == pytest.approx([0.175, 0.25, 0.325])
    assert found["mean"] == pytest.approx(0.25)
    assert [(at["radius"], at["share"]) for at in found["within"]] == [(0.05, 0.2), (0.1, 0.4), (0.2, 0.6), (1, 1.0)]
    assert found["within"][1]["interval"] == list(wilson_interval(2, 5))


def test_distances_of_images_that_were_never_broken() -> None:
    """They are far: a quantile among them is unknown, and they do not pull the mean."""
    found = distances(far(0.1, None, 0.2, None, math.inf), radii=(1e9,))
    assert (found["correct"], found["found"]) == (5, 2)
    assert (found["lower_quartile"], found["median"], found["upper_quartile"]) == (0.2, None, None)
    assert found["mean"] == pytest.approx(0.15)
    assert found["within"][0]["share"] == 0.4
    nothing = distances([])
    assert nothing["median"] is nothing["mean"] is None
    json.dumps([found, nothing], allow_nan=False)


# ------------------------------------------------------------------------------------------------ forms


def test_csv_has_a_line_an_image() -> None:
    """Names with commas survive, passes are added up, what is unknown is empty."""
    lines = list(csv.DictReader(io.StringIO(images_csv(ledger()))))
    assert [int(line["index"]) for line in lines] == [11 * k for k in range(10)]
    broken, wrong = lines[6], lines[0]
    assert broken["attack"] == "APGD-T, 9 targets"
    assert (broken["forward"], broken["backward"], broken["target"]) == ("1003", "1010", "2")
    assert (broken["unstable"], wrong["unstable"]) == ("true", "false")
    assert (broken["broken_prediction"], broken["restart"]) == ("1", "0")
    assert (wrong["attack"], wrong["distance"], wrong["forward"]) == ("", "", "0")
    assert set(lines[0]) == set(ledger()[0])
    assert "\r" not in images_csv(ledger())


def test_in_words() -> None:
    """One sentence with attack, threat, n and interval."""
    low, high = wilson_interval(4, 10)
    assert in_words(summarize(ledger(), protocol(), [FLAG])) == (
        f"clean 80.0%, robust 40.0% [{low:.1%}, {high:.1%}] under AutoAttack-standard, Linf(8/255), on cifar10"
        " (n = 10, 95 % Wilson interval)"
    )


def test_words_forbid_what_must_not_be_quoted() -> None:
    """A serious flag comes first; the label of a faster mode is kept whole."""
    label = "quick (APGD-CE): upper bound, not AutoAttack-standard"
    told = in_words(summarize(ledger(), protocol(attack=label), [FLAG, SERIOUS, {**SERIOUS, "name": "train-mode"}]))
    assert told.startswith("DO NOT QUOTE: zero-gradients, train-mode; clean 80.0%")
    assert f"under {label}, Linf(8/255)" in told
    assert "few-images" not in told


def test_digits_follow_the_number_of_images() -> None:
    """Two decimals say something from several thousand images on."""
    rows = [row(k, 4 if k < 3001 else 1) for k in range(5000)]
    assert "robust 60.02% [" in in_words(summarize(rows, protocol(n=5000)))
    assert "robust 60.0% [" in in_words(summarize(rows[1:], protocol(n=4999)))


def test_table_is_aligned() -> None:
    """One line a stage, figures under one another."""
    lines = table(summarize(ledger(), protocol())).splitlines()
    assert len(lines) == 2 + len(ATTACKS)
    assert lines[1].startswith("no attack (clean)")
    assert "80.0%" in lines[1]
    ends = {line.index("%") for line in lines[1:]}
    assert len(ends) == 1
    assert lines[3].split()[-3:] == ["1", "4,500", "4,545"]
    assert len(set(map(len, lines[2:]))) == 1
    assert "40.0%" in lines[3]
    assert not any(line != line.rstrip() for line in lines)


def test_log_can_be_pasted() -> None:
    """Everything that is asked first, in 15 to 40 lines."""
    told = log(summarize(ledger(), protocol(), [FLAG, SERIOUS]), protocol())
    for part in (
        "runs/x (best), weights " + "a" * 16,
        "cifar10, n = 10 of 10 asked",
        "AutoAttack-standard, Linf(8/255), seed 3",
        "made by   holdfast 0.0.9",
        f"log by    holdfast {__version__}, torch {torch.__version__}, Python ",
        "2,532.4 forward, 535.3 backward, 2.1 verifying an image; 5 s",
        table(summarize(ledger(), protocol())),
        "worst classes, clean   cat 80.0% (n = 5), dog 80.0% (n = 5)\n",
        "worst classes, robust  cat 20.0% (n = 5), dog 60.0% (n = 5)\n",
        "unstable images        2: 33, 66\n",
        "flags                  2\n",
        "  WARNING few-images: only 10 images were attacked (docs/flags/few-images.md)\n",
        "  SERIOUS zero-gradients: no gradient (docs/flags/zero-gradients.md)\n",
        "\nDO NOT QUOTE: zero-gradients; clean",
    ):
        assert part in told


def test_log_stays_short() -> None:
    """With one attack and no flag, and with everything at once."""
    one = protocol(attacks=ATTACKS[:1], n=1)
    assert 15 <= log(summarize([row(0, 1)], one), one).count("\n") <= 40
    rows = [row(k, 1, label=k % 100, unstable=True) for k in range(300)]
    many = protocol(attacks=[*ATTACKS, "a", "b", "c"], n=300, classes=[str(k) for k in range(100)])
    told = log(summarize(rows, many, [FLAG] * 14), many)
    assert 15 <= told.count("\n") <= 40
    assert "300: 0, 1, 2," in told
    assert "19 and 280 more" in told
    assert "robust  0 0.0% (n = 3), 1 0.0% (n = 3), 2 0.0% (n = 3)\n" in told
    assert max(map(len, told.splitlines())) < 200
    assert "flags                  none\n" in log(summarize([row(0, 1)], one), one)
