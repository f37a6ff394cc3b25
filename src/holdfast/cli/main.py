"""`holdfast`: finds the verb, and turns refusals into one line and exit code 2."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from holdfast import __version__
from holdfast.cli.table import COMMANDS
from holdfast.errors import HoldfastError, unknown_name
from holdfast.interruption import Interruption
from holdfast.streams import replace_missing, silence, tell

_LONGEST = 5000  # signs of a message, which may quote what stands in a file
_MODULES = {"list": "listing"}


def overview() -> str:
    """The text of `holdfast --help`."""
    width = max(map(len, COMMANDS))
    verbs = "\n".join(f"  holdfast {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return (
        "Train image classifiers that hold under attack, and measure honestly how well they hold.\n\n"
        f"{verbs}\n\n"
        "Begin with:  holdfast demo\n"
        "Then:        holdfast train pgd_at_wa --data YOUR_IMAGES --model resnet18\n"
        "Each verb explains itself with --help; `holdfast list recipes` names the methods."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0 done, 1 a check did not pass, 2 bad input or a bad disk; stopped by a signal, 128 + its number:
        130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    replace_missing()
    try:
        with Interruption():  # a first signal ends at once, but for what `fit` and `evaluate` finish
            code = _run(arguments)
            sys.stdout.flush()
            return code
    except HoldfastError as error:
        return _refuse(str(error))
    except KeyboardInterrupt as stopped:
        if os.environ.get("RANK", "0") == "0":  # under torchrun all processes stop together, and one speaks
            tell(f"holdfast: {stopped}" if str(stopped) else "holdfast: stopped")
        return 128 + getattr(stopped, "number", signal.SIGINT)
    except BrokenPipeError:
        silence(sys.stdout)
        return 0
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = error.filename or "the output"
            return _refuse(f"no space left to write {where}: free some and give the same command again")
        return _refuse(f"{type(error).__name__}: {error}")
    except MemoryError as error:
        return _refuse(f"{type(error).__name__}: {error}")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return _refuse("out of memory: lower --batch-size, --training.evaluation_batch or the model's width")


def _run(arguments: Sequence[str]) -> int:
    """Find the verb and run it."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        print(f"holdfast {__version__}")
        return 0
    verb = arguments[0]
    if verb not in COMMANDS:
        raise unknown_name("verb", verb, COMMANDS)
    return import_module(f"holdfast.cli.{_MODULES.get(verb, verb)}").run(arguments[1:])


def _refuse(message: str) -> int:
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        silence(sys.stdout)
    line = " ".join(message.split())[:_LONGEST]
    tell("holdfast: " + "".join(sign if sign.isprintable() else "?" for sign in line))
    return 2


if __name__ == "__main__":
    sys.exit(main())
