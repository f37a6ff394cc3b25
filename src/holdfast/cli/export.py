"""`holdfast export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.cli.arguments import Parser, print_json
from holdfast.streams import tell as to_stderr


def parser() -> Parser:
    """The options of `holdfast export`."""
    known = Parser(
        prog="holdfast export",
        description="Write an evaluation as an entry of a leaderboard.\n"
        "Refused unless the attack is AutoAttack-standard and no flag says that the number must not be quoted.",
    )
    known.add_argument("folder", metavar="DIR", help="an evaluation's folder, or a run with one AutoAttack-standard")
    known.add_argument("--format", choices=("robustbench",), default="robustbench", help="whose form (robustbench)")
    known.add_argument("--paper", required=True, metavar="TITLE", help="title of the paper")
    known.add_argument("--authors", required=True, metavar="NAMES", help="its authors, with commas between them")
    known.add_argument("--link", required=True, metavar="URL", help="where it can be read")
    known.add_argument("--venue", required=True, metavar="TEXT", help="such as 'ICML 2024'")
    known.add_argument("--architecture", required=True, metavar="NAME", help="such as WideResNet-34-10")
    known.add_argument(
        "--additional-data",
        required=True,
        choices=("true", "false"),
        help="whether images beyond the training set were used",
    )
    known.add_argument("--reported", metavar="PERCENT", help="robust accuracy that the paper reports (the one found)")
    known.add_argument("--footnote", default="", metavar="TEXT", help="what the board should say of the model")
    known.add_argument("--out", metavar="FILE", help="the JSON file to write (standard output)")
    return known


def run(argv: Sequence[str]) -> int:
    """Read the evaluation, write the entry."""
    asked = parser().read(argv)
    from holdfast.evaluation.compared import read_finished
    from holdfast.evaluation.leaderboard import choose_standard, place, robustbench_entry
    from holdfast.runs.files import write_json

    finished = read_finished(choose_standard(Path(asked.folder)))
    entry = robustbench_entry(
        finished,
        paper=asked.paper,
        authors=asked.authors,
        link=asked.link,
        venue=asked.venue,
        architecture=asked.architecture,
        additional_data=asked.additional_data == "true",
        reported=asked.reported,
        footnote=asked.footnote,
    )
    norm = finished.protocol["threat"]
    where = place(entry, norm)
    belongs = f"its place in RobustBench is {where}" if where else f"RobustBench has no {entry['dataset']} {norm} board"
    if asked.out is None:
        print_json(entry)
        to_stderr(belongs)
    else:
        write_json(Path(asked.out), entry, sealed=False)
        print(f"written to {asked.out}; {belongs}")
    return 0
