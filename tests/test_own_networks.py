"""Networks as people have them, given to `fit`, `evaluate`, `AdversarialStep` and the command."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from holdfast import AdversarialStep, Batch, HoldfastError, Progress, fit, load_model
from holdfast.cli.subject import load_subject
from holdfast.evaluation.networks import Speed
from holdfast.models.modes import in_evaluation_mode, kept_in_evaluation
from holdfast.objectives.distillation import Distillation
from holdfast.objectives.trades import TRADES
from holdfast.recipes import recipe_by_name
from holdfast.views.split_batchnorm import SplitBatchNorm
from tiny_runs import (
    FP32,
    NET,
    Said,
    assert_same,
    metrics,
    refused,
    tiny_net,
    tiny_recipe,
    toy,
    weights,
    write_toy,
)
from toy_verdicts import ONE, X, Y, step_loss, trained_net, verdicts

scripted = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    """A network that some images of the toy data hold against."""
    return trained_net()


# ------------------------------------------------------------------------------------------------ wrappers

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_taken_off(wrapper: str, tmp_path: Path, trained: nn.Sequential) -> None:
    """Training and evaluation are those of the network within, its names too; the person is told, and keeps theirs."""
    wrapped, said = WRAPPERS[wrapper](trained), Said()
    assert verdicts(wrapped) == verdicts(trained)
    one = fit(ONE, toy(), trained, out=tmp_path / "plain", settings=FP32)
    other = fit(ONE, toy(), wrapped, out=tmp_path / "wrapped", settings=FP32, display=said)
    assert_same(weights(one.path), weights(other.path))
    assert other.summary["model"] == "torch.nn.modules.container.Sequential"
    kinds = ["DataParallel", "torch.compile"] if wrapper == "both" else [wrapper]
    assert [text for text in said.texts if "wrapper" in text] == [
        f"the model is trained without its {kind} wrapper: "
        + ("torchrun trains on several processes" if kind == "DataParallel" else "--training.compile compiles the"
           " network of a run")
        for kind in kinds
    ]  # fmt: skip
    loaded = load_model(other.path, model=WRAPPERS[wrapper](copy.deepcopy(trained)))
    assert type(loaded) is nn.Sequential


def test_a_step_takes_data_parallel_off(trained: nn.Sequential) -> None:
    """It trains the very parameters that the caller's optimiser has."""
    model = copy.deepcopy(trained)
    assert AdversarialStep(tiny_recipe(), nn.DataParallel(model)).model is model
    assert step_loss(nn.DataParallel(model)) == pytest.approx(step_loss(copy.deepcopy(trained)))


def test_wrappers_inside_are_taken_off_in_a_run(tmp_path: Path, trained: nn.Sequential) -> None:
    """As in `Sequential(normalisation, DataParallel(network))`; the caller's module is left alone."""
    model = nn.Sequential(nn.Identity(), nn.DataParallel(trained))
    run = fit(ONE, toy(), model, out=tmp_path / "run", settings=FP32)
    assert list(run.model().state_dict()) == [f"1.{name}" for name in trained.state_dict()]
    assert isinstance(model[1], nn.DataParallel)
    assert verdicts(model)[0] == verdicts(trained)[0]


# --------------------------------------------------------------------------- TorchScript, torch.fx, torch.export


def _scripts(model: nn.Module) -> dict[str, nn.Module]:
    return {
        "scripted": torch.jit.script(model),
        "traced": torch.jit.trace(model, X[:3]),
        "frozen": torch.jit.freeze(torch.jit.script(model)),
        "wrapped": nn.DataParallel(torch.jit.script(model)),
        "a child": nn.Sequential(torch.jit.script(model)).eval(),
    }


@scripted
@pytest.mark.parametrize(
    "kind",
    ["scripted", "frozen", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("traced", "wrapped", "a child"))],
)
def test_torchscript_is_evaluated(kind: str, trained: nn.Sequential) -> None:
    """Every verdict and flag is that of the Python module, in low precision too; nothing of the script changes."""
    model = _scripts(trained)[kind]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert verdicts(model) == verdicts(trained)
    assert (
        verdicts(model, attack="apgd-ce", speed=Speed(precision="bf16", compile=kind == "scripted"))[0]
        == (verdicts(trained, attack="apgd-ce")[0])
    )
    assert_same(before, dict(model.state_dict()))


@scripted
@pytest.mark.parametrize("kind", ["scripted", "traced", "frozen", "wrapped", "a child"])
def test_torchscript_is_not_trained(kind: str, tmp_path: Path, trained: nn.Sequential) -> None:
    """One line, before anything is written."""
    model = _scripts(trained)[kind]
    with pytest.raises(HoldfastError, match=r"TorchScript.* cannot be trained here \(evaluate takes it\): give the Py"):
        fit(ONE, toy(), model, out=tmp_path / "run", settings=FP32)
    assert not (tmp_path / "run").exists()
    if kind != "a child":  # of which a step makes no copy
        with pytest.raises(HoldfastError, match="cannot be trained here"):
            AdversarialStep(tiny_recipe(), model)


@scripted
def test_torchscript_can_be_a_teacher(tmp_path: Path, trained: nn.Sequential) -> None:
    """It stands still, and what is learnt from it is what is learnt from the Python module."""
    found = []
    for number, teacher in enumerate((trained, torch.jit.script(trained))):
        still = copy.deepcopy(trained).requires_grad_(False) if number == 0 else teacher
        for parameter in still.parameters():
            parameter.requires_grad_(False)
        recipe = tiny_recipe(
            epochs=1, objective=Distillation(), networks={"standard_teacher": still, "robust_teacher": still}
        )
        run = fit(recipe, toy(), tiny_net(), out=tmp_path / str(number), settings=FP32)
        found.append(weights(run.path))
        for parameter in trained.parameters():
            parameter.requires_grad_(True)
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], atol=1e-5), name


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, in copying what it exported
def test_graph_modules_are_networks_like_any_other(tmp_path: Path, trained: nn.Sequential) -> None:
    """What `torch.fx` and `torch.export` make is evaluated and trained."""
    batch = torch.export.Dim("batch", min=1, max=1000)
    exported = torch.export.export(trained, (X[:3],), dynamic_shapes=({0: batch},)).module()
    traced = torch.fx.symbolic_trace(trained)
    for number, model in enumerate((exported, traced)):
        assert verdicts(model)[0] == verdicts(trained)[0]
        run = fit(ONE, toy(), model, out=tmp_path / str(number), settings=FP32)
        assert set(run.model().state_dict()) == set(trained.state_dict())


def test_networks_of_a_file_that_cannot_be_copied(tmp_path: Path) -> None:
    """They are refused in the same words, before anything is trained."""
    locked = (
        "def locked(**options):\n    net = make(4, 1)\n    net.lock = __import__('threading').Lock()\n    return net\n"
    )
    (tmp_path / "net.py").write_text(NET + locked)
    with pytest.raises(HoldfastError, match=r"the model cannot be copied by copy.deepcopy \(cannot pickle"):
        fit(ONE, toy(), f"{tmp_path / 'net.py'}:locked", out=tmp_path / "run", settings=FP32)


# ------------------------------------------------------------------------------------------- what a run gives back


def test_a_run_that_was_given_a_module_gives_it_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Best or last, each time another copy, whatever became of the caller's module; a finished run does too."""
    model = tiny_net(dropout=0.3)
    run = fit(tiny_recipe(), toy(), model, out=tmp_path / "run", settings=FP32)
    model[0] = nn.Identity()
    for checkpoint in ("best", "last"):
        back = run.model(checkpoint)
        assert_same(weights(run.path, "model" if checkpoint == "best" else "last"), dict(back.state_dict()))
        assert not back.training
        assert all(parameter.requires_grad for parameter in back.parameters())
        assert back is not run.model(checkpoint)
    again = fit(tiny_recipe(), toy(), tiny_net(dropout=0.3), out=run.path, settings=FP32, resume=True)
    assert_same(weights(run.path), dict(again.model().state_dict()))
    assert "architecture" not in repr(run)
    told = refused(capsys, "evaluate", run.path, "--data", write_toy(tmp_path / "toy.npz"), "--attack", "pgd")
    assert "load_model(" in told
    assert "model=THE_MODULE), or name the function that makes it" in told


def test_branches_and_compilation_do_not_reach_it(tmp_path: Path) -> None:
    """Training adds BatchNorm branches and compiles; what comes back is the plain network."""
    settings = replace(FP32, compile="eager")
    run = fit(
        tiny_recipe(epochs=1, objective=TRADES(), views=(SplitBatchNorm(),)),
        toy(),
        tiny_net(),
        out=tmp_path / "run",
        settings=settings,
    )
    back = run.model()
    assert type(back[1]) is nn.BatchNorm2d
    assert back._compiled_call_impl is None


def test_weights_that_a_hook_computes_are_copied(tmp_path: Path) -> None:
    """After a forward with gradients, weight_norm keeps a weight that `copy.deepcopy` refuses."""
    model = tiny_net()
    with pytest.warns(FutureWarning, match="deprecated"):
        torch.nn.utils.weight_norm(model[0])
    model(X[:2]).sum().backward()
    trained = fit(ONE, toy(), model, out=tmp_path / "run", settings=FP32).model()
    assert not torch.equal(trained(X[:2]), model.eval()(X[:2]))
    assert verdicts(model)


def test_networks_that_cannot_be_copied(tmp_path: Path) -> None:
    """One line with the reason; they are evaluated all the same."""
    locked, computed = tiny_net(), tiny_net()
    locked.lock = threading.Lock()
    computed.kept = [computed[0].weight * 2]
    for model, message in (
        (locked, "cannot pickle"),
        (computed, "keep it detached"),
    ):
        with pytest.raises(HoldfastError, match=rf"the model cannot be copied by copy.deepcopy.*{message}"):
            fit(ONE, toy(), model, out=tmp_path / "run", settings=FP32)
        assert verdicts(model)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------ weights that depend on the mode


class Adapter(nn.Linear):
    """A frozen layer with a low-rank adapter that `eval()` merges into its weight, as loralib's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Adapter:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.up @ self.down
            self.merged = not mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        beside = 0 if self.merged else x @ self.down.T @ self.up.T
        return nn.functional.linear(x, self.weight, self.bias) + beside


def adapted() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), Adapter(64, 4))


@pytest.mark.parametrize("given", ["train", "eval"])
def test_adapters_that_eval_merges(given: str, tmp_path: Path) -> None:
    """What is measured, saved, loaded and given back is one network, however it was given."""
    model = getattr(adapted(), given)()
    logits = model(X)
    run = fit(tiny_recipe(), toy(), model, out=tmp_path / "run", settings=FP32)
    assert torch.allclose(model(X), logits)
    apart = adapted()
    apart.load_state_dict(weights(run.path))
    assert torch.allclose(apart[1].weight, adapted()[1].weight, atol=1e-6)
    assert not torch.allclose(apart[1].up, adapted()[1].up)
    right = (apart(X).argmax(1) == toy().test.labels).float().mean().item()
    assert run.summary["clean_accuracy"] == pytest.approx(right)
    for back in (run.model(), load_model(run.path, model=getattr(adapted(), given)())):
        assert not back.training
        assert torch.allclose(back(X), apart(X), atol=1e-5)
    plain = fit(tiny_recipe(), toy(), adapted(), out=tmp_path / "plain", settings=FP32)
    one, other = ([line["validation"] for line in metrics(each.path)] for each in (run, plain))
    assert one == other


def test_a_module_of_torch_export_has_no_modes() -> None:
    """It refuses `train()` and `eval()`: a step takes it, and a model is loaded into it."""
    exported = torch.export.export(tiny_net(norm=False).eval(), (X[:4],)).module()
    assert kept_in_evaluation(exported) == frozenset()
    assert not in_evaluation_mode(exported).training


# --------------------------------------------------------------------------------- activation checkpointing


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_refused_in_training(reentrant: bool, tmp_path: Path) -> None:
    """Its layers would be computed again without the modes and weights of the step; evaluation takes it."""

    class Checkpointed(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=reentrant)

    model = Checkpointed(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(HoldfastError, match=r"switch activation checkpointing off, for example"):
        fit(ONE, toy(), model, out=tmp_path / "run", settings=FP32)
    with pytest.raises(HoldfastError, match=r"switch activation checkpointing off, for example"):
        step_loss(model)
    with torch.autograd.graph.save_on_cpu():  # hooks of the caller's own
        assert step_loss(tiny_net()) == step_loss(tiny_net())
    if not reentrant:
        assert verdicts(model.eval()) == verdicts(nn.Sequential(*model).eval())


@pytest.mark.parametrize("name", ["pgd_at", "standard"])
def test_a_network_that_cuts_the_graph_is_refused(name: str) -> None:
    """In words: torch only says that element 0 does not require grad."""

    class Cut(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).detach()

    recipe = recipe_by_name(name)(epsilon=0.1)
    step = AdversarialStep(recipe, Cut(nn.Flatten(), nn.Linear(64, 4)))
    with pytest.raises(HoldfastError, match="no gradient passes through the model"):
        step(Batch(X, Y), Progress())
    with torch.no_grad():
        assert AdversarialStep(recipe, tiny_net())(Batch(X, Y), Progress())["loss"].isfinite()


MERGING = """
import torch
from torch import nn

class Adapter(nn.Linear):
    def __init__(self):
        super().__init__(64, 4)
        self.beside, self.merged = nn.Parameter(torch.zeros(4, 64)), False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.beside
            self.merged = not mode
        return self

    def forward(self, x):
        return super().forward(x) + (0 if self.merged else x @ self.beside.T)

def make(num_classes, channels):
    return nn.Sequential(nn.Flatten(), Adapter()).eval()
"""


def test_weights_for_adapters_that_a_file_gives_merged(tmp_path: Path) -> None:
    """The weights of a run are those of training: the command takes the network apart before it loads them."""
    (tmp_path / "net.py").write_text(MERGING)
    source, data = f"{tmp_path / 'net.py'}:make", write_toy(tmp_path / "toy.npz")
    run = fit(ONE, str(data), source, out=tmp_path / "run", settings=FP32)
    found = load_subject(source, weights=str(run.path / "model" / "model.safetensors"), data=str(data), image_size=None)
    assert weights(run.path)["1.beside"].any()
    assert torch.allclose(found.model(X), run.model()(X), atol=1e-5)
