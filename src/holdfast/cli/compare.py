"""`holdfast compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.cli.arguments import Parser, print_json


def parser() -> Parser:
    """The options of `holdfast compare`."""
    known = Parser(
        prog="holdfast compare",
        description="Compare two models that were evaluated on the same images under the same attack.\n"
        "Images are paired, so a difference shows that two separate intervals would hide.",
    )
    known.add_argument("a", metavar="A", help="an evaluation's folder, or a run that holds only one that fits")
    known.add_argument("b", metavar="B", help="likewise")
    known.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return known


def run(argv: Sequence[str]) -> int:
    """Read both ledgers, compare, print."""
    asked = parser().read(argv)
    from holdfast.evaluation.compared import choose_pair, compare, in_words, read_finished

    first, second = choose_pair(Path(asked.a), Path(asked.b))
    found = compare(read_finished(first), read_finished(second))
    if asked.json:
        print_json(found)
    else:
        print(in_words(found))
    return 0
