"""Feature taps: what they read, that they leave no trace, and their refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from holdfast.errors import HoldfastError
from holdfast.models.resnet import ResNet18
from holdfast.models.taps import feature_names, tapped
from holdfast.models.wide_resnet import WideResNet

# The layers that AR-AT aligns.
RESNET_LAYERS = ["layer4.0.bn1", "layer4.0.bn2", "layer4.1.bn1", "layer4.1.bn2"]
WIDE_LAYERS = [f"block3.layer.{i}.relu{j}" for i in range(5) for j in (1, 2)] + ["avgpool"]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_resnet_layers_of_ar_at() -> None:
    model = ResNet18(10, width=4).eval()
    x = torch.rand(2, 3, 16, 16)
    with tapped(model, RESNET_LAYERS) as features:
        model(x)
    assert list(features) == RESNET_LAYERS
    assert {tuple(value.shape) for value in features.values()} == {(2, 32, 2, 2)}
    # A BatchNorm output has both signs; an in-place ReLU after it would have cut the negative one off.
    assert all(value.min() < 0 for value in features.values())


def test_wide_layers_of_ar_at() -> None:
    model = WideResNet(34, 1, 10).eval()
    with tapped(model, WIDE_LAYERS) as features:
        model(torch.rand(2, 3, 8, 8))
    assert set(features) == set(WIDE_LAYERS)
    assert features["avgpool"].shape == (2, 64, 1, 1)
    assert features["block3.layer.0.relu1"].shape == (2, 32, 4, 4)
    assert features["block3.layer.4.relu2"].shape == (2, 64, 2, 2)
    assert all(value.min() >= 0 for value in features.values())


def test_features_are_the_ones_that_make_the_logits() -> None:
    model = ResNet18(10, width=4).double().eval()
    with tapped(model, ["avgpool", "fc"]) as features:
        logits = model(torch.rand(2, 3, 16, 16, dtype=torch.float64))
    assert torch.equal(features["fc"], logits)
    assert torch.equal(model.fc(features["avgpool"].flatten(1)), logits)


def test_gradient_flows_through_features() -> None:
    model = ResNet18(10, width=4).eval()
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    with tapped(model, ["layer4.0.bn1"]) as features:
        model(x)
    (gradient,) = torch.autograd.grad(features["layer4.0.bn1"].square().sum(), x)
    assert gradient.any()


def test_functional_call_is_tapped_with_its_own_parameters() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU())
    x = torch.rand(3, 1, 2, 2)
    state = {name: value.detach() + 1 for name, value in model.named_parameters()}
    with tapped(model, ["1"]) as features:
        functional_call(model, state, (x,))
    assert torch.equal(features["1"], nn.functional.linear(x.flatten(1), state["1.weight"], state["1.bias"]))


def test_second_forward_overwrites_the_first() -> None:
    model = nn.Sequential(nn.Identity())
    with tapped(model, ["0"]) as features:
        assert features == {}
        model(torch.zeros(1))
        model(torch.ones(1))
        assert features["0"].item() == 1


def test_logits_are_unchanged_and_hooks_are_gone() -> None:
    model = ResNet18(10, width=4).eval()
    x = torch.rand(2, 3, 16, 16)
    plain = model(x)
    with tapped(model, RESNET_LAYERS) as features:
        assert torch.equal(model(x), plain)
        assert hooks(model) == 4
    kept = dict(features)
    assert hooks(model) == 0
    model(torch.rand(2, 3, 16, 16))
    assert all(features[name] is kept[name] for name in RESNET_LAYERS)


def test_hooks_are_gone_after_an_exception() -> None:
    model = ResNet18(10, width=4)
    with pytest.raises(RuntimeError, match="stop"), tapped(model, RESNET_LAYERS):
        raise RuntimeError("stop")
    assert hooks(model) == 0


def test_taps_nest() -> None:
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    with tapped(model, ["0"]) as outer:
        with tapped(model, ["0", "1"]) as inner:
            model(-torch.ones(1))
        model(torch.ones(1))
    assert inner["0"].item() == -1
    assert inner["1"].item() == 0
    assert outer["0"].item() == 1


def test_shared_module_has_all_its_names() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Identity(), shared)
    assert feature_names(model) == ["0", "1", "2"]
    with tapped(model, ["2"]) as features:
        model(torch.ones(1))
    assert "2" in features


def test_unknown_names_list_the_nearest_and_hook_nothing() -> None:
    model = ResNet18(10, width=4)
    with (
        pytest.raises(HoldfastError, match=r"no module is named 'layer4\.0\.bn3': did you mean .*layer4\.0\.bn1"),
        tapped(model, ["layer4.0.bn1", "layer4.0.bn3"]),
    ):
        pass
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("model", "names", "message"),
    [
        (nn.Sequential(nn.Identity()), ["qqqqqqq"], "no module is named 'qqqqqqq': did you mean 0"),
        (nn.Identity(), ["a"], "this model has no named submodules"),
        (nn.Sequential(nn.Identity()), [""], "no module is named ''"),
        (nn.Sequential(nn.Identity()), "0", r"must be a list of module names, got the text '0': write \['0'\]"),
    ],
)
def test_name_refusals(model: nn.Module, names: list[str], message: str) -> None:
    with pytest.raises(HoldfastError, match=message), tapped(model, names):
        pass


def test_module_without_a_tensor_is_refused_and_hooks_are_gone() -> None:
    model = nn.Sequential(nn.LSTM(2, 2))
    with pytest.raises(HoldfastError, match="module '0' returns tuple"), tapped(model, ["0"]):
        model(torch.rand(1, 1, 2))
    assert hooks(model) == 0


def test_feature_names_are_in_order_without_uncalled_containers() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.several = nn.ModuleList([nn.Identity(), nn.Identity()])

    assert feature_names(Holder()) == ["several.0", "several.1"]
    names = feature_names(ResNet18(10, width=4))
    assert names[:4] == ["normalize", "conv1", "bn1", "relu"]
    assert "" not in names
    assert set(RESNET_LAYERS) <= set(names)
