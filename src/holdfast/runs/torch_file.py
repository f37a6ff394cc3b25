"""Reading what somebody else's `torch.save` wrote: the tensors, with empty stand-ins for every object beside them.

A checkpoint often holds more than weights: NumPy numbers, an `argparse.Namespace`, a configuration object. Torch's
reader for weights alone refuses the whole file for one of them. Here each such name is answered with a stand-in that
keeps nothing and does nothing, so nothing is imported and nothing of the file's is called; torch's reader runs with
`weights_only=True` throughout. Names of Python's own library that are not plain values are refused all the same: no
honest checkpoint asks for `os.system`.
"""

from __future__ import annotations

import _compat_pickle
import json
import pickle
import shlex
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from holdfast.errors import HoldfastError
from holdfast.regular_files import open_regular
from holdfast.zip_files import require_plain_torch_file

_LEFT_TO_TORCH = ("torch", "torch._tensor", "torch._utils", "torch.cuda", "torch.cuda.sparse", "torch.nn.parameter",
                  "torch.serialization", "torch.sparse", "torch.storage")  # fmt: skip
_READ_BY_TORCH = ("collections.OrderedDict", "collections.Counter", "_codecs.encode")
_PLAIN_BUILTINS = ("bool", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set", "slice",
                   "str", "tuple")  # fmt: skip
_HARMLESS_MODULES = (
    "argparse",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "pathlib",
    "types",
    "typing",
    "uuid",
)
_HARMLESS = {
    *(f"builtins.{name}" for name in _PLAIN_BUILTINS),
    *("collections.defaultdict", "collections.deque", "copyreg.__newobj_ex__", "copyreg._reconstructor"),
    "functools.partial",
}


@dataclass(frozen=True)
class TorchContent:
    """What a file holds.

    Attributes:
        value: As it was saved; stand-ins are empty.
        passed_over: Classes and functions of other packages that stand-ins took the place of.
        networks: Where whole networks lie in it: keys, outermost first; () for the value itself.
    """

    value: Any
    passed_over: tuple[str, ...]
    networks: tuple[tuple[str, ...], ...]


def torch_content(file: Path) -> TorchContent:
    """Read a file of `torch.save` without executing anything in it.

    Raises:
        HoldfastError: it is missing, damaged, no file of `torch.save`, or asks for something that weights do not need.
    """
    try:
        _require_torch_file(file)
        names = {_modern(name) for name in require_plain_torch_file(file)}
        _require_whole(file)
    except FileNotFoundError:
        raise HoldfastError(f"{file} is missing: give a .safetensors, .pt or .pth file") from None
    blocking = sorted(name for name in names if _is_refused(name))
    if blocking:
        raise HoldfastError(_blocked(file, names, blocking))
    strangers = sorted(name for name in names if not _is_torchs(name))
    try:
        value = _loaded(file, strangers)
    except Exception as error:  # a damaged file raises anything from EOFError to AttributeError
        if _holds_network(names):
            raise HoldfastError(whole_network(file, ())) from None
        raise HoldfastError(_unreadable(file, names, strangers, error)) from None
    foreign = tuple(name for name in strangers if not _is_harmless(name))
    return TorchContent(value, foreign, tuple(_networks(value)))


def _loaded(file: Path, strangers: list[str]) -> Any:
    """What torch's reader for weights alone makes of a file, with stand-ins for some names."""
    for filled in (_Empty, _Nothing):
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(_stand_ins(strangers, filled)):
                warnings.simplefilter("ignore")  # another pickle protocol: it can be read or it cannot
                return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, TypeError, ValueError, AttributeError):
            if filled is _Nothing or not strangers:
                raise
    raise AssertionError  # the second attempt returns or raises


def whole_network(file: Path, place: Collection[str]) -> str:
    """Return the refusal of a pickled network, with the command that makes its state of it.

    Args:
        file: The file.
        place: The keys under which the network lies in it.
    """
    inside = "".join(f"[{json.dumps(key)}]" for key in place)
    code = (
        f"import torch; torch.save(torch.load({json.dumps(str(file))}, weights_only=False){inside}.state_dict(),"
        ' "weights.pt")'
    )
    return (
        f"{file} holds a whole pickled network, which is code, and nothing was run: if you trust it, run `python -c"
        f" {shlex.quote(code)}` where its classes can be imported, and give weights.pt"
    )


# --------------------------------------------------------------------------------------------- names in a pickle


def _modern(name: str) -> str:
    """Return module and name, parted by a space, as Python 3 calls them; pickles are written with Python 2's."""
    module, _, attribute = name.partition(" ")
    if (module, attribute) in _compat_pickle.NAME_MAPPING:
        module, attribute = _compat_pickle.NAME_MAPPING[module, attribute]
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{attribute}"


def _is_torchs(name: str) -> bool:
    """Whether torch's own reader decides about a name."""
    return name in _READ_BY_TORCH or name.rpartition(".")[0] in _LEFT_TO_TORCH


def _is_harmless(name: str) -> bool:
    """Whether a name is that of a plain value, of Python's library or NumPy's."""
    top = name.partition(".")[0]
    return name in _HARMLESS or top in ("numpy", *_HARMLESS_MODULES)


def _is_refused(name: str) -> bool:
    """Whether a name belongs to Python's own library and is no plain value."""
    standard = name.partition(".")[0] in (*sys.stdlib_module_names, "builtins", "nt")
    return standard and not _is_harmless(name) and not _is_torchs(name)


def _holds_network(names: Collection[str]) -> bool:
    return any(name.startswith("torch.nn.modules.") for name in names)


# ------------------------------------------------------------------------------------------------------ stand-ins


class _Nothing:
    """Stands for a plain value; keeps nothing of what it is given."""

    def __new__(cls, *_: object) -> _Nothing:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        """Ignore it."""


class _Empty:
    """Stands for a class that may be filled like a dictionary: torch's reader fills dictionaries of its own only."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


class _EmptyList:
    """Stands for a class that is filled like a list."""

    def __new__(cls, *_: object) -> Any:
        return []


def _stand_ins(names: Collection[str], filled: type) -> list[Any]:
    """Pairs of a stand-in and the name that it answers to; `filled` stands for classes of other packages."""
    special = {"collections.deque": _EmptyList, "collections.defaultdict": _Empty, "copyreg.__newobj_ex__": filled}
    pairs = []
    for name in names:
        kind = special.get(name, _Nothing if _is_harmless(name) else filled)
        pairs.append((type(kind.__name__, (kind,), {}), name))
    return pairs


def _networks(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where stand-ins lie that were given what every network has."""
    inside = getattr(value, "__dict__", {})
    if "_modules" in inside and "_parameters" in inside:
        yield place
    elif isinstance(value, Mapping) and len(place) < 2:
        for key, one in value.items():
            if isinstance(key, str):
                yield from _networks(one, (*place, key))


# ------------------------------------------------------------------------------------------------------- refusals


_OTHER_KINDS = (
    (257, b"ustar", "is a tar archive: unpack it, and give the file of weights in it"),
    (0, b"\x1f\x8b", "is packed with gzip: unpack it"),
    (0, b"\x89HDF", "is an HDF5 file, which other libraries write: save the weights with torch.save"),
    (8, b"{", "is a .safetensors file by another name: rename it"),
)


def _require_torch_file(file: Path) -> None:
    """Refuse what begins like a file of another kind."""
    with open_regular(file) as content:
        head = content.read(512)
    for place, beginning, told in _OTHER_KINDS:
        if head[place:].startswith(beginning) and not head.startswith(b"PK"):
            raise HoldfastError(f"{file} {told}")


def _require_whole(file: Path) -> None:
    """Refuse an archive whose checksums do not fit its content: torch does not look at them."""
    try:
        with open_regular(file) as content:
            if content.read(4) != b"PK\x03\x04":
                return  # of before torch 1.6, which wrote none
            with zipfile.ZipFile(content) as archive:
                for member in archive.infolist():
                    with archive.open(member) as part:
                        while member.CRC and part.read(1 << 20):  # 0 where torch was told to write none
                            pass
    except (zipfile.BadZipFile, OSError, ValueError, LookupError, EOFError, RuntimeError) as error:
        raise HoldfastError(f"{file} is damaged ({' '.join(str(error).split())[:200]}): get it again") from None


def _blocked(file: Path, names: Collection[str], blocking: list[str]) -> str:
    holds = "holds weights, and beside them" if _holds_tensors(names) else "holds"
    return (
        f"{file} {holds} {listed(blocking)}, which weights do not need, and nothing was run: save model.state_dict()"
        " alone, or take the file from somebody you trust"
    )


def _unreadable(file: Path, names: Collection[str], strangers: list[str], error: Exception) -> str:
    if "Unsupported operand" in str(error):
        return f"{file} was saved with a pickle protocol that weights are not read in: save it without pickle_protocol"
    if not _holds_tensors(names):
        return f"{file} holds no weights ({type(error).__name__}): save model.state_dict()"
    foreign = [name for name in strangers if not _is_harmless(name)] or strangers
    if foreign and isinstance(error, pickle.UnpicklingError | TypeError | ValueError | AttributeError):
        return (
            f"{file} holds weights, and beside them {listed(foreign)}, which cannot be passed over; nothing was run: if"
            " you trust it, load it with weights_only=False and save its state_dict alone"
        )
    return f"{file} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:120]}): get it again"


def _holds_tensors(names: Collection[str]) -> bool:
    return any(name.startswith(("torch._utils._rebuild", "torch._tensor._rebuild")) for name in names)


def listed(names: Collection[str], most: int = 3) -> str:
    """Return the first few of some names, each cut where it is long, in one line.

    Example:
        >>> listed(["a", "b", "c", "d"])
        'a, b, c and 1 more'
    """
    shown = [repr(name[:80])[1:-1] for name in list(names)[:most]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
