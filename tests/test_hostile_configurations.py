"""Configurations that nobody writes by accident: told in one line, nothing built, nothing imported."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from holdfast.cli.overrides import override
from holdfast.components import ATTACKS, AVERAGES, MIXINGS, VIEWS
from holdfast.configuration import build_recipe, check_keys, recipe_config, settings_of
from holdfast.errors import HoldfastError
from holdfast.recipes import RECIPES
from holdfast.setting_types import check_settings, fits, hints_of, in_words, shown
from holdfast.settings import Settings
from holdfast.setup import prepare
from holdfast.threat import Linf, parse_epsilon
from tiny_runs import command, refused, write_toy

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 3, 10**30, 10**9, 0.5, -0.5, 1e308, "", "text", "../../x", "\0", "8/255", "9" * 400 + "/1",
    [], [1], [[0, 1]], ["a"], {}, {"knots": []}, {"knots": [[0, 1]]}, {"class_path": "witness.X", "init_args": {}},
    {"name": "pgd"},
)  # fmt: skip
"""What is put in place of every value."""


def configuration(name: str, data: Path | str = "digits") -> dict[str, Any]:
    """The configuration of a recipe's run, as config.yaml has it."""
    settings = asdict(Settings(precision="fp32", device="cpu", image_size=None))
    recipe = recipe_config(RECIPES[name](epsilon=0.1))
    run = {"data": str(data), "model": {"name": "small_cnn", "width": 4}, "seed": 0, "init": None}
    return {**recipe, **run, "training": settings}


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value, of lists only the first two."""
    if at:
        yield at
    children = value.items() if isinstance(value, dict) else enumerate(value[:2] if isinstance(value, list) else ())
    for key, child in children:
        yield from places(child, (*at, key))


def changed(config: dict[str, Any], at: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy with one value replaced."""
    result = copy.deepcopy(config)
    inner = result
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return result


def outcome(config: dict[str, Any], *, through_options: bool) -> str | None:
    """Everything that `holdfast train --config` does before the first step; the refusal, or None."""
    try:
        check_keys(config)
        if through_options:
            config = override(config, ["--optimizer.nesterov=true"])
        recipe = build_recipe(config)
        model = dict(config["model"])
        if model.get("name") is None:
            raise HoldfastError("this run's model was given from Python: repeat it from Python, with fit()")
        prepare(
            recipe,
            config["data"],
            model.pop("name"),
            seed=config["seed"],
            settings=Settings(**config["training"]),
            init=config["init"],
            options=model,
        )
    except HoldfastError as error:
        return str(error)
    return None


def assert_each_is_told(config: dict[str, Any], wanted: Iterator[tuple[Any, ...]]) -> None:
    """Every odd value in each of these places is accepted, or refused in a line."""
    refusals = 0
    for number, (at, value) in enumerate((at, value) for at in wanted for value in ODD):
        told = outcome(changed(config, at, value), through_options=number % 3 == 0)
        refusals += told is not None
        if told is not None:
            assert "\n" not in told, (at, value)
            assert len(told) < 1000, (at, value)
    assert refusals > 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("data") / "toy.npz")


def test_odd_values_in_some_places(data: Path) -> None:
    """The seed, a setting of the attack, a weight, a schedule's knot, a name."""
    places_of_some = (("seed",), ("attack", "steps"), ("objective", "beta"), ("averages", 0, "name"))
    assert_each_is_told(configuration("piat_trades", data), iter(places_of_some))
    config = changed(configuration("pgd_at", data), ("optimizer", "weight_decay"), {"knots": [[0, 1e-3]]})
    assert_each_is_told(config, iter((("optimizer", "weight_decay", "knots", 0),)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["pgd_at", "piat_nmse", "ar_at_awp", "iseat_swa", "lbgat", "kd_swa", "stat", "las_awp", "free_at", "fgsm_pgi",
     "liet", "idbh_awp", "nuat"],
)  # fmt: skip
def test_odd_values_everywhere(name: str, data: Path) -> None:
    """In each place of the configuration; what all recipes have only once."""
    config = configuration(name, data)
    parts = ("attack", "objective", "views", "averages", "networks", "step", "augmentation", "mixing")
    assert_each_is_told(config, (at for at in places(config) if name == "pgd_at" or at[0] in parts))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (("attack", "steps"), [3], "attack pgd: steps is [3]: give a whole number"),
        (("attack", "steps"), True, "attack pgd: steps is True: give a whole number"),
        (("attack", "steps"), 10**30, "attack pgd: steps is 1000000000000000000000000000000: give a whole number"),
        (("attack", "steps"), {"a": 1}, "attack pgd: steps is {'a': 1}: give a whole number"),
        (("attack", "step_size"), [0.1], "attack pgd: step_size is [0.1]: give a number or a schedule such as"),
        (("attack", "random_start"), "often", "random_start is 'often': give true or false or normal"),
        (("attack", "name"), ["pgd"], "attack \"['pgd']\" is unknown"),
        (("objective", "beta"), "strong", "objective trades: beta is 'strong': give a number or a schedule"),
        (("objective", "beta"), {"class_path": "witness.X"}, "objective trades: beta is {'class_path'"),
        (("averages", 0, "coefficients"), [1, "a"], "coefficients is [1, 'a']: give a list of numbers"),
        (("threat", "epsilon"), [8], "threat: epsilon is [8]: give a number"),
        (("threat", "lower"), None, "threat: lower is None: give a number"),
        (("threat", "epsilon"), "9" * 400 + "/1", "is negative or not finite"),
        (("optimizer", "learning_rate"), None, "optimizer: learning_rate is None: give a number"),
        (("optimizer", "rate"), 1, "setting of optimizer 'rate' is unknown"),
        (("schedule", "knots"), [[0, None]], "schedule: knots is [[0, None]]: give a list of lists of numbers"),
        (("schedule", "by"), 3, "schedule: by is 3: give fraction or epoch or stage"),
        (("training", "image_size"), "32", "training: image_size is '32': give a whole number or null"),
        (("training", "checkpoint_minutes"), [1], "training: checkpoint_minutes is [1]: give a number"),
        (("training", "max_data_gib"), 1000, "setting of training 'max_data_gib' is unknown"),
        (("epochs",), 2.5, "epochs is 2.5: give a whole number"),
        (("warmup",), None, "warmup is None: give a number"),
        (("gradient_clip",), "none", "gradient_clip is 'none': give a number or null"),
        (("train_ball",), "far", "train_ball is 'far': give a number or a schedule"),
        (("fine_tuning",), 1, "fine_tuning is 1: give true or false"),
        (("recipe",), "../../home", "'recipe' is '../../home'"),
        (("recipe",), ["pgd_at"], "'recipe' is ['pgd_at']"),
        (("seed",), 2**63, "'seed' is 9223372036854775808"),
        (("seed",), 1.5, "'seed' is 1.5"),
        (("data",), "a\0b", "'data' is 'a\\x00b'"),
        (("init",), 3, "'init' is 3"),
        (("model", "name"), 3, "'model.name' is 3"),
        (("model", "num_classes"), 10**9, "model has 'num_classes', which the data decides"),
        (("networks",), {"--help": {}}, "'networks.--help' is {}"),
        (("networks",), {"guide": 3}, "'networks.guide' is 3"),
        (("networks",), {"guide": {"class_path": "witness.X"}}, "setting of network guide 'class_path' is unknown"),
        (("networks",), {"guide": {"trained": "yes"}}, "network guide: trained is 'yes': give true or false"),
        (("views",), [{"name": "worst_weights", "sides": "adv"}], "sides is 'adv': give a list of words"),
        (("class_path",), "witness.X", "configuration key 'class_path' is unknown"),
        (("<<",), {"epochs": 3}, "configuration key '<<' is unknown"),
    ],
)
def test_wrong_types_name_the_key(at: tuple[Any, ...], value: Any, message: str) -> None:
    """With what the key takes, before anything else is looked at."""
    with pytest.raises(HoldfastError) as refusal:
        check_keys(changed(configuration("piat_trades"), at, value))
    assert message in str(refusal.value)


def test_every_recipes_own_configuration_passes() -> None:
    """As it is, and as YAML gives it back."""
    for name in RECIPES:
        config = configuration(name)
        check_keys(config)
        check_keys(yaml.safe_load(yaml.safe_dump(config)))


def test_every_component_has_types() -> None:
    """So that the checks above check something: each parameter is annotated with what can be compared."""
    for table in (ATTACKS, AVERAGES, VIEWS, MIXINGS):
        for kind in table.values():
            check_settings("part", kind, settings_of(kind()))
            for name, hint in hints_of(kind).items():
                assert in_words(hint) != "another value", (kind, name)
                assert not fits({"class_path": "witness.X"}, hint), (kind, name)
                assert not fits(float("inf"), hint), (kind, name)
                assert not fits(float("nan"), hint), (kind, name)


def test_long_values_are_cut() -> None:
    """A message quotes a little of a value."""
    assert len(shown(["x" * 100] * 100)) < 80
    with pytest.raises(HoldfastError) as refusal:
        check_keys(changed(configuration("pgd_at"), ("attack", "name"), "x" * 1_000_000))
    assert len(str(refusal.value)) < 300


def test_no_epsilon_is_infinite() -> None:
    """Not by a fraction of very large numbers either."""
    for text in ("9" * 400 + "/1", "9" * 400 + "/" + "9" * 400, "1e400", "inf", "nan"):
        with pytest.raises(HoldfastError):
            parse_epsilon(text)
    with pytest.raises(HoldfastError):
        Linf("9" * 400 + "/1")  # type: ignore[arg-type]  # text is understood


# --- Nothing is imported. ---------------------------------------------------------------------------------------


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of modules that were looked for; a module of each name lies in the working directory."""
    asked: list[str] = []

    class Watch:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name.startswith(("witness", "antigravity")):
                asked.append(name)

    (tmp_path / "witness.py").write_text("class X: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("witness", "antigravity"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Watch(), *sys.meta_path])
    yield asked
    assert "witness" not in sys.modules


VALUES = ("witness.X", "{class_path: witness.X}", "{class_path: witness.X, init_args: {}}", "[{class_path: witness.X}]")


def test_the_watch_sees_imports(imported: list[str]) -> None:
    """So that the tests below mean something."""
    import importlib

    importlib.import_module("witness")
    assert imported == ["witness"]
    del sys.modules["witness"]


def everything() -> dict[str, Any]:
    """A configuration that has every kind of part."""
    config = configuration("piat_trades")
    config["mixing"] = {"name": "cutmix", **settings_of(MIXINGS["cutmix"]())}
    config["networks"] = configuration("lbgat")["networks"]
    config["views"] = configuration("ar_at_awp")["views"]
    config["augmentation"] = configuration("idbh")["augmentation"]
    config["step"] = configuration("las_at")["step"]
    return config


def test_options_import_nothing(imported: list[str]) -> None:
    """Values of settings, of whole sections and of the network's options; and words that are no settings."""
    config = everything()
    options = [f"--{'.'.join(map(str, at))}" for at in places(config) if not any(isinstance(key, int) for key in at)]
    options += [
        f"--{section}.{name}" for section, table in (("views", VIEWS), ("averages", AVERAGES)) for name in table
    ]
    options += [f"--{section}.help" for section in ("attack", "objective", "training")]
    options += ["--attack.class_path", "--attack.step_size.class_path", "--model.init", "--print_config", "--config"]
    for option in options:
        for value in VALUES:
            try:
                build_recipe(override(config, [f"{option}={value}"]))
            except (HoldfastError, TypeError):
                continue
    assert imported == []


def test_configurations_import_nothing(imported: list[str]) -> None:
    """In each place of a configuration, with and without an option beside it."""
    config = everything()
    for at in places(config):
        for value in (yaml.safe_load(text) for text in VALUES):
            for words in ([], ["--optimizer.nesterov=true"]):
                try:
                    one = changed(config, at, value)
                    check_keys(one)
                    build_recipe(override(one, words))
                except HoldfastError:
                    continue
    assert imported == []


def test_the_commands_import_nothing(
    imported: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line to the exit code."""
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(changed(configuration("pgd_at", data), ("attack", "step_size"), {"class_path": "witness.X"}))
    )
    refused(capsys, "train", "--config", tmp_path / "mine.yaml", "--out", tmp_path / "run")
    words = ["train", "pgd_at", "--data", data, "--threat.epsilon", 0.1, "--out", tmp_path / "run"]
    for option in ("--training", "--schedule", "--attack", "--optimizer", "--attack.step_size", "--model.width"):
        refused(capsys, *words, option, "witness.X")
        refused(capsys, *words, option, "{class_path: witness.X}")
    assert imported == []
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ bombs


BOMBS = {
    "nested": "[" * 100_000,
    "nested mapping": "{a: " * 30_000,
    "aliases": "[" + ", ".join(f"&x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" if n else "&x0 [1]" for n in range(9)) + "]",
    "long number": "9" * 100_000,
    "tag": "!!python/name:os.system",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_on_the_command_line(bomb: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the value of an option of the network, of a setting and of a whole section."""
    words = ["train", "pgd_at", "--data", data, "--threat.epsilon", 0.1, "--out", tmp_path / "run"]
    for option in ("--model.width", "--attack.step_size", "--attack.steps", "--schedule.knots", "--attack"):
        told = refused(capsys, *words, option, BOMBS[bomb])
        assert option in told or "epsilon" in told  # a step size may be text: a fraction
        assert len(told) < 1500
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_in_a_configuration(bomb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a value, and as the whole file."""
    for text in (f"recipe: {BOMBS[bomb]}\n", f"{BOMBS[bomb]}\n"):
        (tmp_path / "mine.yaml").write_text(text)
        told = refused(capsys, "train", "--config", tmp_path / "mine.yaml", "--out", tmp_path / "run")
        assert "mine.yaml is no" in told


def test_control_characters_are_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name from a file cannot move the cursor, and cannot fill the screen."""
    (tmp_path / "mine.yaml").write_text('"\\e[2J\\u202e": 1\n')
    told = refused(capsys, "train", "--config", tmp_path / "mine.yaml", "--out", tmp_path / "run")
    assert told.isprintable()
    assert command("train", "x" * 100_000) == 2
    assert len(capsys.readouterr().err) < 6000
