"""The residual networks against a restatement written with functions from the papers' formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.errors import HoldfastError
from holdfast.models.preact_resnet import PreActResNet18
from holdfast.models.resnet import ResNet18
from holdfast.models.wide_resnet import WideResNet, blocks_per_group

State = dict[str, Tensor]


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.double().eval()


def norm(state: State, key: str, x: Tensor) -> Tensor:
    shape = (1, -1, 1, 1)
    scaled = (x - state[f"{key}.running_mean"].view(shape)) / (state[f"{key}.running_var"].view(shape) + 1e-5).sqrt()
    return scaled * state[f"{key}.weight"].view(shape) + state[f"{key}.bias"].view(shape)


def norm_relu(state: State, key: str, x: Tensor) -> Tensor:
    return norm(state, key, x).clamp(min=0)


def conv(state: State, key: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{key}.weight"]
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def head(state: State, x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def pre_activation_block(state: State, key: str, x: Tensor, stride: int) -> Tensor:
    activated = norm_relu(state, f"{key}.bn1", x)
    inner = conv(state, f"{key}.conv1", activated, stride)
    inner = conv(state, f"{key}.conv2", norm_relu(state, f"{key}.bn2", inner))
    projection = f"{key}.shortcut"
    return inner + (conv(state, projection, activated, stride) if f"{projection}.weight" in state else x)


def post_activation_block(state: State, key: str, x: Tensor, stride: int) -> Tensor:
    inner = norm_relu(state, f"{key}.bn1", conv(state, f"{key}.conv1", x, stride))
    inner = norm(state, f"{key}.bn2", conv(state, f"{key}.conv2", inner))
    if f"{key}.shortcut.0.weight" in state:
        x = norm(state, f"{key}.shortcut.1", conv(state, f"{key}.shortcut.0", x, stride))
    return (inner + x).clamp(min=0)


def test_wide_resnet_follows_norm_relu_conv() -> None:
    model = randomised(WideResNet(16, 2, 5))
    x = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    state = model.state_dict()
    hidden = conv(state, "conv1", x)
    for group, stride in ((1, 1), (2, 2), (3, 2)):
        hidden = pre_activation_block(state, f"block{group}.layer.0", hidden, stride)
        hidden = pre_activation_block(state, f"block{group}.layer.1", hidden, 1)
    assert torch.allclose(model(x), head(state, norm_relu(state, "bn1", hidden)), rtol=1e-10, atol=1e-10)


def test_preact_resnet_follows_norm_relu_conv() -> None:
    model = randomised(PreActResNet18(5, width=3))
    x = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    state = model.state_dict()
    hidden = conv(state, "conv1", x)
    for stage, stride in ((1, 1), (2, 2), (3, 2), (4, 2)):
        hidden = pre_activation_block(state, f"layer{stage}.0", hidden, stride)
        hidden = pre_activation_block(state, f"layer{stage}.1", hidden, 1)
    assert torch.allclose(model(x), head(state, norm_relu(state, "bn", hidden)), rtol=1e-10, atol=1e-10)


def test_resnet_follows_conv_norm_relu() -> None:
    model = randomised(ResNet18(5, width=3))
    x = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    state = model.state_dict()
    hidden = norm_relu(state, "bn1", conv(state, "conv1", x))
    for stage, stride in ((1, 1), (2, 2), (3, 2), (4, 2)):
        hidden = post_activation_block(state, f"layer{stage}.0", hidden, stride)
        hidden = post_activation_block(state, f"layer{stage}.1", hidden, 1)
    assert torch.allclose(model(x), head(state, hidden), rtol=1e-10, atol=1e-10)


def test_the_smallest_wide_network_projects_only_where_shapes_differ() -> None:
    names = [name for name, _ in WideResNet(10, 1, 10).named_modules() if name.endswith("shortcut")]
    assert names == ["block2.layer.0.shortcut", "block3.layer.0.shortcut"]


def test_dropout_acts_between_the_convolutions_and_only_in_training() -> None:
    torch.manual_seed(0)
    model = WideResNet(10, 2, 10, dropout=0.5)
    x = torch.rand(4, 3, 8, 8)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    dropped: list[Tensor] = []
    block = model.get_submodule("block1.layer.0")
    block.get_submodule("conv2").register_forward_pre_hook(lambda _, inputs: dropped.append(inputs[0].detach()))
    kept: list[Tensor] = []
    block.get_submodule("relu2").register_forward_hook(lambda *call: kept.append(call[2].detach()))
    model(x)
    survives = dropped[0] != 0
    assert torch.allclose(dropped[0][survives], 2 * kept[0][survives])
    share = survives.sum() / (kept[0] != 0).sum()
    assert 0.45 < share < 0.55


@pytest.mark.parametrize(("depth", "blocks"), [(8, 1), (10, 1), (16, 2), (28, 4), (32, 5), (34, 5), (70, 11)])
def test_both_ways_of_counting_depth(depth: int, blocks: int) -> None:
    assert blocks_per_group(depth) == blocks


@pytest.mark.parametrize("depth", [2, 4, 5, 30, 33, 0, -2])
def test_other_depths_are_refused(depth: int) -> None:
    with pytest.raises(HoldfastError, match="depth"):
        blocks_per_group(depth)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_dropout_outside_its_range_is_refused(dropout: float) -> None:
    with pytest.raises(HoldfastError, match="dropout must be in"):
        WideResNet(10, 1, 10, dropout=dropout)
