"""`holdfast verify`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from holdfast.cli.arguments import Parser, positive, print_json
from holdfast.errors import HoldfastError
from holdfast.streams import tell as to_stderr


def parser() -> Parser:
    """The options of `holdfast verify`."""
    known = Parser(
        prog="holdfast verify",
        description="Recount an evaluation's verdict from its saved images alone, in float32, uncompiled, in batches\n"
        "of several sizes. Needs an evaluation made with --save-examples. Exits with 1 if a verdict differs.",
    )
    known.add_argument("folder", metavar="DIR", help="the evaluation's folder")
    known.add_argument("--model", metavar="RUN_OR_MODEL", help="the network (the run that DIR lies in)")
    known.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which weights of a run (best)")
    known.add_argument("--weights", metavar="FILE", help="weights for file.py:function")
    known.add_argument("--data", metavar="SOURCE", help="only with file.py:function: data of the same shape")
    known.add_argument(
        "--batch-size", type=positive, action="append", metavar="N", help="repeat for several (1 17 250)"
    )
    known.add_argument("--device", default="cpu", metavar="D", help="auto, cpu or cuda (cpu)")
    known.add_trust()
    known.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return known


def run(argv: Sequence[str]) -> int:
    """Recount, print."""
    asked = parser().read(argv)
    from holdfast.models.trust import trusting

    with trusting(asked.trust_code):
        return recounted(asked)


def recounted(asked: Namespace) -> int:
    """Recount the evaluation that was asked for."""
    from holdfast.cli.subject import load_subject, names_a_file
    from holdfast.evaluation.ledger import PROTOCOL
    from holdfast.evaluation.verified import BATCH_SIZES, in_words, recount
    from holdfast.runs.export import DESCRIPTION, load_model
    from holdfast.setup import choose_device

    folder = Path(asked.folder)
    if not (folder / PROTOCOL).is_file():
        raise HoldfastError(f"{folder} holds no evaluation: give the folder that `holdfast evaluate` wrote")
    source = asked.model or str(folder.resolve().parent.parent)
    if asked.model and names_a_file(source):  # a folder that is called like a file and its function is only a folder
        subject = load_subject(source, weights=asked.weights, data=asked.data, image_size=None)
        model = subject.model
        for note in subject.notes:
            to_stderr(note)
    else:
        if asked.model is None and not any((Path(source) / sub / DESCRIPTION).is_file() for sub in ("", "model")):
            raise HoldfastError(f"{folder} does not lie in a run: name the network with --model")
        checkpoint = "last" if asked.model is None and folder.name.endswith("-last") else asked.checkpoint
        model = load_model(source, checkpoint=checkpoint)
    found = recount(folder, model.to(choose_device(asked.device)), batch_sizes=asked.batch_size or BATCH_SIZES)
    if asked.json:
        print_json(found)
    else:
        print(in_words(found))
    return 1 if found["differing"] else 0
