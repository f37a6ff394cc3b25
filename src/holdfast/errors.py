"""The one error a person causes: bad input, told in one line that says what to do."""

from __future__ import annotations


class HoldfastError(ValueError):
    """Bad input or a state of the world that the caller can mend.

    The message is one line: what is wrong, then what to do. The command prints it and exits with 2.
    """


class NonFiniteLoss(HoldfastError):
    """A loss term became NaN or infinite; the message names the term."""
