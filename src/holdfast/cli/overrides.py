"""`--section.key value`: every setting of every part of a recipe, checked against the part's own signature."""

from __future__ import annotations

import copy
import re
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from holdfast.cli.arguments import unknown_option
from holdfast.components import ATTACKS, AVERAGES, OBJECTIVES
from holdfast.configuration import build_component, settings_of, unknown_name
from holdfast.errors import HoldfastError
from holdfast.recipe import SGD
from holdfast.schedule import Schedule
from holdfast.setup import Settings
from holdfast.threat import THREATS, parse_fraction

Config = dict[str, Any]


def override(config: Mapping[str, Any], words: Sequence[str]) -> Config:
    """The configuration with settings from the command line.

    Args:
        config: As `holdfast.setup.run_config` writes it.
        words: ``--section.key=value``. Values are YAML; a fraction such as ``2/255`` is a number.

    Raises:
        HoldfastError: an unknown section or key, with the nearest, or a value of the wrong kind.
    """
    config = copy.deepcopy(dict(config))
    words = [_choose_kind(config, word) for word in words]
    model = [word for word in words if word.startswith("--model.")]
    for word in model:
        key, _, value = word[len("--model.") :].partition("=")
        config["model"][key] = yaml.safe_load(value)
    words = [_with_number(word) for word in words if word and word not in model]
    if not words:
        return config
    parser = section_parser(config)
    touched = {word[len("--averages.") :].partition(".")[0] for word in words if word.startswith("--averages.")}
    known = list(parser._option_string_actions)
    for word in words:
        if not word.startswith("--") or word.partition("=")[0] not in known:
            raise unknown_option(word, known)
    try:
        read = parser.parse_args(words).as_dict()
    except ArgumentError as error:
        raise HoldfastError(_one_line(str(error))) from None
    for section in ("threat", "attack", "objective", "optimizer", "schedule", "training"):
        if section in read:
            config[section] = {**(config[section] or {}), **read[section]}
    present = [average["name"] for average in config["averages"]]
    for name in touched.difference(present):
        config["averages"].append({"name": name})
    for average in config["averages"]:
        average.update(read["averages"][average["name"]])
    return config


def _choose_kind(config: Config, word: str) -> str:
    """Act on ``--attack.name=fgsm`` and its like at once, since the other settings depend on it."""
    for section, table in (("attack", ATTACKS), ("objective", OBJECTIVES)):
        if word.startswith(f"--{section}.name="):
            name = word.partition("=")[2]
            if name not in table:
                raise unknown_name(section, name, table)
            if (config[section] or {}).get("name") != name:
                config[section] = {"name": name, **settings_of(table[name]())}
            return ""
    return word


def _with_number(word: str) -> str:
    """Fractions as numbers; epsilon keeps its text, which says its own unit."""
    name, equals, value = word.partition("=")
    number = parse_fraction(value)
    return word if number is None else f"{name}{equals}{number!r}"


def section_parser(config: Mapping[str, Any], prog: str = "holdfast train") -> ArgumentParser:
    """A parser of all sections, with the configuration's values as defaults."""
    parser = ArgumentParser(prog=prog, exit_on_error=False)
    parser.add_class_arguments(THREATS[config["threat"]["norm"]], "threat", skip={"epsilon"})
    defaults: Config = {}
    for section, table in (("attack", ATTACKS), ("objective", OBJECTIVES)):
        part = config.get(section)
        if part is not None:
            build_component(section, part, table)  # unknown names are refused in our words
            parser.add_class_arguments(table[part["name"]], section)
            defaults |= {f"{section}.{key}": value for key, value in part.items() if key != "name"}
    for name, kind in AVERAGES.items():
        parser.add_class_arguments(kind, f"averages.{name}")
    for average in config["averages"]:
        defaults |= {f"averages.{average['name']}.{key}": value for key, value in average.items() if key != "name"}
    for section, kind in (("optimizer", SGD), ("schedule", Schedule), ("training", Settings)):
        parser.add_class_arguments(kind, section)
        defaults |= {f"{section}.{key}": value for key, value in config[section].items()}
    try:
        parser.set_defaults(defaults)
    except (ArgumentError, KeyError, TypeError, ValueError) as error:
        raise HoldfastError(f"the configuration is wrong: {_one_line(str(error))}") from None
    return parser


def _one_line(message: str) -> str:
    """What jsonargparse says, in a line."""
    key = re.search(r'key "([^"]+)"', message)
    expected = re.search(r"Expected an? (?:<class ')?([\w.\[\], |]+)", message)
    value = re.search(r"Got value: ([^\n]*)", message)
    if key and expected and value:
        return f"--{key.group(1)} {value.group(1).strip()!r} is no {expected.group(1)}: see `holdfast train RECIPE --help`"
    if key and value:
        return f"--{key.group(1)} cannot be {value.group(1).strip()!r}: see `holdfast train RECIPE --help`"
    return " ".join(message.split())[:300]
