"""Fitting weights to a network: names with prefixes more or less, types, and what may be missing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from holdfast.errors import HoldfastError

_WRAPPERS = ("module", "_orig_mod")
"""What `DataParallel` and `torch.compile` put into names, at the front or within."""
_FAMILIAR = (*_WRAPPERS, "model", "net", "network")
"""Attributes that training code keeps its network in."""
_DEEPEST, _LONGEST = 6, 500
_NORMALISATION = re.compile(r"(^|\.)_?((pixel|image|img|input|data|norm|channel)_)?(mean|std|mu|sigma)$")
"""Constants that images are normalised by; never a BatchNorm's `running_mean`."""


@dataclass(frozen=True)
class Match:
    """Weights under the names of a network.

    Attributes:
        state: By the network's names, as far as there are any.
        unknown: Names that the network does not have.
        outside: Names that lie beside the network's own in the file ("criterion.weight" beside "model.…").
        removed: What the file's names begin with and the network's do not; "" for nothing.
        added: The other way round.
        others: Further beginnings under which the network would fit as well.
    """

    state: dict[str, Any]
    unknown: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    removed: str = ""
    added: str = ""
    others: tuple[str, ...] = ()


def without_prefixes(state: Mapping[str, Any], own: Mapping[str, Any]) -> Match:
    """Return weights under the names of a network: prefixes are removed or added as it takes for most to fit.

    Names that fit already are left alone. "module" and "_orig_mod" are passed over wherever they stand in a name;
    apart from these all names lose, or get, the same beginning.

    Args:
        state: Weights by name.
        own: The network's own, by name.
    Example:
        >>> match = without_prefixes({"module.model.fc.weight": 1, "module.loss.x": 2}, {"fc.weight": 0})
        >>> match.state, match.removed, match.outside
        ({'fc.weight': 1}, 'model.', ('module.loss.x',))
    """
    if all(name in state for name in own):
        left = {name: name for name in state if name not in own}
        return Match({name: state[name] for name in own}, *_parted(left, _kept_in(own)))
    theirs, ours = _bare_names(state), _bare_names(own)
    tried = []
    for removed in _beginnings(theirs, min(len(theirs), len(ours))):
        for added in _beginnings(ours, len(ours)):
            pairs = {own_name: theirs.get(removed + bare.removeprefix(added))
                     for bare, own_name in ours.items() if bare.startswith(added)}  # fmt: skip
            fits = {name: found for name, found in pairs.items() if found is not None}
            same = sum(_shape(own[name]) == _shape(state[found]) for name, found in fits.items())
            tried.append(((len(fits), same, *_plainness(removed), *_plainness(added)), removed, added, fits))
    best = max(tried, key=lambda one: one[0])
    if 2 * len(best[-1]) < len(own):  # a few names that meet by chance: the message is clearer about all as they are
        best = tried[0]
    (count, same, *_), removed, added, fits = best
    used = set(fits.values())
    left = {bare: name for bare, name in theirs.items() if name not in used}
    unknown, outside = _parted(left, removed or _kept_in([_bare(name) for name in fits]))
    return Match(
        state={name: state[found] for name, found in fits.items()},
        unknown=unknown,
        outside=outside,
        removed=removed if count else "",
        added=added if count else "",
        others=tuple(
            sorted({one[1] for one in tried if one[0][:2] == (count, same) and count and set(one[3].values()) != used})
        ),
    )


def _kept_in(names: Collection[str]) -> str:
    """The attribute that all names say the network is kept in: its file is of code that keeps more beside it."""
    first = {name.partition(".")[0] for name in names}
    return f"{first.pop()}." if len(first) == 1 and first <= set(_FAMILIAR) else ""


def _parted(left: Mapping[str, str], beginning: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names that the network does not have, and those that lie beside it, by their bare names."""
    unknown = tuple(name for bare, name in left.items() if bare.startswith(beginning))
    return unknown, tuple(name for bare, name in left.items() if not bare.startswith(beginning))


def _bare_names(names: Collection[str]) -> dict[str, str]:
    """Names without what wraps a network, by which the names themselves are found; as they are where two would meet."""
    bare = {_bare(name): name for name in names}
    return bare if len(bare) == len(names) else {name: name for name in names}


def _bare(name: str) -> str:
    if len(name) > _LONGEST:
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS) or name


def _beginnings(names: Collection[str], of: int) -> list[str]:
    """Beginnings that at least half of so many names share, and none."""
    shared: Counter[str] = Counter()
    for name in names:
        parts = name[:_LONGEST].split(".")[:-1][:_DEEPEST]
        shared.update(".".join(parts[: count + 1]) + "." for count in range(len(parts)))
    return ["", *(beginning for beginning, count in shared.items() if 2 * count >= of)]


def _plainness(beginning: str) -> tuple[bool, int]:
    """Familiar beginnings go before others, and short ones before long ones."""
    parts = beginning.split(".")[:-1]
    return all(part in _FAMILIAR for part in parts), -len(parts)


def _shape(value: Any) -> tuple[int, ...] | None:
    """The shape of a tensor that has one: a layer that has seen no image yet has none."""
    return tuple(value.shape) if isinstance(value, Tensor) and not is_lazy(value) else None


def load_fitting(model: nn.Module, state: Mapping[str, Any], source: object) -> tuple[str, ...]:
    """Put weights into a network, and return what the person should be told.

    Names fit as by `without_prefixes`. `num_batches_tracked`, which old files lack, and the constants of a
    normalisation may be missing. Numbers are cast to the network's types.

    Args:
        model: The network.
        state: Weights by name.
        source: How messages call them.
    Raises:
        HoldfastError: they do not fit; the message counts what is missing, of another shape or unknown.
    """
    own = model.state_dict()
    match = without_prefixes(state, own)
    unknown = [name for name in match.unknown if not _may_be_unknown(name, state[name])]
    missing = [name for name in own if name not in match.state and not _may_be_missing(name, model)]
    problems = _misfits(match.state, own, missing, unknown)
    if problems:
        raise HoldfastError(
            f"the weights in {source} do not fit the model: {'; '.join(problems)}; give the same --model, image size"
            " and classes as they were trained with"
        )
    if match.others and not _is_familiar(match):
        raise HoldfastError(
            f"the weights in {source} fit the model under several names, {_few([match.removed, *match.others])}: choose"
            f" with {source}:{match.removed.rstrip('.')}"
        )
    notes = (
        *_passed_over(match, state, source),
        *_kept(model, match, own, source),
        *_casts(match.state, own, source),
    )
    try:
        model.load_state_dict(match.state, strict=False)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise HoldfastError(f"the weights in {source} do not fit the model ({reason}): give the same --model") from None
    return notes


def _is_familiar(match: Match) -> bool:
    return _plainness(match.removed)[0]


def _may_be_missing(name: str, model: nn.Module) -> bool:
    """Whether a network can keep its own value: counts of batches, constants of a normalisation, a layer's own."""
    leaf = name.rpartition(".")[2]
    return leaf in ("num_batches_tracked", "_extra_state") or (
        _NORMALISATION.search(name) is not None and name not in dict(model.named_parameters(remove_duplicate=False))
    )


def _may_be_unknown(name: str, value: Any) -> bool:
    """Whether weights can be used without a value: counts of batches or of averaged models, normalisation constants."""
    leaf = name.rpartition(".")[2]
    return leaf in ("num_batches_tracked", "n_averaged", "_extra_state") or _is_constant(name, value)


def _is_constant(name: str, value: Any) -> bool:
    return _NORMALISATION.search(name) is not None and isinstance(value, Tensor) and value.numel() <= 16


def _misfits(
    state: Mapping[str, Any], own: Mapping[str, Any], missing: Sequence[str], unknown: Sequence[str]
) -> list[str]:
    """What does not fit, a phrase for each kind."""
    problems = []
    if missing:
        problems.append(f"of its {len(own)} tensors the file lacks {len(missing)} ({_few(missing)})")
    shapes = [(name, _shape(state[name]), _shape(own[name])) for name in own if name in state]
    other = [(name, *both) for name, *both in shapes if None not in both and both[0] != both[1]]
    if other:
        name, theirs, ours = other[0]
        more = f" and {len(other) - 1} more" if len(other) > 1 else ""
        problems.append(f"{_few([name])} is {_sides(theirs)} in the file and {_sides(ours)} in the model{more}")
    if unknown:
        problems.append(f"{_counted(unknown)} it does not know ({_few(unknown)})")
    kinds = [(name, value, own[name]) for name, value in state.items()]
    odd = [(name, value) for name, value, ours in kinds if _is_other_kind(name, value, ours)]
    if odd:
        name, value = odd[0]
        kind = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
        problems.append(f"{_few([name])} is {kind} and not {str(own[name].dtype).removeprefix('torch.')}")
    return problems


def _is_other_kind(name: str, value: Any, own: Any) -> bool:
    """Whether numbers are of another kind: casting codes of eight bits to floats would give nonsense."""
    if not isinstance(own, Tensor) or name.endswith("num_batches_tracked"):
        return False
    if not isinstance(value, Tensor):
        return True
    theirs, ours = value.dtype, own.dtype
    return (theirs.is_floating_point, theirs.is_complex) != (ours.is_floating_point, ours.is_complex)


def _casts(state: Mapping[str, Any], own: Mapping[str, Any], source: object) -> list[str]:
    """A note for every type that is cast to another."""
    cast = Counter(
        (str(value.dtype).removeprefix("torch."), str(own[name].dtype).removeprefix("torch."))
        for name, value in state.items()
        if isinstance(value, Tensor) and own[name].is_floating_point() and value.dtype != own[name].dtype
    )
    return [
        f"{source}: {count} of {len(state)} tensors cast from {theirs} to {ours}"
        for (theirs, ours), count in cast.items()
    ]


def _passed_over(match: Match, state: Mapping[str, Any], source: object) -> list[str]:
    notes = []
    constants = [name for name in (*match.unknown, *match.outside) if _is_constant(name, state[name])]
    if constants:
        values = [f"{name} = {[round(value, 4) for value in state[name].flatten().tolist()]}" for name in constants[:2]]
        notes.append(
            f"{source} normalises its images by {_few(values)}, which the model has no place for: see to it that the"
            " model itself normalises so"
        )
    beside = [
        name
        for name in match.outside
        if not _may_be_unknown(name, state[name]) and not _bare(name).startswith(match.others or ("\0",))
    ]
    if beside:
        notes.append(f"{source}: {_counted(beside)} that the model does not know left out ({_few(beside)})")
    if match.others and _is_familiar(match):
        notes.append(
            f"{source}: {match.removed}… is taken; {_few(match.others)} would fit too: {source}:"
            f"{match.others[0].rstrip('.')} takes that"
        )
    return notes


def _kept(model: nn.Module, match: Match, own: Mapping[str, Any], source: object) -> list[str]:
    constants = [
        name
        for name in own
        if name not in match.state and not name.endswith("num_batches_tracked") and _may_be_missing(name, model)
    ]
    return [f"{source} has no {_few(constants)}: the model keeps its own"] if constants else []


def _few(names: Sequence[str], most: int = 3) -> str:
    """The first few names, in one line, each cut where it is long."""
    shown = ", ".join(repr(name[:100])[1:-1] for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"


def _sides(shape: tuple[int, ...] | None) -> str:
    return "x".join(map(str, shape or ())) or "one number"
