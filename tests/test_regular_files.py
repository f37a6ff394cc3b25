"""Pipes, devices, sockets, folders and links in place of files: refused at once, never read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from holdfast.errors import HoldfastError
from holdfast.regular_files import open_regular, read_regular, readable_size, require_regular
from hostile_files import ODD_ENTRIES, odd_entry


@pytest.mark.parametrize("kind", ODD_ENTRIES)
def test_what_is_no_file(kind: str, tmp_path: Path) -> None:
    """Also through a link; the message names the kind."""
    path = odd_entry(kind, tmp_path / "it")
    (tmp_path / "link").symlink_to(path)
    for name in (path, tmp_path / "link"):
        for read in (require_regular, open_regular, lambda file: read_regular(file, most=10)):
            with pytest.raises(HoldfastError, match=ODD_ENTRIES[kind]):
                read(name)


def test_files(tmp_path: Path) -> None:
    """Read to the last byte allowed, through links too; a missing file is the caller's to tell."""
    path = tmp_path / "it"
    path.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(path)
    assert require_regular(tmp_path / "link") == 5
    assert read_regular(tmp_path / "link", most=5) == b"12345"
    with open_regular(path) as file:
        assert file.read() == b"12345"
    with pytest.raises(HoldfastError, match="has 5 bytes, more than the 4 bytes that such a file can need"):
        read_regular(path, most=4)
    path.write_bytes(b"")
    assert read_regular(path, most=0) == b""
    for read in (require_regular, open_regular):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")
        with pytest.raises(HoldfastError, match="is no path"):
            read(Path("a\0b"))


def test_a_file_replaced_by_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking and opening: still refused, and the handle is closed."""
    os.mkfifo(tmp_path / "it")
    monkeypatch.setattr("holdfast.regular_files.require_regular", lambda path: 0)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    with pytest.raises(HoldfastError, match="is a pipe"):
        open_regular(tmp_path / "it")
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    assert before == after


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    """Said in one line."""
    (tmp_path / "it").write_bytes(b"1")
    (tmp_path / "it").chmod(0)
    with pytest.raises(HoldfastError, match="cannot be read"):
        open_regular(tmp_path / "it")


def test_sizes_in_words() -> None:
    """Also those that no machine has."""
    assert readable_size(10**400) == "about 10^400 bytes"
    assert readable_size(1 << 30) == "1 GiB"
    assert readable_size(1023) == "1023 bytes"
