"""What every network must do, one small configuration each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from holdfast.models.preact_resnet import PreActResNet18
from holdfast.models.resnet import ResNet18
from holdfast.models.small_cnn import SmallCNN
from holdfast.models.vit import SmallViT
from holdfast.models.wide_resnet import WideResNet

Maker = Callable[..., nn.Module]


def small_cnn(channels: int, size: tuple[int, int], **more) -> nn.Module:
    return SmallCNN(10, channels=channels, image_size=size, width=4, **more)


def resnet18(channels: int, size: tuple[int, int], **more) -> nn.Module:
    return ResNet18(10, channels=channels, width=4, **more)


def preact_resnet18(channels: int, size: tuple[int, int], **more) -> nn.Module:
    return PreActResNet18(10, channels=channels, width=4, **more)


def wide_resnet(channels: int, size: tuple[int, int], **more) -> nn.Module:
    return WideResNet(10, 1, 10, channels=channels, **more)


def small_vit(channels: int, size: tuple[int, int], **more) -> nn.Module:
    return SmallViT(10, channels=channels, image_size=size, dim=24, depth=2, **more)


MAKERS = [small_cnn, resnet18, preact_resnet18, wide_resnet, small_vit]
WITH_BATCHNORM = MAKERS[:4]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(make: Maker, channels: int = 3, size: tuple[int, int] = (16, 16), **more) -> nn.Module:
    """A network in eval mode, in float64, with BatchNorm statistics and affine parameters that are not trivial."""
    model = make(channels, size, **more)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.double().eval()


def images(channels: int = 3, size: tuple[int, int] = (16, 16), batch: int = 2) -> Tensor:
    return torch.rand(batch, channels, *size, dtype=torch.float64)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (64, 64), (24, 40)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("make", MAKERS)
def test_logits_have_one_number_per_class(make: Maker, channels: int, size: tuple[int, int]) -> None:
    logits = made(make, channels, size)(images(channels, size))
    assert logits.shape == (2, 10)
    assert logits.dtype == torch.float64
    assert torch.isfinite(logits).all()
    # Not probabilities, and different images give different logits.
    assert not torch.allclose(logits.sum(1), torch.ones(2, dtype=torch.float64))
    assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize("make", MAKERS)
def test_normalisation_is_the_first_child_and_acts_on_the_pixels(make: Maker) -> None:
    # Binary fractions, so that float32 buffers hold them exactly and the comparison can be exact.
    mean, std = (0.5, 0.25, 0.125), (0.25, 0.5, 0.125)
    normalised = made(make, mean=mean, std=std)
    plain = made(make)
    assert next(iter(normalised.named_children()))[0] == "normalize"
    state = {name: value for name, value in normalised.state_dict().items() if not name.startswith("normalize.")}
    missing = plain.load_state_dict(state, strict=False).missing_keys
    assert sorted(missing) == ["normalize.mean", "normalize.std"]
    x = images()
    by_hand = torch.stack([(x[:, i] - mean[i]) / std[i] for i in range(3)], dim=1)
    assert torch.equal(normalised(x), plain(by_hand))
    assert not torch.allclose(normalised(x), plain(x))


@pytest.mark.parametrize("make", MAKERS)
def test_functional_call_with_detached_state_equals_the_module(make: Maker) -> None:
    model = made(make)
    x = images()
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    assert torch.equal(functional_call(model, state, (x,)), model(x))
    shifted = {**state, "fc.bias": state["fc.bias"] + 1}
    assert torch.allclose(functional_call(model, shifted, (x,)), model(x) + 1)


@pytest.mark.parametrize("make", MAKERS)
def test_every_parameter_and_the_input_get_a_gradient(make: Maker) -> None:
    model = made(make)
    x = images().requires_grad_()
    loss = nn.functional.cross_entropy(model(x), torch.tensor([1, 2]))
    (by_grad,) = torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()
    assert x.grad is not None
    assert torch.equal(by_grad, x.grad)
    assert by_grad.abs().amax(dim=(1, 2, 3)).min() > 0
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("make", MAKERS)
def test_input_gradient_equals_finite_differences(make: Maker) -> None:
    model = made(make)
    x = images(batch=1).requires_grad_()
    direction = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(model(x)[0, 3], x)
    step = 1e-6
    with torch.no_grad():
        slope = (model(x + step * direction) - model(x - step * direction))[0, 3] / (2 * step)
    assert torch.allclose((gradient * direction).sum(), slope, rtol=1e-5)


@pytest.mark.parametrize("make", MAKERS)
def test_second_derivative_exists(make: Maker) -> None:
    model = made(make)
    x = images().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).logsumexp(1).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("make", MAKERS)
def test_bfloat16_autocast_is_finite_and_near_float32(make: Maker) -> None:
    model = made(make).float()
    x = images().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x)
    assert low.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(low.float().sum(), x)
    assert torch.isfinite(gradient).all()
    exact = model(x)
    assert (low.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.05


@pytest.mark.parametrize("make", MAKERS)
def test_eval_mode_treats_each_image_alone(make: Maker) -> None:
    model = made(make)
    x = images()
    both = model(x)
    alone = torch.cat([model(x[:1]), model(x[1:])])
    assert torch.allclose(both, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", WITH_BATCHNORM)
def test_one_training_forward_updates_each_batchnorm_once(make: Maker) -> None:
    model = made(make).train()
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].detach()}))
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(images(batch=4))
    after = dict(model.named_buffers())
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert sorted(seen) == sorted(norms)
    assert norms
    for name in norms:
        assert after[f"{name}.num_batches_tracked"] == before[f"{name}.num_batches_tracked"] + 1
        expected = 0.9 * before[f"{name}.running_mean"] + 0.1 * seen[name].mean(dim=(0, 2, 3))
        assert torch.allclose(after[f"{name}.running_mean"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", WITH_BATCHNORM)
def test_evaluation_forward_changes_no_buffer(make: Maker) -> None:
    model = made(make)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(images())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", MAKERS)
def test_relus_are_modules_that_do_not_work_in_place(make: Maker) -> None:
    model = make(3, (16, 16))
    activations = [module for module in model.modules() if isinstance(module, (nn.ReLU, nn.GELU))]
    assert activations
    assert not any(getattr(module, "inplace", False) for module in activations)


@pytest.mark.parametrize("make", MAKERS)
def test_training_forward_draws_no_random_numbers(make: Maker) -> None:
    model = make(3, (16, 16)).train()
    x = images(batch=4).float()
    before = torch.get_rng_state()
    model(x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("make", WITH_BATCHNORM)
def test_convolutions_start_with_the_kaiming_spread(make: Maker) -> None:
    model = make(3, (16, 16))
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all(convolution.bias is None for convolution in convolutions)
    # Each weight divided by its own standard deviation sqrt(2 / (kh kw C_out)) is a standard normal number.
    pieces = []
    for convolution in convolutions:
        fan_out = convolution.out_channels * convolution.kernel_size[0] * convolution.kernel_size[1]
        pieces.append(convolution.weight.detach().flatten() / (2 / fan_out) ** 0.5)
    standard = torch.cat(pieces)
    assert abs(standard.std().item() - 1) < 5 / (2 * len(standard)) ** 0.5
    assert abs(standard.mean().item()) < 5 / len(standard) ** 0.5
    # A uniform law of the same spread would end at the square root of 3.
    assert standard.abs().max() > 2.5
    linear = model.get_submodule("fc")
    assert isinstance(linear, nn.Linear)
    assert not linear.bias.any()
    assert 0.8 < linear.weight.abs().max().item() * linear.in_features**0.5 <= 1
