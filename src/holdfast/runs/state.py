"""The state of a run in progress, as tensors and plain values, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast import distributed
from holdfast.errors import HoldfastError
from holdfast.models.extra_state import parted
from holdfast.parsing import parse_json, through_json
from holdfast.runs.folder import difference

if TYPE_CHECKING:
    from holdfast.loop import Loop
    from holdfast.setup import Setup

FORMAT = 1


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [to_device(item, device) for item in value]
    return value


def training_state(loop: Loop) -> dict[str, Any]:
    """What a step changes: weights, buffers, optimisers and averages of this process."""
    return {
        "step": loop.module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in loop.optimizers],
        "averages": [average.state_dict() for average in loop.recipe.averages],
    }


def restore_training(loop: Loop, state: dict[str, Any]) -> None:
    """Set a loop back to a `training_state` of its own."""
    loop.module.load_state_dict(state["step"])
    for optimizer, saved in zip(loop.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    for average, saved in zip(loop.recipe.averages, state["averages"], strict=True):
        average.load_state_dict(saved)


def epoch_state(loop: Loop) -> dict[str, Any]:
    """Everything that is needed to go on.

    Parameters and optimisers are equal on all processes and kept once. Buffers, averages and the epoch's sums differ
    between them inside an epoch, so each process's are kept. All randomness is keyed by seed, epoch and image, so no
    generator has a state of its own.
    """
    local = {
        "buffers": dict(loop.module.named_buffers()),
        "averages": [average.state_dict() for average in loop.recipe.averages],
        "sums": {name: [total, count] for name, (total, count) in loop.sums.items()},
        "guard": loop.guard.state_dict(),
    }
    return {
        "format": FORMAT,
        "epoch": loop.epoch,
        "position": loop.position,
        "lines": loop.lines,
        "measured": dict(loop.measured),
        "best": loop.best,
        "stopped": loop.stopped,
        "averaged": loop.averaged,
        "seconds": loop.seconds,
        "epoch_began": loop.epoch_began,
        "seed": loop.setup.seed,
        "config": json.dumps(loop.setup.config),
        "code": loop.setup.code_digests,
        "data": dict(loop.setup.data_digests),
        "metrics": list(loop.folder.lines),
        "step": _savable(loop.module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in loop.optimizers],
        "ranks": [to_device(state, torch.device("cpu")) for state in distributed.gather_objects(local)],
    }


def _savable(state: dict[str, Any]) -> dict[str, Any]:
    """The same state, after a look at what modules keep beside tensors: only plain values can be read again."""
    parted(state)
    return state


def problem(state: Mapping[str, Any], *, epochs: int, batches: int) -> str | None:
    """Return what is wrong with the content of a checkpoint, in words, or None.

    Args:
        state: What the checkpoint holds.
        epochs: Length of the run.
        batches: Steps of an epoch.

    Example:
        >>> problem({"format": 1, "epoch": 3}, epochs=10, batches=4)
        'it lacks position'
    """
    if "format" in state and state["format"] != FORMAT:
        return None  # of another version, not damaged: `restore` says so
    for name, right in _PARTS.items():
        if name not in state:
            return f"it lacks {name}"
        if not right(state[name]):
            return f"its {name} is wrong"
    for name, right in _LATER_PARTS.items():
        if name in state and not right(state[name]):
            return f"its {name} is wrong"
    epoch, position, lines = state["epoch"], state["position"], state["lines"]
    inside = batches if state.get("averaged") else batches - 1  # all steps of an epoch, but not yet its validation
    most = inside if epoch < epochs else 0
    for name, value, limit in (("epoch", epoch, epochs), ("position", position, most), ("lines", lines, epochs)):
        if value > limit:
            return f"its {name} is {value}, and the run has {limit} at most"
    if len(state.get("metrics", range(lines))) != lines:
        return f"it holds {len(state['metrics'])} lines of metrics, not {lines}"
    return None


def _whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _seconds(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair)


def _best(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and {"epoch", "count", "validation"} <= value.keys())


def _ranks(value: Any) -> bool:
    whole = isinstance(value, list) and bool(value)
    return whole and all(isinstance(each, dict) and each.keys() >= _RANK for each in value)


def _json_object(value: Any) -> bool:
    try:
        return isinstance(value, str) and isinstance(parse_json(value, "it"), dict)
    except HoldfastError:
        return False


_RANK = {"buffers", "averages", "sums"}
_PARTS: dict[str, Callable[[Any], bool]] = {
    "format": _whole_number,
    "epoch": _whole_number,
    "position": _whole_number,
    "lines": _whole_number,
    "measured": lambda value: isinstance(value, dict),
    "best": _best,
    "seconds": _seconds,
    "epoch_began": _seconds,
    "step": lambda value: isinstance(value, dict),
    "optimizers": lambda value: isinstance(value, list),
    "ranks": _ranks,
}
_LATER_PARTS: dict[str, Callable[[Any], bool]] = {  # checkpoints of older versions are without them
    "stopped": lambda value: isinstance(value, bool),
    "averaged": lambda value: isinstance(value, bool),
    "config": _json_object,
    "code": _texts,
    "data": _texts,
    "metrics": lambda value: isinstance(value, list) and all(isinstance(line, str) for line in value),
}


def refuse_another_run(setup: Setup, state: Mapping[str, Any], run: Path) -> None:
    """Refuse to go on with another seed, configuration, code or data than the checkpoint was made with.

    Raises:
        HoldfastError: it differs; says in what.
    """
    advice = f"--resume repeats the run as it was begun; for another one choose another --out, with --init {run}"
    if state.get("seed", setup.seed) != setup.seed:
        raise HoldfastError(f"{run} was begun with seed {state['seed']}, not {setup.seed}: {advice}")
    if "config" in state:
        different = difference(
            parse_json(state["config"], "the checkpoint's configuration"), through_json(setup.config)
        )
        if different:
            raise HoldfastError(f"{run} was begun with another configuration, its {different}: {advice}")
    for what, now in (("code", setup.code_digests), ("data", setup.data_digests)):
        before = state.get(what, now)
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                one, other = (str(each.get(name, "none"))[:12] for each in (before, now))
                raise HoldfastError(
                    f"{run} was begun with other {what}, {name} (SHA-256 {one} then, {other} now): give the same"
                    f" {what}; {advice}"
                )


def restore(loop: Loop, state: dict[str, Any]) -> None:
    """Put a saved state into a loop that was made from the same configuration.

    Raises:
        HoldfastError: the checkpoint was written by another format, seed, model or number of processes.
    """
    if state.get("format") != FORMAT:
        raise HoldfastError(
            f"the checkpoint has format {state.get('format')}, this version reads {FORMAT}: resume with the version"
            " in environment.json"
        )
    ranks = state["ranks"]
    if len(ranks) != distributed.world_size():
        if state["position"]:
            raise HoldfastError(
                f"the checkpoint was written inside an epoch by {len(ranks)} processes, not"
                f" {distributed.world_size()}: resume with as many"
            )
        ranks = [ranks[0]] * distributed.world_size()  # at an epoch's end all processes hold the same
    local = to_device(ranks[distributed.rank()], loop.setup.device)
    try:
        _restore(loop, state, local)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise HoldfastError(
            f"the checkpoint does not fit this model or recipe ({reason}): resume with those it was begun with"
        ) from error


def _restore(loop: Loop, state: dict[str, Any], local: dict[str, Any]) -> None:
    """See `restore`; `local` is the part that differs between processes."""
    loop.module.load_state_dict(state["step"])
    for optimizer, saved in zip(loop.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    with torch.no_grad():
        for name, buffer in loop.module.named_buffers():
            buffer.copy_(local["buffers"][name])
    for average, saved in zip(loop.recipe.averages, local["averages"], strict=True):
        average.load_state_dict(saved)
    if "guard" in local:
        loop.guard.load_state_dict(local["guard"])
    loop.stopped = state.get("stopped", False)
    loop.averaged = state.get("averaged", False)
    loop.sums = {name: list(pair) for name, pair in local["sums"].items()}
    loop.epoch, loop.position, loop.lines = state["epoch"], state["position"], state["lines"]
    loop.measured, loop.best, loop.seconds = dict(state["measured"]), state["best"], state["seconds"]
    loop.epoch_began = state["epoch_began"]
