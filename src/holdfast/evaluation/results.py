"""What a finished ledger says: the summary, and its forms for reading, quoting and pasting."""

from __future__ import annotations

import csv
import io
import math
import platform
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from holdfast import __version__
from holdfast.errors import HoldfastError
from holdfast.evaluation.statistics import wilson_interval
from holdfast.threat import readable

Row = Mapping[str, Any]
"""A line of ledger.jsonl: what is known of one image."""

COLUMNS = (
    "index", "label", "prediction", "clean_margin", "verdict", "attack", "target", "restart", "broken_prediction",
    "distance", "margin", "forward", "backward", "verified", "unstable", "seconds",
)  # fmt: skip
_LISTED = 20  # a list of images is cut here, so that a log stays short enough for an issue


def standing(row: Row, attacks: Sequence[str]) -> int:
    """How far an image came: 0 where its clean prediction is wrong, k where the k-th attack broke it, else K + 1.

    It is classified correctly after the first k attacks exactly if its standing exceeds k.

    Raises:
        HoldfastError: the row's verdict is none, or it was broken by an attack that is not among them.

    Example:
        >>> standing({"index": 7, "verdict": "broken", "attack": "Square-5000"}, ["APGD-CE", "Square-5000"])
        2
    """
    verdict, attack = row["verdict"], row["attack"]
    if verdict == "wrong":
        return 0
    if verdict == "robust":
        return len(attacks) + 1
    if verdict == "broken" and attack in attacks:
        return attacks.index(attack) + 1
    raise HoldfastError(
        f"image {row['index']} of the ledger is {verdict!r} by {attack!r}, which is none of the protocol's attacks"
        f" ({', '.join(attacks)}): ledger and protocol do not belong together; evaluate anew"
    )


def threat_in_words(protocol: Mapping[str, Any]) -> str:
    """The threat model as it is quoted.

    Example:
        >>> threat_in_words({"threat": "Linf", "epsilon": 8 / 255})
        'Linf(8/255)'
    """
    return f"{protocol['threat']}({readable(protocol['epsilon'])})"


def _share(successes: int, n: int) -> dict[str, Any]:
    """An accuracy with its interval."""
    return {"accuracy": successes / max(1, n), "interval": list(wilson_interval(successes, n))}


def _classes(rows: Sequence[Row], names: Sequence[str], top: int) -> list[dict[str, Any]]:
    """Clean and robust accuracy of every class; None where the class has no image."""
    reached: list[list[int]] = [[] for _ in names]
    for row in rows:
        if not 0 <= row["label"] < len(names):
            raise HoldfastError(
                f"image {row['index']} of the ledger has label {row['label']}, but the protocol names {len(names)}"
                " classes: ledger and protocol do not belong together; evaluate anew"
            )
        reached[row["label"]].append(row["standing"])
    found = []
    for name, stages in zip(names, reached, strict=True):
        n, clean, robust = len(stages), sum(stage > 0 for stage in stages), sum(stage == top for stage in stages)
        found.append(
            {
                "name": name,
                "n": n,
                "clean_accuracy": clean / n if n else None,
                "robust_accuracy": robust / n if n else None,
                "interval": list(wilson_interval(robust, n)),
            }
        )
    return found


def _worst(classes: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any] | None:
    """The class that has images and the lowest accuracy; the first of equals."""
    there = [found for found in classes if found["n"]]
    lowest = min(there, key=lambda found: found[key], default=None)
    return None if lowest is None else {"name": lowest["name"], "n": lowest["n"], key: lowest[key]}


def _after_each(rows: Sequence[Row], attacks: Sequence[str]) -> list[dict[str, Any]]:
    """What every attack broke, what was left, and the passes spent in it."""
    found = []
    for number, attack in enumerate(attacks, 1):
        left = _share(sum(row["standing"] > number for row in rows), len(rows))
        found.append(
            {
                "attack": attack,
                "broken": sum(row["standing"] == number for row in rows),
                "robust_after": left["accuracy"],
                "interval": left["interval"],
                "forward": sum(row["forward"].get(attack, 0) for row in rows),
                "backward": sum(row["backward"].get(attack, 0) for row in rows),
            }
        )
    return found


def summarize(
    rows: Sequence[Row], protocol: Mapping[str, Any], flags: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Everything that is said of an evaluation as a whole, ready for JSON.

    Accuracies are shares of all n images and intervals are Wilson's, 95 %. An image whose clean prediction is wrong is
    neither attacked nor robust.

    Args:
        rows: The ledger, an image a row.
        protocol: What was run, as in protocol.json.
        flags: What casts doubt on the number, as in flags.json.

    Raises:
        HoldfastError: an image stands twice in the ledger, or ledger and protocol do not belong together.
    """
    attacks = list(protocol["attacks"])
    if len({row["index"] for row in rows}) < len(rows):
        raise HoldfastError("an image stands twice in the ledger: it is damaged; evaluate anew")
    rows = [{**row, "standing": standing(row, attacks)} for row in rows]
    n, top = len(rows), len(attacks) + 1
    clean, robust = (_share(sum(row["standing"] > least for row in rows), n) for least in (0, len(attacks)))
    classes = _classes(rows, protocol["classes"], top)

    def an_image(passes: int) -> float:
        return passes / max(1, n)

    return {
        "clean_accuracy": clean["accuracy"],
        "clean_interval": clean["interval"],
        "robust_accuracy": robust["accuracy"],
        "interval": robust["interval"],
        "attack": f"{protocol['attack']}, {threat_in_words(protocol)}",
        "n": n,
        "complete": n == protocol["n"],
        "planned": protocol["n"],
        "attack_label": protocol["attack"],
        **{key: protocol[key] for key in ("threat", "epsilon", "seed", "model", "model_name", "data", "data_name")},
        "version": protocol["version"],
        "attacks": _after_each(rows, attacks),
        "classes": classes,
        "worst_clean": _worst(classes, "clean_accuracy"),
        "worst_robust": _worst(classes, "robust_accuracy"),
        "passes": {
            "forward": an_image(sum(sum(row["forward"].values()) for row in rows)),
            "backward": an_image(sum(sum(row["backward"].values()) for row in rows)),
            "verifying": an_image(sum(row["verified"] for row in rows)),
        },
        "unstable": [row["index"] for row in rows if row["unstable"]],
        "seconds": sum(row["seconds"] for row in rows),
        "flags": [dict(flag) for flag in flags],
    }


def curve(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Robust accuracy over epsilon, in ascending order.

    A larger ball holds the smaller one, so the true curve never rises; where it does (``falls`` is false), the attack
    fails at some radius.

    Raises:
        HoldfastError: the evaluations differ in more than epsilon, or there is none.
    """
    if not summaries:
        raise HoldfastError("a curve needs at least one evaluation: give the summaries")
    for key in ("attack_label", "threat", "model", "data", "n"):
        values = {summary[key] for summary in summaries}
        if len(values) > 1:
            told = " and ".join(sorted(map(str, values))[:2])
            raise HoldfastError(f"the evaluations differ in {key}, {told}: a curve takes those of one model and attack")
    ordered = sorted(summaries, key=lambda summary: summary["epsilon"])
    heights = [summary["robust_accuracy"] for summary in ordered]
    return {
        "threat": ordered[0]["threat"],
        "attack_label": ordered[0]["attack_label"],
        "n": ordered[0]["n"],
        "epsilon": [summary["epsilon"] for summary in ordered],
        "robust_accuracy": heights,
        "interval": [summary["interval"] for summary in ordered],
        "falls": all(later <= earlier for earlier, later in pairwise(heights)),
    }


def _quantile(ordered: Sequence[float], q: float) -> float | None:
    """Linear interpolation between neighbours; None where it falls among images that were never broken."""
    if not ordered:
        return None
    place = q * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    value = low + (place - math.floor(place)) * (high - low)
    return value if math.isfinite(value) else None  # NaN between two that are infinitely far


def distances(rows: Sequence[Row], *, radii: Sequence[float] = ()) -> dict[str, Any]:
    """How far the nearest adversarial examples lie, from a minimum-norm evaluation.

    Args:
        rows: The ledger; ``distance`` counts whatever the verdict at epsilon.
        radii: Where to read the curve.

    Returns:
        n, correct, found: All images, those with a correct clean prediction, and how many of these have an example.
        lower_quartile, median, upper_quartile: Over the correct ones; an image without an example counts as infinitely
            far, and a quantile that falls there is None.
        mean: Over those with an example only.
        within: For every radius the share of all n images that is wrong, or has an example that near, with its
            interval: one minus the robust accuracy there.
    """
    correct = [row for row in rows if row["verdict"] != "wrong"]
    reached = [math.inf if row["distance"] is None else row["distance"] for row in correct]
    far = sorted(reached)
    found = [distance for distance in far if math.isfinite(distance)]
    wrong, n = len(rows) - len(correct), len(rows)
    within = []
    for radius in sorted(radii):
        near = _share(wrong + sum(distance <= radius for distance in far), n)
        within.append({"radius": radius, "share": near["accuracy"], "interval": near["interval"]})
    return {
        "n": n,
        "correct": len(correct),
        "found": len(found),
        "lower_quartile": _quantile(far, 0.25),
        "median": _quantile(far, 0.5),
        "upper_quartile": _quantile(far, 0.75),
        "mean": math.fsum(found) / len(found) if found else None,
        "within": within,
    }


def images_csv(rows: Sequence[Row]) -> str:
    """The ledger as a table: one line an image, the passes of all attacks added up, empty where nothing is known."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        passes = {key: sum(row[key].values()) for key in ("forward", "backward")}
        line = {**row, **passes, "unstable": "true" if row["unstable"] else "false"}
        writer.writerow([line[column] for column in COLUMNS])
    return file.getvalue()


def serious(flags: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the flags under which a number must not be quoted."""
    return [flag["name"] for flag in flags if flag["severity"] == "serious"]


def percent(share: float, n: int) -> str:
    """A share of n images, with no more digits than n images can tell.

    Example:
        >>> percent(0.7371, 10000), percent(0.7371, 500)
        ('73.71%', '73.7%')
    """
    return f"{share:.2%}" if n >= 5000 else f"{share:.1%}"


def bounds(interval: Sequence[float], n: int) -> str:
    """An interval in percent.

    Example:
        >>> bounds([0.25, 0.5], 40)
        '[25.0%, 50.0%]'
    """
    return f"[{percent(interval[0], n)}, {percent(interval[1], n)}]"


def in_words(summary: Mapping[str, Any]) -> str:
    """The result as one sentence that can be quoted; it begins with what forbids to quote it, if anything does."""
    n, forbidden = summary["n"], serious(summary["flags"])
    text = f"DO NOT QUOTE: {', '.join(forbidden)}; " if forbidden else ""
    if not summary["complete"]:
        text += f"INCOMPLETE: {n} of {summary['planned']} images; "
    text += f"clean {percent(summary['clean_accuracy'], n)}, robust {percent(summary['robust_accuracy'], n)}"
    text += f" {bounds(summary['interval'], n)} under {summary['attack']}"
    return f"{text}, on {summary['data_name']} (n = {n}, 95 % Wilson interval)"


def table(summary: Mapping[str, Any]) -> str:
    """Accuracy after each attack, what it broke and what it cost, as aligned text."""
    n = summary["n"]
    clean = percent(summary["clean_accuracy"], n)
    lines = [
        ["after", "robust", "95 % interval", "broken", "forward", "backward"],
        ["no attack (clean)", clean, bounds(summary["clean_interval"], n), "", "", ""],
    ]
    for found in summary["attacks"]:
        counts = (f"{found[key]:,}" for key in ("broken", "forward", "backward"))
        left = percent(found["robust_after"], n)
        lines.append([found["attack"], left, bounds(found["interval"], n), *counts])
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join("  ".join(row).rstrip() for row in rows)


def listed(indices: Sequence[int]) -> str:
    """Positions of images, cut where the list gets long.

    Example:
        >>> listed([]), listed([3, 17])
        ('none', '2: 3, 17')
    """
    if not indices:
        return "none"
    more = f" and {len(indices) - _LISTED} more" if len(indices) > _LISTED else ""
    return f"{len(indices)}: {', '.join(map(str, indices[:_LISTED]))}{more}"


def _worst_in_words(summary: Mapping[str, Any], key: str) -> str:
    """The three classes with the lowest accuracy, lowest first."""
    there = sorted((found for found in summary["classes"] if found["n"]), key=lambda found: found[key])
    return ", ".join(f"{found['name']} {found[key]:.1%} (n = {found['n']})" for found in there[:3]) or "none"


def _checking(passes: Mapping[str, float]) -> str:
    """The passes that compared the search with the model, where they were counted."""
    return f", {passes['checking']:,.1f} checking it" if passes.get("checking") else ""


def log(summary: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """A plain-text log, short enough to be pasted into an issue and complete enough to answer its first questions."""
    passes, flags = summary["passes"], summary["flags"]
    lines = [
        "holdfast evaluation",
        f"model     {summary['model_name']}, weights {summary['model'][:16]}",
        f"data      {summary['data_name']}, n = {summary['n']} of {summary['planned']} asked, images and labels"
        f" {summary['data'][:16]}",
        f"attack    {summary['attack']}, seed {summary['seed']}",
        f"made by   holdfast {summary['version']}, format {protocol['format']}, {protocol['unit']} images a unit",
        f"log by    holdfast {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"passes    {passes['forward']:,.1f} forward, {passes['backward']:,.1f} backward, {passes['verifying']:,.1f}"
        f" verifying an image{_checking(passes)}; {summary['seconds']:,.0f} s",
        "",
        table(summary),
        "",
        f"worst classes, clean   {_worst_in_words(summary, 'clean_accuracy')}",
        f"worst classes, robust  {_worst_in_words(summary, 'robust_accuracy')}",
        f"unstable images        {listed(summary['unstable'])}",
        f"flags                  {len(flags) or 'none'}",
    ]
    for flag in flags:
        says = " ".join(flag["says"].split())
        lines.append(f"  {flag['severity'].upper()} {flag['name']}: {says} (docs/flags/{flag['name']}.md)")
    return "\n".join([*lines, "", in_words(summary)]) + "\n"
