"""Files that nobody writes by accident: bombs, absurd headers, and things that are no files. Built in a few bytes."""

from __future__ import annotations

import os
import socket
from pathlib import Path

ODD_ENTRIES = {
    "folder": "is a folder",
    "pipe": "is a pipe",
    "socket": "is a socket",
    "device": "is a device",
    "dangling": "is a link to something that is missing",
    "circle": "is a link that leads back to itself",
}
"""What can lie in place of a file, and how it is refused."""


def odd_entry(kind: str, path: Path) -> Path:
    """Put something in place of a file."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path may have 107 bytes
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling":
        path.symlink_to(path.with_name("nowhere"))
    else:
        path.symlink_to(path)
    return path
