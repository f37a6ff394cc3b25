"""A recipe as plain values, and back: what stands in config.yaml."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

from holdfast.components import ATTACKS, AUGMENTATIONS, AVERAGES, MIXINGS, OBJECTIVES, STEPS, VIEWS
from holdfast.errors import HoldfastError, unknown_name
from holdfast.further_network import FurtherNetwork
from holdfast.models.own_file import names_code
from holdfast.recipe import SGD, Recipe
from holdfast.schedule import Scalar, Schedule
from holdfast.setting_types import check_settings, fits, in_words, shown
from holdfast.settings import Settings
from holdfast.threat import THREATS, parse_epsilon

SCALARS: dict[str, Any] = {
    "epochs": int,
    "batch_size": int,
    "warmup": float,
    "label_smoothing": float,
    "gradient_clip": float | None,
    "input_noise": Scalar,
    "train_ball": Scalar | Literal["unbounded"] | None,
    "extra_share": float,
    "fine_tuning": bool,
}
"""Fields of a recipe that are plain numbers or schedules, and their types."""


SINGLE: dict[str, Mapping[str, type[Any]]] = {
    "attack": ATTACKS,
    "objective": OBJECTIVES,
    "augmentation": AUGMENTATIONS,
    "mixing": MIXINGS,
    "step": STEPS,
}
"""Sections of which a recipe has one part or none, and what it may be."""


def settings_of(component: object) -> dict[str, Any]:
    """A component's constructor arguments, which it keeps under their own names."""
    names = [name for name in inspect.signature(type(component)).parameters if name not in ("args", "kwargs")]
    return {name: _plain(getattr(component, name)) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.as_config()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return f"{type(value).__module__}.{type(value).__qualname__}" if callable(value) else value


def _named(component: object | None, table: Mapping[str, type[Any]]) -> dict[str, Any] | None:
    """``{"name": …, settings}``, or ``{"class": …}`` for a part that a person wrote and no table holds."""
    if component is None:
        return None
    for name, kind in table.items():
        if type(component) is kind:
            return {"name": name, **settings_of(component)}
    return {"class": f"{type(component).__module__}.{type(component).__qualname__}"}


def _network(network: Any) -> dict[str, Any]:
    """A further network's settings; one given from Python is only named."""
    if isinstance(network, FurtherNetwork):
        return settings_of(network)
    return {"class": f"{type(network).__module__}.{type(network).__qualname__}"}


def _read_network(name: str, config: Mapping[str, Any], known_code: Collection[str]) -> FurtherNetwork:
    _check_network(name, config)
    if names_code(config.get("model")) and f"networks/{name}" not in known_code:
        raise HoldfastError(
            f"the configuration names the code {config['model']} for network {name!r}: read it with"
            " holdfast.runs.own_code.configured_code, give that to fit as code=, and its keys here as known_code="
        )
    return FurtherNetwork(**config)


def _check_network(name: str, config: Mapping[str, Any]) -> None:
    if "class" in config:
        raise HoldfastError(f"network {name!r} was given from Python: run it from Python again, with fit()")
    check_settings(f"network {name}", FurtherNetwork, config)


def recipe_config(recipe: Recipe) -> dict[str, Any]:
    """A recipe as nested dictionaries of plain values."""
    threat = {"norm": recipe.threat.norm, **settings_of(recipe.threat)}
    if recipe.threat.epsilon > 1:
        threat["epsilon"] = f"{recipe.threat.epsilon:g}/1"  # a bare number above 1 would be refused when read again
    return {
        "recipe": recipe.name,
        "threat": threat,
        **{section: _named(getattr(recipe, section), table) for section, table in SINGLE.items()},
        "networks": {name: _network(network) for name, network in recipe.networks.items()},
        "views": [_named(view, VIEWS) for view in recipe.views],
        "averages": [_named(average, AVERAGES) for average in recipe.averages],
        "optimizer": settings_of(recipe.optimizer),
        "schedule": recipe.schedule.as_config(),
        **{name: _plain(getattr(recipe, name)) for name in SCALARS},
    }


def build_component(
    what: str, config: Mapping[str, Any] | None, table: Mapping[str, type[Any]], key: str = "name"
) -> Any:
    """A part from its configuration.

    Raises:
        HoldfastError: an unknown name or setting, with the nearest; or a part of the user's own, which only Python
            code can give.
    """
    if config is None:
        return None
    check_part(what, config, table, key)
    return table[config[key]](**{name: value for name, value in config.items() if name != key})


def check_part(what: str, config: Mapping[str, Any], table: Mapping[str, type[Any]], key: str = "name") -> None:
    """Refuse a part's configuration with an unknown name or setting, or a value of another type.

    Raises:
        HoldfastError: says which; also a part of the user's own, which only Python code can give.
    """
    name = config.get(key)
    if name is None and key == "name":
        own = shown(config.get("class"))
        raise HoldfastError(f"{what} {own} was given from Python: run it from Python again, with fit()")
    if not isinstance(name, str) or name not in table:
        raise unknown_name(what, name if isinstance(name, str | None) else shown(name), table)
    settings = {setting: value for setting, value in config.items() if setting != key}
    if key == "norm" and isinstance(settings.get("epsilon"), str):
        parse_epsilon(settings.pop("epsilon"))  # text says its own unit
    check_settings(f"{what} {name}" if key == "name" else "threat", table[name], settings)


def build_recipe(config: Mapping[str, Any], *, known_code: Collection[str] = ()) -> Recipe:
    """The recipe of a configuration.

    Args:
        config: As `recipe_config` writes it.
        known_code: Parts such as ``networks/guide`` whose code `fit` is given, or that a person has named. A recipe
            with any other is refused: it would look as if the caller had named the file.

    Raises:
        HoldfastError: something is missing, unknown or out of range.
    """
    try:
        recipe = Recipe(
            name=config["recipe"],
            threat=build_component("threat norm", config["threat"], THREATS, "norm"),
            objective=build_component("objective", config["objective"], OBJECTIVES),
            **{
                section: build_component(section, config.get(section), table)
                for section, table in SINGLE.items()
                if section != "objective"
            },
            networks={
                name: _read_network(name, part, known_code) for name, part in (config.get("networks") or {}).items()
            },
            views=tuple(build_component("view", view, VIEWS) for view in config.get("views") or ()),
            averages=tuple(build_component("average", average, AVERAGES) for average in config.get("averages") or ()),
            optimizer=SGD(**config["optimizer"]),
            schedule=Schedule(**config["schedule"]),
        )
        return replace(recipe, **{name: config[name] for name in SCALARS if name in config})
    except KeyError as error:
        raise HoldfastError(f"the configuration lacks {error}: start from the config.yaml of a run") from None
    except TypeError as error:
        raise HoldfastError(f"the configuration is wrong: {error}; compare it with the config.yaml of a run") from None


KEYS = (
    "recipe", "threat", *SINGLE, "networks", "views", "averages", "optimizer", "schedule", *SCALARS,
    "data", "model", "seed", "init", "training", "resolved",
)  # fmt: skip

KINDS: dict[str, type[Any]] = {
    "threat": Mapping, "objective": Mapping, "averages": list, "optimizer": Mapping, "schedule": Mapping,
    "data": str, "model": Mapping, "seed": int, "training": Mapping,
}  # fmt: skip

_RECIPE_NAME = re.compile(r"[^/\\\0-\x1f]{1,100}")
_NETWORK_NAME = re.compile(r"[A-Za-z]\w{0,63}", re.ASCII)
_FROM_DATA = ("num_classes", "channels", "image_size")


def check_keys(config: Mapping[str, Any]) -> None:
    """Refuse a configuration with unknown or missing keys, or with values of the wrong kind anywhere.

    Raises:
        HoldfastError: names the key, and the nearest known one or what it takes.
    """
    for key in config:
        if key not in KEYS:
            raise unknown_name("configuration key", key, KEYS)
    for key in ("recipe", *KINDS):
        if key not in config:
            raise HoldfastError(f"the configuration lacks {key!r}: start from the config.yaml of a run")
    optional: dict[str, type[Any]] = {section: Mapping for section in (*SINGLE, "networks") if section != "objective"}
    optional |= {"views": list, "init": str}
    for key, kind in (*KINDS.items(), *optional.items()):
        value = config.get(key)
        if value is None and key in optional:
            continue
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, str) and not fits(value, str)):
            raise _wrong(key, value)
    for key in ("views", "averages"):
        if not all(isinstance(part, Mapping) for part in config.get(key) or ()):
            raise HoldfastError(
                f"the configuration's {key!r} is no list of mappings: write - name: … as config.yaml does"
            )
    if not isinstance(config["recipe"], str) or not _RECIPE_NAME.fullmatch(config["recipe"]):
        raise _wrong("recipe", config["recipe"])
    if not -(2**63) <= config["seed"] < 2**63:
        raise _wrong("seed", config["seed"])
    _check_parts(config)
    _check_model(config["model"])


def _check_parts(config: Mapping[str, Any]) -> None:
    """Compare every value with the type of its setting."""
    check_part("threat norm", config["threat"], THREATS, "norm")
    for section, table in SINGLE.items():
        if config.get(section) is not None:
            check_part(section, config[section], table)
    for section, what, table in (("views", "view", VIEWS), ("averages", "average", AVERAGES)):
        for part in config.get(section) or ():
            check_part(what, part, table)
    for name, part in (config.get("networks") or {}).items():
        if not isinstance(part, Mapping) or not _NETWORK_NAME.fullmatch(name):
            raise _wrong(f"networks.{name}", part)
        _check_network(name, part)
    check_settings("optimizer", SGD, config["optimizer"])
    check_settings("schedule", Schedule, config["schedule"])
    check_settings("training", Settings, config["training"])
    for name, hint in SCALARS.items():
        if name in config and not fits(config[name], hint):
            raise HoldfastError(f"{name} is {shown(config[name])}: give {in_words(hint)}")


def _check_model(model: Mapping[str, Any]) -> None:
    """The options of a network that is named are checked where it is built; those of a person's own are its own."""
    name = model.get("name")
    if name is not None and not fits(name, str):
        raise _wrong("model.name", name)
    for option in _FROM_DATA:
        if option in model:
            raise HoldfastError(f"the configuration's model has {option!r}, which the data decides: leave it out")


def _wrong(key: str, value: Any) -> HoldfastError:
    return HoldfastError(f"the configuration's {key!r} is {shown(value)}: write it as in the config.yaml of a run")
