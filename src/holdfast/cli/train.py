"""`holdfast train`."""

from __future__ import annotations

import os
import shlex
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.cli.arguments import MAX_DATA_HELP, Parser, positive, print_json
from holdfast.cli.table import RECIPES
from holdfast.data.limits import at_most
from holdfast.errors import HoldfastError
from holdfast.streams import tell as to_stderr

_EXAMPLES = """examples:
  holdfast train piat_nmse --data digits
  holdfast train pgd_at_wa --data path/to/fashion-mnist --epochs 10
  holdfast train pgd_at --data path/to/images --model resnet18 --threat.epsilon 4/255 --image-size 64
  holdfast train --config runs/one/config.yaml --seed 1        the same run with another seed
  holdfast train --resume --out runs/one                       go on where it stopped

--augmentation idbh and --mixing mixup or cutmix add these to any recipe, or none takes them away.
Any other --section.key value changes a setting: --attack.steps 20, --objective.strength 3, --optimizer.learning_rate
0.05, --averages.ema.decay 0.999, --training.compile true. `holdfast train RECIPE --help` lists them all."""


def parser() -> Parser:
    """The plain options of `holdfast train`."""
    known = Parser(prog="holdfast train", description="Train a classifier that holds under attack.", epilog=_EXAMPLES)
    known.add_argument("recipe", nargs="?", metavar="RECIPE", help=f"one of {', '.join(RECIPES)}")
    known.add_argument("--data", metavar="SOURCE", help="digits, or the path of your images (`holdfast list data`)")
    known.add_argument(
        "--model", metavar="NAME", help="a name of `holdfast list models`, or file.py:function (small_cnn)"
    )
    known.add_argument("--threat.epsilon", dest="epsilon", metavar="E", help="radius in pixel scale, for example 8/255")
    known.add_argument("--threat.norm", dest="norm", metavar="NORM", help="Linf, L2 or L1 (Linf)")
    known.add_argument("--epochs", type=positive, metavar="N", help="length of the run; schedules stretch with it")
    known.add_argument("--batch-size", type=positive, metavar="N", help="images a step, over all processes")
    known.add_argument("--seed", type=int, metavar="N", help="of weights, order, augmentation and attacks (0)")
    known.add_argument("--precision", metavar="P", help="auto, bf16, fp32 or fp64 (auto)")
    known.add_argument("--image-size", type=positive, metavar="N", help="resize images of a folder or Parquet to NxN")
    known.add_argument("--max-data-gib", type=float, metavar="N", help=MAX_DATA_HELP)
    known.add_argument("--validate-every", type=positive, metavar="N", help="epochs between validations (1)")
    known.add_argument("--warmup", type=float, metavar="SHARE", help="share of the run on clean images first")
    known.add_argument("--label-smoothing", type=float, metavar="S", help="share of the label given to other classes")
    known.add_argument("--train-ball", metavar="E", help="radius of training examples: 16/255, or unbounded")
    known.add_argument("--extra-share", type=float, metavar="SHARE", help="share of a batch from --training.extra_data")
    known.add_argument("--gradient-clip", type=float, metavar="NORM", help="largest norm of the gradient")
    known.add_argument("--paper-settings", action="store_true", help="everything as in the method's paper or code")
    known.add_argument(
        "--init", metavar="RUN_OR_FILE", help="start from the weights of a run or a file (.safetensors, .pt)"
    )
    known.add_argument("--out", metavar="DIR", help="the run folder (runs/<time>-<recipe>-<data>)")
    known.add_argument("--resume", action="store_true", help="go on with the run in --out")
    known.add_argument("--config", metavar="FILE", help="repeat the run of a config.yaml; other options change it")
    known.add_trust()
    known.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    known.add_argument("--quiet", action="store_true", help=SUPPRESS)
    return known


def run(argv: Sequence[str]) -> int:
    """Train, and print what came out."""
    options = parser()
    if any(word in ("-h", "--help") for word in argv):
        return explain(options, argv)
    asked, rest = options.read_known(argv)
    with at_most(asked.max_data_gib):
        return _train(asked, rest)


def _train(asked: Namespace, rest: Sequence[str]) -> int:
    """Train as asked."""
    if asked.epsilon is not None:
        from holdfast.threat import parse_epsilon

        parse_epsilon(asked.epsilon)  # refused before anything is loaded
    folder = Path(asked.out) if asked.out else None
    if asked.resume and folder is None:
        raise HoldfastError("--resume needs the run folder: add --out DIR")
    if folder is not None and int(os.environ.get("WORLD_SIZE", "1")) < 2:  # several processes refuse together, in `fit`
        from holdfast.runs.lock import refuse_if_held

        refuse_if_held(folder)  # before data is read; `fit` takes the lock
    config, data, code = configure(asked, rest, folder)

    from dataclasses import fields

    from holdfast.configuration import build_recipe
    from holdfast.errors import unknown_name
    from holdfast.progress_display import Display, LiveDisplay
    from holdfast.runs.memory import keep_freed_memory
    from holdfast.runs.own_code import named_code
    from holdfast.setup import Settings
    from holdfast.train import fit

    for name in config["training"]:
        if name not in (known := [field.name for field in fields(Settings)]):
            raise unknown_name("setting of training", name, known)

    keep_freed_memory()
    model = dict(config["model"])
    if model.get("name") is None:
        raise HoldfastError("this run's model was given from Python: repeat it from Python, with fit()")
    finished = fit(
        build_recipe(config, known_code=[part for part, _, _ in named_code(config)]),  # `configure` has read it
        data if data is not None else config["data"],
        model.pop("name"),
        out=asked.out,
        seed=config["seed"],
        settings=Settings(**config["training"]),
        resume=asked.resume,
        init=config["init"],
        model_options=model,
        display=Display() if asked.quiet else LiveDisplay(),
        code=code,
        trust_code=asked.trust_code,
    )
    if int(os.environ.get("RANK", "0")) == 0:  # under torchrun one process speaks
        report(finished, as_json=asked.json)
    return 0


def report(finished: Any, *, as_json: bool) -> None:
    """The outcome on standard output."""
    summary = finished.summary
    if as_json:
        print_json({**summary, "out": str(finished.path)})
        return
    from holdfast.evaluation.accuracy import in_words

    print(f"best (epoch {summary['best']['epoch']}): {in_words(summary['best'])}")
    if summary["last"]["epoch"] != summary["best"]["epoch"]:
        print(f"last (epoch {summary['last']['epoch']}): {in_words(summary['last'])}")
    print(f"everything lies in {finished.path}; next: holdfast evaluate {shlex.quote(str(finished.path))}")


def configure(asked: Namespace, rest: Sequence[str], folder: Path | None) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Return the resolved configuration that was asked for, the data where it had to be loaded, and configured code.

    The data is None where it is still to be loaded. The code is that which only a configuration names, by part.
    """
    from holdfast.runs.folder import read_config, run_config
    from holdfast.runs.own_code import configured_code

    begun = run_config(folder) if asked.resume and folder is not None else None
    resuming = begun is not None
    if asked.paper_settings and (resuming or asked.config):
        raise HoldfastError("--paper-settings chooses a recipe's settings, and these are already chosen: leave it out")
    if begun is not None:
        config = begun
        if asked.recipe and asked.recipe.lower().replace("-", "_") != config.get("recipe"):
            raise HoldfastError(
                f"{folder} holds a run of {config.get('recipe')}, not {asked.recipe}: leave the recipe out"
            )
        data, place = None, folder
    elif asked.config:
        config, data, place = read_config(Path(asked.config)), None, Path(asked.config).parent
        if asked.recipe:
            raise HoldfastError("--config already names the recipe: give one or the other")
    else:
        (config, data), place = from_recipe(asked), None
    config = apply(config, asked, rest)
    code = {} if place is None else configured_code(config, place, named=named_parts(asked, rest))
    return config, data, code


def named_parts(asked: Namespace, rest: Sequence[str]) -> set[str]:
    """Return the parts of a configuration whose code the command line itself names."""
    options = [word.partition("=")[0] for word in rest]
    parts = {"model"} if asked.model or "--model.name" in options else set()
    for option, word in zip(options, rest, strict=True):
        if option.startswith("--networks.") and (option.endswith(".model") or "model" in word.partition("=")[2]):
            parts.add("networks/" + option.removeprefix("--networks.").partition(".")[0])
    return parts


def from_recipe(asked: Namespace) -> tuple[dict[str, Any], Any]:
    """The configuration of a recipe with its own settings, and the loaded data."""
    if not asked.recipe:
        missing = "nothing to resume there, and no RECIPE was given" if asked.resume else "RECIPE is missing"
        raise HoldfastError(f"{missing}: name one of {', '.join(RECIPES)}")
    from dataclasses import asdict

    from holdfast.configuration import recipe_config
    from holdfast.data.sources import load
    from holdfast.recipes import recipe_by_name
    from holdfast.setup import Settings
    from holdfast.threat import build_threat, readable

    recipe = recipe_by_name(asked.recipe)
    if not asked.data:
        raise HoldfastError("--data is missing: give digits, or the path of your images (`holdfast list data`)")
    data = load(asked.data, image_size=asked.image_size)
    epsilon: Any = asked.epsilon
    norm = build_threat(asked.norm or "Linf", 0.0).norm
    if epsilon is None:
        if data.suggested_epsilon is None or norm != "Linf":
            raise HoldfastError(
                f"no epsilon is customary for {data.name} under {norm}: give one, --threat.epsilon 8/255"
            )
        epsilon = data.suggested_epsilon
        to_stderr(f"epsilon {readable(epsilon)}, as is customary for {data.name} (--threat.epsilon changes it)")
    model = asked.model or "small_cnn"
    built = recipe(epsilon=build_threat(norm, epsilon), model=model, paper_settings=asked.paper_settings)
    settings = Settings(image_size=asked.image_size)
    config = {
        **recipe_config(built),
        "data": asked.data,
        "model": {"name": model},
        "seed": 0,
        "init": None,
        "training": asdict(settings),
    }
    return config, data


def apply(config: dict[str, Any], asked: Namespace, rest: Sequence[str]) -> dict[str, Any]:
    """The configuration with the plain options and the --section.key ones."""
    from holdfast.cli.overrides import override
    from holdfast.configuration import check_keys
    from holdfast.threat import build_threat, parse_epsilon

    check_keys(config)
    config = {key: value for key, value in config.items() if key != "resolved"}
    if asked.model and asked.model != config["model"].get("name"):
        moved = same_code(asked.model, config["model"].get("name"))
        config["model"] = {**(config["model"] if moved else {}), "name": asked.model}
    numbers = ("epochs", "batch_size", "warmup", "label_smoothing", "extra_share", "gradient_clip")
    for name in ("data", "seed", "init", *numbers):
        if getattr(asked, name) is not None:
            config[name] = getattr(asked, name)
    if asked.epsilon is not None and (asked.config or asked.resume):
        scale_with_epsilon(config, asked.epsilon)
    if asked.train_ball is not None:
        word = asked.train_ball
        config["train_ball"] = word if word == "unbounded" else parse_epsilon(word)
    norm = None if asked.norm is None else build_threat(asked.norm, 0.0).norm  # upper and lower case are one
    for name, value in (("epsilon", asked.epsilon), ("norm", norm)):
        if value is not None:
            config["threat"] = {**config["threat"], name: value}
    for name in ("precision", "image_size", "validate_every"):
        if getattr(asked, name) is not None:
            config["training"] = {**config["training"], name: getattr(asked, name)}
    return override(config, rest, list(parser()._option_string_actions))


def same_code(one: str, other: Any) -> bool:
    """Whether two names mean the same function of files that are called alike: an own file, and its copy in a run.

    Example:
        >>> same_code("path/to/net.py:make", "code/model/net.py:make")
        True
    """
    from holdfast.models.own_file import names_code

    return names_code(one) and names_code(other) and Path(one).name == Path(other).name


def scale_with_epsilon(config: dict[str, Any], epsilon: str) -> None:
    """Let what the recipe made of the old epsilon follow the new one: the attack's step, training ball and noise."""
    from holdfast.threat import parse_epsilon

    factor = parse_epsilon(epsilon) / max(parse_epsilon(config["threat"]["epsilon"]), 1e-12)
    if factor == 1:
        return

    def scaled(value: Any) -> Any:
        if isinstance(value, dict):
            return {**value, "knots": [[position, factor * height] for position, height in value["knots"]]}
        return factor * value if isinstance(value, int | float) else value

    followed = []
    for part, key in ((config.get("attack"), "step_size"), (config, "train_ball"), (config, "input_noise")):
        if part and part.get(key):
            part[key] = scaled(part[key])
            followed.append(key)
    if followed:
        to_stderr(f"with epsilon, {', '.join(followed)} changed in proportion")


def explain(options: Parser, argv: Sequence[str]) -> int:
    """`--help`: the plain options; with a recipe, all its settings too."""
    print(options.format_help())
    asked, _ = options.read_known([word for word in argv if word not in ("-h", "--help")])
    if not asked.recipe:
        return 0
    from dataclasses import asdict

    from holdfast.cli.overrides import explained
    from holdfast.configuration import recipe_config
    from holdfast.recipes import recipe_by_name
    from holdfast.setup import Settings

    recipe = recipe_by_name(asked.recipe)
    built = recipe(epsilon="8/255")
    print((recipe.__doc__ or "").strip(), "\n\nits settings, for epsilon 8/255:\n")
    config = {**recipe_config(built), "training": asdict(Settings())}
    print(explained(config, f"holdfast train {built.name}").partition("\n\n")[2])
    return 0
