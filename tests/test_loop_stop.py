"""Where several processes may confer: only where each of them will."""

from __future__ import annotations

import torch

from holdfast.loop_stop import shared_batches


def test_every_process_has_the_shared_batches() -> None:
    """Images are shared out in turn, as `accuracies` does it, and the smallest share decides."""
    for images in range(1, 25):
        for processes in (1, 2, 3, 4):
            for size in (1, 2, 5, 30):
                shares = [torch.arange(images)[rank::processes] for rank in range(processes)]
                batches = [len(share.split(size)) if len(share) else 0 for share in shares]
                assert shared_batches(images, processes, size) == min(batches)
