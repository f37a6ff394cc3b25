"""The command: every verb, every option, what it prints and what it leaves."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from holdfast import PGD, HoldfastError, load_model
from holdfast.cli import demo, evaluate, table
from holdfast.cli import train as train_verb
from holdfast.cli.listing import TABLES
from holdfast.cli.main import _MODULES
from holdfast.cli.overrides import OPTIONAL, override, section_options
from holdfast.components import ATTACKS
from holdfast.configuration import build_recipe, recipe_config
from holdfast.data.sources import load
from holdfast.evaluation.protocols import _MAKE
from holdfast.evaluation.table import PROTOCOLS, SINGLE
from holdfast.models.factory import _BUILDERS
from holdfast.models.table import MODELS
from holdfast.recipes import RECIPES, pgd_at
from holdfast.runs.digests import beside
from holdfast.runs.files import read_json
from holdfast.schedule import Progress, value_at
from holdfast.setup import Settings
from tiny_runs import NET, assert_same, command, metrics, refused, summary, train, weights, write_toy

SUMMARY = [
    "recipe",
    "data",
    "model",
    "threat",
    "epsilon",
    "seed",
    "clean_accuracy",
    "robust_accuracy",
    "interval",
    "attack",
    "n",
    "seconds",
    "best",
    "last",
    "version",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("data") / "toy.npz")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the command, whose best and last weights differ."""
    out = tmp_path_factory.mktemp("runs") / "one"
    assert train(data, out, "--averages.ema.decay", 0.8, "--optimizer.learning_rate", 0.05, "--seed", 1, epochs=4) == 0
    told = json.loads((out / "summary.json").read_text())
    assert told["best"]["epoch"] < told["last"]["epoch"]
    return out


def configured(out: Path) -> dict[str, Any]:
    return yaml.safe_load((out / "config.yaml").read_text())


# ------------------------------------------------------------------------------------------------ help and tables


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_overview(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It names every verb."""
    assert command(*words) == 0
    told = capsys.readouterr().out
    assert all(f"holdfast {verb}" in told for verb in table.COMMANDS)


@pytest.mark.parametrize("verb", table.COMMANDS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--help goes to standard output and succeeds."""
    assert command(verb, "--help") == 0
    told = capsys.readouterr()
    assert f"usage: holdfast {verb}" in told.out
    assert told.err == ""


def test_help_of_a_recipe_lists_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever --help stands, and whatever else was already typed."""
    for words in (["piat-nmse", "--help"], ["--data", "digits", "--help", "piat_nmse", "--epochs", "3"]):
        assert command("train", *words) == 0
        told = capsys.readouterr().out
        for option in ("--attack.steps", "--objective.strength", "--averages.ema.decay", "--training.compile"):
            assert option in told
        assert "PIAT + NMSE: the paper's full method" in told
    assert command("train", "--data", "digits", "--help") == 0
    assert "--attack.steps N" not in capsys.readouterr().out


def test_help_and_lists_do_not_import_torch() -> None:
    """Else they could not answer in half a second."""
    code = (
        "import sys; from holdfast.cli.main import main; main(['--help']); main(['--version']);"
        "[main(['list', what]) for what in ('recipes', 'models', 'attacks', 'data')];"
        "heavy = {'torch', 'numpy', 'rich', 'jsonargparse', 'yaml', 'PIL'} & set(sys.modules);"
        "print(heavy or 'light', file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr.strip() == "light"
    assert "holdfast 0.1.0" in ended.stdout


def test_the_static_tables_name_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Recipes, attacks, models, lists and verbs, in the table and in the code."""
    assert list(table.RECIPES) == list(RECIPES)
    assert sorted(table.ATTACKS) == sorted(ATTACKS)
    assert sorted(MODELS) == sorted(_BUILDERS)
    assert set(table.LISTS) == {"recipes", "attacks", *TABLES}
    for verb in table.COMMANDS:
        module = __import__(f"holdfast.cli.{_MODULES.get(verb, verb)}", fromlist=["run"])
        assert callable(module.run)
    for what in TABLES:
        assert command("list", what) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == list(TABLES[what])
        assert command("list", what, "--json") == 0
        assert json.loads(capsys.readouterr().out) == TABLES[what]
    assert command("list", "attacks", "--json") == 0
    groups = json.loads(capsys.readouterr().out)
    assert groups == {"evaluation": {**PROTOCOLS, **SINGLE}, "training": table.ATTACKS}
    assert sorted(SINGLE) == sorted(_MAKE)
    assert command("list", "attacks") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [*PROTOCOLS, *SINGLE, *table.ATTACKS]
    assert f"one of {', '.join(RECIPES)}" in " ".join(train_verb.parser().format_help().split())


def test_list_recipes_prints_paper_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """Every method with its paper, its cost over PGD-AT's, and a line of what it does; the cost is the recipe's own."""
    assert command("list", "recipes") == 0
    _, *lines, legend = capsys.readouterr().out.splitlines()
    assert "PGD-AT" in legend
    baseline = pgd_at(epsilon=0.1).passes()
    for line, (name, make) in zip(lines, RECIPES.items(), strict=True):
        cost = make(epsilon=0.1).passes() / baseline
        assert line.split()[:2] == [name, f"{cost:.2f}x"]
        assert table.RECIPES[name].paper in line
        assert line.endswith(table.RECIPES[name].what)
        assert len(line) <= 150
    assert command("list", "recipes", "--json") == 0
    assert json.loads(capsys.readouterr().out)["iseat"]["cost"] == 1.26


def test_the_issues_options_exist() -> None:
    """Every option that the issue writes down."""
    options = train_verb.parser()._option_string_actions
    for option in [
        "--data",
        "--model",
        "--epochs",
        "--seed",
        "--threat.epsilon",
        "--out",
        "--resume",
        "--config",
        "--json",
        "--init",
        "--validate-every",
    ]:
        assert option in options
    assert "--paper-settings" in options
    options = evaluate.parser()._option_string_actions
    for option in [
        "--checkpoint",
        "--attack",
        "--steps",
        "--restarts",
        "--epsilon",
        "--data",
        "--n",
        "--out",
        "--json",
        "--save-examples",
        "--strict",
    ]:
        assert option in options
    assert {name: options[name].default for name in ("--checkpoint", "--attack", "--steps", "--restarts")} == {
        "--checkpoint": "best",
        "--attack": None,  # autoattack, or pgd where one of its settings is given
        "--steps": None,
        "--restarts": None,
    }


# ------------------------------------------------------------------------------------------------ typos and values


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["trian"], "verb 'trian' is unknown: did you mean train?"),
        (["train", "piat_nsme", "--data", "digits"], "did you mean piat_nmse"),
        (["train", "pgd_at", "--data", "digit"], "did you mean digits"),
        (["train", "pgd_at", "--data", "digits", "--epoch", "3"], "did you mean --epochs"),
        (["train", "pgd_at", "--data", "digits", "--attack.stps", "3"], "did you mean --attack.steps"),
        (["train", "pgd_at", "--data", "digits", "--atack.steps", "3"], "did you mean --attack.steps"),
        (["train", "pgd_at", "--data", "digits", "--training.precison", "fp32"], "did you mean --training.precision"),
        (["train", "pgd_at", "--data", "digits", "--averages.emma.decay", "0.3"], "did you mean --averages.ema.decay"),
        (["train", "pgd_at", "--data", "digits", "--attack.name", "pdg"], "did you mean pgd"),
        (["train", "pgd_at", "--data", "digits", "--objective.name", "normalised_mse"], "did you mean normalized_mse"),
        (["train", "pgd_at", "--data", "digits", "--model", "smal_cnn"], "use small_cnn"),
        (["train", "pgd_at", "--data", "digits", "--model.widht", "3"], "its options are width"),
        (["train", "pgd_at", "--data", "digits", "stray"], "'stray' is one word too many"),
        (["evaluate", "x", "--restart", "3"], "did you mean --restarts"),
        (["evaluate", "x", "--attack", "pgdd"], "did you mean pgd"),
        (["list", "recipe"], "recipes"),
        (["list"], "recipes|models|attacks|data"),
        (["doctor", "--jsn"], "did you mean --json"),
        (["demo", "--ou", "x"], "did you mean --out"),
        # values
        (["train", "pgd_at", "--data", "digits", "--threat.epsilon", "8"], "write 8/255 if that was meant"),
        (["train", "pgd_at", "--data", "digits", "--threat.epsilon", "8/0"], "divides by zero"),
        (["train", "pgd_at", "--data", "digits", "--threat.epsilon", "big"], "'big' is not a number"),
        (["train", "pgd_at", "--data", "digits", "--threat.norm", "Lp"], "use one of Linf, L2, L1"),
        (["train", "pgd_at", "--data", "digits", "--threat.norm", "L1", "--threat.epsilon", "1"], "no step for L1"),
        (["train", "pgd_at", "--data", "digits", "--epochs", "0"], "'0' is no whole number of at least 1"),
        (["train", "pgd_at", "--data", "digits", "--epochs", "ten"], "'ten' is no whole number of at least 1"),
        (["train", "pgd_at", "--data", "digits", "--warmup", "2"], "warmup is 2.0: it is a share"),
        (["train", "pgd_at", "--data", "digits", "--gradient-clip", "0"], "give a positive norm"),
        (["train", "pgd_at", "--data", "digits", "--seed", "-1"], "seed is -1"),
        (["train", "pgd_at", "--data", "digits", "--precision", "fp8"], "'fp8' is unknown"),
        (["train", "pgd_at", "--data", "digits", "--attack.steps", "abc"], "steps is 'abc': give a whole number"),
        (["train", "pgd_at", "--data", "digits", "--attack.steps", "-1"], "steps is -1"),
        (["train", "pgd_at", "--data", "digits", "--attack.step_size", "2"], "write 2/255 if that was meant"),
        (["train", "pgd_at", "--data", "digits", "--averages.ema.decay", "1.5"], "EMA decay is 1.5"),
        (["train", "pgd_at", "--data", "digits", "--averages.ema.buffers", "x"], "'x' is unknown: use average or keep"),
        (["train", "pgd_at", "--data", "digits", "--schedule.knots", "5"], "knots is '5': give a list of lists"),
        (["train", "pgd_at", "--data", "digits", "--schedule.knots", "[[1, 0], [0, 1]]"], "rising positions"),
        (["train", "pgd_at", "--data", "digits", "--optimizer.momentum", "fast"], "is 'fast': give a number or a"),
        (["train", "pgd_at", "--data", "digits", "--model.width", "[1"], "--model.width '[1' is no YAML"),
        (["train", "pgd_at", "--data", "digits", "--model.width", "wide"], "width is 'wide': give a whole number"),
        (["train", "pgd_at", "--data", "digits", "--training.device", "tpu9"], "use auto, cpu or cuda"),
        (["train", "pgd_at", "--data", "digits", "--training.device", "meta"], "use auto, cpu or cuda"),
        (["train", "pgd_at", "--data", "digits", "--training.compile", "nosuch"], "compiler backend 'nosuch' is"),
        (["train", "pgd_at", "--data", "digits", "--training.keep_checkpoints", "0"], "keep_checkpoints is 0"),
        (["train"], "RECIPE is missing"),
        (["train", "pgd_at"], "--data is missing"),
        (["train", "pgd_at", "--config", "x"], "x is missing"),
        (["evaluate"], "RUN"),
        (["evaluate", "x", "--steps", "0"], "'0' is no whole number of at least 1"),
        (["evaluate", "x", "--epsilon", "8"], "write 8/255 if that was meant"),
        (["evaluate", "no/such/run"], "holds no trained model"),
        (["evaluate", "x", "--checkpoint", "first"], "best"),
    ],
)  # fmt: skip
def test_what_is_mistyped_gets_advice(
    words: list[str], advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the nearest, exit code 2, and no folder is left behind."""
    monkeypatch.chdir(tmp_path)
    assert advice in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_names_a_function_is_not_imported(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting is a number or a schedule; reading one runs nothing, on the command line and in a file."""
    (tmp_path / "mischief.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef one(progress): return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    base = ["train", "pgd_at", "--data", data, "--threat.epsilon", 0.1, "--out", tmp_path / "run"]
    for value in ("mischief.one", "{class_path: mischief.one}"):
        for key in ("optimizer.momentum", "attack.step_size"):
            refused(capsys, *base, f"--{key}", value)
    config = {
        **recipe_config(pgd_at(epsilon=0.1)),
        "data": str(data),
        "model": {"name": "small_cnn"},
        "seed": 0,
        "training": {"device": "cpu"},
    }
    config["optimizer"]["momentum"] = "mischief.one"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for more in ([], ["--attack.steps", 2]):
        assert "momentum" in refused(
            capsys, "train", "--config", tmp_path / "config.yaml", "--out", tmp_path / "r", *more
        )
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ train


def test_json_is_one_object_on_standard_output(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything else is on standard error; accuracies are fractions; the file says the same."""
    assert train(data, tmp_path / "run", "--json", recipe="PIAT-NMSE") == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found.pop("out") == str(tmp_path / "run")
    assert found == read_json(tmp_path / "run" / "summary.json")
    assert list(found) == SUMMARY
    assert found["recipe"] == "piat_nmse"
    assert (found["data"], found["model"], found["threat"], found["epsilon"]) == ("toy", "small_cnn", "Linf", 0.1)
    assert (found["seed"], found["n"], found["attack"], found["version"]) == (0, 24, "PGD-2, Linf(0.1)", "0.1.0")
    low, high = found["interval"]
    assert 0 <= low <= found["robust_accuracy"] <= high <= 1
    assert found["robust_accuracy"] <= found["clean_accuracy"] <= 1
    assert (found["clean_accuracy"] * 24) % 1 == pytest.approx(0, abs=1e-9)
    assert found["seconds"] > 0
    for name, epoch in (("best", found["best"]["epoch"]), ("last", 2)):
        assert found[name]["epoch"] == epoch
        assert {"clean_accuracy", "robust_accuracy", "interval", "attack", "n"} <= set(found[name])
    assert found["clean_accuracy"] == found["best"]["clean_accuracy"]
    for text in ("epoch 1/2", "validation clean", "images/s", "65 training, 7 validation, 24 test images"):
        assert text in told.err


def test_what_a_run_leaves(run: Path) -> None:
    """Exactly the files of the issue."""
    assert sorted(path.name for path in run.iterdir() if path.name != "evaluations") == [
        ".lock", "checkpoints", "config.yaml", "environment.json", "last", "metrics.jsonl", "model", "summary.json",
    ]  # fmt: skip
    for name in ("model", "last"):
        assert sorted(path.name for path in (run / name).iterdir()) == [
            "config.json", "model.safetensors", "model.safetensors.sha256",
        ]  # fmt: skip
    assert sorted(path.suffix for path in (run / "checkpoints").iterdir()) == [".pt", ".pt", ".sha256", ".sha256"]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["processes"] == 1
    assert not any(str(Path.home()) in (run / name).read_text() for name in ("environment.json", "summary.json"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    wanted = {"step", "learning_rate", "terms", "seconds", "images_per_second", "seconds_left", "validation"}
    assert all(wanted <= set(line) for line in lines)


def test_the_same_configuration_repeats_the_run(run: Path, data: Path, tmp_path: Path) -> None:
    """`--config` on config.yaml gives the same weights and configuration; another seed gives others."""
    assert command("train", "--config", run / "config.yaml", "--out", tmp_path / "again") == 0
    assert configured(tmp_path / "again") == configured(run)
    assert_same(weights(tmp_path / "again"), weights(run))
    assert_same(weights(tmp_path / "again", "last"), weights(run, "last"))
    assert_same(metrics(tmp_path / "again"), metrics(run))
    assert_same(summary(tmp_path / "again"), summary(run))
    assert command("train", "--config", run / "config.yaml", "--seed", 2, "--out", tmp_path / "other") == 0
    assert not torch.equal(weights(tmp_path / "other")["fc.weight"], weights(run)["fc.weight"])


def test_options_change_a_configuration_and_keep_the_rest(data: Path, tmp_path: Path) -> None:
    """What the file says stays, in every section, when the command line changes one setting."""
    first = tmp_path / "first"
    more = [
        "--threat.lower",
        -0.5,
        "--threat.upper",
        1.5,
        "--averages.interpolation.weight",
        0.3,
        "--optimizer.nesterov",
    ]
    assert train(data, first, *more, "true", "--training.validate_every", 2, "--objective.strength", 2,
                 recipe="pgd_at_nmse") == 0  # fmt: skip
    words = ["train", "--config", first / "config.yaml", "--out", tmp_path / "second", "--attack.restarts", 2]
    assert command(*words, "--epochs", 1) == 0
    before, after = configured(first), configured(tmp_path / "second")
    assert before["attack"].pop("restarts") == 1
    assert after["attack"].pop("restarts") == 2
    assert (before.pop("epochs"), after.pop("epochs")) == (2, 1)
    before.pop("resolved"), after.pop("resolved")
    assert after == before
    assert before["threat"] == {"norm": "Linf", "epsilon": 0.1, "lower": -0.5, "upper": 1.5}


def base(recipe: str = "pgd_at_nmse") -> dict[str, Any]:
    """A configuration as `holdfast train` makes it before the overrides."""
    built = RECIPES[recipe](epsilon="8/255")
    return {
        **recipe_config(built),
        "data": "digits",
        "model": {"name": "small_cnn"},
        "seed": 0,
        "training": vars(Settings()),
    }


def test_overrides_reach_the_objects() -> None:
    """Every section; YAML values, fractions, schedules, and an average that the recipe did not have."""
    words = [
        "--attack.steps=3",
        "--attack.step_size=2/255",
        "--attack.statistics=batch",
        "--objective.detach_weight=true",
        "--averages.ema.decay=0.9",
        "--averages.ema.warm_up=false",
        "--optimizer.learning_rate=0.3",
        "--optimizer.nesterov=true",
        "--schedule.interpolation=step",
        "--training.compile=true",
        "--training.flip=false",
        "--training.test_images=null",
        "--threat.lower=0.25",
        "--model.width=7",
    ]
    words += ["--objective.strength={knots: [[0, 0], [1, 4]]}", "--schedule.knots=[[0, 1], [0.5, 0.2]]"]
    words += ["--averages.interpolation.coefficients=[1, 1, 2, 20]"]
    words += ["--views.worst_weights.gamma=0.005", "--views.worst_weights.sides=[clean, adv]"]
    words += ["--views.worst_weights.below=1.7", "--views.split_batchnorm.sides=[clean]"]
    config = override(base(), words)
    recipe = build_recipe(config)
    assert (recipe.attack.steps, recipe.attack.step_size, recipe.attack.statistics) == (3, 2 / 255, "batch")
    assert recipe.objective.detach_weight is True
    assert value_at(recipe.objective.strength, Progress(step=1, epochs=4)) == 1.0
    assert [type(average).__name__ for average in recipe.averages] == ["Interpolation", "EMA"]
    parts = {type(average).__name__: average for average in recipe.averages}
    assert (parts["EMA"].decay, parts["EMA"].warm_up) == (0.9, False)
    assert parts["Interpolation"].coefficients == (1, 1, 2, 20)
    views = {type(view).__name__: view for view in recipe.views}
    assert (views["WorstWeights"].gamma, views["WorstWeights"].below) == (0.005, 1.7)
    assert (views["WorstWeights"].sides, views["SplitBatchNorm"].sides) == (("clean", "adv"), ("clean",))
    assert (recipe.optimizer.learning_rate, recipe.optimizer.nesterov, recipe.optimizer.momentum) == (0.3, True, 0.9)
    assert recipe.schedule.knots == ((0, 1), (0.5, 0.2))
    assert recipe.schedule.interpolation == "step"
    assert (recipe.threat.lower, recipe.threat.upper, recipe.threat.epsilon) == (0.25, 1.0, 8 / 255)
    settings = Settings(**config["training"])
    assert (settings.compile, settings.flip, settings.test_images) == (True, False, None)
    assert config["model"] == {"name": "small_cnn", "width": 7}


def test_a_part_is_added_by_its_whole_settings_and_taken_out_by_none() -> None:
    """Both forms of the same option, and its opposite."""
    for words in (["--views.worst_weights={gamma: 0.1}"], ["--views.worst_weights.gamma=0.1"]):
        (view,) = override(base("pgd_at"), words)["views"]
        assert (view["name"], view["gamma"]) == ("worst_weights", 0.1)
    config = override(base("piat"), ["--averages.interpolation=none", "--averages.ema={decay: 0.9}"])
    assert [average["name"] for average in config["averages"]] == ["ema"]
    assert override(base("ar_at"), ["--views.split_batchnorm=null"])["views"] == []
    with pytest.raises(HoldfastError, match="did you mean ema"):
        override(base("piat"), ["--averages.emma=none"])


def test_another_epsilon_takes_along_what_the_recipe_made_of_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step, the training ball and the noise of a configuration are absolute: they follow epsilon."""
    assert train(data, tmp_path / "a", "--attack.step_size", 0.02, recipe="iseat_svhn", epochs=1) == 0
    words = ["--threat.epsilon", 0.025, "--out", tmp_path / "b"]
    assert command("train", "--config", tmp_path / "a" / "config.yaml", *words) == 0
    assert "in proportion" in capsys.readouterr().err
    before, after = configured(tmp_path / "a"), configured(tmp_path / "b")
    assert after["attack"]["step_size"] == pytest.approx(0.005)
    assert before["train_ball"]["knots"][-1][1] == pytest.approx(0.1)
    assert after["train_ball"]["knots"][-1][1] == pytest.approx(0.025)
    assert before["attack"]["step_size"] == 0.02


def test_the_training_ball(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A radius or none; what is asked for does not follow epsilon; a bare number of grey values is refused."""
    assert train(data, tmp_path / "a", "--train-ball", "16/255", epochs=1) == 0
    assert configured(tmp_path / "a")["train_ball"] == pytest.approx(16 / 255)
    words = ["train", "--config", tmp_path / "a" / "config.yaml", "--threat.epsilon", 0.05, "--train-ball"]
    assert command(*words, "unbounded", "--out", tmp_path / "b") == 0
    assert configured(tmp_path / "b")["train_ball"] == "unbounded"
    assert command(*words, 0.07, "--out", tmp_path / "c") == 0
    assert configured(tmp_path / "c")["train_ball"] == 0.07
    capsys.readouterr()
    assert "write 16/255 if that was meant" in refused(capsys, *words, 16, "--out", tmp_path / "d")


def base_of_a_run(name: str) -> dict[str, Any]:
    """A configuration of the recipe as the command has it before it looks at the other options."""
    given = {"data": "digits", "model": {"name": "small_cnn"}, "seed": 0, "init": None}
    return {**recipe_config(RECIPES[name](epsilon=0.1)), **given, "training": asdict(Settings())}


GOES_ON = ("adds", "chooses", "frees")  # the sentence, behind an option that is named without a value
FOREIGN = {("rst", "--distance")}  # options of the authors' own scripts


@pytest.mark.parametrize("name", RECIPES)
def test_options_in_a_docstring_can_be_typed(name: str) -> None:
    """Every option that a recipe mentions is one of the command's, and takes the value beside it."""
    options = re.findall(r"(--[a-z][\w.-]*\w)(?:\s+('[^']+'|[\w./]*\w))?", inspect.getdoc(RECIPES[name]) or "")
    for option, value in options:
        if (name, option) in FOREIGN:
            continue
        before = base_of_a_run(name)
        plain, parts = train_verb.parser()._option_string_actions, section_options(before)
        assert option in {*plain, *parts, *(f"--{section}" for section in OPTIONAL)}, f"{option} is no option"
        if value and value not in GOES_ON:
            asked, rest = train_verb.parser().read_known([option, value.strip("'")])
            after = train_verb.apply(before, asked, rest)
            assert after != before, f"{option} {value} changes nothing"
            build_recipe(after)


def test_overrides_of_averages_that_are_there_keep_their_order() -> None:
    """A setting of the EMA does not move it, and a new average comes last, unless it writes into what others read."""
    config = override(base("pgd_at_wa"), ["--averages.swa.begin=0.2", "--averages.interpolation.weight=0.5"])
    assert [average["name"] for average in config["averages"]] == ["interpolation", "ema", "swa"]
    config = override(base("piat"), ["--averages.ema.decay=0.9", "--averages.interpolation.weight=0.5"])
    assert [average["name"] for average in config["averages"]] == ["interpolation", "ema"]
    assert config["averages"][0]["weight"] == 0.5
    config = override(base("pgd_at_wa"), ["--averages.ema.decay=0.9"])
    assert config["averages"] == [{"name": "ema", "decay": 0.9, "warm_up": True, "buffers": "average"}]


def test_another_kind_of_part() -> None:
    """`--attack.name` and `--objective.name` bring their own settings, in any order of the words."""
    config = override(
        base(), ["--attack.step_size=2/255", "--attack.name=fgsm", "--objective.name=adversarial_training"]
    )
    assert config["attack"] == {
        "name": "fgsm",
        "step_size": 2 / 255,
        "random_start": False,
        "start_scale": 1.0,
        "project": True,
        "statistics": "eval",
    }
    assert config["objective"] == {"name": "adversarial_training"}
    recipe = build_recipe(override(base("standard"), ["--objective.name=normalized_mse", "--attack.name=pgd"]))
    assert (type(recipe.attack).__name__, type(recipe.objective).__name__) == ("PGD", "NormalizedMSE")


def test_plain_options_reach_the_run(data: Path, tmp_path: Path) -> None:
    """With hyphens or underscores."""
    out = tmp_path / "run"
    more = ["--label_smoothing", 0.1, "--gradient-clip", 1.5, "--warmup", 0.25, "--seed", 3, "--validate-every", 2]
    assert train(data, out, *more, "--threat.norm", "l2") == 0
    config = configured(out)
    assert (config["label_smoothing"], config["gradient_clip"], config["warmup"]) == (0.1, 1.5, 0.25)
    assert (config["seed"], config["training"]["validate_every"], config["threat"]["norm"]) == (3, 2, "L2")
    assert config["resolved"] | {"holdfast": ""} == {
        "holdfast": "", "image_size": [8, 8], "steps_per_epoch": 4, "steps": 8, "warmup_steps": 2,
        "schedule_knots_in_steps": [[0, 1.0], [4, 0.1], [6, 0.01]],
    }  # fmt: skip
    assert ["validation" in line for line in metrics(out)] == [False, True]


def test_paper_settings_of_settings_that_are_already_chosen(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path / "a", epochs=1) == 0
    told = refused(capsys, "train", "--config", tmp_path / "a" / "config.yaml", "--paper-settings")
    assert "leave it out" in told
    assert "leave it out" in refused(capsys, "train", "--resume", "--out", tmp_path / "a", "--paper-settings")


def test_paper_settings(data: Path, tmp_path: Path) -> None:
    """They reach the attack, the average and the optimiser of the recipes that have some."""
    assert train(data, tmp_path / "a", "--paper-settings", epochs=1) == 0
    assert train(data, tmp_path / "b", "--paper-settings", recipe="pgd_at_wa", epochs=1) == 0
    assert train(data, tmp_path / "c", "--paper-settings", recipe="piat", epochs=1) == 0
    assert configured(tmp_path / "a")["attack"]["statistics"] == "batch_tracked"
    assert configured(tmp_path / "b")["averages"][0]["warm_up"] is False
    assert configured(tmp_path / "b")["optimizer"]["momentum"]["knots"] == [[0.0, 0.95], [0.3, 0.85], [1.0, 0.95]]
    assert configured(tmp_path / "c")["attack"]["random_start"] is False


@pytest.mark.parametrize("what", ["run", "model folder", "file"])
def test_init_starts_from_weights(what: str, run: Path, data: Path, tmp_path: Path) -> None:
    """With a learning rate of zero what comes out is what went in."""
    source = {"run": run, "model folder": run / "last", "file": run / "last" / "model.safetensors"}[what]
    words = ["--init", source, "--optimizer.learning_rate", 0, "--averages.ema.buffers", "keep"]
    assert train(data, tmp_path / "run", *words, epochs=1) == 0
    before = weights(run, "model" if what == "run" else "last")
    after = weights(tmp_path / "run")
    assert_same(after["fc.weight"], before["fc.weight"])
    assert_same(after["layer1.conv.weight"], before["layer1.conv.weight"])
    assert configured(tmp_path / "run")["init"] == str(source)


def test_init_from_a_checkpoint_of_other_code(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `torch.save` wrote, with a prefix, in half precision and beside an average; the run says what was done."""
    before = {name: value.half() for name, value in weights(run, "last").items()}
    content = {"state_dict": {f"module.{name}": value for name, value in before.items()}, "ema": weights(run, "model")}
    torch.save(content, tmp_path / "w.pth")
    words = ["--optimizer.learning_rate", 0, "--averages.ema.buffers", "keep"]
    assert train(data, tmp_path / "a", "--init", tmp_path / "w.pth", *words, epochs=1) == 0
    told = capsys.readouterr().err
    assert f"state_dict is taken, ema is not; {tmp_path}/w.pth:ema takes that" in told
    assert "tensors cast from float16 to float32" in told
    assert_same(weights(tmp_path / "a")["fc.weight"], before["fc.weight"].float())
    assert train(data, tmp_path / "b", "--init", f"{tmp_path}/w.pth:ema", *words, epochs=1) == 0
    assert_same(weights(tmp_path / "b")["fc.weight"], weights(run)["fc.weight"])


def test_init_that_does_not_fit(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another width, and a folder without a model."""
    base = ["train", "pgd_at", "--data", data, "--threat.epsilon", 0.1, "--out", tmp_path / "run"]
    assert "do not fit the model" in refused(capsys, *base, "--init", run, "--model.width", 5)
    assert "holds no trained model" in refused(capsys, *base, "--init", tmp_path)
    assert "is missing" in refused(capsys, *base, "--init", tmp_path / "no.safetensors")
    assert not (tmp_path / "run").exists()


def test_epsilon_is_never_guessed(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data without a customary one must be given one; where there is one, the run says so."""
    assert "no epsilon is customary for toy" in refused(capsys, "train", "pgd_at", "--data", data)
    assert "no epsilon is customary for digits under L2" in refused(
        capsys, "train", "pgd_at", "--data", "digits", "--threat.norm", "L2"
    )
    words = [
        "train",
        "standard",
        "--data",
        "digits",
        "--epochs",
        1,
        "--model.width",
        4,
        "--training.validation_steps",
        1,
    ]
    assert command(*words, "--training.test_steps", 1, "--training.test_images", 50, "--out", tmp_path / "run") == 0
    assert "epsilon 0.2, as is customary for digits" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epsilon"] == 0.2
    assert load("digits").suggested_epsilon == 0.2


def test_the_default_folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """runs/<time>-<recipe>-<data>."""
    monkeypatch.chdir(tmp_path)
    assert train(data, None, epochs=1) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-pgd_at-toy")
    assert len(folder.name) == len("20260101-120000-pgd_at-toy")


# ------------------------------------------------------------------------------------------------ evaluate


def test_evaluate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Best and last, a radius, a number of images, another folder: fractions, on standard output and in a file."""
    told = json.loads((run / "summary.json").read_text())
    capsys.readouterr()
    for checkpoint in ("best", "last"):
        assert command("evaluate", run, "--checkpoint", checkpoint, "--steps", 2, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["about"] == {"recipe": "pgd_at", "epoch": told[checkpoint]["epoch"], "checkpoint": checkpoint}
        assert {key: found[key] for key in ("clean_accuracy", "robust_accuracy", "interval", "attack", "n")} == {
            key: told[checkpoint][key] for key in ("clean_accuracy", "robust_accuracy", "interval", "attack", "n")
        }
        folder = run / "evaluations" / f"pgd-2-linf-0.1-toy-n24-seed0-{checkpoint}"
        assert found.pop("folder") == str(folder)
        assert read_json(folder / "summary.json") == found

    spoilt = Path(shutil.copytree(run, tmp_path / "spoilt"))  # last weights that see nothing: always the first class
    state = weights(spoilt, "last")
    state |= {name: 0 * state[name] for name in ("fc.weight", "fc.bias")}
    save_file(state, spoilt / "last" / "model.safetensors")
    beside(spoilt / "last" / "model.safetensors").unlink()
    for checkpoint, accuracy in (("best", told["clean_accuracy"]), ("last", 0.25)):
        assert command("evaluate", spoilt, "--checkpoint", checkpoint, "--steps", 1, "--json") == 0
        assert json.loads(capsys.readouterr().out)["clean_accuracy"] == accuracy
    assert told["clean_accuracy"] > 0.25

    words = ["evaluate", run, "--steps", 3, "--restarts", 2, "--epsilon", "8/255", "--n", 10, "--out", tmp_path / "e"]
    assert command(*words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["epsilon"]) == (10, 8 / 255)
    assert found["attack"] == "PGD-3, 2 restarts, Linf(8/255)"
    written = {"ledger.jsonl", "summary.json", "images.csv", "log.txt"}
    assert {path.name for path in (tmp_path / "e").iterdir()} >= written
    assert command(*words) == 0
    out = capsys.readouterr().out
    assert "95 % Wilson interval" in out
    assert "written to" in out


def test_evaluate_knows_its_attacks(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PGD in any case, FGSM, a step size, another norm; radius 0 leaves the clean accuracy, radius 1 nothing."""

    def found(*words: object) -> dict[str, Any]:
        capsys.readouterr()
        assert command("evaluate", run, "--json", *words) == 0
        return json.loads(capsys.readouterr().out)

    assert found("--attack", "PGD", "--steps", 5)["attack"] == found("--steps", 5)["attack"] == "PGD-5, Linf(0.1)"
    assert found("--attack", "fgsm")["attack"] == "FGSM, Linf(0.1)"
    one, two = found("--steps", 5), found("--step-size", "2/255", "--steps", 5)
    assert one["folder"] != two["folder"]
    settings = [json.loads((Path(each["folder"]) / "protocol.json").read_text())["settings"][0] for each in (one, two)]
    assert ["step_size=None" in settings[0], "step_size=0.00784" in settings[1]] == [True, True]
    assert found("--norm", "l2", "--epsilon", 0.5, "--steps", 5)["attack"] == "PGD-5, L2(0.5)"
    none = found("--epsilon", 0, "--steps", 5)
    assert none["robust_accuracy"] == none["clean_accuracy"]
    assert found("--epsilon", 1, "--steps", 20)["robust_accuracy"] < none["clean_accuracy"]
    curve = found("--epsilon", "0.2,0.05", "--steps", 3)
    assert [each["epsilon"] for each in curve["evaluations"]] == [0.05, 0.2]
    distances = found("--distances", "--steps", 5, "--norm", "L2", "--epsilon", 0.5)["distances"]
    assert distances
    assert "give its --epsilon too" in refused(capsys, "evaluate", run, "--norm", "L2")


def test_evaluate_on_other_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same shape and classes are taken; others are refused, with both told."""
    other = write_toy(tmp_path / "other.npz", test=8)
    assert command("evaluate", run, "--steps", 2, "--data", other, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["data_name"]) == (8, "other")
    message = refused(capsys, "evaluate", run, "--data", "digits")
    assert "10 classes of shape [1, 8, 8]" in message
    assert "4 of [1, 8, 8]" in message
    np.savez(tmp_path / "large.npz", x=np.zeros((40, 9, 9), np.uint8), y=np.arange(40) % 4)
    assert "[1, 9, 9]" in refused(capsys, "evaluate", run, "--data", tmp_path / "large.npz")


def test_a_model_folder_may_move(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is all that is needed: load it from elsewhere, evaluate it with the data named."""
    moved = tmp_path / "elsewhere" / "mine"
    shutil.copytree(run / "model", moved)
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(load_model(moved)(x), load_model(run)(x))
    assert not load_model(moved).training
    assert not torch.equal(load_model(run, checkpoint="last")(x), load_model(run)(x))
    assert "names no data: give --data" in refused(capsys, "evaluate", moved)
    assert command("evaluate", moved, "--steps", 2, "--data", data, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["robust_accuracy"] == json.loads((run / "summary.json").read_text())["robust_accuracy"]


@pytest.mark.parametrize("home", [False, True])
def test_a_model_from_your_own_file(
    home: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It trains and is evaluated; the run folder is enough when the file is gone. The function takes what it likes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "net.py"
    file.write_text(NET)
    assert train(data, tmp_path / "run", "--model", f"{'~' if home else tmp_path}/net.py:make") == 0
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["model"]["width"] == 4
    assert "mean" not in config["model"]
    file.unlink()
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    before = json.loads((tmp_path / "run" / "summary.json").read_text())
    capsys.readouterr()
    assert command("evaluate", tmp_path / "run", "--steps", 2, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clean_accuracy"] == before["clean_accuracy"]
    assert abs(found["robust_accuracy"] - before["robust_accuracy"]) < 0.1  # other draws
    shutil.copytree(tmp_path / "run" / "last", tmp_path / "moved")
    assert load_model(tmp_path / "moved")(torch.rand(2, 1, 8, 8)).shape == (2, 4)


# ------------------------------------------------------------------------------------------------ demo and doctor


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Three run folders, one table, what to try next; and as JSON. Shortened here; the real one takes two minutes."""
    assert list(demo.EPOCHS) == ["standard", "pgd_at", "piat_nmse"]
    monkeypatch.setattr(demo, "EPOCHS", dict.fromkeys(demo.EPOCHS, 1))
    digits = load("digits")
    few = replace(digits, train=digits.train.subset(torch.arange(200)), test=digits.test.subset(torch.arange(60)))
    monkeypatch.setattr("holdfast.setup.load", lambda source, image_size: few)
    monkeypatch.chdir(tmp_path)
    assert command("demo", "--out", "here") == 0
    told = capsys.readouterr()
    for text in ("PGD-50, Linf(0.2), 60 test images", "holdfast evaluate here/piat_nmse", "95 % interval", "Try next"):
        assert text in told.out
    for name in demo.EPOCHS:
        assert (tmp_path / "here" / name / "summary.json").exists()
        assert any(line.split()[1:2] == [name] or name in line.split() for line in told.out.splitlines())
    assert command("demo", "--out", "here", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert list(again) == ["standard", "pgd_at", "piat_nmse", "out"]
    assert again["standard"] == read_json(tmp_path / "here" / "standard" / "summary.json")


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Versions, device and the time of one step (here of one attack step instead of ten), as text and as JSON."""
    quick = replace(pgd_at(epsilon=0.1), attack=PGD(steps=1))
    monkeypatch.setattr("holdfast.recipes.pgd_at", lambda epsilon: quick)
    assert command("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__
    assert found["step"]["fp32"]["ms"] > 0
    assert "command" not in found
    monkeypatch.setattr("holdfast.cli.doctor.step_times", lambda: found["step"])  # once is enough
    assert command("doctor") == 0
    assert "small_cnn, 28x28, batch 128, PGD-10, fp32" in capsys.readouterr().out


def test_the_installed_command_exists() -> None:
    """The entry point is this function."""
    script = Path(sys.executable).with_name("holdfast")
    if not script.exists():
        pytest.skip("holdfast is not installed as a script here")
    ended = subprocess.run(
        [script, "list", "recipes"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[1].startswith("standard")
    assert inspect.signature(demo.run).parameters.keys() == {"argv"}


def test_a_stopped_demo_names_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the command that would go on with one of its three runs."""
    import signal

    from holdfast.loop import Loop

    out = tmp_path / "my demo"
    monkeypatch.setattr(Loop, "one_step", lambda *rest: signal.raise_signal(signal.SIGTERM))
    assert command("demo", "--out", out, "--seed", 3) == 128 + signal.SIGTERM
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"holdfast: stopped; go on with: holdfast demo --out '{out}' --seed 3"
    assert (out / "standard" / "checkpoints").is_dir()
