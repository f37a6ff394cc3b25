"""The one error a person causes: bad input, told in one line that says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HoldfastError(ValueError):
    """Bad input or a state of the world that the caller can mend.

    The message is one line: what is wrong, then what to do. The command prints it and exits with 2.
    """


class NonFiniteLoss(HoldfastError):
    """A loss term became NaN or infinite; the message names the term."""


class Damaged(HoldfastError):
    """A file is not as it was written.

    Args:
        what: Which file, and what is wrong with it.
        advice: How to go on.
    """

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(f"{what}: {advice}" if advice else what)
        self.what = what


def unknown_name(what: str, name: object, allowed: Iterable[str]) -> HoldfastError:
    """The refusal of a name, with the nearest that exist."""
    allowed = list(allowed)
    near = difflib.get_close_matches(str(name)[:80], allowed, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(allowed)}"
    shown = repr(name if len(str(name)) <= 80 else f"{str(name)[:70]} …")
    return HoldfastError(f"{what} {shown} is unknown: {hint}")
