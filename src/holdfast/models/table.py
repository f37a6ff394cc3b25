"""The networks by name. Imports nothing heavy, so that listing them is instant."""

from __future__ import annotations

MODELS: dict[str, str] = {
    "small_cnn": "five convolutions with BatchNorm, for 8x8 to 32x32 images and laptops (option: width)",
    "resnet18": "ResNet-18 with a 3x3 stem, 11.2 M parameters (option: width)",
    "preact_resnet18": "pre-activation ResNet-18 with a 3x3 stem, 11.2 M parameters (option: width)",
    "wrn_28_10": "wide ResNet, 4 blocks a group, 10 times as wide, 36.5 M parameters (option: dropout)",
    "wrn_32_10": "wide ResNet, 5 blocks a group, 46.2 M parameters; wrn_34_10 with depth counted as 6n + 2",
    "wrn_34_10": "wide ResNet, 5 blocks a group, 10 times as wide, 46.2 M parameters (option: dropout)",
    "small_vit": "small vision transformer for 8x8 to 64x64 images (options: patch, dim, depth, heads, mlp_ratio)",
}
"""Name -> one line saying what it is. `holdfast.models.factory.build` takes these names."""
