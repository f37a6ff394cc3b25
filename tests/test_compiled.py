"""The real compiler, on a network small enough to compile in seconds. `test_every_objective.py` compiles all of them
without it."""

from __future__ import annotations

import shutil

import pytest
import torch

from conftest import small_batch, small_network
from holdfast import AsymmetricInvariance, SplitBatchNorm
from holdfast.compilation import compile_in_place
from holdfast.models.factory import build
from holdfast.schedule import Progress
from holdfast.step import AdversarialStep
from parts import MAKE_OBJECTIVE, OneWeightStep, small_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler"),
    # torch's own compiler touches a deprecated numpy or torch interface, depending on their versions
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # its tracer looks at .grad of weights that are values (θ + ν), which warns and does no harm
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.mark.parametrize(
    ("name", "views"),
    [("adversarial_training", ()), ("normalized_mse", ()), ("normalized_mse", (OneWeightStep(),))],
    ids=["pgd_at", "nmse", "nmse under a weight search"],
)
def test_compiled_trains_as_eager_does(name: str, views: tuple) -> None:
    batch = small_batch()

    def losses(compiled: bool) -> list[float]:
        torch._dynamo.reset()
        network = small_network()
        step = AdversarialStep(small_recipe(MAKE_OBJECTIVE[name](), views=views), network)
        if compiled:
            compile_in_place(network)
        (optimizer,) = step.optimizers()
        found = []
        for number in range(4):
            loss = step(batch, Progress(step=number, epochs=4))["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    assert losses(True) == pytest.approx(losses(False), rel=1e-4)


def test_feature_taps_are_seen_after_a_warm_up_without_them() -> None:
    """A clean warm-up compiles the network without taps; AR-AT's steps after it must not reuse that graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    batch = small_batch()
    network = build("small_cnn", num_classes=5, channels=1, image_size=(8, 8), width=4)
    objective = AsymmetricInvariance()
    objective.prepare(network, batch.x[:2])
    step = AdversarialStep(small_recipe(objective, views=(SplitBatchNorm(),)), network)
    compile_in_place(network, backend="aot_eager")
    graphs = []
    for number in range(5):
        progress = Progress(step=number, epochs=5, warmup_steps=2, measured={"clean_accuracy": 0.5})
        terms = step(batch, progress)
        terms["loss"].backward()
        assert ("invariance" in terms) == (number >= 2)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == 1
    assert graphs[2] == graphs[3] == graphs[4] == 4


def test_one_graph_for_each_use_and_none_for_later_steps() -> None:
    """Attack and outer step need a graph each; later steps compile nothing, or speed would be lost silently."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network, batch = small_network(), small_batch()
    step = AdversarialStep(small_recipe(MAKE_OBJECTIVE["normalized_mse"]()), network)
    compile_in_place(network, backend="aot_eager")
    graphs = []
    for number in range(3):
        step(batch, Progress(step=number, epochs=3))["loss"].backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 2 <= graphs[0] <= 3
    assert graphs[0] == graphs[1] == graphs[2]
    assert not torch._dynamo.utils.counters["graph_break"]
