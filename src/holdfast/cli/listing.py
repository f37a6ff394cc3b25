"""`holdfast list`."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.cli.arguments import Parser, print_json
from holdfast.cli.table import ATTACKS, LISTS, RECIPES
from holdfast.data.table import SOURCES
from holdfast.evaluation.table import PROTOCOLS, SINGLE
from holdfast.models.table import MODELS

TABLES: dict[str, dict[str, str]] = {"models": MODELS, "data": SOURCES}


def run(argv: Sequence[str]) -> int:
    """Print names and what they are."""
    parser = Parser(prog="holdfast list", description="List what can be named.")
    parser.add_argument("what", choices=LISTS, metavar="|".join(LISTS))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.read(argv)
    if asked.what == "recipes":
        return list_recipes(as_json=asked.json)
    if asked.what == "attacks":
        return list_attacks(as_json=asked.json)
    table = TABLES[asked.what]
    if asked.json:
        print_json(table)
        return 0
    width = max(map(len, table))
    for name, what in table.items():
        print(f"{name:<{width}}  {what}")
    return 0


def list_attacks(*, as_json: bool) -> int:
    """What `holdfast evaluate --attack` takes, and what recipes are made of."""
    groups = {"evaluation": {**PROTOCOLS, **SINGLE}, "training": ATTACKS}
    if as_json:
        print_json(groups)
        return 0
    width = max(len(name) for table in groups.values() for name in table)
    for heading, table in (
        ("holdfast evaluate --attack", groups["evaluation"]),
        ("training (--attack.name, in recipes)", groups["training"]),
    ):
        print(f"{heading}:")
        for name, what in table.items():
            print(f"  {name:<{width}}  {what}")
    return 0


def list_recipes(*, as_json: bool) -> int:
    """Every recipe with its cost, its paper and what it does."""
    if as_json:
        print_json({name: line._asdict() for name, line in RECIPES.items()})
        return 0
    name_width = max(map(len, RECIPES))
    paper_width = max(len(line.paper) for line in RECIPES.values())
    print(f"{'recipe':<{name_width}}  cost   {'paper':<{paper_width}}  what it does")
    for name, line in RECIPES.items():
        print(f"{name:<{name_width}}  {line.cost:.2f}x  {line.paper:<{paper_width}}  {line.what}")
    print("cost: forward passes of a training step over PGD-AT's")
    return 0
