"""Two evaluations of the same images side by side: paired differences and McNemar's test."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import Damaged, HoldfastError
from holdfast.evaluation.results import (
    Row,
    aligned,
    bounds,
    listed,
    percent,
    serious,
    standing,
    threat_in_words,
)
from holdfast.evaluation.statistics import difference_interval, mcnemar, wilson_interval
from holdfast.parsing import LINES_BYTES, parse_json_lines
from holdfast.runs.digests import checked_bytes
from holdfast.runs.files import read_json

PROTOCOL, LEDGER, FLAGS = "protocol.json", "ledger.jsonl", "flags.json"
FORMAT = 1
_NEEDED = ("attack", "attacks", "threat", "epsilon", "seed", "n", "model", "data", "data_name", "model_name", "classes")
_KEYS = {"index", "label", "verdict", "attack"}


@dataclass(frozen=True)
class Finished:
    """A finished evaluation as it lies on the disk.

    Attributes:
        folder: Where.
        protocol: What was run.
        rows: The ledger, an image a row.
        flags: What casts doubt on the number.
    """

    folder: Path
    protocol: Mapping[str, Any]
    rows: Sequence[Row]
    flags: Sequence[Mapping[str, Any]]


def read_protocol(folder: Path) -> dict[str, Any]:
    """What an evaluation ran.

    Raises:
        HoldfastError: missing, damaged, or of another version.
    """
    path = folder / PROTOCOL
    protocol = read_json(path, advice=_anew(folder))
    if protocol.get("format") != FORMAT:
        raise HoldfastError(
            f"{path} has format {protocol.get('format')}, this version reads {FORMAT}: use holdfast"
            f" {protocol.get('version', 'of that time')}, or evaluate anew"
        )
    lacking = [key for key in _NEEDED if key not in protocol]
    if lacking:
        raise Damaged(f"{path} is damaged, it lacks {', '.join(lacking)}", _anew(folder))
    return protocol


def _anew(folder: Path) -> str:
    return f"restore it from a copy, or delete {folder} and evaluate again"


def read_finished(folder: Path) -> Finished:
    """A whole evaluation.

    Raises:
        HoldfastError: it is not finished, or a file is damaged.
    """
    protocol = read_protocol(folder)
    for name in (LEDGER, FLAGS):
        if not (folder / name).is_file():
            raise _incomplete(folder, f"{name} is missing")
    content = checked_bytes(folder / LEDGER, most=LINES_BYTES, advice=_anew(folder))
    rows = parse_json_lines(content, str(folder / LEDGER), advice=_anew(folder))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not row.keys() >= _KEYS:
            raise Damaged(f"line {number} of {folder / LEDGER} is damaged", _anew(folder))
    if len(rows) < protocol["n"]:
        raise _incomplete(folder, f"{len(rows)} of {protocol['n']} images are done")
    if len(rows) > protocol["n"] or len({row["index"] for row in rows}) < len(rows):
        raise Damaged(f"{folder / LEDGER} is damaged, it names an image twice or too many", _anew(folder))
    advice = "give the same `holdfast evaluate` command again, which writes it anew"
    flags = read_json(folder / FLAGS, advice=advice).get("flags")
    if not isinstance(flags, list):
        raise Damaged(f"{folder / FLAGS} is damaged, it holds no flags", advice)
    return Finished(folder, protocol, sorted(rows, key=lambda row: row["index"]), flags)


def _incomplete(folder: Path, why: str) -> HoldfastError:
    return HoldfastError(
        f"{folder} is an unfinished evaluation, {why}: give the same `holdfast evaluate` command again, it goes on"
        " where it stopped"
    )


def evaluations_of(path: Path) -> list[Path]:
    """The evaluation folder itself, or those below a run's ``evaluations``.

    Raises:
        HoldfastError: there is none.
    """
    if (path / PROTOCOL).is_file():
        return [path]
    if not path.is_dir():
        raise HoldfastError(f"{path} is no folder: give an evaluation's folder or a run's")
    found = sorted(file.parent for file in (path / "evaluations").glob(f"*/{PROTOCOL}"))
    if not found:
        raise HoldfastError(
            f"{path} holds no evaluation: run `holdfast evaluate {shlex.quote(str(path))} --attack autoattack` first"
        )
    return found


def in_brief(folder: Path, protocol: Mapping[str, Any]) -> str:
    """A folder with what was run in it, for a list of choices."""
    return f"{folder} ({protocol['attack']}, {threat_in_words(protocol)}, n = {protocol['n']})"


def why_not(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """Why two evaluations cannot be compared, in one line, or None."""
    if first["data"] != second["data"]:
        names = " and ".join(f"{each['data_name']} {each['data'][:8]}" for each in (first, second))
        return f"the evaluations are of different images ({names}): evaluate both models with the same --data and --n"
    advice = "evaluate both models under the same --attack, --norm and --epsilon"
    for key in ("attack", "threat", "attacks"):
        if first[key] != second[key]:
            return f"the evaluations differ in {key}, {first[key]} and {second[key]}: {advice}"
    for own, other in zip(first.get("settings", ()), second.get("settings", ()), strict=False):
        if own != other:
            return f"the evaluations differ in an attack's settings, {own} and {other}: {advice}"
    if not math.isclose(first["epsilon"], second["epsilon"], rel_tol=1e-9):
        threats = " and ".join(threat_in_words(each) for each in (first, second))
        return f"the evaluations differ in epsilon, {threats}: {advice}"
    return None


def choose_pair(first: Path, second: Path) -> tuple[Path, Path]:
    """The two evaluation folders that are meant, where a run's folder may stand for its only one that fits.

    Raises:
        HoldfastError: nothing is there, nothing fits, or more than one pair does; says what there is.
    """
    own, others = evaluations_of(first), evaluations_of(second)
    if len(own) == len(others) == 1:
        if own[0].resolve() == others[0].resolve():
            raise HoldfastError(f"{own[0]} is given twice: give two evaluations")
        return own[0], others[0]
    protocols = {folder: read_protocol(folder) for folder in (*own, *others)}
    pairs = [
        (a, b)
        for a in own
        for b in others
        if a.resolve() != b.resolve() and why_not(protocols[a], protocols[b]) is None
    ]
    if len(pairs) == 1:
        return pairs[0]
    shown = "; ".join(in_brief(folder, protocols[folder]) for folder in dict.fromkeys((*own, *others)))
    if not pairs:
        raise HoldfastError(f"no evaluation of {first} has a like in {second}: evaluate both alike; there are {shown}")
    raise HoldfastError(f"{first} and {second} hold several evaluations that fit: name two of {shown}")


def paired(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Two accuracies on the same images, their difference and whether chance explains it."""
    n = len(first)
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    return {
        "a": sum(first) / max(1, n),
        "a_interval": list(wilson_interval(sum(first), n)),
        "b": sum(second) / max(1, n),
        "b_interval": list(wilson_interval(sum(second), n)),
        "difference": (only_first - only_second) / max(1, n),
        "interval": list(difference_interval(only_first, only_second, n)),
        "only_a": only_first,
        "only_b": only_second,
        "p": mcnemar(only_first, only_second),
    }


def _common(first: Finished, second: Finished) -> list[tuple[Row, Row]]:
    """Rows of the images that both evaluations looked at.

    Raises:
        HoldfastError: each looked at images that the other did not, or they disagree on a label.
    """
    own, others = ({row["index"]: row for row in each.rows} for each in (first, second))
    both = sorted(own.keys() & others.keys())
    if not both or len(both) < min(len(own), len(others)):
        raise HoldfastError(
            f"the evaluations looked at {len(own)} and {len(others)} images and share {len(both)}, but one must hold"
            " the other's: evaluate both models with the same --n"
        )
    for index in both:
        labels = own[index]["label"], others[index]["label"]
        if labels[0] != labels[1]:
            raise HoldfastError(
                f"image {index} has label {labels[0]} in one ledger and {labels[1]} in the other: one of them is"
                " damaged; evaluate anew"
            )
    return [(own[index], others[index]) for index in both]


def _model(each: Finished, label: str) -> dict[str, Any]:
    """What is said of one side."""
    names = {key: each.protocol[key] for key in ("model_name", "model", "seed", "n")}
    return {"label": label, "folder": str(each.folder), **names, "serious_flags": serious(each.flags)}


def _labels(first: Finished, second: Finished) -> tuple[str, str]:
    """Return the models' names, with the first thing that differs where these are alike.

    That is the hash of their weights; for one model the seed or n, which stand beside the name anyway; else the folder.
    """
    sides = (first, second)
    names = [str(each.protocol["model_name"]) for each in sides]
    if names[0] != names[1]:
        return names[0], names[1]
    hashes = [str(each.protocol["model"]) for each in sides]
    if hashes[0] != hashes[1]:
        alike = next((k for k, (a, b) in enumerate(zip(*hashes, strict=False)) if a != b), 0)
        more = [f", weights {digest[: max(8, alike + 1)]}" for digest in hashes]
    elif any(first.protocol[key] != second.protocol[key] for key in ("seed", "n")):
        more = ["", ""]
    else:
        more = [f", in {each.folder}" for each in sides]
    return names[0] + more[0], names[1] + more[1]


def compare(first: Finished, second: Finished) -> dict[str, Any]:
    """Two evaluations of the same images under the same attack, ready for JSON.

    Differences are a's accuracy minus b's, with Bonett and Price's 95 % interval and McNemar's exact p-value; after
    each attack, after all (``robust``), and without one (``clean``).

    Raises:
        HoldfastError: data, attack, threat or epsilon differ, or the images do.
    """
    reason = why_not(first.protocol, second.protocol)
    if reason is not None:
        raise HoldfastError(reason)
    rows = _common(first, second)
    attacks = list(first.protocol["attacks"])
    stages = [(standing(a, attacks), standing(b, attacks)) for a, b in rows]
    after = [paired([a > k for a, _ in stages], [b > k for _, b in stages]) for k in range(len(attacks) + 1)]
    same = first.protocol["model"] == second.protocol["model"]
    labels = _labels(first, second)
    differing = [
        {"index": a["index"], "a": a["verdict"], "b": b["verdict"], "attack_a": a["attack"], "attack_b": b["attack"]}
        for a, b in rows
        if a["verdict"] != b["verdict"]
    ]
    return {
        "n": len(rows),
        "attack": f"{first.protocol['attack']}, {threat_in_words(first.protocol)}",
        **{key: first.protocol[key] for key in ("threat", "epsilon", "data", "data_name")},
        "a": _model(first, labels[0]),
        "b": _model(second, labels[1]),
        "clean": after[0],
        "robust": after[-1],
        "attacks": [{"attack": attack, **found} for attack, found in zip(attacks, after[1:], strict=True)],
        "same_model": same,
        "differing": differing if same else [],
    }


def in_words(found: Mapping[str, Any]) -> str:
    """The comparison as text: what was compared, the table, and what may be said of it."""
    n, a, b = found["n"], found["a"], found["b"]
    lines = [
        f"A  {a['label']}, seed {a['seed']}, n = {a['n']}",
        f"B  {b['label']}, seed {b['seed']}, n = {b['n']}",
        f"on the same {n} images of {found['data_name']} under {found['attack']}",
        "",
        _table(found),
        "",
        "A - B in points with Bonett and Price's 95 % interval; only A, only B: images that only one gets right;"
        " p: McNemar's exact test",
    ]
    for name, side in (("A", a), ("B", b)):
        if side["serious_flags"]:
            lines.append(f"DO NOT QUOTE: {name} raises {', '.join(side['serious_flags'])}")
    if found["same_model"]:
        cause = "rounding" if a["seed"] == b["seed"] else "the seed and rounding"
        changed = listed([row["index"] for row in found["differing"]])
        lines.append(f"A and B are the same model; verdicts that {cause} changed: {changed}")
    elif found["robust"]["p"] >= 0.05:
        lines.append("These images do not tell the two robust accuracies apart (p >= 0.05).")
    return "\n".join(lines)


def _table(found: Mapping[str, Any]) -> str:
    """One line a stage."""
    n = found["n"]
    digits = 2 if n >= 5000 else 1
    lines = [
        ["accuracy", "A", "95 % interval", "B", "95 % interval", "A - B", "95 % interval", "only A", "only B", "p"]
    ]
    after = [(f"after {each['attack']}", each) for each in found["attacks"]]
    for name, each in (("clean", found["clean"]), *after, ("robust", found["robust"])):
        sides = [word for side in "ab" for word in (percent(each[side], n), bounds(each[f"{side}_interval"], n))]
        points, low, high = (f"{100 * share:+.{digits}f}" for share in (each["difference"], *each["interval"]))
        shown = [points, f"[{low}, {high}]", str(each["only_a"]), str(each["only_b"])]
        lines.append([name, *sides, *shown, f"{each['p']:.2g}"])
    return aligned(lines)
