"""Checking plain values from a configuration against the signature of what they are settings of.

A component's constructor checks ranges, and trusts that a number is a number. A configuration may hold anything in any
place. So its values are compared with the annotations first, and the refusal names the setting and what it takes.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from holdfast.errors import HoldfastError, unknown_name

MOST_COUNT = 10**9
"""The largest whole number that counts something."""

_LONGEST_TEXT = 4096
_LONGEST_LIST = 100_000
_SCHEDULE = ("knots", "interpolation", "by")


def check_settings(what: str, kind: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    """Refuse settings that a constructor does not have, or whose values are not of the annotated types.

    Numbers must be finite, counts at most a billion. Functions and objects are never plain, so they are refused.

    Args:
        what: What it is, for the message.
        kind: A class or function whose parameters are annotated.
        settings: Values by the names of parameters.
    Raises:
        HoldfastError: names the setting, and the nearest known one or what it takes.
    Example:
        >>> def blur(*, radius: float, passes: int = 1) -> None: ...
        >>> check_settings("blur", blur, {"radius": 2})
        >>> check_settings("blur", blur, {"radius": "wide"})
        Traceback (most recent call last):
            ...
        holdfast.errors.HoldfastError: blur: radius is 'wide': give a number
        >>> check_settings("blur", blur, {"radios": 2})
        Traceback (most recent call last):
            ...
        holdfast.errors.HoldfastError: setting of blur 'radios' is unknown: did you mean radius?
    """
    hints = hints_of(kind)
    for name, value in settings.items():
        if name not in hints:
            raise unknown_name(f"setting of {what}", name, hints)
        if not fits(value, hints[name]):
            raise HoldfastError(f"{what}: {name} is {shown(value)}: give {in_words(hints[name])}")


@cache
def hints_of(kind: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of a constructor's or function's parameters, in order."""
    function = kind.func if isinstance(kind, partial) else kind
    hints = get_type_hints(function.__init__ if isinstance(function, type) else function)
    if isinstance(function, type):
        hints = {**get_type_hints(function), **hints}
    parameters = inspect.signature(kind).parameters.values()
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {each.name: hints.get(each.name, Any) for each in parameters if each.kind not in open_ended}


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type.

    Example:
        >>> fits(3, float), fits(True, int), fits([1, 2], Sequence[float]), fits("a", Literal["a", "b"])
        (True, False, True, True)
    """
    origin, kinds = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, kind) for kind in kinds)
    if origin is Literal:
        return any(type(value) is type(word) and value == word for word in kinds)
    if hint in (None, type(None)):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST_COUNT
    if hint is float:
        return _is_number(value)
    if hint is str:
        return isinstance(value, str) and len(value) <= _LONGEST_TEXT and "\0" not in value
    if origin in (Sequence, list, tuple):
        return _is_list(value, origin, kinds)
    return _is_schedule(value) if origin is Mapping else False


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def _is_list(value: Any, origin: Any, kinds: tuple[Any, ...]) -> bool:
    if not isinstance(value, list | tuple) or len(value) > _LONGEST_LIST:
        return False
    if origin is tuple and Ellipsis not in kinds:
        return len(value) == len(kinds) and all(fits(one, kind) for one, kind in zip(value, kinds, strict=True))
    return all(fits(one, kinds[0] if kinds else Any) for one in value)


def _is_schedule(value: Any) -> bool:
    if not isinstance(value, dict) or "knots" not in value or not value.keys() <= set(_SCHEDULE):
        return False
    words = (value.get(name, "") for name in _SCHEDULE[1:])
    return fits(value["knots"], Sequence[tuple[float, float]]) and all(isinstance(word, str) for word in words)


def in_words(hint: Any) -> str:
    """Return what a type takes, as advice.

    Example:
        >>> in_words(int | None), in_words(Sequence[float]), in_words(Literal["a", "b"] | bool)
        ('a whole number or null', 'a list of numbers', 'a or b or true or false')
    """
    origin, kinds = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        words = (in_words(kind) for kind in kinds if get_origin(kind) is not Callable)
        return " or ".join(dict.fromkeys(words))
    if origin is Literal:
        return " or ".join(map(str, kinds))
    if origin is tuple and Ellipsis not in kinds:
        return f"a list of {len(kinds)} numbers"
    if origin in (Sequence, list, tuple):
        inner = in_words(kinds[0]) if kinds else "values"
        return f"a list of {_PLURALS.get(inner, inner)}"
    if origin is Mapping:
        return "a schedule such as {knots: [[0, 1], [1, 0]]}"
    return _WORDS.get(hint, "another value")


def shown(value: Any) -> str:
    """Return a value as a message shows it: in one line, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:70]} …"


_WORDS = {
    float: "a number",
    int: "a whole number",
    str: "text",
    bool: "true or false",
    None: "null",
    type(None): "null",
}
_PLURALS = {
    "a number": "numbers",
    "a whole number": "whole numbers",
    "text": "words",
    "a list of numbers": "lists of numbers",
}
