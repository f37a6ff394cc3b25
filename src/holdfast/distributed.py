"""Several processes: torchrun's environment, and the few sums that must cross process borders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from holdfast.errors import HoldfastError

T = TypeVar("T")


def active() -> bool:
    """Whether more than one process trains."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """How many processes train."""
    return dist.get_world_size() if active() else 1


def start_from_environment() -> bool:
    """Join the group that torchrun described in the environment. True if this call started it."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not dist.is_available() or dist.is_initialized():
        return False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Imported later (DDP does so), this module keeps the group in its functions' defaults. Gloo's threads would then
    # outlive `stop`, and one that lets go of a tensor while Python ends aborts the process.
    from torch.distributed.nn import functional as _  # noqa: F401

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return True


def stop(*, after_error: bool = False) -> None:
    """Leave the group.

    Args:
        after_error: Whether this process ends before the others. NCCL would then wait for what they still expect of it,
            so the group is left to the end of the process, by which a launcher and the others notice.
    """
    if dist.is_available() and dist.is_initialized() and not (after_error and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


def total(value: Tensor) -> Tensor:
    """The sum over all processes. The argument is left alone."""
    if not active():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def largest(value: Tensor) -> Tensor:
    """The largest value over all processes, element by element. The argument is left alone."""
    if not active():
        return value
    value = value.clone()
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def average_in_place(tensors: Sequence[Tensor]) -> None:
    """Replace every floating-point tensor by its mean over all processes; integer tensors become rank 0's."""
    if not active():
        return
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point():
                dist.all_reduce(tensor)
                tensor /= world_size()
            else:
                dist.broadcast(tensor, 0)


def average_buffers(module: nn.Module) -> None:
    """Make buffers equal on all processes, as is done at every epoch's end."""
    average_in_place(list(module.buffers()))


def require_rows(method: str, index: Tensor, memory: Tensor) -> None:
    """Refuse positions for which a memory with a row an image has none. Only the CPU is asked: others would wait."""
    if index.device.type == "cpu" and len(index) and int(index.max()) >= len(memory):
        raise HoldfastError(
            f"{method} was prepared for {len(memory)} images, and a batch holds number {int(index.max())}: call prepare"
            " with images=N for all of them"
        )


def merge_rows(memory: Tensor, written: Tensor) -> None:
    """Give every process the rows that another one has written since the last merge, and forget who wrote.

    A row that several have written becomes their mean; one that nobody has written stays as it is.

    Shapes:
        memory: (N, ...), equal on all processes where nobody has written; written: (N,) bool, all false afterwards.
    """
    if active():
        with torch.no_grad():
            writers = total(written.to(torch.float32))
            mask = written.view(-1, *[1] * (memory.dim() - 1))
            summed = total(torch.where(mask, memory, torch.zeros_like(memory)))
            share = writers.clamp_min(1).view_as(mask).to(memory.dtype)
            memory.copy_(torch.where((writers > 0).view_as(mask), summed / share, memory))
    written.zero_()


def gather_objects(value: Any) -> list[Any]:
    """Every process's value, in order of rank, on every process."""
    if not active():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def decided_by_first(decide: Callable[[], T]) -> T:
    """Call a function on rank 0 alone; every process returns its value, or raises its refusal."""
    value: T | HoldfastError | None = None
    if rank() == 0:
        try:
            value = decide()
        except HoldfastError as refusal:
            if not active():
                raise
            value = refusal
    decided = gather_objects(value)[0]
    if isinstance(decided, HoldfastError):
        raise decided
    return decided


def barrier() -> None:
    """Wait until all processes are here."""
    if active():
        dist.barrier()


@contextmanager
def refused_together() -> Iterator[None]:
    """Let every process refuse what one of them refuses; a barrier otherwise.

    Raises:
        HoldfastError: a process's own refusal, else that of the first one that has any.
    """
    own = None
    try:
        yield
    except HoldfastError as error:
        own = error
    told = [message for message in gather_objects(None if own is None else str(own)) if message is not None]
    if own is not None:
        raise own
    if told:
        raise HoldfastError(told[0])


@contextmanager
def others_missed() -> Iterator[None]:
    """Turn a collective that failed because another process has ended into one line.

    Raises:
        HoldfastError: instead of the error of torch's communication library.
    """
    try:
        yield
    except RuntimeError as error:
        if not active():
            raise
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower() and "by peer" not in str(error):
            raise
        raise HoldfastError(
            "another process of this run has ended: its own message says why; then go on with --resume (evaluate: with"
            " the same command)"
        ) from error
