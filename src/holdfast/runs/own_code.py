"""The user's own code in a run: which parts of a configuration name some, and the copies in the run folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.models import trust
from holdfast.models.own_file import OwnCode, names_code
from holdfast.runs.files import write_whole

CODE = "code"
"""The folder in a run folder: ``code/model/net.py``, and ``code/networks/guide/net.py`` for a further network."""


def named_code(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield every part of a configuration that may name code: the part, the mapping that names it, and its key.

    A part is "model", or "networks/" and the name of a further network. What does not name code is left out.
    """
    places = [("model", config.get("model"), "name")]
    networks = config.get("networks")
    if isinstance(networks, Mapping):
        places += [(f"networks/{name}", network, "model") for name, network in networks.items()]
    for part, mapping, key in places:
        if isinstance(mapping, dict) and names_code(mapping.get(key)):
            yield part, mapping, key


def configured_code(config: Mapping[str, Any], folder: Path, *, named: Collection[str] = ()) -> dict[str, OwnCode]:
    """Return the code that a configuration names, by part.

    Args:
        config: What config.yaml says.
        folder: Where it lies. The code must lie there too, or a copy of it.
        named: Parts that the person has named on this command line: they do not come from the configuration.

    Raises:
        HoldfastError: code is missing or lies outside the folder.
    """
    found = {}
    for part, mapping, key in named_code(config):
        if part not in named:
            earlier = ("model", "last") if part == "model" else ()  # runs of earlier versions kept a copy only there
            copies = (f"{CODE}/{part}", *earlier)
            try:
                found[part] = OwnCode.in_configuration(mapping[key], folder, copies=copies)
            except HoldfastError as error:
                option = "--model" if part == "model" else f"--networks.{part.partition('/')[2]}.model"
                raise HoldfastError(f"{error} ({option})") from None
    return found


def with_copies_named(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that names the copies in its run folder, such as ``code/model/net.py:make``.

    Example:
        >>> with_copies_named({"model": {"name": "/home/me/net.py:make", "width": 4}})
        {'model': {'name': 'code/model/net.py:make', 'width': 4}}
    """
    copied = {
        key: dict(value) if key == "model" and isinstance(value, Mapping) else value for key, value in config.items()
    }
    if isinstance(config.get("networks"), Mapping):
        networks = config["networks"]
        copied["networks"] = {
            name: dict(network) if isinstance(network, Mapping) else network for name, network in networks.items()
        }
    for part, mapping, key in named_code(copied):
        file, _, function = mapping[key].rpartition(":")
        mapping[key] = f"{CODE}/{part}/{Path(file).name}:{function}"
    return copied


def write_code(folder: Path, code: OwnCode) -> None:
    """Copy a user's own file and its neighbours into a folder, the file itself last.

    What is there already, and the same, is left alone.

    Raises:
        HoldfastError: the disk is full or the folder may not be written.
    """
    for name, content in sorted(code.sources.items(), key=lambda source: source[0] == code.path.name):
        place = folder / name
        if not (place.is_file() and place.read_bytes() == content):
            write_whole(place, lambda file, content=content: file.write(content))


def keep_code(run: Path, codes: Mapping[str, OwnCode]) -> list[str]:
    """Copy the code of a run, which was executed, into its folder and trust it from now on.

    Returns:
        What the person should be told.

    Raises:
        HoldfastError: the run holds other code already, or the disk is full.
    """
    told = []
    for part, code in codes.items():
        place = run / CODE / part
        if (place / code.path.name).is_file():
            there = OwnCode.in_configuration(code.spec, place)
            if there.sha256 != code.sha256:
                raise HoldfastError(
                    f"{code.path} is not the code that this run was begun with, {there.path} (SHA-256 {code.sha256} and"
                    f" {there.sha256}): leave it out to go on with the copy, or choose another --out"
                )
        write_code(place, code)
        failed = trust.remember(code)
        told += [failed] if failed else []
    return told
