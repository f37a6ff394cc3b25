"""Networks whose first operation writes into its input: the same answers as without, and nobody's images change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import small_batch, small_network
from holdfast import evaluate, fit, recipes
from holdfast.attacks.base import AttackWithMemory, InnerLoss
from holdfast.averages.reestimation import reestimate_statistics
from holdfast.compilation import compile_in_place
from holdfast.evaluation.accuracy import robust_rows
from holdfast.forward import Batch, View
from holdfast.functional import cross_entropy
from holdfast.models.taps import tapped
from holdfast.schedule import Progress
from holdfast.step import AdversarialStep
from holdfast.threat import Linf
from parts import IMAGES, LATE, MAKE_ATTACK, prepared_step, small_recipe
from tiny_runs import FP32, tiny_recipe, toy

RECIPES = ("standard", "pgd_at", "trades_awp", "rwp", "ar_at", "iseat", "piat_nmse", "las_at", "free_at", "fgsm_pgi")


class Centred(nn.Module):
    """x - 0.3, and for the one that writes: in place."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.3) if self.writes else x - 0.3


def network(writes: bool) -> nn.Module:
    return nn.Sequential(Centred(writes), *small_network())


def kept(batch: Batch) -> list[Tensor]:
    return [tensor.clone() for tensor in batch if isinstance(tensor, Tensor)]


def unchanged(batch: Batch, before: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(kept(batch), before, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_gives_the_same_loss_and_gradients(name: str, precision: str) -> None:
    batch, found = small_batch(), []
    before = kept(batch)
    for writes in (False, True):
        model, recipe = network(writes), recipes.RECIPES[name](epsilon=0.1)
        step = prepared_step(recipe, model, batch, precision)
        loss = step(batch, LATE)["loss"]
        loss.backward()
        step.after_backward(LATE)
        assert unchanged(batch, before)
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()])
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("name", MAKE_ATTACK)
def test_every_attack_leaves_the_images_alone(name: str) -> None:
    batch, found = small_batch(), []
    before = kept(batch)
    loss: InnerLoss = lambda logits: cross_entropy(logits, batch.y)  # noqa: E731 - a callable of a Protocol's shape
    for writes in (False, True):
        attack: Any = MAKE_ATTACK[name]()
        if isinstance(attack, AttackWithMemory):
            attack.prepare(network(writes), batch.x[:2], IMAGES)
        found.append(attack(View(network(writes)), batch, loss, threat=Linf(0.1), progress=Progress()).x_adv)
        assert unchanged(batch, before)
    assert torch.equal(*found)


def test_evaluation_and_reestimation_leave_them_alone() -> None:
    batch, rows = small_batch(), []
    before = kept(batch)
    for writes in (False, True):
        model = network(writes).eval()
        rows += robust_rows(model, batch, MAKE_ATTACK["pgd, restarts"](), Linf(0.1))
        reestimate_statistics(model, [batch], lambda batch: {"main": batch.x})
        rows.append(model[2].running_mean.clone())
        assert unchanged(batch, before)
    assert all(torch.equal(*pair) for pair in zip(rows[:3], rows[3:], strict=True))


def test_flags_are_the_same() -> None:
    batch = small_batch(rows=24)
    before = kept(batch)
    found = [
        {flag.name for flag in evaluate(network(w).eval(), batch.x, batch.y, threat=Linf(0.1), attack="pgd").flags}
        for w in (False, True)
    ]
    assert found[0] == found[1]
    assert unchanged(batch, before)


def test_a_run_is_the_same(tmp_path: Path) -> None:
    lines = []
    for writes in (False, True):
        model = nn.Sequential(Centred(writes), nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Flatten())
        model.append(nn.Linear(36, 4))
        torch.manual_seed(0)
        for layer in model[1:]:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()
        run = fit(tiny_recipe(), toy(), model, out=tmp_path / str(writes), settings=FP32)
        lines.append({key: run.summary[key] for key in ("clean_accuracy", "robust_accuracy")})
        lines[-1]["weights"] = (run.path / "last" / "model.safetensors").read_bytes()
    assert lines[0] == lines[1]


def test_tapped_features_are_those_before_an_in_place_layer() -> None:
    found = []
    for inplace in (False, True):
        model = small_network()
        model[2] = nn.ReLU(inplace=inplace)
        with tapped(model, ["1"]) as features:
            logits = model(small_batch().x)
        (gradient,) = torch.autograd.grad(logits.square().sum() + features["1"].square().sum(), [features["1"]])
        found.append((features["1"].detach(), gradient))
    assert found[0][0].min() < 0
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_ones_write_into_a_copy_too(backend: str) -> None:
    torch._dynamo.reset()
    batch, losses = small_batch(), []
    before = kept(batch)
    for compiled in (False, True):
        model = network(True)
        step = AdversarialStep(small_recipe(), model)
        if compiled:
            compile_in_place(model, backend=backend)
        losses.append(step(batch, Progress())["loss"].item())
        assert unchanged(batch, before)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
