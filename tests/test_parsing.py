"""JSON and YAML: plain values come through, and whatever is absurd is refused before it is built."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import yaml

import holdfast
from holdfast.errors import HoldfastError
from holdfast.parsing import JSON_BYTES, YAML_BYTES, parse_json, parse_json_lines, parse_yaml, through_json

PLAIN = {"a": [1, -2.5, None, True, 'text, with "signs" \\ ] } [ and ü'], "b": {"c": {}, "d": [[]]}, "": "[[[["}


def refusal_of_json(content: bytes | str) -> str:
    with pytest.raises(HoldfastError) as refusal:
        parse_json(content, "it")
    return str(refusal.value)


def refusal_of_yaml(content: bytes | str) -> str:
    with pytest.raises(HoldfastError) as refusal:
        parse_yaml(content, "it", advice="mend it")
    message = str(refusal.value)
    assert message.endswith(": mend it")
    assert "\n" not in message
    return message


def test_plain_values_come_through() -> None:
    """As text, as bytes, with a byte order mark, indented, in lines, and as YAML."""
    text = json.dumps(PLAIN)
    assert parse_json(text, "it") == PLAIN
    assert parse_json(b"\xef\xbb\xbf" + json.dumps(PLAIN, ensure_ascii=False).encode(), "it") == PLAIN
    assert parse_json(json.dumps(PLAIN, indent=2), "it") == PLAIN
    assert parse_json_lines(f"{text}\n{text}\n".encode(), "it") == [PLAIN, PLAIN]
    assert parse_json_lines(b"", "it") == []
    assert parse_yaml(yaml.safe_dump(PLAIN), "it", advice="") == PLAIN
    assert parse_yaml(text, "it", advice="") == PLAIN
    assert through_json({"a": (1, 2)}) == {"a": [1, 2]}


def test_every_kind_of_plain_yaml() -> None:
    """What a dumper writes is read as it was; dates, odd bases and base 60 stay text."""
    plain = {"yes": "no", "n": None, "f": [0.001, 1e-05, 1e300, -0.0], "i": [0, -3, 10**30], "s": "1e3", "o": "on"}
    plain |= {"date": "2020-01-01", "octal": "010", "sixty": "1:30", "hex": "0x10", "tilde": "~", "empty": ""}
    assert parse_yaml(yaml.safe_dump(plain), "it", advice="") == plain
    bare = parse_yaml("a: 2020-01-01\nb: 1:30\nc: 010\nd: off\ne: ~\nf: 1e3\n", "it", advice="")
    assert bare == {"a": "2020-01-01", "b": "1:30", "c": "010", "d": False, "e": None, "f": "1e3"}
    assert parse_yaml("[1e3, 1e-3, 2.5]", "it", advice="", typed=True) == [1000.0, 0.001, 2.5]


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":'])
def test_deep_json(opening: str) -> None:
    """Refused with its depth, closed or not; 64 levels pass, and brackets in strings do not count."""
    assert "is nested" in refusal_of_json(opening * 100_000)
    assert parse_json("[" * 64 + "]" * 64, "it")
    assert "it is nested 65 deep, at most 64 are read" in refusal_of_json("[" * 65 + "]" * 65)
    assert parse_json(json.dumps(["[" * 500, '"\\[' * 500, "\\"]), "it") == ["[" * 500, '"\\[' * 500, "\\"]
    assert "is nested" in refusal_of_json(json.dumps(["\\", '"'])[:-1] + "," + "[" * 70)
    many = json.dumps(["[[[[[[["] * 20_000)  # longer than what is looked at together
    assert len(parse_json(many, "it")) == 20_000
    assert "is nested" in refusal_of_json(many[:-1] + "," + "[" * 70)
    padding = json.dumps(["x" * 70_000, "\\" * 70_001, '"' * 70_001])
    assert parse_json(padding, "it")
    assert "is nested" in refusal_of_json(padding[:-1] + "," + "[" * 70)


def test_large_json() -> None:
    """Too many bytes, or too many values in few bytes."""
    assert "16 MiB are read" in refusal_of_json(b" " * (JSON_BYTES + 1))
    for one in (b"[],", b"{},", b'{"":0},', b'"",'):
        content = b"[" + one * ((JSON_BYTES - 8) // len(one)) + b"0]"
        assert "more values than such a file can need" in refusal_of_json(content)
    assert "1 MiB are read" in _refusal_of_lines(b'{}\n"' + b"x" * (1 << 20) + b'"\n')
    with pytest.raises(HoldfastError, match="line 2 of it is damaged \\(it holds no JSON"):
        parse_json_lines(b"{}\n{\n", "it")
    with pytest.raises(HoldfastError, match="line 2 of it is damaged \\(it holds no JSON"):
        parse_json_lines(b"{}\n\n{}\n", "it")


def _refusal_of_lines(content: bytes) -> str:
    with pytest.raises(HoldfastError) as refusal:
        parse_json_lines(content, "it")
    return str(refusal.value)


def test_many_values_in_many_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of a file have one limit together."""
    monkeypatch.setattr("holdfast.parsing._LINES_COST", 2700)
    assert len(parse_json_lines(b'{"a": 1}\n' * 100, "it")) == 100
    assert "has more values" in _refusal_of_lines((b"[" + b"0," * 3000 + b"0]\n") * 2)
    monkeypatch.setattr("holdfast.parsing._LINES_COST", 3000)
    assert "line 2 of it" in _refusal_of_lines((b"[" + b"0," * 2000 + b"0]\n") * 2)
    monkeypatch.setattr("holdfast.parsing._LINES_COST", 10_000)
    assert "line 386 of it is damaged (it has more values" in _refusal_of_lines(b'{"":0}\n' * 5000)
    assert "more values" in _refusal_of_lines(b"0\n" * 5000)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a": 1, "b": {"c": 2, "c": 2}}', "key 'c' occurs twice"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[1e400]", "1e400 is too large"),
        (f"[{'9' * 5000}]", "a whole number has 5000 digits"),
        (f"[{'9' * 5000}.0]", "is too large"),
        ('"\\ud800"', "is no text"),
        ('{"\\udfff": 0}', "is no text"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8 text"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text"),
        ("", "it holds no JSON"),
        ("{} {}", "it holds no JSON"),
        ('{"a": 1', "it holds no JSON"),
    ],
)
def test_what_is_no_json(content: bytes | str, reason: str) -> None:
    """The reason is told, with what to do."""
    message = refusal_of_json(content)
    assert reason in message
    assert message.startswith("it is damaged (")
    assert message.endswith("): restore it, or make it anew")


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "[? ", "- ? "])
def test_deep_yaml(opening: str) -> None:
    """Refused when level 65 begins."""
    assert "is nested more than 64 deep" in refusal_of_yaml(opening * 60_000)


def test_deep_yaml_in_lines() -> None:
    """By indentation; and 64 levels pass."""
    assert "deep in line 65" in refusal_of_yaml("\n".join("  " * level + "a:" for level in range(1000)))
    assert parse_yaml("[" * 64 + "]" * 64, "it", advice="")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: &a [x]\nb: &b [*a, *a]", "anchor &a in line 1"),
        ("a: *a", "alias *a in line 1"),
        ("!!python/object/apply:os.system ['true']", "python/object/apply:os.system in line 1"),
        ("a: !x 1", "tag !x in line 1"),
        ("a: !!str 1", "tag tag:yaml.org,2002:str in line 1"),
        ("a: 1\nb: {c: 1, c: 1}", "key 'c' occurs twice, the second time in line 2"),
        ("1: a", "key 1 in line 1 is no text"),
        ("~: a", "key None in line 1 is no text"),
        ("? [a]\n: b", "is no text"),
        ("a: .inf", ".inf in line 1 is no finite number"),
        ("a: -.INF", "is no finite number"),
        ("a: .NaN", "is no finite number"),
        ("a: 1.0e+400", "1.0e+400 is too large"),
        ("a: " + "9" * 5000, "a whole number has 5000 digits"),
        ('a: "\\uD800"', "is no text"),
        ("a: 1\n---\na: 2", "single document"),
        ("a: [", "flow"),
        ("a: \x07", "special characters"),
        (b"a: \xff", "byte 3 is not UTF-8 text"),
        ("a: [" + "1, " * 30_000 + "]", "more than 20000 values"),
        ("#" * (YAML_BYTES + 1), "at most 1 MiB are read"),
    ],
)
def test_what_is_no_plain_yaml(content: bytes | str, reason: str) -> None:
    """The reason is told, with the line where there is one."""
    message = refusal_of_yaml(content)
    assert reason in message
    assert message.startswith("it is no YAML of plain values (")


def test_merge_keys_are_keys() -> None:
    """`<<` merges nothing, so that each check of unknown keys sees it."""
    assert parse_yaml("<<: {a: 1}\nb: 2", "it", advice="") == {"<<": {"a": 1}, "b": 2}


def test_nothing_else_parses() -> None:
    """No other module calls a loader of JSON, YAML or pickles that came from outside."""
    allowed = {
        ("parsing.py", "json.loads"),
        ("parsing.py", "yaml.SafeLoader"),
        ("data/inert_pickle.py", "pickle._Unpickler"),
        ("runs/checkpoint.py", "torch.load"),
        ("runs/torch_file.py", "torch.load"),
    }
    loaders = {"json.loads", "json.load", "json.JSONDecoder", "torch.load", "np.load", "np.fromfile", "np.loadtxt"}
    loaders |= {f"yaml.{name}" for name in dir(yaml) if "load" in name.lower() and "dump" not in name}
    loaders |= {f"pickle.{name}" for name in ("load", "loads", "Unpickler", "_Unpickler")}
    source = Path(holdfast.__file__).parent
    found = set()
    for file in source.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = f"{node.value.id}.{node.attr}"
                if called in loaders:
                    found.add((str(file.relative_to(source)), called))
            if isinstance(node, ast.ImportFrom) and node.module in ("json", "yaml", "pickle"):
                found |= {(str(file.relative_to(source)), f"{node.module}.{name.name}") for name in node.names}
    assert found <= allowed, found - allowed
