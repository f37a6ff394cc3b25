"""`--section.key value`: every setting of every part of a recipe, checked against the part's own signature."""

from __future__ import annotations

import copy
import json
import re
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from jsonargparse import ArgumentParser, set_loader

from holdfast.cli.arguments import unknown_option
from holdfast.components import AVERAGES, VIEWS
from holdfast.configuration import SINGLE, build_component, settings_of
from holdfast.errors import HoldfastError, unknown_name
from holdfast.further_network import FurtherNetwork
from holdfast.parsing import parse_yaml
from holdfast.recipe import SGD
from holdfast.schedule import Schedule
from holdfast.setup import Settings
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
            value, f"--model.{key} {shortened(value)}", advice="give a number, a word or a list", typed=True
        )
    words = [_with_number(word) for word in words if word and word not in model]
    if not words:
        return config
    parser = section_parser(config)
    words = [word for word in words if not _take_out(config, word)]
    known = list(parser._option_string_actions)
    words = [part for word in words for part in _each_setting(word, known)]
    options = [word[2:].partition("=")[0].split(".") for word in words]
    touched = {(option[0], option[1]) for option in options if option[0] in ("averages", "views") and len(option) > 1}
    for word in words:
        if not word.startswith("--") or word.partition("=")[0] not in known:
            raise unknown_option(word, [*plain, *known])
    try:
        read = parser.parse_args(words).as_dict()
    except ArgumentError as error:
        raise HoldfastError(_one_line(str(error))) from None
    for section in ("threat", *SINGLE, "optimizer", "schedule", "training"):
        if section in read:
            config[section] = {**(config[section] or {}), **read[section]}
    for name, settings in read.get("networks", {}).items():
        config["networks"][name] = {**config["networks"][name], **settings}
    for section, _, table in LISTS:
        parts = config.get(section) or []
        present = [part["name"] for part in parts]
        new = [{"name": name} for name in table if (section, name) in touched and name not in present]
        first = [part for part in new if getattr(table[part["name"]], "writes_back", False)]  # others read its result
        config[section] = [*first, *parts, *(part for part in new if part not in first)]
        for part in config[section]:
            part.update(read[section][part["name"]])
    return config


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


def _each_setting(word: str, known: Sequence[str]) -> list[str]:
    """Return ``--views.worst_weights={gamma: 0.1, steps: 2}`` as one word for each setting, others as they are."""
    option, _, value = word.partition("=")
    if option in known or not any(name.startswith(f"{option}.") for name in known):
        return [word]
    settings = _typed(value)
    if not isinstance(settings, dict):
        return [word]
    texts = {key: each if isinstance(each, str) else json.dumps(each) for key, each in settings.items()}
    return [f"{option}.{key}={text}" for key, text in texts.items()]


def _with_number(word: str) -> str:
    """Fractions as numbers; epsilon keeps its text, which says its own unit."""
    name, equals, value = word.partition("=")
    number = parse_fraction(value)
    return word if number is None else f"{name}{equals}{number!r}"


def _typed(text: str) -> Any:
    """Return what a value of the command line means; jsonargparse takes for text what is no plain YAML."""
    return parse_yaml(text, shortened(text), advice="give a number, a word or a list", typed=True)


set_loader("plain", _typed, exceptions=(HoldfastError,))


def section_parser(config: Mapping[str, Any], prog: str = "holdfast train") -> ArgumentParser:
    """A parser of all sections, with the configuration's values as defaults. It imports nothing that a value names."""
    parser = ArgumentParser(prog=prog, exit_on_error=False, parser_mode="plain")
    parser.add_class_arguments(THREATS[config["threat"]["norm"]], "threat", skip={"epsilon"})
    defaults: Config = {
        f"threat.{key}": value for key, value in config["threat"].items() if key not in ("norm", "epsilon")
    }
    for name, part in (config.get("networks") or {}).items():
        if "class" not in part:
            parser.add_class_arguments(FurtherNetwork, f"networks.{name}")
            defaults |= {f"networks.{name}.{key}": value for key, value in part.items()}
    for section, table in SINGLE.items():
        part = config.get(section)
        if part is not None:
            build_component(section, part, table)  # unknown names are refused in our words
            parser.add_class_arguments(table[part["name"]], section)
            defaults |= {f"{section}.{key}": value for key, value in part.items() if key != "name"}
    for section, what, table in LISTS:
        for name, kind in table.items():
            parser.add_class_arguments(kind, f"{section}.{name}")
        for part in config.get(section) or ():
            build_component(what, part, table)
            defaults |= {f"{section}.{part['name']}.{key}": value for key, value in part.items() if key != "name"}
    for section, kind in (("optimizer", SGD), ("schedule", Schedule), ("training", Settings)):
        parser.add_class_arguments(kind, section)
        defaults |= {f"{section}.{key}": value for key, value in config[section].items()}
    for action in list(parser._actions):
        hint = getattr(action, "_typehint", None)
        if hint is not None:
            action._typehint = _importing_nothing(hint)  # type: ignore[attr-defined]
        elif (
            action.metavar == "CONFIG"
        ):  # --attack FILE_OR_CLASS: jsonargparse would read the file, or import the class
            parser._remove_action(action)
            action.help = SUPPRESS
            for option in action.option_strings:
                del parser._option_string_actions[option]
    try:
        parser.set_defaults(defaults)
    except (ArgumentError, KeyError, TypeError, ValueError) as error:
        raise HoldfastError(f"the configuration is wrong: {_one_line(str(error))}") from None
    return parser


def _importing_nothing(hint: Any) -> Any:
    """Return a type hint for which jsonargparse imports nothing.

    It imports the function that a word names where a Callable is expected, and the ``class_path`` of a mapping where
    anything is expected. So functions cannot be given here, and a mapping holds what a schedule has.
    """
    if get_origin(hint) in (Union, UnionType):
        kinds = [_importing_nothing(kind) for kind in get_args(hint) if get_origin(kind) is not Callable]
        return Union[tuple(kinds)]  # noqa: UP007
    if get_origin(hint) is Mapping:
        return dict[str, str | Sequence[Sequence[float]]]
    return hint


def shortened(value: str) -> str:
    """Return a value as a message shows it."""
    return repr(value if len(value) <= 60 else f"{value[:50]} …")


def _one_line(message: str) -> str:
    """What jsonargparse says, in a line."""
    key = re.search(r'key "([^"]+)"', message)
    kinds = re.findall(r"Expected an? (?:<class ')?([^\n]+?)(?:'>|\. Got|$)", message, re.MULTILINE)
    value = re.search(r"(?:Got|Given) value: ([^\n]*)", message)
    if key and kinds and value:
        words = re.findall(r"'([^']+)'", kinds[0]) if kinds[0].startswith("typing.Literal") else []
        if words:
            return f"--{key.group(1)} {value.group(1).strip()!r} is unknown: use {' or '.join(words)}"
        names = {
            "collections.abc.Sequence": "list",
            "collections.abc.Mapping": "schedule",
            "dict": "schedule",
            "NoneType": "null",
        }
        expected = " or ".join(str(names.get(kind, kind)).removeprefix("typing.") for kind in kinds)
        return f"--{key.group(1)} {value.group(1).strip()!r} is no {expected}: see `holdfast train RECIPE --help`"
    if key and value:
        return f"--{key.group(1)} cannot be {value.group(1).strip()!r}: see `holdfast train RECIPE --help`"
    return " ".join(message.split())[:300]
