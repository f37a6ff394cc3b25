"""The state of a run in progress, as tensors and plain values, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast import distributed
from holdfast.errors import HoldfastError

if TYPE_CHECKING:
    from holdfast.loop import Loop

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
        "step": loop.module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in loop.optimizers],
        "ranks": [to_device(state, torch.device("cpu")) for state in distributed.gather_objects(local)],
    }


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
        loop.module.load_state_dict(state["step"])
        for optimizer, saved in zip(loop.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise HoldfastError(f"the checkpoint does not fit this model or recipe: {reason}") from error
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
