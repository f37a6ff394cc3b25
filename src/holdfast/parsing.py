"""Parsing JSON and YAML that somebody else may have written: plain values only, and limits before anything is built.

A few bytes of JSON or YAML can ask for any depth, any number of values, or numbers of any length. This module is the
only one that calls `json.loads` or a YAML loader. What it returns consists of None, bool, int, finite float, str, list
and dict with text as keys; keys do not repeat, and nesting ends at `DEPTH`.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from holdfast.errors import Damaged, HoldfastError
from holdfast.regular_files import readable_size

DEPTH = 64
"""How many lists and mappings may lie in each other. The files of this package need 6."""

JSON_BYTES = 16 << 20
"""The largest JSON document. The longest ones list the images of an evaluation: 50,000 numbers are 0.4 MB."""

LINES_BYTES = 256 << 20
"""The largest file of JSON lines. A ledger of 50,000 images under ten attacks has 40 MB."""

YAML_BYTES = 1 << 20
"""The largest YAML document. A config.yaml has 3 kB."""

_LINE_BYTES = 1 << 20
_COST = 2_000_000  # of a JSON document, in parts of about 64 bytes of memory
_LINES_COST = 8_000_000  # of all lines of a file: 160 for each of 50,000 images, and a ledger needs 120
_LINE_COST = 20  # of a line, for the time it takes
_YAML_VALUES = 20_000  # they take half a second
_DIGITS = 40  # of a whole number; Python's conversion takes quadratic time

_ADVICE = "restore it, or make it anew"
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{},:'))
_WINDOW = 1 << 16
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class _Refused(ValueError):
    """The reason for a refusal, without the name of the file."""


def parse_json(content: bytes | str, what: str, *, advice: str = _ADVICE, most: int = JSON_BYTES) -> Any:
    """Return the value of a JSON document.

    Args:
        content: The document; bytes must be UTF-8.
        what: What the message calls it, mostly its path.
        advice: What the message tells a person to do.
        most: The largest document in bytes.
    Raises:
        Damaged: It is no JSON, too large or too deep, repeats a key, or holds NaN, an infinity, or a whole
            number of more than 40 digits.
    Example:
        >>> parse_json('{"a": [1, 2.5, null]}', "it")
        {'a': [1, 2.5, None]}
        >>> parse_json('{"a": 1, "a": 2}', "it")
        Traceback (most recent call last):
            ...
        holdfast.errors.Damaged: it is damaged (key 'a' occurs twice): restore it, or make it anew
    """
    try:
        raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        _require_size(raw, most)
        _require_small(raw, _COST)
        return _json_value(raw)
    except _Refused as refused:
        raise Damaged(f"{what} is damaged ({refused})", advice) from None


def parse_json_lines(content: bytes, what: str, *, advice: str = _ADVICE) -> list[Any]:
    """Return the values of a file with one JSON document a line.

    Raises:
        Damaged: As `parse_json`; the message names the line.
    """
    values: list[Any] = []
    left, where = _LINES_COST, what
    try:
        _require_size(content, LINES_BYTES)
        for line in io.BytesIO(content):
            where = f"line {len(values) + 1} of {what}"
            line = line.rstrip(b"\r\n")
            _require_size(line, _LINE_BYTES)
            left -= _LINE_COST + _require_small(line, min(left, _COST))
            values.append(_json_value(line))
    except _Refused as refused:
        raise Damaged(f"{where} is damaged ({refused})", advice) from None
    return values


def through_json(value: Any) -> Any:
    """Return a value of this process as it will be after it was written as JSON and read again.

    Example:
        >>> through_json({"knots": ((0, 1),)})
        {'knots': [[0, 1]]}
    """
    return json.loads(json.dumps(value))


def parse_yaml(content: bytes | str, what: str, *, advice: str, typed: bool = False) -> Any:
    """Return the value of a YAML document; nothing in it is executed.

    Tags, anchors, aliases and merge keys are refused. Dates, numbers in other bases and numbers with colons are text.

    Args:
        content: The document; bytes must be UTF-8.
        what: What the message calls it, mostly its path.
        advice: What the message tells a person to do.
        typed: A person typed it: ``1e-3``, which is text in a YAML file, is a number.
    Raises:
        HoldfastError: It is no YAML, too large or too deep, repeats a key, or holds anything but plain values.
    Example:
        >>> parse_yaml("{a: [1, 2.5, null], b: 1e-3}", "it", advice="mend it")
        {'a': [1, 2.5, None], 'b': '1e-3'}
        >>> parse_yaml("1e-3", "it", advice="mend it", typed=True)
        0.001
        >>> parse_yaml("a: &x [1]\\nb: *x", "it", advice="mend it")
        Traceback (most recent call last):
            ...
        holdfast.errors.HoldfastError: it is no YAML of plain values (anchor &x in line 1): mend it
    """
    try:
        raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        _require_size(raw, YAML_BYTES)
        loader = (_TypedLoader if typed else _PlainLoader)(_text(raw))
        try:
            value = loader.get_single_data()
            _require_text(value)
            return value
        finally:
            loader.dispose()
    except _Refused as refused:
        reason = str(refused)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
    raise HoldfastError(f"{what} is no YAML of plain values ({reason}): {advice}")


def _require_size(raw: bytes, most: int) -> None:
    if len(raw) > most:
        raise _Refused(f"it has {readable_size(len(raw))}, at most {readable_size(most)} are read")


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Refused(f"byte {error.start} is not UTF-8 text") from None


def _require_small(raw: bytes, most: int) -> int:
    """Refuse a JSON document that is nested too deep or would take too much memory, before it is parsed.

    Only brackets, commas and colons outside strings are looked at. They tell the depth, and about how much memory the
    values will take: the result, in parts of 64 bytes, where a mapping takes four more than the values in it.
    """
    is_short = len(raw) < 1000 and raw.count(b"[") + raw.count(b"{") <= DEPTH
    signs = raw if is_short else _outside_strings(raw)
    cost = 1 + signs.count(b",") + signs.count(b":") + signs.count(b"[") + 4 * signs.count(b"{")
    if cost > most:
        raise _Refused("it has more values than such a file can need")
    if is_short:
        return cost
    depth = deepest = 0
    for sign in signs.translate(None, b",:"):
        depth += 1 if sign in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > DEPTH:
        raise _Refused(f"it is nested {deepest} deep, at most {DEPTH} are read")
    return cost


def _outside_strings(raw: bytes) -> bytes:
    """Return a document's brackets, commas and colons. Without escaped quotes, a string ends at the next quote."""
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_STRUCTURE)
    outside, inside_string = bytearray(), 0
    for start in range(0, len(bare), _WINDOW):  # all at once, the parts would take more memory than the document
        parts = bare[start : start + _WINDOW].split(b'"')
        for part in parts[inside_string::2]:
            outside += part
        inside_string = (inside_string + len(parts) - 1) % 2
    return bytes(outside)


def _json_value(raw: bytes) -> Any:
    try:
        value = json.loads(
            _text(raw), object_pairs_hook=_mapping, parse_int=_whole, parse_float=_finite, parse_constant=_constant
        )
    except _Refused:
        raise
    except (ValueError, RecursionError) as error:
        raise _Refused(f"it holds no JSON ({error})") from None
    if b"\\u" in raw:
        _require_text(value)
    return value


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _Refused(f"key {twice!r} occurs twice")
    return mapping


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise _Refused(f"a whole number has {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Refused(f"number {digits[:_DIGITS]} is too large")
    return value


def _constant(name: str) -> float:
    raise _Refused(f"{name} is no number of JSON")


def _require_text(value: Any) -> None:
    """Refuse half of a surrogate pair, which an escape can spell and which no file or terminal can take."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            left += one
        elif isinstance(one, str) and _SURROGATE.search(one):
            raise _Refused(f"{one[:40]!r} is no text")


class _PlainLoader(yaml.SafeLoader):
    """A YAML loader that refuses what is not plain while it reads, before anything is built of it."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  # as in yaml's own classes; filled below

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = self.values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        where = f"in line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(f"alias *{event.anchor} {where}")
        if event.anchor is not None:
            raise _Refused(f"anchor &{event.anchor} {where}")
        if getattr(event, "tag", None) is not None:
            raise _Refused(f"tag {event.tag} {where}")
        self.values += 1
        if self.values > _YAML_VALUES:
            raise _Refused(f"it has more than {_YAML_VALUES} values")
        if self.depth >= DEPTH and not isinstance(event, yaml.ScalarEvent):
            raise _Refused(f"it is nested more than {DEPTH} deep {where}")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _Refused(f"key {str(key)[:40]} in line {line} is no text")
            if key in mapping:
                raise _Refused(f"key {key!r} occurs twice, the second time in line {line}")
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping


class _TypedLoader(_PlainLoader):
    """The same for what a person typed."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012


def _construct_whole(loader: _PlainLoader, node: yaml.ScalarNode) -> int:
    return _whole(str(loader.construct_scalar(node)))


def _construct_number(loader: _PlainLoader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node))
    if text.lower().lstrip("+-") in (".inf", ".nan"):
        raise _Refused(f"{text} in line {node.start_mark.line + 1} is no finite number")
    return _finite(text)


def _teach(loader: type[_PlainLoader], number: str) -> None:
    """Say which bare words are more than text: those of YAML 1.1, without its dates and its numbers in base 60."""
    words = "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"
    for kind, pattern, first in (
        ("bool", words, "yYnNtTfFoO"),
        ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("int", "[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
        ("float", rf"{number}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.0123456789"),
    ):
        loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), list(first))
    loader.add_constructor("tag:yaml.org,2002:int", _construct_whole)
    loader.add_constructor("tag:yaml.org,2002:float", _construct_number)


_teach(_PlainLoader, r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?")
_teach(_TypedLoader, r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
