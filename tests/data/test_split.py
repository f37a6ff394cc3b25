"""The stratified split: in proportion, exact in number, repeatable, and never the last image of a class."""

from __future__ import annotations

import pytest
import torch

from holdfast.data.images import Images
from holdfast.data.split import hold_out_test, stratified_split
from holdfast.errors import HoldfastError


def labels_of(*sizes: int) -> torch.Tensor:
    """Labels of the given class sizes in a fixed shuffled order."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("sizes", [(50, 30, 20), (7, 11, 13, 3), (101, 1, 5), (2, 2, 2, 2, 2)])
@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_shares_total_and_partition(sizes, fraction):
    labels = labels_of(*sizes)
    kept, held = stratified_split(labels, fraction, seed=3)
    assert len(held) == round(fraction * len(labels))
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(len(labels)))
    assert kept.dtype == held.dtype == torch.int64
    assert torch.equal(kept, kept.sort().values)
    assert torch.equal(held, held.sort().values)
    counts = labels[held].bincount(minlength=len(sizes))
    for size, count in zip(sizes, counts.tolist(), strict=True):
        assert abs(count - size * len(held) / len(labels)) < 1
        assert count < size


def test_largest_remainder_by_hand():
    # exact shares of 4 in 11: 1.82, 1.45, 0.73: floors 1, 1, 0, then the two largest remainders get one each
    labels = labels_of(5, 4, 2)
    _, held = stratified_split(labels, 4, seed=0)
    assert labels[held].bincount(minlength=3).tolist() == [2, 1, 1]


def test_small_classes_keep_one_and_the_total_still_holds():
    labels = labels_of(1, 1, 1, 1, 6)
    kept, held = stratified_split(labels, 0.5, seed=0)
    assert labels[kept].bincount().tolist() == [1, 1, 1, 1, 1]
    assert len(held) == 5


def test_depends_on_seed_and_labels_only():
    labels = labels_of(40, 40)
    first, again, other = (stratified_split(labels, 0.25, seed)[1] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # naming the classes otherwise, in the same order, picks the same images
    assert torch.equal(stratified_split(labels * 10 + 3, 0.25, 5)[1], first)


def test_choice_never_changes():
    """Recorded once; a change would silently move test images into everybody's training split."""
    assert stratified_split(torch.arange(20) % 2, 6, seed=0)[1].tolist() == [0, 1, 9, 11, 16, 18]


def test_held_out_images_are_not_simply_the_first_ones():
    held = stratified_split(torch.arange(100) % 2, 0.2, seed=0)[1]
    assert held.max() > 50
    assert held.min() < 50


@pytest.mark.parametrize(
    ("held_out", "seed", "message"),
    [
        (0.0, 0, "fraction to hold out is 0.0: give a number between 0 and 1"),
        (1.0, 0, "fraction to hold out is 1.0"),
        (0.01, 0, "cannot hold out 0 of 6 images in 2 classes"),
        (5, 0, "cannot hold out 5 of 6 images in 2 classes.*every class must keep one"),
        (0.5, -1, "seed is -1: give an integer of at least 0"),
    ],
)
def test_refuses(held_out, seed, message):
    with pytest.raises(HoldfastError, match=message):
        stratified_split(labels_of(3, 3), held_out, seed)


def test_hold_out_test_keeps_pixels_with_labels_and_tells():
    labels = torch.arange(20) % 2
    pixels = torch.arange(20, dtype=torch.uint8).reshape(20, 1, 1, 1)
    train, test, note = hold_out_test(Images(pixels, labels), seed=7)
    assert (len(train), len(test)) == (16, 4)
    for part in (train, test):
        assert torch.equal(part.pixels.flatten() % 2, part.labels)
    assert note == "No test split: 4 of 20 images (20 %, stratified, seed 7) are held out as the test split."
