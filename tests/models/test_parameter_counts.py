"""Parameter counts: the literature's numbers, and the same derived by hand from the architecture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast.models.factory import build

LITERATURE = {
    "resnet18": 11_173_962,
    "preact_resnet18": 11_172_170,
    "wrn_28_10": 36_479_194,
    "wrn_32_10": 46_160_474,
    "wrn_34_10": 46_160_474,
}


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def wide_by_hand(n: int, k: int, channels: int, classes: int) -> int:
    """Stem 9C16; a block has two 3x3 convolutions and two BatchNorms (2 numbers a channel); 1x1 shortcuts."""
    count = 9 * channels * 16
    inputs = 16
    for outputs in (16 * k, 32 * k, 64 * k):
        count += 2 * inputs + 9 * inputs * outputs + 2 * outputs + 9 * outputs * outputs
        count += inputs * outputs if inputs != outputs else 0
        count += (n - 1) * (18 * outputs * outputs + 4 * outputs)
        inputs = outputs
    return count + 2 * inputs + inputs * classes + classes


@pytest.mark.parametrize("name", LITERATURE)
def test_count_of_the_literature(name: str) -> None:
    with torch.device("meta"):
        model = build(name, num_classes=10)
    assert trainable(model) == LITERATURE[name]


# Depth 32 counts the linear layer and no shortcuts: 6n + 2, so n = 5 as in WRN-34 (6n + 4).
@pytest.mark.parametrize(("name", "n"), [("wrn_28_10", 4), ("wrn_32_10", 5), ("wrn_34_10", 5)])
@pytest.mark.parametrize(("channels", "classes"), [(3, 10), (1, 100)])
def test_wide_count_derived_by_hand(name: str, n: int, channels: int, classes: int) -> None:
    with torch.device("meta"):
        model = build(name, num_classes=classes, channels=channels)
    assert trainable(model) == wide_by_hand(n, 10, channels, classes)


def test_small_cnn_count_derived_by_hand() -> None:
    w = 32
    convolutions = 9 * (3 * w + w * 2 * w + 2 * w * 4 * w + 4 * w * 4 * w + 4 * w * 8 * w)
    norms = 2 * (w + 2 * w + 4 * w + 4 * w + 8 * w)
    assert trainable(build("small_cnn", num_classes=10)) == convolutions + norms + 4 * 4 * 8 * w * 10 + 10


def test_small_vit_count_derived_by_hand() -> None:
    d, tokens, patch = 192, 64, 4
    block = 2 * 2 * d + (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d)
    expected = (3 * patch * patch * d + d) + tokens * d + 6 * block + 2 * d + 10 * d + 10
    with torch.device("meta"):
        model = build("small_vit", num_classes=10)
    assert trainable(model) == expected


def test_normalisation_has_buffers_and_no_parameters() -> None:
    model = build("small_cnn", num_classes=10, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    assert "normalize.mean" in model.state_dict()
    assert not any(name.startswith("normalize") for name, _ in model.named_parameters())
