"""Lazy layers, inference mode, extra state and outputs of networks of the user's own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from holdfast import EMA, AdversarialStep, Batch, HoldfastError, Linf, evaluate, fit, load_model
from holdfast.averages.swa import SWA
from holdfast.checks import leaves_weights_out
from holdfast.evaluation.networks import Searching, Speed
from holdfast.loop import Loop
from holdfast.objectives.distillation import Distillation
from holdfast.runs.files import read_json
from tiny_runs import (
    FP32,
    Said,
    assert_same,
    command,
    refused,
    stopped_run,
    tiny_net,
    tiny_recipe,
    toy,
    weights,
    write_toy,
)
from toy_verdicts import ONE, X, Y, step_loss, trained_net, verdicts

STEPS = 4  # of an epoch
LINES = ["--batch-size", 16, "--precision", "fp32", "--training.device", "cpu", "--training.validation_steps", 1]
LINES += ["--training.test_steps", 1, "--threat.epsilon", 0.1, "--epochs", 1, "--attack.steps", 2]


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    """A network that some images of the toy data hold against."""
    return trained_net()


# -------------------------------------------------------------------------------------------------- lazy layers

LAZY = """
from torch import nn

def make(num_classes):
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes)
    )
"""


def lazy() -> nn.Sequential:
    """Three lazy layers."""
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))


def test_lazy_layers_are_initialised(tmp_path: Path) -> None:
    """By the run's seed, whatever the global generator has come to; the caller's module is left as it was."""
    said, runs = Said(), []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        state, model = torch.get_rng_state(), lazy()
        run = fit(ONE, toy(), model, out=tmp_path / str(number), seed=seed, settings=FP32, display=said)
        assert torch.equal(torch.get_rng_state(), state)
        assert isinstance(model[0], nn.LazyConv2d)
        assert run.model()[0].weight.shape == (4, 1, 3, 3)
        runs.append(weights(run.path))
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0]["0.weight"], runs[2]["0.weight"])
    told = "lazy layers were initialised by one forward on images of (1, 8, 8): 0 (LazyConv2d), 1 (LazyBatchNorm2d)"
    assert sum(text.startswith(told) for text in said.texts) == 3
    assert torch.equal(load_model(tmp_path / "2", model=lazy())[0].weight, runs[2]["0.weight"])
    more = fit(ONE, toy(), lazy(), out=tmp_path / "more", settings=FP32, init=tmp_path / "2")
    assert more.summary["n"] == len(Y)


def test_lazy_layers_without_weights_are_refused(tmp_path: Path) -> None:
    """An evaluation of drawn weights says nothing, and a step's optimiser would miss them."""
    told = r"lazy layers that have never seen an image, 0 \(LazyConv2d\), .*: run it once on an image, and load its"
    with pytest.raises(HoldfastError, match=told):
        evaluate(lazy(), X, Y, threat=Linf(0.1), attack="pgd")
    with pytest.raises(HoldfastError, match=told):
        AdversarialStep(tiny_recipe(), lazy())
    teachers = {"standard_teacher": lazy(), "robust_teacher": lazy()}
    with pytest.raises(HoldfastError, match=told):
        fit(tiny_recipe(objective=Distillation(), networks=teachers), toy(), out=tmp_path / "run", settings=FP32)
    unused = nn.ModuleList([nn.LazyLinear(3)])
    model = tiny_net()
    model.unused = unused
    model.forward = lambda x: nn.Sequential.forward(nn.Sequential(*list(model)[:6]), x)
    with pytest.raises(HoldfastError, match=r"lazy layer unused.0 \(LazyLinear\) is not run on an image"):
        fit(ONE, toy(), model, out=tmp_path / "run", settings=FP32)
    with pytest.raises(HoldfastError, match=r"cannot run on images of shape \(1, 8, 8\)"):
        fit(ONE, toy(), nn.Sequential(nn.LazyConv2d(4, 11), nn.Flatten(), nn.LazyLinear(4)), out=tmp_path / "run",
            settings=FP32)  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_lazy_layers_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, loaded again, and evaluated with weights from a file; without any it is refused."""
    data, net = write_toy(tmp_path / "toy.npz"), tmp_path / "net.py"
    net.write_text(LAZY)
    assert command("train", "pgd_at", "--data", data, "--model", f"{net}:make", "--out", tmp_path / "run", *LINES) == 0
    assert load_model(tmp_path / "run")[0].weight.shape == (4, 1, 3, 3)
    asked = ["--data", data, "--attack", "pgd", "--epsilon", "0.1", "--precision", "fp32", "--n", 8]
    assert command("evaluate", tmp_path / "run", "--attack", "pgd", "--n", 8, "--precision", "fp32") == 0
    file = tmp_path / "run" / "model" / "model.safetensors"
    assert command("evaluate", f"{net}:make", "--weights", file, "--out", tmp_path / "one", *asked) == 0
    told = refused(capsys, "evaluate", f"{net}:make", "--out", tmp_path / "two", *asked)
    assert "lazy layers that have never seen an image" in told


def test_weights_of_a_wrapped_network_fit(tmp_path: Path) -> None:
    """A file's function that returns a wrapper makes the network within."""
    net = tmp_path / "net.py"
    net.write_text(
        LAZY.replace("return nn.Sequential(", "return nn.DataParallel(nn.Sequential(").replace("    )\n", "    ))\n")
    )
    data = write_toy(tmp_path / "toy.npz")
    model = lazy()
    model(X[:2])
    save_file(dict(model.state_dict()), tmp_path / "plain.safetensors")
    asked = ["--data", data, "--attack", "pgd", "--epsilon", "0.1", "--precision", "fp32", "--n", 8]
    words = [
        "evaluate",
        f"{net}:make",
        "--weights",
        tmp_path / "plain.safetensors",
        "--out",
        tmp_path / "found",
        *asked,
    ]
    assert command(*words) == 0


# --------------------------------------------------------------------------------------- torch.inference_mode


def test_networks_made_in_inference_mode(tmp_path: Path, trained: nn.Sequential) -> None:
    """Evaluated and trained like any other, in a copy; a step, which works on the network itself, refuses."""
    with torch.inference_mode():
        model = copy.deepcopy(trained)
    assert next(model.parameters()).is_inference()
    assert verdicts(model) == verdicts(trained)
    one = fit(ONE, toy(), trained, out=tmp_path / "one", settings=FP32)
    other = fit(ONE, toy(), model, out=tmp_path / "other", settings=FP32)
    assert_same(weights(one.path), weights(other.path))
    with pytest.raises(HoldfastError, match=r"made under torch.inference_mode.* give copy.deepcopy\(model\)"):
        AdversarialStep(tiny_recipe(), model)
    assert step_loss(copy.deepcopy(model)) == pytest.approx(step_loss(copy.deepcopy(trained)))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_run_inside_of_a_mode(mode: Callable[[], Any], tmp_path: Path) -> None:
    """Training needs gradients, whatever the caller's block says."""
    one = fit(ONE, toy(), tiny_net(), out=tmp_path / "one", settings=FP32)
    with mode():
        other = fit(ONE, toy(), tiny_net(), out=tmp_path / "other", settings=FP32)
        assert not torch.is_grad_enabled()
    assert_same(weights(one.path), weights(other.path))


# --------------------------------------------------------------------------------------------------- extra state


class Counting(nn.Module):
    """Counts its forwards in training mode, as plain values that `state_dict` carries."""

    def __init__(self, start: Any = 0) -> None:
        super().__init__()
        self.net = tiny_net()
        self.kept: Any = {"forwards": start, "names": ["a"]}

    def forward(self, x: Tensor) -> Tensor:
        if self.training and isinstance(self.kept, dict):
            self.kept["forwards"] += 1
        return self.net(x)

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


@pytest.mark.parametrize("averages", [(), (EMA(),), (SWA(begin=0.0),), (EMA(buffers="clean"),)])
def test_extra_state_is_kept(averages: tuple[Any, ...], tmp_path: Path) -> None:
    """With averaged weights too, which have none; the weights are those of the same network without any."""
    run = fit(tiny_recipe(averages=averages), toy(), Counting(), out=tmp_path / "run", settings=FP32)
    plain = fit(tiny_recipe(averages=averages), toy(), tiny_net(), out=tmp_path / "plain", settings=FP32)
    inside = {f"net.{name}": tensor for name, tensor in weights(plain.path, "last").items()}
    assert_same(weights(run.path, "last"), inside)
    last = run.model("last")
    assert isinstance(last, Counting)
    assert last.kept == {"forwards": 2 * STEPS, "names": ["a"]}
    assert read_json(run.path / "last" / "config.json")["extra_state"] == {"_extra_state": last.kept}


def test_extra_state_after_a_stop_and_as_a_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run goes on counting, and --init begins from what was counted."""
    whole = fit(tiny_recipe(epochs=4), toy(), Counting(), out=tmp_path / "whole", settings=FP32)
    monkeypatch.setattr("tiny_runs.tiny_net", lambda **more: Counting())
    stopped = stopped_run(tmp_path / "stopped")
    resumed = fit(tiny_recipe(epochs=4), toy(), Counting(), out=stopped, settings=FP32, resume=True)
    assert resumed.model("last").kept == whole.model("last").kept == {"forwards": 4 * STEPS, "names": ["a"]}
    more = fit(ONE, toy(), Counting(), out=tmp_path / "more", settings=FP32, init=whole.path)
    assert more.model("last").kept["forwards"] == whole.model().kept["forwards"] + STEPS


def test_extra_state_that_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    """Before anything is written; where it becomes so later, before what could not be read again."""
    model = Counting()
    model.kept = (1, 2)
    with pytest.raises(HoldfastError, match="get_extra_state of the model itself returns a tuple that a run cannot"):
        fit(ONE, toy(), model, out=tmp_path / "run", settings=FP32)
    assert not (tmp_path / "run").exists()
    assert verdicts(model)  # an evaluation saves nothing of it

    class Later(Counting):
        def get_extra_state(self) -> Any:
            return object() if self.kept["forwards"] else self.kept

        def set_extra_state(self, state: Any) -> None:
            """The copy for validation is not told."""

    with pytest.raises(HoldfastError, match="returns a object that a run cannot save"):
        fit(ONE, toy(), Later(), out=tmp_path / "run", settings=FP32)
    before = Loop.one_step

    def one_step(self: Loop, batch: Batch, progress: Any) -> None:
        before(self, batch, progress)
        self.interruption.asked = progress.step == 1

    with patch.object(Loop, "one_step", one_step), pytest.raises(HoldfastError, match="a run cannot save"):
        fit(ONE, toy(), Later(), out=tmp_path / "stopped", settings=FP32)
    assert not list((tmp_path / "stopped").rglob("step-*.pt"))


def test_damaged_extra_state_is_told(tmp_path: Path) -> None:
    """In one line, though it is the module's own code that stumbles."""

    class Strict(Counting):
        def set_extra_state(self, state: Any) -> None:
            self.kept = {"forwards": state["forwards"], "names": list(state["names"])}

    run = fit(ONE, toy(), Strict(), out=tmp_path / "run", settings=FP32)
    file = run.path / "model" / "config.json"
    good = json.loads(file.read_text())
    for broken, message in (
        ({"_extra_state": {"forwards": 1}}, r"do not fit the model \('names'\)"),
        ({"weight": 1}, "extra_state is .*, not a mapping by names that end in _extra_state"),
        ({}, "do not fit the model: _extra_state differ"),
    ):
        description = {key: value for key, value in good.items() if key != "sha256"} | {"extra_state": broken}
        file.write_text(json.dumps(description))
        with pytest.raises(HoldfastError, match=message):
            run.model()


# -------------------------------------------------------------------------------------------------------- outputs


class Auxiliary(nn.Module):
    """A second classifier beside the first; what is returned is a matter of the mode."""

    def __init__(self, *, always: bool = False) -> None:
        super().__init__()
        self.net = tiny_net()
        self.second = nn.Linear(64, 4)
        self.always = always

    def forward(self, x: Tensor) -> Any:
        logits = self.net(x)
        return (logits, self.second(x.flatten(1))) if self.training or self.always else logits


@pytest.mark.parametrize("always", [False, True])
def test_outputs_that_hold_logits(always: bool, tmp_path: Path) -> None:
    """Trained and evaluated as the network that returns only these, and said once."""
    said = Said()
    plain = fit(tiny_recipe(), toy(), tiny_net(), out=tmp_path / "plain", settings=FP32)
    run = fit(tiny_recipe(), toy(), Auxiliary(always=always), out=tmp_path / "run", settings=FP32, display=said)
    for name, tensor in weights(plain.path).items():
        assert torch.equal(weights(run.path)[f"net.{name}"], tensor)
    note = "the model returns a tuple of 2: its first item is taken as the logits, and the rest is left out"
    assert said.texts.count(note) == 1
    assert verdicts(run.model())[0] == verdicts(plain.model())[0]
    found = evaluate(run.model(), X, Y, threat=Linf(0.1), attack="pgd", probe=False)
    assert (note in found.summary["notes"], f"note: {note}" in found.log) == (always, always)


def test_auxiliary_outputs_under_torchrun() -> None:
    """A process group is told that some parameters get no gradient; looking changes nothing."""
    model = Auxiliary().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert leaves_weights_out(model, X[:4])
    assert not leaves_weights_out(tiny_net(dropout=0.5), X[:4])
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(before, dict(model.state_dict()))


def test_weights_that_are_left_out() -> None:
    """A layer that is never called gets no gradient either; a frozen one needs none."""
    never_called, frozen = tiny_net(), tiny_net()
    never_called[0].pooler = nn.Linear(2, 2)
    frozen[0].requires_grad_(False)
    assert leaves_weights_out(never_called, X[:4])
    assert not leaves_weights_out(frozen, X[:4])
    with torch.no_grad():
        assert not leaves_weights_out(tiny_net(), X[:4])


def test_mappings_are_evaluated_with_batchnorm_folded(trained: nn.Sequential) -> None:
    """The same verdicts as the network within."""

    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = trained

        def forward(self, x: Tensor) -> Any:
            return {"features": x, "logits": self.net(x)}

    assert verdicts(Mapped(), attack="apgd-ce")[0] == verdicts(trained, attack="apgd-ce")[0]
    assert verdicts(Mapped(), speed=Speed(precision="bf16"))[0] == verdicts(trained)[0]
    assert Searching(Mapped().eval(), X, Speed()).folded == Searching(trained, X, Speed()).folded == 1


def test_weights_without_a_gradient_are_told(tmp_path: Path) -> None:
    """A part that the network detaches in training; frozen weights do not count, and nothing is said of others."""

    class Detaching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = tiny_net(), nn.Linear(4, 4)
            self.body[0].requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.head(x.detach() if self.training else x)

    said, plain = Said(), Said()
    fit(tiny_recipe(epochs=1), toy(), Detaching(), out=tmp_path / "run", settings=FP32, display=said)
    fit(tiny_recipe(epochs=1), toy(), tiny_net(), out=tmp_path / "plain", settings=FP32, display=plain)
    told = "4 of 6 tensors of weights get no gradient and stay as they are: body.1.weight, body.1.bias, body.5.weight …"
    assert said.texts.count(told) == 1
    assert not any("no gradient" in text for text in plain.texts)
