"""Feature taps on networks that are not ours: layers that work in place, and which layers are the last stage."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.compilation import compile_in_place
from holdfast.errors import HoldfastError
from holdfast.forward import Batch, View
from holdfast.models.taps import last_stage, tapped
from holdfast.objectives.asymmetric_invariance import AsymmetricInvariance
from holdfast.objectives.predictor import is_channels_last, pooled_feature
from holdfast.recipes import ar_at
from holdfast.schedule import Progress
from holdfast.step import AdversarialStep

X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block as CIFAR's ResNets have it, or as torchvision's."""

    def __init__(self, inside: int, outside: int, stride: int, aside: str, in_place: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.aside, self.in_place = aside, in_place
        if stride > 1:
            way = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
            setattr(self, aside, way)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=self.in_place)
        out = self.bn2(self.conv2(out))
        way = getattr(self, self.aside)(x) if hasattr(self, self.aside) else x
        if self.in_place:
            out += way
        else:
            out = out + way
        return F.relu(out, inplace=self.in_place)


class ResNet(nn.Module):
    """An 18-layer network, small."""

    def __init__(self, aside: str = "shortcut", *, in_place: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        for number, (inside, outside) in enumerate(((4, 4), (4, 6), (6, 8), (8, 10)), 1):
            first = Block(inside, outside, 1 if number == 1 else 2, aside, in_place)
            setattr(self, f"layer{number}", nn.Sequential(first, Block(outside, outside, 1, aside, in_place)))
        self.linear = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        for number in range(1, 5):
            out = getattr(self, f"layer{number}")(out)
        return self.linear(out.mean((2, 3)))


class DropsInPlace(nn.Module):
    """Works in place in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5, inplace=True)
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.drop(self.norm(self.conv(x))).mean((2, 3)))


LAYERS = ("layer4.0.bn1", "layer4.0.bn2", "layer4.1.bn1", "layer4.1.bn2")


def pair(seed: int = 0, aside: str = "shortcut") -> tuple[ResNet, ResNet]:
    """The same network with and without layers that work in place."""
    torch.manual_seed(seed)
    in_place = ResNet(aside)
    plain = ResNet(aside, in_place=False)
    plain.load_state_dict(in_place.state_dict())
    return in_place, plain


# --- What is tapped. ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_features_are_what_the_layer_returned(training: bool) -> None:
    """Before the ReLU and the addition that follow in place; in the first forward and in later ones."""
    networks = [network.train(training) for network in pair()]
    for _ in range(3):
        found = []
        for network in networks:
            with tapped(network, LAYERS) as features:
                logits = network(X)
            found.append((logits, *features.values()))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert all(feature.min() < 0 for feature in found[0][1:])


def test_gradients_are_those_without_layers_in_place() -> None:
    """Of the features and of the logits together."""
    gradients = []
    for network in pair():
        x = X.clone().requires_grad_()
        with tapped(network.eval(), LAYERS) as features:
            logits = network(x)
        total = logits.square().sum() + sum(feature.square().sum() for feature in features.values())
        gradients.append(torch.autograd.grad(total, [x, *network.parameters()]))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_feature_is_the_very_tensor_that_its_layer_returned() -> None:
    """The network goes on with a copy."""
    network = ResNet()
    returned: dict[str, Tensor] = {}
    network.layer4[0].bn2.register_forward_hook(lambda m, i, o: returned.update(own=o))
    with tapped(network, LAYERS) as features:
        network(X)
    assert features["layer4.0.bn2"] is returned["own"]
    assert features["layer4.0.bn2"].grad_fn is not None


def test_a_layer_that_returns_its_input() -> None:
    """Its feature is that of the moment; the network is the same with and without the tap."""

    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.same, self.drop = nn.BatchNorm2d(X.shape[1]), nn.Identity(), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            z = self.same(y)
            y += 1
            dropped = self.drop(y)
            y *= 2
            return (z + y + dropped).mean((2, 3))

    network = Passing().eval()
    with tapped(network, ["norm", "same", "drop"]) as features:
        logits = network(X)
    y = network.norm(X)
    torch.testing.assert_close(logits, network(X))
    for name, expected in (("norm", y), ("same", y), ("drop", y + 1)):
        torch.testing.assert_close(features[name], expected)


def test_in_place_in_training_mode_only() -> None:
    network = DropsInPlace()
    with tapped(network.eval(), ["norm"]) as features:
        network(X)
    for _ in range(2):
        with tapped(network.train(), ["norm"]) as features:
            network(X)
        assert not (features["norm"] == 0).any()
    with tapped(network, ["norm"]) as features:
        network.eval()(X)
        network.train()(X)
    assert not (features["norm"] == 0).any()


def test_without_gradients_and_in_inference_mode() -> None:
    for context in (torch.no_grad, torch.inference_mode):
        network, plain = pair()
        for _ in range(2):
            with context(), tapped(network, LAYERS) as features:
                network(X)
            with context(), tapped(plain, LAYERS) as expected:
                plain(X)
            assert all(torch.equal(features[name], expected[name]) for name in LAYERS)


def test_compiled() -> None:
    names = ["0.bn1", "0.bn2"]
    for eager in (False, True):
        torch._dynamo.reset()
        network, plain = (
            nn.Sequential(Block(1, 4, 2, "skip", way), nn.Flatten(), nn.Linear(64, 3)) for way in (True, False)
        )
        plain.load_state_dict(network.state_dict())
        if eager:
            View(network, taps=names)(X)
        compile_in_place(network, backend="aot_eager")
        with torch.no_grad():
            found, expected = View(network, taps=names)(X), View(plain, taps=names)(X)
        for name in names:
            torch.testing.assert_close(found.features[name], expected.features[name])
            assert found.features[name].min() < 0


# --- AR-AT. -------------------------------------------------------------------------------------------------------


def losses(network: nn.Module, *, compiled: bool = False, layers: list[str] | None = None) -> list[float]:
    """Of a few steps of AR-AT."""
    objective = AsymmetricInvariance(layers=layers)
    torch.manual_seed(1)
    objective.prepare(network, X[:2])
    recipe = ar_at(epsilon=0.1)
    step = AdversarialStep(replace(recipe, objective=objective), network)
    if compiled:
        torch._dynamo.reset()
        compile_in_place(network, backend="aot_eager")
    (optimizer,) = step.optimizers()
    found = []
    for number in range(3):
        now = Progress(step=number, steps_per_epoch=10, epochs=2, measured={"clean_accuracy": 0.5})
        terms = step(Batch(X, torch.arange(4), index=torch.arange(4)), now)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        found += [terms["invariance"].item(), terms["loss"].item()]
    return found


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ar_at_is_the_same_with_and_without_layers_in_place(compiled: bool) -> None:
    in_place, plain = pair()
    assert losses(in_place, compiled=compiled) == pytest.approx(losses(plain), rel=1e-4)


def test_the_layers_are_told() -> None:
    """On a network that does not say which they are, and only where nobody named any."""
    objective = AsymmetricInvariance()
    objective.prepare(ResNet(), X)
    (note,) = objective.notes
    assert ", ".join(LAYERS) in note
    assert "--objective.layers" in note
    named = AsymmetricInvariance(layers=["layer3.1.bn2"])
    named.prepare(ResNet(), X)
    assert (named.taps, tuple(named.notes)) == (("layer3.1.bn2",), ())
    stating = ResNet()
    stating.last_stage = ("layer4.1.bn2",)  # type: ignore[assignment]  # a plain attribute
    objective.prepare(stating, X)
    assert (objective.taps, tuple(objective.notes)) == (("layer4.1.bn2",), ())


def test_a_layer_that_is_never_called() -> None:
    network = DropsInPlace()
    network.unused = nn.BatchNorm2d(4)
    with pytest.raises(HoldfastError, match="the network never calls its layer 'unused': name others"):
        AsymmetricInvariance().prepare(network, X)


def test_one_image_is_enough_to_prepare() -> None:
    """A BatchNorm over single positions refuses it in training mode, in which the network is only looked at."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 5))
    state, draws = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    objective = AsymmetricInvariance(predictor=False)
    objective.prepare(network, X[:1])
    assert objective.taps == ("2",)
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_preparing_changes_neither_the_network_nor_the_draws() -> None:
    network = DropsInPlace().train()
    state, draws = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    AsymmetricInvariance(predictor=False).prepare(network, X)
    assert torch.equal(torch.get_rng_state(), draws)
    assert network.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


# --- The last stage of networks that do not say which it is. -----------------------------------------------------


def named(names: str, kind: Any) -> nn.Module:
    """A network that has normalisation layers under these names, and nothing else."""
    network = nn.Module()
    for name in names.split():
        where = network
        *parents, leaf = name.split(".")
        for parent in parents:
            if parent not in where._modules:
                where.add_module(parent, nn.Module())
            where = where.get_submodule(parent)
        where.add_module(leaf, kind(2))
    return network


class OwnNorm(nn.Module):
    """A normalisation of one's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


RESNET_50 = " ".join(f"layer4.{block}.bn{number}" for block in range(3) for number in (1, 2, 3))
BLOCKS = " ".join(f"blocks.{block}.{norm}" for block in (10, 11) for norm in ("norm1", "norm2"))


@pytest.mark.parametrize("aside", ["shortcut", "downsample", "short_cut", "skip", "skip_connection", "residual_conv"])
def test_the_last_stage_of_a_resnet_18(aside: str) -> None:
    """The layers of AR-AT's code, not those of the shortcut, whatever it is called."""
    assert last_stage(ResNet(aside)) == LAYERS
    assert last_stage(nn.ModuleDict({"model": ResNet(aside)})) == tuple(f"model.{name}" for name in LAYERS)


@pytest.mark.parametrize(
    ("kind", "names", "expected"),
    [
        (nn.BatchNorm2d, f"bn1 {RESNET_50} layer4.0.downsample.1", RESNET_50),
        (nn.BatchNorm2d, "bn1 layer4.0.bn1 layer4.0.bn2 layer4.1.bn1 layer4.1.bn2 bn", "layer4.0.bn2 layer4.1.bn1 "
         "layer4.1.bn2 bn"),
        (nn.BatchNorm2d, "features.38 features.41 features.44 features.48 features.51", "features.41 features.44 "
         "features.48 features.51"),
        (nn.LayerNorm, f"{BLOCKS} norm", f"{BLOCKS} norm"),
        (nn.LayerNorm, f"{BLOCKS} blocks.11.attn.q_norm blocks.11.attn.k_norm norm", f"{BLOCKS} norm"),
        (OwnNorm, "downsample_layers.3.0 stages.3.0.norm stages.3.1.norm stages.3.2.norm norm", "stages.3.0.norm "
         "stages.3.1.norm stages.3.2.norm norm"),
        (nn.BatchNorm2d, "shortcut.0 shortcut.1", "shortcut.0 shortcut.1"),
        (nn.RMSNorm, "a", "a"),
    ],
)  # fmt: skip
def test_last_stages(kind: Any, names: str, expected: str) -> None:
    """ResNet-50, a pre-activation ResNet, VGG, ViT, ViT with normalised queries, ConvNeXt, and odd ones."""
    assert last_stage(named(names, kind)) == tuple(expected.split()[-4:])


def test_branches_of_a_split_batchnorm_are_no_layers_of_their_own() -> None:
    network = ResNet()
    AdversarialStep(ar_at_prepared(network), network)
    assert "layer4.1.bn2.aux" in dict(network.named_modules())
    assert last_stage(network) == LAYERS


def ar_at_prepared(network: nn.Module) -> Any:
    recipe = ar_at(epsilon=0.1)
    recipe.objective.prepare(network, X)
    return recipe


def test_channels_last_of_a_convnext() -> None:
    """A LayerNorm within a convolutional network normalises the last dimension: that one is the feature's."""
    norm = nn.LayerNorm(6)
    output = norm(torch.rand(2, 4, 5, 6))
    assert is_channels_last(norm, output)
    expected = F.relu(output).flatten(1, 2).mean(1)
    torch.testing.assert_close(pooled_feature(output, channels_last=True), expected)
    assert not is_channels_last(nn.LayerNorm(4), torch.rand(2, 4, 5, 6))
    assert not is_channels_last(nn.BatchNorm2d(4), torch.rand(2, 4, 5, 6))

    class ConvNeXt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(1, 6, 3), nn.LayerNorm(6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))

    objective = AsymmetricInvariance()
    objective.prepare(ConvNeXt(), torch.rand(2, 1, 7, 8))
    assert objective.predictors[0][0].in_features == 6
    assert len(losses(ConvNeXt())) == 6
