"""Convolutions that must not run channels-last on a CPU."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from holdfast import AdversarialStep, Batch, Progress, recipes
from holdfast.models.factory import build
from holdfast.models.layout import in_usual_layout, keep_narrow_contiguous, narrow_convolutions
from holdfast.models.table import MODELS


@pytest.mark.parametrize(
    ("layer", "narrow"),
    [
        (nn.Conv2d(4, 64, 1, stride=2), True),
        (nn.Conv2d(15, 8, 1, stride=(1, 2), bias=False), True),
        (nn.Conv2d(32, 32, 1, stride=2, groups=4), True),
        (nn.ConvTranspose2d(64, 4, 1, stride=2), True),
        (nn.Conv2d(16, 8, 1, stride=2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, stride=2), False),
        (nn.ConvTranspose2d(4, 64, 1, stride=2), False),
        (nn.Linear(4, 4), False),
    ],
)
def test_which_are_narrow(layer: nn.Module, narrow: bool) -> None:
    """One by one, with a stride, and fewer than 16 input channels a group."""
    assert bool(narrow_convolutions(nn.Sequential(layer))) == narrow


def test_the_librarys_networks_have_none() -> None:
    """They run channels-last, all of them."""
    for name in MODELS:
        with torch.device("meta"):
            assert not narrow_convolutions(build(name, num_classes=10, channels=3, image_size=(32, 32)))


def narrow(channels: int = 1) -> nn.Sequential:
    """Two narrow convolutions."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 1, stride=2), nn.ReLU(), nn.Conv2d(4, 8, 1, stride=2), nn.Flatten(), nn.Linear(512, 4)
    )


def usual(x: Tensor) -> bool:
    """Whether a tensor has the strides of a contiguous one."""
    return x.stride() == torch.empty(x.shape).stride()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_step_runs_them_in_the_usual_layout(channels: int) -> None:
    """Images, weights and gradients, in a copy too, though everything else is channels-last. The numbers are right."""
    x, y = torch.rand(6, channels, 32, 32), torch.arange(6) % 4
    losses, gradients = [], []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = narrow(channels).to(memory_format=layout)
        step = copy.deepcopy(AdversarialStep(recipes.trades(epsilon=0.1), model))
        seen: list[Tensor] = []
        for layer in narrow_convolutions(step):
            layer.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(inputs[0]))
        terms = step(Batch(x.to(memory_format=layout), y), Progress())
        terms["loss"].backward()
        assert len(seen) > 4
        assert all(map(usual, seen))
        assert all(usual(layer.weight) for layer in narrow_convolutions(step))
        losses.append(terms["loss"].item())
        gradients.append([parameter.grad for parameter in step.model.parameters()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert torch.allclose(one, other, atol=1e-5)


def test_networks_of_a_step_are_guarded_too() -> None:
    """The guide of a method, and LAS-AT's strategy network where it is made narrow."""
    guided = dataclasses.replace(recipes.lbgat(epsilon=0.1), networks={"guide": narrow()})
    las = recipes.las_at(epsilon=0.1)
    las = dataclasses.replace(las, step=dataclasses.replace(las.step, width=4))
    for step in (AdversarialStep(guided, narrow()), las.step(las, narrow())):
        layers = narrow_convolutions(step)
        assert len(layers) > 2
        assert all(layer._forward_pre_hooks for layer in layers)


def test_the_guard_changes_nothing_else() -> None:
    """Memory, values and names of the weights; what can be scripted before can be after; a second time adds nothing."""
    model = narrow().to(memory_format=torch.channels_last)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.named_parameters()}
    assert keep_narrow_contiguous(keep_narrow_contiguous(model)) is model
    for name, tensor in model.named_parameters():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert len(model[0]._forward_pre_hooks) == 1
    x = torch.rand(2, 1, 32, 32)
    assert torch.allclose(model(x), narrow()(x), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_guarded_network_can_be_scripted() -> None:
    """The hook is compiled with it."""
    model = keep_narrow_contiguous(narrow())
    x = torch.rand(2, 1, 32, 32)
    assert torch.allclose(torch.jit.script(model)(x), model(x), atol=1e-6)


def test_strides_are_usual_where_both_layouts_count_as_contiguous() -> None:
    """`contiguous()` leaves them."""
    x = torch.rand(2, 1, 3, 3).to(memory_format=torch.channels_last)
    assert not usual(x.contiguous())
    assert usual(in_usual_layout(x))
    assert torch.equal(in_usual_layout(x), x)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from holdfast import AdversarialStep, Batch, Progress, recipes
from test_layout import narrow
x, y = torch.rand(64, 1, 32, 32), torch.arange(64) % 4
found = []
for layout in (torch.contiguous_format, torch.channels_last):
    for _ in range(10):
        step = AdversarialStep(recipes.pgd_at(epsilon=0.1), narrow().to(memory_format=layout))
        step(Batch(x.to(memory_format=layout), y), Progress())["loss"].backward()
    found.append([parameter.grad for parameter in step.parameters()])
print(max(float((a - b).abs().max()) for a, b in zip(*found)) < 1e-4)
"""


@pytest.mark.slow
def test_memory_is_whole_on_avx2() -> None:
    """Without the guard this process ends in an abort, or says False, with torch 2.13."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "MALLOC_CHECK_": "3", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", "-c", SCRIPT, os.path.dirname(__file__)]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, "True"), ended.stderr
