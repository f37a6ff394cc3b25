"""Digests beside files and inside them: right at every moment of a write, and wrong for every byte that is changed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import Damaged, HoldfastError
from holdfast.runs import digests
from holdfast.runs.files import read_json, remove_hashed, write_json, write_text
from holdfast.runs.folder import RunFolder, read_config
from tiny_runs import Killed, killed_at

MASKS = (0x01, 0x04, 0x20, 0xFF)


def read(path: Path) -> str:
    """A file's text, refused where it is not as it was written."""
    return digests.checked_bytes(path, advice="restore it").decode()


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ beside a file


def test_the_form_is_that_of_sha256sum(tmp_path: Path) -> None:
    """One line: digest, two spaces, name."""
    write_text(tmp_path / "a file", "one", hashed=True)
    assert (tmp_path / "a file.sha256").read_text() == f"{digest('one')}  a file\n"
    assert read(tmp_path / "a file") == "one"


BEFORE = {
    "nothing": lambda path: None,
    "a file": lambda path: write_text(path, "old", hashed=True),
    "a file of an older version": lambda path: path.write_text("old"),
    "a digest without its file": lambda path: digests.beside(path).write_text(f"{digest('lost')}  f\n"),
    "a damaged digest": lambda path: (path.write_text("old"), digests.beside(path).write_text("none")),
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", [0, 1, 2, 3])
@pytest.mark.parametrize("before", BEFORE)
def test_a_kill_leaves_no_whole_file_refused(before: str, number: int, after: bool, tmp_path: Path) -> None:
    """Between any two renames the file is the old or the new one, and is read; and a second kill changes nothing."""
    path = tmp_path / "f"
    BEFORE[before](path)
    for text in ("new", "newer"):
        with killed_at(number, after=after) as renamed:
            try:
                write_text(path, text, hashed=True)
                assert len(renamed) <= number
            except Killed:
                pass
        if path.exists() and before != "a damaged digest":
            assert read(path) in ("old", "new", "newer")
    write_text(path, "newest", hashed=True)
    assert read(path) == "newest"
    assert digests.recorded(path) == (digest("newest"),)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["f", "f.sha256"]


def test_no_file_stands_without_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of a new file is there first, and goes last."""
    with killed_at(99, after=True) as renamed:
        write_text(tmp_path / "f", "one", hashed=True)
        assert renamed == ["f.sha256", "f"]
        write_text(tmp_path / "f", "two", hashed=True)
        assert renamed[2:] == ["f.sha256", "f", "f.sha256"]
    unlink, removed = Path.unlink, []

    def noted(path: Path, **more: Any) -> None:
        removed.append(path.name)
        unlink(path, **more)

    monkeypatch.setattr(Path, "unlink", noted)
    remove_hashed(tmp_path / "f")
    assert removed == ["f", "f.sha256"]


def test_a_changed_file_is_refused_and_one_without_a_digest_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The refusal says how to go on; deleting the digest is one way."""
    path = tmp_path / "f"
    write_text(path, "one", hashed=True)
    path.write_text("two")
    with pytest.raises(Damaged) as refusal:
        read(path)
    assert str(refusal.value) == (
        f"{path} was changed or damaged after it was written (its SHA-256 is not the one in f.sha256): restore it; to"
        " use it as it is, delete f.sha256"
    )
    assert not caplog.records
    digests.beside(path).unlink()
    assert read(path) == "two"
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} is used unchecked: f.sha256 is missing (older versions wrote none)"
    ]


def test_every_byte_of_a_digest_counts(tmp_path: Path) -> None:
    """A changed digest refuses the file; a changed name beside it does no harm."""
    path = tmp_path / "f"
    write_text(path, "one", hashed=True)
    record = digests.beside(path).read_bytes()
    for bad in (b"", record[: len(record) // 2], b"\xff" * 70):
        digests.beside(path).write_bytes(bad)
        with pytest.raises(Damaged):
            read(path)
    for place in range(64):
        for mask in MASKS:
            flipped = bytearray(record)
            flipped[place] ^= mask
            digests.beside(path).write_bytes(flipped)
            with pytest.raises(Damaged):
                read(path)


# ----------------------------------------------------------------------------------- in JSON and in a configuration


def test_every_byte_of_a_json_file_counts(tmp_path: Path) -> None:
    """One that is changed makes no other value: it is refused, or it says the same."""
    value = {"epsilon": 0.1, "names": ["a", "é"], "none": None, "nested": {"n": 12, "right": True}}
    path = tmp_path / "a.json"
    write_json(path, value)
    assert read_json(path) == value
    assert list(json.loads(path.read_text()))[-1] == "sha256"
    data = path.read_bytes()
    end = data.index(b'"sha256"')
    refused = 0
    for place in range(len(data)):
        for mask in MASKS:
            flipped = bytearray(data)
            flipped[place] ^= mask
            path.write_bytes(flipped)
            try:
                found = read_json(path)
                extra = set(found) - set(value)
                assert {key: item for key, item in found.items() if key not in extra} == value
                assert not extra or place > end
            except Damaged:
                refused += 1
    assert refused > 0.8 * len(MASKS) * len(data)
    for length in range(len(data) - 2):
        path.write_bytes(data[:length])
        with pytest.raises(Damaged, match=r"is damaged \(.*\): go on"):
            read_json(path, advice="go on")


def test_json_of_older_versions_and_of_others(tmp_path: Path) -> None:
    """One without a digest is read; what others read gets none."""
    path = tmp_path / "a.json"
    path.write_text('{"epsilon": 0.1}')
    assert read_json(path) == {"epsilon": 0.1}
    write_json(path, {"sha256": "theirs"}, sealed=False)
    assert json.loads(path.read_text()) == {"sha256": "theirs"}
    with pytest.raises(ValueError, match="own digest"):
        write_json(path, {"sha256": "ours"})
    os.remove(path)
    path.mkdir()
    with pytest.raises(HoldfastError, match="is a folder, not a file"):
        read_json(path)


CONFIG = {"recipe": "pgd_at", "threat": {"norm": "Linf", "epsilon": 0.1}, "data": "digits", "seed": 0}


def test_every_byte_of_a_configuration_counts(tmp_path: Path) -> None:
    """Where it is checked, also where the last line was cut off; as --config it is read as it is."""
    RunFolder.create(tmp_path / "run", CONFIG, resume=False)
    path = tmp_path / "run" / "config.yaml"
    data = path.read_bytes()
    assert read_config(path, check=True) == read_config(path) == CONFIG
    for place in range(len(data)):
        for mask in MASKS:
            flipped = bytearray(data)
            flipped[place] ^= mask
            path.write_bytes(flipped)
            with pytest.raises(Damaged, match="was changed or damaged after it was written: restore it from a copy"):
                read_config(path, check=True)
    for length in range(len(digests.HEAD), len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(HoldfastError):
            read_config(path, check=True)
    path.write_bytes(data.replace(b"seed: 0", b"seed: 5"))
    assert read_config(path)["seed"] == 5


def test_a_configuration_of_an_older_version(tmp_path: Path) -> None:
    """It promises no digest."""
    (tmp_path / "config.yaml").write_text("recipe: pgd_at\n")
    assert read_config(tmp_path / "config.yaml", check=True) == {"recipe": "pgd_at"}
