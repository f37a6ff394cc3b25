"""`holdfast list`."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.cli.arguments import Parser, print_json
from holdfast.cli.table import ATTACKS, LISTS, RECIPES
from holdfast.data.table import SOURCES
from holdfast.models.table import MODELS

TABLES: dict[str, dict[str, str]] = {"recipes": RECIPES, "models": MODELS, "attacks": ATTACKS, "data": SOURCES}


def run(argv: Sequence[str]) -> int:
    """Print names and what they are."""
    parser = Parser(prog="holdfast list", description="List what can be named.")
    parser.add_argument("what", choices=LISTS, metavar="|".join(LISTS))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.read(argv)
    table = TABLES[asked.what]
    if asked.json:
        print_json(table)
        return 0
    width = max(map(len, table))
    for name, what in table.items():
        print(f"{name:<{width}}  {what}")
    return 0
