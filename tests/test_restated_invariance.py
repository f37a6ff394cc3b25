"""AR-AT's objective against its equation: plain numbers without a predictor, plain tensor operations with one.

w_adv CE(f(x'), t) + w_clean CE(f(x), t) + sum over L layers of (strength / L) d(h(z'), sg z)
"""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import small_batch, small_network
from holdfast.attacks.pgd import PGD
from holdfast.errors import HoldfastError
from holdfast.forward import Attacked, Batch, Forward, Outputs, View
from holdfast.functional import cross_entropy
from holdfast.models.resnet import ResNet18
from holdfast.objectives.asymmetric_invariance import AsymmetricInvariance
from holdfast.schedule import Progress, linear
from holdfast.step import AdversarialStep
from holdfast.threat import Linf
from parts import small_recipe
from test_restated_objectives import Rows, close, finite_difference, one_hot, restated_adv_ce, softmax
from tiny_runs import quadrants

ROWS, CLASSES = 4, 5
SHAPES = {"grid": (4, 2, 3), "tokens": (3, 5), "flat": (6,)}
LAYERS = tuple(SHAPES)
DIRECTIONS = ("asymmetric", "reversed", "symmetric", "no_stop_gradient")
DISTANCES = ("cosine", "mse", "kl")
LOOSE = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
MEASURED = Progress(measured={"clean_accuracy": 0.7})


class Tokens(nn.Module):
    """Three tokens of five numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :15].reshape(len(x), 3, 5)


class Net(nn.Module):
    """A network with one module of each shape that a feature may have."""

    def __init__(self) -> None:
        super().__init__()
        self.grid = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.tokens, self.flat, self.fc = Tokens(), nn.Linear(24, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.grid(x)).flatten(1)
        return self.fc(self.flat(hidden) + self.tokens(hidden).mean())


def made(seed: int = 0, **settings: object) -> AsymmetricInvariance:
    """An objective that knows the three layers, in float64, with every number of its predictors drawn."""
    objective = AsymmetricInvariance(**{"layers": LAYERS, **settings})
    objective.prepare(Net(), torch.rand(2, 1, 2, 3))
    generator = torch.Generator().manual_seed(seed)
    for parameter in objective.double().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return objective


class Case:
    """Random features and logits of both sides; `rows` are the features as plain numbers, one long row an image."""

    def __init__(self, seed: int, soft: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            numbers = torch.randn(ROWS, *shape, generator=generator, dtype=torch.float64)
            return (numbers + 0.5).requires_grad_()  # no row without a positive number: cosines are defined

        self.features = {s: {name: draw(*shape) for name, shape in SHAPES.items()} for s in ("clean", "adv")}
        self.logits = {"clean": draw(CLASSES), "adv": draw(CLASSES)}
        self.y = torch.randint(CLASSES, (ROWS,), generator=generator)
        self.target = draw(CLASSES).softmax(1).detach() if soft else None
        self.targets = one_hot(self.y.tolist()) if self.target is None else self.target.tolist()
        self.cotangent = torch.rand(ROWS, generator=generator, dtype=torch.float64) + 0.5

    def rows(self, side: str, layer: str) -> Rows:
        return self.features[side][layer].flatten(1).tolist()

    def forward(self, progress: Progress = MEASURED) -> Forward:
        batch = Batch(torch.zeros(ROWS, 1, 2, 3, dtype=torch.float64), self.y, target=self.target)
        outputs = {side: Outputs(self.logits[side], self.features[side]) for side in ("clean", "adv")}
        return Forward(batch, outputs, Attacked(batch.x, torch.zeros_like(self.y)), progress)


def pooled(row: list[float], layer: str) -> list[float]:
    """relu, then the mean over positions (channels stay) or over tokens (their numbers stay)."""
    row = [max(value, 0.0) for value in row]
    if layer == "grid":
        return [sum(row[6 * c : 6 * c + 6]) / 6 for c in range(4)]
    return [(row[d] + row[5 + d] + row[10 + d]) / 3 for d in range(5)] if layer == "tokens" else row


def gap(distance: str, moving: list[float], target: list[float], temperature: float) -> float:
    """The three distances of one row, the target second."""
    if distance == "cosine":
        dot = sum(m * t for m, t in zip(moving, target, strict=True))
        return 1 - dot / math.sqrt(sum(m * m for m in moving)) / math.sqrt(sum(t * t for t in target))
    if distance == "mse":
        return sum((m - t) ** 2 for m, t in zip(moving, target, strict=True)) / len(moving)
    q, p = (softmax([value / temperature for value in row]) for row in (moving, target))
    return sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))


def restated(layer: str, direction: str, distance: str, rows: dict[str, Rows], still: dict[str, Rows]) -> list[float]:
    """The distance at one layer for every row, with `still` where the gradient stops."""
    terms = []
    for i in range(ROWS):
        clean, adv, still_clean, still_adv = (
            pooled(source[side][i], layer) for source in (rows, still) for side in ("clean", "adv")
        )
        forth, back = gap(distance, adv, still_clean, 2.0), gap(distance, clean, still_adv, 2.0)
        value = {"asymmetric": forth, "reversed": back, "symmetric": (forth + back) / 2}
        terms.append(value.get(direction, gap(distance, adv, clean, 2.0)))
    return terms


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_without_a_predictor_values_and_gradients_are_the_equations(direction: str, distance: str) -> None:
    case = Case(40)
    objective = made(direction=direction, distance=distance, predictor=False, strength=4.5, temperature=2.0)
    term = objective(case.forward())["invariance"]
    expected = torch.zeros(ROWS, dtype=torch.float64)
    for layer in LAYERS:
        rows = {side: case.rows(side, layer) for side in ("clean", "adv")}
        expected += 1.5 * torch.tensor(restated(layer, direction, distance, rows, rows), dtype=torch.float64)
        for side in ("clean", "adv"):

            def total(moved: Rows, side: str = side, layer: str = layer, rows: dict[str, Rows] = rows) -> float:
                values = restated(layer, direction, distance, {**rows, side: moved}, rows)
                return sum(1.5 * s * v for s, v in zip(case.cotangent.tolist(), values, strict=True))

            (found,) = torch.autograd.grad((term * case.cotangent).sum(), [case.features[side][layer]], **LOOSE)
            assert close(found.flatten(1), finite_difference(total, rows[side]), 1e-7), (layer, side)
    assert close(term, expected)


def by_hand(objective: AsymmetricInvariance, index: int, z: Tensor) -> Tensor:
    """The predictor of one layer as matrix products and batch normalisation."""
    first, last = (m for m in objective.predictors[index].modules() if isinstance(m, nn.Linear))
    (norm,) = (m for m in objective.predictors[index].modules() if isinstance(m, nn.BatchNorm1d))
    hidden = z @ first.weight.T
    spread = ((hidden - hidden.mean(0)) ** 2).mean(0)
    hidden = (hidden - hidden.mean(0)) / torch.sqrt(spread + norm.eps) * norm.weight + norm.bias
    return torch.where(hidden > 0, hidden, 0.0) @ last.weight.T + last.bias


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_predictor_moves_the_side_that_learns(direction: str, distance: str) -> None:
    case = Case(41)
    objective = made(direction=direction, distance=distance, strength=2.0, temperature=3.0, predictor_ratio=0.6)

    def apart(moving: Tensor, target: Tensor) -> Tensor:
        if distance == "cosine":
            return 1 - (moving * target).sum(1) / (moving.norm(dim=1) * target.norm(dim=1))
        if distance == "mse":
            return ((moving - target) ** 2).mean(1)
        p, q = (target / 3.0).softmax(1), (moving / 3.0).softmax(1)
        return (p * (p.log() - q.log())).sum(1)

    expected = torch.zeros(ROWS, dtype=torch.float64)
    for index, layer in enumerate(LAYERS):
        clean, adv = (case.features[side][layer].clamp_min(0) for side in ("clean", "adv"))
        if layer != "flat":
            clean, adv = (z.mean((2, 3)) if layer == "grid" else z.mean(1) for z in (clean, adv))
        hand = {
            "asymmetric": lambda i, c, a: apart(by_hand(objective, i, a), c.detach()),
            "reversed": lambda i, c, a: apart(by_hand(objective, i, c), a.detach()),
            "no_stop_gradient": lambda i, c, a: apart(by_hand(objective, i, a), c),
        }
        hand["symmetric"] = lambda i, c, a, h=hand: (h["asymmetric"](i, c, a) + h["reversed"](i, c, a)) / 2
        expected = expected + 2.0 / 3.0 * hand[direction](index, clean, adv)
    term = objective(case.forward())["invariance"]
    assert close(term, expected.detach(), 1e-10)
    leaves = [*(z for side in case.features.values() for z in side.values()), *objective.parameters()]
    found = torch.autograd.grad((term * case.cotangent).sum(), leaves, **LOOSE)
    wanted = torch.autograd.grad((expected * case.cotangent).sum(), leaves, **LOOSE)
    for one, other in zip(found, wanted, strict=True):
        assert close(one, other, 1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_features_that_are_all_zero_have_finite_terms_and_gradients(distance: str) -> None:
    case = Case(47)
    case.features["clean"]["flat"] = torch.full((ROWS, 6), -1.0, dtype=torch.float64, requires_grad=True)
    case.features["adv"]["flat"] = torch.full((ROWS, 6), -1.0, dtype=torch.float64, requires_grad=True)
    term = made(direction="symmetric", distance=distance, predictor=False)(case.forward())["invariance"]
    leaves = [z for side in case.features.values() for z in side.values()]
    assert torch.isfinite(term).all()
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(term.sum(), leaves))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.1])
def test_each_layer_has_a_predictor_of_the_papers_layout(ratio: float) -> None:
    objective, network = AsymmetricInvariance(layers=LAYERS, predictor_ratio=ratio), Net()
    before, training = copy.deepcopy(network.state_dict()), network.training
    objective.prepare(network, torch.rand(2, 1, 2, 3))
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert network.training == training
    assert objective.taps == LAYERS
    assert len(objective.predictors) == 3
    for predictor, width in zip(objective.predictors, (4, 5, 6), strict=True):
        kinds = [module for module in predictor.modules() if not list(module.children())]
        assert [type(module) for module in kinds] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        first, norm, _, last = kinds
        hidden = max(1, int(width * ratio))
        assert (tuple(first.weight.shape), norm.num_features) == ((hidden, width), hidden)
        assert (tuple(last.weight.shape), first.bias) == ((width, hidden), None)
        assert last.bias is not None
        assert all(parameter.requires_grad for parameter in predictor.parameters())
    assert not list(made(predictor=False).parameters())


def test_without_names_the_layers_are_those_of_the_last_stage() -> None:
    objective = AsymmetricInvariance()
    objective.prepare(ResNet18(5, channels=1, width=2), torch.rand(2, 1, 16, 16))
    assert objective.layers is None
    assert objective.taps == ("layer4.0.bn1", "layer4.0.bn2", "layer4.1.bn1", "layer4.1.bn2")
    assert [tuple(next(head.parameters()).shape) for head in objective.predictors] == [(4, 16)] * 4


def test_strength_is_thirty_and_the_distance_the_cosine_unless_told() -> None:
    case = Case(42)
    told = {"distance": "cosine", "direction": "asymmetric", "predictor": True, "predictor_ratio": 0.25}
    unit = made(seed=5, strength=1.0, **told)(case.forward())["invariance"].detach()
    assert close(made(seed=5)(case.forward())["invariance"], unit * 30)
    progress = Progress(step=30, steps_per_epoch=10, epochs=10, measured=MEASURED.measured)
    assert close(made(seed=5, strength=linear(0, 5))(case.forward(progress))["invariance"], unit * 1.5)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    ("settings", "accuracy", "adv_weight", "clean_weight"),
    [
        ({}, 0.7, 0.7, 0.3),
        ({"balance_power": 2.0}, 0.7, 0.49, 0.09),
        ({"balance_power": 0.5}, 0.36, 0.6, 0.8),
        ({}, 0.0, 0.0, 1.0),
        ({}, 1.0, 1.0, 0.0),
        ({"balance": (0.9, 0.2)}, None, 0.9, 0.2),
        ({"balance": (1.0, 1.0), "balance_power": 3.0}, 0.5, 1.0, 1.0),
    ],
)
def test_the_entropies_are_balanced_by_the_measured_accuracy(
    settings: dict, accuracy: float | None, adv_weight: float, clean_weight: float, soft: bool
) -> None:
    case = Case(43, soft=soft)
    progress = Progress() if accuracy is None else Progress(measured={"clean_accuracy": accuracy})
    objective = made(**settings)
    terms = objective(case.forward(progress))
    for name, side, weight in (("adv_ce", "adv", adv_weight), ("clean_ce", "clean", clean_weight)):
        entropy = restated_adv_ce(case.logits[side].tolist(), case.targets)
        assert close(terms[name], [weight * value for value in entropy])
        gradients = torch.autograd.grad(terms[name].sum(), list(case.logits.values()), **LOOSE)
        targets = torch.tensor(case.targets, dtype=torch.float64)
        for other, gradient in zip(case.logits, gradients, strict=True):
            slope = weight * (case.logits[side].softmax(1) - targets) if other == side else torch.zeros_like(targets)
            assert close(gradient, slope.detach(), 1e-11)
    assert objective.sides(progress) == ("clean", "adv")


def test_the_balance_is_measured_on_the_clean_side_over_all_images() -> None:
    (measurement,) = AsymmetricInvariance().measures
    assert (measurement.name, measurement.side) == ("clean_accuracy", "clean")
    assert measurement.images >= 1000
    right = torch.eye(3).reshape(3, 1, 1, 3)  # a pixel a class

    def batches() -> Iterator[Batch]:
        yield Batch(right, torch.tensor([0, 1, 2]))
        yield Batch(right[:1], torch.tensor([2]))
        yield Batch(right[:1], torch.tensor([1]))

    assert measurement.measure(View(nn.Flatten()), batches()) == pytest.approx(3 / 5)
    assert not AsymmetricInvariance(balance=(1.0, 1.0)).measures
    with pytest.raises(HoldfastError, match="clean_accuracy"):
        made()(Case(44).forward(Progress()))


def test_the_attack_climbs_the_entropy_of_the_hard_label() -> None:
    case = Case(45, soft=True)
    loss = made().inner_loss(View(nn.Flatten()), case.forward().batch, MEASURED)
    assert close(loss(case.logits["adv"]), restated_adv_ce(case.logits["adv"].tolist(), one_hot(case.y.tolist())))


@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_gradient_reaches_the_network_through_the_side_that_learns_alone(direction: str, predictor: bool) -> None:
    network, batch = small_network(dtype=torch.float64), small_batch(dtype=torch.float64)
    objective = AsymmetricInvariance(layers=("1", "4"), direction=direction, predictor=predictor)
    objective.prepare(network, batch.x[:2])
    objective.double()
    noise = torch.rand(batch.x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pixels = {"clean": batch.x, "adv": batch.x + 0.3 * (noise - 0.5)}
    weights = {s: {n: p.detach().clone().requires_grad_() for n, p in network.named_parameters()} for s in pixels}
    views = {s: View(network, state=weights[s], statistics="batch", taps=objective.taps) for s in pixels}
    outputs = {side: views[side](pixels[side]) for side in pixels}
    found = Attacked(pixels["adv"], torch.zeros_like(batch.y))
    objective(Forward(batch, outputs, found, MEASURED))["invariance"].sum().backward()
    learns = {"asymmetric": ("adv",), "reversed": ("clean",)}.get(direction, ("clean", "adv"))
    for side, own in weights.items():
        reached = {name for name, weight in own.items() if weight.grad is not None and weight.grad.any()}
        assert reached >= {"0.weight", "3.weight"} if side in learns else not reached
        assert not reached & {"7.weight", "7.bias"}  # behind the last tap


def test_in_a_step_the_invariance_leaves_the_clean_forward_alone() -> None:
    network, batch = small_network(dtype=torch.float64), small_batch(dtype=torch.float64)
    objective = AsymmetricInvariance(layers=("4",), balance=(0.0, 0.0))
    objective.prepare(network, batch.x[:2])
    objective.double()
    step = AdversarialStep(small_recipe(objective), network, precision="fp64")
    x_adv = step.find(batch, objective, MEASURED).x_adv
    adv = View(network, statistics="batch", taps=("4",))(x_adv)
    with torch.no_grad():
        clean = View(network, statistics="batch", taps=("4",))(batch.x)
    forward = Forward(batch, {"clean": clean, "adv": adv}, Attacked(x_adv, batch.y), MEASURED)
    names = ("0.weight", "3.weight")
    wanted = [network.get_parameter(name) for name in names]
    alone = torch.autograd.grad(objective(forward)["invariance"].mean(), wanted)
    step(batch, MEASURED)["loss"].backward()
    for parameter, gradient in zip(wanted, alone, strict=True):
        assert gradient.norm() > 1e-3
        assert close(parameter.grad, gradient, 1e-9)


def test_the_symmetric_term_conflicts_with_the_clean_entropy_and_the_asymmetric_one_does_not() -> None:
    cosines: dict[str, list[float]] = {direction: [] for direction in DIRECTIONS}
    opposite: dict[str, list[float]] = {direction: [] for direction in DIRECTIONS}
    for seed in (1, 2):
        network = small_network(dtype=torch.float64, seed=seed)
        pixels, labels = quadrants(96, seed)
        batch = Batch(torch.from_numpy(pixels).double()[:, None] / 255, torch.from_numpy(labels))
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        recipe = small_recipe(attack=PGD(steps=5), threat=Linf(0.15))
        step = AdversarialStep(recipe, network, precision="fp64")
        for _ in range(20):
            x_adv = step.find(batch, recipe.objective, Progress(seed=seed)).x_adv
            view = View(network, statistics="batch_tracked")
            loss = sum(cross_entropy(view(x).logits, batch.y).mean() for x in (batch.x, x_adv))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = step.find(batch, recipe.objective, Progress(seed=seed))
        outputs = {
            side: View(network, statistics="batch", taps=("4",))(x)
            for side, x in (("clean", batch.x), ("adv", found.x_adv))
        }
        weights = [parameter for parameter in network.parameters() if parameter.dim() > 1]

        def flat(term: Tensor, weights: list[Tensor] = weights) -> Tensor:
            return torch.cat([g.flatten() for g in torch.autograd.grad(term.mean(), weights, **LOOSE)])

        classify = flat(cross_entropy(outputs["clean"].logits, batch.y))
        for direction in DIRECTIONS:
            objective = AsymmetricInvariance(layers=("4",), direction=direction, predictor=False)
            objective.prepare(network, batch.x[:2])
            align = flat(objective(Forward(batch, outputs, found, MEASURED))["invariance"])
            cosines[direction].append(F.cosine_similarity(align, classify, dim=0).item())
            opposite[direction].append((align * classify < 0).double().mean().item())
    for i in range(2):
        assert cosines["symmetric"][i] < -0.1
        assert cosines["reversed"][i] < -0.15  # its source, in the paper's account: d(sg z', z)
        assert cosines["asymmetric"][i] > -0.1
        assert cosines["no_stop_gradient"][i] == pytest.approx(cosines["symmetric"][i], abs=1e-9)  # without a predictor
        assert opposite["symmetric"][i] > opposite["asymmetric"][i] + 0.02


@pytest.mark.parametrize(
    "settings",
    [
        *({"strength": value} for value in (-1.0, float("nan"), "much")),
        *({name: "sideways"} for name in ("distance", "direction", "balance")),
        *({"balance": value} for value in ((1.0,), (1.0, 1.0, 1.0), (-1.0, 1.0), (1.0, float("nan")))),
        *({"balance_power": value} for value in (-1.0, float("nan"))),
        *({"predictor_ratio": value} for value in (0.0, -1.0, float("nan"))),
        *({"temperature": value} for value in (0.0, -1.0, float("nan"))),
        {"balance": 0.5},
    ],
)
def test_bad_values_are_refused(settings: dict) -> None:
    with pytest.raises(HoldfastError):
        AsymmetricInvariance(**settings)


def test_layers_that_the_network_lacks_and_use_before_preparation_are_refused() -> None:
    with pytest.raises(HoldfastError, match="layer9"):
        AsymmetricInvariance(layers=("layer9",)).prepare(Net(), torch.rand(2, 1, 2, 3))
    with pytest.raises(HoldfastError, match="prepare"):
        AsymmetricInvariance()(Case(46).forward())
