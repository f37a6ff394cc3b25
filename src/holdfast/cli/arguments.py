"""Reading command lines: plain options, and `--section.key value` for everything else."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from holdfast.errors import HoldfastError
from holdfast.models.trust import ANY

MAX_DATA_HELP = "memory that decoded data may take, in GiB (16, or 3/4 of the machine's)"

WHOLE_PARTS = ("--augmentation", "--mixing")
"""Options without a dot that name a whole part: ``--mixing cutmix``."""


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses as everything else here does, and names the nearest option for a typo."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def add_trust(self) -> None:
        """Add the option that every verb has that may come upon code in somebody's files."""
        self.add_argument(
            "--trust-code",
            metavar="SHA256",
            help="run code that comes with a folder or a configuration: with =SHA256 that very code, else any;"
            " what was trained with here is trusted already (docs/security.md)",
        )

    def error(self, message: str) -> NoReturn:
        raise HoldfastError(f"{message}; `{self.prog} --help` explains")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse everything, or refuse."""
        known, rest = self.read_known(argv)
        if rest:
            raise unknown_option(rest[0], list(self._option_string_actions))
        return known

    def read_known(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parse what is known; an option with an underscore means the one with a hyphen. Returns the rest too."""
        options = self._option_string_actions
        spelt = []
        for word in with_hash(joined(argv)):
            name, equals, value = word.partition("=")
            if name in ("--trust-code", "--trust_code"):
                name, equals, value = "--trust-code", "=", value or ANY  # the next word is not its value
                word = name + equals + value
            other = name.replace("_", "-")
            spelt.append(
                other + equals + value if name.startswith("--") and name not in options and other in options else word
            )
        return self.parse_known_args(spelt)


def joined(argv: Sequence[str]) -> list[str]:
    """`--section.key value` as one word, so that the value is not taken for something else.

    Example:
        >>> joined(["--attack.steps", "20", "pgd_at"])
        ['--attack.steps=20', 'pgd_at']
    """
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        of_a_part = "." in word or word in WHOLE_PARTS
        if word.startswith("--") and of_a_part and "=" not in word and rest and not rest[0].startswith("--"):
            word = f"{word}={rest.pop(0)}"
        words.append(word)
    return words


def with_hash(words: Sequence[str]) -> list[str]:
    """Return the words with ``--trust-code SHA256`` as one; any other word after the option is not its value.

    Example:
        >>> [len(word) for word in with_hash(["--trust-code", "0" * 64, "--trust-code", "runs/one"])]
        [77, 12, 8]
    """
    joint: list[str] = []
    for word in words:
        if joint and joint[-1] == "--trust-code" and re.fullmatch("[0-9a-fA-F]{64}", word):
            joint[-1] += f"={word}"
        else:
            joint.append(word)
    return joint


def unknown_option(word: str, known: Sequence[str]) -> HoldfastError:
    """The refusal of an option or a stray word, with the nearest options."""
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return HoldfastError(f"{word!r} is one word too many: options begin with --")
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
    return HoldfastError(f"option {name} is unknown: {hint}")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return number


def print_json(value: Any) -> None:
    """One JSON object on standard output; everything else goes to standard error."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
