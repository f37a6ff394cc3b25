"""Checking what config.json of a model folder says, before anything is built of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.errors import Damaged, HoldfastError
from holdfast.models import factory
from holdfast.models.extra_state import is_extra
from holdfast.setting_types import check_settings, fits, hints_of, in_words, shown
from holdfast.threat import THREATS

_MOST_CLASSES = 1_000_000
_LONGEST_SIDE = 65_536
_ADVICE = "restore it or train anew"
_TEXTS = {"recipe": str, "data": str, "holdfast": str, "epoch": int, "format": int}


def check_description(description: Mapping[str, Any], where: str) -> None:
    """Refuse a description that lacks what every model folder says, or says it with values of other kinds.

    Args:
        description: As `holdfast.setup.description` makes it.
        where: The path of the file.
    Raises:
        Damaged: names the key, with what it must be.
    """
    for key in ("model", "input", "threat"):
        if not isinstance(description.get(key), Mapping):
            raise Damaged(f"{where} is damaged (it lacks {key!r})", _ADVICE)
    for key, kind in _TEXTS.items():
        if key in description and not fits(description[key], kind):
            raise _wrong(where, key, description[key], in_words(kind))
    classes = description.get("classes")
    if (
        not isinstance(classes, list)
        or not 2 <= len(classes) <= _MOST_CLASSES
        or not all(fits(name, str) for name in classes)
        or len(set(classes)) < len(classes)
    ):
        raise _wrong(where, "classes", classes, "a list of at least two different names")
    _check_input(description["input"], where)
    _check_threat(description["threat"], where)
    _check_model(description["model"], len(classes), where)
    beside = description.get("extra_state", {})
    if not isinstance(beside, Mapping) or not all(is_extra(name) for name in beside):
        raise _wrong(where, "extra_state", beside, "a mapping by names that end in _extra_state")
    code = description.get("code", {"sha256": ""})
    if not isinstance(code, Mapping) or not fits(code.get("sha256"), str):
        raise _wrong(where, "code", code, "a mapping with the sha256 of the model's own code")


def _check_input(found: Mapping[str, Any], where: str) -> None:
    for key in ("channels", "height", "width"):
        most = factory.MOST_CHANNELS if key == "channels" else _LONGEST_SIDE
        if not fits(found.get(key), int) or not 1 <= found[key] <= most:
            raise _wrong(where, f"input.{key}", found.get(key), f"a whole number from 1 to {most}")


def _check_threat(found: Mapping[str, Any], where: str) -> None:
    norm, epsilon = found.get("norm"), found.get("epsilon", -1)
    if not isinstance(norm, str) or norm not in THREATS:
        raise _wrong(where, "threat.norm", norm, " or ".join(THREATS))
    if not fits(epsilon, float) or not epsilon >= 0:
        raise _wrong(where, "threat.epsilon", epsilon, "a number of at least 0")


def _check_model(model: Mapping[str, Any], count: int, where: str) -> None:
    name = model.get("name")
    if name is None:  # a module from Python, which is known by its class
        if not fits(model.get("class"), str):
            raise _wrong(where, "model.class", model.get("class"), "the name of a class")
        return
    if not fits(name, str) or not name:
        raise _wrong(where, "model.name", name, "the name of a network")
    known = hints_of(factory.build)
    try:
        check_settings("model", factory.build, {key: value for key, value in model.items() if key in known})
    except HoldfastError as error:
        raise Damaged(f"{where} is damaged ({error})", _ADVICE) from error
    if model.get("num_classes") != count:
        raise _wrong(where, "model.num_classes", model.get("num_classes"), f"{count}, as many as there are classes")
    for side in model.get("image_size", ()):
        if not 1 <= side <= _LONGEST_SIDE:
            raise _wrong(where, "model.image_size", model["image_size"], f"sides from 1 to {_LONGEST_SIDE}")


def _wrong(where: str, key: str, value: Any, wanted: str) -> Damaged:
    return Damaged(f"{where} is damaged ({key} is {shown(value)}, not {wanted})", _ADVICE)
