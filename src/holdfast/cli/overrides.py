"""`--section.key value`: every setting of every part of a recipe, checked against the part's own signature.

Values are parsed here and compared with the annotations. jsonargparse, which could read them too, parses YAML without
limits, opens files and imports classes that a value names; it only writes the help text.
"""

from __future__ import annotations

import copy
import json
from argparse import SUPPRESS
from collections.abc import Callable, Collection, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser

from holdfast.cli.arguments import unknown_option
from holdfast.components import AVERAGES, VIEWS
from holdfast.configuration import SINGLE, settings_of
from holdfast.errors import HoldfastError, unknown_name
from holdfast.further_network import FurtherNetwork
from holdfast.parsing import parse_yaml
from holdfast.recipe import SGD
from holdfast.schedule import Schedule
from holdfast.setting_types import fits, hints_of, in_words, shown
from holdfast.settings import Settings
from holdfast.threat import THREATS, parse_fraction

Config = dict[str, Any]

OPTIONAL = ("augmentation", "mixing")
"""Sections that a recipe may do without: ``--mixing cutmix``, ``--mixing none``."""

LISTS = (("averages", "average", AVERAGES), ("views", "view", VIEWS))
"""Sections of which a recipe may have several parts: ``--averages.ema.decay``, ``--views.worst_weights.gamma``."""


def override(config: Mapping[str, Any], words: Sequence[str], plain: Sequence[str] = ()) -> Config:
    """The configuration with settings from the command line.

    Args:
        config: As `holdfast.setup.run_config` writes it.
        words: ``--section.key=value``. Values are YAML; a fraction such as ``2/255`` is a number.
        plain: The options without a section, for the advice on a typo.

    Raises:
        HoldfastError: an unknown section or key, with the nearest, or a value of the wrong kind.
    """
    config = copy.deepcopy(dict(config))
    words = [_choose_kind(config, word) for word in words]
    model = [word for word in words if word.startswith("--model.")]
    for word in model:
        key, _, value = word[len("--model.") :].partition("=")
        config["model"][key] = parse_yaml(
            value, f"--model.{key} {shown(value)}", advice="give a number, a word or a list", typed=True
        )
    words = [word for word in words if word and word not in model]
    known = section_options(config)
    words = [part for word in words if not _take_out(config, word) for part in _each_setting(word, known)]
    for word in words:
        option, _, text = word.partition("=")
        if option not in known:
            raise unknown_option(word, [*plain, *known])
        section, *part, key = option[2:].split(".")
        _settings(config, section, part)[key] = _value(option, text, known[option])
    return config


def section_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options ``--section.key`` of a configuration, each with the type of its value."""
    parts: dict[str, type[Any]] = {"threat": THREATS[config["threat"]["norm"]]}
    for name, part in (config.get("networks") or {}).items():
        if "class" not in part:
            parts[f"networks.{name}"] = FurtherNetwork
    parts |= {section: table[config[section]["name"]] for section, table in SINGLE.items() if config.get(section)}
    parts |= {f"{section}.{name}": kind for section, _, table in LISTS for name, kind in table.items()}
    parts |= {"optimizer": SGD, "schedule": Schedule, "training": Settings}
    options = {f"--{part}.{key}": hint for part, kind in parts.items() for key, hint in hints_of(kind).items()}
    del options["--threat.epsilon"]  # a plain option
    return options


def _settings(config: Config, section: str, part: Sequence[str]) -> Config:
    """The settings of a section, or of one of its parts, which is added where it is not there."""
    if not part:
        return config[section]
    if section == "networks":
        return config[section][part[0]]
    table = next(table for name, _, table in LISTS if name == section)
    parts: list[Config] = config.get(section) or []
    for present in parts:
        if present["name"] == part[0]:
            return present
    new = {"name": part[0], **settings_of(table[part[0]]())}
    is_first = getattr(table[part[0]], "writes_back", False)  # others read its result
    config[section] = [new, *parts] if is_first else [*parts, new]
    return new


def _value(option: str, text: str, hint: Any) -> Any:
    """What was typed, as a value of a setting's type. What is no plain YAML can only be text."""
    kinds = [
        kind for kind in (get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)) if kind is not str
    ]
    number = parse_fraction(text)
    value: Any = number
    try:
        value = _typed(text) if number is None else number
    except HoldfastError:
        kinds = []
    for kind in kinds:
        if fits(value, kind):
            return float(value) if kind is float else value
    if fits(text, hint) and str in (hint, *get_args(hint)):
        return text
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if words and len(kinds) == 1:
        raise HoldfastError(f"{option} {shown(text)} is unknown: use {' or '.join(words)}")
    raise HoldfastError(f"{option} is {shown(text)}: give {in_words(hint)}; `holdfast train RECIPE --help` lists them")


def _take_out(config: Config, word: str) -> bool:
    """Act on ``--views.split_batchnorm=none`` and its like: the recipe without that part."""
    option, _, value = word.partition("=")
    for section, _, table in LISTS:
        if option.startswith(f"--{section}.") and option.count(".") == 1 and value.lower() in ("none", "null"):
            name = option.partition(".")[2]
            if name not in table:
                raise unknown_name(section, name, table)
            config[section] = [part for part in config.get(section) or [] if part["name"] != name]
            return True
    return False


def _choose_kind(config: Config, word: str) -> str:
    """Act on ``--attack.name=fgsm`` and its like at once, since the other settings depend on it."""
    for section, table in SINGLE.items():
        whole = section in OPTIONAL and word.startswith(f"--{section}=")
        if word.startswith(f"--{section}.name=") or whole:
            name = word.partition("=")[2]
            if section in OPTIONAL and name.lower() in ("none", "null"):
                config[section] = None
                return ""
            if name not in table:
                raise unknown_name(section, name, table)
            if (config.get(section) or {}).get("name") != name:
                config[section] = {"name": name, **settings_of(table[name]())}
            return ""
    return word


def _each_setting(word: str, known: Collection[str]) -> list[str]:
    """Return ``--views.worst_weights={gamma: 0.1, steps: 2}`` as one word for each setting, others as they are."""
    option, _, value = word.partition("=")
    if option in known or not any(name.startswith(f"{option}.") for name in known):
        return [word]
    settings = _typed(value)
    if not isinstance(settings, dict):
        return [word]
    texts = {key: each if isinstance(each, str) else json.dumps(each) for key, each in settings.items()}
    return [f"{option}.{key}={text}" for key, text in texts.items()]


def _typed(text: str) -> Any:
    """Return what a value of the command line means."""
    return parse_yaml(text, shown(text), advice="give a number, a word or a list", typed=True)


def explained(config: Mapping[str, Any], prog: str) -> str:
    """The help text of all sections of a recipe's configuration."""
    parser = ArgumentParser(prog=prog, exit_on_error=False)
    parser.add_class_arguments(THREATS[config["threat"]["norm"]], "threat", skip={"epsilon"})
    defaults: Config = {
        f"threat.{key}": value for key, value in config["threat"].items() if key not in ("norm", "epsilon")
    }
    for name, part in (config.get("networks") or {}).items():
        parser.add_class_arguments(FurtherNetwork, f"networks.{name}")
        defaults |= {f"networks.{name}.{key}": value for key, value in part.items()}
    for section, table in SINGLE.items():
        part = config.get(section)
        if part is not None:
            parser.add_class_arguments(table[part["name"]], section)
            defaults |= {f"{section}.{key}": value for key, value in part.items() if key != "name"}
    for section, _, table in LISTS:
        for name, kind in table.items():
            parser.add_class_arguments(kind, f"{section}.{name}")
        for part in config.get(section) or ():
            defaults |= {f"{section}.{part['name']}.{key}": value for key, value in part.items() if key != "name"}
    for section, kind in (("optimizer", SGD), ("schedule", Schedule), ("training", Settings)):
        parser.add_class_arguments(kind, section)
        defaults |= {f"{section}.{key}": value for key, value in config[section].items()}
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if get_origin(hint) in (Union, UnionType):  # functions are given from Python only
            action._typehint = Union[tuple(kind for kind in get_args(hint) if get_origin(kind) is not Callable)]  # type: ignore[attr-defined]  # noqa: UP007
        elif action.metavar == "CONFIG":  # whole sections are not read from files
            action.help = SUPPRESS
    parser.set_defaults(defaults)
    return parser.format_help()
