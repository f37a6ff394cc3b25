"""Hold out part of a labelled set with the classes in proportion, the same on every machine."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from holdfast.data.images import Images
from holdfast.errors import HoldfastError


def stratified_split(labels: Tensor, held_out: float | int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose which positions to keep and which to hold out, class by class in proportion.

    The shares are rounded by largest remainder, so that a class's share is within one image of the exact one, save
    where that would take its last image: every class keeps at least one. The choice depends on the labels and the
    seed only. It is drawn from PCG64's raw output, which NumPy promises never to change.

    Args:
        labels: Class numbers.
        held_out: Fraction in (0, 1), of which round(fraction * N) images are held out; or an int, their number.
        seed: Any integer >= 0.
    Returns:
        Positions kept and positions held out, both ascending, int64, on the CPU.
    Shapes:
        labels: (N,); results: (N - M,) and (M,), where M is the number held out.
    Raises:
        HoldfastError: Nothing or too much would be held out, or the seed is negative.
    Example:
        >>> import torch
        >>> kept, held = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 0.25, seed=0)
        >>> len(kept), len(held)
        (6, 2)
    """
    if seed < 0:
        raise HoldfastError(f"seed is {seed}: give an integer of at least 0")
    present, group, sizes = np.unique(labels.detach().cpu().numpy(), return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    total = _total(held_out, len(group))
    if not 0 < total <= len(group) - len(present):
        raise HoldfastError(
            f"cannot hold out {total} of {len(group)} images in {len(present)} classes, because at least one must be "
            "held out and every class must keep one: add images or change the fraction"
        )
    generator = np.random.PCG64(seed)
    shares = _shares(sizes, total, ties=generator.random_raw(len(sizes)))
    order = np.lexsort((generator.random_raw(len(group)), group))  # by class, shuffled within it
    rank = np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    is_held = np.zeros(len(group), dtype=bool)
    is_held[order] = rank < np.repeat(shares, sizes)
    return torch.from_numpy(np.flatnonzero(~is_held)), torch.from_numpy(np.flatnonzero(is_held))


def hold_out_test(images: Images, seed: int, *, fraction: float = 0.2) -> tuple[Images, Images, str]:
    """Training split, test split and the note to tell, for data that comes without a test split.

    Example:
        >>> import torch
        >>> images = Images(torch.zeros(10, 4, 4, 1, dtype=torch.uint8), torch.arange(10) % 2)
        >>> hold_out_test(images, seed=3)[2]
        'No test split: 2 of 10 images (20 %, stratified, seed 3) are held out as the test split.'
    """
    kept, held = stratified_split(images.labels, fraction, seed)
    note = (
        f"No test split: {len(held)} of {len(images)} images ({100 * fraction:g} %, stratified, seed {seed}) are held "
        "out as the test split."
    )
    return images.subset(kept), images.subset(held), note


def _total(held_out: float | int, count: int) -> int:
    if isinstance(held_out, int):
        return held_out
    if not 0 < held_out < 1:
        raise HoldfastError(f"fraction to hold out is {held_out}: give a number between 0 and 1, or a whole count")
    return round(held_out * count)


def _shares(sizes: np.ndarray, total: int, *, ties: np.ndarray) -> np.ndarray:
    """How many of each class to hold out: largest remainder, at most size - 1; equal remainders go by ``ties``."""
    # Python integers: size * total may pass 2**63 on a 32-bit default, and floats would round the remainders.
    exact = [int(size) * total for size in sizes]
    count = int(sizes.sum())
    shares = np.array([value // count for value in exact], dtype=np.int64)
    by_remainder = sorted(range(len(exact)), key=lambda c: (-(exact[c] % count), int(ties[c])))
    missing = total - int(shares.sum())
    while missing > 0:  # more than one round only where small classes are at their limit
        for c in by_remainder:
            if missing > 0 and shares[c] < sizes[c] - 1:
                shares[c] += 1
                missing -= 1
    return shares
