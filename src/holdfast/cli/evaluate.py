"""`holdfast evaluate`."""

from __future__ import annotations

import re
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.cli.arguments import MAX_DATA_HELP, Parser, positive, print_json
from holdfast.data.limits import at_most
from holdfast.errors import HoldfastError
from holdfast.interruption import Stopped
from holdfast.streams import tell as to_stderr

if TYPE_CHECKING:
    from holdfast.cli.subject import Subject
    from holdfast.evaluation.protocols import Protocol
    from holdfast.evaluation.robustness import Result
    from holdfast.threat import ThreatModel


def parser() -> Parser:
    """The options of `holdfast evaluate`."""
    known = Parser(
        prog="holdfast evaluate",
        description="Attack a trained model and say how well it holds, with a ledger that a reviewer can recount.\n"
        "A success counts only where the float32 model misclassifies the very image, inside the ball.\n"
        "Stopped or killed, the same command goes on where it was.",
    )
    known.add_argument("run", metavar="RUN_OR_MODEL", help="a run folder, a model folder, or file.py:function")
    known.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which weights of a run (best)")
    known.add_argument(
        "--weights", metavar="FILE", help="weights for file.py:function (.safetensors, .pt, .pth; FILE:KEY in it)"
    )
    known.add_argument("--data", metavar="SOURCE", help="other images than the run's test set")
    known.add_argument("--image-size", type=positive, metavar="N", help="resize images of a folder or Parquet to NxN")
    known.add_argument("--max-data-gib", type=float, metavar="N", help=MAX_DATA_HELP)
    known.add_argument(
        "--n",
        "--images",
        dest="n",
        type=positive,
        metavar="N",
        help="only so many images, by a fixed draw (all); torchrun takes --n for its own, so there write --images",
    )
    known.add_argument(
        "--attack",
        metavar="NAME",
        help="autoattack, autoattack-plus, autoattack-rand, quick, or single attacks with commas:"
        " `holdfast list attacks` (autoattack; pgd where --steps, --restarts or --step-size is given)",
    )
    known.add_argument("--epsilon", metavar="E", help="radius, or several with commas for a curve (as it was trained)")
    known.add_argument("--norm", metavar="NORM", help="Linf, L2 or L1 (the one it was trained for)")
    known.add_argument("--steps", type=positive, metavar="N", help="steps of single attacks (50 for pgd)")
    known.add_argument("--restarts", type=positive, metavar="N", help="restarts of single attacks (1)")
    known.add_argument("--step-size", metavar="A", help="step of pgd, mim, cw in pixel scale (a quarter of epsilon)")
    known.add_argument("--source", metavar="RUN", help="the other run, for --attack transfer")
    known.add_argument("--distances", action="store_true", help="distances to the nearest example (fab, fab-t, cw)")
    known.add_argument("--seed", type=int, default=0, metavar="N", help="of all random draws (0)")
    known.add_argument("--save-examples", action="store_true", help="keep the images for `holdfast verify`")
    known.add_argument("--strict", action="store_true", help="exit with 1 if any flag is raised")
    known.add_argument("--batch-size", type=positive, default=250, metavar="N", help="rows run together (250)")
    known.add_argument("--unit", type=positive, default=250, metavar="N", help="images that a kill can cost (250)")
    known.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the search; verdicts are in float32"
    )
    known.add_argument("--compile", action="store_true", help="compile the searching network")
    known.add_argument("--device", default="auto", metavar="D", help="auto, cpu or cuda (auto)")
    known.add_argument("--out", metavar="DIR", help="the evaluation's folder (RUN/evaluations/NAME)")
    known.add_trust()
    known.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    return known


def run(argv: Sequence[str]) -> int:
    """Evaluate, write the ledger and the summary, print it."""
    asked = parser().read(argv)
    with at_most(asked.max_data_gib):
        return _evaluate(asked)


def _evaluate(asked: Namespace) -> int:
    """Evaluate as asked."""
    from holdfast import distributed
    from holdfast.models.trust import trusting

    started = distributed.start_from_environment()
    first = distributed.rank() == 0
    try:
        with trusting(asked.trust_code):
            found = measure(asked)
    except KeyboardInterrupt as stopped:
        number = getattr(stopped, "number", signal.SIGINT)
        raise Stopped("stopped; finished units are kept: give the same command again to go on", number) from None
    finally:
        if started:
            distributed.stop(after_error=sys.exc_info()[0] is not None)
    if first:
        tell(asked, found)
    flagged = [flag.name for result in found for flag in result.flags]
    if asked.strict and flagged:
        to_stderr(f"holdfast: --strict, and flags were raised: {', '.join(sorted(set(flagged)))}")
        return 1
    return 0


def tell(asked: Namespace, found: Sequence[Result]) -> None:
    """Print the summary, or the curve."""
    from holdfast.evaluation import results

    if len(found) > 1:
        curve = results.curve([result.summary for result in found])
        if asked.json:
            print_json({**curve, "evaluations": [dict(result.summary) for result in found]})
            return
        for result in found:
            print(results.in_words(result.summary))
        print(f"written to {found[0].path.parent if found[0].path else 'memory'}")
        return
    result = found[0]
    if asked.json:
        extra = {"distances": results.distances(result.rows)} if asked.distances else {}
        print_json({**result.summary, **extra, "folder": str(result.path)})
        return
    print(result.log)
    if asked.distances:
        spread = results.distances(result.rows)
        print(", ".join(f"{name} {value:.4g}" for name, value in spread.items() if isinstance(value, float)))
    print(f"written to {result.path}")


def measure(asked: Namespace) -> list[Result]:
    """The evaluations that the options ask for, one for each epsilon."""
    from holdfast import distributed
    from holdfast.cli.subject import load_subject
    from holdfast.evaluation.inputs import as_inputs, chosen
    from holdfast.evaluation.robustness import Plan
    from holdfast.progress_display import Display, LiveDisplay
    from holdfast.runs.memory import keep_freed_memory
    from holdfast.setup import choose_device

    radii = check_options(asked)
    keep_freed_memory()
    subject = load_subject(
        asked.run, checkpoint=asked.checkpoint, weights=asked.weights, data=asked.data, image_size=asked.image_size
    )
    for note in subject.notes if distributed.rank() == 0 else ():
        to_stderr(note)
    device = choose_device(asked.device)
    model = subject.model.to(device)
    inputs = chosen(as_inputs(model, subject.data.test), asked.n)
    inputs = inputs.called(subject.name, subject.data.name, subject.data.classes, subject.about)
    threats = sorted((subject.threat(asked.norm, radius) for radius in radii), key=lambda each: each.epsilon)
    found: list[Result] = []
    for threat in threats:
        found.append(
            Plan(
                model=model,
                inputs=inputs,
                threat=threat,
                protocol=wanted(asked, threat, device),
                seed=asked.seed,
                unit=asked.unit,
                speed=speed(asked, device),
                path=folder(asked, subject, threat, threats, len(inputs.y)),
                save_examples=asked.save_examples or len(radii) > 1,
                carried=found[-1] if found else None,
                display=LiveDisplay() if distributed.rank() == 0 else Display(),
            ).run()
        )
    return found


def check_options(asked: Namespace) -> list[str | None]:
    """Refuse at once what cannot be; returns the radii, None for the one that it was trained for."""
    from holdfast.threat import parse_epsilon

    if asked.attack is None:
        single = any(value is not None for value in (asked.steps, asked.restarts, asked.step_size))
        asked.attack = "fab-t" if asked.distances else ("pgd" if single else "autoattack")
    if asked.attack.lower() == "fgsm" and (asked.restarts or 1) > 1:
        raise HoldfastError("fgsm starts at the image and has no restarts: leave --restarts out, or use --attack pgd")
    if asked.step_size is not None and parse_epsilon(asked.step_size) == 0:
        raise HoldfastError("--step-size 0 attacks nothing: leave it out for a quarter of epsilon")
    from holdfast.evaluation.protocols import known_words

    known_words(asked.attack)
    if asked.epsilon is None:
        return [None]
    radii = [word.strip() for word in asked.epsilon.split(",") if word.strip()]
    values = [parse_epsilon(word) for word in radii]
    if not radii or len(set(values)) < len(values):
        raise HoldfastError(f"--epsilon {asked.epsilon!r} names a radius twice or none: write 2/255,4/255,8/255")
    if asked.distances and len(radii) > 1:
        raise HoldfastError("--distances gives the whole curve from one run: name one --epsilon")
    return list(radii)


def wanted(asked: Namespace, threat: ThreatModel, device: Any) -> Protocol:
    """The attacks."""
    from holdfast.evaluation.protocols import Options, named

    source = None
    if asked.source is not None:
        from holdfast.runs.export import load_model

        source = (load_model(asked.source).to(device), str(asked.source))
    options = Options(steps=asked.steps, restarts=asked.restarts, step_size=asked.step_size, source=source)
    return named(asked.attack, threat, options, distances=asked.distances)


def speed(asked: Namespace, device: Any) -> Any:
    """How the search may save time on this device."""
    from holdfast.evaluation.networks import Speed
    from holdfast.runs.environment import supports_bf16

    precision = asked.precision
    if precision == "auto":
        precision = "bf16" if supports_bf16(device) else "fp32"
    return Speed(precision=precision, compile=asked.compile, batch_size=asked.batch_size)


def folder(asked: Namespace, subject: Subject, threat: ThreatModel, threats: Sequence[ThreatModel], n: int) -> Path:
    """Where an evaluation lies; its name tells evaluations of one run apart, and those of a curve lie together."""
    from holdfast.threat import readable

    many = len(threats) > 1
    own = f"epsilon-{readable(threat.epsilon)}".replace("/", "_")
    if asked.out:
        return Path(asked.out) / own if many else Path(asked.out)
    radius = f"{threat.norm}-{'+'.join(readable(each.epsilon) for each in threats)}".lower()
    words = [asked.attack.replace(",", "+")]
    words += [f"{name}{value}" for name, value in (("", asked.steps), ("x", asked.restarts)) if value]
    words += [f"step{asked.step_size}"] if asked.step_size else []
    words += ["distances"] if asked.distances else []
    words += [radius, subject.data.name, f"n{n}", f"seed{asked.seed}"]
    words += [asked.checkpoint] if subject.description else []
    name = re.sub(r"[^\w.+-]", "_", "-".join(words).lower())
    if subject.description:
        whole = Path(asked.run) / "evaluations" / name
    else:
        file, _, function = asked.run.rpartition(":")
        from holdfast.runs.foreign_weights import file_and_key

        weights_file, key = file_and_key(asked.weights or "")
        weights = "".join(f"-{part}" for part in (weights_file.stem, key) if part)
        whole = Path("evaluations") / f"{Path(file).stem}-{function}{weights}-{name}"
    return whole / own if many else whole
