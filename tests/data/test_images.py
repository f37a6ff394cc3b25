"""Images and Dataset hold what they say and refuse the rest."""

from __future__ import annotations

import pytest
import torch

from holdfast.data.images import Dataset, Images, numbered_classes
from holdfast.errors import HoldfastError


def images(labels, *, shape=(4, 6, 3)) -> Images:
    count = len(labels)
    pixels = torch.arange(count * shape[0] * shape[1] * shape[2]).reshape(count, *shape) % 251
    return Images(pixels.to(torch.uint8), torch.tensor(labels))


def test_subset_picks_images_with_their_labels_in_order():
    whole = images([5, 6, 7])
    part = whole.subset(torch.tensor([2, 0]))
    assert part.labels.tolist() == [7, 5]
    assert torch.equal(part.pixels, torch.stack([whole.pixels[2], whole.pixels[0]]))
    assert whole.subset(torch.tensor([False, True, False])).labels.tolist() == [6]


def test_pixels_become_contiguous_without_changing():
    channels_first = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).to(torch.uint8)
    made = Images(channels_first.permute(0, 2, 3, 1), torch.tensor([0, 1]))
    assert made.pixels.is_contiguous()
    assert made.pixels[1, 3, 2, 1] == channels_first[1, 1, 3, 2]


def test_to_moves_both_tensors():
    moved = images([0, 1]).to("meta")
    assert moved.pixels.device.type == moved.labels.device.type == "meta"


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (torch.zeros(2, 4, 4, 3), torch.zeros(2).long(), r"pixels are float32, uint8 is expected: store \(255 \* "),
        (torch.zeros(2, 4, 4, 3).long(), torch.zeros(2).long(), "pixels are int64, uint8 is expected: store 0 to 255"),
        (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long(), r"shape \(2, 4, 4\), \(N, H, W, C\) is expected"),
        (torch.zeros(2, 3, 8, 8).byte(), torch.zeros(2).long(), r"use pixels.permute\(0, 2, 3, 1\)"),
        (torch.zeros(2, 8, 8, 4).byte(), torch.zeros(2).long(), "convert the images to grey or RGB"),
        (torch.zeros(2, 0, 8, 3).byte(), torch.zeros(2).long(), "height and width must be at least 1"),
        (torch.zeros(2, 4, 4, 3).byte(), torch.zeros(2).int(), r"labels are int32, int64 is expected.*labels.long\(\)"),
        (torch.zeros(2, 4, 4, 3).byte(), torch.zeros(3).long(), r"labels have shape \(3,\) for 2 images"),
        (torch.zeros(2, 4, 4, 3).byte(), torch.zeros(2, 1).long(), r"labels have shape \(2, 1\) for 2 images"),
        (torch.zeros(2, 4, 4, 3).byte(), torch.zeros(2, device="meta").long(), "put both on one device"),
    ],
)
def test_images_refuse(pixels, labels, message):
    with pytest.raises(HoldfastError, match=message):
        Images(pixels, labels)


def test_dataset_properties():
    data = Dataset("toy", images([0, 1, 2]), images([2]), ("a", "b", "c"))
    assert (data.image_size, data.channels, data.num_classes) == ((4, 6), 3, 3)
    assert (data.suggested_epsilon, data.flip, data.crop, data.notes) == (None, False, True, ())


@pytest.mark.parametrize(
    ("train", "test", "classes", "message"),
    [
        ([0, 1, 2, 3], [0], "abc", "toy: training label 3 at index 3 is outside 0 to 2"),
        ([0, 1, 2], [0, -1], "abc", "toy: test label -1 at index 1 is outside 0 to 2"),
        ([0, 2, 2], [1], "abc", "class 'b' has no training image: add at least one"),
        ([0, 1], [], "ab", "the test split holds no images"),
        ([], [0, 1], "ab", "the training split holds no images"),
        ([0, 0], [0], "a", "1 class found: a classifier needs at least two"),
        ([0, 1, 2], [0], "aba", "class name 'a' occurs twice"),
    ],
)
def test_dataset_refuses(train, test, classes, message):
    def make(labels):
        return images(labels) if labels else Images(torch.zeros(0, 4, 6, 3).byte(), torch.zeros(0).long())

    with pytest.raises(HoldfastError, match=message):
        Dataset("toy", make(train), make(test), tuple(classes))


@pytest.mark.parametrize("shape", [(6, 4, 3), (4, 6, 1)])
def test_dataset_refuses_splits_of_different_shape(shape):
    with pytest.raises(HoldfastError, match=r"training images are \(4, 6, 3\) and test images \(.*make both splits"):
        Dataset("toy", images([0, 1]), images([0, 1], shape=shape), ("a", "b"))


def test_numbered_classes_look_at_both_splits():
    assert numbered_classes(torch.tensor([0, 1, 0]), torch.tensor([2])) == ("0", "1", "2")
    assert numbered_classes(torch.tensor([0, 1, 0])) == ("0", "1")


def test_numbered_classes_refuse_an_absurd_label_at_once():
    with pytest.raises(HoldfastError, match="largest label is 4611686018427387904 but there are only 2 training"):
        numbered_classes(torch.tensor([0, 2**62]))
