"""The two networks whose shape depends on the image size, the normalisation layer, and their refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models.classifier import ImageClassifier, require_at_least
from holdfast.models.normalize import Normalize, normalization
from holdfast.models.small_cnn import SmallCNN
from holdfast.models.taps import tapped
from holdfast.models.vit import SelfAttention, SmallViT, TransformerBlock, default_patch
from holdfast.models.weight_init import initialize_convolutional


@pytest.mark.parametrize(
    ("size", "first", "last"),
    [
        ((8, 8), (8, 8), (2, 2)),
        ((16, 16), (16, 16), (4, 4)),
        ((17, 17), (9, 9), (3, 3)),
        ((28, 28), (14, 14), (4, 4)),
        ((16, 32), (16, 32), (4, 8)),
    ],
)
def test_small_cnn_strides_follow_the_image_size(size: tuple[int, int], first: tuple[int, int], last: tuple) -> None:
    model = SmallCNN(10, channels=1, image_size=size, width=4).eval()
    with tapped(model, ["layer1", "layer5"]) as features:
        model(torch.rand(1, 1, *size))
    assert features["layer1"].shape == (1, 4, *first)
    assert features["layer5"].shape == (1, 32, *last)


def test_small_cnn_refuses_tiny_images() -> None:
    with pytest.raises(HoldfastError, match="at least 8x8"):
        SmallCNN(10, image_size=(32, 7))


@pytest.mark.parametrize(
    ("size", "patch"),
    [
        ((8, 8), 1),
        ((12, 12), 1),
        ((16, 16), 2),
        ((28, 28), 4),
        ((32, 32), 4),
        ((64, 64), 8),
        ((32, 48), 4),
        ((31, 31), 1),
    ],
)
def test_default_patch_is_near_an_eighth_and_divides(size: tuple[int, int], patch: int) -> None:
    assert default_patch(size) == patch


def test_vit_tokens_and_patch_option() -> None:
    assert SmallViT(10, image_size=(16, 24), dim=6, depth=1).positions.shape == (1, 96, 6)
    assert SmallViT(10, image_size=(16, 24), patch=8, dim=6, depth=1).positions.shape == (1, 6, 6)


def test_vit_sees_where_a_patch_is() -> None:
    torch.manual_seed(0)
    model = SmallViT(10, channels=1, image_size=(8, 8), dim=24, depth=1).double().eval()
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    assert not torch.allclose(model(x), model(x.flip(3)))
    torch.nn.init.zeros_(model.positions)
    # Without positions the mean over tokens cannot tell an image of 1-pixel patches from its mirror image.
    assert torch.allclose(model(x), model(x.flip(3)))


def test_attention_equals_a_loop_over_heads_and_tokens() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(6, heads=2).double()
    tokens = torch.randn(1, 4, 6, dtype=torch.float64)
    query, key, value = layer.qkv(tokens)[0].split(6, dim=1)
    mixed = torch.zeros(4, 6, dtype=torch.float64)
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        for i in range(4):
            weights = torch.stack([query[i, part] @ key[j, part] / 3**0.5 for j in range(4)]).softmax(0)
            mixed[i, part] = sum(weights[j] * value[j, part] for j in range(4))
    assert torch.allclose(layer(tokens)[0], layer.project(mixed), rtol=1e-12)


def test_transformer_block_normalises_before_and_adds_after() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(6, heads=2, mlp_ratio=2).double()
    for layer in (block.norm1, block.norm2):
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias)
    x = torch.randn(2, 4, 6, dtype=torch.float64)

    def standard(layer: nn.LayerNorm, value: torch.Tensor) -> torch.Tensor:
        centred = value - value.mean(2, keepdim=True)
        return centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    z = x + block.attention(standard(block.norm1, x))
    hidden = block.mlp.fc1(standard(block.norm2, z))
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    assert torch.allclose(block(x), z + block.mlp.fc2(gelu), rtol=1e-10, atol=1e-12)


def test_vit_averages_its_tokens_after_the_last_norm() -> None:
    model = SmallViT(10, channels=1, image_size=(8, 8), dim=6, depth=1).double()
    with tapped(model, ["norm"]) as features:
        logits = model(torch.rand(2, 1, 8, 8, dtype=torch.float64))
    assert features["norm"].shape == (2, 64, 6)
    assert torch.allclose(logits, model.fc(features["norm"].sum(1) / 64), rtol=1e-10)


def test_vit_starting_weights() -> None:
    torch.manual_seed(0)
    model = SmallViT(10, patch=4)
    attention = model.get_submodule("blocks.0.attention.qkv")
    assert isinstance(attention, nn.Linear)
    assert attention.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.positions.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.patch_embedding.weight.std().item() == pytest.approx((1 / (3 * 4 * 4)) ** 0.5, rel=0.05)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_initialisation_sets_every_weight_whatever_was_there() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Linear(100, 50))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
    initialize_convolutional(model)
    convolution, norm, linear = (dict(layer.named_parameters()) for layer in model)
    assert convolution["weight"].std().item() == pytest.approx((2 / (9 * 8)) ** 0.5, rel=0.2)
    assert linear["weight"].std().item() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert linear["weight"].abs().max() <= 0.1
    assert (norm["weight"] == 1).all()
    assert not any(layer["bias"].any() for layer in (convolution, norm, linear))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 5}, "patch 5 does not divide images of 32x32: use patch=4"),
        ({"patch": 0}, "patch must be a whole number of at least 1, got 0"),
        ({"dim": 100, "heads": 3}, "dim 100 is not a multiple of heads 3"),
        ({"depth": 0}, "depth must be"),
        ({"image_size": (0, 8)}, "height must be"),
    ],
)
def test_vit_refusals(options: dict, message: str) -> None:
    with pytest.raises(HoldfastError, match=message):
        SmallViT(10, **options)


def test_vit_refuses_another_image_size() -> None:
    model = SmallViT(10, image_size=(8, 16), dim=6, depth=1)
    # Transposed, this image would have as many tokens as the right one.
    with pytest.raises(HoldfastError, match=r"takes images of 8x16, got 16x8: build it with image_size=\(16, 8\)"):
        model(torch.rand(1, 3, 16, 8))


def test_normalize_is_exact_and_moves_with_the_module() -> None:
    layer = Normalize((0.25, 0.5), (0.5, 0.125))
    x = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1)
    assert layer(x).flatten().tolist() == [0.0, 2.0]
    assert layer.mean.shape == layer.std.shape == (1, 2, 1, 1)
    assert layer.mean.dtype == torch.float32
    assert sorted(layer.state_dict()) == ["mean", "std"]
    assert layer.double()(x.double()).dtype == torch.float64
    with torch.device("meta"):
        assert "channels=2" in repr(Normalize((0.25, 0.5), (0.5, 0.125)))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), (0.5, 0.5), "mean has 1 numbers and std has 2"),
        ((), (), "mean has 0 numbers"),
        ((0.5,), (0.0,), "must be above 0"),
        ((0.5,), (-1.0,), "must be above 0"),
        ((float("nan"),), (1.0,), "must be finite"),
        ((0.5,), (float("inf"),), "must be finite"),
    ],
)
def test_normalize_refusals(mean: tuple, std: tuple, message: str) -> None:
    with pytest.raises(HoldfastError, match=message):
        Normalize(mean, std)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (3, 4, 4), (2, 4, 4, 3)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(HoldfastError, match=r"images of shape \(B, 3, H, W\)"):
        Normalize((0.5,) * 3, (0.5,) * 3)(torch.rand(shape))


def test_statistics_must_fit_the_channels() -> None:
    with pytest.raises(HoldfastError, match="mean has 3 numbers for 1 channels"):
        normalization(1, (0.5, 0.5, 0.5), None)
    with pytest.raises(HoldfastError, match="std has 1 numbers for 3 channels"):
        normalization(3, None, (0.5,))


def test_sizes_must_be_whole_and_large_enough() -> None:
    with pytest.raises(HoldfastError, match="num_classes must be a whole number of at least 2, got 1"):
        ImageClassifier(1)
    with pytest.raises(HoldfastError, match="channels must be"):
        ImageClassifier(10, channels=0)
    for wrong in (True, 2.0, "3", None):
        with pytest.raises(HoldfastError, match="width must be a whole number"):
            require_at_least(1, width=wrong)
