"""`holdfast evaluate`."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.cli.arguments import Parser, positive, print_json
from holdfast.errors import HoldfastError


def parser() -> Parser:
    """The options of `holdfast evaluate`."""
    known = Parser(
        prog="holdfast evaluate",
        description="Attack a trained model in float32 and say how well it holds.\n"
        "An image counts as broken as soon as any point the attack visits is misclassified.",
    )
    known.add_argument("run", metavar="RUN", help="a run folder or a model folder")
    known.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which weights (best)")
    known.add_argument("--attack", default="pgd", metavar="NAME", help="pgd or fgsm (pgd)")
    known.add_argument("--steps", type=positive, default=50, metavar="N", help="PGD steps (50)")
    known.add_argument("--restarts", type=positive, default=1, metavar="N", help="PGD restarts (1)")
    known.add_argument("--step-size", metavar="A", help="step in pixel scale (a quarter of epsilon)")
    known.add_argument("--epsilon", metavar="E", help="radius (the one it was trained for)")
    known.add_argument("--norm", metavar="NORM", help="Linf or L2 (the one it was trained for)")
    known.add_argument("--data", metavar="SOURCE", help="other images than the run's test set")
    known.add_argument("--image-size", type=positive, metavar="N", help="resize images of a folder or Parquet to NxN")
    known.add_argument("--n", type=positive, metavar="N", help="only so many images, by a fixed draw (all)")
    known.add_argument("--batch-size", type=positive, default=250, metavar="N", help="images at a time (250)")
    known.add_argument("--seed", type=int, default=0, metavar="N", help="of the random starts (0)")
    known.add_argument("--device", default="auto", metavar="D", help="auto, cpu or cuda (auto)")
    known.add_argument("--out", metavar="DIR", help="where the result is written (RUN/evaluations)")
    known.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return known


def run(argv: Sequence[str]) -> int:
    """Evaluate, write the result, print it."""
    asked = parser().read(argv)
    from holdfast.errors import unknown_name
    from holdfast.threat import parse_epsilon

    if asked.attack.lower() not in ("pgd", "fgsm"):
        raise unknown_name("attack", asked.attack, ("pgd", "fgsm"))
    if asked.attack.lower() == "fgsm" and asked.restarts > 1:
        raise HoldfastError("fgsm starts at the image and has no restarts: leave --restarts out, or use --attack pgd")
    if asked.step_size is not None and parse_epsilon(asked.step_size) == 0:
        raise HoldfastError("--step-size 0 attacks nothing: leave it out for a quarter of epsilon")
    if asked.epsilon is not None:
        parse_epsilon(asked.epsilon)
    found = measure(asked)
    folder = Path(asked.out) if asked.out else Path(asked.run) / "evaluations"
    from holdfast.runs.files import write_json

    path = folder / f"{file_name(found)}.json"
    write_json(path, found)
    if asked.json:
        print_json(found)
    else:
        from holdfast.evaluation.accuracy import in_words

        print(f"{asked.checkpoint} weights of {asked.run} on {found['data']}: {in_words(found)}")
        print(f"written to {path}")
    return 0


def measure(asked: Namespace) -> dict[str, Any]:
    """The evaluation that the options ask for."""
    from holdfast import __version__
    from holdfast.attacks.fgsm import FGSM
    from holdfast.attacks.pgd import PGD
    from holdfast.evaluation.accuracy import evaluate
    from holdfast.progress_display import LiveDisplay
    from holdfast.runs.export import load_model, model_folder, read_description
    from holdfast.runs.memory import keep_freed_memory
    from holdfast.setup import choose_device
    from holdfast.threat import build_threat

    keep_freed_memory()
    description = read_description(model_folder(Path(asked.run), asked.checkpoint))
    network = load_model(asked.run, checkpoint=asked.checkpoint)
    data = load_test_data(asked, description)
    trained = description["threat"]
    epsilon = asked.epsilon
    if epsilon is None:
        if asked.norm and asked.norm.lower() != trained["norm"].lower():
            raise HoldfastError(f"--norm {asked.norm} is not the norm it was trained for: give its --epsilon too")
        epsilon = f"{trained['epsilon']:.17f}/1"
    threat = build_threat(asked.norm or trained["norm"], epsilon)
    attack: PGD | FGSM = FGSM(step_size=asked.step_size)
    if asked.attack.lower() == "pgd":
        attack = PGD(steps=asked.steps, restarts=asked.restarts, step_size=asked.step_size, early_stop=0)
    device = choose_device(asked.device)
    display = LiveDisplay()
    display.work(f"evaluating {asked.checkpoint}", min(asked.n or len(data.test), len(data.test)))
    try:
        found = evaluate(
            network.to(device),
            data.test.to(device),
            threat=threat,
            attack=attack,
            n=asked.n,
            batch_size=asked.batch_size,
            seed=asked.seed,
            tick=display.advance,
        )
    finally:
        display.stop()
    return {
        **found.as_dict(),
        "data": data.name,
        "threat": threat.norm,
        "epsilon": threat.epsilon,
        "steps": 1 if asked.attack.lower() == "fgsm" else asked.steps,
        "restarts": asked.restarts,
        "step_size": attack.step_size
        if attack.step_size is not None
        else threat.epsilon / (4 if isinstance(attack, PGD) else 1),
        "seed": asked.seed,
        "recipe": description["recipe"],
        "checkpoint": asked.checkpoint,
        "epoch": description.get("epoch"),
        "version": __version__,
    }


def load_test_data(asked: Namespace, description: dict[str, Any]) -> Any:
    """The images to evaluate on, refused where the model was made for others."""
    from holdfast.data.sources import load
    from holdfast.runs.folder import CONFIG, read_config

    source, image_size = asked.data, asked.image_size
    if source is None:
        if not (Path(asked.run) / CONFIG).is_file():
            raise HoldfastError(f"{asked.run} names no data: give --data SOURCE")
        config = read_config(Path(asked.run) / CONFIG)
        source, image_size = config["data"], image_size or config["training"].get("image_size")
    data = load(source, image_size=image_size)
    wanted, classes = description["input"], description["classes"]
    shape = [wanted["channels"], wanted["height"], wanted["width"]]
    if [data.channels, *data.image_size] != shape or data.num_classes != len(classes):
        raise HoldfastError(
            f"{data.name} holds {data.num_classes} classes of shape {[data.channels, *data.image_size]}, the model was"
            f" trained on {len(classes)} of {shape}: give the --data it was made for, or --image-size"
        )
    if list(data.classes) != list(classes):
        raise HoldfastError(
            f"{data.name} has the classes {', '.join(data.classes)}, the model was trained on {', '.join(classes)}:"
            " give data with the same classes in the same order"
        )
    return data


def file_name(found: dict[str, Any]) -> str:
    """A name that tells evaluations of one run apart."""
    scaled = found["epsilon"] * 255
    epsilon = f"{round(scaled)}_255" if math.isclose(scaled, round(scaled), abs_tol=1e-9) else f"{found['epsilon']:g}"
    words = [found["attack"].partition(",")[0].lower(), f"x{found['restarts']}", found["threat"].lower(), epsilon]
    words += [f"step{found['step_size']:.4g}", f"seed{found['seed']}"]
    return "-".join([*words, found["data"], found["checkpoint"], f"n{found['n']}"]).replace("/", "_")
