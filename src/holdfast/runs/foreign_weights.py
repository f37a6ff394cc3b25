"""Weights as people have them: a bare state, or one inside a checkpoint of somebody's training code."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.regular_files import is_regular
from holdfast.runs.export import DESCRIPTION, WEIGHTS, load_weights, model_folder, read_description, read_weights
from holdfast.runs.torch_file import listed, torch_content, whole_network

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".tar", ".bin", ".pkl")
"""Of files that hold weights."""
KEYS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params")
"""Where a checkpoint keeps the weights of its network, in the order in which they are taken."""
_AVERAGED = re.compile(r"(^|_)(ema|swa|averaged?|avg|shadow)(_|$)", re.IGNORECASE)
_NOT_WEIGHTS = re.compile(
    r"optim|sched|scaler|callback|loops|rng|hparam|hyper|config|history|metric|_extra_state$", re.I
)
_DEEPEST = 4


@dataclass(frozen=True)
class ForeignWeights:
    """Weights from a file.

    Attributes:
        state: Parameters and buffers by name, as the file has them.
        notes: What was decided and should be told, one sentence each.
    """

    state: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_state(file: Path) -> dict[str, Any]:
    """Return the state of a network from a .safetensors file or from what `torch.save` wrote; nothing is executed.

    See `foreign_weights` for which state of a checkpoint is taken. Names are those of the file:
    `holdfast.runs.export.load_weights` fits them to a network.

    Raises:
        HoldfastError: missing, damaged, or no state.
    """
    return foreign_weights(file).state


def load_foreign(model: nn.Module, source: str | Path) -> tuple[str, ...]:
    """Put the weights of a file, a model folder or a run into a network, and return what should be told.

    Args:
        model: The network.
        source: As `foreign_weights` takes it.
    Raises:
        HoldfastError: missing, damaged, no state, or it does not fit.
    """
    found = foreign_weights(source)
    return (*found.notes, *load_weights(model, found.state, Path(source)))


def names_weights(source: str | Path) -> bool:
    """Whether a text names a file of weights, and not the folder of a run or a model.

    Example:
        >>> names_weights("net.pth"), names_weights("net.pth:ema"), names_weights("runs/one")
        (True, True, False)
    """
    path, _ = file_and_key(source)
    return not os.path.isdir(path) and (path.suffix.lower() in SUFFIXES or is_regular(path))


def foreign_weights(source: str | Path) -> ForeignWeights:
    """Read the state of a network; nothing in a file is executed.

    Of a checkpoint's keys the first of `KEYS` that holds a state is taken, however deep; averaged weights ("ema",
    "model_ema" …) only where there are no others, and any other key only where it is the only one.

    Args:
        source: A .safetensors file; a file of `torch.save`, or ``FILE:KEY`` for one of several states in it; a model
            folder; or a run folder.
    Raises:
        HoldfastError: missing, damaged, or no state.
    """
    path, key = file_and_key(source)
    if os.path.isdir(path):
        _refuse_other_folders(path)
        folder = model_folder(path)
        return ForeignWeights({**read_weights(folder / WEIGHTS), **read_description(folder).get("extra_state", {})})
    if path.name.endswith(".index.json"):
        raise HoldfastError(
            f"{path} lists the parts that a checkpoint was split into: load all parts, put them into one dictionary and"
            " save that with torch.save"
        )
    if path.suffix == ".safetensors":
        content, passed_over, networks = read_weights(path), (), ()
    else:
        found = torch_content(path)
        content, passed_over, networks = found.value, found.passed_over, found.networks
    try:
        state, notes = unwrapped(content, key, path)
    except HoldfastError:
        if networks and not any(_candidates(content)):
            raise HoldfastError(whole_network(path, networks[0])) from None
        raise
    if passed_over:
        notes.append(f"{path}: passed over beside the weights, and not run: {listed(passed_over)}")
    return ForeignWeights(_plain(state, path, notes), tuple(notes))


def file_and_key(source: str | Path) -> tuple[Path, str | None]:
    """Return the path in ``FILE:KEY``, and the key; None where none is named, or where a file has that very name.

    Example:
        >>> file_and_key("net.pt:ema")
        (PosixPath('net.pt'), 'ema')
    """
    path, (head, colon, key) = Path(source), str(source).rpartition(":")
    if (
        not colon or not head or not key or "/" in key or os.path.exists(path)
    ):  # False for what the system cannot look at
        return path, None
    return Path(head), key


def _refuse_other_folders(folder: Path) -> None:
    """Refuse a folder that is no run and no model of ours, but holds files of weights."""
    if any(is_regular(folder / sub / WEIGHTS) and is_regular(folder / sub / DESCRIPTION) for sub in ("", "model")):
        return
    files = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES)
    if files:
        raise HoldfastError(f"{folder} is a folder with {listed(files)}: name the file of weights itself")


def unwrapped(content: object, key: str | None = None, file: object = "the file") -> tuple[dict[str, Any], list[str]]:
    """Return the state that lies somewhere in a checkpoint, and what should be told about the choice.

    Args:
        content: What the file holds.
        key: The key that a person named, or the beginning of the names of one of several networks in one state.
        file: How messages call it.
    Raises:
        HoldfastError: there is no state, or which one is meant is not clear.
    Example:
        >>> unwrapped({"net": {"fc.weight": torch.ones(1)}, "acc": 91.0})
        ({'fc.weight': tensor([1.])}, [])
    """
    found = sorted(_candidates(content), key=lambda one: _rank(one[0]))
    if not found:
        raise HoldfastError(f"{file} holds no state of a network: save model.state_dict()")
    if key is not None:
        return _named(found, key, file), []
    best, state = found[0]
    others = [path for path, _ in found[1:]]
    if others and _rank(best) == _rank(others[0]):
        first = _distinct(best, others[0])
        raise HoldfastError(f"{file} holds several states, {_told([best, *others])}: choose with {file}:{first}")
    if not others:
        averaged = any(_AVERAGED.search(key) for key in best)
        return dict(state), [f"{file}: {_told([best])} is taken, averaged weights: it holds no others"] * averaged
    other = _distinct(others[0], best)
    return dict(state), [
        f"{file} holds several states: {_told([best])} is taken, {_told(others)} is not; {file}:{other} takes that"
    ]


def _candidates(content: object, path: tuple[str, ...] = (), seen: set[int] | None = None) -> Iterator[Any]:
    """Every state in a checkpoint, with the keys that lead to it."""
    seen = set() if seen is None else seen
    if id(content) in seen or len(path) > _DEEPEST:
        return
    seen.add(id(content))
    if isinstance(content, Mapping):
        items = list(content.items())
    elif isinstance(content, list | tuple) and len(content) <= 100:
        items = [(str(number), value) for number, value in enumerate(content)]
    else:
        return
    tensors = [name for name, value in items if isinstance(name, str) and isinstance(value, Tensor)]
    deeper = []
    for name, value in items:
        if isinstance(name, str) and not _NOT_WEIGHTS.search(name):
            deeper += list(_candidates(value, (*path, name), seen))
    is_state = isinstance(content, Mapping) and bool(tensors)
    if deeper and not (is_state and any("." in name for name in tensors)):
        yield from deeper
    elif is_state:
        yield path, content


def _rank(path: tuple[str, ...]) -> list[int]:
    """Where a state stands in the order in which they are taken."""
    averaged, unknown = len(KEYS), len(KEYS) + 1
    return [KEYS.index(key) if key in KEYS else averaged if _AVERAGED.search(key) else unknown for key in path]


def _distinct(path: tuple[str, ...], other: tuple[str, ...]) -> str:
    """The key that tells a path from another."""
    return next((key for key in path if key not in other), path[-1] if path else "")


def _told(paths: list[tuple[str, ...]]) -> str:
    return listed([".".join(path) for path in paths])


def _named(found: list[Any], key: str, file: object) -> dict[str, Any]:
    """The state under a key that a person named."""
    for path, state in found:
        if key in path or key == ".".join(path):
            return dict(state)
    for _, state in found:
        inside = {name.removeprefix(f"{key}."): value for name, value in _texts(state) if name.startswith(f"{key}.")}
        if inside:
            return inside
    keys = [path for path, _ in found if path]
    there = _told(keys) if keys else f"names such as {listed(list(dict(_texts(found[0][1]))), 1)}"
    raise HoldfastError(f"{file} holds no state under {listed([key])}: it has {there}")


def _texts(state: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in state.items() if isinstance(name, str)]


def _plain(state: Mapping[str, Any], file: Path, notes: list[str]) -> dict[str, Any]:
    """Return the tensors of a state, which must be numbers in memory."""
    kept = {}
    left = []
    for name, value in _texts(state):
        if isinstance(value, Tensor):
            if value.is_quantized:
                raise HoldfastError(
                    f"{file} holds quantised weights ({listed([name])}): give those before quantisation"
                )
            if value.layout != torch.strided or value.is_meta or value.is_nested:
                kind = "no values" if value.is_meta else "sparse or nested tensors"
                raise HoldfastError(
                    f"{file} holds {kind} ({listed([name])}): save model.state_dict() with plain tensors"
                )
            kept[name] = value.detach()
        elif name.endswith("_extra_state"):
            kept[name] = value
        else:
            left.append(name)
    if left:
        notes.append(f"{file}: no tensor, and left out: {listed(left)}")
    return kept
