"""AWP, RWP and ISEAT by hand: perturbed copies of the model, and the two-model merge of ISEAT's equation (17)."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import small_batch, small_network
from holdfast.attacks.fgsm import FGSM
from holdfast.attacks.pgd import PGD
from holdfast.averages.ema import EMA
from holdfast.averages.interpolation import Interpolation
from holdfast.errors import HoldfastError
from holdfast.forward import Forward
from holdfast.functional import cross_entropy, kl, smooth_labels
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.objectives.asymmetric_trades import AsymmetricTRADES
from holdfast.objectives.base import Objective
from holdfast.objectives.logit_stability import LogitStability
from holdfast.objectives.trades import TRADES
from holdfast.recipe import SGD
from holdfast.schedule import Progress, after_first_decay, linear, piecewise, value_at
from holdfast.step import AdversarialStep
from holdfast.views.split_batchnorm import SplitBatchNorm
from holdfast.views.worst_weights import WorstWeights
from parts import small_recipe

Tensors = dict[str, Tensor]
Rows = Callable[[nn.Module], Tensor]  # the (B,) losses under a model
ROWS = 8
FREE, PLAIN = {}, AdversarialTraining()  # no ν; PGD-AT


def network() -> nn.Module:
    """Convolutions, BatchNorm with distinct affine parameters and statistics, a linear layer."""
    model, generator = small_network(dtype=torch.float64), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dim() == 1:
                tensor += 0.5 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    return model


def length(*tensors: Tensor) -> float:
    """The Euclidean norm of all their elements together."""
    return math.sqrt(sum(value * value for tensor in tensors for value in tensor.flatten().tolist()))


def slopes(model: nn.Module, loss: Tensor) -> Tensors:
    """The gradient of a loss with respect to a model's parameters, zero where it does not depend on them."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(
        zip(names, torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True), strict=True)
    )


def moved(model: nn.Module, by: Mapping[str, Tensor]) -> nn.Module:
    """A copy in training mode at θ + ν."""
    other = copy.deepcopy(model).requires_grad_(True).train()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter += by.get(name, 0.0)
    return other


def scaled(v: Tensor, size: float) -> Tensor:
    """v at another length; zero where it has no direction."""
    return v * (size / length(v)) if length(v) > 0 else v


def awp(model: nn.Module, rows_of: Rows, gamma: float) -> Tensors:
    """ν of eq. (11) with a proxy model, each tensor scaled by its own norm; biases and BatchNorm stay."""
    proxy = moved(model, FREE)
    gradient = slopes(proxy, rows_of(proxy).mean())
    return {n: scaled(gradient[n], gamma * length(w)) for n, w in model.named_parameters() if w.dim() >= 2}


def rwp(model: nn.Module, rows_of: Rows, gamma: float, *, steps: int, step_size: float, below: Any, scale: str) -> Any:
    """RWP's ν, and which rows each step climbed: the sum of those below the criterion over the whole batch's size."""
    weights = {name: w.detach() for name, w in model.named_parameters() if w.dim() >= 2}
    v, masks = {name: torch.zeros_like(w) for name, w in weights.items()}, []
    for _ in range(steps):
        rows = rows_of(proxy := moved(model, v))
        masks.append(tuple(below is None or value < below for value in rows.tolist()))
        loss = sum((row for row, kept in zip(rows, masks[-1], strict=True) if kept), 0 * rows.sum()) / ROWS
        gradient = slopes(proxy, loss)
        v = {name: v[name] + step_size * gradient[name] for name in v}
    if scale == "tensor":
        return {name: scaled(v[name], gamma * length(w)) for name, w in weights.items()}, masks
    factor = gamma * length(*weights.values()) / length(*v.values()) if any(map(length, v.values())) else 0.0
    return {name: factor * v[name] for name in v}, masks


def statistics_after(model: nn.Module, *runs: tuple[Tensors, Tensor]) -> Tensors:
    """The buffers that training-mode forwards leave, each at its own ν, in their order."""
    buffers = dict(model.named_buffers())
    for nu, x in runs:
        other = moved(model, nu)
        other.load_state_dict({**other.state_dict(), **buffers})
        other(x)
        buffers = dict(other.named_buffers())
    return buffers


def merged(outputs: Sequence[tuple[nn.Module, Tensor]], loss_of: Callable[..., Tensor]) -> tuple[Tensor, Tensors]:
    """Eq. (17): the loss's slope at every output, one backward pass through every model, gradients added."""
    logits = [model(x) for model, x in outputs]
    leaves = [value.detach().requires_grad_() for value in logits]
    loss = loss_of(*leaves)
    cotangents = torch.autograd.grad(loss, leaves)
    passes = [slopes(m, (v * c).sum()) for (m, _), v, c in zip(outputs, logits, cotangents, strict=True)]
    return loss, {name: torch.stack([each[name] for each in passes]).sum(0) for name in passes[0]}


def assert_close(found: Mapping[str, Tensor], expected: Tensors, rtol: float = 1e-10, atol: float = 1e-10) -> None:
    """Equal up to rounding in float64, and integers exactly."""
    torch.testing.assert_close(dict(found), dict(expected), rtol=rtol, atol=atol)


class Case:
    """A network, a batch, a step with the views under test, and an untouched copy to write the method out on."""

    def __init__(self, objective: Any, *views: Any, soft: bool = False, at: Any = None, model: Any = None, **more: Any):
        self.model = network() if model is None else model
        self.before = copy.deepcopy(self.model)
        self.progress = Progress() if at is None else at
        self.batch = small_batch(rows=ROWS, dtype=torch.float64)
        if soft:
            noise = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
            self.batch = self.batch._replace(target=noise.softmax(1))
        self.target = self.batch.labels
        self.step = AdversarialStep(small_recipe(objective, views=views, **more), self.model, precision="fp64")
        self.x, self.x_adv = self.batch.x, self.step.find(self.batch, objective, self.progress).x_adv

    def adversarial(self, model: nn.Module) -> Tensor:
        """CE(f(x'), t) of every row."""
        return cross_entropy(model(self.x_adv), self.target)

    def trades(self, model: nn.Module) -> Tensor:
        """CE(f(x), t) + 3 KL of every row, both sides under one model."""
        clean = model(self.x)
        return cross_entropy(clean, self.target) + 3.0 * kl(clean, model(self.x_adv))

    def gradients(self) -> Tensors:
        """What is in .grad now."""
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.model.named_parameters()}

    def forwards(self) -> int:
        """How often a step runs the network."""
        calls: list[int] = []
        with self.model.register_forward_hook(lambda *_: calls.append(1)):
            self.step(self.batch, self.progress)
        return len(calls)

    def assert_step(self, loss: Tensor, gradients: Tensors, *runs: tuple[Tensors, Tensor]) -> None:
        """One step gives this loss and these gradients, leaves the statistics that such forwards leave, and no more."""
        before = [[m.training for m in self.model.modules()], [p.requires_grad for p in self.model.parameters()]]
        found = self.step(self.batch, self.progress)["loss"]
        assert all(parameter.grad is None for parameter in self.model.parameters()), "the search wrote a gradient"
        torch.testing.assert_close(found.detach(), loss.detach(), rtol=1e-10, atol=1e-10)
        found.backward()
        assert_close(self.gradients(), gradients)
        assert_close(dict(self.model.named_buffers()), statistics_after(self.before, *runs))
        assert_close(dict(self.model.named_parameters()), dict(self.before.named_parameters()), 0, 0)
        assert before == [
            [m.training for m in self.model.modules()],
            [p.requires_grad for p in self.model.parameters()],
        ]

    def assert_step_at(self, nu: Tensors, rows_of: Rows, *images: Tensor) -> None:
        """One step is that of a single model at θ + ν which has run on these images."""
        theta = moved(self.before, nu)
        loss = rows_of(theta).mean()
        self.assert_step(loss, slopes(theta, loss), *((nu, x) for x in images))


@pytest.mark.parametrize("labels", ["hard", "soft", "smoothed"])
@pytest.mark.parametrize("gamma", [0.01, 0.3])
def test_awp_on_pgd_at_is_the_gradient_of_a_perturbed_copy(gamma: float, labels: str) -> None:
    worst = WorstWeights() if gamma == 0.01 else WorstWeights(gamma=gamma)
    case = Case(PLAIN, worst, soft=labels == "soft", label_smoothing=0.3 * (labels == "smoothed"))
    if labels == "smoothed":
        case.target = smooth_labels(case.batch.y, 5, 0.3, dtype=torch.float32).double()
    case.assert_step_at(awp(case.before, case.adversarial, gamma), case.adversarial, case.x_adv)


@pytest.mark.parametrize("scale", ["global", "tensor"])
@pytest.mark.parametrize("trades", [False, True])
@pytest.mark.parametrize(("steps", "step_size"), [(10, 0.01), (4, 0.3), (1, 0.01)])
@pytest.mark.parametrize("below", [1.7, 1.45, 1e-9, None])
def test_rwp_and_trades_awp(steps: int, step_size: float, below: float | None, trades: bool, scale: str) -> None:
    """The criterion is on the sum of the terms that are climbed; no row below it gives no ν. Then all rows count."""
    settings: dict[str, Any] = {"steps": steps, "step_size": step_size, "below": below, "scale": scale}
    sides = {"sides": ("clean", "adv"), "ascend": "objective"} if trades else {}
    given = {name: value for name, value in settings.items() if value != 0.01}  # the default of step_size
    case = Case(TRADES(beta=3.0) if trades else PLAIN, WorstWeights(gamma=0.2, **given, **sides))
    rows_of = case.trades if trades else case.adversarial
    nu, masks = rwp(case.before, rows_of, 0.2, **settings)
    if below in (1.7, 1.45):
        assert 0 < sum(masks[0]) < ROWS
        assert len(set(masks)) > 1 or steps == 1, "no row crosses the criterion on the way"
    case.assert_step_at(nu, rows_of, *([case.x] if trades else []), case.x_adv)


@pytest.mark.parametrize(
    ("objective", "settings", "derived", "searched"),
    [
        (AdversarialTraining, {}, 3, 1),
        (AdversarialTraining, {"steps": 10, "scale": "global", "below": 1.7}, 30, 10),
        (TRADES, {"sides": ("clean", "adv"), "ascend": "objective", "steps": 4}, 24, 8),
        (LogitStability, {"sides": ("clean", "adv")}, 3, 1),
        (lambda: TRADES(beta=piecewise((0, 0.0), (0.5, 6.0))), {"sides": ("clean", "adv")}, 0, 0),
    ],
)
def test_the_search_costs_what_it_says(objective: Any, settings: Any, derived: float, searched: int) -> None:
    case, bare = Case(objective(), WorstWeights(**settings)), Case(objective())
    assert case.step.recipe.passes(case.progress) - bare.step.recipe.passes(bare.progress) == derived
    assert case.forwards() - bare.forwards() == searched
    assert Case(objective(), WorstWeights(**settings), at=Progress(step=1, epochs=4, warmup_steps=2)).forwards() == 1


@pytest.mark.parametrize("done", [0, 1, 3])
@pytest.mark.parametrize("gamma", [{"knots": [[0, 0.0], [1, 0.4]]}, lambda p: 0.1 * p.stage, after_first_decay(0.2), 0])
def test_gamma_follows_its_schedule_and_zero_costs_nothing(gamma: Any, done: int) -> None:
    progress = Progress(step=done, epochs=4, stage=done)
    now = value_at(gamma, progress)
    case, bare = Case(PLAIN, WorstWeights(gamma=gamma), at=progress), Case(PLAIN, at=progress)
    assert case.step.recipe.passes(progress) - bare.step.recipe.passes(progress) == (3.0 if now else 0.0)
    if now:
        case.assert_step_at(awp(case.before, case.adversarial, now), case.adversarial, case.x_adv)
        return
    for each in (case, bare):
        each.step(each.batch, progress)["loss"].backward()
    assert_close(case.gradients(), bare.gradients(), 0, 0)
    assert case.forwards() == bare.forwards()


class Odd(nn.Module):
    """A layer without effect, one that is never run, one of zeros and a bare parameter beside an ordinary layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dead, self.zeros = (nn.Linear(64, 6) for _ in range(3))
        self.unused, self.head = nn.Linear(3, 3), nn.Linear(6, 5)
        nn.init.zeros_(self.zeros.weight)
        self.unused.requires_grad_(False)  # a user's own choice, which must survive
        self.table = nn.Parameter(torch.rand(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head((self.first(x) + 0 * self.dead(x) + self.zeros(x)).tanh() * self.table)


def test_a_zero_gradient_and_a_zero_weight_give_no_nu() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        case = Case(PLAIN, WorstWeights(gamma=0.2), model=Odd().double())
    nu = awp(case.before, case.adversarial, 0.2)
    assert {name for name, v in nu.items() if length(v) == 0} == {"dead.weight", "unused.weight", "zeros.weight"}
    case.assert_step_at(nu, case.adversarial, case.x_adv)


class Headed(Objective):
    """Cross-entropy through a trained part of its own, at any scale."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, generator = scale, torch.Generator().manual_seed(4)
        self.head = nn.Parameter(torch.randn(5, 5, generator=generator, dtype=torch.float64))

    def forward(self, f: Forward) -> dict[str, Tensor]:
        return {"headed": self.scale * cross_entropy(f.outputs["adv"].logits @ self.head, f.batch.y)}


@pytest.mark.parametrize("size", ["global", "tensor"])
@pytest.mark.parametrize(("scale", "tolerance"), [(1.0, 1e-10), (1e-12, 1e-4)])
def test_nu_ignores_the_scale_of_the_loss_and_spares_the_objectives_parts(scale: float, tolerance: float, size: str):
    """A confident network's gradient is tiny: ν is γ‖w‖ long all the same."""
    objective, twin = Headed(scale), Headed(1.0)
    case = Case(objective, WorstWeights(gamma=0.2, ascend="objective", scale=size))
    rows_of: Rows = lambda model: cross_entropy(model(case.x_adv) @ twin.head, case.target)  # noqa: E731
    theta = moved(case.before, rwp(case.before, rows_of, 0.2, steps=1, step_size=1.0, below=None, scale=size)[0])
    rows_of(theta).mean().backward()
    case.step(case.batch, case.progress)["loss"].backward()
    found, expected = {**case.gradients(), "head": objective.head.grad}, dict(theta.named_parameters())
    for name, parameter in {**expected, "head": twin.head}.items():
        torch.testing.assert_close(found[name] / scale, parameter.grad, rtol=tolerance, atol=tolerance)
    assert torch.equal(objective.head, twin.head)


def iseat(target: Tensor, weights: str = "linear", share: float = 0.1, distance: str = "squared_l2") -> Any:
    """Eq. (15) of the logits: of the adversarial images at θ', of the clean ones, and what is compared with those."""

    def loss(adv: Tensor, clean: Tensor, compared: Tensor | None = None) -> Tensor:
        compared = adv if compared is None else compared
        gap = kl(clean, compared) if distance == "kl" else ((compared - clean) ** 2).sum(1)
        w = torch.tensor(stability_weights(adv, clean, target, weights, share), dtype=torch.float64)
        return (cross_entropy(adv, target) + 0.4 * w * gap).mean()

    return loss


def stability_weights(adv: Tensor, clean: Tensor, target: Tensor, scheme: str, share: float = 1.0) -> list[float]:
    """Eqs. (13) and (14): the rank r counts the rows that are more vulnerable."""
    av = (cross_entropy(adv, target) - cross_entropy(clean, target)).tolist()
    ranks, m = [sum(other > value for other in av) for value in av], len(av)
    if scheme == "top":
        return [float(r < math.ceil(share * m)) for r in ranks]
    return [1 - r / m if scheme == "linear" else 1.0 for r in ranks]


@pytest.mark.parametrize("distance", ["squared_l2", "kl"])
@pytest.mark.parametrize(("weights", "share"), [("linear", 0.1), ("uniform", 0.1), ("top", 0.3), ("top", 0.1)])
@pytest.mark.parametrize("variant", ["LSIW", "LSI", "TRADES-AWP"])
def test_iseat_and_the_variants_of_table_9_merge_two_models(variant: str, weights: str, share: float, distance: str):
    """LSIW holds f(x'; θ') to f(x; θ), LSI f(x'; θ) to f(x; θ), TRADES-AWP f(x'; θ') to f(x; θ'); CE is at θ'."""
    compared = "adv_unperturbed" if variant == "LSI" else "adv"
    sides = ("clean", "adv") if variant == "TRADES-AWP" else ("adv",)
    objective = LogitStability(strength=0.4, weights=weights, top_share=share, distance=distance, compared=compared)
    case = Case(objective, WorstWeights(gamma=0.4, sides=sides), soft=distance == "kl")
    nu = awp(case.before, case.adversarial, 0.4)
    theta, perturbed = (moved(case.before, by) for by in (FREE, nu))
    right, wrong = (stability_weights(m(case.x_adv), theta(case.x), case.target, "linear") for m in (perturbed, theta))
    assert right != wrong, "AV at θ + ν orders the rows as AV at θ does: nothing would tell them apart"
    clean, at_clean = (perturbed, nu) if variant == "TRADES-AWP" else (theta, FREE)
    third = [(theta, case.x_adv)] if variant == "LSI" else []
    loss_of = iseat(case.target, weights, share, distance)
    loss, gradients = merged([(perturbed, case.x_adv), (clean, case.x), *third], loss_of)
    case.assert_step(loss, gradients, (at_clean, case.x), (nu, case.x_adv), *[(FREE, x) for _, x in third])


def test_iseat_trains_as_algorithm_1_and_equation_18() -> None:
    """Three steps of SGD without momentum and weight decay: θ ← (θ + ν) - l ∂L/∂θ - ν."""
    plain = SGD(learning_rate=0.2, momentum=0.0, weight_decay=0.0)
    case = Case(LogitStability(strength=0.4), WorstWeights(gamma=0.1), optimizer=plain)
    optimizer, by_hand = case.step.optimizers()[0], case.before
    for number in range(3):
        progress = Progress(step=number, steps_per_epoch=3)
        case.x_adv = case.step.find(case.batch, case.step.objective, progress).x_adv
        nu = awp(by_hand, case.adversarial, 0.1)
        theta, perturbed = moved(by_hand, FREE), moved(by_hand, nu)
        _, gradients = merged([(perturbed, case.x_adv), (theta, case.x)], iseat(case.target))
        buffers = statistics_after(by_hand, (FREE, case.x), (nu, case.x_adv))
        for name, parameter in perturbed.named_parameters():
            parameter.data = parameter.data - 0.2 * gradients[name] - nu.get(name, 0.0)
        perturbed.load_state_dict({**perturbed.state_dict(), **buffers})
        by_hand = perturbed
        optimizer.zero_grad()
        case.step(case.batch, progress)["loss"].backward()
        optimizer.step()
    assert_close(case.model.state_dict(), by_hand.state_dict())


@pytest.mark.parametrize("sides", [("adv",), ("clean", "adv")])
def test_before_the_first_drop_of_the_learning_rate_awp_runs_alone(sides: tuple[str, ...]) -> None:
    """With λ = 0 eq. (15) is the cross-entropy at θ + ν, also where a clean side would run perturbed later."""
    case = Case(LogitStability(strength=after_first_decay(0.1)), WorstWeights(gamma=0.2, sides=sides))
    case.assert_step_at(awp(case.before, case.adversarial, 0.2), case.adversarial, case.x_adv)


BAD = [("gamma", -0.1), ("gamma", math.nan), ("gamma", "much"), ("ascend", "clean_ce"), ("scale", "layer")]
BAD += [("steps", 0), ("steps", 1.5), ("step_size", -0.01), ("step_size", math.nan), ("sides", ()), ("sides", "adv")]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_weight_search_refuses_what_cannot_be_meant(name: str, value: Any) -> None:
    with pytest.raises(HoldfastError, match=rf"{name}.*: (give|use|it must)"):
        WorstWeights(**{name: value})


NO_START, START, OTHER = PGD(steps=2, random_start=False), "give the attack a random start", "choose other sides"


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        (TRADES(), {"attack": NO_START}, START),
        (TRADES(), {"attack": FGSM(random_start=False)}, START),
        (AsymmetricTRADES(), {"attack": NO_START}, START),
        (TRADES(), {"attack": PGD(steps=2, random_start="normal")}, None),
        (PLAIN, {"attack": NO_START, "averages": (Interpolation(), EMA())}, None),
        (PLAIN, {"averages": (Interpolation(), EMA(), Interpolation(weight=0.5))}, "both write.*: keep one of them"),
        (PLAIN, {"views": (SplitBatchNorm(),)}, f"'clean'.*{OTHER}"),
        (PLAIN, {"views": (WorstWeights(sides=("clean", "adv")),)}, f"'clean'.*{OTHER}"),
        (TRADES(beta=0.0), {"views": (WorstWeights(),)}, f"'adv'.*{OTHER}"),
        (TRADES(), {"views": (SplitBatchNorm(sides=("clean2",)),)}, f"'clean2'.*{OTHER}"),
        (TRADES(beta=linear(6.0, 0.0)), {"views": (WorstWeights(),)}, None),
        (LogitStability(strength=after_first_decay(0.1)), {"views": (SplitBatchNorm(),)}, None),
        (LogitStability(strength=piecewise((0, 0.1), (0.5, 0.0))), {"views": (SplitBatchNorm(),)}, None),
    ],
)
def test_a_recipe_refuses_parts_that_never_fit(objective: Any, settings: dict[str, Any], message: str | None) -> None:
    with pytest.raises(HoldfastError, match=message) if message else nullcontext():
        small_recipe(objective, epochs=10, **settings)
