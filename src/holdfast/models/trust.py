"""The rule of trust: which code from files may be executed.

Code from a file runs only if one of these holds:

(a) a person names the file, on this command line or in Python;
(b) the hash of the file and its neighbours is in the user's trust store, for that function; training fills the store;
(c) ``--trust-code``, ``--trust-code=SHA256``, the environment variable ``HOLDFAST_TRUST_CODE=SHA256`` or
    ``trust_code=`` is given; then the file and its hash are printed.

Nobody is asked at a prompt. The store is a folder with a small file for each hash and function: to withdraw trust,
remove it. The function counts because a file may define others, and a configuration that was sent could call those.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.errors import HoldfastError
from holdfast.streams import tell as to_stderr

if TYPE_CHECKING:
    from holdfast.models.own_file import OwnCode

ANY = "any"
"""What ``--trust-code`` without a hash means: all code that this command comes upon."""
STATE_VARIABLE, HASH_VARIABLE = "HOLDFAST_STATE_DIR", "HOLDFAST_TRUST_CODE"

_given: ContextVar[frozenset[str]] = ContextVar("trusted code", default=frozenset())
_named: set[str] = set()  # keys of what a person has named in this process
_told: set[tuple[str, str]] = set()


@contextmanager
def trusting(code: bool | str | None) -> Iterator[None]:
    """Trust code for as long as the block runs.

    Args:
        code: True for any code, the SHA-256 of one file (several with commas), or None for nothing more than before.
    Raises:
        HoldfastError: it is no SHA-256.
    """
    more = frozenset({ANY}) if code is True else frozenset() if not code else _hashes(str(code), "trust_code")
    token = _given.set(_given.get() | more)
    try:
        yield
    finally:
        _given.reset(token)


def require(code: OwnCode) -> str:
    """Return why code may be executed: "named", "option", "environment" or "store".

    Raises:
        HoldfastError: nothing says that it may.
    """
    if code.folder is None:
        _named.add(_key(code))
        return "named"
    given = _given.get()
    if ANY in given or code.sha256 in given:
        return _tell(code, "option")
    environment = os.environ.get(HASH_VARIABLE, "")
    if environment and code.sha256 in _hashes(environment, HASH_VARIABLE):
        return _tell(code, "environment")
    if _key(code) in _named:
        return "named"
    if _in_store(_key(code)):
        return "store"
    refused = " (another hash than the one that is trusted)" if given or environment else ""
    raise HoldfastError(
        f"{code.path}:{code.function} is code that came with {code.folder}, and nobody asked for it to be run{refused}:"
        f" read it, then add --trust-code={code.sha256} (in Python: trust_code=), or name your own copy of the file"
    )


def in_words(why: str) -> str:
    """Say by which part of the rule code is trusted."""
    return {
        "named": "named by you",
        "option": "trusted by --trust-code",
        "environment": f"trusted by {HASH_VARIABLE}",
        "store": "trusted since it was trained with here",
    }[why]


def remember(code: OwnCode) -> str | None:
    """Put a hash into the user's trust store. Return None, or in words why that was not possible.

    Nothing is trusted by being remembered that was not executed before: training calls this after it has built the
    network.
    """
    try:
        folder = store()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        note = {"file": str(code.path), "trusted": time.strftime("%Y-%m-%d %H:%M:%S"), "files": sorted(code.sources)}
        (folder / _key(code)).write_text(json.dumps(note) + "\n")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        reason = getattr(error, "strerror", None) or error
        return (
            f"the trust store cannot be written ({reason}): later commands on this run need"
            f" --trust-code={code.sha256}, or set {STATE_VARIABLE} to a folder that can be written"
        )
    return None


def store() -> Path:
    """Return the folder of the trust store: below HOLDFAST_STATE_DIR, else below the user's state folder.

    Raises:
        RuntimeError: the home folder is unknown.
    """
    own = os.environ.get(STATE_VARIABLE)
    if own:
        return Path(own).expanduser() / "trusted-code"
    usual = os.environ.get("XDG_STATE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.local/state"
    return Path(usual).expanduser() / "holdfast" / "trusted-code"


def _key(code: OwnCode) -> str:
    return f"{code.sha256}-{code.path.stem}-{code.function}"  # files that import each other have one hash


def _in_store(key: str) -> bool:
    try:
        return (store() / key).is_file()
    except (OSError, RuntimeError):
        return False


def _hashes(text: str, where: str) -> frozenset[str]:
    """The hashes in a text, with commas between them."""
    words = [word.strip().lower() for word in text.split(",")]
    if text.strip().lower() == ANY and where != HASH_VARIABLE:
        return frozenset({ANY})
    for word in words:
        if not re.fullmatch("[0-9a-f]{64}", word):
            raise HoldfastError(f"{where} {word!r} is no SHA-256: give all 64 hexadecimal digits, as the refusal does")
    return frozenset(words)


def _tell(code: OwnCode, why: str) -> str:
    """Print what is executed, once; under torchrun one process speaks."""
    if (str(code.path), code.sha256) not in _told and os.environ.get("RANK", "0") == "0":
        _told.add((str(code.path), code.sha256))
        to_stderr(f"running {code.path}:{code.function}, SHA-256 {code.sha256}, {in_words(why)}")
    return why
