"""The digits in the package are scikit-learn's, scaled and split in the stated way."""

from __future__ import annotations

from importlib import resources

import pytest
import torch

from holdfast.data import digits


def test_facts():
    data = digits.read()
    assert (data.name, len(data.train), len(data.test)) == ("digits", 1437, 360)
    assert (data.image_size, data.channels, data.num_classes) == ((8, 8), 1, 10)
    assert (data.suggested_epsilon, data.flip, data.crop) == (0.2, False, False)
    assert data.train.pixels.max() == 255
    counts = data.test.labels.bincount()
    assert counts.min() >= 35
    assert counts.max() <= 37


def test_every_image_is_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets", reason="compares with scikit-learn's copy of the digits")
    theirs = datasets.load_digits()
    pixels = (torch.from_numpy(theirs.images) * 255 / 16).round().to(torch.uint8)
    data = digits.read()

    def rows(images, labels):
        return sorted(zip(map(tuple, images.reshape(len(images), -1).tolist()), labels.tolist(), strict=True))

    both_splits = torch.cat([data.train.pixels, data.test.pixels]), torch.cat([data.train.labels, data.test.labels])
    assert rows(*both_splits) == rows(pixels, torch.from_numpy(theirs.target))
    # the held-out positions are fixed for good
    assert data.test.labels[:20].tolist() == [1, 3, 5, 0, 1, 2, 8, 7, 3, 0, 2, 7, 3, 0, 6, 7, 3, 0, 3, 1]


def test_licence_travels_with_the_data():
    text = resources.files("holdfast.data").joinpath("digits.LICENSE.txt").read_text(encoding="utf-8")
    for needed in ("Alpaydin", "Kaynak", "CC BY 4.0", "10.24432/C50P49", "Changes:"):
        assert needed in text
