"""The handwritten digits that ship with the package: 8×8 grey, ten classes, no download.

The data is UCI's Optical Recognition of Handwritten Digits by E. Alpaydin and C. Kaynak (CC BY 4.0); see
``digits.LICENSE.txt`` beside this file.
"""

from __future__ import annotations

from importlib import resources

import numpy as np
import torch

from holdfast.data.archive import open_archive
from holdfast.data.images import Dataset, Images
from holdfast.data.limits import Room
from holdfast.data.split import stratified_split

TEST_IMAGES = 360


def read() -> Dataset:
    """The digits: 1,437 training and 360 test images, the same split for every seed.

    The original grey levels 0 to 16 become round(255 * level / 16).

    Example:
        >>> digits = read()
        >>> len(digits.train), len(digits.test), digits.image_size
        (1437, 360, (8, 8))
    """
    file = resources.files("holdfast.data").joinpath("digits.npz").open("rb")
    with open_archive(file, "the digits", Room()) as archive:
        levels, labels = archive.read("levels"), archive.read("labels")
    pixels = np.rint(levels.astype(np.float64) * 255 / 16).astype(np.uint8)
    images = Images(torch.from_numpy(pixels).unsqueeze(-1), torch.from_numpy(labels.astype(np.int64)))
    kept, held = stratified_split(images.labels, TEST_IMAGES, seed=0)
    return Dataset(
        name="digits",
        train=images.subset(kept),
        test=images.subset(held),
        classes=tuple(str(digit) for digit in range(10)),
        suggested_epsilon=0.2,
        flip=False,
        crop=False,
    )
