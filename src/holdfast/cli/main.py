"""`holdfast`: finds the verb, and turns refusals into one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from holdfast import __version__
from holdfast.cli.table import COMMANDS
from holdfast.errors import HoldfastError, unknown_name

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
    """Run the command. Returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        print(f"holdfast {__version__}")
        return 0
    verb = arguments[0]
    try:
        if verb not in COMMANDS:
            raise unknown_name("verb", verb, COMMANDS)
        module = import_module(f"holdfast.cli.{_MODULES.get(verb, verb)}")
        return module.run(arguments[1:])
    except HoldfastError as error:
        return _refuse(str(error))
    except KeyboardInterrupt as stopped:
        print(f"holdfast: {stopped}" if str(stopped) else "holdfast: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except (MemoryError, OSError) as error:
        return _refuse(f"{type(error).__name__}: {error}")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return _refuse("out of memory: lower --batch-size, --training.evaluation_batch or the model's width")


def _refuse(message: str) -> int:
    line = " ".join(message.split())[:_LONGEST]
    print("holdfast: " + "".join(sign if sign.isprintable() else "?" for sign in line), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
