"""What runs under torch.autocast runs in a step in bfloat16: weights that a network reads itself keep their type."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from conftest import small_batch, small_network
from holdfast import recipes
from holdfast.attacks.pgd import PGD
from holdfast.data.images import Images
from holdfast.evaluation.accuracy import accuracies
from holdfast.forward import View
from holdfast.functional import cross_entropy
from holdfast.low_precision import weights_cast_once
from holdfast.models.factory import build
from holdfast.schedule import Progress
from holdfast.step import AdversarialStep
from holdfast.threat import Linf
from parts import LATE, prepared_step, small_recipe

RECIPES = ("trades", "awp", "iseat", "ar_at", "fgsm_pgi")


def small(change: Callable[[nn.Module], object] = lambda layer: None) -> nn.Module:
    network = small_network()
    for layer in (network[0], network[7]):
        change(layer)
    return network


class OwnHead(nn.Module):
    """A convolution, and a head that reads its weight in a way of its own."""

    def __init__(self, head: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = small_network()[:7]
        self.fc = nn.Linear(128, 5, bias=False)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc, self.body(x))


def divided_by_its_gain(fc: nn.Linear, z: Tensor) -> Tensor:
    return fc(z) / torch.mv(fc.weight, torch.ones(128)).norm()


def cosine(fc: nn.Linear, z: Tensor) -> Tensor:
    return 5 * F.linear(F.normalize(z.float()), F.normalize(fc.weight))


def in_double(fc: nn.Linear, z: Tensor) -> Tensor:
    return torch.einsum("kd,bd->bk", fc.weight.double(), z.double()).float()


class Tied(nn.Module):
    """Two layers with one weight, which is read a third time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 5)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        z = self.b(F.relu(self.a(x.flatten(1))))
        return self.fc(F.linear(z, self.a.weight.t())) + self.a.weight.square().mean()


class Adapted(nn.Module):
    """A frozen layer with a trained correction of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_network()[:7]
        self.fc = nn.Linear(128, 5).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 128) / 9), nn.Parameter(torch.randn(5, 2) / 9)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(x), self.fc.weight + self.b @ self.a, self.fc.bias)


class Rows(nn.Module):
    """Reads an image row by row."""

    def __init__(self, rows: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.embed, self.rows, self.norm, self.fc = nn.Linear(8, width), rows, nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.embed(x[:, 0])
        z = self.rows(z, z, z) if isinstance(self.rows, nn.MultiheadAttention) else self.rows(z)
        return self.fc(self.norm((z[0] if isinstance(z, tuple) else z).mean(1)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "plain": (small, {"0", "3", "7"}),
    "spectral norm, by a hook": (lambda: small(nn.utils.spectral_norm), {"3"}),
    "spectral norm": (lambda: small(parametrizations.spectral_norm), {"3"}),
    "weight norm": (lambda: small(parametrizations.weight_norm), {"3"}),
    "orthogonal": (lambda: small(parametrizations.orthogonal), {"3"}),
    "divided by its gain": (lambda: OwnHead(divided_by_its_gain), set()),
    "cosine": (lambda: OwnHead(cosine), set()),
    "in double": (lambda: OwnHead(in_double), set()),
    "tied": (Tied, {"fc"}),
    "adapted": (Adapted, set()),
    "attention": (lambda: Rows(nn.MultiheadAttention(8, 2, batch_first=True)), {"embed", "fc"}),
    "transformer": (
        lambda: Rows(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)),
        {"embed", "fc", "rows.linear1", "rows.linear2"},
    ),
    "lstm": (lambda: Rows(nn.LSTM(8, 8, batch_first=True)), {"embed", "fc"}),
    "gru": (lambda: Rows(nn.GRU(8, 8, batch_first=True)), {"embed", "fc"}),
}
"""Networks, and the layers whose weights may be cast before."""


def made(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[kind][0]()


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in NETWORKS for name in RECIPES if (kind, name) != ("tied", "ar_at")],  # it has no features
)
def test_what_runs_under_autocast_runs_in_a_step(kind: str, name: str) -> None:
    batch, losses = small_batch(), []
    for precision in ("fp32", "bf16"):
        model, recipe = made(kind), recipes.RECIPES[name](epsilon=0.1)
        step = prepared_step(recipe, model, batch, precision)
        loss = step(batch, LATE)["loss"]
        loss.backward()
        without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
        assert not without, "a cast that was remembered from a forward without gradient cuts the graph"
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("kind", NETWORKS)
def test_casting_before_changes_no_number(kind: str) -> None:
    """The attack finds the same images whether weights are cast once or at every forward."""
    model, batch, found = made(kind), small_batch(), []
    names = weights_cast_once(View(model), batch.x[:2])
    assert {name.removesuffix(".weight") for name in names if name.endswith(".weight")} == NETWORKS[kind][1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for cast in (frozenset(), names):
            view = View(model, cast_once=cast)
            state = view.detached().state or {}
            assert {name for name, tensor in state.items() if tensor.dtype == torch.bfloat16} == cast
            loss = lambda logits: cross_entropy(logits, batch.y)  # noqa: E731 - a few letters
            found.append(PGD(steps=3)(view, batch, loss, threat=Linf(0.1)).x_adv)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "preact_resnet18", "small_vit"])
def test_the_networks_of_this_library_are_cast_once(name: str) -> None:
    width = {"dim": 8, "depth": 1, "heads": 2} if name == "small_vit" else {"width": 2}
    model = build(name, num_classes=5, channels=1, image_size=(8, 8), **width)
    large = {f"{n}.weight" for n, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)}
    assert large
    assert large <= weights_cast_once(View(model), torch.rand(2, 1, 8, 8))


@pytest.mark.parametrize("statistics", ["eval", "batch", "batch_tracked"])
def test_trying_leaves_no_trace(statistics: str) -> None:
    model, batch = nn.Sequential(nn.Dropout(0.5), *small_network()), small_batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert weights_cast_once(View(model, statistics=statistics), batch.x)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags


def test_a_step_tries_once_and_only_under_autocast() -> None:
    calls = []

    def counted(view: View, x: Tensor) -> frozenset[str]:
        calls.append(len(x))
        return weights_cast_once(view, x)

    with patch("holdfast.step.weights_cast_once", counted):
        for precision in ("fp32", "bf16"):
            step = AdversarialStep(small_recipe(), small_network(), precision=precision)
            for _ in range(2):
                step(small_batch(), Progress())
    assert calls == [2]


def test_a_compiled_network_is_tried_uncompiled() -> None:
    model = small_network()
    model._compiled_call_impl = compiled = lambda x: pytest.fail("compiled for two images")
    assert weights_cast_once(View(model), small_batch().x[:2])
    assert model._compiled_call_impl is compiled


def test_validation_in_low_precision_tries_once_and_gives_the_same() -> None:
    model, batch = small_network().eval(), small_batch(rows=24)
    images = Images((batch.x.permute(0, 2, 3, 1) * 255).to(torch.uint8), batch.y)
    names = weights_cast_once(View(model), batch.x[:2])
    found, used = [], []

    class Watched(View):
        def detached(self) -> View:
            used.append(self.cast_once)
            return super().detached()

    for answer in (frozenset[str](), names):
        with (
            patch("holdfast.evaluation.accuracy.weights_cast_once", return_value=answer) as tried,
            patch("holdfast.evaluation.accuracy.View", Watched),
        ):
            attack = PGD(steps=3, early_stop=0)
            found.append(
                accuracies(model, images, threat=Linf(0.02), attack=attack, batch_size=9, autocast="bf16").as_dict()
            )
            assert tried.call_count == 1
            assert set(used) == {answer}
            used.clear()
            accuracies(model, images, threat=Linf(0.02), attack=attack, autocast="fp32")
            assert tried.call_count == 1
            used.clear()
    assert found[0] == found[1]


def test_a_network_that_works_otherwise_without_gradients() -> None:
    """A fast path may read its weight itself; then it is left to autocast."""

    class Fast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return self.head(x) if torch.is_grad_enabled() else (x.double() @ self.head.weight.double().T).float()

    assert weights_cast_once(View(Fast()), torch.rand(2, 1, 8, 8)) == frozenset()
    assert weights_cast_once(View(nn.Sequential(nn.Flatten(), nn.Linear(64, 4))), torch.rand(2, 1, 8, 8))
