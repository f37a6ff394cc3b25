"""Writes docs/results/evaluation.md from the JSON files that the evaluation's benchmarks left in benchmarks/results.

python benchmarks/evaluation_report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "results" / "evaluation.md"

HEAD = """# Evaluation: measured

Written by `python benchmarks/evaluation_report.py` from benchmarks/results; nothing here is typed. What is run and what
counts: [../evaluation.md](../evaluation.md). Agreement with other libraries: [../crosscheck.md](../crosscheck.md).
"""


def read(pattern: str) -> list[tuple[str, dict[str, Any]]]:
    """Every result of a kind, by name."""
    return [(file.stem, json.loads(file.read_text())) for file in sorted(RESULTS.glob(pattern))]


def speed() -> list[str]:
    """Holdfast against torchattacks' classes at the same protocol."""
    lines = [
        "## Time against torchattacks' classes",
        "",
        "`python benchmarks/evaluate.py`: the same network and images, both sides in one process, in turn; medians.",
        "torchattacks' APGD, APGDT, FAB and Square are made with 100 steps, nine targets and 5,000 queries. Processor",
        "seconds are those of the process; where the machine had other work, they say more than the clock.",
        "",
        "| network | protocol | n | clean | side | seconds | ratio | processor seconds | ratio | robust |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for _, found in read("evaluate-*.json"):
        base = found["median"]["torchattacks"]
        for side, one in found["median"].items():
            robust = ", ".join(map(str, sorted({run["robust"] for run in found["runs"][side]})))
            lines.append(
                f"| {found['name']} | {found['protocol']}, Linf {found['epsilon']} | {found['n']} | {found['clean']} |"
                f" {side} | {one['seconds']:.1f} | {base['seconds'] / one['seconds']:.2f} | {one['cpu_seconds']:.1f} |"
                f" {base['cpu_seconds'] / one['cpu_seconds']:.2f} | {robust} |"
            )
    return lines


def stability() -> list[str]:
    """Batch sizes, processes, kills."""
    lines = ["", "## Does a verdict depend on how it was run?", "", "`python benchmarks/evaluation_stability.py`", ""]
    lines += ["| evaluation | compared | verdicts that differ | of these listed as unstable | rows identical |"]
    lines += ["|---|---|---|---|---|"]
    for name, found in read("evaluation_stability-*.json"):
        what = f"{name.partition('-')[2]}: {found['attack']}, n = {found['n']}, {found['robust']} robust"
        for key, one in found.items():
            if isinstance(one, dict) and "verdicts that differ" in one:
                differ, listed = one["verdicts that differ"], one["of these listed as unstable"]
                lines.append(f"| {what} | {key} | {len(differ)} | {len(listed)} | {one['rows identical']} |")
        if "killed" in found:
            kills = found["killed"]
            lines.append(f"| {what} | SIGKILL at {kills['kills']} moments | | | {kills['identical ledger']} |")
    lines += [
        "",
        "Every one of these evaluations was recounted from its saved images in batches of 1, 17 and 250, with the",
    ]
    return [*lines, "same verdicts (the script stops otherwise)."]


def main() -> None:
    PAGE.write_text("\n".join([HEAD, *speed(), *stability()]) + "\n")
    print(f"written to {PAGE.name}")


if __name__ == "__main__":
    main()
