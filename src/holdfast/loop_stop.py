"""When the loop stops because it was asked to: all processes at the same place, with everything saved."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from holdfast import distributed
from holdfast.interruption import Interrupted

if TYPE_CHECKING:
    from holdfast.loop import Loop

CONFER_EVERY = 10  # steps between two times at which several processes confer
CONFER_SECONDS = 10.0  # and seconds, where steps are slow: torchrun kills 30 s after it has asked


def asked_anywhere(loop: Loop) -> int:
    """Return the number of the signal that asked any process to stop, or 0. All processes must call it."""
    own = loop.interruption.number if loop.interruption.asked else 0
    if not distributed.active():
        return own
    return int(distributed.largest(torch.tensor(float(own), device=loop.setup.device)))


def pause(loop: Loop) -> None:
    """Save between two steps now and then, and stop there if any process was asked to.

    Raises:
        Interrupted: the state has been saved.
    """
    if loop.position == len(loop.loader):
        return  # what the epoch's end does comes first
    due = time.monotonic() - loop.saved_at > 60 * loop.settings.checkpoint_minutes
    asked = loop.interruption.number if loop.interruption.asked else 0
    if distributed.active():
        if loop.position % loop.confer_every:
            return
        now = time.monotonic()
        told = [float(asked), float(due), (now - loop.conferred_at) / loop.confer_every]
        loop.conferred_at = now
        agreed = distributed.largest(torch.tensor(told, device=loop.setup.device)).tolist()
        asked, due = int(agreed[0]), bool(agreed[1])
        loop.confer_every = min(CONFER_EVERY, max(1, int(CONFER_SECONDS / max(agreed[2], 1e-9))))
    if asked or due:
        loop.check_weights()
        loop.save()
    if asked:
        raise Interrupted(loop.folder.path, asked)


def shared_batches(images: int, processes: int, batch_size: int) -> int:
    """Return how many batches every process has: at these all can confer, and at no others.

    Example:
        >>> shared_batches(7, processes=2, batch_size=3)  # of one process 3 and 1, of the other 3
        1
    """
    return -(-(images // processes) // batch_size)


def at_each_batch(loop: Loop, images: int, *, closing: bool) -> Callable[[int], None]:
    """Return a function to be told of every batch of an evaluation, which stops the run there if it was asked to.

    All that a run has learnt is saved before its closing evaluation; a validation's epoch is saved here.

    Args:
        loop: The run.
        images: How many images are evaluated, over all processes.
        closing: Whether this is the closing evaluation, whose progress is shown.
    """
    shared = shared_batches(images, distributed.world_size(), loop.settings.evaluation_batch)
    done = 0

    def told(count: int) -> None:
        nonlocal done
        done += 1
        if closing:
            loop.display.advance(count)
        asked = asked_anywhere(loop) if done <= shared else 0
        if asked and not closing:
            loop.save()
        if asked:
            raise Interrupted(loop.folder.path, asked)

    return told
